// Convolutions of narrow inputs with narrow weights: of bytes, summed exactly in 32 bits, and of
// halves (bf16), summed in fp32. The epilogue is that of every kernel, in fp32. Written once over a
// Simd with
//   dot(sums, inputs, weights): sums[lane] += sum over the lane's quad of bytes of
//                               (unsigned) input * (signed) weight;
//   dot_halves(sums, inputs, weights): sums[lane] += sum over the lane's pair of halves of
//                               input * weight.
#pragma once

#include "core/masked_forward_tile.h"

namespace onp {
namespace {

// dot() by plain arithmetic: right everywhere, fast nowhere.
template <typename IntVec>
ONP_INLINE IntVec plain_dot(IntVec sums, IntVec inputs, IntVec weights) {
#pragma GCC unroll 4
  for (int i = 0; i < kQuad; ++i) {
    sums += (inputs >> 8 * i & 255) * (weights << (24 - 8 * i) >> 24);
  }
  return sums;
}

// dot_halves() likewise: a half is the upper half of a float.
template <typename Simd>
ONP_INLINE typename Simd::Vec plain_dot_halves(typename Simd::Vec sums,
                                               typename Simd::IntVec inputs,
                                               typename Simd::IntVec weights) {
  const auto floats = [](typename Simd::IntVec bits) {
    typename Simd::Vec value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
  };
  sums = Simd::fma(floats(inputs << 16), floats(weights << 16), sums);
  return Simd::fma(floats(inputs & -65536), floats(weights & -65536), sums);
}

template <typename Simd>
struct ByteFormat {
  using Value = std::uint8_t;
  using Weight = std::int8_t;
  using Sums = typename Simd::IntVec;
  static constexpr int kGroup = kQuad;
  static constexpr bool kSkips = false;  // see StepArgs::live
  static const Bytes& input(const StepArgs& step) { return step.input_bytes; }
  static const Weight* weights(const StepArgs& step) { return step.byte_weights; }
  static ONP_INLINE Sums dot(Sums sums, typename Simd::IntVec inputs,
                             typename Simd::IntVec weights) {
    return Simd::dot(sums, inputs, weights);
  }
  static ONP_INLINE typename Simd::Vec unit(const StepArgs& step, std::int64_t channel) {
    return Tile<Simd>::load(step.unit + channel);
  }
  static ONP_INLINE typename Simd::Vec result(Sums sums, typename Simd::Vec unit) {
    return __builtin_convertvector(sums, typename Simd::Vec) * unit;
  }
};

template <typename Simd>
struct HalfFormat {
  using Value = std::uint16_t;
  using Weight = std::uint16_t;
  using Sums = typename Simd::Vec;
  static constexpr int kGroup = kPair;
  static constexpr bool kSkips = true;
  static const Halves& input(const StepArgs& step) { return step.input_halves; }
  static const Weight* weights(const StepArgs& step) { return step.half_weights; }
  static ONP_INLINE Sums dot(Sums sums, typename Simd::IntVec inputs,
                             typename Simd::IntVec weights) {
    return Simd::dot_halves(sums, inputs, weights);
  }
  static ONP_INLINE typename Simd::Vec unit(const StepArgs&, std::int64_t) {
    return Simd::splat(1.0f);
  }
  static ONP_INLINE typename Simd::Vec result(Sums sums, typename Simd::Vec) { return sums; }
};

// Format: what a value and a weight are, and how kGroup of each, 32 bits, are multiplied and
// summed.
template <typename Simd, typename Format>
struct NarrowTile {
  using Base = Tile<Simd>;
  using Vec = typename Base::Vec;
  using IntVec = typename Base::IntVec;
  using Index = typename Base::Index;
  using Value = typename Format::Value;
  using Weight = typename Format::Weight;
  using Sums = typename Format::Sums;
  static constexpr int kLanes = Base::kLanes;
  static constexpr int kPixels = Base::kPixels;
  static constexpr int kGroup = Format::kGroup;
  static_assert(kGroup * sizeof(Value) == 4 && kGroup * sizeof(Weight) == 4, "a lane's 32 bits");

  struct Place {
    const Value* input[kPixels];
    typename Base::Pixel pixel[kPixels];
    typename Base::template Outputs<kPixels> outputs;
  };

  static ONP_INLINE IntVec load_weights(const Weight* from) {
    IntVec value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
  }

  // One group in every lane.
  static ONP_INLINE IntVec spread(const Value* from) {
    std::int32_t group;
    __builtin_memcpy(&group, from, sizeof(group));
    return group - IntVec{};
  }

  template <bool all, int vectors>
  static __attribute__((noinline)) void convolve(const StepArgs& step, const Place& place,
                                                 Index channel) {
    // From one vector of weights to the next: the next block holds it if vectors are as wide.
    const Index next_vector =
        kLanes == kChannelBlock ? step.block_stride : static_cast<Index>(kLanes) * kGroup;
    const Weight* weights = Format::weights(step) + channel / kChannelBlock * step.block_stride +
                            channel % kChannelBlock * kGroup;
    const Index count = all ? step.segment_length : step.live_count;
    Sums sums[kPixels][vectors];
#pragma GCC unroll 32
    for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[p][v] = Sums{};
    }
    for (Index s = 0; s < step.segment_count; ++s) {
      const Value* input[kPixels];
#pragma GCC unroll 32
      for (int p = 0; p < kPixels; ++p) input[p] = place.input[p] + step.segments[s];
      for (Index n = 0; n < count; ++n) {
        const Index i = all ? n : step.live[n];
        const Weight* const from = weights + i * kChannelBlock * kGroup;
        IntVec row[vectors];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) row[v] = load_weights(from + v * next_vector);
#pragma GCC unroll 32
        for (int p = 0; p < kPixels; ++p) {
          const IntVec x = spread(input[p] + i * kGroup);
#pragma GCC unroll 2
          for (int v = 0; v < vectors; ++v) sums[p][v] = Format::dot(sums[p][v], x, row[v]);
        }
      }
      weights += step.segment_length * kChannelBlock * kGroup;
    }
    Vec results[kPixels][vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const Vec unit = Format::unit(step, channel + v * kLanes);
#pragma GCC unroll 32
      for (int p = 0; p < kPixels; ++p) results[p][v] = Format::result(sums[p][v], unit);
    }
    Base::finish(step, place.outputs, channel, results);
  }

  static void convolution(const StepArgs& step) {
    if constexpr (Format::kSkips) {
      if (step.live) return convolution<false>(step);
    }
    convolution<true>(step);
  }

  template <bool all>
  static void convolution(const StepArgs& step) {
    const auto& input = Format::input(step);
    Base::template for_each_group<Place>(step, input, [&](const Place* places, int tiles) {
      Index channel = 0;
      for (; channel + kLanes < step.channels; channel += 2 * kLanes) {
        for (int t = 0; t < tiles; ++t) convolve<all, 2>(step, places[t], channel);
      }
      for (; channel < step.channels; channel += kLanes) {
        for (int t = 0; t < tiles; ++t) convolve<all, 1>(step, places[t], channel);
      }
    });
  }
};

template <typename Simd>
void byte_convolution(const StepArgs& step) {
  NarrowTile<Simd, ByteFormat<Simd>>::convolution(step);
}

template <typename Simd>
void half_convolution(const StepArgs& step) {
  NarrowTile<Simd, HalfFormat<Simd>>::convolution(step);
}

}  // namespace
}  // namespace onp
