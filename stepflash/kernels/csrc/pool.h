// Worker threads that help when they are there, and are never waited for when they are not.
//
// A job is a sequence of phases; a phase is a number of items that whoever is free takes next. A phase is over
// when its items are done, not when all threads have arrived, and a job when its last phase is over. So a worker
// that the system has put aside costs nothing unless it holds an item, where a barrier would stop everybody
// until it runs again: on a machine with other work that is the difference between slow and stuck.
//
// The items of all phases are numbered through: phase p has the numbers from base to base + count, where base is
// the sum of the counts before it. One counter hands out numbers and one counts what is done, so a job may have
// any number of phases. Every thread must therefore find the same counts: they depend on the job's arguments and
// never on what its items compute.
//
// A worker may still be inside a finished job: a job owns what its body refers to (closures capture by value),
// and closing it lets no further item start. Memory behind captured pointers is only touched by items.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

namespace stepflash {

constexpr int64_t CLOSED = int64_t(1) << 60;

class Job {
 public:
  explicit Job(int num_threads) : num_threads(num_threads) {}
  virtual ~Job() = default;
  virtual void run(int thread) = 0;

  void close() {
    next.store(CLOSED, std::memory_order_release);
    done.store(CLOSED, std::memory_order_release);
  }

  const int num_threads;
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> done{0};
};

// Runs the job on this thread and on workers. Two threads that call at once: the second works alone.
void run_job(const std::shared_ptr<Job>& job);

// A short pause in a waiting loop; gives the processor away after a while, perhaps to the one that is awaited.
void wait_a_little(int round);

}  // namespace stepflash
