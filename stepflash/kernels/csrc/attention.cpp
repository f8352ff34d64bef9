// Paged attention for prefill, chunks, verification and decode: one path for all.
//
// A work item is a few query tokens of one sequence times the query heads of one KV head ("rows"), against one
// range of keys. Keys go by tiles of 64, aligned to absolute positions; a tile of K is turned so that lanes are
// keys, a tile of V so that lanes are dimensions, and both products are bf16 dot products with float sums, as
// in the linear layers. Ranges of SPLIT keys, also absolute, have their own softmax state and are merged in
// order. Tiles and splits that a row does not see leave its state untouched bit for bit, so a row's result
// depends only on its own query and keys: not on chunking, batching, drafts or the number of threads.
#include <algorithm>
#include <limits>

#include "bodies.h"

namespace SF_ISA {

constexpr int64_t KEYS = 64, SPLIT = 512, MAX_ROWS = 48, MAX_DIM = 256;
constexpr float NEVER = -std::numeric_limits<float>::infinity();

using Item = AttentionItem;

struct State {  // of the rows of one item
  float peak[MAX_ROWS], sum[MAX_ROWS];
  alignas(64) float out[MAX_ROWS * MAX_DIM];
};

struct Scratch {
  alignas(64) uint32_t keys[MAX_DIM / 2 * KEYS];     // [dim pair][key]
  alignas(64) uint32_t values[KEYS / 2 * MAX_DIM];   // [key pair][dim]
  alignas(64) uint16_t queries[MAX_ROWS * MAX_DIM];
  alignas(64) float scores[MAX_ROWS * KEYS];
  alignas(64) uint16_t weights[MAX_ROWS * KEYS];     // probabilities as bf16
  alignas(64) uint16_t rows[KEYS * MAX_DIM];         // a tile of int8 or missing keys as bf16
  State split, total;
};

// Sixteen rows of sixteen 32-bit words, transposed.
SF_INLINE void transpose16(const uint16_t* const* rows, int64_t offset, uint32_t* out, int64_t stride) {
#if defined(__AVX512F__)
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i] + offset);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_store_si512(out + i * stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_store_si512(out + (i + 8) * stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
  }
#else
  for (int key = 0; key < 16; ++key)
    for (int pair = 0; pair < 16; ++pair) std::memcpy(out + pair * stride + key, rows[key] + offset + 2 * pair, 4);
#endif
}

class Attention {
 public:
  Attention(const AttentionArgs& args, Scratch& scratch)
      : a(args), s(scratch), dim(args.cache.head_dim), group(args.num_heads / args.cache.num_kv_heads) {}

  // The softmax state of an item's rows over its keys.
  void run(const Item& item, State& total) {
    const int64_t rows = item.count * group;
    load_queries(item);
    clear(total, rows);
    for (int64_t split = item.begin / SPLIT * SPLIT; split < item.end; split += SPLIT) {
      clear(s.split, rows);
      const int64_t begin = std::max(item.begin, split), end = std::min(item.end, split + SPLIT);
      for (int64_t key = begin / KEYS * KEYS; key < end; key += KEYS) tile(item, key, std::max(key, begin), std::min(key + KEYS, end), rows);
      merge(total, s.split, rows);
    }
  }

  void clear(State& state, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) state.peak[r] = NEVER, state.sum[r] = 0;
    std::memset(state.out, 0, rows * dim * 4);
  }

  void merge(State& total, const State& part, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      merge_row(total.peak[r], total.sum[r], total.out + r * dim, part.peak[r], part.sum[r], part.out + r * dim);
    }
  }

  void merge_row(float& peak, float& sum, float* out, float part_peak, float part_sum, const float* part_out) const {
    if (part_peak == NEVER) return;
    const float top = std::max(peak, part_peak);
    const float keep = peak == NEVER ? 0.0f : one_exp(peak - top), add = one_exp(part_peak - top);
    sum = sum * keep + part_sum * add;
    for (int64_t d = 0; d < dim; d += LANES) store(out + d, fma(load(part_out + d), set1(add), load(out + d) * set1(keep)));
    peak = top;
  }

  void write(const Item& item, int64_t row, float sum, float* out) const {
    const int64_t token = item.first + row / group, head = item.kv_head * group + row % group;
    float factor = sum > 0 ? 1.0f / sum : 0.0f;
    if (a.gate.data) {
      const int64_t at = token * a.gate.stride + head;
      const float gate = a.gate.is_float ? ((const float*)a.gate.data)[at] : bf16_to_float(((const uint16_t*)a.gate.data)[at]);
      factor *= 1.0f / (1.0f + one_exp(-gate));
    }
    for (int64_t d = 0; d < dim; d += LANES) store(out + d, load(out + d) * set1(factor));
    for (int64_t d = 0; d < dim; d += 128) store_row(a.out, View(), token, head * dim + d, std::min<int64_t>(128, dim - d), out + d);
  }

 private:
  const AttentionArgs& a;
  Scratch& s;
  const int64_t dim, group;

  static float one_exp(float x) {
    float lanes[16];
    store(lanes, exp(set1(x)));
    return lanes[0];
  }

  void load_queries(const Item& item) {
    float row[MAX_DIM];
    for (int64_t r = 0; r < item.count * group; ++r) {
      View head = a.q;
      head.data = (char*)head.data + (item.kv_head * group + r % group) * dim * (a.q.is_float ? 4 : 2);
      load_row(head, item.first + r / group, dim, row);
      for (int64_t d = 0; d < dim; d += LANES) store_bf16(s.queries + r * dim + d, load(row + d));
    }
  }

  // Pointers to 64 rows of the cache as bf16; keys outside [begin, end) are zeros and are never read.
  void find_rows(const Item& item, const void* data, const float* scales, int64_t key, int64_t begin, int64_t end,
                 const uint16_t** rows) {
    const int32_t* blocks = a.block_table + item.seq * a.max_blocks;
    const int64_t heads = a.cache.num_kv_heads, block_size = a.cache.block_size;
    int64_t block = key / block_size, offset = key % block_size;  // a division per key would cost as much as a dot
    for (int64_t j = 0; j < KEYS; ++j) {
      const int64_t position = key + j;
      uint16_t* copy = s.rows + j * dim;
      rows[j] = copy;
      if (position < begin || position >= end) {
        std::memset(copy, 0, dim * 2);
      } else {
        const int64_t slot = blocks[block] * block_size + offset, at = (slot * heads + item.kv_head) * dim;
        if (!a.cache.is_int8) {
          rows[j] = (const uint16_t*)data + at;
        } else {
          const vf scale = set1(scales[slot * heads + item.kv_head]);
          for (int64_t d = 0; d < dim; d += LANES) store_bf16(copy + d, to_float(load_s8((const int8_t*)data + at + d)) * scale);
        }
      }
      if (++offset == block_size) offset = 0, ++block;
    }
  }

  // The rows of a cache are far apart (the other heads lie between), so nobody else fetches them ahead.
  void prefetch_rows(const Item& item, const void* data, int64_t begin, int64_t end) const {
    const int32_t* blocks = a.block_table + item.seq * a.max_blocks;
    const int64_t heads = a.cache.num_kv_heads, block_size = a.cache.block_size, size = a.cache.is_int8 ? dim : 2 * dim;
    int64_t block = begin / block_size, offset = begin % block_size;
    for (int64_t position = begin; position < end; ++position) {
      const char* row = (const char*)data + ((blocks[block] * block_size + offset) * heads + item.kv_head) * size;
      for (int64_t i = 0; i < size; i += 64) _mm_prefetch(row + i, _MM_HINT_T0);
      if (++offset == block_size) offset = 0, ++block;
    }
  }

  void pack_keys(const uint16_t* const* rows) {
    for (int64_t d = 0; d < dim; d += 32)
      for (int64_t j = 0; j < KEYS; j += 16) transpose16(rows + j, d, s.keys + d / 2 * KEYS + j, KEYS);
  }

  void pack_values(const uint16_t* const* rows) {
#if defined(__AVX512F__)
    alignas(64) uint16_t order[64];  // (first[d], second[d]) for 16 d, then for the next 16
    for (int i = 0; i < 64; ++i) order[i] = (uint16_t)(i / 2 + (i % 2) * 32);
    const __m512i low = _mm512_load_si512(order), high = _mm512_load_si512(order + 32);
    for (int64_t j = 0; j < KEYS; j += 2)
      for (int64_t d = 0; d < dim; d += 32) {
        const __m512i first = _mm512_loadu_si512(rows[j] + d), second = _mm512_loadu_si512(rows[j + 1] + d);
        _mm512_store_si512(s.values + j / 2 * dim + d, _mm512_permutex2var_epi16(first, low, second));
        _mm512_store_si512(s.values + j / 2 * dim + d + 16, _mm512_permutex2var_epi16(first, high, second));
      }
#else
    for (int64_t j = 0; j < KEYS; j += 2)
      for (int64_t d = 0; d < dim; d += LANES)
        storei(s.values + j / 2 * dim + d, load_u16(rows[j] + d) | shl<16>(load_u16(rows[j + 1] + d)));
#endif
  }

  template <int R>
  void score_rows(int64_t row) {
    vf acc[R][4];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 4; ++i) acc[r][i] = zero();
    const uint16_t* q = s.queries + row * dim;
    for (int64_t pair = 0; pair < dim / 2; ++pair) {
      const uint32_t* k = s.keys + pair * KEYS;
      const vi k0 = loadi(k), k1 = loadi(k + 16), k2 = loadi(k + 32), k3 = loadi(k + 48);
      for (int r = 0; r < R; ++r) {
        int32_t two;
        std::memcpy(&two, q + r * dim + 2 * pair, 4);
        const vi x = set1i(two);
        acc[r][0] = dot2(acc[r][0], k0, x), acc[r][1] = dot2(acc[r][1], k1, x);
        acc[r][2] = dot2(acc[r][2], k2, x), acc[r][3] = dot2(acc[r][3], k3, x);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 4; ++i) store(s.scores + (row + r) * KEYS + 16 * i, acc[r][i]);
  }

  // out[row][d..] = out * decay + weights * values, for R rows and N vectors of dimensions.
  template <int R, int N>
  void value_rows(int64_t row, int64_t d, const float* decay) {
    vf acc[R][N];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < N; ++i) acc[r][i] = load(s.split.out + (row + r) * dim + d + 16 * i) * set1(decay[row + r]);
    for (int64_t j = 0; j < KEYS / 2; ++j) {
      vi v[N];
      for (int i = 0; i < N; ++i) v[i] = loadi(s.values + j * dim + d + 16 * i);
      for (int r = 0; r < R; ++r) {
        int32_t two;
        std::memcpy(&two, s.weights + (row + r) * KEYS + 2 * j, 4);
        const vi p = set1i(two);
        for (int i = 0; i < N; ++i) acc[r][i] = dot2(acc[r][i], v[i], p);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < N; ++i) store(s.split.out + (row + r) * dim + d + 16 * i, acc[r][i]);
  }

  template <int N>
  void value_columns(int64_t rows, int64_t d, const float* decay) {
    constexpr int R = N == 8 ? 3 : 6;
    int64_t r = 0;
    for (; r + R <= rows; r += R) value_rows<R, N>(r, d, decay);
    for (; r < rows; ++r) value_rows<1, N>(r, d, decay);
  }

  // Scores to probabilities of one row; returns the factor by which its older sums shrink.
  float softmax_row(int64_t row, int64_t key, int64_t position) {
    const int64_t oldest = a.window > 0 ? std::max(a.first_key, position - a.window + 1) : a.first_key;
    float* scores = s.scores + row * KEYS;
    if (key < oldest || key + KEYS > position + 1)
      for (int64_t j = 0; j < KEYS; ++j)
        if (key + j > position || key + j < oldest) scores[j] = NEVER;
    const vf scale = set1(a.scale);
    vf x[4], top;
    for (int i = 0; i < 4; ++i) x[i] = load(scores + 16 * i) * scale;
    top = max(max(x[0], x[1]), max(x[2], x[3]));
    const float old = s.split.peak[row], peak = std::max(old, hmax(top));
    uint16_t* weights = s.weights + row * KEYS;
    if (peak == NEVER) {
      std::memset(weights, 0, KEYS * 2);
      return 1.0f;
    }
    const vf shift = set1(peak), floor = set1(-1e30f);
    for (int i = 0; i < 4; ++i) {
      x[i] = select_gt(x[i], floor, exp(x[i] - shift), zero());
      store_bf16(weights + 16 * i, x[i]);
    }
    const float decay = old == NEVER ? 0.0f : one_exp(old - peak);
    s.split.peak[row] = peak;
    s.split.sum[row] = s.split.sum[row] * decay + hsum((x[0] + x[1]) + (x[2] + x[3]));
    return decay;
  }

  void tile(const Item& item, int64_t key, int64_t begin, int64_t end, int64_t rows) {
    const uint16_t* pointers[KEYS];
    prefetch_rows(item, a.cache.v, begin, end);
    find_rows(item, a.cache.k, a.cache.k_scale, key, begin, end, pointers);
    pack_keys(pointers);
    if (end < item.end) prefetch_rows(item, a.cache.k, end, std::min(end + KEYS, item.end));
    find_rows(item, a.cache.v, a.cache.v_scale, key, begin, end, pointers);
    pack_values(pointers);
    int64_t r = 0;
    for (; r + 6 <= rows; r += 6) score_rows<6>(r);
    for (; r + 2 <= rows; r += 2) score_rows<2>(r);
    for (; r < rows; ++r) score_rows<1>(r);
    float decay[MAX_ROWS];
    for (r = 0; r < rows; ++r) decay[r] = softmax_row(r, key, item.position + r / group);
    int64_t d = 0;
    for (; d + 128 <= dim; d += 128) value_columns<8>(rows, d, decay);
    for (; d + 64 <= dim; d += 64) value_columns<4>(rows, d, decay);
    for (; d < dim; d += 32) value_columns<2>(rows, d, decay);
  }
};

AttentionPlan::AttentionPlan(const AttentionArgs& a) {
  const int64_t group = a.num_heads / a.cache.num_kv_heads, tokens = std::max<int64_t>(1, MAX_ROWS / group);
  std::vector<Item> whole;
  int64_t splits = 0;
  for (int64_t seq = 0; seq < a.num_seqs; ++seq) {
    const int64_t begin = a.cu_seqlens[seq], end = a.cu_seqlens[seq + 1];
    for (int64_t t = begin; t < end; t += tokens) {
      const int64_t count = std::min(tokens, end - t), position = a.seq_lens[seq] - end + t;
      const int64_t oldest = a.window > 0 ? std::max(a.first_key, position - a.window + 1) : a.first_key;
      for (int64_t h = 0; h < a.cache.num_kv_heads; ++h) whole.push_back({seq, t, count, position, h, oldest, position + count, -1});
      splits = std::max(splits, (position + count) / SPLIT - oldest / SPLIT + 1);
    }
  }
  if (a.num_threads == 1 || splits < 3 || (int64_t)whole.size() >= 8 * a.num_threads) {
    items.assign(whole.rbegin(), whole.rend());  // the longest contexts first
    return;
  }
  for (const Item& item : whole) {
    first_part.push_back(partial_rows);
    for (int64_t split = item.begin / SPLIT * SPLIT; split < item.end; split += SPLIT) {
      Item part = item;
      part.begin = std::max(item.begin, split), part.end = std::min(item.end, split + SPLIT);
      part.partial = partial_rows;
      partial_rows += item.count * group;
      items.push_back(part);
    }
    num_parts.push_back((partial_rows - first_part.back()) / (item.count * group));
    outputs.push_back(item);
  }
}

// A partial row: sums, then peak and sum.
static int64_t partial_stride(const AttentionArgs& args) { return args.cache.head_dim + LANES; }

int64_t attention_scratch(const AttentionArgs& args, const AttentionPlan& plan) { return plan.partial_rows * partial_stride(args) * 4; }

void attention(Team& team, const AttentionArgs& args, const AttentionPlan& plan, uint8_t* shared) {
  const int64_t dim = args.cache.head_dim, stride = partial_stride(args), group = args.num_heads / args.cache.num_kv_heads;
  float* partials = (float*)shared;
  Scratch& scratch = *(Scratch*)workspace(2, sizeof(Scratch));
  Attention attention(args, scratch);
  team.share((int64_t)plan.items.size(), [&](int64_t i) {
    const Item& item = plan.items[i];
    attention.run(item, scratch.total);
    for (int64_t r = 0; r < item.count * group; ++r) {
      if (item.partial < 0) {
        attention.write(item, r, scratch.total.sum[r], scratch.total.out + r * dim);
        continue;
      }
      float* row = partials + (item.partial + r) * stride;
      std::memcpy(row, scratch.total.out + r * dim, dim * 4);
      row[dim] = scratch.total.peak[r], row[dim + 1] = scratch.total.sum[r];
    }
  });
  if (plan.outputs.empty()) return;
  team.share((int64_t)plan.outputs.size(), [&](int64_t i) {
    const Item& item = plan.outputs[i];
    const int64_t rows = item.count * group;
    attention.clear(scratch.total, rows);
    for (int64_t part = 0; part < plan.num_parts[i]; ++part)
      for (int64_t r = 0; r < rows; ++r) {
        const float* row = partials + (plan.first_part[i] + part * rows + r) * stride;
        attention.merge_row(scratch.total.peak[r], scratch.total.sum[r], scratch.total.out + r * dim, row[dim], row[dim + 1], row);
      }
    for (int64_t r = 0; r < rows; ++r) attention.write(item, r, scratch.total.sum[r], scratch.total.out + r * dim);
  });
}

void attention(const AttentionArgs& args) {
  const auto plan = std::make_shared<const AttentionPlan>(args);  // owned by the job, see pool.h
  uint8_t* scratch = workspace(0, attention_scratch(args, *plan));
  parallel(args.num_threads, [=](Team& team) { attention(team, args, *plan, scratch); });
}

}  // namespace SF_ISA
