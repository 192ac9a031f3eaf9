// The kernels of a masked forward, written once over a vector type. Each instruction set's file
// includes this with a Simd of its own; everything here has internal linkage, so that no copy
// compiled for a wider instruction set can be linked into the baseline.
//
// Simd: Vec and IntVec (GCC vector types of `lanes` elements), `tile_pixels`, splat(x) and
// fma(a, b, c).
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

  // Where the epilogue of some output pixels reads and writes. Pixels outside the image repeat one
  // inside: the same values are stored again.
  template <int pixels>
  struct Outputs {
    const float* residual[pixels];
    float* plain[pixels];
    float* final[pixels];

    void set(const StepArgs& step, int p, Index image, Index pixel) {
      residual[p] = address(step.residual, image, pixel);
      plain[p] = address(step.plain, image, pixel);
      final[p] = address(step.final, image, pixel);
    }
  };

  // One tile of kPixels output pixels.
  struct Place {
    const float* input[kPixels];
    Index pixel[kPixels];
    Outputs<kPixels> outputs;
  };

  static ONP_INLINE float* address(const Operand& operand, Index image, Index pixel) {
    if (!operand.data) return nullptr;
    return operand.data + image * operand.image_stride + operand.offset[pixel];
  }

  static ONP_INLINE Vec load(const float* from) {
    Vec value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
  }

  static ONP_INLINE void store(float* to, Vec value) {
    __builtin_memcpy(to, &value, sizeof(value));
  }

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

  // Finishes `vectors` vectors of some pixels that begin at output channel `channel`.
  template <int pixels, int vectors>
  static ONP_INLINE void finish(const StepArgs& step, const Outputs<pixels>& outputs,
                                Index channel, Vec (&sums)[pixels][vectors]) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const Index c = channel + v * kLanes;
      if (step.bias) {
        const Vec bias = load(step.bias + c);
        for (int p = 0; p < pixels; ++p) sums[p][v] += bias;
      }
      if (step.residual.data) {
        for (int p = 0; p < pixels; ++p) sums[p][v] += load(outputs.residual[p] + c);
      }
      for (int p = 0; p < pixels; ++p) sums[p][v] = activate(sums[p][v], step.first);
      if (step.plain.data) {
        for (int p = 0; p < pixels; ++p) store(outputs.plain[p] + c, sums[p][v]);
      }
      if (!step.final.data) continue;
      if (step.scale) {
        const Vec scale = load(step.scale + c), shift = load(step.shift + c);
        for (int p = 0; p < pixels; ++p) sums[p][v] = Simd::fma(sums[p][v], scale, shift);
      }
      for (int p = 0; p < pixels; ++p) sums[p][v] = activate(sums[p][v], step.second);
      if (step.keep) {
        for (int p = 0; p < pixels; ++p) sums[p][v] = mask(sums[p][v], step.keep + c);
      }
      for (int p = 0; p < pixels; ++p) store(outputs.final[p] + c, sums[p][v]);
    }
  }

  template <int pixels, int vectors>
  static ONP_INLINE void clear(Vec (&sums)[pixels][vectors]) {
#pragma GCC unroll 32
    for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[p][v] = Simd::splat(0.0f);
    }
  }

  // sums[p][v] += sum over i of input[p][i] * weights[i][v], rows of weights kChannelBlock apart.
  template <int vectors>
  static ONP_INLINE void accumulate(const float* const (&input)[kPixels], const float* weights,
                                    Index next_vector, Index length,
                                    Vec (&sums)[kPixels][vectors]) {
    for (Index i = 0; i < length; ++i) {
      Vec row[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) row[v] = load(weights + v * next_vector);
#pragma GCC unroll 32
      for (int p = 0; p < kPixels; ++p) {
        const Vec x = Simd::splat(input[p][i]);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) sums[p][v] = Simd::fma(x, row[v], sums[p][v]);
      }
      weights += kChannelBlock;
    }
  }

  // From one vector of a packed row of weights to the next: the next block holds it if vectors are
  // as wide as blocks.
  static ONP_INLINE Index next_vector(const StepArgs& step) {
    return kLanes == kChannelBlock ? step.block_stride : kLanes;
  }

  static ONP_INLINE const float* block_weights(const StepArgs& step, Index channel) {
    return step.weights + channel / kChannelBlock * step.block_stride + channel % kChannelBlock;
  }

  template <int vectors>
  static __attribute__((noinline)) void convolve(const StepArgs& step, const Place& place,
                                                 Index channel) {
    const float* weights = block_weights(step, channel);
    const Index first = step.first_channel ? step.first_channel[channel / kChannelBlock] : 0;
    Vec sums[kPixels][vectors];
    clear(sums);
    for (Index s = 0; s < step.segment_count; ++s) {
      const Index offset = step.segments[s] + first;
      const float* input[kPixels];
#pragma GCC unroll 32
      for (int p = 0; p < kPixels; ++p) input[p] = place.input[p] + offset;
      accumulate(input, weights, next_vector(step), step.segment_length, sums);
      weights += step.segment_length * kChannelBlock;
    }
    finish(step, place.outputs, channel, sums);
  }

  static void locate(const StepArgs& step, Index begin, Index end, Place& place) {
    for (int p = 0; p < kPixels; ++p) {
      const Index at = begin + p < end ? begin + p : end - 1;
      const Index image = at / step.pixels, pixel = at % step.pixels;
      place.input[p] = address(step.input, image, pixel);
      place.pixel[p] = pixel;
      place.outputs.set(step, p, image, pixel);
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

  // ---- Winograd F(2x2, 3x3), A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural
  // Networks", arXiv 1509.09308: a tile of 2x2 outputs from 4x4 inputs with 16 products instead of
  // 36. Per group of tiles: transform the inputs, 16 matrix products, transform back and finish.

  static constexpr Index kTiles = kWinogradTiles / kPixels * kPixels;

  struct WinogradTile {
    const float* input;
    Outputs<4> outputs;
    bool below, right;  // whether the second row and column lie inside the image
  };

  static void locate(const StepArgs& step, Index tile, WinogradTile& at) {
    const Index columns = (step.width + 1) / 2, height = step.pixels / step.width;
    const Index tiles = columns * ((height + 1) / 2);
    const Index image = tile / tiles, y = tile % tiles / columns * 2, x = tile % columns * 2;
    const Index pixel = y * step.width + x;
    at.input = address(step.input, image, pixel);
    at.below = y + 1 < height;
    at.right = x + 1 < step.width;
    for (int p = 0; p < 4; ++p) {
      const Index down = p / 2 && at.below ? step.width : 0, across = p % 2 && at.right ? 1 : 0;
      at.outputs.set(step, p, image, pixel + down + across);
    }
  }

  // 1-D transform of four values in place.
  static ONP_INLINE void transform(Vec& a, Vec& b, Vec& c, Vec& d) {
    const Vec sum = b + c, difference = c - b;
    a -= c;
    d = b - d;
    b = sum;
    c = difference;
  }

  // to[point * stride] = transformed 4x4 inputs of one vector of channels.
  static ONP_INLINE void transform_input(const StepArgs& step, const float* from, float* to,
                                         Index stride) {
    Vec d[4][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) {
        d[y][x] = load(from + y * step.row_stride + x * step.column_stride);
      }
      transform(d[0][x], d[1][x], d[2][x], d[3][x]);
    }
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      transform(d[y][0], d[y][1], d[y][2], d[y][3]);
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) store(to + (y * 4 + x) * stride, d[y][x]);
    }
  }

  // The 2x2 outputs of one vector of channels from its 16 products.
  static ONP_INLINE void transform_output(const float* from, Index stride, Vec (&sums)[4][1]) {
    Vec rows[2][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const Vec a = load(from + x * stride), b = load(from + (4 + x) * stride);
      const Vec c = load(from + (8 + x) * stride), d = load(from + (12 + x) * stride);
      rows[0][x] = a + b + c;
      rows[1][x] = b - c - d;
    }
#pragma GCC unroll 2
    for (int y = 0; y < 2; ++y) {
      sums[y * 2][0] = rows[y][0] + rows[y][1] + rows[y][2];
      sums[y * 2 + 1][0] = rows[y][1] - rows[y][2] - rows[y][3];
    }
  }

  // products[p][..] = inputs[p][..] x weights for kPixels tiles at one point.
  template <int vectors>
  static __attribute__((noinline)) void multiply(const float* inputs, Index input_stride,
                                                 const float* weights, Index next_vector,
                                                 Index length, float* products,
                                                 Index product_stride) {
    const float* input[kPixels];
    for (int p = 0; p < kPixels; ++p) input[p] = inputs + p * input_stride;
    Vec sums[kPixels][vectors];
    clear(sums);
    accumulate(input, weights, next_vector, length, sums);
    for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        store(products + p * product_stride + v * kLanes, sums[p][v]);
      }
    }
  }

  static void winograd(const StepArgs& step) {
    const Index columns = (step.width + 1) / 2, rows = (step.pixels / step.width + 1) / 2;
    const Index total = step.images * rows * columns;
    const Index length = step.segment_length;
    const Index inputs = (length + kLanes - 1) / kLanes * kLanes;
    const Index outputs = (step.channels + kLanes - 1) / kLanes * kLanes;
    // One more cache line per point: at a multiple of 4 KiB all points would share a cache set.
    const Index input_point = kTiles * inputs + kChannelBlock;
    const Index output_point = kTiles * outputs + kChannelBlock;
    float* const transformed = step.scratch;  // [points][tiles, inputs]
    // [points][tiles, outputs]
    float* const products = transformed + kWinogradPoints * input_point;
    for (Index begin = 0; begin < total; begin += kTiles) {
      const Index tiles = begin + kTiles < total ? kTiles : total - begin;
      WinogradTile places[kTiles];
      for (Index t = 0; t < tiles; ++t) {
        locate(step, begin + t, places[t]);
        for (Index c = 0; c < inputs; c += kLanes) {
          transform_input(step, places[t].input + c, transformed + t * inputs + c, input_point);
        }
      }
      for (Index point = 0; point < kWinogradPoints; ++point) {
        const float* in = transformed + point * input_point;
        float* out = products + point * output_point;
        for (Index c = 0; c < outputs; c += 2 * kLanes) {
          const float* weights = block_weights(step, c) + point * length * kChannelBlock;
          for (Index t = 0; t < tiles; t += kPixels) {
            const auto product = c + kLanes < outputs ? multiply<2> : multiply<1>;
            product(in + t * inputs, inputs, weights, next_vector(step), length,
                    out + t * outputs + c, outputs);
          }
        }
      }
      for (Index t = 0; t < tiles; ++t) {
        for (Index c = 0; c < outputs; c += kLanes) {
          Vec sums[4][1];
          transform_output(products + t * outputs + c, output_point, sums);
          if (!places[t].right) {
            sums[1][0] = sums[0][0];
            sums[3][0] = sums[2][0];
          }
          if (!places[t].below) {
            sums[2][0] = sums[0][0];
            sums[3][0] = sums[1][0];
          }
          finish(step, places[t].outputs, c, sums);
        }
      }
    }
  }

  static void depthwise(const StepArgs& step) {
    for_each_group(step, [&](const Place* places, int tiles) {
      for (int t = 0; t < tiles; ++t) {
        const Place& place = places[t];
        for (Index c = 0; c < step.channels; c += kLanes) {
          Vec sums[kPixels][1];
          clear(sums);
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
          finish(step, place.outputs, c, sums);
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
          finish(step, place.outputs, c, results);
        }
      }
    });
  }

  static constexpr Kernels table(const char* name) {
    return {name, convolution, winograd, depthwise, pool<false>, pool<true>};
  }
};

}  // namespace
}  // namespace onp
