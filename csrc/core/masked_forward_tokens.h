// The kernels of a masked forward that look at all channels of a pixel, or at all pixels of an
// image: concatenation, layer norm and attention. Internal linkage, as in masked_forward_tile.h.
#pragma once

#include "core/masked_forward_bytes.h"
#include "core/masked_forward_smooth.h"

namespace onp {
namespace {

template <typename Simd>
struct TokenTile : Tile<Simd> {
  using Base = Tile<Simd>;
  using Vec = typename Simd::Vec;
  using Index = std::int64_t;
  using Base::address;
  using Base::kLanes;
  using Base::load;
  using Base::store;
  static constexpr int kVectors = kLanes < kChannelBlock ? 2 : 1;
  static constexpr int kStep = kVectors * kLanes;
  static constexpr int kQueries = Simd::tile_pixels;  // of an attention, taken together
  static_assert(kQueries <= kMostQueries, "attention_scratch has room for them");

  static ONP_INLINE Index whole(Index count) {
    return (count + kChannelBlock - 1) / kChannelBlock * kChannelBlock;
  }

  // The epilogue of one pixel whose results lie at `row`, padded to whole vectors.
  static ONP_INLINE void finish_row(const StepArgs& step, Index image, Index pixel,
                                    const float* row) {
    typename Base::template Outputs<1> outputs;
    outputs.set(step, 0, image, pixel);
    for (Index c = 0; c < step.channels; c += kLanes) {
      Vec sums[1][1] = {{load(row + c)}};
      Base::finish(step, outputs, c, sums);
    }
  }

  static void concatenation(const StepArgs& step) {
    float* const row = step.scratch;
    for (Index image = 0; image < step.images; ++image) {
      for (Index pixel = 0; pixel < step.pixels; ++pixel) {
        float* to = row;
        for (Index part = 0; part <= step.other_count; ++part) {
          const Operand& from = part == 0 ? step.input : step.others[part - 1];
          const Index channels = step.index[part];
          __builtin_memcpy(to, address(from, image, pixel),
                           static_cast<std::size_t>(channels) * sizeof(float));
          to += channels;
        }
        finish_row(step, image, pixel, row);
      }
    }
  }

  // The sum of what `term` makes of each of `count` values, whole vectors first.
  template <typename Term>
  static ONP_INLINE float sum(const float* values, Index count, const Term& term) {
    Vec sums = Simd::splat(0.0f);
    Index c = 0;
    for (; c + kLanes <= count; c += kLanes) sums += term(load(values + c));
    float parts[kLanes];
    store(parts, sums);
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += parts[lane];
    if (c < count) {
      for (int lane = 0; lane < kLanes; ++lane)
        parts[lane] = c + lane < count ? values[c + lane] : 0;
      store(parts, term(load(parts)));
      for (Index lane = 0; lane < count - c; ++lane) total += parts[lane];
    }
    return total;
  }

  static void layer_norm(const StepArgs& step) {
    const float inverse = 1.0f / static_cast<float>(step.channels);
    for (Index image = 0; image < step.images; ++image) {
      for (Index pixel = 0; pixel < step.pixels; ++pixel) {
        const float* row = address(step.input, image, pixel);
        const Vec mean =
            Simd::splat(inverse * sum(row, step.channels, [](Vec value) { return value; }));
        const float variance = inverse * sum(row, step.channels, [mean](Vec value) {
                                 return (value - mean) * (value - mean);
                               });
        const Vec scale = Simd::splat(1.0f / __builtin_sqrtf(variance + step.value));
        typename Base::template Outputs<1> outputs;
        outputs.set(step, 0, image, pixel);
        for (Index c = 0; c < step.channels; c += kLanes) {
          Vec sums[1][1] = {{(load(row + c) - mean) * scale}};
          Base::finish(step, outputs, c, sums);
        }
      }
    }
  }

  // results[p][j] = sum over i < length of left[p][i] * right[i][j] for kQueries rows and `width`
  // columns, a whole number of channel blocks.
  static ONP_INLINE void multiply(const float* left, Index left_row, const float* right,
                                  Index length, Index width, float* results) {
    const float* rows[kQueries];
    for (int p = 0; p < kQueries; ++p) rows[p] = left + p * left_row;
    for (Index j = 0; j < width; j += kStep) {
      Vec sums[kQueries][kVectors];
      Base::clear(sums);
      for (Index i = 0; i < length; ++i) {
        Vec row[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) row[v] = load(right + i * width + j + v * kLanes);
#pragma GCC unroll 32
        for (int p = 0; p < kQueries; ++p) {
          const Vec x = Simd::splat(rows[p][i]);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sums[p][v] = Simd::fma(x, row[v], sums[p][v]);
        }
      }
      for (int p = 0; p < kQueries; ++p) {
        for (int v = 0; v < kVectors; ++v) {
          store(results + p * width + j + v * kLanes, sums[p][v]);
        }
      }
    }
  }

  // exp(x - largest x) in place for the first `count` of `width` scores, 0 behind them; returns
  // their sum.
  static ONP_INLINE float exponentials(float* scores, Index count, Index width) {
    Vec tops = Simd::splat(scores[0]);
    Index i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const Vec values = load(scores + i);
      tops = Simd::larger(values, tops);
    }
    float parts[kLanes];
    store(parts, tops);
    float most = parts[0];
    for (int lane = 1; lane < kLanes; ++lane) most = parts[lane] > most ? parts[lane] : most;
    for (; i < count; ++i) most = scores[i] > most ? scores[i] : most;
    for (i = 0; i < width; i += kLanes) {
      store(scores + i, Smooth<Simd>::exp(load(scores + i) - Simd::splat(most)));
    }
    for (i = count; i < width; ++i) scores[i] = 0;
    return sum(scores, width, [](Vec value) { return value; });
  }

  static void attention(const StepArgs& step) {
    const Index size = step.channels / step.heads, keys = step.keys, queries = step.pixels;
    const Index columns = whole(keys), depth = whole(size), outputs = whole(step.channels);
    float* const turned = step.scratch;                // [size][columns]: a head's keys
    float* const values = turned + size * columns;     // [keys][depth]
    float* const asked = values + keys * depth;        // [kQueries][depth]: scaled queries
    float* const weights = asked + kQueries * depth;   // [kQueries][columns]
    float* const sums = weights + kQueries * columns;  // [kQueries][depth]
    float* const results = sums + kQueries * depth;    // [queries][outputs]
    for (float* padding = turned; padding < asked; ++padding) *padding = 0;
    for (Index image = 0; image < step.images; ++image) {
      for (Index head = 0; head < step.heads; ++head) {
        const std::int32_t* read_query = step.index + head * size;
        const std::int32_t* read_key = read_query + step.channels;
        const std::int32_t* read_value = read_key + step.channels;
        for (Index t = 0; t < keys; ++t) {
          const float* key = address(step.others[0], image, t);
          const float* value = address(step.others[1], image, t);
          for (Index d = 0; d < size; ++d) turned[d * columns + t] = key[read_key[d]];
          for (Index d = 0; d < size; ++d) values[t * depth + d] = value[read_value[d]];
        }
        for (Index first = 0; first < queries; first += kQueries) {
          for (int p = 0; p < kQueries; ++p) {
            const Index pixel = first + p < queries ? first + p : queries - 1;
            const float* query = address(step.input, image, pixel);
            for (Index d = 0; d < size; ++d) {
              asked[p * depth + d] = query[read_query[d]] * step.value;
            }
          }
          multiply(asked, depth, turned, size, columns, weights);
          float inverse[kQueries];
          for (int p = 0; p < kQueries; ++p) {
            inverse[p] = 1.0f / exponentials(weights + p * columns, keys, columns);
          }
          multiply(weights, columns, values, keys, depth, sums);
          for (int p = 0; p < kQueries && first + p < queries; ++p) {
            float* const to = results + (first + p) * outputs + head * size;
            for (Index d = 0; d < size; ++d) to[d] = sums[p * depth + d] * inverse[p];
          }
        }
      }
      for (Index pixel = 0; pixel < queries; ++pixel) {
        finish_row(step, image, pixel, results + pixel * outputs);
      }
    }
  }
};

template <typename Simd>
constexpr Kernels kernel_table(const char* name) {
  using Plain = Tile<Simd>;
  using Tokens = TokenTile<Simd>;
  return {name,
          Plain::convolution,
          Plain::template winograd<2>,
          Plain::template winograd<4>,
          Plain::depthwise,
          ByteTile<Simd>::convolution,
          Plain::template pool<false>,
          Plain::template pool<true>,
          Tokens::concatenation,
          Tokens::layer_norm,
          Tokens::attention};
}

}  // namespace
}  // namespace onp
