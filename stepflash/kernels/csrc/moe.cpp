// A whole feed-forward block in one job: norm, router, routed experts, shared expert, residual.
//
// Phases: prepare tokens | router scores | top-k | group by expert | gate and up | down. Every output element
// is summed by one thread over the token's experts in ascending order, the shared expert last, so the result
// depends neither on the threads nor on the other tokens. A dense MLP is a block with a shared expert only.
#include <algorithm>
#include <limits>

#include "parallel.h"
#include "rows.h"
#include "tiles.h"

namespace SF_ISA {

constexpr int64_t FEW_TOKENS = 6;

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
    chunks = (padded_k(down.format, down.k) + chunk - 1) / chunk;
  }

  // Hidden units [index * chunk, ...) of expert e for a list of tokens, written into their hidden records.
  void gate_up(int64_t e, int64_t index, const uint8_t* const* tokens, uint8_t* const* hidden_records, int64_t count) const {
    const int64_t begin = index * chunk, end = std::min(begin + chunk, padded_k(down.format, down.k));
    const int64_t k = padded_k(gate.format, gate.k);
    const uint8_t *gates = gate.data + e * gate.bytes(), *ups = up.data + e * up.bytes();
    // Beyond the last hidden unit lies the padding of down's k.
    const int64_t last = std::max(begin, std::min(end, gate.panels() * PANEL));
    float tile[MAX_TILE * PANEL], h[MAX_TILE][128];
    for (int64_t t = 0; t < count;) {
      const int m = tile_tokens(count - t);
      // All gate rows, then all up rows: two long streams of memory.
      for (int64_t row = begin; row < last; row += PANEL) {
        TILES[gate.format](gates + row / PANEL * gate.panel_stride, k, in, tokens + t, m, tile);
        for (int i = 0; i < m; ++i) std::memcpy(h[i] + row - begin, tile + i * PANEL, PANEL * 4);
      }
      for (int64_t row = begin; row < last; row += PANEL) {
        TILES[up.format](ups + row / PANEL * up.panel_stride, k, in, tokens + t, m, tile);
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
    const int64_t k = padded_k(down.format, down.k);
    float tile[MAX_TILE * PANEL];
    for (int64_t t = 0; t < count;) {
      const int m = tile_tokens(count - t);
      for (int64_t p = panel_begin; p < panel_end; ++p) {
        TILES[down.format](down.data + e * down.bytes() + p * down.panel_stride, k, hidden, hidden_records + t, m, tile);
        for (int i = 0; i < m; ++i) std::memcpy(outputs + (t + i) * stride + p * PANEL, tile + i * PANEL, PANEL * 4);
      }
      t += m;
    }
  }

  // sums[token][rows of the panels] += weight * down(hidden) for a list of tokens.
  void add_down(int64_t e, int64_t panel_begin, int64_t panel_end, const uint8_t* const* hidden_records,
                const int32_t* token_ids, const float* weights, int64_t count, float* sums, int64_t stride) const {
    const uint8_t* downs = down.data + e * down.bytes();
    const int64_t k = padded_k(down.format, down.k);
    float out[MAX_TILE * PANEL];
    for (int64_t t = 0; t < count;) {
      const int m = tile_tokens(count - t);
      for (int64_t p = panel_begin; p < panel_end; ++p) {
        TILES[down.format](downs + p * down.panel_stride, k, hidden, hidden_records + t, m, out);
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

void moe(const MoeArgs& args) {
  const int64_t tokens = args.num_tokens, hidden = args.hidden_size, experts = args.num_experts, top_k = args.top_k;
  const bool has_routed = experts > 0, has_shared = args.shared_gate.data != nullptr;
  Expert routed, shared;
  if (has_routed) routed = Expert(args.gate, args.up, args.down, args.limit);
  if (has_shared) shared = Expert(args.shared_gate, args.shared_up, args.shared_down, args.shared_limit);

  Layout layout;
  const int64_t x_stride = round_up(hidden, 256), sum_stride = num_panels(hidden) * PANEL;
  const int64_t slots = has_routed ? tokens * top_k : 0;
  const int64_t x_offset = layout.add(tokens * x_stride * 4), sum_offset = layout.add(tokens * sum_stride * 4);
  const int64_t score_offset = layout.add(tokens * experts * 4);
  const int64_t id_offset = layout.add(slots * 8), weight_offset = layout.add(slots * 4);
  const int64_t routed_in = layout.add(has_routed ? tokens * routed.in.bytes : 0);
  const bool same_in = has_routed && has_shared && record_key(args.gate.format) == record_key(args.shared_gate.format);
  const int64_t shared_in = same_in ? routed_in : layout.add(has_shared ? tokens * shared.in.bytes : 0);
  const int64_t routed_hidden = layout.add(slots * routed.hidden.bytes);
  const int64_t shared_hidden = layout.add(has_shared ? tokens * shared.hidden.bytes : 0);
  // Slots sorted by expert, ascending token within: token, weight, input record, hidden record.
  const int64_t token_offset = layout.add(slots * 4), sorted_weight = layout.add(slots * 4);
  const int64_t input_offset = layout.add((slots + tokens) * 8), record_offset = layout.add((slots + tokens) * 8);
  // Few tokens: each expert's output apart, so that its weights are read in long streams.
  const bool few = tokens <= FEW_TOKENS;
  const int64_t part_offset = layout.add(few ? (slots + tokens) * sum_stride * 4 : 0);
  const int64_t start_offset = layout.add((experts + 1) * 8), active_offset = layout.add(experts * 8);
  uint8_t* base = workspace(0, layout.bytes);
  float *x = (float*)(base + x_offset), *sums = (float*)(base + sum_offset), *scores = (float*)(base + score_offset);
  int64_t* ids = (int64_t*)(base + id_offset);
  float *parts = (float*)(base + part_offset), *weights = (float*)(base + weight_offset), *slot_weight = (float*)(base + sorted_weight);
  int32_t* slot_token = (int32_t*)(base + token_offset);
  const uint8_t** inputs = (const uint8_t**)(base + input_offset);
  uint8_t** hidden_records = (uint8_t**)(base + record_offset);
  int64_t *start = (int64_t*)(base + start_offset), *active = (int64_t*)(base + active_offset);
  const auto num_active = std::make_shared<int64_t>(0);  // read between phases: owned by the job, see pool.h
  const RouterScores router{tokens, experts, hidden, x, args.router_weight, x_stride, scores};

  parallel(args.num_threads, [=](Team& team) {
    team.share(tokens, [&](int64_t t) {
      float* row = x + t * x_stride;
      load_row(args.x, t, hidden, row);
      std::memset(row + hidden, 0, (x_stride - hidden) * 4);
      if (args.norm_weight.data) norm_row(row, hidden, args.norm_weight, args.eps);
      if (!args.x.is_float) round_row(row, hidden);
      if (has_routed) {
        write_record(args.gate.format, routed.in, row, 0, padded_k(args.gate.format, hidden), base + routed_in + t * routed.in.bytes);
      }
      if (has_shared && !same_in) {
        const int64_t format = args.shared_gate.format;
        write_record(format, shared.in, row, 0, padded_k(format, hidden), base + shared_in + t * shared.in.bytes);
      }
    });
    if (has_routed && args.topk_ids == nullptr) {
      team.share(router.items(), router);
      team.share(tokens, [&](int64_t t) {
        pick_experts(scores + t * experts, args.router_bias, experts, top_k, args.scaling_factor, ids + t * top_k,
                     weights + t * top_k);
      });
    }
    team.share(1, [&](int64_t) {
      const int64_t* chosen = args.topk_ids ? args.topk_ids : ids;
      const float* chosen_weight = args.topk_ids ? args.topk_weights : weights;
      *num_active = 0;
      std::memset(start, 0, (experts + 1) * 8);
      for (int64_t s = 0; s < slots; ++s) ++start[chosen[s] + 1];
      for (int64_t e = 0; e < experts; ++e) {
        if (start[e + 1]) active[(*num_active)++] = e;
        start[e + 1] += start[e];
      }
      for (int64_t s = 0; s < slots; ++s) {
        const int64_t at = start[chosen[s]]++;
        slot_token[at] = (int32_t)(s / top_k), slot_weight[at] = chosen_weight[s];
        inputs[at] = base + routed_in + s / top_k * routed.in.bytes;
        hidden_records[at] = base + routed_hidden + at * routed.hidden.bytes;
      }
      for (int64_t e = experts; e > 0; --e) start[e] = start[e - 1];
      start[0] = 0;
      for (int64_t t = 0; has_shared && t < tokens; ++t) {
        inputs[slots + t] = base + shared_in + t * shared.in.bytes;
        hidden_records[slots + t] = base + shared_hidden + t * shared.hidden.bytes;
      }
    });
    const int64_t shared_items = has_shared ? shared.chunks : 0;  // first: they carry every token
    team.share(shared_items + *num_active * routed.chunks, [&](int64_t item) {
      if (item < shared_items) {
        shared.gate_up(0, item, inputs + slots, hidden_records + slots, tokens);
      } else {
        const int64_t e = active[(item - shared_items) / routed.chunks], first = start[e];
        routed.gate_up(e, (item - shared_items) % routed.chunks, inputs + first, hidden_records + first, start[e + 1] - first);
      }
    });
    constexpr int64_t PER_ITEM = 4;  // panels
    const int64_t panels = num_panels(hidden), groups = (panels + PER_ITEM - 1) / PER_ITEM;
    if (few) {
      team.share((*num_active + has_shared) * groups, [&](int64_t item) {
        const int64_t begin = item % groups * PER_ITEM, end = std::min(begin + PER_ITEM, panels), a = item / groups;
        if (a < *num_active) {
          const int64_t first = start[active[a]], count = start[active[a] + 1] - first;
          routed.down_rows(active[a], begin, end, hidden_records + first, count, parts + first * sum_stride, sum_stride);
        } else {
          shared.down_rows(0, begin, end, hidden_records + slots, tokens, parts + slots * sum_stride, sum_stride);
        }
      });
    }
    team.share(groups, [&](int64_t item) {
      const int64_t begin = item * PER_ITEM, end = std::min(begin + PER_ITEM, panels);
      for (int64_t t = 0; t < tokens; ++t)
        std::memset(sums + t * sum_stride + begin * PANEL, 0, (end - begin) * PANEL * 4);
      for (int64_t s = 0; few && s < slots + (has_shared ? tokens : 0); ++s) {
        float* sum = sums + (s < slots ? slot_token[s] : s - slots) * sum_stride;
        const vf w = set1(s < slots ? slot_weight[s] : 1.0f);
        for (int64_t i = begin * PANEL; i < end * PANEL; i += LANES)
          store(sum + i, fma(load(parts + s * sum_stride + i), w, load(sum + i)));
      }
      for (int64_t a = 0; !few && a < *num_active; ++a) {
        const int64_t e = active[a], first = start[e], count = start[e + 1] - first;
        routed.add_down(e, begin, end, hidden_records + first, slot_token + first, slot_weight + first, count, sums, sum_stride);
      }
      if (has_shared && !few) shared.add_down(0, begin, end, hidden_records + slots, nullptr, nullptr, tokens, sums, sum_stride);
      const int64_t width = std::min(end * PANEL, hidden) - begin * PANEL;
      for (int64_t t = 0; t < tokens; ++t)
        store_row(args.out, args.residual, t, begin * PANEL, width, sums + t * sum_stride + begin * PANEL);
    });
  });
}

}  // namespace SF_ISA
