// A whole pass of the network as one job, or several passes of which each needs what the one before it found: for a small
// model or a single token, starting a job for every operation would cost more than the operation.
#include <algorithm>
#include <limits>

#include "bodies.h"

namespace SF_ISA {

// Where everything lies that lives between two operations, and who attends to what.
struct NetworkPlan {
  Layout layout;
  int64_t x[2], joined, q, k, v, gate, attended, cos[4], sin[4], kernels;
  std::vector<AttentionPlan> plans;
  std::vector<int> plan_of;  // by layer

  explicit NetworkPlan(const NetworkArgs& args);
};

static int64_t element_size(const NetworkArgs& args) { return args.hidden.is_float ? 4 : 2; }

static View rows_at(const NetworkArgs& args, uint8_t* data, int64_t stride) {
  View view;
  view.data = data, view.stride = stride, view.is_float = args.hidden.is_float;
  return view;
}

static LinearArgs linear_args(const NetworkArgs& args, const View& x, int64_t k, const View& norm) {
  LinearArgs a;
  a.num_threads = args.num_threads, a.num_tokens = args.num_tokens, a.k = k;
  a.x = x, a.norm_weight = norm, a.eps = args.eps;
  a.num_heads = 0, a.num_weights = 0;
  return a;
}

static void add_output(LinearArgs& a, const Packed& weight, const View& out, const View& residual = View()) {
  a.weights[a.num_weights] = weight, a.outs[a.num_weights] = out, a.residuals[a.num_weights] = residual;
  ++a.num_weights;
}

// The operations of a layer with their operands. Of all but its keys and values only the rows of the logits are wanted where is_cut.
struct LayerOps {
  const NetworkArgs& args;
  const NetworkPlan& plan;
  const LayerArgs& layer;
  uint8_t* base;
  bool is_cut = false;

  View q() const { return rows_at(args, base + plan.q, layer.num_heads * layer.head_dim); }
  View k() const { return rows_at(args, base + plan.k, layer.num_kv_heads * layer.head_dim); }
  View v() const { return rows_at(args, base + plan.v, layer.num_kv_heads * layer.head_dim); }
  View gate() const { return rows_at(args, base + plan.gate, layer.num_heads); }
  View attended() const { return rows_at(args, base + plan.attended, layer.num_heads * layer.head_dim); }

  LinearArgs projections(const View& x) const {
    LinearArgs a = linear_args(args, x, args.hidden_size, layer.input_norm);
    add_output(a, layer.q, q()), add_output(a, layer.k, k()), add_output(a, layer.v, v()), add_output(a, layer.gate, gate());
    return a;
  }

  RopeArgs rope() const {
    RopeArgs a;
    a.num_threads = args.num_threads, a.num_tokens = args.num_tokens;
    a.num_heads = layer.num_heads, a.num_kv_heads = layer.num_kv_heads, a.head_dim = layer.head_dim;
    a.rotary_dim = 2 * args.ropes[layer.rope].half;
    a.q = a.q_out = q(), a.k = a.k_out = k(), a.q_weight = layer.q_norm, a.k_weight = layer.k_norm, a.eps = args.eps;
    a.cos = (const float*)(base + plan.cos[layer.rope]), a.sin = (const float*)(base + plan.sin[layer.rope]);
    return a;
  }

  CacheWriteArgs write() const {
    CacheWriteArgs a;
    a.num_threads = args.num_threads, a.num_tokens = args.num_tokens;
    a.k = k(), a.v = v(), a.slots = args.slots[layer.group], a.cache = layer.cache;
    return a;
  }

  AttentionArgs attention() const {
    AttentionArgs a;
    a.num_threads = args.num_threads, a.num_seqs = args.num_seqs, a.num_heads = layer.num_heads;
    a.q = q(), a.out = attended(), a.cache = layer.cache;
    a.block_table = args.block_tables[layer.group], a.max_blocks = args.max_blocks[layer.group];
    a.seq_lens = args.seq_lens, a.cu_seqlens = args.cu_seqlens;
    a.window = layer.window, a.first_key = layer.first_key, a.scale = layer.scale;
    return a;
  }

  LinearArgs output(const View& x, const View& out) const {
    LinearArgs a = linear_args(args, attended(), layer.num_heads * layer.head_dim, View());
    a.gate = gate(), a.num_heads = layer.num_heads;
    if (is_cut) a.num_tokens = args.num_logit_rows, a.x_rows = args.logit_rows;
    add_output(a, layer.o, out, x);
    return a;
  }

  MoeArgs feed_forward(const View& x, const View& out) const {
    MoeArgs a = layer.feed_forward;
    a.num_threads = args.num_threads, a.num_tokens = is_cut ? args.num_logit_rows : args.num_tokens;
    a.x = a.residual = x, a.out = out;
    return a;
  }
};

static LinearArgs join_args(const NetworkArgs& args, uint8_t* joined, const View& out) {
  LinearArgs a = linear_args(args, rows_at(args, joined, 2 * args.hidden_size), 2 * args.hidden_size, View());
  add_output(a, args.eh_proj, out);
  return a;
}

static LinearArgs head_args(const NetworkArgs& args) {
  LinearArgs a = linear_args(args, args.hidden, args.hidden_size, args.final_norm);
  a.num_tokens = args.num_logit_rows, a.x_rows = args.only_logit_rows ? nullptr : args.logit_rows;
  add_output(a, args.head, args.logits);
  return a;
}

static bool is_cut(const NetworkArgs& args, int64_t layer) { return args.only_logit_rows && layer + 1 == (int64_t)args.layers->size(); }

// Layers whose heads and windows agree attend alike.
static bool attend_alike(const LayerArgs& a, const LayerArgs& b) {
  return a.num_heads == b.num_heads && a.num_kv_heads == b.num_kv_heads && a.head_dim == b.head_dim && a.group == b.group &&
         a.window == b.window && a.first_key == b.first_key && a.cache.is_int8 == b.cache.is_int8;
}

NetworkPlan::NetworkPlan(const NetworkArgs& args) {
  const int64_t tokens = args.num_tokens, size = element_size(args);
  int64_t query_size = 0, kv_size = 0, heads = 0, scratch = 0;
  for (int64_t i = 0; i < (int64_t)args.layers->size(); ++i) {
    const LayerArgs& layer = (*args.layers)[i];
    query_size = std::max(query_size, layer.num_heads * layer.head_dim);
    kv_size = std::max(kv_size, layer.num_kv_heads * layer.head_dim), heads = std::max(heads, layer.num_heads);
    int64_t same = 0;
    while (same < i && !attend_alike((*args.layers)[same], layer)) ++same;
    if (same == i) plans.emplace_back(LayerOps{args, *this, layer, nullptr}.attention());
    plan_of.push_back(same == i ? (int)plans.size() - 1 : plan_of[same]);
  }
  for (int64_t& buffer : x) buffer = layout.add(tokens * args.hidden_size * size);
  joined = layout.add(args.previous.data ? 2 * tokens * args.hidden_size * size : 0);
  q = layout.add(tokens * query_size * size), attended = layout.add(tokens * query_size * size);
  k = layout.add(tokens * kv_size * size), v = layout.add(tokens * kv_size * size);
  gate = layout.add(tokens * heads * size);
  for (int i = 0; i < args.num_ropes; ++i) {
    cos[i] = layout.add(tokens * args.ropes[i].half * 4), sin[i] = layout.add(tokens * args.ropes[i].half * 4);
  }
  const View none;
  for (int64_t i = 0; i < (int64_t)args.layers->size(); ++i) {
    const LayerOps ops{args, *this, (*args.layers)[i], nullptr, is_cut(args, i)};
    scratch = std::max({scratch, linear_scratch(ops.projections(none)), linear_scratch(ops.output(none, none)),
                        attention_scratch(ops.attention(), plans[plan_of[i]]), moe_scratch(ops.feed_forward(none, none))});
  }
  if (args.previous.data) scratch = std::max(scratch, linear_scratch(join_args(args, nullptr, none)));
  if (args.num_logit_rows) scratch = std::max(scratch, linear_scratch(head_args(args)));
  kernels = layout.add(scratch);
}

// The angles of a token's position, its embedding, and for a prediction module both halves of what it joins.
static void start_token(const NetworkArgs& args, const NetworkPlan& plan, uint8_t* base, const View& x, int64_t t) {
  for (int i = 0; i < args.num_ropes; ++i) {
    const int64_t half = args.ropes[i].half;
    float *cos = (float*)(base + plan.cos[i]) + t * half, *sin = (float*)(base + plan.sin[i]) + t * half;
    for (int64_t j = 0; j < half; ++j) {
      const float angle = (float)args.positions[t] * args.ropes[i].inverse_frequencies[j];
      cos[j] = std::cos(angle), sin[j] = std::sin(angle);
    }
  }
  const int64_t hidden = args.hidden_size;
  float* row = (float*)workspace(1, round_up(hidden, 256) * 4);
  const auto put = [&](const View& out, int64_t column) {
    for (int64_t i = 0; i < hidden; i += 256) store_row(out, View(), t, column + i, std::min<int64_t>(256, hidden - i), row + i);
  };
  const int64_t id = args.input_ids[t];
  load_row(args.embedding, id < 0 ? args.drafted[-1 - id] : id, hidden, row);
  if (!args.previous.data) return put(x, 0);
  const View joined = rows_at(args, base + plan.joined, 2 * hidden);
  norm_row(row, hidden, args.enorm, args.eps);
  put(joined, 0);
  if (args.previous_from && args.previous_from[t]) {
    const int64_t size = args.previous.is_float ? 4 : 2;
    std::memcpy((char*)args.previous.data + t * args.previous.stride * size, args.previous_from[t], hidden * size);
  }
  load_row(args.previous, t, hidden, row);
  norm_row(row, hidden, args.hnorm, args.eps);
  put(joined, hidden);
}

// The first largest of n logits; NaN if any is.
static void pick_best(const float* logits, int64_t n, int64_t* best, float* value) {
  constexpr int64_t CHUNK = 1024;
  float largest = -std::numeric_limits<float>::infinity();
  *best = 0, *value = largest;
  int64_t found = 0;  // the chunk with the first largest
  for (int64_t begin = 0; begin < n; begin += CHUNK) {
    const int64_t end = std::min(n, begin + CHUNK);
    vf top = set1(-std::numeric_limits<float>::infinity()), strange = zero();
    int64_t i = begin;
    for (; i + LANES <= end; i += LANES) top = max(top, load(logits + i)), strange = fma(load(logits + i), zero(), strange);
    float peak = hmax(top), nan = hsum(strange);  // infinity times zero is NaN, too: looked at below
    for (; i < end; ++i) peak = std::max(peak, logits[i]), nan += logits[i] * 0.0f;
    for (i = begin; std::isnan(nan) && i < end; ++i)
      if (std::isnan(logits[i])) {
        *value = logits[i];
        return;
      }
    if (peak > largest) largest = peak, found = begin;
  }
  *value = largest;
  for (*best = found; *best < n - 1 && logits[*best] != largest;) ++*best;
}

static void run(Team& team, const NetworkArgs& args, const NetworkPlan& plan, uint8_t* base) {
  uint8_t* scratch = base + plan.kernels;
  const View x = rows_at(args, base + plan.x[0], args.hidden_size), middle = rows_at(args, base + plan.x[1], args.hidden_size);
  team.share(args.num_tokens, [&](int64_t t) { start_token(args, plan, base, x, t); });
  if (args.previous.data) linear(team, join_args(args, base + plan.joined, x), scratch);
  for (int64_t i = 0; i < (int64_t)args.layers->size(); ++i) {
    const LayerOps ops{args, plan, (*args.layers)[i], base, is_cut(args, i)};
    linear(team, ops.projections(x), scratch);
    const Rotation rotation{ops.rope(), ops.write()};
    attention(team, ops.attention(), plan.plans[plan.plan_of[i]], scratch, &rotation);
    linear(team, ops.output(x, middle), scratch);
    moe(team, ops.feed_forward(middle, i + 1 < (int64_t)args.layers->size() ? x : args.hidden), scratch);
  }
  if (args.num_logit_rows == 0) return;
  linear(team, head_args(args), scratch);
  team.share(args.num_logit_rows, [&](int64_t row) {
    pick_best((const float*)args.logits.data + row * args.logits.stride, args.vocab_limit, args.best + row, args.best_logit + row);
  });
}

void network(const NetworkArgs* passes, int64_t count) {
  using Planned = std::pair<NetworkArgs, NetworkPlan>;
  const auto all = std::make_shared<std::vector<Planned>>();  // owned by the job, see pool.h
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    all->emplace_back(passes[i], NetworkPlan(passes[i]));
    bytes = std::max(bytes, all->back().second.layout.bytes);
  }
  uint8_t* base = workspace(4, bytes);
  parallel(passes->num_threads, [=](Team& team) {
    for (const Planned& pass : *all) run(team, pass.first, pass.second, base);
  });
}

}  // namespace SF_ISA
