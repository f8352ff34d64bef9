// Tiles for int8 and int4: unsigned weights times signed int8 activations, exact integer sums per group.
//
// w = scale * (u - offset), so a group contributes scale_w * scale_x * (sum u*q - offset * sum q); the last
// term is the accumulator's start value, made once per token. The float sums run over groups in order.
#include "tiles.h"

namespace SF_ISA {

// NIBBLES: one 64-byte vector carries rows 0-15 in its low and rows 16-31 in its high nibbles. The high ones
// stay in place (times 16: sums below 2^24, exact as floats), and their scale is a sixteenth.
template <int GROUP, bool NIBBLES, int M>
static void int_tile(const uint8_t* panel, int64_t ahead, int64_t k, const Record& record, const uint8_t* const* tokens, float* out) {
  constexpr int CHAINS = M == 1 || (M <= 3 && GROUP > 32) ? 2 : 1;  // enough independent sums to hide the latency of the dot product
  constexpr int64_t QUAD_BYTES = NIBBLES ? 64 : 128;
  const vi low = set1i(0x0f0f0f0f), high = set1i((int32_t)0xf0f0f0f0);
  vf total[M][2];
  SF_UNROLL for (int m = 0; m < M; ++m) total[m][0] = total[m][1] = zero();
  const int64_t groups = k / GROUP;
  for (int64_t g = 0; g < groups; ++g) {
    const uint16_t* scales = (const uint16_t*)panel + (g & 1) * PANEL;
    if (!NIBBLES) prefetch((const uint8_t*)scales + ahead);
    const uint8_t *weights = panel + 4 * PANEL + (g & 1) * (GROUP / 4 * QUAD_BYTES), *later = weights + ahead;
    vi acc[M][2][CHAINS];
    SF_UNROLL for (int m = 0; m < M; ++m) {
      const vi start = set1i(((const int32_t*)(tokens[m] + record.sums))[g]);
      acc[m][0][0] = start;
      acc[m][1][0] = NIBBLES ? shl<4>(start) : start;
      if (CHAINS == 2) acc[m][0][CHAINS - 1] = acc[m][1][CHAINS - 1] = set1i(0);
    }
#pragma GCC unroll 1
    for (int quads = 0; quads < GROUP / 4; quads += 8) {
      SF_UNROLL for (int i = 0; i < 8; ++i) {
        const int64_t at = (quads + i) * QUAD_BYTES;
        vi w0, w1;
        prefetch(later + at);
        if (NIBBLES) {
          const vi w = loadi(weights + at);
          w0 = w & low;
          w1 = w & high;
        } else {
          prefetch(later + at + 64);
          w0 = loadi(weights + at);
          w1 = loadi(weights + at + 64);
        }
        SF_UNROLL for (int m = 0; m < M; ++m) {
          const vi x = broadcast4(tokens[m] + g * GROUP + (quads + i) * 4);
          acc[m][0][i % CHAINS] = dot4(acc[m][0][i % CHAINS], w0, x);
          acc[m][1][i % CHAINS] = dot4(acc[m][1][i % CHAINS], w1, x);
        }
      }
    }
    const vf s0 = load_f16(scales), s1 = NIBBLES ? load_f16(scales + LANES) * set1(1.0f / 16) : load_f16(scales + LANES);
    SF_UNROLL for (int m = 0; m < M; ++m) {
      const vf sx = set1(((const float*)(tokens[m] + record.scales))[g]);
      vi a0 = acc[m][0][0], a1 = acc[m][1][0];
      if (CHAINS == 2) a0 = a0 + acc[m][0][CHAINS - 1], a1 = a1 + acc[m][1][CHAINS - 1];
      total[m][0] = fma(to_float(a0), s0 * sx, total[m][0]);
      total[m][1] = fma(to_float(a1), s1 * sx, total[m][1]);
    }
    if (g & 1) panel += 4 * PANEL + GROUP / 2 * QUAD_BYTES;
  }
  SF_UNROLL for (int m = 0; m < M; ++m) store(out + m * PANEL, total[m][0]), store(out + m * PANEL + LANES, total[m][1]);
}

#define SF_INT(name, group, nibbles) \
  template <int M> struct name##_of { static constexpr auto run = int_tile<group, nibbles, M>; }; \
  SF_TILE(name, name##_of)
SF_INT(int8_g32_tile, 32, false)
SF_INT(int8_g64_tile, 64, false)
SF_INT(int8_g128_tile, 128, false)
SF_INT(int4_g32_tile, 32, true)
SF_INT(int4_g64_tile, 64, true)
SF_INT(int4_g128_tile, 128, true)

}  // namespace SF_ISA
