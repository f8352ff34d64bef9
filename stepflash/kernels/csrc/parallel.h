// One job per op or per step of the network: bodies of phases, run by the pool's threads.
#pragma once
#include <utility>

#include "pool.h"

namespace SF_ISA {

using stepflash::Job;

// One thread's way through the phases of a job; every thread calls share equally often, with the same counts.
class Team {
 public:
  Team(int thread, Job* job) : thread(thread), num_threads(job ? job->num_threads : 1), job_(job) {}

  // Calls item(i) for every i in [0, count), on whichever thread is free next; returns when all are done.
  // is_small: the items cost alike and so little that to share them evenly at once beats to balance them.
  template <class Item>
  void share(int64_t count, Item item, bool is_small = false) {
    if (job_ == nullptr) {
      for (int64_t i = 0; i < count; ++i) item(i);
      return;
    }
    const int64_t base = base_, end = base + count;
    base_ = end;
    int64_t number = job_->next.load(std::memory_order_acquire), num_done = 0;
    while (number < end) {
      // Half of a fair share at once: the counters are shared, and an item may be as short as a look at them.
      const int64_t left = end - number, half = left / (2 * num_threads);
      const int64_t taken = is_small ? (left + num_threads - 1) / num_threads : half > 1 ? half : 1;
      if (!job_->next.compare_exchange_weak(number, number + taken, std::memory_order_acq_rel)) continue;
      for (int64_t i = number; i < number + taken; ++i) item(i - base);
      num_done += taken;
      number = job_->next.load(std::memory_order_acquire);
    }
    if (num_done > 0) job_->done.fetch_add(num_done, std::memory_order_acq_rel);
    for (int round = 0; job_->done.load(std::memory_order_acquire) < end; ++round) stepflash::wait_a_little(round);
  }

  const int thread, num_threads;

 private:
  Job* job_;
  int64_t base_ = 0;
};

// Runs body(Team&) on num_threads threads. The body captures by value, see pool.h.
template <class Body>
void parallel(int num_threads, Body body) {
  if (num_threads <= 1) {
    Team team(0, nullptr);
    body(team);
    return;
  }
  struct BodyJob : Job {
    BodyJob(int num_threads, Body body) : Job(num_threads), body(std::move(body)) {}
    void run(int thread) override {
      Team team(thread, this);
      body(team);
    }
    const Body body;
  };
  stepflash::run_job(std::make_shared<BodyJob>(num_threads, std::move(body)));
}

}  // namespace SF_ISA
