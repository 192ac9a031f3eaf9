// Fixed-width vectors, and functions compiled for AVX2 that a baseline binary may call after
// asking the machine. A body is written once as ONP_INLINE and inlined into a wrapper per target.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/inline.h"

#ifdef ONP_X86_KERNELS
#define ONP_TARGET_AVX2 __attribute__((target("avx2,fma")))
#endif

namespace onp {

#ifdef ONP_X86_KERNELS
inline bool machine_has_avx2() {
  static const bool answer = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return answer;
}
#endif

// A float without its lower 16 bits: stored so, computed with as float.
struct Bf16 {
  std::uint16_t bits;

  Bf16() = default;
  // The nearest, among two the even one; NaN stays NaN.
  explicit Bf16(float value) {
    std::uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    const std::uint32_t rounded = wide + 0x7fffu + (wide >> 16 & 1u);
    bits = static_cast<std::uint16_t>((value == value ? rounded : wide | 0x400000u) >> 16);
  }
  operator float() const {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

// 32 bytes of T: one AVX register, or two of the baseline.
template <typename T>
struct Lanes {
  static constexpr int count = 32 / static_cast<int>(sizeof(T));
  using Sum = T;  // what is computed with
  typedef T Vector __attribute__((vector_size(32)));
  Vector v;

  static ONP_INLINE Lanes load(const T* from) {
    Lanes lanes;
    std::memcpy(&lanes.v, from, sizeof lanes.v);
    return lanes;
  }
  ONP_INLINE void store(T* to) const { std::memcpy(to, &v, sizeof v); }
  // By halves, always in the same order, so that equal inputs give equal sums.
  ONP_INLINE T sum() const {
    T parts[count];
    std::memcpy(parts, &v, sizeof v);
    for (int half = count / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
    }
    return parts[0];
  }
};

// As many floats, 16 bytes where they are stored.
template <>
struct Lanes<Bf16> : Lanes<float> {
  typedef std::uint16_t Narrow __attribute__((vector_size(16)));
  typedef std::uint32_t Wide __attribute__((vector_size(32)));

  static ONP_INLINE Lanes load(const Bf16* from) {
    Narrow narrow;
    std::memcpy(&narrow, from, sizeof narrow);
    const Wide wide = __builtin_convertvector(narrow, Wide) << 16;
    Lanes lanes;
    std::memcpy(&lanes.v, &wide, sizeof wide);
    return lanes;
  }
  // As Bf16(float).
  ONP_INLINE void store(Bf16* to) const {
    Wide wide;
    std::memcpy(&wide, &v, sizeof wide);
    const Wide rounded = wide + 0x7fffu + ((wide >> 16) & 1u);
    const Wide kept = (v == v ? rounded : wide | 0x400000u) >> 16;
    const Narrow narrow = __builtin_convertvector(kept, Narrow);
    std::memcpy(to, &narrow, sizeof narrow);
  }
};

}  // namespace onp
