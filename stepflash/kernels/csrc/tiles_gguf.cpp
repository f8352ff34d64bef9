// Tiles for GGUF Q4_K and Q6_K, bit-exact in their weights and no larger than the file (4.5 and 6.5625 bits).
#include "tiles.h"

namespace SF_ISA {

// Q4_K: w = d * sc * u - dmin * mn, sc and mn six bits per 32 k. Their twelve bytes per row are three lanes:
//   A = sc0..sc4 | sc7[0:2] << 30    B = mn0..mn4 | sc7[2:4] << 30    C = sc5, sc6, mn5, mn6, mn7 | sc7[4:6] << 30
struct SixBits {
  vi a, b, c;
  template <int I> vi scale() const {
    const vi mask = set1i(63);
    if constexpr (I < 5) return shr<6 * I>(a) & mask;
    else if constexpr (I < 7) return shr<6 * (I - 5)>(c) & mask;
    else return shr<30>(a) | shl<2>(shr<30>(b)) | shl<4>(shr<30>(c));
  }
  template <int I> vi minimum() const {
    const vi mask = set1i(63);
    if constexpr (I < 5) return shr<6 * I>(b) & mask;
    else return shr<6 * (I - 3)>(c) & mask;
  }
};

// Scales and minimums of a block's eight groups, for rows 0-15 and 16-31.
struct GroupScales {
  alignas(64) float scale[8][PANEL], minimum[8][PANEL];

  template <int I> void unpack(const SixBits& bits, vf d, vf dmin, int half) {
    store(scale[I] + half * LANES, to_float(bits.scale<I>()) * d);
    store(minimum[I] + half * LANES, to_float(bits.minimum<I>()) * dmin);
    if constexpr (I < 7) unpack<I + 1>(bits, d, dmin, half);
  }

  explicit GroupScales(const uint8_t* panel) {
    const uint16_t* half = (const uint16_t*)panel;
    const uint8_t* six = panel + 128;
    for (int i = 0; i < 2; ++i) {
      const SixBits bits = {loadi(six + i * 64), loadi(six + 128 + i * 64), loadi(six + 256 + i * 64)};
      unpack<0>(bits, load_f16(half + i * LANES), load_f16(half + PANEL + i * LANES), i);
    }
  }
};

template <int M>
static void q4_k_run(const uint8_t* panel, int64_t ahead, int64_t k, const Record& record, const uint8_t* const* tokens, float* out) {
  const vi low = set1i(0x0f0f0f0f), high = set1i((int32_t)0xf0f0f0f0);
  vf total[M][2];
  for (int m = 0; m < M; ++m) total[m][0] = total[m][1] = zero();
  for (int64_t block = 0; block < k / 256; ++block, panel += 4608) {
    for (int line = 0; line < 8; ++line) prefetch(panel + line * 64 + ahead);
    const GroupScales scales(panel);
#pragma GCC unroll 1
    for (int64_t i = 0; i < 8; ++i) {
      const uint8_t* weights = panel + 512 + i * 512;
      const int64_t group = block * 8 + i;
      vi acc[M][2];
      for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = set1i(0);
#pragma GCC unroll 8
      for (int quad = 0; quad < 8; ++quad) {
        prefetch(weights + quad * 64 + ahead);
        const vi w = loadi(weights + quad * 64);
        for (int m = 0; m < M; ++m) {
          const vi x = broadcast4(tokens[m] + group * 32 + quad * 4);
          acc[m][0] = dot4(acc[m][0], w & low, x);
          acc[m][1] = dot4(acc[m][1], w & high, x);
        }
      }
      for (int m = 0; m < M; ++m) {
        const vf sx = set1(((const float*)(tokens[m] + record.scales))[group]);
        const vf sum = set1(-((const float*)(tokens[m] + record.sums))[group]);  // scale_x * sum of q
        for (int half = 0; half < 2; ++half) {
          const vf scale = load(scales.scale[i] + half * LANES), minimum = load(scales.minimum[i] + half * LANES);
          const vi dot = half ? sar<4>(acc[m][1]) : acc[m][0];
          total[m][half] = fma(to_float(dot), scale * sx, fma(minimum, sum, total[m][half]));
        }
      }
    }
  }
  for (int m = 0; m < M; ++m) store(out + m * PANEL, total[m][0]), store(out + m * PANEL + LANES, total[m][1]);
}

// Q6_K: w = d * sc * (u - 32), sc signed eight bits per 16 k; activations have one scale per 32 k.
template <int M>
static void q6_k_run(const uint8_t* panel, int64_t ahead, int64_t k, const Record& record, const uint8_t* const* tokens, float* out) {
  const vi low = set1i(0x0f0f0f0f), two = set1i(0x30303030);
  vf total[M][2];
  for (int m = 0; m < M; ++m) total[m][0] = total[m][1] = zero();
  for (int64_t block = 0; block < k / 256; ++block, panel += 6720) {
    const vf d[2] = {load_f16((const uint16_t*)panel), load_f16((const uint16_t*)panel + 16)};
    for (int line = 0; line < 9; ++line) prefetch(panel + line * 64 + ahead);
    const int8_t* scales = (const int8_t*)panel + 64;
    const uint8_t* bits = panel + 576;  // per eight k: low nibbles of each quad, then the high bits of both
    for (int group = 0; group < 8; ++group) {  // 32 k: one activation scale, two weight scales
      vi sum[M][2];
      for (int half = 0; half < 2; ++half) {
        vi acc[M][2];
        for (int m = 0; m < M; ++m)
          acc[m][0] = acc[m][1] = set1i(((const int32_t*)(tokens[m] + record.sums))[block * 16 + group * 2 + half]);
#pragma GCC unroll 2
        for (int eight = 0; eight < 2; ++eight, bits += 192) {
          for (int line = 0; line < 3; ++line) prefetch(bits + line * 64 + ahead);
          const vi l0 = loadi(bits), l1 = loadi(bits + 64), h = loadi(bits + 128);
          const vi w00 = (l0 & low) | (shl<4>(h) & two), w01 = (shr<4>(l0) & low) | (shl<2>(h) & two);
          const vi w10 = (l1 & low) | (h & two), w11 = (shr<4>(l1) & low) | (shr<2>(h) & two);
          for (int m = 0; m < M; ++m) {
            const uint8_t* q = tokens[m] + block * 256 + group * 32 + half * 16 + eight * 8;
            const vi x0 = broadcast4(q), x1 = broadcast4(q + 4);
            acc[m][0] = dot4(dot4(acc[m][0], w00, x0), w10, x1);
            acc[m][1] = dot4(dot4(acc[m][1], w01, x0), w11, x1);
          }
        }
        const vi s0 = load_s8(scales), s1 = load_s8(scales + 16);
        scales += 32;
        for (int m = 0; m < M; ++m) {
          sum[m][0] = half ? sum[m][0] + acc[m][0] * s0 : acc[m][0] * s0;
          sum[m][1] = half ? sum[m][1] + acc[m][1] * s1 : acc[m][1] * s1;
        }
      }
      for (int m = 0; m < M; ++m) {
        const vf sx = set1(((const float*)(tokens[m] + record.scales))[block * 8 + group]);
        total[m][0] = fma(to_float(sum[m][0]), d[0] * sx, total[m][0]);
        total[m][1] = fma(to_float(sum[m][1]), d[1] * sx, total[m][1]);
      }
    }
  }
  for (int m = 0; m < M; ++m) store(out + m * PANEL, total[m][0]), store(out + m * PANEL + LANES, total[m][1]);
}

template <int M> struct Q4K { static constexpr auto run = q4_k_run<M>; };
template <int M> struct Q6K { static constexpr auto run = q6_k_run<M>; };
SF_TILE(q4_k_tile, Q4K)
SF_TILE(q6_k_tile, Q6K)

}  // namespace SF_ISA
