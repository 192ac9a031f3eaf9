// One way to run a loop over independent items on several threads.
#pragma once

#include <omp.h>

#include <cstdint>
#include <exception>

namespace onp {

// Calls body(item, thread) for item in [0, items). The first exception thrown by a body is
// rethrown on the calling thread: one that leaves an OpenMP region would end the process.
template <typename Body>
void parallel_for(std::int64_t items, int threads, const Body& body) {
  if (items <= 0) return;
  std::exception_ptr failure;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && items > 1)
  for (std::int64_t item = 0; item < items; ++item) {
    try {
      body(item, omp_get_thread_num());
    } catch (...) {
#pragma omp critical(onp_parallel_failure)
      if (!failure) failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace onp
