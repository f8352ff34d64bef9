// Tiles for bf16 and fp8 (e4m3, a float scale per block of 128 x 128): products of bf16 pairs, float sums.
#include <type_traits>

#include "tiles.h"

namespace SF_ISA {

// Sums that every row is spread over, pair by pair, to hide the latency of the dot product. Without an instruction for it there is no
// room in the registers for two.
#if defined(SF_NATIVE_DOT)
constexpr int CHAINS = 2;
#else
constexpr int CHAINS = 1;
#endif

template <int M>
static void bf16_run(const uint8_t* panel, int64_t ahead, int64_t k, const Record&, const uint8_t* const* tokens, float* out) {
  vf acc[CHAINS][M][2];
  SF_UNROLL for (int m = 0; m < M; ++m)
    for (int i = 0; i < CHAINS; ++i) acc[i][m][0] = acc[i][m][1] = zero();
  for (int64_t block = 0; block < k; block += 16) {
    SF_UNROLL for (int pair = 0; pair < 8; ++pair) {
      prefetch(panel + pair * 128 + ahead), prefetch(panel + pair * 128 + 64 + ahead);
      const vi w0 = loadi(panel + pair * 128), w1 = loadi(panel + pair * 128 + 64);
      SF_UNROLL for (int m = 0; m < M; ++m) {
        const vi x = broadcast4(tokens[m] + block * 2 + pair * 4);
        acc[pair % CHAINS][m][0] = dot2(acc[pair % CHAINS][m][0], w0, x);
        acc[pair % CHAINS][m][1] = dot2(acc[pair % CHAINS][m][1], w1, x);
      }
    }
    panel += 8 * 128;
  }
  SF_UNROLL for (int m = 0; m < M; ++m)
    for (int i = 0; i < 2; ++i) store(out + m * PANEL + i * LANES, CHAINS == 2 ? acc[0][m][i] + acc[CHAINS - 1][m][i] : acc[0][m][i]);
}

// 64 fp8 values -> two vectors of bf16 pairs (rows 0-15 and rows 16-31 for two k).
// Within each 128-bit lane L the first 8 bytes are rows 4L..4L+3 (two k each), the last 8 are rows 16+4L...
struct Fp8Decoder {
#if defined(SF_NATIVE_DOT)
  __m512i low[2], high[2];  // the two bytes of the bf16 of every non-negative e4m3 value, 128 entries each
  Fp8Decoder() {
    alignas(64) uint8_t low_table[128], high_table[128];
    for (int code = 0; code < 128; ++code) {
      const uint16_t bits = decode(code);
      low_table[code] = (uint8_t)bits, high_table[code] = (uint8_t)(bits >> 8);
    }
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_load_si512(low_table + 64 * i);
      high[i] = _mm512_load_si512(high_table + 64 * i);
    }
  }
  void operator()(const uint8_t* p, vi& w0, vi& w1) const {
    const __m512i code = _mm512_loadu_si512(p);
    const __m512i l = _mm512_permutex2var_epi8(low[0], code, low[1]);
    __m512i h = _mm512_permutex2var_epi8(high[0], code, high[1]);
    h = _mm512_ternarylogic_epi32(h, code, _mm512_set1_epi8((char)0x80), 0xf8);  // h | (code & sign)
    w0 = {_mm512_unpacklo_epi8(l, h)};
    w1 = {_mm512_unpackhi_epi8(l, h)};
  }
#else
  uint16_t table[256];
  Fp8Decoder() {
    for (int code = 0; code < 256; ++code) table[code] = (uint16_t)(decode(code & 127) | (code & 128) << 8);
  }
  void operator()(const uint8_t* p, vi& w0, vi& w1) const {
    uint16_t out[2][32];
    for (int lane = 0; lane < 4; ++lane)
      for (int i = 0; i < 8; ++i) {
        out[0][lane * 8 + i] = table[p[lane * 16 + i]];
        out[1][lane * 8 + i] = table[p[lane * 16 + 8 + i]];
      }
    w0 = loadi(out[0]), w1 = loadi(out[1]);
  }
#endif
  static uint16_t decode(int code) {
    const int exponent = code >> 3, mantissa = code & 7;
    if (code == 127) return 0x7fc0;
    return float_to_bf16(exponent ? std::ldexp(1.0f + mantissa / 8.0f, exponent - 7) : std::ldexp(mantissa / 8.0f, -6));
  }
};

template <int M>
static void fp8_run(const uint8_t* panel, int64_t ahead, int64_t k, const Record&, const uint8_t* const* tokens, float* out) {
  static const Fp8Decoder decode_table;
  const Fp8Decoder decode = decode_table;  // in registers
  const float* scales = (const float*)panel;
  prefetch(panel + ahead);
  panel += round_up(padded_k(FP8, k) / 128 * 4, 64);
  vf total[M][2];
  SF_UNROLL for (int m = 0; m < M; ++m) total[m][0] = total[m][1] = zero();
  // Even and odd pairs are summed apart, to hide the latency of the dot product: together while the sums of few
  // tokens fit into registers, else one after the other.
  for (int64_t block = 0; block < k; block += 128) {
    const int64_t pairs = (k - block < 128 ? k - block : 128) / 2;
    vf acc[2][M][2];
    for (int parity = 0; parity < 2; ++parity)
      SF_UNROLL for (int m = 0; m < M; ++m) acc[parity][m][0] = acc[parity][m][1] = zero();
    const auto sum_pairs = [&](auto first, auto step) {
      for (int64_t part = 0; part < pairs; part += 8) {
        SF_UNROLL for (int i = first; i < 8; i += step) {
          vi w0, w1;
          prefetch(panel + (part + i) * 64 + ahead);
          decode(panel + (part + i) * 64, w0, w1);
          SF_UNROLL for (int m = 0; m < M; ++m) {
            const vi x = broadcast4(tokens[m] + block * 2 + (part + i) * 4);
            acc[i & 1][m][0] = dot2(acc[i & 1][m][0], w0, x);
            acc[i & 1][m][1] = dot2(acc[i & 1][m][1], w1, x);
          }
        }
      }
    };
    if constexpr (M <= 3) {
      sum_pairs(std::integral_constant<int, 0>(), std::integral_constant<int, 1>());
    } else {
      sum_pairs(std::integral_constant<int, 0>(), std::integral_constant<int, 2>());
      sum_pairs(std::integral_constant<int, 1>(), std::integral_constant<int, 2>());
    }
    panel += 64 * 64;
    const vf scale = set1(scales[block / 128]);
    SF_UNROLL for (int m = 0; m < M; ++m)
      for (int i = 0; i < 2; ++i) total[m][i] = fma(acc[0][m][i] + acc[1][m][i], scale, total[m][i]);
  }
  SF_UNROLL for (int m = 0; m < M; ++m) store(out + m * PANEL, total[m][0]), store(out + m * PANEL + LANES, total[m][1]);
}

template <int M> struct Bf16 { static constexpr auto run = bf16_run<M>; };
template <int M> struct Fp8 { static constexpr auto run = fp8_run<M>; };
SF_TILE(bf16_tile, Bf16)
SF_TILE(fp8_tile, Fp8)

}  // namespace SF_ISA
