// A pool of threads for short jobs: a layer takes a fraction of a millisecond, so that waking the
// workers must cost microseconds.  An idle worker therefore looks out for work for a moment before
// it sleeps.  OpenMP is avoided: the framework brings its own runtime, and two of them in one
// process fight for the cores.
#ifndef LK_POOL_H
#define LK_POOL_H

#include <pthread.h>
#include <stdint.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace lk {

inline void cpu_pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

class Pool {
 public:
  typedef void (*Body)(void* context, int64_t unit);

  // body(context, unit) for every unit below `units`, on the calling thread and up to threads - 1
  // workers.  Which thread takes which unit is left to chance: units must not depend on it.  While
  // another thread's job is running, the caller does everything itself.
  static void run(int threads, int64_t units, Body body, void* context) {
    Job job = {body, context, units};
    if (threads > units) threads = static_cast<int>(units);
    if (threads > kMaxThreads) threads = kMaxThreads;
    Pool* pool = threads > 1 ? instance() : nullptr;
    if (!pool || !pool->busy_.try_lock()) {
      job.work();
      return;
    }
    const int helpers = pool->start(threads - 1);
    for (int i = 0; i < helpers; ++i) pool->workers_[i]->give(&job);
    job.work();
    for (int i = 0; i < helpers; ++i) {
      // A worker that has not woken up by now is not waited for.
      if (!pool->workers_[i]->take_back(&job)) job.joined.fetch_add(1, std::memory_order_relaxed);
    }
    job.wait();
    pool->busy_.unlock();
  }

 private:
  static const int kMaxThreads = 64;

  struct Job {
    Body body;
    void* context;
    int64_t units;
    std::atomic<int64_t> next{0};
    std::atomic<int> done{0};    // workers that have finished with this job
    std::atomic<int> joined{0};  // workers that have taken it; final once the caller waits

    Job(Body b, void* c, int64_t n) : body(b), context(c), units(n) {}

    void work() {
      for (;;) {
        const int64_t unit = next.fetch_add(1, std::memory_order_relaxed);
        if (unit >= units) return;
        body(context, unit);
      }
    }

    void wait() {
      const int expected = joined.load(std::memory_order_relaxed);
      for (int turn = 0; done.load(std::memory_order_acquire) != expected; ++turn) {
        if (turn < 2000) {
          cpu_pause();
        } else {
          std::this_thread::yield();
        }
      }
    }
  };

  class Worker {
   public:
    void give(Job* job) {
      job_.store(job);
      if (asleep_.load()) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_one();
      }
    }

    bool take_back(Job* job) { return job_.compare_exchange_strong(job, nullptr); }

    void loop() {
      for (;;) {
        Job* job = look_out();
        if (!job) job = sleep();
        if (!job) continue;
        job->work();
        job->done.fetch_add(1, std::memory_order_release);
      }
    }

   private:
    Job* look_out() {
      const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
      do {
        for (int i = 0; i < 32; ++i) {
          if (job_.load(std::memory_order_relaxed)) return job_.exchange(nullptr);
          cpu_pause();
        }
      } while (std::chrono::steady_clock::now() < end);
      return nullptr;
    }

    Job* sleep() {
      std::unique_lock<std::mutex> lock(mutex_);
      asleep_.store(true);
      wake_.wait(lock, [this] { return job_.load() != nullptr; });
      asleep_.store(false);
      return job_.exchange(nullptr);
    }

    std::atomic<Job*> job_{nullptr};
    std::atomic<bool> asleep_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
  };

  // The pool lives as long as the process: its threads may still be asleep in it at exit.  A forked
  // child has none of its parent's threads, and the locks in whatever state they were; it starts
  // afresh and keeps the old pool only so that leak checkers see it.
  static Pool* instance() {
    static const int registered = pthread_atfork(nullptr, nullptr, forget);
    (void)registered;
    Pool* pool = current().load(std::memory_order_acquire);
    if (pool) return pool;
    Pool* fresh = new (std::nothrow) Pool;
    if (!fresh) return nullptr;
    if (current().compare_exchange_strong(pool, fresh)) return fresh;
    delete fresh;
    return pool;
  }

  static std::atomic<Pool*>& current() {
    static std::atomic<Pool*> pool{nullptr};
    return pool;
  }

  static void forget() {
    static Pool* abandoned = nullptr;
    Pool* pool = current().exchange(nullptr);
    if (pool) {
      pool->before_ = abandoned;
      abandoned = pool;
    }
  }

  // Workers available, at most `wanted`; fewer where the system refuses more threads.
  int start(int wanted) {
    while (count_ < wanted) {
      Worker* worker = new (std::nothrow) Worker;
      if (!worker) break;
      try {
        std::thread(&Worker::loop, worker).detach();
      } catch (const std::system_error&) {
        delete worker;
        break;
      }
      workers_[count_++] = worker;
    }
    return count_ < wanted ? count_ : wanted;
  }

  std::mutex busy_;
  Worker* workers_[kMaxThreads] = {};
  int count_ = 0;
  Pool* before_ = nullptr;
};

}  // namespace lk

#endif
