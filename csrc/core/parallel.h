// One way to run a loop over independent items on several threads: OpenMP's, or std::thread where
// ONP_STD_THREADS is defined, for ThreadSanitizer, which does not see into gcc's OpenMP runtime.
#pragma once

#ifdef ONP_STD_THREADS
#include <atomic>
#include <mutex>
#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

#include <algorithm>
#include <cstdint>
#include <exception>

namespace onp {

// Calls body(item, thread) for item in [0, items). The first exception thrown by a body is
// rethrown on the calling thread: one that leaves a thread would end the process.
template <typename Body>
void parallel_for(std::int64_t items, int threads, const Body& body) {
  if (items <= 0) return;
  std::exception_ptr failure;
#ifdef ONP_STD_THREADS
  std::atomic<std::int64_t> next{0};
  std::mutex mutex;
  const auto work = [&](int thread) {
    for (std::int64_t item = next++; item < items; item = next++) {
      try {
        body(item, thread);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!failure) failure = std::current_exception();
      }
    }
  };
  std::vector<std::thread> others;
  const std::int64_t count = std::min<std::int64_t>(threads, items);
  for (int thread = 1; thread < count; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
#else
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && items > 1)
  for (std::int64_t item = 0; item < items; ++item) {
    try {
      body(item, omp_get_thread_num());
    } catch (...) {
#pragma omp critical(onp_parallel_failure)
      if (!failure) failure = std::current_exception();
    }
  }
#endif
  if (failure) std::rethrow_exception(failure);
}

}  // namespace onp
