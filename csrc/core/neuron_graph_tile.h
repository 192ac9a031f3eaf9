// The kernels of the neuron graph, written once over the including file's Vectors; everything here
// has internal linkage.
#pragma once

#include "core/neuron_graph_kernels.h"
#include "core/vectors.h"

namespace onp {
namespace {

using Vec = Vectors::Vec;
using IntVec = Vectors::IntVec;
using Index = std::int64_t;
constexpr int kLanes = Vectors::lanes;
constexpr int kParts = static_cast<int>(kGroups) / kLanes;  // vectors of kGroups floats

constexpr float kNaN = __builtin_nanf("");
constexpr float kInfinity = __builtin_inff();

ONP_INLINE Vec load(const float* from) {
  Vec value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

ONP_INLINE void store(const Vec& value, float* to) { __builtin_memcpy(to, &value, sizeof value); }

ONP_INLINE Index smaller(Index a, Index b) { return a < b ? a : b; }

ONP_INLINE Vec magnitude(Vec value) {
  const IntVec bits = (IntVec)value & 0x7fffffff;
  return (Vec)bits;
}

// 0, 1, 2, ...
ONP_INLINE IntVec lane_numbers() {
  IntVec numbers;
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
  return numbers;
}

// rows[i][j] becomes rows[j][i]: blocks of 1, 2, 4, ... lanes change places.
ONP_INLINE void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int side = 1; side < kLanes; side *= 2) {
    const IntVec numbers = lane_numbers();
    const IntVec moves = (numbers & side) != 0;  // -1 where the lane is the other's
    const IntVec upper = moves != 0 ? numbers - side + kLanes : numbers;
    const IntVec lower = moves != 0 ? numbers + kLanes : numbers + side;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & side) continue;
      const Vec a = rows[i], b = rows[i + side];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + side] = __builtin_shuffle(a, b, lower);
    }
  }
}

// ---- connection strength

// The first `count` of kLanes pairs, one a lane. whole: all of them, and kLanes floats behind the
// last may be read. Every pair is summed in the same order wherever it stands.
ONP_INLINE void strengths_of_some(const float* weight, Index kernel, Index count, bool whole,
                                  float* out) {
  const Index tail = kernel % kLanes, vectors = kernel - tail;
  const IntVec in_tail = lane_numbers() < static_cast<int>(tail);
  Vec sums[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    sums[i] = Vec{};
    if (!whole && i >= count) continue;
    const float* from = weight + i * kernel;
    if (whole) {
      // Bits of what is behind the pair are cleared: a NaN there is none here.
      sums[i] = magnitude((Vec)((IntVec)load(from + vectors) & in_tail));
    } else {
      float last[kLanes] = {};
      for (Index k = 0; k < tail; ++k) last[k] = from[vectors + k];
      sums[i] = magnitude(load(last));
    }
    for (Index k = 0; k < vectors; k += kLanes) sums[i] += magnitude(load(from + k));
  }
  transpose(sums);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  if (whole) {
    store(sums[0], out);
  } else {
    for (Index i = 0; i < count; ++i) out[i] = sums[0][i];
  }
}

ONP_INLINE void strengths(const float* weight, Index pairs, Index kernel, Index readable,
                          float* out) {
  Index p = 0;
  if (kernel == 1) {
    for (; p + kLanes <= pairs; p += kLanes) store(magnitude(load(weight + p)), out + p);
  }
  for (; p + kLanes <= pairs && (p + kLanes) * kernel + kLanes <= readable; p += kLanes) {
    strengths_of_some(weight + p * kernel, kernel, kLanes, true, out + p);
  }
  for (; p < pairs; p += kLanes) {
    strengths_of_some(weight + p * kernel, kernel, smaller(kLanes, pairs - p), false, out + p);
  }
}

// ---- choosing

// The largest float below, for +-0 a negative one; for -infinity NaN.
ONP_INLINE Vec next_below(Vec value) {
  const IntVec bits = (IntVec)value, sign = IntVec{} + INT32_MIN;
  const IntVec one = IntVec{} + 1, step = bits > 0 ? -one : one;
  return (Vec)((bits & 0x7fffffff) == 0 ? sign + one : bits + step);
}

ONP_INLINE float next_below(float value) { return next_below(Vectors::splat(value))[0]; }

// A bar that the k strongest of a list of values are above, `least` or more, from the maxima of
// groups of them: below the least maximum that fewer than k others are above.
ONP_INLINE float bar_below(const Vec (&maxima)[kParts], Index k, float least) {
  float values[kGroups];
  for (int part = 0; part < kParts; ++part) store(maxima[part], values + part * kLanes);
  Vec kth = Vectors::splat(kInfinity);
  for (int part = 0; part < kParts; ++part) {
    IntVec above{};
    for (int j = 0; j < kGroups; ++j) above += Vectors::splat(values[j]) > maxima[part];
    const IntVec among = -above < static_cast<int>(k);
    kth = (among & (maxima[part] < kth)) != 0 ? maxima[part] : kth;
  }
  float lanes[kLanes];
  store(kth, lanes);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i)
      lanes[i] = lanes[i + half] < lanes[i] ? lanes[i + half] : lanes[i];
  }
  const float below = next_below(lanes[0]);
  return below > least ? below : least;
}

// kGroups values that stand side by side; of the last few of a row what is beyond it is -infinity.
struct Sixteen {
  Vec parts[kParts];

  static ONP_INLINE Sixteen at(const float* from, Index left) {
    Sixteen values;
    float tail[kGroups];
    if (left < kGroups) {
      for (int i = 0; i < kGroups; ++i) tail[i] = i < left ? from[i] : -kInfinity;
      from = tail;
    }
    for (int part = 0; part < kParts; ++part) values.parts[part] = load(from + part * kLanes);
    return values;
  }
};

// Calls use(c, values) for every sixteen of the columns [first, last) of a row, of which the last
// may be fewer.
template <typename Use>
ONP_INLINE void for_each_sixteen(const float* row, Index first, Index last, const Use& use) {
  Index c = first;
  for (; c + kGroups <= last; c += kGroups) use(c, Sixteen::at(row + c, kGroups));
  if (c < last) use(c, Sixteen::at(row + c, last - c));
}

// The maxima of a row's groups, `least` or more. Four at a time, as each waits for the one before.
ONP_INLINE void group_maxima(const float* row, Index cols, float least, Vec (&maxima)[kParts]) {
  constexpr int apart = 4;
  Vec some[apart][kParts];
  for (auto& one : some) {
    for (Vec& part : one) part = Vectors::splat(least);
  }
  const auto take = [](Vec(&to)[kParts], const Sixteen& here) {
    for (int part = 0; part < kParts; ++part) {
      to[part] = Vectors::larger(here.parts[part], to[part]);
    }
  };
  Index c = 0;
  for (; c + apart * kGroups <= cols; c += apart * kGroups) {
#pragma GCC unroll 4
    for (int i = 0; i < apart; ++i) take(some[i], Sixteen::at(row + c + i * kGroups, kGroups));
  }
  for_each_sixteen(row, c, cols, [&](Index, const Sixteen& here) { take(some[0], here); });
  for (int part = 0; part < kParts; ++part) {
    const Vec two = Vectors::larger(some[2][part], some[3][part]);
    maxima[part] = Vectors::larger(Vectors::larger(some[0][part], some[1][part]), two);
  }
}

// A bar that exactly the k strongest of `size` > k values are above, ties aside.
ONP_INLINE float bar_of(float* values, Index size, Index k) {
  if (size > kGroups) {
    bring_largest(values, size, k);
    return next_below(values[k - 1]);
  }
  for (Index i = size; i < kGroups; ++i) values[i] = -kInfinity;
  Vec maxima[kParts];
  for (int part = 0; part < kParts; ++part) maxima[part] = load(values + part * kLanes);
  return bar_below(maxima, k, -kInfinity);
}

ONP_INLINE void choose_in_row(const Choice& choice, Index r, Index k, float* values) {
  const float* row = choice.matrix + r * choice.stride;
  const Index cols = choice.cols;
  float bar = choice.bar;
  if (k <= kMostForBars) {
    Vec maxima[kParts];
    group_maxima(row, cols, bar, maxima);
    bar = bar_below(maxima, k, bar);
  }
  Index size = 0;
  const Vec above_bar = Vectors::splat(bar);
  for_each_sixteen(row, 0, cols, [&](Index, const Sixteen& here) {
    for (const Vec& part : here.parts) {
      const auto bits = Vectors::above(part, above_bar);
      Vectors::pack(bits, part, values + size);
      size += __builtin_popcount(bits);
    }
  });
  if (size > k) bar = bar_of(values, size, k);
  std::uint64_t* chosen = choice.chosen + r * choice.words;
  const Vec above_kth = Vectors::splat(bar);
  Index count = 0;
  for (Index first = 0; first < cols; first += 64) {
    std::uint64_t word = 0;
    for_each_sixteen(row, first, smaller(first + 64, cols), [&](Index c, const Sixteen& here) {
      for (int part = 0; part < kParts; ++part) {
        const std::uint64_t bits = Vectors::above(here.parts[part], above_kth);
        word |= bits << (c - first + part * kLanes);
      }
    });
    chosen[first / 64] = word;
    count += __builtin_popcountll(word);
  }
  // Among equals of which some are too many, those of higher index are.
  const float kth = -next_below(-bar);
  for (Index c = cols - 1; count > k; --c) {
    if (row[c] != kth) continue;
    chosen[c / 64] &= ~(std::uint64_t{1} << c % 64);
    --count;
  }
}

ONP_INLINE void choose_in_rows(const Choice& choice, Index first, Index last, float* values) {
  const Index k = smaller(choice.k, choice.cols);
  for (Index r = first; r < last; ++r) choose_in_row(choice, r, k, values);
}

ONP_INLINE void turn(const float* matrix, Index rows, Index cols, Index stride, float* out,
                     Index out_stride) {
  Index r = 0;
  for (; r + kLanes <= rows; r += kLanes, matrix += kLanes * stride) {
    Index c = 0;
    for (; c + kLanes <= cols; c += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) {
        block[l] = load(matrix + l * stride + c);
        __builtin_prefetch(matrix + (l + kLanes) * stride + c);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) store(block[l], out + (c + l) * out_stride + r);
    }
    for (; c < cols; ++c) {
      for (int l = 0; l < kLanes; ++l) out[c * out_stride + r + l] = matrix[l * stride + c];
    }
  }
  for (; r < rows; ++r, matrix += stride) {
    for (Index c = 0; c < cols; ++c) out[c * out_stride + r] = matrix[c];
  }
}

// ---- cosine similarity

// Two factors that together bring a vector to length one: its inverse length alone may be no
// float. 0 where the vector is zero or not finite.
struct Scale {
  float power, rest;
};

ONP_INLINE Scale scale_of(const float* vector, Index size) {
  double squares[kGroups] = {};  // not one sum: each waits for the one before
  Index d = 0;
  for (; d + kGroups <= size; d += kGroups) {
    for (int i = 0; i < kGroups; ++i) {
      squares[i] += static_cast<double>(vector[d + i]) * vector[d + i];
    }
  }
  for (; d < size; ++d) squares[0] += static_cast<double>(vector[d]) * vector[d];
  for (int half = kGroups / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) squares[i] += squares[i + half];
  }
  if (!(squares[0] > 0) || squares[0] == __builtin_inf()) return {0, 0};
  const double length = __builtin_sqrt(squares[0]);
  const double power = length < 0x1p-100 ? 0x1p100 : length > 0x1p100 ? 0x1p-100 : 1;
  return {static_cast<float>(power), static_cast<float>(1 / (length * power))};
}

ONP_INLINE void fill_panel(const float* vectors, Index p, const Panels& panels) {
  const Index size = panels.size, rows = smaller(kPanel, panels.count - p * kPanel);
  vectors += p * kPanel * size;
  float* units = panels.units + p * kPanel * size;
  float powers[kPanel], rests[kPanel];
  for (Index i = 0; i < kPanel; ++i) {
    const Scale scale = i < rows ? scale_of(vectors + i * size, size) : Scale{0, 0};
    powers[i] = scale.power;
    rests[i] = scale.rest;
    panels.absent[p * kPanel + i] = scale.power > 0 ? 0 : kNaN;
  }
  Index d = 0;
  for (; d + kLanes <= size; d += kLanes) {
    for (Index first = 0; first < kPanel; first += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const bool given = powers[first + i] > 0;
        block[i] = given ? load(vectors + (first + i) * size + d) : Vec{};
      }
      transpose(block);
      const Vec power = load(powers + first), rest = load(rests + first);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        store(block[i] * power * rest, units + (d + i) * kPanel + first);
      }
    }
  }
  for (; d < size; ++d) {
    for (Index i = 0; i < kPanel; ++i) {
      const float value = powers[i] > 0 ? vectors[i * size + d] : 0;
      units[d * kPanel + i] = value * powers[i] * rests[i];
    }
  }
}

// A tile of sums fills half of AVX-512's registers, or of AVX2's; loads are fewer than products.
constexpr int kTileRows = kLanes == 16 ? 8 : 4;
constexpr int kTileVectors = 2;

// Steps of the sums that are taken together: as much of two panels stays in the first cache.
constexpr Index kDepth = 128;

// block[i][j] += <a_i, b_j> over `depth` steps, for kTileRows rows of one panel and kTileVectors
// vectors of another; the first time = instead of +=. ask_ahead: for what b has kDepth further on,
// which may come from the last cache.
template <bool ask_ahead>
ONP_INLINE void dot_tile(const float* a, const float* b, Index depth, bool first, float* block) {
  Vec sums[kTileRows][kTileVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) {
      sums[i][j] = first ? Vec{} : load(block + i * kPanel + j * kLanes);
    }
  }
  for (Index d = 0; d < depth; ++d, a += kPanel, b += kPanel) {
    Vec columns[kTileVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) {
      columns[j] = load(b + j * kLanes);
      if (ask_ahead) __builtin_prefetch(b + kDepth * kPanel + j * kLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const Vec row = Vectors::splat(a[i]);
#pragma GCC unroll 2
      for (int j = 0; j < kTileVectors; ++j) {
        sums[i][j] = Vectors::fma(row, columns[j], sums[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) store(sums[i][j], block + i * kPanel + j * kLanes);
  }
}

// So little of panel q is read at a time that it serves all of them from the first cache.
ONP_INLINE void fill_blocks(const Panels& panels, Index p, Index together) {
  const Index size = panels.size, panel = size * kPanel;
  for (Index q = p; q < panels.panels; ++q) {
    const Index last = smaller(p + together, q + 1);
    for (Index d = 0; d == 0 || d < size; d += kDepth) {
      const Index depth = smaller(kDepth, size - d);
      for (Index j = 0; j < kPanel; j += kTileVectors * kLanes) {
        const float* b = panels.units + q * panel + d * kPanel + j;
        for (Index n = p; n < last; ++n) {
          const float* a = panels.units + n * panel + d * kPanel;
          float* block = block_of(panels, n, q) + j;
          for (Index i = 0; i < kPanel; i += kTileRows) {
            if (n == p && i == 0) {
              dot_tile<true>(a + i, b, depth, d == 0, block + i * kPanel);
            } else {
              dot_tile<false>(a + i, b, depth, d == 0, block + i * kPanel);
            }
          }
        }
      }
    }
  }
}

ONP_INLINE void cosines(const Panels& panels, Index p, float* rows, Index stride) {
  const Vec one = Vectors::splat(1.0f);
  const float* absent_here = panels.absent + p * kPanel;
  for (Index q = 0; q < panels.panels; ++q) {
    const float* absent_there = panels.absent + q * kPanel;
    const float* block = block_of(panels, smaller(p, q), p + q - smaller(p, q));
    for (Index i = 0; i < kPanel; i += kLanes) {
      for (Index j = 0; j < kPanel; j += kLanes) {
        Vec part[kLanes];
        const float* from = q < p ? block + j * kPanel + i : block + i * kPanel + j;
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) part[l] = load(from + l * kPanel);
        if (q < p) transpose(part);
        const Vec there = load(absent_there + j);
        float* to = rows + i * stride + q * kPanel + j;
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) {
          const Vec capped = Vectors::larger(Vectors::smaller(part[l], one), -one);
          store(capped + (there + Vectors::splat(absent_here[i + l])), to + l * stride);
        }
      }
    }
  }
  for (Index i = 0; i < kPanel; ++i) rows[i * stride + p * kPanel + i] = kNaN;
}

constexpr GraphKernels graph_kernels() {
  return {strengths, choose_in_rows, turn, fill_panel, fill_blocks, cosines};
}

}  // namespace
}  // namespace onp
