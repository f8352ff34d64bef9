// Per-head RMS norm of q and k, rotation of the first rotary_dim dimensions, and the write into the cache.
#include "parallel.h"
#include "rows.h"

namespace SF_ISA {

// Pairs (j, j + half) rotate by the angle of frequency j ("rotate half", spec 2.4).
SF_INLINE void rotate(float* x, int64_t half, const float* cos, const float* sin) {
  int64_t j = 0;
  for (; j + LANES <= half; j += LANES) {
    const vf a = load(x + j), b = load(x + half + j), c = load(cos + j), s = load(sin + j);
    store(x + j, a * c - b * s);
    store(x + half + j, b * c + a * s);
  }
  for (; j < half; ++j) {
    const float a = x[j], b = x[half + j];
    x[j] = a * cos[j] - b * sin[j];
    x[half + j] = b * cos[j] + a * sin[j];
  }
}

void qk_norm_rope(const RopeArgs& args) {
  const int64_t heads = args.num_heads + args.num_kv_heads, dim = args.head_dim, half = args.rotary_dim / 2;
  parallel(args.num_tokens * heads < 256 ? 1 : args.num_threads, [=](Team& team) {
    team.share(args.num_tokens, [&](int64_t t) {
      float head[512];
      const View none;
      for (int64_t h = 0; h < heads; ++h) {
        const bool is_q = h < args.num_heads;
        const int64_t column = (is_q ? h : h - args.num_heads) * dim;
        View in = is_q ? args.q : args.k;
        in.data = (char*)in.data + column * (in.is_float ? 4 : 2);
        load_row(in, t, dim, head);
        norm_row(head, dim, is_q ? args.q_weight : args.k_weight, args.eps);
        rotate(head, half, args.cos + t * half, args.sin + t * half);
        for (int64_t i = 0; i < dim; i += 256)
          store_row(is_q ? args.q_out : args.k_out, none, t, column + i, dim - i < 256 ? dim - i : 256, head + i);
      }
    });
  });
}

// One head of one token as int8 with its own scale.
static void write_int8(const float* x, int64_t n, int8_t* out, float* scale) {
  float peak = 0;
  for (int64_t i = 0; i < n; ++i) peak = std::fmax(peak, std::fabs(x[i]));
  *scale = peak / 127.0f;
  const float inverse = peak > 0 ? 127.0f / peak : 0.0f;
  for (int64_t i = 0; i < n; ++i) out[i] = (int8_t)std::nearbyintf(x[i] * inverse);
}

void cache_write(const CacheWriteArgs& args) {
  const Cache cache = args.cache;
  const int64_t row_size = cache.num_kv_heads * cache.head_dim;
  parallel(args.num_tokens < 64 ? 1 : args.num_threads, [=](Team& team) {
    team.share(args.num_tokens, [&](int64_t t) {
      const int64_t slot = args.slots[t];
      if (slot < 0) return;
      for (int which = 0; which < 2; ++which) {
        const View& in = which ? args.v : args.k;
        void* out = which ? cache.v : cache.k;
        float* scale = which ? cache.v_scale : cache.k_scale;
        float head[512];
        for (int64_t h = 0; h < cache.num_kv_heads; ++h) {
          View column = in;
          column.data = (char*)in.data + h * cache.head_dim * (in.is_float ? 4 : 2);
          load_row(column, t, cache.head_dim, head);
          const int64_t at = slot * row_size + h * cache.head_dim;
          if (cache.is_int8) {
            write_int8(head, cache.head_dim, (int8_t*)out + at, scale + slot * cache.num_kv_heads + h);
          } else {
            for (int64_t i = 0; i < cache.head_dim; i += LANES) store_bf16((uint16_t*)out + at + i, load(head + i));
          }
        }
      }
    });
  });
}

}  // namespace SF_ISA
