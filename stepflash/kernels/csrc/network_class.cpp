// The trunk and the prediction modules as objects that Python drives with one call a pass; see engine/network.py.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>
#include <numeric>

#include "tensors.h"

namespace stepflash {
namespace {

using Packs = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

// The trunk or one prediction module over packed weights and the engine's cache.
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
    a.hidden = view(hidden, "hidden");
    check(a);
    kernels().network(&a, 1);
    return {hidden, logits, best, std::vector<double>(best_logit.begin(), best_logit.end())};
  }

  // Decoding greedily with drafts: passes of the trunk over verifying sequences, each with the next drafts if all goes on. Span j is the last
  // known token of a sequence and its drafts; it may take rooms[j] tokens more, and its blocks reach to slot reaches[j]. Every module has read all
  // known tokens, and pending holds, by module from the second, then by sequence, the row that the module reads next. There are up to max_steps
  // steps, as long as max_seconds promise to suffice and every sequence goes on; with single_blocks none after one that has filled a block.
  // Returns the new tokens of all steps but the last, step by step, how many each sequence got, then what the last step verified and its `pending`;
  // of the last step hidden states, best tokens and their logits, all of every token; and what `draft` returned, which is empty if a logit is not
  // finite, or if a sequence ends there or has no room for `depth` drafts.
  using Before = std::tuple<Ints, Ints, Ints, Packs>;
  using Last = std::tuple<Tensor, Ints, std::vector<double>>;
  using Drafts = std::tuple<Packs, Packs, Ints, std::vector<double>, Packs>;
  std::tuple<Before, Last, Drafts> run_ahead(
      const Ints& token_ids, const Ints& lengths, const Ints& starts, const Ints& table_rows, Ints rooms, const Ints& reaches, const Ints& stop_ids, const Packs& pending,
      int64_t depth, int64_t max_steps, double max_seconds, bool single_blocks) {
    const int64_t num_seqs = (int64_t)lengths.size();
    TORCH_CHECK(next_ && depth >= 1 && (int64_t)rooms.size() == num_seqs && (int64_t)reaches.size() == num_seqs && (int64_t)pending.size() == (depth - 1) * num_seqs,
                "network: run_ahead needs modules, one room and reach for each span and a row for each later module and span");
    const auto begin = std::chrono::steady_clock::now();
    Ints earlier, counts;
    Step step = step_ahead({token_ids, lengths, starts, pending}, table_rows, rooms, stop_ids, depth);
    for (int64_t done = 1; done < max_steps && may_repeat(step, reaches, stop_ids, depth, single_blocks); ++done) {
      const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
      if (spent.count() * (done + 1) > max_seconds * done) break;
      for (int64_t j = 0; j < num_seqs; ++j) rooms[j] -= step.counts[j];
      Step following = step_ahead(after(step, depth), table_rows, rooms, stop_ids, depth);
      if (!all_finite(following.best_logits)) break;  // the next call fails at it, with nothing but it to lose
      earlier.insert(earlier.end(), step.new_ids.begin(), step.new_ids.end()), counts.insert(counts.end(), step.counts.begin(), step.counts.end());
      step = std::move(following);
    }
    return {Before{earlier, counts, step.from.token_ids, step.from.pending}, Last{step.hidden, step.best, step.best_logits},
            Drafts{step.read, step.left, step.drafts, step.draft_logits, step.unread}};
  }

  // The module whose drafts follow this one's; after the trunk comes the first.
  void set_next(c10::intrusive_ptr<Network> next) { next_ = std::move(next); }

  // This module and as many after it as `starts` tells, each proposing the best token after the tokens known and proposed before; one
  // job per sequence. hidden_states: by job, what the trunk left at its newest slots. By module, then by job:
  // `pending`, what the module has not read of the one before (empty: nothing), and `starts`, its first slot to run.
  // By job: token_ids[offsets[j] ...] are its known tokens from slot first_slots[j] on, num_known tokens in all, and table_rows, its row in the tables.
  // Returns by module the rows that it read and its hidden states, jobs end to end, of the last of all modules one row per job; module by module,
  // each job's draft and its logit; and by module from the second, then by job, the row that it reads next (empty: none).
  Drafts draft(const Packs& hidden_states, const Packs& pending, const Ints& starts, const Ints& token_ids, const Ints& offsets, const Ints& first_slots,
               const Ints& num_known, const Ints& table_rows) {
    const int64_t jobs = (int64_t)hidden_states.size(), modules = jobs ? (int64_t)starts.size() / jobs : 0;
    int64_t most = 1;
    for (Network* module = this; (module = module->next_.get());) ++most;
    TORCH_CHECK(modules >= 1 && modules <= most, "network: draft runs 1 to ", most, " modules");
    TORCH_CHECK((int64_t)pending.size() == modules * jobs && (int64_t)starts.size() == modules * jobs && (int64_t)offsets.size() == jobs &&
                    (int64_t)first_slots.size() == jobs && (int64_t)num_known.size() == jobs && (int64_t)table_rows.size() == jobs,
                "network: draft needs one entry per job, and per module and job");
    std::vector<Batch> batches(modules);
    choose_tables(batches[0], table_rows, *std::max_element(num_known.begin(), num_known.end()) + modules);
    const auto options = at::TensorOptions().dtype(type_);
    Ints drafts(modules * jobs), last(modules * jobs), bounds(jobs + 1, 0);
    std::vector<std::vector<const void*>> sources(modules);  // of rows that the module before leaves, by token
    std::vector<NetworkArgs> passes;
    std::vector<float> values(modules * jobs);
    Packs read, left, following;
    const Tensor logits = at::empty({jobs, vocab_size_}, options.dtype(at::kFloat)), later = at::empty({(modules - 1) * jobs, args_.hidden_size}, options);
    const int64_t row_bytes = args_.hidden_size * later.element_size();
    std::vector<const char*> following_from;
    Network* module = this;
    for (int64_t m = 0; m < modules; ++m, module = module->next_.get()) {
      const Ints before = bounds;  // of the module before: its tokens, jobs end to end
      for (int64_t j = 0; j < jobs; ++j) bounds[j + 1] = bounds[j] + num_known[j] + m - starts[m * jobs + j];
      Batch& batch = batches[m];
      batch.width = batches[0].width, batch.tables[0] = batches[0].tables[0], batch.tables[1] = batches[0].tables[1];
      batch.start(jobs, bounds[jobs]);
      sources[m].assign(bounds[jobs], nullptr);
      // Nobody reads what the last module leaves; its keys and values, and what it proposes, are all that is wanted.
      const bool is_last = !module->next_;
      Tensor rows = at::empty({bounds[jobs], args_.hidden_size}, options), hidden = at::empty({is_last ? jobs : bounds[jobs], args_.hidden_size}, options);
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
        const char* from = (const char*)source.data_ptr() + (m == 0 ? 0 : before[j] * row_bytes);
        if (m == 0) std::memcpy(to + num_unread * row_bytes, from, num_new * row_bytes);
        for (int64_t i = 0; m > 0 && i < num_new; ++i) sources[m][bounds[j] + num_unread + i] = from + i * row_bytes;
        int64_t t = bounds[j];
        for (int64_t slot = starts[m * jobs + j]; slot < num_known[j] + m; ++slot, ++t) {
          const int64_t id = slot < num_known[j] ? token_ids.at(offsets[j] + slot - first_slots[j]) : -1 - (slot - num_known[j]) * jobs - j;
          put_token(batch, j, t, id, slot, m + 1);
        }
        last[m * jobs + j] = t - 1;
        batch.end_sequence(j, t, num_known[j] + m);
        if (m == 0) continue;
        const int64_t at = num_known[j] - starts[m * jobs + j];
        following_from.push_back(at < 0 ? nullptr : to + at * row_bytes);
        following.push_back(later.narrow(0, (m - 1) * jobs + j, at >= 0));
      }
      NetworkArgs a = module->pass(batch);
      a.previous = view(rows, "previous");
      a.hidden = view(hidden, "hidden"), a.drafted = drafts.data(), a.previous_from = sources[m].data();
      a.num_logit_rows = jobs, a.logit_rows = last.data() + m * jobs, a.only_logit_rows = is_last;
      a.logits = view(logits, "logits"), a.best = drafts.data() + m * jobs, a.best_logit = values.data() + m * jobs;
      module->check(a, m * jobs);
      passes.push_back(a), read.push_back(rows), left.push_back(hidden);
    }
    kernels().network(passes.data(), modules);
    for (size_t i = 0; i < following_from.size(); ++i)
      if (following_from[i]) std::memcpy((char*)later.data_ptr() + i * row_bytes, following_from[i], row_bytes);
    return {read, left, drafts, std::vector<double>(values.begin(), values.end()), following};
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

  // What a step of run_ahead starts from, and what it comes to. By sequence: `counts` of `new_ids`; the rest as run_ahead has it.
  struct Spans {
    Ints token_ids, lengths, starts;
    Packs pending;
  };
  struct Step {
    Spans from;
    Tensor hidden;
    Ints best;
    std::vector<double> best_logits;
    Ints counts, new_ids;
    Packs read, left;
    Ints drafts;  // none if not every sequence goes on
    std::vector<double> draft_logits;
    Packs unread;
  };

  static bool all_finite(const std::vector<double>& values) {
    return std::all_of(values.begin(), values.end(), [](double x) { return std::isfinite(x); });
  }

  Step step_ahead(Spans from, const Ints& table_rows, const Ints& rooms, const Ints& stop_ids, int64_t depth) {
    const Ints &ids = from.token_ids, &lengths = from.lengths, &starts = from.starts;
    const int64_t num_seqs = (int64_t)lengths.size();
    Step step;
    Ints rows(ids.size());
    std::iota(rows.begin(), rows.end(), 0);
    Tensor logits;
    std::tie(step.hidden, logits, step.best, step.best_logits) = run(ids, lengths, starts, table_rows, 0, std::nullopt, rows);
    bool goes_on = all_finite(step.best_logits);
    Packs states, unread(num_seqs, step.hidden.narrow(0, 0, 0));
    Ints first_slots, module_starts, offsets, num_known;
    for (int64_t j = 0, begin = 0; j < num_seqs && goes_on; begin += lengths[j++]) {
      int64_t count = 1;
      while (count < lengths[j] && ids[begin + count] == step.best[begin + count - 1]) ++count;
      const auto first = step.best.begin() + begin;
      goes_on = count + depth < rooms[j] && std::find_first_of(first, first + count, stop_ids.begin(), stop_ids.end()) == first + count;
      states.push_back(step.hidden.narrow(0, begin, count));
      first_slots.push_back(starts[j] + 1), num_known.push_back(starts[j] + 1 + count), offsets.push_back((int64_t)step.new_ids.size());
      step.new_ids.insert(step.new_ids.end(), first, first + count), step.counts.push_back(count);
    }
    if (goes_on) {
      for (int64_t m = 0; m < depth; ++m) module_starts.insert(module_starts.end(), first_slots.begin(), first_slots.end());
      unread.insert(unread.end(), from.pending.begin(), from.pending.end());
      std::tie(step.read, step.left, step.drafts, step.draft_logits, step.unread) =
          next_->draft(states, unread, module_starts, step.new_ids, offsets, first_slots, num_known, table_rows);
    }
    step.from = std::move(from);
    return step;
  }

  // Whether what follows a step can be computed as it stands, without anybody's help.
  bool may_repeat(const Step& step, const Ints& reaches, const Ints& stop_ids, int64_t depth, bool single_blocks) const {
    if (step.drafts.empty() || !all_finite(step.draft_logits)) return false;
    if (std::find_first_of(step.drafts.begin(), step.drafts.end(), stop_ids.begin(), stop_ids.end()) != step.drafts.end()) return false;
    for (size_t j = 0; j < step.counts.size(); ++j) {
      const int64_t computed = step.from.starts[j] + step.counts[j];
      // One known token and the drafts, then the drafts of the modules.
      if (computed + 1 + 2 * depth > reaches[j]) return false;
      if (single_blocks && computed / block_size_ > step.from.starts[j] / block_size_) return false;
    }
    return true;
  }

  static Spans after(const Step& step, int64_t depth) {
    const int64_t num_seqs = (int64_t)step.counts.size();
    Spans spans;
    for (int64_t j = 0, end = 0; j < num_seqs; ++j) {
      end += step.counts[j];
      spans.token_ids.push_back(step.new_ids[end - 1]);
      for (int64_t m = 0; m < depth; ++m) spans.token_ids.push_back(step.drafts[m * num_seqs + j]);
      spans.lengths.push_back(1 + depth), spans.starts.push_back(step.from.starts[j] + step.counts[j]);
    }
    spans.pending = step.unread;
    return spans;
  }

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

  // Ids below 0 stand for the choices of passes before this one.
  void check(const NetworkArgs& a, int64_t num_drafted = 0) const {
    TORCH_CHECK(a.cu_seqlens[0] == 0 && a.cu_seqlens[a.num_seqs] == a.num_tokens, "network: the boundaries must run from 0 to num_tokens");
    for (int64_t t = 0; t < a.num_tokens; ++t) TORCH_CHECK(a.input_ids[t] >= -num_drafted && a.input_ids[t] < vocab_size_, "network: token id ", a.input_ids[t], " of ", vocab_size_);
    for (int64_t i = 0; i < a.num_logit_rows; ++i) TORCH_CHECK(a.logit_rows[i] >= 0 && a.logit_rows[i] < a.num_tokens, "network: logit row ", a.logit_rows[i]);
    TORCH_CHECK((a.previous.data != nullptr) == (a.enorm.data != nullptr), "network: a prediction module needs the states of the one before, the trunk has none");
    check_places(a);
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
  void check_places(const NetworkArgs& a) const {
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
      .def("run_ahead", &Network::run_ahead)
      .def("set_next", &Network::set_next)
      .def("draft", &Network::draft);
}

}  // namespace stepflash
