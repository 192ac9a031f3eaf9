// Convolutions of bytes for AVX-512 with VNNI, which multiplies and sums quads at once.
#include <immintrin.h>

#include "core/masked_forward_bytes.h"

namespace onp {
namespace {

struct Simd {
  using Vec = __m512;
  typedef std::int32_t IntVec __attribute__((vector_size(64)));
  static constexpr int lanes = 16;
  static constexpr int tile_pixels = 12;
  static ONP_INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
  static ONP_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static ONP_INLINE __m128i bytes(Vec value) {
    const __m512 most = _mm512_min_ps(value, _mm512_set1_ps(255.0f));
    return _mm512_cvtusepi32_epi8(_mm512_max_epi32(_mm512_cvtps_epi32(most), __m512i{}));
  }
  static ONP_INLINE IntVec dot(IntVec sums, IntVec inputs, IntVec weights) {
    return (IntVec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)inputs, (__m512i)weights);
  }
};

}  // namespace

void byte_convolution_vnni(const StepArgs& step) { ByteTile<Simd>::convolution(step); }

}  // namespace onp
