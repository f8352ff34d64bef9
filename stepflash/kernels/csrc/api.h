// The arguments of every kernel, and the table of kernels that one instruction set provides.
//
// Plain structs of pointers and sizes: bindings.cpp fills them from tensors, nothing below knows torch.
#pragma once
#include <memory>
#include <vector>

#include "formats.h"

namespace stepflash {

// Rows of bf16 or float32, contiguous inside a row. data == nullptr: absent.
struct View {
  void* data = nullptr;
  int64_t stride = 0;  // elements from row to row
  bool is_float = false;
};

struct LinearArgs {
  int num_threads;
  int64_t num_tokens, k;
  View x, norm_weight;  // norm_weight present: x is first normalised, times 1 + weight
  const int64_t* x_rows = nullptr;  // token t reads row x_rows[t] of x, gate and residuals; nullptr: row t
  float eps;
  View gate;            // present: x[t, h * k / num_heads + d] is first multiplied by sigmoid(gate[t, h])
  int64_t num_heads;
  Packed weights[8];
  View outs[8], residuals[8];  // of each weight, [num_tokens, its rows]
  int num_weights;
};

struct MoeArgs {
  int num_threads;
  int64_t num_tokens, hidden_size;
  View x, norm_weight;
  float eps;
  // Routed experts, num_experts == 0: none. Expert e starts e * Packed::bytes() into the data.
  int64_t num_experts, top_k;
  const float *router_weight, *router_bias;  // [num_experts, hidden_size], [num_experts]
  float scaling_factor;
  const int64_t* topk_ids;                   // replayed routing [num_tokens, top_k], or nullptr
  const float* topk_weights;
  Packed gate, up, down;
  float limit;
  // Shared expert (or a dense MLP), shared_gate.data == nullptr: none.
  Packed shared_gate, shared_up, shared_down;
  float shared_limit;
  View residual, out;
};

struct RouteArgs {
  int num_threads;
  int64_t num_tokens, hidden_size, num_experts, top_k;
  View x;
  const float *router_weight, *router_bias;
  float scaling_factor;
  int64_t* topk_ids;
  float* topk_weights;
};

struct NormArgs {
  int num_threads;
  int64_t num_tokens, size;
  View x, residual, weight, sum, out;  // sum present: x + residual goes there and is what is normalised
  float eps;
};

struct RopeArgs {
  int num_threads;
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim;
  View q, k, q_weight, k_weight;
  float eps;
  const float *cos, *sin;  // [num_tokens, rotary_dim / 2]
  View q_out, k_out;
};

// The paged cache of one layer, bf16 or int8; see cache.h for the layout.
struct Cache {
  void *k, *v;
  float *k_scale, *v_scale;  // int8 only
  int64_t num_blocks, block_size, num_kv_heads, head_dim;
  bool is_int8;
};

struct CacheWriteArgs {
  int num_threads;
  int64_t num_tokens;
  View k, v;
  const int64_t* slots;  // block * block_size + offset; negative: skip
  Cache cache;
};

struct AttentionArgs {
  int num_threads;
  int64_t num_seqs, num_heads;
  View q, gate, out;
  Cache cache;
  const int32_t *block_table, *seq_lens, *cu_seqlens;
  int64_t max_blocks;
  int64_t window;     // 0: none
  int64_t first_key;  // keys before it hold nothing
  float scale;
};

// One decoder layer over packed weights and a paged cache.
struct LayerArgs {
  View input_norm, q_norm, k_norm;
  Packed q, k, v, gate, o;
  int64_t num_heads, num_kv_heads, head_dim;
  int rope;    // which of NetworkArgs::ropes
  int group;   // which slots and block table: 0 full, 1 sliding
  int64_t window, first_key;
  float scale;
  Cache cache;
  MoeArgs feed_forward;  // all but threads, tokens, x, residual and out
};

struct RopeTable {
  const float* inverse_frequencies;  // [half], radians per position
  int64_t half;
};

// A whole pass: embedding, layers, and the logits of some tokens.
struct NetworkArgs {
  int num_threads;
  int64_t num_tokens, hidden_size;
  float eps;
  const int64_t *input_ids, *positions;
  const int64_t* drafted = nullptr;  // what the id -1 - i stands for is drafted[i], the choice of an earlier pass of the job
  View embedding;
  // A prediction module starts from eh_proj([enorm(embedding), hnorm(previous)]); previous absent: the trunk.
  View previous, enorm, hnorm;
  const void* const* previous_from = nullptr;  // by token: what an earlier pass of the job leaves for `previous`, or nullptr
  Packed eh_proj;
  std::shared_ptr<const std::vector<LayerArgs>> layers;
  RopeTable ropes[4];
  int num_ropes;
  int64_t num_seqs;
  const int64_t* slots[2];         // by group: [num_tokens]
  const int32_t* block_tables[2];  // [num_seqs, max_blocks]
  int64_t max_blocks[2];
  const int32_t *seq_lens, *cu_seqlens;
  View hidden;  // the result of the last layer, [num_tokens, hidden_size]
  bool only_logit_rows = false;    // just those rows of it are wanted, [num_logit_rows, hidden_size]
  View final_norm;
  Packed head;
  const int64_t* logit_rows;       // tokens whose logits are wanted
  int64_t num_logit_rows, vocab_limit;
  View logits;                     // float32 [num_logit_rows, vocab_size]
  int64_t* best;                   // the first largest of the first vocab_limit logits, and its value:
  float* best_logit;               // NaN if any of them is
};

// A float matrix to be rounded to an int8 or int4 format.
struct QuantizeArgs {
  int num_threads;
  int64_t num_rows, k, format;
  View weight;
  uint8_t* out;  // the packed bytes
};

struct Kernels {
  const char* isa;
  void (*linear)(const LinearArgs&);
  void (*moe)(const MoeArgs&);
  void (*route)(const RouteArgs&);
  void (*rms_norm)(const NormArgs&);
  void (*qk_norm_rope)(const RopeArgs&);
  void (*cache_write)(const CacheWriteArgs&);
  void (*attention)(const AttentionArgs&);
  void (*network)(const NetworkArgs* passes, int64_t count);  // one after the other, in one job
  bool (*quantize)(const QuantizeArgs&);  // false: a weight is NaN, infinite or too large for a float16 scale
  int64_t (*stream_read)(const uint8_t* data, int64_t num_bytes, int num_threads);
};

// The best table for this machine among those that were compiled; limit ("avx2", "avx512") asks for less.
const Kernels* select_kernels(const char* limit);

}  // namespace stepflash
