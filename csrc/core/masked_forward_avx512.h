// Vectors of AVX-512, for the files compiled for it; see masked_forward_tile.h.
#pragma once

#include <immintrin.h>

#include "core/masked_forward_bytes.h"

namespace onp {
namespace {

struct Avx512 {
  using Vec = __m512;
  typedef std::int32_t IntVec __attribute__((vector_size(64)));
  static constexpr int lanes = 16;
  static constexpr int tile_pixels = 12;
  static ONP_INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
  static ONP_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  using Bits = __mmask16;
  static ONP_INLINE Bits above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static ONP_INLINE Vec only(Bits bits, Vec x) { return _mm512_maskz_mov_ps(bits, x); }
  static ONP_INLINE __m128i bytes(Vec value) {
    const __m512 most = _mm512_min_ps(value, _mm512_set1_ps(255.0f));
    return _mm512_cvtusepi32_epi8(_mm512_max_epi32(_mm512_cvtps_epi32(most), __m512i{}));
  }
};

}  // namespace
}  // namespace onp
