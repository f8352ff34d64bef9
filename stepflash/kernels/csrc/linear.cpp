// Packed linear layers: optional norm or head gate in front, several weights side by side, residual behind.
#include "bodies.h"
#include "tiles.h"

namespace SF_ISA {

// Activation records of all tokens in every layout that the weights need.
struct Records {
  int64_t formats[8];
  Record layouts[8];
  int64_t offsets[8];
  int count = 0;

  int add(int64_t format, int64_t k, int64_t num_tokens, Layout& layout) {
    for (int i = 0; i < count; ++i)
      if (record_key(formats[i]) == record_key(format)) return i;
    formats[count] = format;
    layouts[count] = Record(format, k);
    offsets[count] = layout.add(num_tokens * layouts[count].bytes);
    return count++;
  }
};

// How a call is cut into items and where its records lie; every thread makes the same.
struct LinearPlan {
  Layout layout;
  Records records;
  int kind_of[8];
  int64_t first_panel[9] = {0}, panels, per_item;
  bool repeats;   // every thread prepares all records for itself
  bool is_small;  // see Team::share

  explicit LinearPlan(const LinearArgs& args) {
    int64_t widest = 0;
    for (int w = 0; w < args.num_weights; ++w) {
      const Packed& weight = args.weights[w];
      kind_of[w] = records.add(weight.format, args.k, args.num_tokens, layout);
      first_panel[w + 1] = first_panel[w] + weight.panels();
      widest = weight.panel_stride > widest ? weight.panel_stride : widest;
    }
    panels = first_panel[args.num_weights];
    repeats = args.num_threads > 1 && args.num_tokens * args.k <= REPEAT_BELOW;
    is_small = repeats && panels * widest <= SMALL_PHASE;
    // Few tokens: small items, for balance. Many: as many panels as stay in the L2 cache with the token tile.
    per_item = panels / (args.num_threads * 8);
    const int64_t fit = (384 << 10) / widest;
    if (args.num_tokens > 16 && per_item > fit) per_item = fit;
    per_item = per_item < 1 ? 1 : per_item > 4 ? 4 : per_item;
  }
};

// Token t as the records that the weights need.
SF_INLINE void prepare_token(const LinearArgs& args, const Records& records, int64_t t, float* row, uint8_t* base) {
  const int64_t from = args.x_rows ? args.x_rows[t] : t;
  load_row(args.x, from, args.k, row);
  std::memset(row + args.k, 0, (round_up(args.k, 256) - args.k) * 4);
  if (args.norm_weight.data) norm_row(row, args.k, args.norm_weight, args.eps);
  if (args.gate.data) {
    float gate[512];
    load_row(args.gate, from, args.num_heads, gate);
    for (int64_t h = 0; h < args.num_heads; h += LANES) store(gate + h, sigmoid(load(gate + h)));
    const int64_t head_dim = args.k / args.num_heads;
    for (int64_t h = 0; h < args.num_heads; ++h)
      for (int64_t i = h * head_dim; i < (h + 1) * head_dim; ++i) row[i] *= gate[h];
  }
  if (!args.x.is_float) round_row(row, args.k);
  for (int i = 0; i < records.count; ++i)
    write_record(records.formats[i], records.layouts[i], row, 0, padded_k(records.formats[i], args.k),
                 base + records.offsets[i] + t * records.layouts[i].bytes);
}

// What is added to row t of the output, as row t.
SF_INLINE View residual_of(const LinearArgs& args, int w, int64_t t) {
  View view = args.residuals[w];
  if (args.x_rows && view.data) view.data = (char*)view.data + (args.x_rows[t] - t) * view.stride * (view.is_float ? 4 : 2);
  return view;
}

int64_t linear_scratch(const LinearArgs& args) { return LinearPlan(args).layout.bytes; }

void linear(Team& team, const LinearArgs& args, uint8_t* scratch) {
  const LinearPlan plan(args);
  float* row = (float*)workspace(1, round_up(args.k, 256) * 4);
  uint8_t* base = plan.repeats ? workspace(3, plan.layout.bytes) : scratch;
  const auto prepare = [&](int64_t t) { prepare_token(args, plan.records, t, row, base); };
  if (!plan.repeats) team.share(args.num_tokens, prepare);
  bool is_ready = !plan.repeats;
  team.share((plan.panels + plan.per_item - 1) / plan.per_item, [&](int64_t item) {
    for (int64_t t = 0; !is_ready && t < args.num_tokens; ++t) prepare(t);
    is_ready = true;
    float out[MAX_TILE * PANEL];
    const uint8_t* tokens[MAX_TILE];
    const int64_t begin = item * plan.per_item, end = begin + plan.per_item < plan.panels ? begin + plan.per_item : plan.panels;
    for (int64_t t = 0; t < args.num_tokens;) {
      const int m = tile_tokens(args.num_tokens - t);
      for (int64_t p = begin; p < end; ++p) {
        int w = 0;
        while (p >= plan.first_panel[w + 1]) ++w;
        const Packed& weight = args.weights[w];
        const Record& record = plan.records.layouts[plan.kind_of[w]];
        for (int i = 0; i < m; ++i) tokens[i] = base + plan.records.offsets[plan.kind_of[w]] + (t + i) * record.bytes;
        const int64_t panel = p - plan.first_panel[w], row0 = panel * PANEL;
        const int64_t k = read_k(weight.format, args.k);
        const uint8_t* next = p + 1 < plan.first_panel[w + 1] || w + 1 == args.num_weights ? weight.panel(panel + 1) : args.weights[w + 1].data;
        TILES[weight.format](weight.panel(panel), bytes_ahead(k, weight.panel(panel), next), k, record, tokens, m, out);
        const int64_t rows = weight.n - row0 < PANEL ? weight.n - row0 : PANEL;
        for (int i = 0; i < m; ++i) store_row(args.outs[w], residual_of(args, w, t + i), t + i, row0, rows, out + i * PANEL);
      }
      t += m;
    }
  }, plan.is_small);
}

void linear(const LinearArgs& args) {
  uint8_t* scratch = workspace(0, linear_scratch(args));
  parallel(args.num_threads, [=](Team& team) { linear(team, args, scratch); });
}

void rms_norm(const NormArgs& args) {
  parallel(args.num_tokens * args.size < 65536 ? 1 : args.num_threads, [=](Team& team) {
    float* row = (float*)workspace(1, round_up(args.size, 256) * 4);
    team.share(args.num_tokens, [&](int64_t t) {
      load_row(args.x, t, args.size, row);
      if (args.residual.data) {
        for (int64_t i = 0; i < args.size; i += 256) {
          const int64_t n = args.size - i < 256 ? args.size - i : 256;
          store_row(args.sum, args.residual, t, i, n, row + i);
        }
        load_row(args.sum, t, args.size, row);
      }
      norm_row(row, args.size, args.weight, args.eps);
      const View none;
      for (int64_t i = 0; i < args.size; i += 256) {
        const int64_t n = args.size - i < 256 ? args.size - i : 256;
        store_row(args.out, none, t, i, n, row + i);
      }
    });
  });
}

}  // namespace SF_ISA
