// Reads memory as fast as this machine can: the ceiling that benchmarks compare with.
#include <numeric>
#include <vector>

#include "parallel.h"
#include "vec.h"

namespace SF_ISA {

// The sum of all int32 words, so that no read can be skipped; in long contiguous parts, a few per thread.
int64_t stream_read(const uint8_t* data, int64_t num_bytes, int num_threads) {
  const int64_t parts = num_threads * 8, part = num_bytes / parts / 256 * 256;
  std::vector<int32_t> sums(parts);
  int32_t* out = sums.data();
  parallel(num_threads, [=](Team& team) {
    team.share(parts, [&](int64_t index) {
      const uint8_t* p = data + index * part;
      vi sum[4] = {set1i(0), set1i(0), set1i(0), set1i(0)};
      for (int64_t i = 0; i < part; i += 256)
        for (int j = 0; j < 4; ++j) sum[j] = sum[j] + loadi(p + i + 64 * j);
      out[index] = hsumi((sum[0] + sum[1]) + (sum[2] + sum[3]));
    });
  });
  return std::accumulate(sums.begin(), sums.end(), int64_t(0));
}

}  // namespace SF_ISA
