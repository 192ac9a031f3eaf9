#include "core/spare.h"

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

namespace onp {
namespace {

constexpr std::align_val_t kAlignment{64};

struct Chunk {
  std::int64_t bytes;
  void* data;
};

struct Pool {
  std::mutex mutex;
  std::vector<Chunk> chunks;  // smallest first
};

// Never destroyed: threads may end after it would be.
Pool& pool() {
  static Pool& one = *new Pool;
  return one;
}

void free_chunk(void* data) { ::operator delete(data, kAlignment); }

void* new_chunk(std::int64_t bytes) {
  return ::operator new(static_cast<std::size_t>(bytes), kAlignment);
}

// The smallest of at least `bytes`, or none.
Chunk taken(std::int64_t bytes) {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  std::vector<Chunk>& chunks = pool().chunks;
  const auto fits = std::find_if(chunks.begin(), chunks.end(),
                                 [&](const Chunk& chunk) { return chunk.bytes >= bytes; });
  if (fits == chunks.end()) return {0, nullptr};
  const Chunk found = *fits;
  chunks.erase(fits);
  return found;
}

// The smallest go first: large ones serve every caller.
void shrink(std::int64_t most) {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  std::vector<Chunk>& chunks = pool().chunks;
  std::int64_t kept = 0;
  for (const Chunk& chunk : chunks) kept += chunk.bytes;
  for (; kept > most; chunks.erase(chunks.begin())) {
    kept -= chunks.front().bytes;
    free_chunk(chunks.front().data);
  }
}

void give_back(const Chunk& returned) {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  std::vector<Chunk>& chunks = pool().chunks;
  const auto larger = std::find_if(chunks.begin(), chunks.end(), [&](const Chunk& chunk) {
    return chunk.bytes > returned.bytes;
  });
  chunks.insert(larger, returned);
}

}  // namespace

Spare::Spare(std::int64_t size) {
  const std::int64_t bytes = size * static_cast<std::int64_t>(sizeof(float));
  Chunk chunk = taken(bytes);
  if (!chunk.data) {
    try {
      chunk = {bytes, new_chunk(bytes)};
    } catch (const std::bad_alloc&) {
      shrink(0);
      chunk = {bytes, new_chunk(bytes)};
    }
  }
  bytes_ = chunk.bytes;
  data_ = static_cast<float*>(chunk.data);
}

Spare::~Spare() {
  try {
    if (bytes_ > kMostSpareBytes) {
      free_chunk(data_);
      return;
    }
    give_back({bytes_, data_});
    shrink(kMostSpareBytes);
  } catch (const std::bad_alloc&) {  // no room to remember it
    free_chunk(data_);
  }
}

}  // namespace onp
