// The pool of pool.h: threads that look for a new job for a moment after each, then sleep.
#include "pool.h"

#include <immintrin.h>
#include <sched.h>

#include <condition_variable>
#include <mutex>
#include <thread>

namespace stepflash {
namespace {

// About 0.2 ms: longer than the gap between two ops of a model, too short to disturb other programs.
constexpr int SPIN_ROUNDS = 1 << 14;

class Pool {
 public:
  void run(const std::shared_ptr<Job>& job) {
    if (!callers_.try_lock()) return work_through(job);
    std::lock_guard<std::mutex> caller(callers_, std::adopt_lock);
    start_workers(job->num_threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      current_ = job;
      epoch_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load() > 0) wake_.notify_all();
    work_through(job);
    std::lock_guard<std::mutex> lock(mutex_);
    current_.reset();
  }

 private:
  std::mutex callers_, mutex_;  // mutex_ guards current_ and the sleep
  std::condition_variable wake_;
  std::shared_ptr<Job> current_;
  std::atomic<uint64_t> epoch_{0};
  std::atomic<int> sleeping_{0};
  int num_workers_ = 0;

  static void work_through(const std::shared_ptr<Job>& job) {
    job->run(0);
    job->close();
  }

  void start_workers(int count) {
    for (; num_workers_ < count; ++num_workers_) std::thread(&Pool::work, this, num_workers_ + 1).detach();
  }

  void work(int thread) {
    for (uint64_t seen = 0;;) {
      for (int round = 0; round < SPIN_ROUNDS && epoch_.load(std::memory_order_acquire) == seen; ++round) _mm_pause();
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return epoch_.load() != seen; });
        sleeping_.fetch_sub(1);
        seen = epoch_.load();
        job = current_;
      }
      if (job != nullptr && thread < job->num_threads) job->run(thread);
    }
  }
};

}  // namespace

void run_job(const std::shared_ptr<Job>& job) {
  static Pool* pool = new Pool;  // never destroyed: its threads live as long as the process
  pool->run(job);
}

void wait_a_little(int round) {
  if (round < 4096) {
    _mm_pause();
  } else {
    sched_yield();
  }
}

}  // namespace stepflash
