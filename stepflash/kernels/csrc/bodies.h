// The kernels as parts of a larger job: every thread of a team calls them with the same arguments.
//
// `scratch` is memory of the whole team, at least as large as the function of that name says; it may be used
// again as soon as the call returns. Only items touch what the arguments point to, see pool.h.
#pragma once
#include <vector>

#include "parallel.h"
#include "rows.h"

namespace SF_ISA {

int64_t linear_scratch(const LinearArgs& args);
void linear(Team& team, const LinearArgs& args, uint8_t* scratch);

int64_t moe_scratch(const MoeArgs& args);
void moe(Team& team, const MoeArgs& args, uint8_t* scratch);

// Norm and rotation of q and k, k and v into the cache, in one phase. q and k may be rotated in place.
struct Rotation {
  RopeArgs rope;
  CacheWriteArgs write;
};
void rope_and_write(Team& team, const Rotation& rotation);
// The same for the heads of one KV head of one token.
void rope_and_write_head(const Rotation& rotation, int64_t token, int64_t kv_head);

// The work of an attention call; it depends on the lengths of the sequences and not on the layer's weights.
struct AttentionItem {
  int64_t seq, first, count;       // query tokens [first, first + count) of the packed batch
  int64_t position;                // absolute position of the first
  int64_t kv_head, begin, end;     // keys [begin, end)
  int64_t partial;                 // index of the state of row 0, -1: write the output at once
};

// Long contexts with few items are cut into their splits, to be merged afterwards.
struct AttentionPlan {
  std::vector<AttentionItem> items, outputs;  // outputs: one per tile of rows when its splits are separate items
  std::vector<int64_t> first_part, num_parts;
  int64_t partial_rows = 0;
  bool is_whole = true;  // an item has all new tokens of its sequence, so that it needs nothing of the others

  explicit AttentionPlan(const AttentionArgs& args);
};

int64_t attention_scratch(const AttentionArgs& args, const AttentionPlan& plan);
// Queries, keys and values are as they come from their projections where there is a rotation; it is done within the same
// phase when items are whole, in one before when not.
void attention(Team& team, const AttentionArgs& args, const AttentionPlan& plan, uint8_t* scratch, const Rotation* rotation = nullptr);

// Up to so many values (tokens times features) every thread prepares all inputs itself: that is cheaper than
// to wait until the others have prepared their share.
constexpr int64_t REPEAT_BELOW = 4096;

// Bytes of weights up to which a phase of one token is over too soon to be balanced, see Team::share.
constexpr int64_t SMALL_PHASE = 512 << 10;

}  // namespace SF_ISA
