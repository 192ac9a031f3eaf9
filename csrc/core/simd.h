// Fixed-width vectors, and functions compiled for AVX2 that a baseline binary may call after
// asking the machine. A body is written once as ONP_INLINE and inlined into a wrapper per target.
#pragma once

#include <cstdint>
#include <cstring>

#define ONP_INLINE inline __attribute__((always_inline))

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

// 32 bytes of T: one AVX register, or two of the baseline.
template <typename T>
struct Lanes {
  static constexpr int count = 32 / static_cast<int>(sizeof(T));
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

}  // namespace onp
