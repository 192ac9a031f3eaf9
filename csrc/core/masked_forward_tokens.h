// The kernels of a masked forward that look at all channels of a pixel, or at all pixels of an
// image: concatenation, product, norms and attention. Internal linkage, as in
// masked_forward_tile.h.
#pragma once

#include "core/masked_forward_narrow.h"
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
  static constexpr int kRows = Simd::tile_pixels, kFewRows = 4;  // of a matrix product's tiles
  static constexpr int kWide = kLanes < kChannelBlock ? 2 : 1;   // vectors that divide a block
  static constexpr int kQueries = 2 * kLanes;                    // of an attention, taken together
  static_assert(kQueries <= kMostQueries, "attention_scratch has room for them");

  static ONP_INLINE Index whole(Index count) {
    return (count + kChannelBlock - 1) / kChannelBlock * kChannelBlock;
  }

  // The epilogue of one pixel whose results lie at `row`, padded to whole vectors.
  static ONP_INLINE void finish_row(const StepArgs& step, Index image, Index pixel,
                                    const float* row) {
    typename Base::template Outputs<1> outputs{};
    outputs.set(step, {{image, pixel}});
    for (Index c = 0; c < step.channels; c += kLanes) {
      Vec sums[1][1] = {{load(row + c)}};
      Base::finish(step, outputs, c, sums);
    }
  }

  // Lanes past the last channel are written too: what is read as pairs may meet the first of them.
  static ONP_INLINE void clear_padding(float* row, Index channels) {
    for (Index c = channels; c < whole(channels); ++c) row[c] = 0;
  }

  static void concatenation(const StepArgs& step) {
    float* const row = step.scratch;
    clear_padding(row, step.channels);
    for (Index image = 0; image < step.images; ++image) {
      for (Index pixel = 0; pixel < step.pixels; ++pixel) {
        float* to = row;
        for (Index part = 0; part <= step.other_count; ++part) {
          const Operand& from = part == 0 ? step.input : step.others[part - 1];
          const Index channels = step.index[part];
          __builtin_memcpy(to, address(from, {image, pixel}),
                           static_cast<std::size_t>(channels) * sizeof(float));
          to += channels;
        }
        finish_row(step, image, pixel, row);
      }
    }
  }

  static void product(const StepArgs& step) {
    const Operand& other = step.others[0];
    for (Index image = 0; image < step.images; ++image) {
      for (Index pixel = 0; pixel < step.pixels; ++pixel) {
        const float* one = address(step.input, {image, pixel});
        const float* two = address(other, {image, step.keys == 1 ? 0 : pixel});
        typename Base::template Outputs<1> outputs{};
        outputs.set(step, {{image, pixel}});
        for (Index c = 0; c < step.channels; c += kLanes) {
          Vec values[1][1] = {{load(one + c) * load(two + c)}};
          Base::finish(step, outputs, c, values);
        }
      }
    }
  }

  // The sum of what `term` makes of each of `count` pairs of values, whole vectors first.
  template <typename Term>
  static ONP_INLINE float sum(const float* a, const float* b, Index count, const Term& term) {
    Vec sums = Simd::splat(0.0f);
    Index c = 0;
    for (; c + kLanes <= count; c += kLanes) sums += term(load(a + c), load(b + c));
    if (c < count) {
      float last[2][kLanes] = {};
      for (Index lane = 0; lane < count - c; ++lane) {
        last[0][lane] = a[c + lane];
        last[1][lane] = b[c + lane];
      }
      const Vec rest = term(load(last[0]), load(last[1]));
      store(last[0], rest);
      for (Index lane = count - c; lane < kLanes; ++lane) last[0][lane] = 0;
      sums += load(last[0]);
    }
    return Simd::sum(sums);
  }

  // (value - mean) * scale is at mean 0 and variance 1 over a pixel's channels.
  struct Normal {
    Vec mean, scale;

    Normal(const float* row, Index channels, float epsilon) {
      const float inverse = 1.0f / static_cast<float>(channels);
      const Vec middle =
          Simd::splat(inverse * sum(row, row, channels, [](Vec value, Vec) { return value; }));
      const float variance = inverse * sum(row, row, channels, [middle](Vec value, Vec) {
                               return (value - middle) * (value - middle);
                             });
      mean = middle;
      scale = Simd::splat(1.0f / __builtin_sqrtf(variance + epsilon));
    }
    ONP_INLINE Vec operator()(Vec value) const { return (value - mean) * scale; }
  };

  static void layer_norm(const StepArgs& step) {
    for (Index image = 0; image < step.images; ++image) {
      for (Index pixel = 0; pixel < step.pixels; ++pixel) {
        const float* row = address(step.input, {image, pixel});
        const Normal normal(row, step.channels, step.value);
        typename Base::template Outputs<1> outputs{};
        outputs.set(step, {{image, pixel}});
        for (Index c = 0; c < step.channels; c += kLanes) {
          Vec sums[1][1] = {{normal(load(row + c))}};
          Base::finish(step, outputs, c, sums);
        }
      }
    }
  }

  // Every channel's sum becomes its group's, times `share`; 0 in lanes past the last channel.
  static ONP_INLINE void sum_groups(float* sums, Index channels, Index groups, float share) {
    clear_padding(sums, channels);
    const Index size = channels / groups;
    for (Index first = 0; first < channels; first += size) {
      float total = 0;
      for (Index c = first; c < first + size; ++c) total += sums[c];
      for (Index c = first; c < first + size; ++c) sums[c] = total * share;
    }
  }

  // (value - means[c]) * scales[c] is at mean 0 and variance 1 over a group's channels and pixels.
  static void group_moments(const Operand& from, Index image, Index pixels, Index channels,
                            Index groups, float epsilon, float* means, float* scales) {
    const float share = static_cast<float>(groups) / static_cast<float>(pixels * channels);
    for (Index c = 0; c < channels; c += kLanes) {
      Vec total = Simd::splat(0.0f);
      for (Index p = 0; p < pixels; ++p) total += load(address(from, {image, p}) + c);
      store(means + c, total);
    }
    sum_groups(means, channels, groups, share);
    for (Index c = 0; c < channels; c += kLanes) {
      const Vec mean = load(means + c);
      Vec squares = Simd::splat(0.0f);
      for (Index p = 0; p < pixels; ++p) {
        const Vec away = load(address(from, {image, p}) + c) - mean;
        squares = Simd::fma(away, away, squares);
      }
      store(scales + c, squares);
    }
    sum_groups(scales, channels, groups, share);
    for (Index c = 0; c < channels; ++c) scales[c] = 1.0f / __builtin_sqrtf(scales[c] + epsilon);
  }

  static void group_norm(const StepArgs& step) {
    float* const means = step.scratch;
    float* const scales = means + whole(step.channels);
    for (Index image = 0; image < step.images; ++image) {
      group_moments(step.input, image, step.pixels, step.channels, step.heads, step.value, means,
                    scales);
      for (Index pixel = 0; pixel < step.pixels; ++pixel) {
        const float* row = address(step.input, {image, pixel});
        typename Base::template Outputs<1> outputs{};
        outputs.set(step, {{image, pixel}});
        for (Index c = 0; c < step.channels; c += kLanes) {
          Vec values[1][1] = {{(load(row + c) - load(means + c)) * load(scales + c)}};
          Base::finish(step, outputs, c, values);
        }
      }
    }
  }

  // A matrix as it lies: (i, j) is at data[i * row + j * column].
  struct Matrix {
    const float* data;
    Index row, column;
  };

  // results[p][j] = sum over i < length of left(p, i) * right[i][j], for `rows` rows and `vectors`
  // vectors of columns; right and results have rows `width` apart.
  template <int rows, int vectors>
  static ONP_INLINE void tile(const Matrix& left, const float* right, Index length, Index width,
                              float* results) {
    const float* from = left.data;
    Vec sums[rows][vectors];
    Base::clear(sums);
    for (Index i = 0; i < length; ++i) {
      Vec lanes[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) lanes[v] = load(right + v * kLanes);
#pragma GCC unroll 32
      for (int p = 0; p < rows; ++p) {
        const Vec x = Simd::splat(from[p * left.row]);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) sums[p][v] = Simd::fma(x, lanes[v], sums[p][v]);
      }
      from += left.column;
      right += width;
    }
    for (int p = 0; p < rows; ++p) {
      for (int v = 0; v < vectors; ++v) store(results + p * width + v * kLanes, sums[p][v]);
    }
  }

  // The same for `count` rows.
  template <int vectors>
  static ONP_INLINE void multiply(Matrix left, Index count, const float* right, Index length,
                                  Index width, float* results) {
    const auto next = [&](Index rows) {
      count -= rows;
      left.data += rows * left.row;
      results += rows * width;
    };
    for (; count >= kRows; next(kRows)) tile<kRows, vectors>(left, right, length, width, results);
    for (; count >= kFewRows; next(kFewRows)) {
      tile<kFewRows, vectors>(left, right, length, width, results);
    }
    for (; count > 0; next(1)) tile<1, vectors>(left, right, length, width, results);
  }

  // exp(x - largest x) over the keys, in place, of every query of scores [keys][vectors], rows
  // `width` apart; 1 over each query's sum.
  template <int vectors>
  static ONP_INLINE void exponentials(float* scores, Index keys, Index width, float* inverse) {
    for (int v = 0; v < vectors; ++v) {
      float* const lanes = scores + v * kLanes;
      Vec tops[kFewRows];  // side by side: one alone waits for itself
      for (int r = 0; r < kFewRows; ++r) tops[r] = load(lanes + (r < keys ? r : 0) * width);
      Index t = kFewRows;
      for (; t + kFewRows <= keys; t += kFewRows) {
#pragma GCC unroll 4
        for (int r = 0; r < kFewRows; ++r) {
          tops[r] = Simd::larger(load(lanes + (t + r) * width), tops[r]);
        }
      }
      for (; t < keys; ++t) tops[0] = Simd::larger(load(lanes + t * width), tops[0]);
      const Vec most = Simd::larger(Simd::larger(tops[0], tops[1]), Simd::larger(tops[2], tops[3]));
      Vec sums = Simd::splat(0.0f);
      for (t = 0; t < keys; ++t) {
        const Vec weight = Smooth<Simd>::exp(load(lanes + t * width) - most);
        store(lanes + t * width, weight);
        sums += weight;
      }
      store(inverse + v * kLanes, Simd::splat(1.0f) / sums);
    }
  }

  // One head of an attention.
  struct Head {
    const float* keys;    // [count][size]
    const float* values;  // [count][depth], zeros behind `size`
    Index count, size, depth;
  };

  // A head's outputs [queries][depth] for queries that lie side by side in vectors, asked
  // [size][vectors], so that their sums over keys need none over lanes; scores: [count][vectors] of
  // scratch.
  template <int vectors>
  static __attribute__((noinline)) void attend(const Head& head, const float* asked, Index queries,
                                               float* scores, float* outputs) {
    constexpr Index width = vectors * kLanes;
    const Index size = head.size, count = head.count, depth = head.depth;
    multiply<vectors>({head.keys, size, 1}, count, asked, size, width, scores);
    float inverse[width];
    exponentials<vectors>(scores, count, width, inverse);
    for (Index d = 0; d < depth; d += kWide * kLanes) {
      multiply<kWide>({scores, 1, width}, queries, head.values + d, count, depth, outputs + d);
    }
    for (Index q = 0; q < queries; ++q) {
      for (Index d = 0; d < depth; d += kLanes) {
        float* const lanes = outputs + q * depth + d;
        store(lanes, load(lanes) * Simd::splat(inverse[q]));
      }
    }
  }

  // Whether channels follow each other.
  static ONP_INLINE bool in_order(const std::int32_t* index, Index size) {
    bool all = true;
    for (Index d = 1; d < size; ++d) all &= index[d] == index[0] + d;
    return all;
  }

  // rows[t][d] = channel index[d] of pixel t, rows `stride` apart.
  static ONP_INLINE void gather(const Operand& from, Index image, Index pixels,
                                const std::int32_t* index, Index size, float* rows, Index stride) {
    const bool together = in_order(index, size);
    for (Index t = 0; t < pixels; ++t, rows += stride) {
      const float* row = address(from, {image, t});
      if (together) {
        copy(rows, row + index[0], size);
      } else {
        for (Index d = 0; d < size; ++d) rows[d] = row[index[d]];
      }
    }
  }

  static ONP_INLINE void copy(float* to, const float* from, Index count) {
    __builtin_memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
  }

  static void attention(const StepArgs& step) {
    const Index size = step.channels / step.heads, keys = step.keys, queries = step.pixels;
    const Index depth = whole(size), outputs = whole(step.channels);
    float* const key_rows = step.scratch;               // [keys][size]
    float* const values = key_rows + keys * size;       // [keys][depth]
    float* const asked = values + keys * depth;         // [size][kQueries], scaled
    float* const scores = asked + size * kQueries;      // [keys][kQueries]
    float* const answers = scores + keys * kQueries;    // [kQueries][depth]
    float* const results = answers + kQueries * depth;  // [queries][outputs]
    for (float* padding = values; padding < asked; ++padding) *padding = 0;
    for (Index q = 0; q < queries; ++q) clear_padding(results + q * outputs, step.channels);
    for (Index image = 0; image < step.images; ++image) {
      for (Index head = 0; head < step.heads; ++head) {
        const std::int32_t* read_query = step.index + head * size;
        const std::int32_t* read_key = read_query + step.channels;
        gather(step.others[0], image, keys, read_key, size, key_rows, size);
        gather(step.others[1], image, keys, read_key + step.channels, size, values, depth);
        const Head now = {key_rows, values, keys, size, depth};
        for (Index first = 0; first < queries; first += kQueries) {
          const Index count = queries - first < kQueries ? queries - first : kQueries;
          const Index width = count > kLanes ? kQueries : kLanes;
          for (Index q = 0; q < width; ++q) {
            const float* query = address(step.input, {image, first + (q < count ? q : 0)});
            for (Index d = 0; d < size; ++d) {
              asked[d * width + q] = query[read_query[d]] * step.value;
            }
          }
          (width > kLanes ? attend<2> : attend<1>)(now, asked, count, scores, answers);
          for (Index q = 0; q < count; ++q) {
            copy(results + (first + q) * outputs + head * size, answers + q * depth, size);
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
          Plain::template winograd<2, 1>,
          Plain::template winograd<4, 1>,
          Plain::template winograd<2, 2>,
          Plain::template winograd<4, 2>,
          Plain::depthwise,
          byte_convolution<Simd>,
          half_convolution<Simd>,
          Plain::template pool<false>,
          Plain::template pool<true>,
          Tokens::concatenation,
          Tokens::layer_norm,
          Tokens::attention,
          Tokens::product,
          Tokens::group_norm};
}

}  // namespace
}  // namespace onp
