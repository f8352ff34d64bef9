// One OpenMP region per op, with the runtime that torch loaded: its pool is shared, nothing oversubscribes.
#pragma once
#include <omp.h>

#include <atomic>
#include <cstdint>

namespace SF_ISA {

// Shared by the threads of one region: hands out work and separates phases.
class Team {
 public:
  Team(int thread, int num_threads, std::atomic<int64_t>* counters)
      : thread(thread), num_threads(num_threads), counters_(counters) {}

  // Calls item(i) for i in [0, count), whichever thread is free next; a barrier follows.
  // Work is taken dynamically because the other core is often busy with something else.
  template <class Item>
  void share(int64_t count, Item item) {
    std::atomic<int64_t>& next = counters_[phase_++];
    if (num_threads == 1) {
      for (int64_t i = 0; i < count; ++i) item(i);
      return;
    }
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) item(i);
    barrier();
  }

  void barrier() {
    if (num_threads > 1) {
#pragma omp barrier
    }
  }

  const int thread, num_threads;

 private:
  std::atomic<int64_t>* counters_;
  int phase_ = 0;
};

constexpr int MAX_PHASES = 16;

// Runs body(Team&) on num_threads threads. At most MAX_PHASES calls of share per region.
template <class Body>
void parallel(int num_threads, Body body) {
  struct alignas(64) Counter : std::atomic<int64_t> {};
  std::atomic<int64_t> counters[MAX_PHASES] = {};
  if (num_threads <= 1) {
    Team team(0, 1, counters);
    body(team);
    return;
  }
#pragma omp parallel num_threads(num_threads)
  {
    Team team(omp_get_thread_num(), omp_get_num_threads(), counters);
    body(team);
  }
}

}  // namespace SF_ISA
