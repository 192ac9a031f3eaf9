// The vectors of floats of the instruction set that the including file is for: ONP_LANES, which the
// build sets beside the compiler's options, is how many floats they have. Internal linkage: files
// for different instruction sets see different ones.
//
// Vec, IntVec and HalfVec (of 16 bits) are GCC vector types of `lanes` elements; Bits has one bit
// for each lane.
//   splat(x); fma(a, b, c) = a * b + c
//   above(a, b): where a > b, which is nowhere for NaN; only(bits, x): x there, 0 elsewhere
//   larger(a, b), smaller(a, b): a where it is above (below) b, else b, which may be NaN
//   pack(bits, x, to): x there, side by side, and what comes behind does not count
//   sum(x): of all lanes, by halves
#pragma once

#ifndef ONP_LANES
#define ONP_LANES 4
#elif ONP_LANES != 8 && ONP_LANES != 16
#error "ONP_LANES must be 8 or 16, or not set"
#endif

#include <cstdint>
#if ONP_LANES > 4
#include <immintrin.h>
#endif

#include "core/inline.h"

namespace onp {
namespace {

#if ONP_LANES == 16

struct Vectors {
  using Vec = __m512;
  typedef std::int32_t IntVec __attribute__((vector_size(64)));
  typedef std::uint16_t HalfVec __attribute__((vector_size(32)));
  using Bits = __mmask16;
  static constexpr int lanes = 16;
  static ONP_INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
  static ONP_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static ONP_INLINE Bits above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static ONP_INLINE Vec only(Bits bits, Vec x) { return _mm512_maskz_mov_ps(bits, x); }
  static ONP_INLINE Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static ONP_INLINE Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
  static ONP_INLINE void pack(Bits bits, Vec x, float* to) {
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(bits, x));
  }
  static ONP_INLINE float sum(Vec x) { return _mm512_reduce_add_ps(x); }
};

#elif ONP_LANES == 8

struct Vectors {
  using Vec = __m256;
  typedef std::int32_t IntVec __attribute__((vector_size(32)));
  typedef std::uint16_t HalfVec __attribute__((vector_size(16)));
  using Bits = std::uint8_t;
  static constexpr int lanes = 8;
  static ONP_INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
  static ONP_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static ONP_INLINE Bits above(Vec a, Vec b) {
    return static_cast<Bits>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
  }
  static ONP_INLINE Vec only(Bits bits, Vec x) {
    const IntVec lane = {1, 2, 4, 8, 16, 32, 64, 128};
    return (lane & bits) != 0 ? x : splat(0.0f);
  }
  static ONP_INLINE Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static ONP_INLINE Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
  static ONP_INLINE void pack(Bits bits, Vec x, float* to) {
    for (unsigned left = bits; left; left &= left - 1) *to++ = x[__builtin_ctz(left)];
  }
  static ONP_INLINE float sum(Vec x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

#else

// Any processor: four lanes, no fused multiply-add.
struct Vectors {
  typedef float Vec __attribute__((vector_size(16)));
  typedef std::int32_t IntVec __attribute__((vector_size(16)));
  typedef std::uint16_t HalfVec __attribute__((vector_size(8)));
  using Bits = std::uint8_t;
  static constexpr int lanes = 4;
  static ONP_INLINE Vec splat(float x) { return Vec{x, x, x, x}; }
  static ONP_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static ONP_INLINE Bits above(Vec a, Vec b) {
    const IntVec bits = (a > b) & IntVec{1, 2, 4, 8};
    return static_cast<Bits>(bits[0] | bits[1] | bits[2] | bits[3]);
  }
  static ONP_INLINE Vec only(Bits bits, Vec x) {
    const IntVec lane = {1, 2, 4, 8};
    return (lane & bits) != 0 ? x : splat(0.0f);
  }
  static ONP_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
  static ONP_INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
  static ONP_INLINE void pack(Bits bits, Vec x, float* to) {
    for (unsigned left = bits; left; left &= left - 1) *to++ = x[__builtin_ctz(left)];
  }
  static ONP_INLINE float sum(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
};

#endif

}  // namespace
}  // namespace onp
