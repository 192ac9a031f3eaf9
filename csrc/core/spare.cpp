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

}  // namespace

Spare::Spare(std::int64_t size) : bytes_(size * static_cast<std::int64_t>(sizeof(float))) {
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    std::vector<Chunk>& chunks = pool().chunks;
    const auto fits = std::find_if(chunks.begin(), chunks.end(),
                                   [this](const Chunk& chunk) { return chunk.bytes >= bytes_; });
    if (fits != chunks.end()) {
      bytes_ = fits->bytes;
      data_ = static_cast<float*>(fits->data);
      chunks.erase(fits);
      return;
    }
  }
  data_ = static_cast<float*>(::operator new(static_cast<std::size_t>(bytes_), kAlignment));
}

Spare::~Spare() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  std::vector<Chunk>& chunks = pool().chunks;
  const auto larger = std::find_if(chunks.begin(), chunks.end(),
                                   [this](const Chunk& chunk) { return chunk.bytes > bytes_; });
  chunks.insert(larger, {bytes_, data_});
  std::int64_t kept = 0;
  for (const Chunk& chunk : chunks) kept += chunk.bytes;
  // Large ones serve every caller; small ones go first.
  for (; kept > kMostSpareBytes; chunks.erase(chunks.begin())) {
    kept -= chunks.front().bytes;
    free_chunk(chunks.front().data);
  }
}

}  // namespace onp
