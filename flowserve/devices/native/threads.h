// A pool of threads that run one function together and meet at barriers, spinning first: a step has
// some two hundred barriers, each far shorter than a sleep. Idle threads sleep.
#pragma once
#include <immintrin.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

class Threads {
 public:
  explicit Threads(int count) : count_(count) {
    for (int id = 1; id < count_; id++) workers_.emplace_back([this, id] { work(id); });
  }
  ~Threads() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }
  int count() const { return count_; }

  // Calls f(id) for id in [0, count) on count threads, the caller being 0; returns when all returned.
  void run(const std::function<void(int)>& f) {
    if (count_ == 1) return f(0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &f;
      running_.store(count_ - 1);
      epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    f(0);
    spin([this] { return running_.load(std::memory_order_acquire) == 0; });
  }

  void barrier() {
    if (count_ == 1) return;
    const int phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
    } else {
      spin([this, phase] { return phase_.load(std::memory_order_acquire) != phase; });
    }
  }

 private:
  enum { SPINS = 4000 };  // tens of microseconds; then the core is offered to others

  template <class Ready>
  static void spin(Ready&& ready) {
    for (int i = 0; !ready(); i++) {
      if (i < SPINS)
        _mm_pause();
      else
        std::this_thread::yield();
    }
  }

  void work(int id) {
    uint64_t seen = 0;
    for (;;) {
      const std::function<void(int)>* job;
      for (int i = 0; i < SPINS && epoch_.load(std::memory_order_acquire) == seen; i++) _mm_pause();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this, seen] { return stop_ || epoch_.load() != seen; });
        if (stop_) return;
        seen = epoch_.load();
        job = job_;
      }
      (*job)(id);
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  const int count_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;
  const std::function<void(int)>* job_ = nullptr;
  std::atomic<uint64_t> epoch_{0};
  std::atomic<int> running_{0}, arrived_{0}, phase_{0};
};
