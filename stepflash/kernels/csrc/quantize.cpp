// Floats to packed int8 or int4: bit for bit what quantize_groups and pack_groups of formats.py make.
//
// A lane is a row: 32 rows of a group are turned over once, and then nothing crosses lanes, neither in the search for
// a scale nor when four codes of a row become the bytes that a dot instruction takes.
#include <atomic>
#include <limits>

#include "parallel.h"
#include "rows.h"

namespace SF_ISA {

using namespace stepflash;

constexpr int NUM_SCALES = 19;
constexpr int HALVES = PANEL / LANES;

// Keeps a product from being fused with the sum that takes it: the reference rounds both.
SF_INLINE vf rounded(vf x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x.v));
#else
  asm("" : "+x"(x.a), "+x"(x.b));
#endif
  return x;
}

// columns[j][row] = weight[first_row + row][begin + j], zeros beyond the matrix.
template <class T>
void turn_over(const T* weight, int64_t stride, int num_rows, int num_columns, int group, float (*columns)[PANEL]) {
  if (num_rows < PANEL || num_columns < group) std::memset(columns, 0, group * sizeof(*columns));
  for (int row = 0; row < num_rows; ++row) {
    const T* from = weight + row * stride;
    for (int j = 0; j < num_columns; ++j) {
      if constexpr (sizeof(T) == 4) columns[j][row] = from[j];
      else columns[j][row] = bf16_to_float(from[j]);
    }
  }
}

// To float16 and back, and never -0.
SF_INLINE vf through_f16(vf x) {
  alignas(32) uint16_t half[LANES];
  store_f16(half, x);
  x = load_f16(half);
  return select_gt(x * x, zero(), x, zero());
}

SF_INLINE vf inverse_of(vf scale) { return select_gt(scale * scale, zero(), set1(1.0f) / scale, zero()); }

SF_INLINE vf code_of(vf x, vf inverse, float low, float high) {
  return min(max(round(x * inverse), set1(low)), set1(high));
}

// Squared error of sixteen rows of a group with these scales, as eight sums that are then folded.
template <int GROUP>
SF_INLINE vf error_of(const float* columns, vf scale) {
  const vf inverse = inverse_of(scale);
  vf sums[8];
  for (int j = 0; j < 8; ++j) sums[j] = zero();
  for (int k = 0; k < GROUP; k += 8)
    for (int j = 0; j < 8; ++j) {
      const vf x = load(columns + (k + j) * PANEL);
      const vf difference = code_of(x, inverse, -8.0f, 7.0f) * scale - x;  // the product is exact
      sums[j] = sums[j] + rounded(difference * difference);
    }
  for (int count = 4; count; count /= 2)
    for (int j = 0; j < count; ++j) sums[j] = sums[j] + sums[j + count];
  return sums[0];
}

// The best of 19 scales around the one that maps the signed peak to -8; `worst` > 0 where there is none.
template <int GROUP>
SF_INLINE vf int4_scale(const float* columns, vf& bad) {
  vf low = load(columns), high = low;
  for (int k = 1; k < GROUP; ++k) {
    const vf x = load(columns + k * PANEL);
    low = min(low, x), high = max(high, x);
  }
  const vf peak = select_gt(high, zero() - low, high, low);
  const vf infinity = set1(std::numeric_limits<float>::infinity());
  vf best = zero(), best_error = infinity;
  for (int step = 0; step < NUM_SCALES; ++step) {
    const vf scale = through_f16(peak / set1((float)(-8.0 + 0.15 * (step - NUM_SCALES / 2))));
    const vf error = error_of<GROUP>(columns, scale);
    best = select_gt(best_error, error, scale, best);
    best_error = select_gt(best_error, error, error, best_error);  // never NaN
  }
  bad = bad + select_gt(infinity, best_error, zero(), set1(1.0f));
  return best;
}

template <int GROUP>
SF_INLINE vf int8_scale(const float* columns, vf& bad) {
  vf peak = zero(), nothing = zero();
  for (int k = 0; k < GROUP; ++k) {
    const vf x = load(columns + k * PANEL);
    peak = max(peak, max(x, zero() - x));
    nothing = fma(x, zero(), nothing);  // NaN if x is NaN or infinite
  }
  const vf scale = through_f16(peak / set1(127.0f));
  bad = bad + select_gt(set1(65536.0f), scale + nothing, zero(), set1(1.0f));
  return scale;
}

// Two groups of a panel: their scales, then their codes.
template <int GROUP, bool INT4>
bool quantize_pair(const QuantizeArgs& a, int64_t panel, int64_t pair, uint8_t* out) {
  alignas(64) float columns[GROUP][PANEL];
  const int64_t first_row = panel * PANEL;
  const int num_rows = (int)(a.num_rows - first_row < PANEL ? a.num_rows - first_row : PANEL);
  uint8_t* codes = out + 2 * PANEL * sizeof(uint16_t);
  vf bad = zero();
  for (int part = 0; part < 2; ++part) {
    const int64_t begin = (2 * pair + part) * GROUP, left = a.k - begin;
    const int num_columns = left < 0 ? 0 : left < GROUP ? (int)left : GROUP;
    const int64_t start = first_row * a.weight.stride + (num_columns ? begin : 0);
    if (a.weight.is_float) turn_over((const float*)a.weight.data + start, a.weight.stride, num_rows, num_columns, GROUP, columns);
    else turn_over((const uint16_t*)a.weight.data + start, a.weight.stride, num_rows, num_columns, GROUP, columns);
    vf inverse[HALVES];
    for (int half = 0; half < HALVES; ++half) {
      const float* rows = columns[0] + half * LANES;
      const vf scale = INT4 ? int4_scale<GROUP>(rows, bad) : int8_scale<GROUP>(rows, bad);
      store_f16((uint16_t*)out + part * PANEL + half * LANES, scale);
      inverse[half] = inverse_of(scale);
    }
    for (int k = 0; k < GROUP; k += 4) {
      vi words[HALVES];
      for (int half = 0; half < HALVES; ++half) {
        const float* rows = columns[k] + half * LANES;
        vi code[4];
        for (int j = 0; j < 4; ++j) {
          const vf x = load(rows + j * PANEL);
          code[j] = INT4 ? to_int(code_of(x, inverse[half], -8.0f, 7.0f)) + set1i(8) : to_int(code_of(x, inverse[half], -127.0f, 127.0f)) + set1i(128);
        }
        words[half] = (code[0] | shl<8>(code[1])) | (shl<16>(code[2]) | shl<24>(code[3]));
      }
      if (INT4) {
        storei(codes, words[0] | shl<4>(words[1]));
        codes += 64;
      } else {
        storei(codes, words[0]), storei(codes + 64, words[1]);
        codes += 128;
      }
    }
  }
  return !(hmax(bad) > 0.0f);
}

template <int GROUP, bool INT4>
bool quantize_all(const QuantizeArgs& args) {
  const int64_t pairs = padded_k(args.format, args.k) / (2 * GROUP), pair_bytes = panel_bytes(args.format, args.k) / pairs;
  std::atomic<bool> good{true};
  std::atomic<bool>* all_good = &good;
  parallel(args.num_threads, [=](Team& team) {
    team.share(num_panels(args.num_rows) * pairs, [&](int64_t index) {
      if (!quantize_pair<GROUP, INT4>(args, index / pairs, index % pairs, args.out + index * pair_bytes)) all_good->store(false);
    });
  });
  return good;
}

bool quantize(const QuantizeArgs& args) {
  switch (args.format) {
    case INT8_G32: return quantize_all<32, false>(args);
    case INT8_G64: return quantize_all<64, false>(args);
    case INT8_G128: return quantize_all<128, false>(args);
    case INT4_G32: return quantize_all<32, true>(args);
    case INT4_G64: return quantize_all<64, true>(args);
    case INT4_G128: return quantize_all<128, true>(args);
  }
  return false;
}

}  // namespace SF_ISA
