// Convolutions of bytes for AVX-512 with VNNI, which multiplies and sums quads at once.
#include "core/masked_forward_avx512.h"

namespace onp {
namespace {

struct Simd : Avx512 {
  static ONP_INLINE IntVec dot(IntVec sums, IntVec inputs, IntVec weights) {
    return (IntVec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)inputs, (__m512i)weights);
  }
};

}  // namespace

void byte_convolution_vnni(const StepArgs& step) { byte_convolution<Simd>(step); }

}  // namespace onp
