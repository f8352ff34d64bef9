// Per-head RMS norm of q and k, rotation of the first rotary_dim dimensions, and the write into the cache.
#include "bodies.h"
#include "cache.h"

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

// Head h of token t, normalised and rotated, into `head` and into the output; heads of q come before those of k.
SF_INLINE void norm_rope_head(const RopeArgs& args, int64_t t, int64_t h, float* head) {
  const int64_t dim = args.head_dim, half = args.rotary_dim / 2;
  const bool is_q = h < args.num_heads;
  const int64_t column = (is_q ? h : h - args.num_heads) * dim;
  View in = is_q ? args.q : args.k;
  in.data = (char*)in.data + column * (in.is_float ? 4 : 2);
  load_row(in, t, dim, head);
  norm_row(head, dim, is_q ? args.q_weight : args.k_weight, args.eps);
  rotate(head, half, args.cos + t * half, args.sin + t * half);
  const View& out = is_q ? args.q_out : args.k_out;
  for (int64_t i = 0; i < dim; i += 256) store_row(out, View(), t, column + i, dim - i < 256 ? dim - i : 256, head + i);
}

void qk_norm_rope(const RopeArgs& args) {
  const int64_t heads = args.num_heads + args.num_kv_heads;
  parallel(args.num_tokens * heads < 256 ? 1 : args.num_threads, [=](Team& team) {
    team.share(args.num_tokens, [&](int64_t t) {
      float head[512];
      for (int64_t h = 0; h < heads; ++h) norm_rope_head(args, t, h, head);
    });
  });
}

// One head of k or v of token t into the cache.
SF_INLINE void write_token_head(const CacheWriteArgs& args, bool is_value, int64_t t, int64_t h) {
  View in = is_value ? args.v : args.k;
  in.data = (char*)in.data + h * args.cache.head_dim * (in.is_float ? 4 : 2);
  float head[512];
  load_row(in, t, args.cache.head_dim, head);
  write_head(args.cache, is_value, args.slots[t], h, head);
}

// Neighbours in a block share cache lines (cache.h), so that a thread takes several tokens of a long prompt.
SF_INLINE int64_t tokens_per_item(int64_t num_tokens) { return num_tokens < 128 ? 1 : 16; }

void cache_write(const CacheWriteArgs& args) {
  const int64_t step = tokens_per_item(args.num_tokens);
  parallel(args.num_tokens < 64 ? 1 : args.num_threads, [=](Team& team) {
    team.share((args.num_tokens + step - 1) / step, [&](int64_t item) {
      for (int64_t h = 0; h < args.cache.num_kv_heads; ++h)
        for (int64_t t = item * step; t < args.num_tokens && t < (item + 1) * step; ++t) {
          if (args.slots[t] < 0) continue;
          for (const bool is_value : {false, true}) write_token_head(args, is_value, t, h);
        }
    });
  });
}

void rope_and_write_head(const Rotation& rotation, int64_t t, int64_t h) {
  const RopeArgs& rope = rotation.rope;
  const int64_t group = rope.num_heads / rope.num_kv_heads;
  float head[512];
  for (int64_t i = h * group; i < (h + 1) * group; ++i) norm_rope_head(rope, t, i, head);
  norm_rope_head(rope, t, rope.num_heads + h, head);
  if (rotation.write.slots[t] < 0) return;
  for (const bool is_value : {false, true}) write_token_head(rotation.write, is_value, t, h);
}

void rope_and_write(Team& team, const Rotation& rotation) {
  const int64_t num_tokens = rotation.rope.num_tokens, kv_heads = rotation.rope.num_kv_heads, step = tokens_per_item(num_tokens);
  team.share((num_tokens + step - 1) / step * kv_heads, [&](int64_t item) {
    const int64_t first = item / kv_heads * step;
    for (int64_t t = first; t < num_tokens && t < first + step; ++t) rope_and_write_head(rotation, t, item % kv_heads);
  }, num_tokens < 8);
}

}  // namespace SF_ISA
