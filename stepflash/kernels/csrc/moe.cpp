// A whole feed-forward block in one job: norm, router, routed experts, shared expert, residual.
//
// Phases: prepare tokens | router scores | choose and group by expert | gate and up | down and sum. With few tokens
// every thread prepares, chooses and groups for itself instead of waiting for another. Every output element
// is summed by one thread over the token's experts in ascending order, the shared expert last, so the result
// depends neither on the threads nor on the other tokens. A dense MLP is a block with a shared expert only.
#include <algorithm>
#include <limits>

#include "bodies.h"
#include "tiles.h"

namespace SF_ISA {

constexpr int64_t FEW_TOKENS = 6, LARGE_EXPERT = 128 << 10;

// scores[e] = <x, weight[e]> in float32, always in this order of summation.
SF_INLINE void router_dot(const float* x, const float* weight, int64_t n, float* score) {
  vf sum[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int j = 0; j < 4; ++j) sum[j] = fma(load(x + i + j * LANES), load(weight + i + j * LANES), sum[j]);
  float total = hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < n; ++i) total += x[i] * weight[i];
  *score = total;
}

// Sigmoid, best top_k of probability + bias (ties: lowest index), weights renormalised and scaled (spec 3.2).
static void pick_experts(const float* scores, const float* bias, int64_t num_experts, int64_t top_k, float scaling,
                         int64_t* ids, float* weights) {
  constexpr float TAKEN = -std::numeric_limits<float>::infinity();
  float probability[1024], ranked[1024];
  for (int64_t e = 0; e < num_experts; ++e) {
    probability[e] = 1.0f / (1.0f + std::exp(-scores[e]));
    ranked[e] = probability[e] + (bias ? bias[e] : 0.0f);
  }
  float sum = 0;
  for (int64_t i = 0; i < top_k; ++i) {
    int64_t best = 0;
    for (int64_t e = 1; e < num_experts; ++e)
      if (ranked[e] > ranked[best]) best = e;
    ids[i] = best, weights[i] = probability[best], sum += probability[best];
    ranked[best] = TAKEN;
  }
  for (int64_t i = 0; i < top_k; ++i) weights[i] = weights[i] / (sum + 1e-20f) * scaling;
}

struct RouterScores {
  static constexpr int64_t CHUNK = 16;  // experts per work item, so that one token uses all threads
  int64_t num_tokens, num_experts, hidden_size;
  const float *x, *weight;
  int64_t x_stride;
  float* scores;

  int64_t chunks() const { return (num_experts + CHUNK - 1) / CHUNK; }
  int64_t token_blocks() const { return (num_tokens + 7) / 8; }
  int64_t items() const { return chunks() * token_blocks(); }
  void operator()(int64_t item) const {
    const int64_t chunk = item % chunks(), block = item / chunks();
    for (int64_t e = chunk * CHUNK; e < std::min(num_experts, (chunk + 1) * CHUNK); ++e)
      for (int64_t t = block * 8; t < std::min(num_tokens, block * 8 + 8); ++t)
        router_dot(x + t * x_stride, weight + e * hidden_size, hidden_size, scores + t * num_experts + e);
  }
};

// h = min(silu(g), limit) * clamp(u, -limit, limit); an infinite limit switches the clamp off (spec 3.3).
SF_INLINE void swiglu(const float* gate, const float* up, float limit, float* h, int64_t n) {
  const vf top = set1(limit), bottom = set1(-limit);
  for (int64_t i = 0; i < n; i += LANES) {
    const vf g = load(gate + i);
    store(h + i, min(g * sigmoid(g), top) * max(min(load(up + i), top), bottom));
  }
}

// One SwiGLU expert's weights, and how its hidden units are cut into work items.
struct Expert {
  Packed gate, up, down;
  float limit;
  Record in, hidden;
  int64_t chunk, chunks;  // hidden units per item: whole activation groups of the down projection

  Expert() : limit(0), chunk(0), chunks(0) {}
  Expert(const Packed& gate, const Packed& up, const Packed& down, float limit)
      : gate(gate), up(up), down(down), limit(limit), in(gate.format, gate.k), hidden(down.format, down.k) {
    chunk = std::max<int64_t>(64, FORMATS[down.format].group);
    chunks = (read_k(down.format, down.k) + chunk - 1) / chunk;
  }

  const uint8_t* gate_panel(int64_t e, int64_t index) const { return gate.data + e * gate.bytes() + index * chunk / PANEL * gate.panel_stride; }
  const uint8_t* down_panel(int64_t e, int64_t panel) const { return down.data + e * down.bytes() + panel * down.panel_stride; }

  // Hidden units [index * chunk, ...) of expert e for a list of tokens, written into their hidden records. next_gate is read after that.
  void gate_up(int64_t e, int64_t index, const uint8_t* const* tokens, uint8_t* const* hidden_records, int64_t count, const uint8_t* next_gate) const {
    const int64_t begin = index * chunk, end = std::min(begin + chunk, read_k(down.format, down.k));
    const int64_t k = read_k(gate.format, gate.k);
    const uint8_t *gates = gate_panel(e, 0), *ups = up.data + e * up.bytes(), *first_up = ups + begin / PANEL * up.panel_stride;
    // Beyond the last hidden unit lies the padding of down's k.
    const int64_t last = std::max(begin, std::min(end, gate.panels() * PANEL));
    float tile[MAX_TILE * PANEL], h[MAX_TILE][128];
    for (int64_t t = 0; t < count;) {
      const int m = tile_tokens(count - t);
      // All gate rows, then all up rows: two long streams of memory.
      for (int64_t row = begin; row < last; row += PANEL) {
        const uint8_t *panel = gates + row / PANEL * gate.panel_stride, *next = row + PANEL < last ? panel + gate.panel_stride : first_up;
        TILES[gate.format](panel, bytes_ahead(k, panel, next), k, in, tokens + t, m, tile);
        for (int i = 0; i < m; ++i) std::memcpy(h[i] + row - begin, tile + i * PANEL, PANEL * 4);
      }
      for (int64_t row = begin; row < last; row += PANEL) {
        const uint8_t *panel = ups + row / PANEL * up.panel_stride, *next = row + PANEL < last ? panel + up.panel_stride : next_gate;
        TILES[up.format](panel, bytes_ahead(k, panel, next), k, in, tokens + t, m, tile);
        for (int i = 0; i < m; ++i) swiglu(h[i] + row - begin, tile + i * PANEL, limit, h[i] + row - begin, PANEL);
      }
      for (int i = 0; i < m && last < end; ++i) std::memset(h[i] + last - begin, 0, (end - last) * 4);
      for (int i = 0; i < m; ++i) write_record(down.format, hidden, h[i], begin, end - begin, hidden_records[t + i]);
      t += m;
    }
  }

  // outputs[token][rows of the panels] = down(hidden) for a list of tokens.
  void down_rows(int64_t e, int64_t panel_begin, int64_t panel_end, const uint8_t* const* hidden_records, int64_t count,
                 float* outputs, int64_t stride) const {
    const int64_t k = read_k(down.format, down.k);
    float tile[MAX_TILE * PANEL];
    for (int64_t t = 0; t < count;) {
      const int m = tile_tokens(count - t);
      for (int64_t p = panel_begin; p < panel_end; ++p) {
        const uint8_t* panel = down_panel(e, p);
        TILES[down.format](panel, bytes_ahead(k, panel, panel + down.panel_stride), k, hidden, hidden_records + t, m, tile);
        for (int i = 0; i < m; ++i) std::memcpy(outputs + (t + i) * stride + p * PANEL, tile + i * PANEL, PANEL * 4);
      }
      t += m;
    }
  }

  // sums[token][rows of the panels] += weight * down(hidden) for a list of tokens; `next` is read after that.
  void add_down(int64_t e, int64_t panel_begin, int64_t panel_end, const uint8_t* const* hidden_records,
                const int32_t* token_ids, const float* weights, int64_t count, float* sums, int64_t stride, const uint8_t* next) const {
    const int64_t k = read_k(down.format, down.k);
    float out[MAX_TILE * PANEL];
    for (int64_t t = 0; t < count;) {
      const int m = tile_tokens(count - t);
      for (int64_t p = panel_begin; p < panel_end; ++p) {
        const uint8_t* panel = down_panel(e, p);
        TILES[down.format](panel, bytes_ahead(k, panel, p + 1 < panel_end ? down_panel(e, p + 1) : next), k, hidden, hidden_records + t, m, out);
        for (int i = 0; i < m; ++i) {
          float* sum = sums + (token_ids ? token_ids[t + i] : t + i) * stride + p * PANEL;
          const vf w = set1(weights ? weights[t + i] : 1.0f);
          store(sum, fma(load(out + i * PANEL), w, load(sum)));
          store(sum + LANES, fma(load(out + i * PANEL + LANES), w, load(sum + LANES)));
        }
      }
      t += m;
    }
  }
};

void route(const RouteArgs& args) {
  Layout layout;
  const int64_t x_offset = layout.add(args.num_tokens * args.hidden_size * 4);
  const int64_t score_offset = layout.add(args.num_tokens * args.num_experts * 4);
  uint8_t* base = workspace(0, layout.bytes);
  float *x = (float*)(base + x_offset), *scores = (float*)(base + score_offset);
  const RouterScores router{args.num_tokens, args.num_experts, args.hidden_size, x, args.router_weight, args.hidden_size, scores};
  parallel(args.num_threads, [=](Team& team) {
    team.share(args.num_tokens, [&](int64_t t) { load_row(args.x, t, args.hidden_size, x + t * args.hidden_size); });
    team.share(router.items(), router);
    team.share(args.num_tokens, [&](int64_t t) {
      pick_experts(scores + t * args.num_experts, args.router_bias, args.num_experts, args.top_k, args.scaling_factor,
                   args.topk_ids + t * args.top_k, args.topk_weights + t * args.top_k);
    });
  });
}

// What a block needs and where it lies; every thread makes the same. `own` is what each thread makes for itself
// when tokens are few, `shared` what the team makes together.
struct MoePlan {
  int64_t tokens, hidden, experts, top_k, slots, x_stride, sum_stride;
  bool has_routed, has_shared, same_in, few, repeats, repeats_scores, is_small, down_is_small;
  Expert routed, shared;
  Layout own_layout, shared_layout;
  int64_t x, routed_in, shared_in, ids, weights, slot_token, slot_weight, inputs, hidden_records, start, active;  // prepared
  int64_t scores, sums, parts, routed_hidden, shared_hidden;

  explicit MoePlan(const MoeArgs& args) {
    tokens = args.num_tokens, hidden = args.hidden_size, experts = args.num_experts, top_k = args.top_k;
    has_routed = experts > 0, has_shared = args.shared_gate.data != nullptr;
    if (has_routed) routed = Expert(args.gate, args.up, args.down, args.limit);
    if (has_shared) shared = Expert(args.shared_gate, args.shared_up, args.shared_down, args.shared_limit);
    x_stride = round_up(hidden, 256), sum_stride = num_panels(hidden) * PANEL;
    slots = has_routed ? tokens * top_k : 0;
    // Few tokens and large experts: each expert's output apart, so that its weights are read in long streams.
    few = tokens <= FEW_TOKENS && (has_routed ? routed : shared).down.bytes() > LARGE_EXPERT;
    repeats = args.num_threads > 1 && tokens <= FEW_TOKENS && tokens * hidden <= REPEAT_BELOW;
    repeats_scores = repeats && tokens * hidden * experts <= 4 * REPEAT_BELOW;
    // The experts of several tokens have different numbers of them; every panel of the sum costs the same.
    down_is_small = repeats && (std::min(slots, experts) + 1) * (has_routed ? routed : shared).down.bytes() <= SMALL_PHASE;
    is_small = down_is_small && tokens == 1;
    same_in = has_routed && has_shared && record_key(args.gate.format) == record_key(args.shared_gate.format);
    Layout& prepared = repeats ? own_layout : shared_layout;
    x = prepared.add(tokens * x_stride * 4);
    routed_in = prepared.add(has_routed ? tokens * routed.in.bytes : 0);
    shared_in = same_in ? routed_in : prepared.add(has_shared ? tokens * shared.in.bytes : 0);
    ids = prepared.add(slots * 8), weights = prepared.add(slots * 4);
    // Slots sorted by expert, ascending token within: token, weight, input record, hidden record.
    slot_token = prepared.add(slots * 4), slot_weight = prepared.add(slots * 4);
    inputs = prepared.add((slots + tokens) * 8), hidden_records = prepared.add((slots + tokens) * 8);
    start = prepared.add((experts + 1) * 8), active = prepared.add((experts + 1) * 8);  // active: count, then ids
    scores = (repeats_scores ? own_layout : shared_layout).add(tokens * experts * 4);
    routed_hidden = shared_layout.add(slots * routed.hidden.bytes);
    shared_hidden = shared_layout.add(has_shared ? tokens * shared.hidden.bytes : 0);
    sums = shared_layout.add(tokens * sum_stride * 4);
    parts = shared_layout.add(few ? (slots + tokens) * sum_stride * 4 : 0);
  }
};

int64_t moe_scratch(const MoeArgs& args) { return MoePlan(args).shared_layout.bytes; }

void moe(Team& team, const MoeArgs& args, uint8_t* scratch) {
  const MoePlan p(args);
  uint8_t* prepared = p.repeats ? workspace(3, p.own_layout.bytes) : scratch;
  const auto make_records = [&](int64_t t) {
    float* row = (float*)(prepared + p.x) + t * p.x_stride;
    load_row(args.x, t, p.hidden, row);
    std::memset(row + p.hidden, 0, (p.x_stride - p.hidden) * 4);
    if (args.norm_weight.data) norm_row(row, p.hidden, args.norm_weight, args.eps);
    if (!args.x.is_float) round_row(row, p.hidden);
    if (p.has_routed)
      write_record(args.gate.format, p.routed.in, row, 0, padded_k(args.gate.format, p.hidden), prepared + p.routed_in + t * p.routed.in.bytes);
    if (p.has_shared && !p.same_in) {
      const int64_t format = args.shared_gate.format;
      write_record(format, p.shared.in, row, 0, padded_k(format, p.hidden), prepared + p.shared_in + t * p.shared.in.bytes);
    }
  };
  bool has_records = false, has_groups = false;
  const auto all_records = [&] {
    for (int64_t t = 0; p.repeats && !has_records && t < p.tokens; ++t) make_records(t);
    has_records = true;
  };
  const bool routes = p.has_routed && args.topk_ids == nullptr;
  float* scores = (float*)((p.repeats_scores ? prepared : scratch) + p.scores);
  int64_t* ids = (int64_t*)(prepared + p.ids);
  float* weights = (float*)(prepared + p.weights);
  const auto pick = [&](int64_t t) {
    pick_experts(scores + t * p.experts, args.router_bias, p.experts, p.top_k, args.scaling_factor, ids + t * p.top_k, weights + t * p.top_k);
  };
  int32_t* slot_token = (int32_t*)(prepared + p.slot_token);
  float* slot_weight = (float*)(prepared + p.slot_weight);
  const uint8_t** inputs = (const uint8_t**)(prepared + p.inputs);
  uint8_t** hidden_records = (uint8_t**)(prepared + p.hidden_records);
  int64_t *start = (int64_t*)(prepared + p.start), *num_active = (int64_t*)(prepared + p.active), *active = num_active + 1;
  const auto group = [&] {
    const int64_t* chosen = args.topk_ids ? args.topk_ids : ids;
    const float* chosen_weight = args.topk_ids ? args.topk_weights : weights;
    *num_active = 0;
    std::memset(start, 0, (p.experts + 1) * 8);
    for (int64_t s = 0; s < p.slots; ++s) ++start[chosen[s] + 1];
    for (int64_t e = 0; e < p.experts; ++e) {
      if (start[e + 1]) active[(*num_active)++] = e;
      start[e + 1] += start[e];
    }
    for (int64_t s = 0; s < p.slots; ++s) {
      const int64_t at = start[chosen[s]]++;
      slot_token[at] = (int32_t)(s / p.top_k), slot_weight[at] = chosen_weight[s];
      inputs[at] = prepared + p.routed_in + s / p.top_k * p.routed.in.bytes;
      hidden_records[at] = scratch + p.routed_hidden + at * p.routed.hidden.bytes;
    }
    for (int64_t e = p.experts; e > 0; --e) start[e] = start[e - 1];
    start[0] = 0;
    for (int64_t t = 0; p.has_shared && t < p.tokens; ++t) {
      inputs[p.slots + t] = prepared + p.shared_in + t * p.shared.in.bytes;
      hidden_records[p.slots + t] = scratch + p.shared_hidden + t * p.shared.hidden.bytes;
    }
  };
  const RouterScores router{p.tokens, p.experts, p.hidden, (const float*)(prepared + p.x), args.router_weight, p.x_stride, scores};
  // What the later phases of this thread need; only items may call it.
  const auto get_ready = [&] {
    if (!p.repeats || has_groups) return;
    all_records();
    for (int64_t item = 0; routes && p.repeats_scores && item < router.items(); ++item) router(item);
    for (int64_t t = 0; routes && t < p.tokens; ++t) pick(t);
    group();
    has_groups = true;
  };

  if (!p.repeats) team.share(p.tokens, make_records);
  if (routes && !p.repeats_scores) {
    team.share(router.items(), [&](int64_t item) {
      all_records();
      router(item);
    });
  }
  if (!p.repeats) {
    if (routes) team.share(p.tokens, pick);
    team.share(1, [&](int64_t) { group(); });
  }
  const int64_t shared_items = p.has_shared ? p.shared.chunks : 0;  // first: they carry every token
  const int64_t most_active = std::min(p.slots, p.experts);
  team.share(shared_items + most_active * p.routed.chunks, [&](int64_t item) {
    get_ready();
    if (item < shared_items) {
      const bool is_last = item + 1 == shared_items && *num_active > 0;
      const uint8_t* next = is_last ? p.routed.gate_panel(active[0], 0) : p.shared.gate_panel(0, item + 1);
      p.shared.gate_up(0, item, inputs + p.slots, hidden_records + p.slots, p.tokens, next);
      return;
    }
    const int64_t a = (item - shared_items) / p.routed.chunks, index = (item - shared_items) % p.routed.chunks;
    if (a >= *num_active) return;
    const int64_t e = active[a], first = start[e];
    const bool is_last = index + 1 == p.routed.chunks && a + 1 < *num_active;
    const uint8_t* next = is_last ? p.routed.gate_panel(active[a + 1], 0) : p.routed.gate_panel(e, index + 1);
    p.routed.gate_up(e, index, inputs + first, hidden_records + first, start[e + 1] - first, next);
  }, p.is_small);
  const int64_t panels = num_panels(p.hidden), fair = panels / (4 * args.num_threads);
  const int64_t per_item = fair < 1 ? 1 : fair > 4 ? 4 : fair, groups = (panels + per_item - 1) / per_item;
  float *sums = (float*)(scratch + p.sums), *parts = (float*)(scratch + p.parts);
  if (p.few) {
    team.share((most_active + p.has_shared) * groups, [&](int64_t item) {
      get_ready();
      const int64_t begin = item % groups * per_item, end = std::min(begin + per_item, panels), a = item / groups;
      if (a < *num_active) {
        const int64_t first = start[active[a]], count = start[active[a] + 1] - first;
        p.routed.down_rows(active[a], begin, end, hidden_records + first, count, parts + first * p.sum_stride, p.sum_stride);
      } else if (a == *num_active && p.has_shared) {
        p.shared.down_rows(0, begin, end, hidden_records + p.slots, p.tokens, parts + p.slots * p.sum_stride, p.sum_stride);
      }
    });
  }
  team.share(groups, [&](int64_t item) {
    get_ready();
    const int64_t begin = item * per_item, end = std::min(begin + per_item, panels), stride = p.sum_stride;
    for (int64_t t = 0; t < p.tokens; ++t) std::memset(sums + t * stride + begin * PANEL, 0, (end - begin) * PANEL * 4);
    for (int64_t s = 0; p.few && s < p.slots + (p.has_shared ? p.tokens : 0); ++s) {
      float* sum = sums + (s < p.slots ? slot_token[s] : s - p.slots) * stride;
      const vf w = set1(s < p.slots ? slot_weight[s] : 1.0f);
      for (int64_t i = begin * PANEL; i < end * PANEL; i += LANES) store(sum + i, fma(load(parts + s * stride + i), w, load(sum + i)));
    }
    for (int64_t a = 0; !p.few && a < *num_active; ++a) {
      const int64_t e = active[a], first = start[e], count = start[e + 1] - first;
      const uint8_t* next = a + 1 < *num_active ? p.routed.down_panel(active[a + 1], begin) : p.has_shared ? p.shared.down_panel(0, begin) : p.routed.down_panel(active[0], end);
      p.routed.add_down(e, begin, end, hidden_records + first, slot_token + first, slot_weight + first, count, sums, stride, next);
    }
    if (p.has_shared && !p.few) {
      const uint8_t* next = *num_active ? p.routed.down_panel(active[0], end) : p.shared.down_panel(0, end);
      p.shared.add_down(0, begin, end, hidden_records + p.slots, nullptr, nullptr, p.tokens, sums, stride, next);
    }
    const int64_t width = std::min(end * PANEL, p.hidden) - begin * PANEL;
    for (int64_t t = 0; t < p.tokens; ++t) store_row(args.out, args.residual, t, begin * PANEL, width, sums + t * stride + begin * PANEL);
  }, p.down_is_small);
}

void moe(const MoeArgs& args) {
  uint8_t* scratch = workspace(0, moe_scratch(args));
  parallel(args.num_threads, [=](Team& team) { moe(team, args, scratch); });
}

}  // namespace SF_ISA
