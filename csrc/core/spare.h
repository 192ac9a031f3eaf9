// Memory that a thread works in and that outlives the call: fresh memory of this size costs the
// system more than what is done in it.
#pragma once

#include <cstdint>

namespace onp {

// Floats on a cache line boundary, not initialised: whatever an earlier call left. Given back to
// the process at the end, which keeps kMostSpareBytes of it.
class Spare {
 public:
  explicit Spare(std::int64_t size);
  ~Spare();
  Spare(const Spare&) = delete;
  Spare& operator=(const Spare&) = delete;

  float* data() const { return data_; }

 private:
  std::int64_t bytes_;
  float* data_;
};

constexpr std::int64_t kMostSpareBytes = std::int64_t{256} << 20;

}  // namespace onp
