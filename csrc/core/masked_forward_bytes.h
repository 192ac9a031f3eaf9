// Convolutions of 8-bit inputs with 8-bit weights, summed exactly in 32 bits; the epilogue is that
// of every kernel, in fp32. Written once over a Simd with
//   dot(sums, inputs, weights): sums[lane] += sum over the lane's quad of bytes of
//                               (unsigned) input * (signed) weight.
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

template <typename Simd>
struct ByteTile {
  using Base = Tile<Simd>;
  using Vec = typename Base::Vec;
  using IntVec = typename Base::IntVec;
  using Index = typename Base::Index;
  static constexpr int kLanes = Base::kLanes;
  static constexpr int kPixels = Base::kPixels;

  struct Place {
    const std::uint8_t* input[kPixels];
    typename Base::Pixel pixel[kPixels];
    typename Base::template Outputs<kPixels> outputs;
  };

  static ONP_INLINE IntVec load_weights(const std::int8_t* from) {
    IntVec value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
  }

  // One quad in every lane.
  static ONP_INLINE IntVec spread(const std::uint8_t* from) {
    std::int32_t quad;
    __builtin_memcpy(&quad, from, sizeof(quad));
    return quad - IntVec{};
  }

  template <int vectors>
  static __attribute__((noinline)) void convolve(const StepArgs& step, const Place& place,
                                                 Index channel) {
    // From one vector of weights to the next: the next block holds it if vectors are as wide.
    const Index next_vector =
        kLanes == kChannelBlock ? step.block_stride : static_cast<Index>(kLanes) * kQuad;
    const std::int8_t* weights = step.byte_weights + channel / kChannelBlock * step.block_stride +
                                 channel % kChannelBlock * kQuad;
    IntVec sums[kPixels][vectors];
#pragma GCC unroll 32
    for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[p][v] = IntVec{};
    }
    for (Index s = 0; s < step.segment_count; ++s) {
      const std::uint8_t* input[kPixels];
#pragma GCC unroll 32
      for (int p = 0; p < kPixels; ++p) input[p] = place.input[p] + step.segments[s];
      for (Index i = 0; i < step.segment_length; ++i) {
        IntVec row[vectors];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) row[v] = load_weights(weights + v * next_vector);
#pragma GCC unroll 32
        for (int p = 0; p < kPixels; ++p) {
          const IntVec x = spread(input[p] + i * kQuad);
#pragma GCC unroll 2
          for (int v = 0; v < vectors; ++v) sums[p][v] = Simd::dot(sums[p][v], x, row[v]);
        }
        weights += kChannelBlock * kQuad;
      }
    }
    Vec results[kPixels][vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const Vec unit = Base::load(step.unit + channel + v * kLanes);
#pragma GCC unroll 32
      for (int p = 0; p < kPixels; ++p) {
        results[p][v] = __builtin_convertvector(sums[p][v], Vec) * unit;
      }
    }
    Base::finish(step, place.outputs, channel, results);
  }

  static void convolution(const StepArgs& step) {
    const auto& input = step.input_bytes;
    Base::template for_each_group<Place>(step, input, [&](const Place* places, int tiles) {
      Index channel = 0;
      for (; channel + kLanes < step.channels; channel += 2 * kLanes) {
        for (int t = 0; t < tiles; ++t) convolve<2>(step, places[t], channel);
      }
      for (; channel < step.channels; channel += kLanes) {
        for (int t = 0; t < tiles; ++t) convolve<1>(step, places[t], channel);
      }
    });
  }
};

}  // namespace
}  // namespace onp
