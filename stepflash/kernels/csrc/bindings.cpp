// Tensors in, kernel arguments out. With tensors.h all that sees torch; the ops are declared in ops.py.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <sys/mman.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <limits>

#include "tensors.h"

namespace stepflash {
namespace {

float limit_or_infinity(std::optional<double> limit) {
  return limit.has_value() ? (float)*limit : std::numeric_limits<float>::infinity();
}

// The input side of a linear call, and its weights; the caller sets the outputs.
LinearArgs linear_args(const Tensor& x, at::TensorList weights, at::IntArrayRef formats, at::IntArrayRef sizes, const OptTensor& norm_weight,
                       double eps) {
  TORCH_CHECK(x.dim() == 2, "linear: x must be [num_tokens, in_features], got ", x.sizes());
  TORCH_CHECK(weights.size() >= 1 && weights.size() <= 8 && weights.size() == formats.size() && weights.size() == sizes.size(),
              "linear: 1 to 8 weights with as many formats and sizes");
  LinearArgs a;
  a.num_threads = at::get_num_threads();
  a.num_tokens = x.size(0), a.k = x.size(1);
  a.x = view(x, "x"), a.norm_weight = view(norm_weight, "norm_weight"), a.eps = (float)eps;
  TORCH_CHECK(!norm_weight || norm_weight->numel() == a.k, "linear: norm_weight must have in_features entries");
  a.num_heads = 0;
  a.num_weights = (int)weights.size();
  for (size_t i = 0; i < weights.size(); ++i) a.weights[i] = packed(weights[i], formats[i], sizes[i], a.k);
  return a;
}

View columns(const View& v, int64_t begin) {
  View part = v;
  if (v.data) part.data = (char*)v.data + begin * (v.is_float ? 4 : 2);
  return part;
}

Tensor linear(const Tensor& x, at::TensorList weights, at::IntArrayRef formats, at::IntArrayRef sizes, const OptTensor& norm_weight,
              double eps, const OptTensor& gate, const OptTensor& residual, std::optional<at::ScalarType> dtype) {
  LinearArgs a = linear_args(x, weights, formats, sizes, norm_weight, eps);
  a.gate = view(gate, "gate");
  a.num_heads = gate ? gate->size(1) : 0;
  TORCH_CHECK(!gate || (gate->size(0) == a.num_tokens && a.num_heads <= 496 && a.k % a.num_heads == 0), "linear: gate must be [num_tokens, num_heads]");
  int64_t n = 0;
  for (const int64_t size : sizes) n += size;
  Tensor out = at::empty({a.num_tokens, n}, x.options().dtype(dtype.value_or(x.scalar_type())));
  TORCH_CHECK(!residual || residual->sizes() == out.sizes(), "linear: residual must be ", out.sizes(), ", got ", residual->sizes());
  const View out_view = view(out, "output"), residual_view = view(residual, "residual");
  int64_t column = 0;
  for (int i = 0; i < a.num_weights; column += sizes[i++]) a.outs[i] = columns(out_view, column), a.residuals[i] = columns(residual_view, column);
  if (a.num_tokens > 0) kernels().linear(a);
  return out;
}

// The weights of a MoE block or a dense MLP; the caller sets tokens, input, norm and output.
MoeArgs moe_weights(int64_t hidden_size, const OptTensor& router_weight, const OptTensor& router_bias, int64_t top_k, double scaling, at::TensorList experts,
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

// Routing that was recorded elsewhere.
void replay(MoeArgs& a, const OptTensor& topk_ids, const OptTensor& topk_weights) {
  a.topk_ids = pointer<int64_t>(topk_ids, at::kLong, "topk_ids");
  a.topk_weights = pointer<float>(topk_weights, at::kFloat, "topk_weights");
  TORCH_CHECK(a.topk_ids != nullptr || a.router_weight != nullptr, "moe: needs router_weight or topk_ids");
  TORCH_CHECK((a.topk_ids == nullptr) == (a.topk_weights == nullptr), "moe: topk_ids and topk_weights come together");
  if (!a.topk_ids) return;
  TORCH_CHECK(topk_ids->numel() == a.num_tokens * a.top_k && topk_weights->numel() == a.num_tokens * a.top_k, "moe: topk_ids must be [num_tokens, top_k]");
  for (int64_t i = 0; i < a.num_tokens * a.top_k; ++i)
    TORCH_CHECK(a.topk_ids[i] >= 0 && a.topk_ids[i] < a.num_experts, "moe: topk_ids has ", a.topk_ids[i], " of ", a.num_experts, " experts");
}

// One argument list for MoE blocks and dense MLPs; see moe in ops.py.
Tensor moe(const Tensor& x, const OptTensor& norm_weight, double eps, const OptTensor& router_weight, const OptTensor& router_bias,
           int64_t top_k, double scaling, at::TensorList experts, at::IntArrayRef expert_formats, int64_t num_experts, int64_t expert_size,
           std::optional<double> limit, at::TensorList shared, at::IntArrayRef shared_formats, int64_t shared_size,
           std::optional<double> shared_limit, const OptTensor& topk_ids, const OptTensor& topk_weights, const OptTensor& residual) {
  TORCH_CHECK(x.dim() == 2, "moe: x must be [num_tokens, hidden_size], got ", x.sizes());
  MoeArgs a = moe_weights(x.size(1), router_weight, router_bias, top_k, scaling, experts, expert_formats, num_experts, expert_size, limit, shared,
                          shared_formats, shared_size, shared_limit);
  a.num_threads = at::get_num_threads(), a.num_tokens = x.size(0);
  if (a.num_experts) replay(a, topk_ids, topk_weights);
  a.x = view(x, "x"), a.norm_weight = view(norm_weight, "norm_weight"), a.eps = (float)eps;
  TORCH_CHECK(!norm_weight || norm_weight->numel() == a.hidden_size, "moe: norm_weight must have hidden_size entries");
  TORCH_CHECK(!residual || residual->sizes() == x.sizes(), "moe: residual must be ", x.sizes());
  Tensor out = at::empty(x.sizes(), x.options());
  a.out = view(out, "output"), a.residual = view(residual, "residual");
  if (a.num_tokens > 0) kernels().moe(a);
  return out;
}

std::tuple<Tensor, Tensor> route(const Tensor& x, const Tensor& router_weight, const OptTensor& router_bias, int64_t top_k, double scaling) {
  TORCH_CHECK(x.dim() == 2 && router_weight.dim() == 2 && router_weight.size(1) == x.size(1), "route: x [num_tokens, hidden_size], router_weight [num_experts, hidden_size]");
  RouteArgs a;
  a.num_threads = at::get_num_threads();
  a.num_tokens = x.size(0), a.hidden_size = x.size(1), a.num_experts = router_weight.size(0), a.top_k = top_k;
  TORCH_CHECK(top_k >= 1 && top_k <= a.num_experts && a.num_experts <= 1024, "route: 1 <= top_k <= num_experts <= 1024");
  TORCH_CHECK(!router_bias || router_bias->numel() == a.num_experts, "route: router_bias must be [num_experts]");
  a.x = view(x, "x");
  a.router_weight = pointer<float>(router_weight, at::kFloat, "router_weight");
  a.router_bias = pointer<float>(router_bias, at::kFloat, "router_bias");
  a.scaling_factor = (float)scaling;
  Tensor ids = at::empty({a.num_tokens, top_k}, x.options().dtype(at::kLong)), weights = at::empty({a.num_tokens, top_k}, x.options().dtype(at::kFloat));
  a.topk_ids = ids.data_ptr<int64_t>(), a.topk_weights = weights.data_ptr<float>();
  if (a.num_tokens > 0) kernels().route(a);
  return {ids, weights};
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const OptTensor& residual, const Tensor& weight, double eps) {
  const Tensor rows = x.reshape({-1, x.size(-1)}).contiguous();
  TORCH_CHECK(weight.numel() == rows.size(1), "rms_norm: weight must have ", rows.size(1), " entries, got ", weight.numel());
  TORCH_CHECK(!residual || residual->sizes() == x.sizes(), "rms_norm: residual must be ", x.sizes());
  NormArgs a;
  a.num_threads = at::get_num_threads();
  a.num_tokens = rows.size(0), a.size = rows.size(1), a.eps = (float)eps;
  Tensor out = at::empty(x.sizes(), x.options()), sum = residual ? at::empty(x.sizes(), x.options()) : out;
  const OptTensor residual_rows = residual ? OptTensor(residual->reshape({-1, x.size(-1)}).contiguous()) : OptTensor();
  a.x = view(rows, "x"), a.residual = view(residual_rows, "residual"), a.weight = view(weight, "weight");
  a.out = view(out.view({-1, x.size(-1)}), "output"), a.sum = view(sum.view({-1, x.size(-1)}), "sum");
  if (a.num_tokens > 0) kernels().rms_norm(a);
  return {out, sum};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) { return std::get<0>(add_rms_norm(x, std::nullopt, weight, eps)); }
std::tuple<Tensor, Tensor> rms_norm_residual(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  return add_rms_norm(x, residual, weight, eps);
}

// q, k [num_tokens, heads, head_dim] -> normalised and rotated into q_out, k_out, which may be q and k themselves.
void norm_rope(const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight, double eps, const Tensor& cos, const Tensor& sin,
               const Tensor& q_out, const Tensor& k_out) {
  RopeArgs a;
  a.num_threads = at::get_num_threads();
  a.q = head_view(q, "q"), a.k = head_view(k, "k"), a.q_weight = view(q_weight, "q_weight"), a.k_weight = view(k_weight, "k_weight");
  a.num_tokens = q.size(0), a.num_heads = q.size(1), a.num_kv_heads = k.size(1), a.head_dim = q.size(2), a.eps = (float)eps;
  TORCH_CHECK(k.size(0) == a.num_tokens && k.size(2) == a.head_dim && a.head_dim <= 512 && q_weight.numel() == a.head_dim && k_weight.numel() == a.head_dim,
              "qk_norm_rope: q, k and their norm weights must agree in tokens and head_dim (at most 512)");
  TORCH_CHECK(cos.dim() == 2 && cos.sizes() == sin.sizes() && cos.size(0) == a.num_tokens && 2 * cos.size(1) <= a.head_dim,
              "qk_norm_rope: cos and sin must be [num_tokens, rotary_dim / 2]");
  a.rotary_dim = 2 * cos.size(1);
  a.cos = pointer<float>(cos, at::kFloat, "cos"), a.sin = pointer<float>(sin, at::kFloat, "sin");
  a.q_out = head_view(q_out, "q"), a.k_out = head_view(k_out, "k");
  if (a.num_tokens > 0) kernels().qk_norm_rope(a);
}

std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight, double eps,
                                        const Tensor& cos, const Tensor& sin) {
  Tensor q_out = at::empty(q.sizes(), q.options()), k_out = at::empty(k.sizes(), k.options());
  norm_rope(q, k, q_weight, k_weight, eps, cos, sin, q_out, k_out);
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qkv_gate(const Tensor& x, const Tensor& norm_weight, at::TensorList weights, at::IntArrayRef formats,
                                                    int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, const Tensor& q_weight,
                                                    const Tensor& k_weight, double eps, const Tensor& cos, const Tensor& sin) {
  const int64_t sizes[4] = {num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim, num_heads};
  LinearArgs a = linear_args(x, weights, formats, sizes, norm_weight, eps);
  Tensor q = at::empty({a.num_tokens, num_heads, head_dim}, x.options()), gate = at::empty({a.num_tokens, num_heads}, x.options());
  Tensor k = at::empty({a.num_tokens, num_kv_heads, head_dim}, x.options()), v = at::empty({a.num_tokens, num_kv_heads, head_dim}, x.options());
  a.outs[0] = view(q, "q"), a.outs[1] = view(k, "k"), a.outs[2] = view(v, "v"), a.outs[3] = view(gate, "gate");
  if (a.num_tokens > 0) kernels().linear(a);
  norm_rope(q, k, q_weight, k_weight, eps, cos, sin, q, k);
  return {q, k, v, gate};
}

Cache cache_of(const Tensor& k_cache, const Tensor& v_cache, const OptTensor& k_scale, const OptTensor& v_scale) {
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

void cache_write(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots, const OptTensor& k_scale,
                 const OptTensor& v_scale) {
  CacheWriteArgs a;
  a.num_threads = at::get_num_threads();
  a.num_tokens = k.size(0);
  a.k = head_view(k, "k"), a.v = head_view(v, "v");
  a.cache = cache_of(k_cache, v_cache, k_scale, v_scale);
  TORCH_CHECK(k.sizes() == v.sizes() && k.size(1) == a.cache.num_kv_heads && k.size(2) == a.cache.head_dim && slots.numel() == a.num_tokens,
              "cache_write: k and v must be [num_tokens, num_kv_heads, head_dim] of the cache, slots [num_tokens]");
  a.slots = pointer<int64_t>(slots, at::kLong, "slot_mapping");
  const int64_t num_slots = a.cache.num_blocks * a.cache.block_size;
  for (int64_t i = 0; i < a.num_tokens; ++i) TORCH_CHECK(a.slots[i] < num_slots, "cache_write: slot ", a.slots[i], " of ", num_slots);
  if (a.num_tokens > 0) kernels().cache_write(a);
}

// Every block that a query can see must exist.
void check_blocks(const AttentionArgs& a) {
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

Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table, const Tensor& seq_lens,
                       const Tensor& cu_seqlens, int64_t window, double scale, int64_t first_key, const OptTensor& gate, const OptTensor& k_scale, const OptTensor& v_scale) {
  AttentionArgs a;
  a.num_threads = at::get_num_threads();
  a.cache = cache_of(k_cache, v_cache, k_scale, v_scale);
  a.q = head_view(q, "q"), a.gate = view(gate, "gate");
  a.num_heads = q.size(1), a.num_seqs = seq_lens.numel(), a.window = window, a.first_key = first_key, a.scale = (float)scale;
  TORCH_CHECK(q.size(2) == a.cache.head_dim && a.num_heads % a.cache.num_kv_heads == 0 && a.num_heads / a.cache.num_kv_heads <= 48,
              "paged_attention: q ", q.sizes(), " does not fit the cache ", k_cache.sizes());
  TORCH_CHECK(block_table.dim() == 2 && block_table.size(0) == a.num_seqs && cu_seqlens.numel() == a.num_seqs + 1,
              "paged_attention: block_table [num_seqs, max_blocks], seq_lens [num_seqs], cu_seqlens [num_seqs + 1]");
  TORCH_CHECK(!gate || (gate->size(0) == q.size(0) && gate->size(1) == a.num_heads), "paged_attention: gate must be [num_tokens, num_heads]");
  a.block_table = pointer<int32_t>(block_table, at::kInt, "block_table"), a.max_blocks = block_table.size(1);
  a.seq_lens = pointer<int32_t>(seq_lens, at::kInt, "seq_lens"), a.cu_seqlens = pointer<int32_t>(cu_seqlens, at::kInt, "cu_seqlens");
  TORCH_CHECK(window >= 0 && first_key >= 0 && a.cu_seqlens[0] == 0 && a.cu_seqlens[a.num_seqs] == q.size(0), "paged_attention: cu_seqlens must run from 0 to num_tokens; window and first_key must not be negative");
  check_blocks(a);
  Tensor out = at::empty(q.sizes(), q.options());
  a.out = head_view(out, "output");
  if (q.size(0) > 0) kernels().attention(a);
  return out;
}

// [n, k] or [num_experts, n, k] of floats -> packed int8 or int4.
Tensor quantize(const Tensor& weight, int64_t format) {
  TORCH_CHECK(weight.dim() == 2 || weight.dim() == 3, "quantize: weight must be [n, k] or [num_experts, n, k], got ", weight.sizes());
  TORCH_CHECK(format >= INT8_G32 && format <= INT4_G128, "quantize: format ", format, " is neither int8 nor int4");
  const int64_t n = weight.size(-2), k = weight.size(-1), count = weight.dim() == 3 ? weight.size(0) : 1;
  const Tensor rows = (weight.scalar_type() == at::kBFloat16 ? weight : weight.to(at::kFloat)).reshape({count * n, k}).contiguous();
  Tensor out = at::empty({count, num_panels(n) * panel_bytes(format, k)}, weight.options().dtype(at::kByte));
  QuantizeArgs a;
  a.num_threads = at::get_num_threads(), a.num_rows = n, a.k = k, a.format = format;
  for (int64_t i = 0; i < count && n * k > 0; ++i) {
    a.weight = view(rows.narrow(0, i * n, n), "weight"), a.out = out.data_ptr<uint8_t>() + i * out.size(1);
    TORCH_CHECK_VALUE(kernels().quantize(a), "a weight is NaN, infinite or too large for a float16 scale");
  }
  return weight.dim() == 3 ? out : out.view(-1);
}

int64_t stream_read(const Tensor& data) {
  TORCH_CHECK(data.is_contiguous(), "stream_read: data must be contiguous");
  return kernels().stream_read((const uint8_t*)data.data_ptr(), data.nbytes(), at::get_num_threads());
}

Tensor cached_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
                        const Tensor& block_table, const Tensor& seq_lens, const Tensor& cu_seqlens, int64_t window, double scale,
                        int64_t first_key, const OptTensor& k_scale, const OptTensor& v_scale) {
  cache_write(k, v, k_cache, v_cache, slots, k_scale, v_scale);
  return paged_attention(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens, window, scale, first_key, std::nullopt, k_scale, v_scale);
}

// Ask for huge pages before a packed weight is first written: fewer TLB misses while it streams.
void advise_huge_pages(const Tensor& t) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t begin = ((uintptr_t)t.data_ptr() + PAGE - 1) / PAGE * PAGE, end = ((uintptr_t)t.data_ptr() + t.nbytes()) / PAGE * PAGE;
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

using Packs = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

// The trunk or one prediction module over packed weights and the engine's cache; see stepflash/kernels/network.py.
class Network : public torch::CustomClassHolder {
 public:
  Network(Tensor embedding, double eps, Packs inverse_frequencies) {
    args_.eps = (float)eps, args_.hidden_size = embedding.size(1);
    args_.embedding = view(embedding, "embedding");
    TORCH_CHECK(inverse_frequencies.size() <= 4, "network: at most 4 kinds of rotation");
    args_.num_ropes = (int)inverse_frequencies.size();
    for (int i = 0; i < args_.num_ropes; ++i) args_.ropes[i] = {pointer<float>(keep(inverse_frequencies[i]), at::kFloat, "inverse_frequencies"), inverse_frequencies[i].numel()};
    vocab_size_ = embedding.size(0), type_ = embedding.scalar_type();
    keep(embedding);
  }

  // norms: input, q, k, post attention. projections: q, k, v, gate, o. heads: query heads, KV heads, head size.
  // place: rotation, group, window, first key. caches: k, v and for int8 their scales.
  void add_layer(Packs norms, Packs projections, Ints formats, Ints heads, Ints place, Packs caches) {
    TORCH_CHECK(norms.size() == 4 && projections.size() == 5 && formats.size() == 5 && heads.size() == 3 && place.size() == 4 && (caches.size() == 2 || caches.size() == 4),
                "network: add_layer takes 4 norms, 5 projections with formats, 3 sizes, 4 numbers of its place, 2 or 4 cache tensors");
    LayerArgs a;
    a.num_heads = heads[0], a.num_kv_heads = heads[1], a.head_dim = heads[2];
    const int64_t hidden = args_.hidden_size, q_size = a.num_heads * a.head_dim, kv_size = a.num_kv_heads * a.head_dim;
    a.input_norm = norm(norms[0], hidden), a.q_norm = norm(norms[1], a.head_dim), a.k_norm = norm(norms[2], a.head_dim);
    a.q = packed(keep(projections[0]), formats[0], q_size, hidden), a.k = packed(keep(projections[1]), formats[1], kv_size, hidden);
    a.v = packed(keep(projections[2]), formats[2], kv_size, hidden), a.gate = packed(keep(projections[3]), formats[3], a.num_heads, hidden);
    a.o = packed(keep(projections[4]), formats[4], hidden, q_size);
    a.rope = (int)place[0], a.group = (int)place[1], a.window = place[2], a.first_key = place[3];
    TORCH_CHECK(a.rope >= 0 && a.rope < args_.num_ropes && (a.group == 0 || a.group == 1) && a.window >= 0 && a.first_key >= 0, "network: bad place of a layer");
    TORCH_CHECK(a.num_heads % a.num_kv_heads == 0 && a.num_heads / a.num_kv_heads <= 48 && a.num_heads <= 496 && 2 * args_.ropes[a.rope].half <= a.head_dim,
                "network: ", a.num_heads, " query heads on ", a.num_kv_heads, " KV heads of ", a.head_dim);
    a.scale = 1.0f / std::sqrt((float)a.head_dim);
    for (const Tensor& cache : caches) keep(cache);
    const bool has_scales = caches.size() == 4;
    a.cache = cache_of(caches[0], caches[1], has_scales ? OptTensor(caches[2]) : std::nullopt, has_scales ? OptTensor(caches[3]) : std::nullopt);
    TORCH_CHECK(a.cache.num_kv_heads == a.num_kv_heads && a.cache.head_dim == a.head_dim, "network: the cache has other heads than the layer");
    post_norm_ = norm(norms[3], hidden);
    layers_.push_back(a);
  }

  // The feed-forward block of the layer just added; as the op moe.
  void set_feed_forward(OptTensor router_weight, OptTensor router_bias, int64_t top_k, double scaling, Packs experts, Ints expert_formats,
                        int64_t num_experts, int64_t expert_size, std::optional<double> limit, Packs shared, Ints shared_formats, int64_t shared_size,
                        std::optional<double> shared_limit) {
    TORCH_CHECK(!layers_.empty(), "network: no layer yet");
    for (const OptTensor& t : {router_weight, router_bias})
      if (t) keep(*t);
    for (const Packs* list : {&experts, &shared})
      for (const Tensor& t : *list) keep(t);
    MoeArgs& a = layers_.back().feed_forward;
    a = moe_weights(args_.hidden_size, router_weight, router_bias, top_k, scaling, experts, expert_formats, num_experts, expert_size, limit, shared,
                    shared_formats, shared_size, shared_limit);
    a.norm_weight = post_norm_, a.eps = args_.eps;
  }

  void set_head(Tensor final_norm, Tensor head, int64_t format, int64_t vocab_limit) {
    args_.final_norm = norm(final_norm, args_.hidden_size);
    args_.head = packed(keep(head), format, vocab_size_, args_.hidden_size);
    TORCH_CHECK(vocab_limit >= 1 && vocab_limit <= vocab_size_, "network: vocab_limit must be within the vocabulary");
    args_.vocab_limit = vocab_limit;
  }

  // Makes this a prediction module.
  void set_join(Tensor enorm, Tensor hnorm, Tensor eh_proj, int64_t format) {
    args_.enorm = norm(enorm, args_.hidden_size), args_.hnorm = norm(hnorm, args_.hidden_size);
    args_.eh_proj = packed(keep(eh_proj), format, args_.hidden_size, 2 * args_.hidden_size);
  }

  // The engine's block tables, int32 [rows, max_blocks] of the full and of the sliding group. They never move.
  void set_tables(Tensor full, Tensor sliding, int64_t block_size) {
    for (const Tensor& table : {full, sliding})
      TORCH_CHECK(table.is_contiguous() && table.scalar_type() == at::kInt && table.dim() == 2 && table.sizes() == full.sizes(), "network: block tables must be contiguous int32 [rows, max_blocks]");
    tables_[0] = keep(full), tables_[1] = keep(sliding), block_size_ = block_size;
  }

  // Spans of several sequences end to end: span i puts lengths[i] of the token_ids into slots starts[i], ... of the sequence whose blocks are in
  // row table_rows[i]; the token in slot s stands at position s - shift. Returns hidden states, logits, best tokens, their logits.
  std::tuple<Tensor, Tensor, Ints, std::vector<double>> run(const Ints& token_ids, const Ints& lengths, const Ints& starts, const Ints& table_rows, int64_t shift,
                                                            const OptTensor& previous, const Ints& logit_rows) {
    const int64_t num_seqs = (int64_t)lengths.size(), tokens = (int64_t)token_ids.size();
    TORCH_CHECK(num_seqs >= 1 && starts.size() == lengths.size() && table_rows.size() == lengths.size(), "network: one length, start and row for each span");
    Batch batch;
    int64_t num_slots = 0;
    for (int64_t j = 0; j < num_seqs; ++j) num_slots = std::max(num_slots, starts[j] + lengths[j]);
    choose_tables(batch, table_rows, num_slots);
    batch.start(num_seqs, tokens);
    for (int64_t j = 0, t = 0; j < num_seqs; ++j) {
      for (int64_t slot = starts[j]; slot < starts[j] + lengths[j]; ++slot, ++t) put_token(batch, j, t, token_ids.at(t), slot, shift);
      batch.end_sequence(j, t, starts[j] + lengths[j]);
    }
    NetworkArgs a = pass(batch);
    if (previous) a.previous = view(*previous, "previous");
    a.num_logit_rows = (int64_t)logit_rows.size(), a.logit_rows = logit_rows.data();
    const auto options = at::TensorOptions().dtype(type_);
    Tensor hidden = at::empty({a.num_tokens, a.hidden_size}, options), logits = at::empty({a.num_logit_rows, vocab_size_}, options.dtype(at::kFloat));
    Ints best(logit_rows.size());
    std::vector<float> best_logit(logit_rows.size());
    a.logits = view(logits, "logits"), a.best = best.data(), a.best_logit = best_logit.data();
    run_checked(a, hidden);
    return {hidden, logits, best, std::vector<double>(best_logit.begin(), best_logit.end())};
  }

  // The module whose drafts follow this one's.
  void set_next(c10::intrusive_ptr<Network> next) { next_ = std::move(next); }

  // This module and as many after it as `starts` tells, each proposing the best token after the tokens known and proposed before; one
  // job per sequence. hidden_states: by job, what the trunk left at its newest slots. By module, then by job:
  // `pending`, what the module has not read of the one before (empty: nothing), and `starts`, its first slot to run.
  // By job: token_ids[offsets[j] ...] are its known tokens from slot first_slots[j] on, num_known tokens in all, and table_rows, its row in the tables.
  // Returns by module the rows that it read and its hidden states, jobs end to end, and, module by module, each job's draft and its logit.
  std::tuple<Packs, Packs, Ints, std::vector<double>> draft(const Packs& hidden_states, const Packs& pending, const Ints& starts, const Ints& token_ids,
                                                            const Ints& offsets, const Ints& first_slots, const Ints& num_known, const Ints& table_rows) {
    const int64_t jobs = (int64_t)hidden_states.size(), modules = jobs ? (int64_t)starts.size() / jobs : 0;
    int64_t most = 1;
    for (Network* module = this; (module = module->next_.get());) ++most;
    TORCH_CHECK(modules >= 1 && modules <= most, "network: draft runs 1 to ", most, " modules");
    TORCH_CHECK((int64_t)pending.size() == modules * jobs && (int64_t)starts.size() == modules * jobs && (int64_t)offsets.size() == jobs &&
                    (int64_t)first_slots.size() == jobs && (int64_t)num_known.size() == jobs && (int64_t)table_rows.size() == jobs,
                "network: draft needs one entry per job, and per module and job");
    Batch batch;
    choose_tables(batch, table_rows, *std::max_element(num_known.begin(), num_known.end()) + modules);
    const auto options = at::TensorOptions().dtype(type_);
    Packs read, left;
    Ints drafts(modules * jobs), last(jobs), bounds(jobs + 1, 0);
    std::vector<float> values(modules * jobs);
    Tensor logits = at::empty({jobs, vocab_size_}, options.dtype(at::kFloat));
    Network* module = this;
    for (int64_t m = 0; m < modules; ++m, module = module->next_.get()) {
      const Ints before = bounds;  // of the module before: its tokens, jobs end to end
      for (int64_t j = 0; j < jobs; ++j) bounds[j + 1] = bounds[j] + num_known[j] + m - starts[m * jobs + j];
      batch.start(jobs, bounds[jobs]);
      Tensor rows = at::empty({bounds[jobs], args_.hidden_size}, options), hidden = at::empty({bounds[jobs], args_.hidden_size}, options);
      const int64_t row_bytes = args_.hidden_size * rows.element_size();
      for (int64_t j = 0; j < jobs; ++j) {
        // What is still unread of the module before, then what it has just left.
        const Tensor& unread = pending[m * jobs + j];
        const int64_t num_unread = unread.numel() > 0 ? unread.size(0) : 0, num_new = m == 0 ? hidden_states[j].size(0) : before[j + 1] - before[j];
        const Tensor& source = m == 0 ? hidden_states[j] : left.back();
        TORCH_CHECK(num_unread + num_new == bounds[j + 1] - bounds[j] && source.is_contiguous() && source.scalar_type() == type_ &&
                        (num_unread == 0 || (unread.is_contiguous() && unread.scalar_type() == type_)),
                    "network: module ", m + 1, " has ", num_unread + num_new, " rows for ", bounds[j + 1] - bounds[j], " tokens");
        char* to = (char*)rows.data_ptr() + bounds[j] * row_bytes;
        if (num_unread) std::memcpy(to, unread.data_ptr(), num_unread * row_bytes);
        std::memcpy(to + num_unread * row_bytes, (const char*)source.data_ptr() + (m == 0 ? 0 : before[j] * row_bytes), num_new * row_bytes);
        int64_t t = bounds[j];
        for (int64_t slot = starts[m * jobs + j]; slot < num_known[j] + m; ++slot, ++t) {
          const int64_t id = slot < num_known[j] ? token_ids.at(offsets[j] + slot - first_slots[j]) : drafts[(slot - num_known[j]) * jobs + j];
          put_token(batch, j, t, id, slot, m + 1);
        }
        last[j] = t - 1;
        batch.end_sequence(j, t, num_known[j] + m);
      }
      NetworkArgs a = module->pass(batch);
      a.previous = view(rows, "previous");
      a.num_logit_rows = jobs, a.logit_rows = last.data();
      a.logits = view(logits, "logits"), a.best = drafts.data() + m * jobs, a.best_logit = values.data() + m * jobs;
      module->run_checked(a, hidden);
      read.push_back(rows), left.push_back(hidden);
    }
    return {read, left, drafts, std::vector<double>(values.begin(), values.end())};
  }

 private:
  NetworkArgs args_;
  c10::intrusive_ptr<Network> next_;
  std::vector<LayerArgs> layers_;
  std::vector<Tensor> kept_;
  View post_norm_;
  Tensor tables_[2];
  int64_t block_size_ = 0, vocab_size_ = 0;
  at::ScalarType type_;

  // Tokens and tables of a pass. per_token: ids, positions, slots of both groups. per_sequence: num_seqs + 1 token boundaries, then slots in use.
  struct Batch {
    int64_t num_seqs = 0, num_tokens = 0, width = 0;  // blocks in a row of the tables
    Ints per_token;
    std::vector<int32_t> per_sequence, gathered[2];
    const int32_t* tables[2];

    void start(int64_t seqs, int64_t tokens) {
      num_seqs = seqs, num_tokens = tokens;
      per_token.assign(4 * tokens, 0), per_sequence.assign(2 * seqs + 1, 0);
    }
    void end_sequence(int64_t j, int64_t token_end, int64_t num_slots) {
      per_sequence[j + 1] = (int32_t)token_end, per_sequence[num_seqs + 1 + j] = (int32_t)num_slots;
    }
  };

  // One sequence uses its row of the tables where it lies; several need theirs side by side, as far as slots are in use.
  void choose_tables(Batch& batch, const Ints& rows, int64_t num_slots) const {
    TORCH_CHECK(block_size_ > 0 && num_slots <= tables_[0].size(1) * block_size_, "network: slot ", num_slots, " is beyond the tables");
    const int64_t stride = tables_[0].size(1);
    batch.width = rows.size() > 1 ? (num_slots + block_size_ - 1) / block_size_ : stride;
    for (int group = 0; group < 2; ++group) {
      const int32_t* table = tables_[group].data_ptr<int32_t>();
      for (const int64_t row : rows) {
        TORCH_CHECK(row >= 0 && row < tables_[group].size(0), "network: no row ", row, " in the tables");
        if (rows.size() > 1) batch.gathered[group].insert(batch.gathered[group].end(), table + row * stride, table + row * stride + batch.width);
      }
      batch.tables[group] = rows.size() > 1 ? batch.gathered[group].data() : table + rows[0] * stride;
    }
  }

  void put_token(Batch& batch, int64_t j, int64_t t, int64_t id, int64_t slot, int64_t shift) const {
    int64_t* at = batch.per_token.data() + t;
    at[0] = id, at[batch.num_tokens] = slot - shift;
    for (int group = 0; group < 2; ++group)
      at[(2 + group) * batch.num_tokens] = batch.tables[group][j * batch.width + slot / block_size_] * block_size_ + slot % block_size_;
  }

  // A pass over this batch; the caller adds previous states and what it wants to know.
  NetworkArgs pass(const Batch& batch) {
    if (!args_.layers) args_.layers = std::make_shared<const std::vector<LayerArgs>>(layers_);
    NetworkArgs a = args_;
    a.num_threads = at::get_num_threads(), a.num_tokens = batch.num_tokens, a.num_seqs = batch.num_seqs;
    a.input_ids = batch.per_token.data(), a.positions = a.input_ids + a.num_tokens;
    a.cu_seqlens = batch.per_sequence.data(), a.seq_lens = a.cu_seqlens + a.num_seqs + 1;
    for (int group = 0; group < 2; ++group) {
      a.slots[group] = a.input_ids + (2 + group) * a.num_tokens;
      a.block_tables[group] = batch.tables[group], a.max_blocks[group] = batch.width;
    }
    return a;
  }

  void run_checked(NetworkArgs& a, Tensor& hidden) {
    TORCH_CHECK(a.cu_seqlens[0] == 0 && a.cu_seqlens[a.num_seqs] == a.num_tokens, "network: the boundaries must run from 0 to num_tokens");
    for (int64_t t = 0; t < a.num_tokens; ++t) TORCH_CHECK(a.input_ids[t] >= 0 && a.input_ids[t] < vocab_size_, "network: token id ", a.input_ids[t], " of ", vocab_size_);
    for (int64_t i = 0; i < a.num_logit_rows; ++i) TORCH_CHECK(a.logit_rows[i] >= 0 && a.logit_rows[i] < a.num_tokens, "network: logit row ", a.logit_rows[i]);
    TORCH_CHECK((a.previous.data != nullptr) == (a.enorm.data != nullptr), "network: a prediction module needs the states of the one before, the trunk has none");
    check(a);
    a.hidden = view(hidden, "hidden");
    kernels().network(a);
  }

  const Tensor& keep(const Tensor& t) {
    kept_.push_back(t);
    return t;
  }

  View norm(const Tensor& weight, int64_t size) {
    TORCH_CHECK(weight.numel() == size, "network: a norm has ", weight.numel(), " weights instead of ", size);
    return view(keep(weight), "norm weight");
  }

  // Each layer's own slots and blocks exist; layers of a group share both.
  void check(const NetworkArgs& a) const {
    const LayerArgs* seen[2] = {nullptr, nullptr};
    for (const LayerArgs& layer : *a.layers) {
      const int group = layer.group;
      if (seen[group] && seen[group]->window == layer.window && seen[group]->first_key == layer.first_key) continue;
      seen[group] = &layer;
      for (int64_t t = 0; t < a.num_tokens; ++t) TORCH_CHECK(a.slots[group][t] < layer.cache.num_blocks * layer.cache.block_size, "network: slot ", a.slots[group][t]);
      AttentionArgs attention;
      attention.num_seqs = a.num_seqs, attention.cu_seqlens = a.cu_seqlens, attention.seq_lens = a.seq_lens;
      attention.block_table = a.block_tables[group], attention.max_blocks = a.max_blocks[group];
      attention.window = layer.window, attention.first_key = layer.first_key, attention.cache = layer.cache;
      check_blocks(attention);
    }
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(stepflash, m) {
  m.class_<Network>("Network")
      .def(torch::init<Tensor, double, Packs>())
      .def("add_layer", &Network::add_layer)
      .def("set_feed_forward", &Network::set_feed_forward)
      .def("set_head", &Network::set_head)
      .def("set_join", &Network::set_join)
      .def("set_tables", &Network::set_tables)
      .def("run", &Network::run)
      .def("set_next", &Network::set_next)
      .def("draft", &Network::draft);
}

TORCH_LIBRARY_IMPL(stepflash, CPU, m) {
  m.impl("linear", linear);
  m.impl("moe", moe);
  m.impl("route", route);
  m.impl("rms_norm", rms_norm);
  m.impl("add_rms_norm", rms_norm_residual);
  m.impl("qk_norm_rope", qk_norm_rope);
  m.impl("qkv_gate", qkv_gate);
  m.impl("cache_write", cache_write);
  m.impl("cached_attention", cached_attention);
  m.impl("paged_attention", paged_attention);
  m.impl("advise_huge_pages", advise_huge_pages);
  m.impl("quantize", quantize);
  m.impl("stream_read", stream_read);
}

}  // namespace stepflash

extern "C" const char* stepflash_isa() {
  const stepflash::Kernels* table = stepflash::select_kernels(std::getenv("STEPFLASH_ISA"));
  return table ? table->isa : "";
}
