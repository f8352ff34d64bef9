// What the tile files share: broadcasts and the switch from a token count to a template.
#pragma once
#include "formats.h"
#include "vec.h"

namespace SF_ISA {

using namespace stepflash;

// NOTE: software prefetch only where it was measured to pay (see int_tile): hints close to the stream cost a
// quarter of the bandwidth, because they hold the few buffers that the hardware prefetcher needs. Weights are read
// once a token, so the hint keeps them out of the L2 cache.
SF_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 0); }

SF_INLINE vi broadcast4(const void* p) {  // the same four bytes in every lane
  int32_t bytes;
  std::memcpy(&bytes, p, 4);
  return set1i(bytes);
}

template <template <int> class Body>
inline void run_tile(const uint8_t* panel, int64_t k, const Record& record, const uint8_t* const* tokens, int num_tokens,
                     float* out) {
  switch (num_tokens) {
    case 1: return Body<1>::run(panel, k, record, tokens, out);
    case 2: return Body<2>::run(panel, k, record, tokens, out);
    case 3: return Body<3>::run(panel, k, record, tokens, out);
    case 4: return Body<4>::run(panel, k, record, tokens, out);
    case 5: return Body<5>::run(panel, k, record, tokens, out);
    case 6: return Body<6>::run(panel, k, record, tokens, out);
  }
}

#define SF_TILE(name, body) \
  void name(const uint8_t* panel, int64_t k, const Record& record, const uint8_t* const* tokens, int m, float* out) { \
    run_tile<body>(panel, k, record, tokens, m, out); \
  }

// Defined in tiles_int.cpp, tiles_float.cpp and tiles_gguf.cpp.
#define SF_DECLARE(name) \
  void name(const uint8_t* panel, int64_t k, const Record& record, const uint8_t* const* tokens, int m, float* out);
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
