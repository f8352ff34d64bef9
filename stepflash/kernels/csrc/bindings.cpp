// Tensors in, kernel arguments out: the ops that ops.py declares.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <sys/mman.h>
#include <torch/library.h>

#include "tensors.h"

namespace stepflash {
namespace {

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

}  // namespace

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
