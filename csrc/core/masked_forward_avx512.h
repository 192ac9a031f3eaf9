// What the files compiled for AVX-512 have in common; see masked_forward_tile.h. A tile of 12
// pixels x 2 vectors fills 24 of the 32 registers with sums.
#pragma once

#include "core/masked_forward_narrow.h"

namespace onp {
namespace {

struct Avx512 : Vectors {
  static constexpr int tile_pixels = 12;
  static ONP_INLINE __m128i bytes(Vec value) {
    const __m512 most = _mm512_min_ps(value, _mm512_set1_ps(255.0f));
    return _mm512_cvtusepi32_epi8(_mm512_max_epi32(_mm512_cvtps_epi32(most), __m512i{}));
  }
};

}  // namespace
}  // namespace onp
