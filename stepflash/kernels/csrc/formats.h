// How weights and activations lie in memory: the contract between formats.py, the tiles and the drivers.
//
// A packed weight [N, K] is a row of panels; a panel holds PANEL = 32 output rows over all of K (padded to
// k_block) as one contiguous stream, so that a GEMV reads memory in order. Inside, a 64-byte vector holds
// sixteen rows and the few consecutive k that one dot instruction takes:
//   bf16   per 2 k: rows 0-15 (2 k each), rows 16-31
//   fp8    header: f32 scale per 128 k, padded to 64 bytes; per 2 k: 64 bytes (see fp8_tile)
//   int8   per 2 groups: f16 scales [2][32]; per 4 k: rows 0-15 (4 k each), rows 16-31, stored + 128
//   int4   per 2 groups: f16 scales [2][32]; per 4 k: low nibbles rows 0-15, high nibbles rows 16-31, + 8
//   q4_k   per 256 k: f16 d [32], f16 dmin [32], 6-bit scales and mins (see q4_k_tile), nibbles as int4
//   q6_k   per 256 k: f16 d [32], s8 scale [16][32]; per 8 k: low 4 bits as int4 (128 bytes), high 2 bits (64)
//
// An activation record is one token's input, prepared once for all rows: bf16 values, or int8 values with a
// float scale per group and, per sum group, the correction for the offset of the unsigned weights.
#pragma once
#include <cstdint>
#include <cstring>

namespace stepflash {

constexpr int PANEL = 32;
constexpr int MAX_TILE = 6;  // tokens that one tile call computes at most

// The numbers are stored in checkpoints and known to formats.py: never renumber.
enum Format : int64_t {
  BF16 = 0, FP8 = 1, INT8_G32 = 2, INT8_G64 = 3, INT8_G128 = 4, INT4_G32 = 5, INT4_G64 = 6, INT4_G128 = 7,
  Q4_K = 8, Q6_K = 9, NUM_FORMATS = 10
};

struct FormatInfo {
  int k_block;     // K is padded to a multiple of this
  int group;       // int8 activations: k per scale; 0 = bf16 activations
  int sum_group;   // k per correction
  int offset;      // the correction is -offset * sum(q); 0: scale * sum(q) as float (q4_k)
};

constexpr FormatInfo FORMATS[NUM_FORMATS] = {
    {32, 0, 0, 0},         {128, 0, 0, 0},       {64, 32, 32, 128},    {128, 64, 64, 128}, {256, 128, 128, 128},
    {64, 32, 32, 8},       {128, 64, 64, 8},     {256, 128, 128, 8},   {256, 32, 32, 0},   {256, 32, 16, 32},
};

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
inline int64_t padded_k(int64_t format, int64_t k) { return round_up(k, FORMATS[format].k_block); }
// How much of a padded row the tiles read: the padding of fp8's blocks of 128 is left out.
inline int64_t read_k(int64_t format, int64_t k) { return format == FP8 ? round_up(k, 16) : padded_k(format, k); }
inline int64_t num_panels(int64_t n) { return (n + PANEL - 1) / PANEL; }

inline int64_t panel_bytes(int64_t format, int64_t k) {
  const int64_t kp = padded_k(format, k);
  switch (format) {
    case BF16: return kp * PANEL * 2;
    case FP8: return round_up(kp / 128 * 4, 64) + kp * PANEL;
    case INT8_G32: case INT8_G64: case INT8_G128: return kp * PANEL + kp / FORMATS[format].group * PANEL * 2;
    case INT4_G32: case INT4_G64: case INT4_G128: return kp * PANEL / 2 + kp / FORMATS[format].group * PANEL * 2;
    case Q4_K: return kp / 256 * 4608;
    case Q6_K: return kp / 256 * 6720;
  }
  return 0;
}

// Offsets inside one token's record.
struct Record {
  int64_t scales, sums, bytes;
  Record() : scales(0), sums(0), bytes(0) {}
  Record(int64_t format, int64_t k) {
    const FormatInfo& info = FORMATS[format];
    const int64_t kp = padded_k(format, k);
    if (info.group == 0) {
      scales = sums = bytes = kp * 2;
    } else {
      scales = kp;
      sums = scales + kp / info.group * 4;
      bytes = sums + kp / info.sum_group * 4;
    }
    bytes = round_up(bytes, 64);
  }
};

// Formats with the same key share activation records.
inline int record_key(int64_t format) {
  const FormatInfo& info = FORMATS[format];
  return info.group == 0 ? -info.k_block : info.k_block * 4096 + info.group * 256 + info.offset;
}

// A packed weight as the drivers see it.
struct Packed {
  const uint8_t* data;
  int64_t format, n, k, panel_stride;
  Packed() : data(nullptr), format(0), n(0), k(0), panel_stride(0) {}
  Packed(const void* data, int64_t format, int64_t n, int64_t k)
      : data((const uint8_t*)data), format(format), n(n), k(k), panel_stride(panel_bytes(format, k)) {}
  const uint8_t* panel(int64_t i) const { return data + i * panel_stride; }
  int64_t panels() const { return num_panels(n); }
  int64_t bytes() const { return panels() * panel_stride; }
};

// out[t][row] = sum over k < read_k of panel[row][k] * token[t][k], for 1 <= num_tokens <= MAX_TILE; bitwise the
// same for a token whatever its companions are. ahead: how far ahead to ask memory for weights, see tiles.h.
using Tile = void (*)(const uint8_t* panel, int64_t ahead, int64_t read_k, const Record& record, const uint8_t* const* tokens,
                      int num_tokens, float* out);

}  // namespace stepflash
