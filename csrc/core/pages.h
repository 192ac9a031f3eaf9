// Large pages for memory that is about to be written for the first time.
#pragma once

#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace onp {

// Asks the system to back the whole large pages in [data, data + count) by such, where it has left
// that to programs. Only a wish, and one that changes no content: fresh memory then comes in a few
// steps instead of thousands. Does nothing for less than a few of them.
template <typename T>
void ask_for_large_pages(T* data, std::int64_t count) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t page = std::uintptr_t{2} << 20, few = 2;
  const std::uintptr_t bytes = static_cast<std::uintptr_t>(count) * sizeof(T);
  if (bytes < few * page) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (begin + page - 1) / page * page;
  const std::uintptr_t last = (begin + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)count;
#endif
}

}  // namespace onp
