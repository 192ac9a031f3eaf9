// The kernels of a masked gradient that look at whole pixels: norms and attention; and the table of
// all. Internal linkage, as in masked_forward_tile.h.
#pragma once

#include "core/masked_forward_tokens.h"
#include "core/masked_gradient_tile.h"

namespace onp {
namespace {

template <typename Simd>
struct TokenGradientTile : TokenTile<Simd> {
  using Base = TokenTile<Simd>;
  using Vec = typename Simd::Vec;
  using Index = std::int64_t;
  using Base::address;
  using Base::gather;
  using Base::kLanes;
  using Base::kWide;
  using Base::load;
  using Base::store;
  using Base::whole;
  using typename Base::Matrix;
  using typename Base::Normal;

  // With y the normal values: scale * (gradient - its mean - y * the mean of gradient * y).
  static void layer_norm(const LayerNormPullArgs& args) {
    const float inverse = 1.0f / static_cast<float>(args.channels);
    for (Index image = 0; image < args.images; ++image) {
      for (Index pixel = 0; pixel < args.pixels; ++pixel) {
        const float* row = address(args.input, {image, pixel});
        const float* gradient = address(args.gradient, {image, pixel});
        float* to = address(args.to, {image, pixel});
        const Normal normal(row, args.channels, args.epsilon);
        const Vec mean = Simd::splat(inverse * Base::sum(gradient, gradient, args.channels,
                                                         [](Vec one, Vec) { return one; }));
        const Vec along =
            Simd::splat(inverse * Base::sum(gradient, row, args.channels, [&](Vec one, Vec value) {
                          return one * normal(value);
                        }));
        for (Index c = 0; c < args.channels; c += kLanes) {
          const Vec away = load(gradient + c) - mean - normal(load(row + c)) * along;
          const Vec before = args.add ? load(to + c) : Simd::splat(0.0f);
          store(to + c, Simd::fma(away, normal.scale, before));
        }
      }
    }
  }

  // The same with means over each group's channels and all pixels.
  static void group_norm(const GroupNormPullArgs& args) {
    const Index width = whole(args.channels);
    float* const means = args.scratch;
    float* const scales = means + width;
    float* const sums = scales + width;  // of gradients
    float* const along = sums + width;   // of gradients times normal values
    const float share =
        static_cast<float>(args.groups) / static_cast<float>(args.pixels * args.channels);
    for (Index image = 0; image < args.images; ++image) {
      Base::group_moments(args.input, image, args.pixels, args.channels, args.groups, args.epsilon,
                          means, scales);
      for (Index c = 0; c < args.channels; c += kLanes) {
        const Vec mean = load(means + c), scale = load(scales + c);
        Vec total = Simd::splat(0.0f), matching = Simd::splat(0.0f);
        for (Index p = 0; p < args.pixels; ++p) {
          const Vec gradient = load(address(args.gradient, {image, p}) + c);
          const Vec normal = (load(address(args.input, {image, p}) + c) - mean) * scale;
          total += gradient;
          matching = Simd::fma(gradient, normal, matching);
        }
        store(sums + c, total);
        store(along + c, matching);
      }
      Base::sum_groups(sums, args.channels, args.groups, share);
      Base::sum_groups(along, args.channels, args.groups, share);
      for (Index p = 0; p < args.pixels; ++p) {
        const float* row = address(args.input, {image, p});
        const float* gradient = address(args.gradient, {image, p});
        float* to = address(args.to, {image, p});
        for (Index c = 0; c < args.channels; c += kLanes) {
          const Vec scale = load(scales + c);
          const Vec normal = (load(row + c) - load(means + c)) * scale;
          const Vec away = load(gradient + c) - load(sums + c) - normal * load(along + c);
          const Vec before = args.add ? load(to + c) : Simd::splat(0.0f);
          store(to + c, Simd::fma(away, scale, before));
        }
      }
    }
  }

  // results[p][j] = sum over i < length of left(p, i) * right[i][j] for `rows` rows and `columns`
  // columns, a multiple of a channel block: right's and results' rows are that far apart.
  static void multiply(const Matrix& left, Index rows, const float* right, Index length,
                       Index columns, float* results) {
    for (Index j = 0; j < columns; j += kWide * kLanes) {
      Base::template multiply<kWide>(left, rows, right + j, length, columns, results + j);
    }
  }

  // turned[d][t] = rows[t][d], for `pixels` rows `depth` apart; rows of `turned` are `width` apart.
  static void turn(const float* rows, Index pixels, Index depth, Index size, Index width,
                   float* turned) {
    for (Index d = 0; d < size; ++d) {
      for (Index t = 0; t < pixels; ++t) turned[d * width + t] = rows[t * depth + d];
    }
  }

  // Channel index[d] of pixel t += factor * rows[t][d].
  static void scatter(const Operand& to, Index image, Index pixels, const std::int32_t* index,
                      Index size, Index depth, float factor, const float* rows) {
    const bool together = Base::in_order(index, size);
    for (Index t = 0; t < pixels; ++t, rows += depth) {
      float* const sums = address(to, {image, t});
      Index d = 0;
      for (; together && d + kLanes <= size; d += kLanes) {
        float* const some = sums + index[0] + d;
        store(some, Simd::fma(load(rows + d), Simd::splat(factor), load(some)));
      }
      for (; d < size; ++d) sums[index[d]] += factor * rows[d];
    }
  }

  // The weights of each query's keys, [keys][width], from their scores, in place.
  static void softmax(float* scores, Index keys, Index width) {
    for (Index q = 0; q < width; q += kLanes) {
      float inverse[kLanes];
      Base::template exponentials<1>(scores + q, keys, width, inverse);
      const Vec share = load(inverse);
      for (Index t = 0; t < keys; ++t) {
        float* weight = scores + t * width + q;
        store(weight, load(weight) * share);
      }
    }
  }

  // With weights w and their gradients g: g = w * (g - sum over keys of w * g), in place.
  static void softmax_pull(const float* weights, Index keys, Index width, float* gradients) {
    for (Index q = 0; q < width; q += kLanes) {
      Vec sum = Simd::splat(0.0f);
      for (Index t = 0; t < keys; ++t) {
        sum = Simd::fma(load(weights + t * width + q), load(gradients + t * width + q), sum);
      }
      for (Index t = 0; t < keys; ++t) {
        float* gradient = gradients + t * width + q;
        store(gradient, load(weights + t * width + q) * (load(gradient) - sum));
      }
    }
  }

  static void attention(const AttentionPullArgs& args) {
    const Index queries = args.queries, keys = args.keys;
    const Index size = args.channels / args.heads, depth = whole(size), width = whole(queries);
    float* const asked = args.scratch;                    // [queries][depth]
    float* const pulled = asked + queries * depth;        // [queries][depth]: what flows back
    float* const key_rows = pulled + queries * depth;     // [keys][depth]
    float* const values = key_rows + keys * depth;        // [keys][depth]
    float* const turned_asked = values + keys * depth;    // [size][width], scaled
    float* const turned = turned_asked + size * width;    // [size][width]: of `pulled`
    float* const weights = turned + size * width;         // [keys][width]
    float* const slopes = weights + keys * width;         // [keys][width]
    float* const of_queries = slopes + keys * width;      // [queries][depth]
    float* const of_keys = of_queries + queries * depth;  // [keys][depth]
    for (float* padding = asked; padding < weights; ++padding) *padding = 0;
    for (Index image = 0; image < args.images; ++image) {
      for (Index head = 0; head < args.heads; ++head) {
        const std::int32_t* const index = args.index + head * size;
        gather(args.input[0], image, queries, index, size, asked, depth);
        gather(args.input[1], image, keys, index + args.channels, size, key_rows, depth);
        gather(args.input[2], image, keys, index + 2 * args.channels, size, values, depth);
        for (Index t = 0; t < queries; ++t) {
          const float* gradient = address(args.gradient, {image, t}) + head * size;
          Base::copy(pulled + t * depth, gradient, size);
          for (Index d = 0; d < size; ++d) asked[t * depth + d] *= args.factor;
        }
        turn(asked, queries, depth, size, width, turned_asked);
        turn(pulled, queries, depth, size, width, turned);
        multiply({key_rows, depth, 1}, keys, turned_asked, size, width, weights);
        softmax(weights, keys, width);
        multiply({values, depth, 1}, keys, turned, size, width, slopes);
        softmax_pull(weights, keys, width, slopes);
        if (args.to[0].data) {
          multiply({slopes, 1, width}, queries, key_rows, keys, depth, of_queries);
          scatter(args.to[0], image, queries, index, size, depth, args.factor, of_queries);
        }
        if (args.to[1].data) {
          multiply({slopes, width, 1}, keys, asked, queries, depth, of_keys);
          scatter(args.to[1], image, keys, index + args.channels, size, depth, 1.0f, of_keys);
        }
        if (args.to[2].data) {
          multiply({weights, width, 1}, keys, pulled, queries, depth, of_keys);
          scatter(args.to[2], image, keys, index + 2 * args.channels, size, depth, 1.0f, of_keys);
        }
      }
    }
  }
};

template <typename Simd>
constexpr GradientKernels gradient_table(const char* name) {
  using Plain = GradientTile<Simd>;
  using Tokens = TokenGradientTile<Simd>;
  return {name,
          Plain::moments,
          Plain::pull,
          Plain::template pool<false>,
          Plain::template pool<true>,
          Plain::split,
          Plain::product,
          Tokens::layer_norm,
          Tokens::group_norm,
          Tokens::attention};
}

}  // namespace
}  // namespace onp
