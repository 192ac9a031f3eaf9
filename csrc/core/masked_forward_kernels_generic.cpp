// Masked forward and gradient kernels for any processor: vectors of four floats, no fused
// multiply-add.
#include "core/masked_forward_tokens.h"
#include "core/masked_gradient_tile.h"

namespace onp {
namespace {

struct Simd {
  typedef float Vec __attribute__((vector_size(16)));
  typedef std::int32_t IntVec __attribute__((vector_size(16)));
  typedef std::uint8_t ByteVec __attribute__((vector_size(4)));
  static constexpr int lanes = 4;
  static constexpr int tile_pixels = 5;
  static ONP_INLINE Vec splat(float x) { return Vec{x, x, x, x}; }
  static ONP_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  using Bits = std::uint8_t;
  static ONP_INLINE Bits above(Vec a, Vec b) {
    const IntVec bits = (a > b) & IntVec{1, 2, 4, 8};
    return static_cast<Bits>(bits[0] | bits[1] | bits[2] | bits[3]);
  }
  static ONP_INLINE Vec only(Bits bits, Vec x) {
    const IntVec lane = {1, 2, 4, 8};
    return (lane & bits) != 0 ? x : splat(0.0f);
  }
  static ONP_INLINE ByteVec bytes(Vec value) { return plain_bytes<Simd>(value); }
  static ONP_INLINE IntVec dot(IntVec sums, IntVec inputs, IntVec weights) {
    return plain_dot(sums, inputs, weights);
  }
};

}  // namespace

const Kernels kGenericKernels = kernel_table<Simd>("generic");
const GradientKernels kGenericGradientKernels = GradientTile<Simd>::table("generic");

}  // namespace onp
