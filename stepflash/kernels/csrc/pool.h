// Worker threads that help when they are there, and are never waited for when they are not.
//
// An op is a job of phases; a phase is a number of items that whoever is free takes next. A phase is over when
// its items are done, not when all threads have arrived, and a job when its last phase is over. So a worker
// that the system has put aside costs nothing unless it holds an item, where a barrier would stop everybody
// until it runs again: on a machine with other work that is the difference between slow and stuck.
//
// A worker may therefore still be inside a finished job: a job owns what its body refers to (closures capture
// by value), and closing it lets no further item start. Memory behind captured pointers is only touched by items.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

namespace stepflash {

constexpr int MAX_PHASES = 16;
constexpr int64_t CLOSED = int64_t(1) << 60;

struct Phase {
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> done{0};
};

class Job {
 public:
  explicit Job(int num_threads) : num_threads(num_threads) {}
  virtual ~Job() = default;
  virtual void run(int thread) = 0;

  void close() {
    for (Phase& phase : phases) phase.next.store(CLOSED, std::memory_order_relaxed);
    closed.store(true, std::memory_order_release);
  }

  const int num_threads;
  std::atomic<bool> closed{false};
  Phase phases[MAX_PHASES];
};

// Runs the job on this thread and on workers. Two threads that call at once: the second works alone.
void run_job(const std::shared_ptr<Job>& job);

// A short pause in a waiting loop; gives the processor away after a while, perhaps to the one that is awaited.
void wait_a_little(int round);

}  // namespace stepflash
