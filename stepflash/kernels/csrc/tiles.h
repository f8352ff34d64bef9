// What the tile files share: broadcasts and the switch from a token count to a template.
#pragma once
#include "formats.h"
#include "vec.h"

namespace SF_ISA {

using namespace stepflash;

// How far ahead weights are asked for, two to four pages: the processor's own prefetcher stops at the end of a page, loses
// its way between scales and weights, and what a core sees coming is not enough once a vector serves several tokens.
// Measured with one thread streaming from memory, GB/s without it and with, for one token, two, four and six:
//   int4_g32  36 36 31 25 -> 47 44 38 30    int8_g32  31 25 29 27 -> 40 39 36 37    fp8   37 34 20 12 -> 44 44 37 32
//   q4_k      25 22 25 14 -> 48 45 35 27    q6_k      16 13 10  8 -> 44 42 36 30    bf16  42 40 35 30 -> 42 38 38 35
// Rows so short that a panel ends before that ask for what is read after it, one panel ahead.
// NOTE: loops over groups must not be unrolled as a whole: the loads of one instruction then jump from block to block, and
// what the processor prefetches for each of them is in everybody's way (q4_k for six tokens: 11 GB/s).
SF_INLINE int64_t bytes_ahead(int64_t k, const uint8_t* panel, const uint8_t* next) { return k < 256 ? (int64_t)next - (int64_t)panel : 9216; }
// Weights are read once, so the hint keeps them out of the L2 cache.
SF_INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 0); }

SF_INLINE vi broadcast4(const void* p) {  // the same four bytes in every lane
  int32_t bytes;
  std::memcpy(&bytes, p, 4);
  return set1i(bytes);
}

template <template <int> class Body>
inline void run_tile(const uint8_t* panel, int64_t ahead, int64_t k, const Record& record, const uint8_t* const* tokens, int num_tokens,
                     float* out) {
  switch (num_tokens) {
    case 1: return Body<1>::run(panel, ahead, k, record, tokens, out);
    case 2: return Body<2>::run(panel, ahead, k, record, tokens, out);
    case 3: return Body<3>::run(panel, ahead, k, record, tokens, out);
    case 4: return Body<4>::run(panel, ahead, k, record, tokens, out);
    case 5: return Body<5>::run(panel, ahead, k, record, tokens, out);
    case 6: return Body<6>::run(panel, ahead, k, record, tokens, out);
  }
}

#define SF_TILE(name, body) \
  void name(const uint8_t* panel, int64_t ahead, int64_t k, const Record& record, const uint8_t* const* tokens, int m, float* out) { \
    run_tile<body>(panel, ahead, k, record, tokens, m, out); \
  }

// Defined in tiles_int.cpp, tiles_float.cpp and tiles_gguf.cpp.
#define SF_DECLARE(name) \
  void name(const uint8_t* panel, int64_t ahead, int64_t k, const Record& record, const uint8_t* const* tokens, int m, float* out);
SF_DECLARE(bf16_tile)
SF_DECLARE(fp8_tile)
SF_DECLARE(int8_g32_tile)
SF_DECLARE(int8_g64_tile)
SF_DECLARE(int8_g128_tile)
SF_DECLARE(int4_g32_tile)
SF_DECLARE(int4_g64_tile)
SF_DECLARE(int4_g128_tile)
SF_DECLARE(q4_k_tile)
SF_DECLARE(q6_k_tile)
#undef SF_DECLARE

constexpr Tile TILES[NUM_FORMATS] = {bf16_tile,     fp8_tile,      int8_g32_tile,  int8_g64_tile, int8_g128_tile,
                                     int4_g32_tile, int4_g64_tile, int4_g128_tile, q4_k_tile,     q6_k_tile};

}  // namespace SF_ISA
