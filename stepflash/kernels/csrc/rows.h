// One row at a time: load, normalise, gate, and turn it into the record that the tiles read.
#pragma once
#include <vector>

#include "api.h"
#include "vec.h"

namespace SF_ISA {

using namespace stepflash;

SF_INLINE void load_row(const View& view, int64_t row, int64_t n, float* out) {
  int64_t i = 0;
  if (view.is_float) {
    std::memcpy(out, (const float*)view.data + row * view.stride, n * 4);
    return;
  }
  const uint16_t* p = (const uint16_t*)view.data + row * view.stride;
  for (; i + LANES <= n; i += LANES) store(out + i, load_bf16(p + i));
  for (; i < n; ++i) out[i] = bf16_to_float(p[i]);
}

// Stores n floats at (row, column), adding the residual's entries there if it is present.
SF_INLINE void store_row(const View& out, const View& residual, int64_t row, int64_t column, int64_t n, const float* x) {
  float sum[256];
  if (residual.data != nullptr) {
    View shifted = residual;
    shifted.data = (char*)residual.data + column * (residual.is_float ? 4 : 2);
    load_row(shifted, row, n, sum);
    for (int64_t i = 0; i < n; ++i) sum[i] += x[i];
    x = sum;
  }
  if (out.is_float) {
    std::memcpy((float*)out.data + row * out.stride + column, x, n * 4);
    return;
  }
  uint16_t* p = (uint16_t*)out.data + row * out.stride + column;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store_bf16(p + i, load(x + i));
  for (; i < n; ++i) p[i] = float_to_bf16(x[i]);
}

// y = x / rms(x) * (1 + weight) in float32.
SF_INLINE void norm_row(float* x, int64_t n, const View& weight, float eps) {
  vf squares[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int j = 0; j < 4; ++j) {
      const vf a = load(x + i + j * LANES);
      squares[j] = fma(a, a, squares[j]);
    }
  float sum = hsum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < n; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / (float)n + eps);
  i = 0;
  for (; i + LANES <= n; i += LANES) {
    const vf w = weight.is_float ? load((const float*)weight.data + i) : load_bf16((const uint16_t*)weight.data + i);
    store(x + i, load(x + i) * set1(scale) * (set1(1.0f) + w));
  }
  for (; i < n; ++i) {
    const float w = weight.is_float ? ((const float*)weight.data)[i] : bf16_to_float(((const uint16_t*)weight.data)[i]);
    x[i] = x[i] * scale * (1.0f + w);
  }
}

SF_INLINE void round_row(float* x, int64_t n) {  // to the values that bf16 can hold
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(x + i, as_float(shl<16>(round_bf16(load(x + i)))));
  for (; i < n; ++i) x[i] = bf16_to_float(float_to_bf16(x[i]));
}

// Writes values [begin, begin + n) of a record; begin and n are multiples of the format's groups (32 at least).
SF_INLINE void write_record(int64_t format, const Record& layout, const float* x, int64_t begin, int64_t n, uint8_t* record) {
  const FormatInfo& info = FORMATS[format];
  if (info.group == 0) {
    uint16_t* out = (uint16_t*)record + begin;
    for (int64_t i = 0; i < n; i += LANES) store_bf16(out + i, load(x + i));
    return;
  }
  int8_t* q = (int8_t*)record + begin;
  float* scales = (float*)(record + layout.scales) + begin / info.group;
  int32_t* sums = (int32_t*)(record + layout.sums) + begin / info.sum_group;
  const vi sign = set1i(0x7fffffff);
  for (int64_t g = 0; g < n; g += info.group) {
    vf peak = zero();
    for (int i = 0; i < info.group; i += LANES) peak = max(peak, as_float(as_int(load(x + g + i)) & sign));
    const float largest = hmax(peak), scale = largest / 127.0f;
    const vf inverse = set1(largest > 0 ? 127.0f / largest : 0.0f);
    scales[g / info.group] = scale;
    for (int s = 0; s < info.group; s += info.sum_group) {
      vi sum = set1i(0);
      for (int i = s; i < s + info.sum_group; i += LANES) {
        const vi rounded = to_int(load(x + g + i) * inverse);
        sum = sum + rounded;
        store_s8(q + g + i, rounded);
      }
      int32_t& entry = sums[(g + s) / info.sum_group];
      if (info.offset) {
        entry = -info.offset * hsumi(sum);
      } else {
        const float scaled = scale * (float)hsumi(sum);
        std::memcpy(&entry, &scaled, 4);
      }
    }
  }
}

// A buffer of the calling thread that lives on between ops; no malloc per op. slot: several at a time.
inline uint8_t* workspace(int slot, int64_t bytes) {
  struct Buffer {
    uint8_t* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffers[5];
  Buffer& buffer = buffers[slot];
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = round_up(bytes + bytes / 4, 4096);
    buffer.data = (uint8_t*)std::aligned_alloc(4096, buffer.size);
  }
  return buffer.data;
}

// Lays buffers out one after another in a workspace.
struct Layout {
  int64_t bytes = 0;
  int64_t add(int64_t size) {
    const int64_t offset = bytes;
    bytes += round_up(size, 64);
    return offset;
  }
};

// How many tokens the next tile takes when `left` remain: even shares, so 8 is 4 + 4 and not 6 + 2.
inline int tile_tokens(int64_t left) {
  const int64_t tiles = (left + MAX_TILE - 1) / MAX_TILE;
  return (int)((left + tiles - 1) / tiles);
}

}  // namespace SF_ISA
