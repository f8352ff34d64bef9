// How keys and values lie in the paged cache.
#pragma once
#include "rows.h"

namespace SF_ISA {

// One head of one token as int8 with its own scale.
SF_INLINE void write_int8(const float* x, int64_t n, int8_t* out, float* scale) {
  float peak = 0;
  for (int64_t i = 0; i < n; ++i) peak = std::fmax(peak, std::fabs(x[i]));
  *scale = peak / 127.0f;
  const float inverse = peak > 0 ? 127.0f / peak : 0.0f;
  for (int64_t i = 0; i < n; ++i) out[i] = (int8_t)std::nearbyintf(x[i] * inverse);
}

// Stores the key or value x [head_dim] of one head at a slot.
SF_INLINE void write_head(const Cache& cache, bool is_value, int64_t slot, int64_t head, const float* x) {
  void* out = is_value ? cache.v : cache.k;
  const int64_t at = (slot * cache.num_kv_heads + head) * cache.head_dim;
  if (cache.is_int8) {
    float* scale = is_value ? cache.v_scale : cache.k_scale;
    write_int8(x, cache.head_dim, (int8_t*)out + at, scale + slot * cache.num_kv_heads + head);
  } else {
    for (int64_t i = 0; i < cache.head_dim; i += LANES) store_bf16((uint16_t*)out + at + i, load(x + i));
  }
}

}  // namespace SF_ISA
