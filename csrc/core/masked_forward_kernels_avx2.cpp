// Masked forward and gradient kernels for AVX2 with FMA: a tile of 6 pixels x 2 vectors fills 12 of
// the 16 registers with sums.
#include <immintrin.h>

#include "core/masked_forward_tokens.h"
#include "core/masked_gradient_tile.h"

namespace onp {
namespace {

struct Simd {
  using Vec = __m256;
  typedef std::int32_t IntVec __attribute__((vector_size(32)));
  typedef std::uint8_t ByteVec __attribute__((vector_size(8)));
  static constexpr int lanes = 8;
  static constexpr int tile_pixels = 6;
  static ONP_INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
  static ONP_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  using Bits = std::uint8_t;
  static ONP_INLINE Bits above(Vec a, Vec b) {
    return static_cast<Bits>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
  }
  static ONP_INLINE Vec only(Bits bits, Vec x) {
    const IntVec lane = {1, 2, 4, 8, 16, 32, 64, 128};
    return (lane & bits) != 0 ? x : splat(0.0f);
  }
  static ONP_INLINE ByteVec bytes(Vec value) { return plain_bytes<Simd>(value); }
  static ONP_INLINE IntVec dot(IntVec sums, IntVec inputs, IntVec weights) {
    return plain_dot(sums, inputs, weights);
  }
};

}  // namespace

const Kernels kAvx2Kernels = kernel_table<Simd>("avx2");
const GradientKernels kAvx2GradientKernels = GradientTile<Simd>::table("avx2");

}  // namespace onp
