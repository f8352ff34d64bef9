// How keys and values lie in the paged cache: ready for dot products of pairs, so that nothing is turned around
// when they are read.
//
//   keys    [num_blocks, num_kv_heads, head_dim / 2, block_size, 2]: lanes are keys, a pair is two dimensions
//   values  [num_blocks, num_kv_heads, block_size / 2, head_dim, 2]: lanes are dimensions, a pair is two keys
//   scales  [num_blocks, num_kv_heads, block_size] float32, of an int8 cache
#pragma once
#include "rows.h"

namespace SF_ISA {

// Where one head of a block begins, in units of block_size (scales) and of block_size * head_dim (the rest).
SF_INLINE int64_t block_head(const Cache& cache, int64_t block, int64_t head) { return block * cache.num_kv_heads + head; }

// Element of dimension d at an offset of a block, counted from where the head of that block begins.
SF_INLINE int64_t key_element(const Cache& cache, int64_t offset, int64_t d) { return (d / 2 * cache.block_size + offset) * 2 + d % 2; }
SF_INLINE int64_t value_element(const Cache& cache, int64_t offset, int64_t d) { return (offset / 2 * cache.head_dim + d) * 2 + offset % 2; }

// Tokens of one pair may be written by two threads: every store touches its own element only.
template <class T>
SF_INLINE void scatter_head(const Cache& cache, bool is_value, T* at, int64_t offset, const T* x) {
  if (is_value) {
    at += value_element(cache, offset, 0);
    for (int64_t d = 0; d < cache.head_dim; ++d) at[2 * d] = x[d];
  } else {
    at += key_element(cache, offset, 0);
    for (int64_t d = 0; d < cache.head_dim; d += 2) std::memcpy(at + d * cache.block_size, x + d, 2 * sizeof(T));
  }
}

// Stores the key or value x [head_dim] of one head at a slot; int8 with a scale of its own.
SF_INLINE void write_head(const Cache& cache, bool is_value, int64_t slot, int64_t head, const float* x) {
  const int64_t n = cache.head_dim, at = block_head(cache, slot / cache.block_size, head), offset = slot % cache.block_size;
  void* data = is_value ? cache.v : cache.k;
  if (!cache.is_int8) {
    uint16_t rounded[512];
    for (int64_t i = 0; i < n; i += LANES) store_bf16(rounded + i, load(x + i));
    return scatter_head(cache, is_value, (uint16_t*)data + at * cache.block_size * n, offset, rounded);
  }
  const vi sign = set1i(0x7fffffff);
  vf top = zero(), strange = zero();
  for (int64_t i = 0; i < n; i += LANES) {
    top = max(top, as_float(as_int(load(x + i)) & sign));
    strange = fma(load(x + i), zero(), strange);
  }
  const float peak = hmax(top) + hsum(strange);  // not a number if any is: the scale tells those who read it
  const vf inverse = set1(peak > 0 ? 127.0f / peak : 0.0f);
  int8_t rounded[512];
  for (int64_t i = 0; i < n; i += LANES) store_s8(rounded + i, to_int(load(x + i) * inverse));
  (is_value ? cache.v_scale : cache.k_scale)[at * cache.block_size + offset] = peak / 127.0f;
  scatter_head(cache, is_value, (int8_t*)data + at * cache.block_size * n, offset, rounded);
}

}  // namespace SF_ISA
