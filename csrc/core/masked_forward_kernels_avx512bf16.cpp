// Convolutions of halves for AVX-512 with BF16, which multiplies and sums pairs at once.
#include "core/masked_forward_avx512.h"

namespace onp {
namespace {

struct Simd : Avx512 {
  static ONP_INLINE Vec dot_halves(Vec sums, IntVec inputs, IntVec weights) {
    return _mm512_dpbf16_ps(sums, (__m512bh)inputs, (__m512bh)weights);
  }
};

}  // namespace

void half_convolution_bf16(const StepArgs& step) { half_convolution<Simd>(step); }

}  // namespace onp
