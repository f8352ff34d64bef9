// What bindings.cpp and network_class.cpp make of tensors, checked: pointers, rows, weights, caches. All that sees torch.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdlib>
#include <limits>

#include "api.h"

namespace stepflash {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

inline const Kernels& kernels() {
  static const Kernels* table = select_kernels(std::getenv("STEPFLASH_ISA"));
  TORCH_CHECK(table != nullptr, "stepflash: this processor has none of the compiled instruction sets; set STEPFLASH_NATIVE=0");
  return *table;
}

// Rows of the last dimension; every dimension before it must be evenly strided.
inline View view(const Tensor& t, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kFloat, name, " must be bfloat16 or float32, got ", t.scalar_type());
  TORCH_CHECK(t.dim() >= 1 && (t.numel() == 0 || t.stride(-1) == 1), name, " must be contiguous in its last dimension");
  View v;
  v.data = t.data_ptr();
  v.stride = t.dim() == 1 ? t.size(0) : t.stride(0);
  v.is_float = t.scalar_type() == at::kFloat;
  return v;
}

inline View view(const OptTensor& t, const char* name) { return t.has_value() ? view(*t, name) : View(); }

// [num_tokens, heads, dim] whose heads follow each other; rows are tokens.
inline View head_view(const Tensor& t, const char* name) {
  TORCH_CHECK(t.dim() == 3 && t.stride(1) == t.size(2), name, " must be [num_tokens, num_heads, head_dim] with heads side by side");
  return view(t, name);
}

inline Packed packed(const Tensor& data, int64_t format, int64_t n, int64_t k, int64_t count = 1) {
  TORCH_CHECK(format >= 0 && format < NUM_FORMATS, "unknown weight format ", format);
  Packed p(data.data_ptr(), format, n, k);
  TORCH_CHECK(data.scalar_type() == at::kByte && data.is_contiguous() && data.numel() == count * p.bytes(),
              "packed weight has ", data.numel(), " bytes; format ", format, " of [", count, ", ", n, ", ", k, "] has ", count * p.bytes());
  return p;
}

template <class T>
const T* pointer(const OptTensor& t, at::ScalarType type, const char* name) {
  if (!t.has_value()) return nullptr;
  TORCH_CHECK(t->scalar_type() == type && t->is_contiguous(), name, " must be contiguous ", type);
  return (const T*)t->data_ptr();
}

inline float limit_or_infinity(std::optional<double> limit) {
  return limit.has_value() ? (float)*limit : std::numeric_limits<float>::infinity();
}

// The weights of a MoE block or a dense MLP; the caller sets tokens, input, norm and output.
inline MoeArgs moe_weights(int64_t hidden_size, const OptTensor& router_weight, const OptTensor& router_bias, int64_t top_k, double scaling, at::TensorList experts,
                    at::IntArrayRef expert_formats, int64_t num_experts, int64_t expert_size, std::optional<double> limit, at::TensorList shared,
                    at::IntArrayRef shared_formats, int64_t shared_size, std::optional<double> shared_limit) {
  TORCH_CHECK((experts.size() == 0 || experts.size() == 3) && (shared.size() == 0 || shared.size() == 3) && experts.size() + shared.size() > 0,
              "moe: experts and shared are each empty or (gate, up, down)");
  MoeArgs a;
  a.num_tokens = 0, a.hidden_size = hidden_size;
  a.num_experts = 0, a.top_k = top_k, a.scaling_factor = (float)scaling, a.topk_ids = nullptr, a.topk_weights = nullptr;
  a.router_weight = pointer<float>(router_weight, at::kFloat, "router_weight"), a.router_bias = pointer<float>(router_bias, at::kFloat, "router_bias");
  a.limit = limit_or_infinity(limit), a.shared_limit = limit_or_infinity(shared_limit);
  if (experts.size() == 3) {
    TORCH_CHECK(num_experts >= 1 && num_experts <= 1024 && top_k >= 1 && top_k <= num_experts, "moe: 1 <= top_k <= num_experts <= 1024");
    TORCH_CHECK(expert_formats.size() == 3 && expert_formats[0] == expert_formats[1], "moe: gate and up share a format");
    TORCH_CHECK(!router_weight || (router_weight->size(0) == num_experts && router_weight->size(1) == hidden_size), "moe: router_weight must be [num_experts, hidden_size]");
    TORCH_CHECK(!router_bias || router_bias->numel() == num_experts, "moe: router_bias must be [num_experts]");
    a.num_experts = num_experts;
    a.gate = packed(experts[0], expert_formats[0], expert_size, hidden_size, num_experts);
    a.up = packed(experts[1], expert_formats[1], expert_size, hidden_size, num_experts);
    a.down = packed(experts[2], expert_formats[2], hidden_size, expert_size, num_experts);
  }
  if (shared.size() == 3) {
    TORCH_CHECK(shared_formats.size() == 3 && shared_formats[0] == shared_formats[1], "moe: gate and up share a format");
    a.shared_gate = packed(shared[0], shared_formats[0], shared_size, hidden_size);
    a.shared_up = packed(shared[1], shared_formats[1], shared_size, hidden_size);
    a.shared_down = packed(shared[2], shared_formats[2], hidden_size, shared_size);
  }
  return a;
}

inline Cache cache_of(const Tensor& k_cache, const Tensor& v_cache, const OptTensor& k_scale, const OptTensor& v_scale) {
  TORCH_CHECK(k_cache.dim() == 5 && v_cache.dim() == 5 && k_cache.size(4) == 2 && v_cache.size(4) == 2 && k_cache.is_contiguous() && v_cache.is_contiguous() &&
                  k_cache.size(0) == v_cache.size(0) && k_cache.size(1) == v_cache.size(1) && 2 * k_cache.size(2) == v_cache.size(3) && k_cache.size(3) == 2 * v_cache.size(2),
              "caches must be contiguous, keys [num_blocks, num_kv_heads, head_dim / 2, block_size, 2], values [num_blocks, num_kv_heads, block_size / 2, head_dim, 2]; got ",
              k_cache.sizes(), " and ", v_cache.sizes());
  const auto type = k_cache.scalar_type();
  TORCH_CHECK((type == at::kBFloat16 || type == at::kChar) && v_cache.scalar_type() == type, "caches must be bfloat16 or int8");
  Cache c;
  c.k = k_cache.data_ptr(), c.v = v_cache.data_ptr();
  c.num_blocks = k_cache.size(0), c.num_kv_heads = k_cache.size(1), c.block_size = k_cache.size(3), c.head_dim = v_cache.size(3), c.is_int8 = type == at::kChar;
  TORCH_CHECK(c.head_dim % 32 == 0 && c.head_dim <= 256, "head_dim must be a multiple of 32 and at most 256, got ", c.head_dim);
  c.k_scale = (float*)pointer<float>(k_scale, at::kFloat, "k_scale"), c.v_scale = (float*)pointer<float>(v_scale, at::kFloat, "v_scale");
  TORCH_CHECK(!c.is_int8 || (c.k_scale && c.v_scale && k_scale->numel() * c.head_dim == k_cache.numel() && v_scale->numel() * c.head_dim == v_cache.numel()),
              "int8 caches need k_scale and v_scale [num_blocks, num_kv_heads, block_size]");
  return c;
}

// Every block that a query can see must exist.
inline void check_blocks(const AttentionArgs& a) {
  for (int64_t s = 0; s < a.num_seqs; ++s) {
    const int64_t count = a.cu_seqlens[s + 1] - a.cu_seqlens[s], length = a.seq_lens[s], first = length - count;
    if (count == 0) continue;
    TORCH_CHECK(count > 0 && first >= 0 && length <= a.max_blocks * a.cache.block_size, "paged_attention: sequence ", s, " has ", count, " queries and length ",
                length, " with room for ", a.max_blocks * a.cache.block_size);
    const int64_t oldest = a.window > 0 ? std::max(a.first_key, first - a.window + 1) : a.first_key;
    for (int64_t b = oldest / a.cache.block_size; b <= (length - 1) / a.cache.block_size; ++b) {
      const int64_t block = a.block_table[s * a.max_blocks + b];
      TORCH_CHECK(block >= 0 && block < a.cache.num_blocks, "paged_attention: block_table[", s, ", ", b, "] is ", block, " of ", a.cache.num_blocks, " blocks");
    }
  }
}

}  // namespace stepflash
