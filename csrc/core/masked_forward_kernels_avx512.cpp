// Masked forward and gradient kernels for AVX-512, and those with VNNI, which differ in what they
// do with bytes alone: a tile of 12 pixels x 2 vectors fills 24 of the 32 registers with sums.
#include <immintrin.h>

#include "core/masked_forward_tokens.h"
#include "core/masked_gradient_tile.h"

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
    return plain_dot(sums, inputs, weights);
  }
};

}  // namespace

const Kernels kAvx512Kernels = kernel_table<Simd>("avx512");
const Kernels kAvx512VnniKernels = []() constexpr {
  Kernels table = kernel_table<Simd>("avx512vnni");
  table.byte_convolution = byte_convolution_vnni;
  return table;
}
();
const GradientKernels kAvx512GradientKernels = GradientTile<Simd>::table("avx512");

}  // namespace onp
