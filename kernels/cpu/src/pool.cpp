#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace cantata {
namespace {

// A worker looks for the next job so long before it sleeps: longer than the gap between two operations of a step, and nothing when idle.
constexpr std::chrono::microseconds kSpinTime(100);
// Looks between two of the clock, and before a waiting thread gives its core to another: one may have been taken from a worker.
constexpr int kSpins = 64;

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The cores that this process may use, if there is one for each thread; empty if there are more, for then others may have been told to use
// the same ones, and the system spreads them better.
std::vector<int> cores_of_all(int num_threads) {
  std::vector<int> cores;
#if defined(__linux__)
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof mask, &mask) != 0) return cores;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &mask)) cores.push_back(core);
  }
  if ((int)cores.size() != num_threads) cores.clear();
#endif
  return cores;
}

void pin(std::thread& thread, int core) {
#if defined(__linux__)
  cpu_set_t mask;
  CPU_ZERO(&mask);
  CPU_SET(core, &mask);
  pthread_setaffinity_np(thread.native_handle(), sizeof mask, &mask);
#endif
}

struct Job {
  Task task;
  void* context;
  long count;
  long least;
  long shares;
};

class Pool {
 public:
  explicit Pool(int num_threads) {
    const std::vector<int> cores = cores_of_all(num_threads);
    for (int i = 1; i < num_threads; ++i) {
      workers_.emplace_back([this] { work(); });
      if (!cores.empty()) pin(workers_.back(), cores[i]);
    }
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(sleep_);
      stopping_ = true;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  void run(const Job& job) {
    job_ = job;
    next_.store(0, std::memory_order_relaxed);
    helpers_.store(0, std::memory_order_release);
    {
      std::lock_guard<std::mutex> lock(sleep_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (num_asleep_.load() > 0) wake_.notify_all();
    take_pieces();
    // Who has not come yet is not waited for: waking up can take longer than the job.
    helpers_.fetch_or(kClosed, std::memory_order_relaxed);
    for (int spin = 0; helpers_.load(std::memory_order_acquire) != kClosed; ++spin) {
      if (spin < 16 * kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  void take_pieces() {
    Pieces pieces(next_, job_.count, job_.least, job_.shares);
    job_.task(job_.context, pieces);
  }

  void work() {
    unsigned long seen = 0;
    for (;;) {
      seen = wait_for_job(seen);
      if (stopping_) return;
      if (!join()) continue;
      take_pieces();
      helpers_.fetch_sub(1, std::memory_order_release);
    }
  }

  // Whether there is a job to help with, perhaps a later one than the one that was seen. It stays until the helper leaves.
  bool join() {
    int helpers = helpers_.load(std::memory_order_relaxed);
    while ((helpers & kClosed) == 0) {
      if (helpers_.compare_exchange_weak(helpers, helpers + 1, std::memory_order_acquire, std::memory_order_relaxed)) return true;
    }
    return false;
  }

  unsigned long wait_for_job(unsigned long seen) {
    const auto last = std::chrono::steady_clock::now() + kSpinTime;
    do {
      for (int spin = 0; spin < kSpins; ++spin) {
        const unsigned long now = generation_.load(std::memory_order_acquire);
        if (now != seen) return now;
        pause();
      }
    } while (std::chrono::steady_clock::now() < last);
    std::unique_lock<std::mutex> lock(sleep_);
    num_asleep_.fetch_add(1);
    wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
    num_asleep_.fetch_sub(1);
    return generation_.load(std::memory_order_acquire);
  }

  std::vector<std::thread> workers_;
  Job job_{};
  std::atomic<long> next_{0};
  static constexpr int kClosed = 1 << 30;
  std::atomic<int> helpers_{kClosed};  // workers at the job; kClosed once it takes no more
  std::atomic<unsigned long> generation_{0};
  std::atomic<int> num_asleep_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
  bool stopping_ = false;
};

std::mutex in_use;
Pool* pool = nullptr;
std::atomic<int> wanted_threads{1};

// In a child that was forked: the pool's threads are the parent's, and whoever held the lock may not be here. The pool is left as it is, for
// a condition that others wait for cannot be destroyed.
void forget_pool() {
  pool = nullptr;
  new (&in_use) std::mutex;
}

const int fork_handler = pthread_atfork(nullptr, nullptr, forget_pool);

}  // namespace

Pieces::Pieces(std::atomic<long>& next, long count, long least, long shares)
    : next_(next), count_(count), least_(least), shares_(shares) {}

bool Pieces::take(long& begin, long& end) {
  begin = next_.load(std::memory_order_relaxed);
  do {
    if (begin >= count_) return false;
    const long share = (count_ - begin) / shares_, size = share > least_ ? share : least_;
    end = size < count_ - begin ? begin + size : count_;
  } while (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
  return true;
}

void run(Task task, void* context, long count, long least, long shares) {
  if (count < 1) return;
  std::unique_lock<std::mutex> lock(in_use, std::try_to_lock);
  if (!lock.owns_lock() || wanted_threads == 1 || count <= least) {
    std::atomic<long> next{0};
    Pieces all(next, count, count, shares);
    task(context, all);
    return;
  }
  if (pool == nullptr) pool = new Pool(wanted_threads);
  pool->run({task, context, count, least, shares});
}

int num_threads() { return wanted_threads; }

}  // namespace cantata

extern "C" __attribute__((visibility("default"))) void cantata_set_threads(int count) {
  using namespace cantata;
  std::lock_guard<std::mutex> lock(in_use);
  if (count == wanted_threads) return;
  delete pool;
  pool = nullptr;
  wanted_threads = count < 1 ? 1 : count;
}

extern "C" __attribute__((visibility("default"))) int cantata_num_threads() { return cantata::num_threads(); }
