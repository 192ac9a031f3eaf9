// The kernels of a masked forward, written once over a vector type. Each instruction set's file
// includes this with a Simd of its own; everything here has internal linkage, so that no copy
// compiled for a wider instruction set can be linked into the baseline.
//
// Simd: Vec and IntVec (GCC vector types of `lanes` elements), `tile_pixels`, splat(x), fma(a, b, c).
#pragma once

#include "core/masked_forward_kernels.h"

namespace onp {
namespace {

#define ONP_INLINE inline __attribute__((always_inline))

template <typename Simd>
struct Tile {
  using Vec = typename Simd::Vec;
  using IntVec = typename Simd::IntVec;
  using Index = std::int64_t;
  static constexpr int kLanes = Simd::lanes;
  static constexpr int kPixels = Simd::tile_pixels;
  // Tiles whose addresses are worked out together and reused for every channel block.
  static constexpr int kGroup = 16;
  static_assert(kChannelBlock % kLanes == 0, "a channel block is a whole number of vectors");

  // Where one tile of kPixels output pixels reads and writes. Pixels past the end repeat the last
  // one: they compute and store the same values again.
  struct Place {
    const float* input[kPixels];
    const float* residual[kPixels];
    float* plain[kPixels];
    float* final[kPixels];
    Index pixel[kPixels];
  };

  static ONP_INLINE Vec load(const float* from) {
    Vec value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
  }

  static ONP_INLINE void store(float* to, Vec value) { __builtin_memcpy(to, &value, sizeof(value)); }

  // NaN passes through, as in torch.
  static ONP_INLINE Vec activate(Vec value, Activation activation) {
    if (activation == Activation::none) return value;
    const Vec zero = Simd::splat(0.0f);
    value = value < zero ? zero : value;
    if (activation == Activation::relu6) {
      const Vec six = Simd::splat(6.0f);
      value = value > six ? six : value;
    }
    return value;
  }

  static ONP_INLINE Vec mask(Vec value, const std::uint32_t* keep) {
    IntVec bits, kept;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    __builtin_memcpy(&kept, keep, sizeof(kept));
    bits &= kept;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
  }

  // Finishes `vectors` vectors of a tile that begin at output channel `channel`.
  template <int vectors>
  static ONP_INLINE void finish(const StepArgs& step, const Place& place, Index channel,
                                Vec (&sums)[kPixels][vectors]) {
    for (int v = 0; v < vectors; ++v) {
      const Index c = channel + v * kLanes;
      if (step.bias) {
        const Vec bias = load(step.bias + c);
        for (int p = 0; p < kPixels; ++p) sums[p][v] += bias;
      }
      if (step.residual.data) {
        for (int p = 0; p < kPixels; ++p) sums[p][v] += load(place.residual[p] + c);
      }
      for (int p = 0; p < kPixels; ++p) sums[p][v] = activate(sums[p][v], step.first);
      if (step.plain.data) {
        for (int p = 0; p < kPixels; ++p) store(place.plain[p] + c, sums[p][v]);
      }
      if (!step.final.data) continue;
      if (step.scale) {
        const Vec scale = load(step.scale + c), shift = load(step.shift + c);
        for (int p = 0; p < kPixels; ++p) sums[p][v] = Simd::fma(sums[p][v], scale, shift);
      }
      for (int p = 0; p < kPixels; ++p) sums[p][v] = activate(sums[p][v], step.second);
      if (step.keep) {
        for (int p = 0; p < kPixels; ++p) sums[p][v] = mask(sums[p][v], step.keep + c);
      }
      for (int p = 0; p < kPixels; ++p) store(place.final[p] + c, sums[p][v]);
    }
  }

  template <int vectors>
  static __attribute__((noinline)) void convolve(const StepArgs& step, const Place& place,
                                                 Index channel) {
    const Index block = channel / kChannelBlock;
    const float* weights = step.weights + block * step.block_stride + channel % kChannelBlock;
    const Index next_vector = kLanes == kChannelBlock ? step.block_stride : kLanes;
    const Index first = step.first_channel ? step.first_channel[block] : 0;
    Vec sums[kPixels][vectors];
#pragma GCC unroll 32
    for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[p][v] = Simd::splat(0.0f);
    }
    for (Index s = 0; s < step.segment_count; ++s) {
      const Index offset = step.segments[s] + first;
      const float* input[kPixels];
#pragma GCC unroll 32
      for (int p = 0; p < kPixels; ++p) input[p] = place.input[p] + offset;
      for (Index i = 0; i < step.segment_length; ++i) {
        Vec row[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) row[v] = load(weights + v * next_vector);
#pragma GCC unroll 32
        for (int p = 0; p < kPixels; ++p) {
          const Vec x = Simd::splat(input[p][i]);
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) sums[p][v] = Simd::fma(x, row[v], sums[p][v]);
        }
        weights += kChannelBlock;
      }
    }
    finish<vectors>(step, place, channel, sums);
  }

  static void locate(const StepArgs& step, Index begin, Index end, Place& place) {
    for (int p = 0; p < kPixels; ++p) {
      const Index at = begin + p < end ? begin + p : end - 1;
      const Index image = at / step.pixels, pixel = at % step.pixels;
      const auto address = [&](const Operand& operand) -> float* {
        if (!operand.data) return nullptr;
        return operand.data + image * operand.image_stride + operand.offset[pixel];
      };
      place.input[p] = address(step.input);
      place.residual[p] = address(step.residual);
      place.plain[p] = address(step.plain);
      place.final[p] = address(step.final);
      place.pixel[p] = pixel;
    }
  }

  // Calls body(places, tiles) for groups of tiles that cover all output pixels of the block.
  template <typename Body>
  static ONP_INLINE void for_each_group(const StepArgs& step, const Body& body) {
    Place places[kGroup];
    const Index total = step.images * step.pixels;
    for (Index begin = 0; begin < total; begin += kGroup * kPixels) {
      int tiles = 0;
      for (; tiles < kGroup && begin + tiles * kPixels < total; ++tiles) {
        locate(step, begin + tiles * kPixels, total, places[tiles]);
      }
      body(places, tiles);
    }
  }

  static void convolution(const StepArgs& step) {
    // Two vectors of a tile share their input channels: not so across the blocks of a grouped one.
    const bool pairs = kLanes < kChannelBlock || !step.first_channel;
    for_each_group(step, [&](const Place* places, int tiles) {
      Index channel = 0;
      if (pairs) {
        for (; channel + kLanes < step.channels; channel += 2 * kLanes) {
          for (int t = 0; t < tiles; ++t) convolve<2>(step, places[t], channel);
        }
      }
      for (; channel < step.channels; channel += kLanes) {
        for (int t = 0; t < tiles; ++t) convolve<1>(step, places[t], channel);
      }
    });
  }

  static void depthwise(const StepArgs& step) {
    for_each_group(step, [&](const Place* places, int tiles) {
      for (int t = 0; t < tiles; ++t) {
        const Place& place = places[t];
        for (Index c = 0; c < step.channels; c += kLanes) {
          Vec sums[kPixels][1];
#pragma GCC unroll 32
          for (int p = 0; p < kPixels; ++p) sums[p][0] = Simd::splat(0.0f);
          const float* weights = step.weights + c;
          for (Index s = 0; s < step.segment_count; ++s) {
            const Vec weight = load(weights);
            const Index offset = step.segments[s] + c;
#pragma GCC unroll 32
            for (int p = 0; p < kPixels; ++p) {
              sums[p][0] = Simd::fma(load(place.input[p] + offset), weight, sums[p][0]);
            }
            weights += step.block_stride;
          }
          finish<1>(step, place, c, sums);
        }
      }
    });
  }

  template <bool average>
  static void pool(const StepArgs& step) {
    for_each_group(step, [&](const Place* places, int tiles) {
      for (int t = 0; t < tiles; ++t) {
        const Place& place = places[t];
        for (Index c = 0; c < step.channels; c += kLanes) {
          Vec results[kPixels][1];
          for (int p = 0; p < kPixels; ++p) {
            const Window& window = step.windows[place.pixel[p]];
            const float* corner = place.input[p] + c;
            Vec result = average ? Simd::splat(0.0f) : load(corner);
            for (Index y = 0; y < window.rows; ++y) {
              for (Index x = 0; x < window.columns; ++x) {
                const Vec value = load(corner + y * step.row_stride + x * step.column_stride);
                if (average) {
                  result += value;
                } else {
                  // NaN wins, as in torch: an unordered comparison takes the new value.
                  result = (result >= value) | (result != result) ? result : value;
                }
              }
            }
            results[p][0] = average ? result * Simd::splat(window.inverse) : result;
          }
          finish<1>(step, place, c, results);
        }
      }
    });
  }

  static constexpr Kernels table(const char* name) {
    return {name, convolution, depthwise, pool<false>, pool<true>};
  }
};

}  // namespace
}  // namespace onp
