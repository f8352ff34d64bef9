// Paged attention for prefill, chunks, verification and decode: one path for all.
//
// A work item is a few query tokens of one sequence times the query heads of one KV head ("rows"), against one
// range of keys. The cache holds keys and values as the dot products want them (cache.h): 16 keys, a `group`,
// are one vector of scores, and nothing is copied but the edges. Keys go by tiles, aligned to absolute
// positions; each has a softmax of its own, and tiles are merged in order. Groups and tiles that a row does not
// see leave its sums untouched bit for bit, so a row's result depends only on its own query and keys: not on
// chunking, batching, drafts or the number of threads.
//
// bf16 caches are multiplied as bf16 with float sums. int8 caches are multiplied exactly, with queries and
// probabilities rounded to 16 bits: more digits than bf16 has, for half the bytes.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "bodies.h"
#include "cache.h"

namespace SF_ISA {

constexpr int64_t GROUP = LANES, TILE = 512, GROUPS = TILE / GROUP, MAX_ROWS = 48, MAX_DIM = 256;
constexpr int64_t STRIDE = TILE + 32;      // of rows of scores: not a power of two, for the L1 cache's sake
constexpr int64_t STREAMS = 4;             // groups scored together
constexpr int64_t AHEAD = 8;               // how many groups ahead memory is asked for
constexpr int64_t VALUE_GROUPS = 8;        // summed before accumulators rest in memory: 32 KB of values at 128 dimensions
constexpr int64_t LARGEST = 32767;         // of a 16-bit query or probability
static_assert(TILE * 127 * LARGEST < (int64_t(1) << 31) && MAX_DIM * 127 * LARGEST < (int64_t(1) << 31), "sums must fit into 32 bits");
constexpr float NEVER = -std::numeric_limits<float>::infinity();
#if defined(__AVX512F__)
constexpr int MOST_ROWS = 6;               // in registers at once, each with four accumulators
#else
constexpr int MOST_ROWS = 2;
#endif

using Item = AttentionItem;

struct State {  // of the rows of one item; peaks are logarithms to base 2
  float peak[MAX_ROWS], sum[MAX_ROWS];
  alignas(64) float out[MAX_ROWS * MAX_DIM];
};

struct Scratch {
  alignas(64) uint16_t queries[MAX_ROWS * MAX_DIM];   // bf16, or 16-bit integers
  alignas(64) float scores[MAX_ROWS * STRIDE];
  alignas(64) uint16_t weights[MAX_ROWS * STRIDE];    // probabilities, in the same type as queries
  alignas(64) uint8_t keys[TILE * MAX_DIM * 2], values[TILE * MAX_DIM * 2];  // groups that must be copied
  alignas(64) float key_scales[TILE], value_scales[TILE];
  State tile, total;
};

// 2^x, relative error below 3e-7; 0 below 2^-126, and for -infinity.
SF_INLINE vf power_of_two(vf x) {
  const vf smallest = set1(-126.0f), bounded = max(x, smallest);
  const vi n = to_int(bounded);
  const vf f = bounded - to_float(n);
  vf p = set1(1.3400433e-3f);
  p = fma(p, f, set1(9.6760374e-3f));
  p = fma(p, f, set1(5.5503272e-2f));
  p = fma(p, f, set1(2.4022107e-1f));
  p = fma(p, f, set1(6.9314718e-1f));
  p = fma(p, f, set1(1.0f));
  return select_gt(smallest, x, zero(), as_float(as_int(p) + shl<23>(n)));
}

SF_INLINE float power_of_two(float x) {
  float lanes[LANES];
  store(lanes, power_of_two(set1(x)));
  return lanes[0];
}

// A pair of bf16 per lane.
struct Bf16 {
  using Sum = vf;
  static constexpr int64_t BYTES = 2;
  SF_INLINE vi load(const uint8_t* p) { return loadi(p); }
  SF_INLINE vf dot(vf sum, vi cached, vi x) { return dot2(sum, cached, x); }
  SF_INLINE vf none() { return zero(); }
  SF_INLINE vf get(const float* p) { return SF_ISA::load(p); }
  SF_INLINE void put(float* p, vf sum) { store(p, sum); }
  SF_INLINE vf value(vf sum) { return sum; }
};

// A pair of 16-bit integers per lane, the cached ones from 8 bits; sums are exact.
struct Int8 {
  static constexpr int64_t BYTES = 1;
#if defined(__AVX512F__)
  struct Sum { __v16si v; };  // as the instruction takes it: GCC 12 spills sums of a type that it must convert
  SF_INLINE vi load(const uint8_t* p) { return {_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p))}; }
  SF_INLINE vi integers(Sum sum) { return {(__m512i)sum.v}; }
  SF_INLINE Sum to_sum(vi x) { return {(__v16si)x.v}; }
#else
  using Sum = vi;
  SF_INLINE vi load(const uint8_t* p) {
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p + 1))};
  }
  SF_INLINE vi integers(Sum sum) { return sum; }
  SF_INLINE Sum to_sum(vi x) { return x; }
#endif
  SF_INLINE Sum dot(Sum sum, vi cached, vi x) {
#if defined(SF_NATIVE_DOT)
    return {(__v16si)_mm512_dpwssd_epi32((__m512i)sum.v, cached.v, x.v)};
#elif defined(__AVX512F__)
    return {sum.v + (__v16si)_mm512_madd_epi16(cached.v, x.v)};
#else
    return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(cached.a, x.a)), _mm256_add_epi32(sum.b, _mm256_madd_epi16(cached.b, x.b))};
#endif
  }
  SF_INLINE Sum none() { return to_sum(set1i(0)); }
  SF_INLINE Sum get(const float* p) { return to_sum(loadi(p)); }
  SF_INLINE void put(float* p, Sum sum) { storei(p, integers(sum)); }
  SF_INLINE vf value(Sum sum) { return to_float(integers(sum)); }
};

SF_INLINE void store_weights(uint16_t* out, vf x, Bf16) {
#if defined(SF_NATIVE_DOT)
  _mm256_storeu_si256((__m256i*)out, (__m256i)_mm512_cvtneps_pbh(x.v));
#else
  store_bf16(out, x);
#endif
}
SF_INLINE void store_weights(uint16_t* out, vf x, Int8) { store_u16(out, to_int(x)); }

SF_INLINE vi pair_at(const uint16_t* p) {
  int32_t two;
  std::memcpy(&two, p, 4);
  return set1i(two);
}

// Into the L2 cache, which has more requests under way than L1: from memory that is up to 1.6 times as fast, while loads
// from L2 cost little here (Zen 4, docs/benchmarks.md).
SF_INLINE void ask(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

// Some rows of an item that are worked on together, one of `shares` alike. Each fetches its part ahead.
struct Share {
  int64_t row, number, shares;
};

// body(std::integral_constant<int, R>, share) for all rows, in even shares of at most MOST_ROWS.
template <class Body>
SF_INLINE void in_shares(int64_t rows, Body body) {
  Share share{0, 0, (rows + MOST_ROWS - 1) / MOST_ROWS};
  for (; share.number < share.shares; ++share.number) {
    const int64_t left = share.shares - share.number, count = (rows - share.row + left - 1) / left;
    switch (count) {
#define SF_SHARE(R) case R: if constexpr (R <= MOST_ROWS) body(std::integral_constant<int, R>(), share); break;
      SF_SHARE(1) SF_SHARE(2) SF_SHARE(3) SF_SHARE(4) SF_SHARE(5) SF_SHARE(6)
#undef SF_SHARE
    }
    share.row += count;
  }
}

// The rows of one item. One object serves many items of a call.
template <class Cell>
class Rows {
 public:
  Rows(const AttentionArgs& args, Scratch& scratch)
      : a(args), s(scratch), dim(args.cache.head_dim), block_size(args.cache.block_size),
        is_direct(block_size % GROUP == 0), key_stride((is_direct ? block_size : GROUP) * 2 * Cell::BYTES),
        group_bytes(GROUP * dim * Cell::BYTES) {}

  void start(const Item& next) {
    item = &next;
    group = a.num_heads / a.cache.num_kv_heads, rows = item->count * group;
    blocks = a.block_table + item->seq * a.max_blocks;
    for (int64_t r = 0; r < rows; ++r) {
      View head = a.q;
      head.data = (char*)head.data + (item->kv_head * group + r % group) * dim * (a.q.is_float ? 4 : 2);
      load_query(head, item->first + r / group, r);
    }
  }

  // The softmax state of the keys in [base, base + TILE), into scratch.tile.
  void tile(int64_t base) {
    const int64_t begin = std::max(item->begin, base), end = std::min(item->end, base + TILE);
    const int64_t first = (begin - base) / GROUP, last = (end - base + GROUP - 1) / GROUP;  // groups
    find_groups(base, first, last, begin, end);
    for (int64_t g = first; g < last; g += STREAMS) {
      const int64_t count = std::min(STREAMS, last - g);
      if (count == STREAMS) {
        in_shares(rows, [&](auto R, const Share& share) { score<R(), STREAMS>(share, g, first); });
      } else {
        for (int64_t i = g; i < last; ++i) in_shares(rows, [&](auto R, const Share& share) { score<R(), 1>(share, i, first); });
      }
    }
    for (int64_t r = 0; r < rows; ++r) softmax(r, base, first, last);
    for (int64_t g = first; g < last; g += VALUE_GROUPS) {
      const int64_t until = std::min(g + VALUE_GROUPS, last);
      int64_t d = 0;
      for (; d + 64 <= dim; d += 64) in_shares(rows, [&](auto R, const Share& share) { sum_values<R(), 4>(share, d, g, until, first, last); });
      for (; d < dim; d += 32) in_shares(rows, [&](auto R, const Share& share) { sum_values<R(), 2>(share, d, g, until, first, last); });
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* out = s.tile.out + r * dim;
      if (Cell::BYTES == 1)
        for (int64_t d = 0; d < dim; d += LANES) store(out + d, Cell::value(Cell::get(out + d)) * set1(weight_unit[r]));
    }
  }

  void write(int64_t row, float sum, float* out) const {
    const int64_t token = item->first + row / group, head = item->kv_head * group + row % group;
    float factor = sum == 0 ? 0.0f : 1.0f / sum;
    if (a.gate.data) {
      const int64_t at = token * a.gate.stride + head;
      const float gate = a.gate.is_float ? ((const float*)a.gate.data)[at] : bf16_to_float(((const uint16_t*)a.gate.data)[at]);
      factor /= 1.0f + power_of_two(std::min(-gate * LOG2_E, 126.0f));
    }
    for (int64_t d = 0; d < dim; d += LANES) store(out + d, load(out + d) * set1(factor));
    for (int64_t d = 0; d < dim; d += 128) store_row(a.out, View(), token, head * dim + d, std::min<int64_t>(128, dim - d), out + d);
  }

  int64_t rows = 0;

 private:
  static constexpr float LOG2_E = 1.44269504f;
  const AttentionArgs& a;
  Scratch& s;
  const int64_t dim, block_size;
  const bool is_direct;       // groups lie whole in the cache
  const int64_t key_stride;   // bytes from one pair of dimensions to the next
  const int64_t group_bytes;
  const Item* item = nullptr;
  const int32_t* blocks = nullptr;
  int64_t group = 1;
  const uint8_t *stream[2 * GROUPS + AHEAD];  // the groups in the order in which they are read
  const uint8_t *keys[GROUPS], *values[GROUPS];
  const float *key_scales[GROUPS], *value_scales[GROUPS];
  float score_unit[MAX_ROWS], weight_unit[MAX_ROWS];

  // Row r of the queries in the cell's type; score_unit turns its dot products into logarithms to base 2.
  void load_query(const View& head, int64_t token, int64_t r) {
    uint16_t* out = s.queries + r * dim;
    score_unit[r] = a.scale * LOG2_E;
    if (Cell::BYTES == 2 && !head.is_float) {
      std::memcpy(out, (const uint16_t*)head.data + token * head.stride, dim * 2);
      return;
    }
    float x[MAX_DIM];
    load_row(head, token, dim, x);
    if (Cell::BYTES == 2) {
      for (int64_t d = 0; d < dim; d += LANES) store_bf16(out + d, load(x + d));
      return;
    }
    const vi sign = set1i(0x7fffffff);
    vf top = zero();
    for (int64_t d = 0; d < dim; d += LANES) top = max(top, as_float(as_int(load(x + d)) & sign));
    const float peak = hmax(top);
    const vf inverse = set1(peak > 0 ? (float)LARGEST / peak : 0.0f);
    for (int64_t d = 0; d < dim; d += LANES) store_u16(out + d, to_int(load(x + d) * inverse));
    score_unit[r] *= peak / (float)LARGEST;
  }

  // Where this head of a block begins, in slots.
  int64_t head_start(int64_t block) const { return block_head(a.cache, blocks[block], item->kv_head) * block_size; }

  const uint8_t* key_group(int64_t block, int64_t offset) const {
    return (const uint8_t*)a.cache.k + (head_start(block) * dim + key_element(a.cache, offset, 0)) * Cell::BYTES;
  }

  // Where the groups lie. The stream has keys, values, and the first keys of the next tile.
  void find_groups(int64_t base, int64_t first, int64_t last, int64_t begin, int64_t end) {
    int64_t position = base + first * GROUP, block = position / block_size, offset = position % block_size, n = last - first;
    const auto step = [&] {
      position += GROUP, offset += GROUP;
      if (offset >= block_size) offset = 0, ++block;
    };
    for (int64_t g = first; g < last; ++g, step()) {
      const int64_t low = std::max<int64_t>(0, begin - position), high = std::min(GROUP, end - position);
      is_direct ? find(g, block, offset, low, high) : gather(g, position, low, high);
      stream[g - first] = keys[g], stream[n + g - first] = values[g];
    }
    n *= 2;
    for (int64_t i = 0; i < AHEAD; ++i, ++n, step()) stream[n] = is_direct && position < item->end ? key_group(block, offset) : stream[n - 1];
  }

  void find(int64_t g, int64_t block, int64_t offset, int64_t low, int64_t high) {
    const int64_t at = head_start(block);
    keys[g] = key_group(block, offset);
    values[g] = (const uint8_t*)a.cache.v + (at * dim + value_element(a.cache, offset, 0)) * Cell::BYTES;
    if (Cell::BYTES == 1) key_scales[g] = a.cache.k_scale + at + offset, value_scales[g] = a.cache.v_scale + at + offset;
    if (Cell::BYTES == 2 && (low > 0 || high < GROUP)) hide_values(g, low, high);
  }

  // A weight of zero does not hide what is not a number: values of a group outside [low, high) become zeros.
  void hide_values(int64_t g, int64_t low, int64_t high) {
    uint8_t* copy = s.values + g * group_bytes;
    for (int64_t j = 0; j < GROUP; j += 2) {
      const vi seen = set1i((int32_t)((j >= low && j < high ? 0xffffu : 0) | (j + 1 >= low && j + 1 < high ? 0xffff0000u : 0)));
      for (int64_t i = j * dim * 2; i < (j + 2) * dim * 2; i += 64) storei(copy + i, loadi(values[g] + i) & seen);
    }
    values[g] = copy;
  }

  // Blocks that are no multiple of a group: element by element.
  void gather(int64_t g, int64_t position, int64_t low, int64_t high) {
    using T = std::conditional_t<Cell::BYTES == 2, uint16_t, int8_t>;
    Cache one = a.cache;  // a block of one group
    one.block_size = GROUP;
    T *k = (T*)(s.keys + g * group_bytes), *v = (T*)(s.values + g * group_bytes);
    std::memset(k, 0, group_bytes), std::memset(v, 0, group_bytes);
    for (int64_t j = low; j < high; ++j) {
      const int64_t at = head_start((position + j) / block_size), offset = (position + j) % block_size;
      const T *from_k = (const T*)a.cache.k + at * dim, *from_v = (const T*)a.cache.v + at * dim;
      for (int64_t d = 0; d < dim; ++d) {
        k[key_element(one, j, d)] = from_k[key_element(a.cache, offset, d)];
        v[value_element(one, j, d)] = from_v[value_element(a.cache, offset, d)];
      }
      if (Cell::BYTES == 1)
        s.key_scales[g * GROUP + j] = a.cache.k_scale[at + offset], s.value_scales[g * GROUP + j] = a.cache.v_scale[at + offset];
    }
    keys[g] = (uint8_t*)k, values[g] = (uint8_t*)v;
    key_scales[g] = s.key_scales + g * GROUP, value_scales[g] = s.value_scales + g * GROUP;
  }

  // Scores of R rows and N groups, from keys that were asked for AHEAD groups ago. Not inlined, as sum_values: in a large
  // function the pointers of their loops would not stay in registers. Nor would the sums if loops were not unrolled.
  template <int R, int N>
  [[gnu::noinline]] void score(const Share& share, int64_t g, int64_t first) {
    const int64_t row = share.row;
    typename Cell::Sum sum[R][N];
    const uint8_t *at[N], *ahead[N];
    SF_UNROLL for (int i = 0; i < N; ++i) {
      at[i] = keys[g + i], ahead[i] = stream[g - first + i + AHEAD];
      SF_UNROLL for (int r = 0; r < R; ++r) sum[r][i] = Cell::none();
    }
    const uint16_t* q = s.queries + row * dim;
    for (int64_t pair = 0, turn = share.number; pair < dim / 2; ++pair) {
      vi k[N];
      SF_UNROLL for (int i = 0; i < N; ++i) k[i] = Cell::load(at[i] + pair * key_stride);
      if (turn-- == 0) {
        turn = share.shares - 1;
        SF_UNROLL for (int i = 0; i < N; ++i) ask(ahead[i] + pair * key_stride);
      }
      SF_UNROLL for (int r = 0; r < R; ++r) {
        const vi x = pair_at(q + r * dim + 2 * pair);
        SF_UNROLL for (int i = 0; i < N; ++i) sum[r][i] = Cell::dot(sum[r][i], k[i], x);
      }
    }
    SF_UNROLL for (int i = 0; i < N; ++i) {
      const vf scale = Cell::BYTES == 1 ? load(key_scales[g + i]) : set1(1.0f);
      SF_UNROLL for (int r = 0; r < R; ++r) store(s.scores + (row + r) * STRIDE + (g + i) * GROUP, Cell::value(sum[r][i]) * (scale * set1(score_unit[row + r])));
    }
  }

  // Scores of one row to probabilities, their sum and peak.
  void softmax(int64_t row, int64_t base, int64_t first, int64_t last) {
    const int64_t position = item->position + row / group;
    const int64_t oldest = a.window > 0 ? std::max(a.first_key, position - a.window + 1) : a.first_key;
    const int64_t low = std::max(oldest - base, first * GROUP), high = std::min(position + 1 - base, last * GROUP);
    float* scores = s.scores + row * STRIDE;
    uint16_t* weights = s.weights + row * STRIDE;
    s.tile.peak[row] = NEVER, s.tile.sum[row] = 0, weight_unit[row] = 0;
    if (low >= high) {
      std::memset(weights + first * GROUP, 0, (last - first) * GROUP * 2);
      return;
    }
    const int64_t from = low / GROUP, until = (high + GROUP - 1) / GROUP;
    for (int64_t j = from * GROUP; j < low; ++j) scores[j] = NEVER;
    for (int64_t j = high; j < until * GROUP; ++j) scores[j] = NEVER;
    std::memset(weights + first * GROUP, 0, (from - first) * GROUP * 2);
    std::memset(weights + until * GROUP, 0, (last - until) * GROUP * 2);
    vf top = set1(NEVER);
    for (int64_t g = from; g < until; ++g) top = max(top, load(scores + g * GROUP));
    const float peak = hmax(top);
    const vf shift = set1(peak);
    vf sum = zero(), largest = zero();
    for (int64_t g = from; g < until; ++g) {
      vf p = power_of_two(load(scores + g * GROUP) - shift);
      sum = sum + p;
      if (Cell::BYTES == 2) {
        store_weights(weights + g * GROUP, p, Cell());
      } else {
        p = select_gt(p, zero(), p * load(value_scales[g]), zero());
        sum = fma(p, zero(), sum);  // a value that is not a number is lost in integers, but not in the sum
        largest = max(largest, p);
        store(scores + g * GROUP, p);
      }
    }
    s.tile.peak[row] = peak, s.tile.sum[row] = hsum(sum);
    if (Cell::BYTES == 2) return;
    const float bound = hmax(largest);
    const vf inverse = set1(bound > 0 ? (float)LARGEST / bound : 0.0f);
    for (int64_t g = from; g < until; ++g) store_weights(weights + g * GROUP, load(scores + g * GROUP) * inverse, Cell());
    weight_unit[row] = bound / (float)LARGEST;
  }

  // out[row][d..] += weights * values over groups [g, until), for R rows and N vectors of dimensions.
  template <int R, int N>
  [[gnu::noinline]] void sum_values(const Share& share, int64_t d, int64_t g, int64_t until, int64_t first, int64_t last) {
    const int64_t row = share.row;
    const bool is_first = g == first;
    typename Cell::Sum sum[R][N];
    SF_UNROLL for (int r = 0; r < R; ++r)
      SF_UNROLL for (int i = 0; i < N; ++i) sum[r][i] = is_first ? Cell::none() : Cell::get(s.tile.out + (row + r) * dim + d + LANES * i);
    for (int64_t turn = share.number; g < until; ++g) {
      const uint8_t* v = values[g] + d * 2 * Cell::BYTES;
      const uint8_t* ahead = stream[last - first + g - first + AHEAD] + d * 2 * Cell::BYTES;
      const uint16_t* p = s.weights + row * STRIDE + g * GROUP;
      for (int64_t j = 0; j < GROUP / 2; ++j) {
        vi x[N];
        SF_UNROLL for (int i = 0; i < N; ++i) x[i] = Cell::load(v + (j * dim + LANES * i) * 2 * Cell::BYTES);
        if (turn-- == 0) {
          turn = share.shares - 1;
          SF_UNROLL for (int i = 0; i < N; ++i) ask(ahead + (j * dim + LANES * i) * 2 * Cell::BYTES);
        }
        SF_UNROLL for (int r = 0; r < R; ++r) {
          const vi w = pair_at(p + r * STRIDE + 2 * j);
          SF_UNROLL for (int i = 0; i < N; ++i) sum[r][i] = Cell::dot(sum[r][i], x[i], w);
        }
      }
    }
    SF_UNROLL for (int r = 0; r < R; ++r)
      SF_UNROLL for (int i = 0; i < N; ++i) Cell::put(s.tile.out + (row + r) * dim + d + LANES * i, sum[r][i]);
  }
};

// Adds a tile's state of one row to the state of the tiles before it.
static void merge_row(int64_t dim, float& peak, float& sum, float* out, float tile_peak, float tile_sum, const float* tile_out) {
  if (tile_peak == NEVER) return;
  const float top = std::max(peak, tile_peak), keep = power_of_two(peak - top), add = power_of_two(tile_peak - top);
  sum = sum * keep + tile_sum * add;
  for (int64_t d = 0; d < dim; d += LANES) store(out + d, fma(load(tile_out + d), set1(add), load(out + d) * set1(keep)));
  peak = top;
}

static void clear(State& state, int64_t rows, int64_t dim) {
  for (int64_t r = 0; r < rows; ++r) state.peak[r] = NEVER, state.sum[r] = 0;
  std::memset(state.out, 0, rows * dim * 4);
}

static int64_t num_tiles(const Item& item) { return item.end > item.begin ? (item.end - 1) / TILE - item.begin / TILE + 1 : 0; }

AttentionPlan::AttentionPlan(const AttentionArgs& a) {
  const int64_t group = a.num_heads / a.cache.num_kv_heads, tokens = std::max<int64_t>(1, MAX_ROWS / group);
  std::vector<Item> whole;
  int64_t tiles = 0;
  for (int64_t seq = 0; seq < a.num_seqs; ++seq) {
    const int64_t begin = a.cu_seqlens[seq], end = a.cu_seqlens[seq + 1];
    is_whole = is_whole && end - begin <= tokens;
    for (int64_t t = begin; t < end; t += tokens) {
      const int64_t count = std::min(tokens, end - t), position = a.seq_lens[seq] - end + t;
      const int64_t oldest = a.window > 0 ? std::max(a.first_key, position - a.window + 1) : a.first_key;
      for (int64_t h = 0; h < a.cache.num_kv_heads; ++h) {
        whole.push_back({seq, t, count, position, h, oldest, position + count, -1});
        tiles += num_tiles(whole.back());
      }
    }
  }
  // An item with more than its share of the tiles would keep one thread busy when the others have finished.
  const int64_t share = std::max<int64_t>(1, tiles / (8 * a.num_threads));
  for (auto item = whole.rbegin(); item != whole.rend(); ++item) {  // the longest contexts first
    if (a.num_threads == 1 || num_tiles(*item) <= 2 * share) {
      items.push_back(*item);
      continue;
    }
    is_whole = false;
    first_part.push_back(partial_rows), num_parts.push_back(num_tiles(*item)), outputs.push_back(*item);
    for (int64_t tile = item->begin / TILE * TILE; tile < item->end; tile += share * TILE) {
      Item part = *item;
      part.begin = std::max(item->begin, tile), part.end = std::min(item->end, tile + share * TILE);
      part.partial = partial_rows;
      partial_rows += num_tiles(part) * item->count * group;
      items.push_back(part);
    }
  }
}

// A partial row: sums, then peak and sum.
static int64_t partial_stride(const AttentionArgs& args) { return args.cache.head_dim + LANES; }

int64_t attention_scratch(const AttentionArgs& args, const AttentionPlan& plan) { return plan.partial_rows * partial_stride(args) * 4; }

template <class Cell>
static void attend(Team& team, const AttentionArgs& args, const AttentionPlan& plan, float* partials, const Rotation* rotation) {
  const int64_t dim = args.cache.head_dim, stride = partial_stride(args);
  Scratch& scratch = *(Scratch*)workspace(2, sizeof(Scratch));
  State &tile = scratch.tile, &total = scratch.total;
  Rows<Cell> rows(args, scratch);
  const auto merge = [&](int64_t r, float peak, float sum, const float* out) {
    merge_row(dim, total.peak[r], total.sum[r], total.out + r * dim, peak, sum, out);
  };
  const auto write = [&] {
    for (int64_t r = 0; r < rows.rows; ++r) rows.write(r, total.sum[r], total.out + r * dim);
  };
  team.share((int64_t)plan.items.size(), [&](int64_t i) {
    const Item& item = plan.items[i];
    for (int64_t t = 0; rotation && t < item.count; ++t) rope_and_write_head(*rotation, item.first + t, item.kv_head);
    rows.start(item);
    if (item.partial < 0) clear(total, rows.rows, dim);
    float* row = partials + item.partial * stride;
    for (int64_t base = item.begin / TILE * TILE; base < item.end; base += TILE) {
      rows.tile(base);
      for (int64_t r = 0; r < rows.rows; ++r) {
        if (item.partial < 0) {
          merge(r, tile.peak[r], tile.sum[r], tile.out + r * dim);
          continue;
        }
        std::memcpy(row, tile.out + r * dim, dim * 4);
        row[dim] = tile.peak[r], row[dim + 1] = tile.sum[r];
        row += stride;
      }
    }
    if (item.partial < 0) write();
  });
  if (plan.outputs.empty()) return;
  team.share((int64_t)plan.outputs.size(), [&](int64_t i) {
    rows.start(plan.outputs[i]);
    clear(total, rows.rows, dim);
    const float* row = partials + plan.first_part[i] * stride;
    for (int64_t part = 0; part < plan.num_parts[i]; ++part)
      for (int64_t r = 0; r < rows.rows; ++r, row += stride) merge(r, row[dim], row[dim + 1], row);
    write();
  });
}

void attention(Team& team, const AttentionArgs& args, const AttentionPlan& plan, uint8_t* scratch, const Rotation* rotation) {
  if (rotation && !plan.is_whole) rope_and_write(team, *rotation), rotation = nullptr;
  args.cache.is_int8 ? attend<Int8>(team, args, plan, (float*)scratch, rotation) : attend<Bf16>(team, args, plan, (float*)scratch, rotation);
}

void attention(const AttentionArgs& args) {
  const auto plan = std::make_shared<const AttentionPlan>(args);  // owned by the job, see pool.h
  uint8_t* scratch = workspace(0, attention_scratch(args, *plan));
  parallel(args.num_threads, [=](Team& team) { attention(team, args, *plan, scratch); });
}

}  // namespace SF_ISA
