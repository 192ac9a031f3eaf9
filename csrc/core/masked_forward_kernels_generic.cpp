// Masked forward and gradient kernels for any processor.
#include "core/masked_gradient_tokens.h"

namespace onp {
namespace {

struct Simd : Vectors {
  typedef std::uint8_t ByteVec __attribute__((vector_size(4)));
  static constexpr int tile_pixels = 5;
  static ONP_INLINE ByteVec bytes(Vec value) { return plain_bytes<Simd>(value); }
  static ONP_INLINE IntVec dot(IntVec sums, IntVec inputs, IntVec weights) {
    return plain_dot(sums, inputs, weights);
  }
  static ONP_INLINE Vec dot_halves(Vec sums, IntVec inputs, IntVec weights) {
    return plain_dot_halves<Simd>(sums, inputs, weights);
  }
};

}  // namespace

const Kernels kGenericKernels = kernel_table<Simd>("generic");
const GradientKernels kGenericGradientKernels = gradient_table<Simd>("generic");

}  // namespace onp
