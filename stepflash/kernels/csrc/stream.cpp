// Reads memory as fast as this machine can: the ceiling that benchmarks compare with.
#include "parallel.h"
#include "vec.h"

namespace SF_ISA {

// The sum of all int32 words, so that no read can be skipped. Each thread streams its own contiguous part.
int64_t stream_read(const uint8_t* data, int64_t num_bytes, int num_threads) {
  std::atomic<int64_t> total{0};
  const int64_t part = num_bytes / num_threads / 256 * 256;
  parallel(num_threads, [&](Team& team) {
    const uint8_t* p = data + team.thread * part;
    vi sum[4] = {set1i(0), set1i(0), set1i(0), set1i(0)};
    for (int64_t i = 0; i < part; i += 256)
      for (int j = 0; j < 4; ++j) sum[j] = sum[j] + loadi(p + i + 64 * j);
    total += hsumi((sum[0] + sum[1]) + (sum[2] + sum[3]));
  });
  return total;
}

}  // namespace SF_ISA
