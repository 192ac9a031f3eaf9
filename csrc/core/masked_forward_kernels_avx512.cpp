// Masked forward and gradient kernels for AVX-512, and those with VNNI and with BF16 too, which
// differ in convolutions of bytes and of halves alone.
#include "core/masked_forward_avx512.h"
#include "core/masked_gradient_tokens.h"

namespace onp {
namespace {

struct Simd : Avx512 {
  static ONP_INLINE IntVec dot(IntVec sums, IntVec inputs, IntVec weights) {
    return plain_dot(sums, inputs, weights);
  }
  static ONP_INLINE Vec dot_halves(Vec sums, IntVec inputs, IntVec weights) {
    return plain_dot_halves<Simd>(sums, inputs, weights);
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
const Kernels kAvx512Bf16Kernels = []() constexpr {
  Kernels table = kernel_table<Simd>("avx512bf16");
  table.byte_convolution = byte_convolution_vnni;
  table.half_convolution = half_convolution_bf16;
  return table;
}
();
const GradientKernels kAvx512GradientKernels = gradient_table<Simd>("avx512");

}  // namespace onp
