// The kernels of a masked gradient over a vector type; see masked_forward_tile.h for the Simd that
// they are written over and for why everything here has internal linkage.
//
// Every kernel goes image by image and channel block by channel block: what belongs to an image's
// channels stays in registers while its pixels pass by, a cache line each.
#pragma once

#include "core/masked_forward_tile.h"
#include "core/masked_gradient_kernels.h"

namespace onp {
namespace {

template <typename Simd>
struct GradientTile {
  using Base = Tile<Simd>;
  using Vec = typename Simd::Vec;
  using IntVec = typename Simd::IntVec;
  using Index = std::int64_t;
  static constexpr int kLanes = Simd::lanes;
  static constexpr int kVectors = kChannelBlock / kLanes;
  // Channels past the last one are computed too, and never read.
  struct Block {
    Vec v[kVectors];
  };

  template <typename Function>
  static ONP_INLINE Block each(const Function& function) {
    Block block;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) block.v[i] = function(i);
    return block;
  }
  static ONP_INLINE Block splat(float x) {
    return each([&](int) { return Simd::splat(x); });
  }
  static ONP_INLINE Block load(const float* from) {
    return each([&](int i) { return Base::load(from + i * kLanes); });
  }
  static ONP_INLINE void store(float* to, const Block& block) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) Base::store(to + i * kLanes, block.v[i]);
  }
  static ONP_INLINE Block add(const Block& a, const Block& b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static ONP_INLINE Block multiply(const Block& a, const Block& b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static ONP_INLINE Block fma(const Block& a, const Block& b, const Block& c) {
    return each([&](int i) { return Simd::fma(a.v[i], b.v[i], c.v[i]); });
  }
  // The gradient where an activation passed it, by the bits of its block, 0 elsewhere.
  static ONP_INLINE Block pass(const Block& gradient, const std::uint8_t* passed) {
    return each([&](int i) {
      typename Base::Bits bits;
      __builtin_memcpy(&bits, passed + i * static_cast<Index>(sizeof(bits)), sizeof(bits));
      return Simd::only(bits, gradient.v[i]);
    });
  }

  // Up to a block of unpadded values, `otherwise` beyond them and where there are none.
  static Block gather(const PerImage& from, Index image, Index channel, Index channels,
                      float otherwise) {
    if (!from.data) return splat(otherwise);
    const float* row = from.data + image * from.stride + channel;
    if (channels - channel >= kChannelBlock) return load(row);
    float values[kChannelBlock];
    for (int i = 0; i < kChannelBlock; ++i) {
      values[i] = i < channels - channel ? row[i] : otherwise;
    }
    return load(values);
  }

  static void scatter(const Block& block, float* to, Index channels) {
    float values[kChannelBlock];
    store(values, block);
    for (Index i = 0; i < channels && i < kChannelBlock; ++i) to[i] = values[i];
  }

  // The channel block of one image in a buffer; null where the buffer is absent.
  struct Plane {
    float* data;
    const std::int32_t* offset;
    Plane(const Operand& operand, Index image, Index channel)
        : data(operand.data ? operand.data + image * operand.image_stride + channel : nullptr),
          offset(operand.offset) {}
    ONP_INLINE float* at(Index pixel) const { return data + offset[pixel]; }
    ONP_INLINE explicit operator bool() const { return data; }
  };

  template <typename Body>
  static ONP_INLINE void for_each_block(Index images, Index channels, const Body& body) {
    for (Index n = 0; n < images; ++n) {
      for (Index c = 0; c < channels; c += kChannelBlock) body(n, c);
    }
  }

  static void moments(const MomentsArgs& args) {
    const Block share = splat(1.0f / static_cast<float>(args.pixels));
    for_each_block(args.images, args.channels, [&](Index n, Index c) {
      const Plane values(args.values, n, c);
      Block sum = splat(0.0f), squares = splat(0.0f);
      for (Index p = 0; p < args.pixels; ++p) sum = add(sum, load(values.at(p)));
      const Block mean = multiply(sum, share);
      // In a pass of its own: mean squares minus squared means cancel.
      for (Index p = 0; p < args.pixels; ++p) {
        const float* x = values.at(p);
        const Block away = each([&](int i) { return Base::load(x + i * kLanes) - mean.v[i]; });
        squares = fma(away, away, squares);
      }
      scatter(mean, args.mean + n * args.stride + c, args.channels - c);
      scatter(multiply(squares, share), args.variance + n * args.stride + c, args.channels - c);
    });
  }

  static void pull(const PullArgs& args) {
    for_each_block(args.images, args.channels, [&](Index n, Index c) {
      const Plane upstream(args.final_gradient, n, c), active(args.active, n, c);
      const Plane scaled(args.scaled.values, n, c), result(args.result.values, n, c);
      const Plane plain(args.plain_gradient, n, c);
      const Plane first_slope(args.first_slope, n, c), second_slope(args.second_slope, n, c);
      const Plane residual(args.residual_gradient, n, c), out(args.operation_gradient, n, c);
      const Block gate = gather(args.gates, n, c, args.channels, 1.0f);
      const Block scaled_slope = gather(args.scaled.slope, n, c, args.channels, 0.0f);
      const Block scaled_offset = gather(args.scaled.offset, n, c, args.channels, 0.0f);
      const Block result_slope = gather(args.result.slope, n, c, args.channels, 0.0f);
      const Block result_offset = gather(args.result.offset, n, c, args.channels, 0.0f);
      const Block scale = args.scale ? load(args.scale + c) : splat(1.0f);
      const auto passed = [&](const std::uint8_t* bits, const Plane& slope, const Block& gradient,
                              Index pixel) {
        if (slope) return multiply(gradient, load(slope.at(pixel)));
        if (!bits) return gradient;
        return pass(gradient, Base::bits_at(bits, args.channels, n * args.pixels + pixel, c));
      };
      Block gate_gradient = splat(0.0f);
      for (Index p = 0; p < args.pixels; ++p) {
        Block d = splat(0.0f);
        if (upstream) {
          d = load(upstream.at(p));
          if (args.gate_gradient) gate_gradient = fma(d, load(active.at(p)), gate_gradient);
          if (args.gates.data) d = multiply(d, gate);
          d = passed(args.second_passed, second_slope, d, p);
        }
        if (scaled) d = add(d, fma(load(scaled.at(p)), scaled_slope, scaled_offset));
        if (args.scale) d = multiply(d, scale);
        if (plain) d = add(d, load(plain.at(p)));
        d = passed(args.first_passed, first_slope, d, p);
        if (residual) {
          store(residual.at(p), args.add_to_residual ? add(d, load(residual.at(p))) : d);
        }
        if (result) d = add(d, fma(load(result.at(p)), result_slope, result_offset));
        store(out.at(p), d);
      }
      if (args.gate_gradient) {
        scatter(gate_gradient, args.gate_gradient + n * args.gates.stride + c, args.channels - c);
      }
    });
  }

  template <bool average>
  static void pool(const PoolPullArgs& args) {
    for_each_block(args.images, args.channels, [&](Index n, Index c) {
      const Plane gradient(args.gradient, n, c), input(args.input, n, c);
      const Plane to(args.input_gradient, n, c);
      for (Index p = 0; p < args.pixels; ++p) {
        const Window& window = args.windows[p];
        for (int v = 0; v < kChannelBlock; v += kLanes) {
          Vec left = Base::load(gradient.at(p) + v);
          if (average) left *= Simd::splat(window.inverse);
          const float* values = average ? nullptr : input.at(p) + v;
          float* sums = to.at(p) + v;
          Vec most = average ? left : Base::load(values);
          for (Index y = 0; !average && y < window.rows; ++y) {
            for (Index x = 0; x < window.columns; ++x) {
              const Vec value = Base::load(values + y * args.input_row + x * args.input_column);
              most = Simd::larger(value, most);
            }
          }
          for (Index y = 0; y < window.rows; ++y) {
            for (Index x = 0; x < window.columns; ++x) {
              float* sum = sums + y * args.gradient_row + x * args.gradient_column;
              if (average) {
                Base::store(sum, Base::load(sum) + left);
                continue;
              }
              // The gradient goes to the first value that is the largest; then none is left.
              const Vec value = Base::load(values + y * args.input_row + x * args.input_column);
              const Vec zero = Simd::splat(0.0f);
              Base::store(sum, Base::load(sum) + (value == most ? left : zero));
              left = value == most ? zero : left;
            }
          }
        }
      }
    });
  }

  static void split(const SplitArgs& args) {
    for_each_block(args.images, args.channels, [&](Index n, Index c) {
      const Plane from(args.gradient, n, c), to(args.to, n, c);
      for (Index p = 0; p < args.pixels; ++p) {
        const Block d = load(from.at(p));
        store(to.at(p), args.add ? add(d, load(to.at(p))) : d);
      }
    });
  }

  static void product(const ProductPullArgs& args) {
    for_each_block(args.images, args.channels, [&](Index n, Index c) {
      const Plane gradient(args.gradient, n, c);
      const Plane one(args.input[0], n, c), two(args.input[1], n, c);
      const Plane to_one(args.to[0], n, c), to_two(args.to[1], n, c);
      Block sum = splat(0.0f);
      for (Index p = 0; p < args.pixels; ++p) {
        const Index q = args.one_pixel ? 0 : p;
        const Block d = load(gradient.at(p));
        if (to_one) {
          const Block pulled = multiply(d, load(two.at(q)));
          store(to_one.at(p), args.add[0] ? add(pulled, load(to_one.at(p))) : pulled);
        }
        if (!to_two) continue;
        sum = args.one_pixel ? fma(d, load(one.at(p)), sum) : multiply(d, load(one.at(p)));
        if (!args.one_pixel) store(to_two.at(q), args.add[1] ? add(sum, load(to_two.at(q))) : sum);
      }
      if (to_two && args.one_pixel) {
        store(to_two.at(0), args.add[1] ? add(sum, load(to_two.at(0))) : sum);
      }
    });
  }
};

}  // namespace
}  // namespace onp
