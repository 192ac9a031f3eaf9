// Masked forward and gradient kernels for AVX2 with FMA: a tile of 6 pixels x 2 vectors fills 12 of
// the 16 registers with sums.
#include "core/masked_gradient_tokens.h"

namespace onp {
namespace {

struct Simd : Vectors {
  typedef std::uint8_t ByteVec __attribute__((vector_size(8)));
  static constexpr int tile_pixels = 6;
  static ONP_INLINE ByteVec bytes(Vec value) { return plain_bytes<Simd>(value); }
  static ONP_INLINE IntVec dot(IntVec sums, IntVec inputs, IntVec weights) {
    return plain_dot(sums, inputs, weights);
  }
  static ONP_INLINE Vec dot_halves(Vec sums, IntVec inputs, IntVec weights) {
    return plain_dot_halves<Simd>(sums, inputs, weights);
  }
};

}  // namespace

const Kernels kAvx2Kernels = kernel_table<Simd>("avx2");
const GradientKernels kAvx2GradientKernels = gradient_table<Simd>("avx2");

}  // namespace onp
