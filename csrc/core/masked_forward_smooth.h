// exp and the activations that do more than clamp over a vector type, for the kernels of a masked
// forward. Internal linkage, as in masked_forward_tile.h.
#pragma once

#include "core/masked_forward_kernels.h"
#include "core/vectors.h"

namespace onp {
namespace {

template <typename Simd>
struct Smooth {
  using Vec = typename Simd::Vec;
  using IntVec = typename Simd::IntVec;

  // Coefficients from the highest power down.
  template <int count>
  static ONP_INLINE Vec polynomial(Vec x, const float (&coefficients)[count]) {
    Vec sum = Simd::splat(coefficients[0]);
#pragma GCC unroll 8
    for (int i = 1; i < count; ++i) sum = Simd::fma(sum, x, Simd::splat(coefficients[i]));
    return sum;
  }

  // Within 2 units in the last place, from 2^-126 up; infinity from 88.4 on; NaN passes through.
  static ONP_INLINE Vec exp(Vec x) {
    const Vec least = Simd::splat(-87.33654f), most = Simd::splat(89.0f);
    x = Simd::smaller(most, Simd::larger(least, x));
    // x = n log 2 + r: adding and taking away 1.5 * 2^23 rounds to a whole n.
    const Vec round = Simd::splat(12582912.0f);
    const Vec n = Simd::fma(x, Simd::splat(1.44269504f), round) - round;
    Vec r = Simd::fma(n, Simd::splat(-0.693359375f), x);
    r = Simd::fma(n, Simd::splat(2.12194440e-4f), r);
    // Taylor's series, the last coefficients fitted to |r| < log(2) / 2.
    Vec p = polynomial(r, {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                           1.6666665459e-1f, 5.0000001201e-1f});
    p = Simd::fma(p * r, r, r) + Simd::splat(1.0f);
    const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
    Vec power;
    __builtin_memcpy(&power, &exponent, sizeof(power));
    return p * power;
  }

  static ONP_INLINE Vec sigmoid(Vec x) { return Simd::splat(1.0f) / (Simd::splat(1.0f) + exp(-x)); }

  // x / 2 * (1 + erf(x / sqrt(2))) and its derivative; erf by Abramowitz and Stegun 7.1.26, within
  // 1.5e-7.
  static ONP_INLINE Vec gelu(Vec x, Vec* slope) {
    const Vec one = Simd::splat(1.0f), zero = Simd::splat(0.0f);
    const Vec z = x * Simd::splat(0.70710678f);
    const Vec size = z < zero ? -z : z;
    const Vec t = one / Simd::fma(size, Simd::splat(0.3275911f), one);
    const Vec p =
        polynomial(t, {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f});
    const Vec bell = exp(-z * z);
    const Vec tail = p * t * bell * Simd::splat(0.5f);  // of the normal distribution
    const Vec below = x < zero ? tail : one - tail;
    if (slope) *slope = Simd::fma(x * bell, Simd::splat(0.39894228f), below);
    return x * below;
  }

  // GELU's approximation by a tanh: x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)).
  static ONP_INLINE Vec gelu_tanh(Vec x, Vec* slope) {
    const Vec factor = Simd::splat(1.59576912f), cubic = Simd::splat(0.044715f);
    const Vec square = x * x;
    const Vec share = sigmoid(factor * Simd::fma(x * square, cubic, x));
    if (slope) {
      const Vec inner = factor * Simd::fma(square, Simd::splat(3.0f) * cubic, Simd::splat(1.0f));
      *slope = Simd::fma(x * inner, share - share * share, share);
    }
    return x * share;
  }

  static ONP_INLINE Vec silu(Vec x, Vec* slope) {
    const Vec share = sigmoid(x);
    if (slope) *slope = Simd::fma(x, share - share * share, share);
    return x * share;
  }

  // relu6(x + 3) / 6. NaN passes through, as in torch.
  static ONP_INLINE Vec ramp(Vec x) {
    const Vec zero = Simd::splat(0.0f), six = Simd::splat(6.0f);
    const Vec clamped = Simd::smaller(six, Simd::larger(zero, x + Simd::splat(3.0f)));
    return clamped * Simd::splat(1.0f / 6);
  }

  // `inside` where the ramp rises, else what is before or behind it.
  static ONP_INLINE Vec on_ramp(Vec x, Vec before, Vec inside, Vec behind) {
    const Vec three = Simd::splat(3.0f);
    return x <= -three ? before : x < three ? inside : behind;
  }

  static ONP_INLINE Vec hard_sigmoid(Vec x, Vec* slope) {
    const Vec zero = Simd::splat(0.0f);
    if (slope) *slope = on_ramp(x, zero, Simd::splat(1.0f / 6), zero);
    return ramp(x);
  }

  static ONP_INLINE Vec hard_swish(Vec x, Vec* slope) {
    const Vec inside = Simd::fma(x, Simd::splat(1.0f / 3), Simd::splat(0.5f));
    if (slope) *slope = on_ramp(x, Simd::splat(0.0f), inside, Simd::splat(1.0f));
    return x * ramp(x);
  }

  static ONP_INLINE Vec sigmoid(Vec x, Vec* slope) {
    const Vec share = sigmoid(x);
    if (slope) *slope = share - share * share;
    return share;
  }

  // All of these, in place, and their derivatives where `slopes` is given.
  static __attribute__((noinline)) void activate(Vec* values, int count, Activation activation,
                                                 Vec* slopes) {
    for (int i = 0; i < count; ++i) {
      const Vec x = values[i];
      Vec* const slope = slopes ? slopes + i : nullptr;
      switch (activation) {
        case Activation::gelu:
          values[i] = gelu(x, slope);
          break;
        case Activation::gelu_tanh:
          values[i] = gelu_tanh(x, slope);
          break;
        case Activation::sigmoid:
          values[i] = sigmoid(x, slope);
          break;
        case Activation::hard_sigmoid:
          values[i] = hard_sigmoid(x, slope);
          break;
        case Activation::hard_swish:
          values[i] = hard_swish(x, slope);
          break;
        default:
          values[i] = silu(x, slope);
      }
    }
  }
};

}  // namespace
}  // namespace onp
