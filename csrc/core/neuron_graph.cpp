#include "core/neuron_graph.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "core/check.h"
#include "core/parallel.h"
#include "core/simd.h"

namespace onp {
namespace {

std::int64_t blocks_of(std::int64_t items, std::int64_t block) {
  return (items + block - 1) / block;
}

// ---- connection strength -----------------------------------------------------------------------

constexpr std::int64_t kPairsPerItem = 8192;

// Kernel is the kernel's size where it is known to the compiler, else 0.
template <int Kernel>
ONP_INLINE void strengths(const float* weight, std::int64_t pairs, std::int64_t size, float* out) {
  const std::int64_t kernel = Kernel > 0 ? Kernel : size;
  constexpr int lanes = 8;
  for (std::int64_t p = 0; p < pairs; ++p, weight += kernel) {
    float sums[lanes] = {};
    std::int64_t k = 0;
    for (; k + lanes <= kernel; k += lanes) {
      for (int lane = 0; lane < lanes; ++lane) sums[lane] += std::fabs(weight[k + lane]);
    }
    float tail = 0;
    for (; k < kernel; ++k) tail += std::fabs(weight[k]);
    for (int half = lanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    }
    out[p] = sums[0] + tail;
  }
}

ONP_INLINE void strengths_of_any(const float* weight, std::int64_t pairs, std::int64_t kernel,
                                 float* out) {
  if (kernel == 1) {
    for (std::int64_t p = 0; p < pairs; ++p) out[p] = std::fabs(weight[p]);
    return;
  }
  if (kernel == 9) return strengths<9>(weight, pairs, kernel, out);
  strengths<0>(weight, pairs, kernel, out);
}

void strengths_generic(const float* weight, std::int64_t pairs, std::int64_t kernel, float* out) {
  strengths_of_any(weight, pairs, kernel, out);
}

#ifdef ONP_X86_KERNELS
ONP_TARGET_AVX2 void strengths_avx2(const float* weight, std::int64_t pairs, std::int64_t kernel,
                                    float* out) {
  strengths_of_any(weight, pairs, kernel, out);
}
#endif

// ---- choosing the strongest entries of a matrix --------------------------------------------------

// The k >= 1 strongest of the values above a bar, among equals the ones of lower index; indices
// must be offered in ascending order. Values and indices are joined into integers that sort by
// both. They gather in a buffer which, once full, is cut back to k and raises the bar.
class Strongest {
 public:
  explicit Strongest(std::int64_t k) : k_(k), keys_(k + std::max<std::int64_t>(k, 32)) {}

  // Of other values from here on.
  void begin(float bar) { bar_ = bar; }

  void offer(float value, std::int64_t index) {
    if (!(value > bar_)) return;  // NaN is not above the bar
    keys_[size_++] = key(value, index);
    if (size_ == static_cast<std::int64_t>(keys_.size())) cut();
  }

  // Calls use(index) for each kept value, then forgets them.
  template <typename Use>
  void drain(const Use& use) {
    if (size_ > k_) cut();
    for (std::int64_t i = 0; i < size_; ++i) use(static_cast<std::uint32_t>(~keys_[i]));
    size_ = 0;
  }

 private:
  static std::uint64_t key(float value, std::int64_t index) {
    value += 0.0f;  // -0 and 0 are equal
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = bits & kSign ? ~bits : bits | kSign;
    return static_cast<std::uint64_t>(bits) << 32 | static_cast<std::uint32_t>(~index);
  }

  static float value_of(std::uint64_t key) {
    std::uint32_t bits = static_cast<std::uint32_t>(key >> 32);
    bits = bits & kSign ? bits & ~kSign : ~bits;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  void cut() {
    const auto begin = keys_.begin();
    std::nth_element(begin, begin + (k_ - 1), begin + size_, std::greater<std::uint64_t>());
    size_ = k_;
    bar_ = value_of(keys_[k_ - 1]);
  }

  static constexpr std::uint32_t kSign = 0x80000000u;

  std::int64_t k_, size_ = 0;
  float bar_ = 0;
  std::vector<std::uint64_t> keys_;
};

// Values are dealt out in groups. The k-th strongest of the groups' maxima is at most the k-th
// strongest value: few values pass a bar just below it, and whole vectors are left behind at once.
constexpr int kGroups = 16;
constexpr std::int64_t kMostForBars = 12;  // with a larger k too many would pass

// bars[i] = a bar for the k strongest of column i of `maxima` [kGroups][Lanes<float>::count].
ONP_INLINE void bars_below(const Lanes<float> (&maxima)[kGroups], std::int64_t k, float least,
                           float* bars) {
  using Vec = Lanes<float>;
  // The least of those that fewer than k others are above.
  Vec kth;
  for (int lane = 0; lane < Vec::count; ++lane) kth.v[lane] = INFINITY;
  for (int i = 0; i < kGroups; ++i) {
    auto above = maxima[0].v > maxima[i].v;  // -1 where it is
    for (int j = 1; j < kGroups; ++j) above += maxima[j].v > maxima[i].v;
    const auto among = -above < static_cast<int>(k);
    const auto lower = maxima[i].v < kth.v;
    kth.v = among & lower ? maxima[i].v : kth.v;
  }
  for (int lane = 0; lane < Vec::count; ++lane) {
    bars[lane] = std::max(least, std::nextafter(kth.v[lane], -INFINITY));
  }
}

// Whether any of `count` values, a whole number of vectors, is above its bar.
ONP_INLINE bool any_above(const float* values, const float* bars, int count) {
  using Vec = Lanes<float>;
  std::uint64_t found[4] = {};
  for (int i = 0; i < count; i += Vec::count) {
    const auto above = Vec::load(values + i).v > Vec::load(bars + i).v;
    std::uint64_t bits[4];
    std::memcpy(bits, &above, sizeof bits);
    for (int word = 0; word < 4; ++word) found[word] |= bits[word];
  }
  return (found[0] | found[1] | found[2] | found[3]) != 0;
}

// The larger of both, lane by lane; NaN is none.
ONP_INLINE Lanes<float> larger(const Lanes<float>& maxima, const float* values) {
  const auto loaded = Lanes<float>::load(values).v;
  return {loaded > maxima.v ? loaded : maxima.v};
}

// Offers a row's values above `bar` that may be among its k strongest.
ONP_INLINE void offer_row(const float* row, std::int64_t cols, std::int64_t k, float bar,
                          Strongest& strongest) {
  using Vec = Lanes<float>;
  constexpr int step = 2 * Vec::count;
  float bars[step];
  std::fill(bars, bars + step, bar);
  if (k <= kMostForBars && cols >= step) {
    Vec two[2] = {Vec::load(bars), Vec::load(bars)}, maxima[kGroups];
    for (std::int64_t c = 0; c + step <= cols; c += step) {
      two[0] = larger(two[0], row + c);
      two[1] = larger(two[1], row + c + Vec::count);
    }
    // A group a lane: each in all lanes of a vector.
    for (int group = 0; group < kGroups; ++group) {
      maxima[group].v = typename Vec::Vector{} + two[group / Vec::count].v[group % Vec::count];
    }
    bars_below(maxima, k, bar, bars);
    std::fill(bars + 1, bars + step, bars[0]);
  }
  strongest.begin(bars[0]);
  std::int64_t c = 0;
  for (; c + step <= cols; c += step) {
    if (!any_above(row + c, bars, step)) continue;
    for (std::int64_t i = c; i < c + step; ++i) strongest.offer(row[i], i);
  }
  for (; c < cols; ++c) strongest.offer(row[c], c);
}

constexpr int kColsPerItem = 16;  // one cache line of a row

// The same of up to kColsPerItem columns that stand side by side.
ONP_INLINE void offer_columns(const float* matrix, std::int64_t rows, std::int64_t cols,
                              int columns, std::int64_t k, float bar,
                              std::vector<Strongest>& strongest) {
  using Vec = Lanes<float>;
  float bars[kColsPerItem];
  std::fill(bars, bars + kColsPerItem, bar);
  const bool whole = columns == kColsPerItem;
  if (k <= kMostForBars && whole) {
    for (int c = 0; c < kColsPerItem; c += Vec::count) {
      Vec maxima[kGroups];
      for (Vec& group : maxima) group = Vec::load(bars + c);
      for (std::int64_t r = 0; r < rows; ++r) {
        maxima[r % kGroups] = larger(maxima[r % kGroups], matrix + r * cols + c);
      }
      bars_below(maxima, k, bar, bars + c);
    }
  }
  for (int c = 0; c < columns; ++c) strongest[c].begin(bars[c]);
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* row = matrix + r * cols;
    if (whole && !any_above(row, bars, kColsPerItem)) continue;
    for (int c = 0; c < columns; ++c) strongest[c].offer(row[c], r);
  }
}

struct Offers {
  void (*row)(const float*, std::int64_t, std::int64_t, float, Strongest&);
  void (*columns)(const float*, std::int64_t, std::int64_t, int, std::int64_t, float,
                  std::vector<Strongest>&);
};

void offer_row_generic(const float* row, std::int64_t cols, std::int64_t k, float bar,
                       Strongest& strongest) {
  offer_row(row, cols, k, bar, strongest);
}

void offer_columns_generic(const float* matrix, std::int64_t rows, std::int64_t cols, int columns,
                           std::int64_t k, float bar, std::vector<Strongest>& strongest) {
  offer_columns(matrix, rows, cols, columns, k, bar, strongest);
}

#ifdef ONP_X86_KERNELS
ONP_TARGET_AVX2 void offer_row_avx2(const float* row, std::int64_t cols, std::int64_t k, float bar,
                                    Strongest& strongest) {
  offer_row(row, cols, k, bar, strongest);
}

ONP_TARGET_AVX2 void offer_columns_avx2(const float* matrix, std::int64_t rows, std::int64_t cols,
                                        int columns, std::int64_t k, float bar,
                                        std::vector<Strongest>& strongest) {
  offer_columns(matrix, rows, cols, columns, k, bar, strongest);
}
#endif

Offers offers() {
#ifdef ONP_X86_KERNELS
  if (machine_has_avx2()) return {offer_row_avx2, offer_columns_avx2};
#endif
  return {offer_row_generic, offer_columns_generic};
}

constexpr std::int64_t kRowsPerItem = 16;

// Calls use(column) for the columns that are kept in a row of flags.
template <typename Use>
void for_each_kept(const std::uint8_t* flags, std::int64_t cols, const Use& use) {
  std::int64_t c = 0;
  for (; c + 8 <= cols; c += 8) {
    std::uint64_t word;
    std::memcpy(&word, flags + c, sizeof word);
    if (word == 0) continue;
    for (std::int64_t i = c; i < c + 8; ++i) {
      if (flags[i]) use(i);
    }
  }
  for (; c < cols; ++c) {
    if (flags[c]) use(c);
  }
}

// Entries above the bar among the k strongest of their row or of their column. symmetric: the
// matrix is, so that what a column chooses is what its row does.
std::int64_t select_edges(const float* matrix, std::int64_t rows, std::int64_t cols, std::int64_t k,
                          float bar, bool symmetric, const EdgeSink& edges, int threads) {
  ONP_CHECK(std::max(rows, cols) < std::int64_t{1} << 32,
            "select_edges: sizes must be below 2^32, got [", rows, ", ", cols, "]");
  if (rows == 0 || cols == 0 || k == 0) return 0;
  const Offers offer = offers();
  std::vector<std::uint8_t> keep(rows * cols, 0);
  const auto for_each_row = [&](const auto& body) {
    parallel_for(blocks_of(rows, kRowsPerItem), threads, [&](std::int64_t item, int) {
      const std::int64_t last = std::min((item + 1) * kRowsPerItem, rows);
      body(item * kRowsPerItem, last);
    });
  };
  for_each_row([&](std::int64_t first, std::int64_t last) {
    Strongest strongest(std::min(k, cols));
    for (std::int64_t r = first; r < last; ++r) {
      offer.row(matrix + r * cols, cols, std::min(k, cols), bar, strongest);
      strongest.drain([&](std::int64_t c) { keep[r * cols + c] = 1; });
    }
  });
  if (symmetric) {
    for (std::int64_t r = 0; r < rows; ++r) {
      for_each_kept(keep.data() + r * cols, cols, [&](std::int64_t c) { keep[c * cols + r] = 1; });
    }
  } else {
    parallel_for(blocks_of(cols, kColsPerItem), threads, [&](std::int64_t item, int) {
      const std::int64_t first = item * kColsPerItem;
      const auto columns = static_cast<int>(std::min<std::int64_t>(kColsPerItem, cols - first));
      std::vector<Strongest> strongest(columns, Strongest(std::min(k, rows)));
      offer.columns(matrix + first, rows, cols, columns, std::min(k, rows), bar, strongest);
      for (int c = 0; c < columns; ++c) {
        strongest[c].drain([&](std::int64_t r) { keep[r * cols + first + c] = 1; });
      }
    });
  }

  std::vector<std::int64_t> offsets(rows + 1, 0);
  for_each_row([&](std::int64_t first, std::int64_t last) {
    for (std::int64_t r = first; r < last; ++r) {
      const std::uint8_t* row = keep.data() + r * cols;
      offsets[r + 1] = std::accumulate(row, row + cols, std::int64_t{0});
    }
  });
  std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
  ONP_CHECK(offsets[rows] <= edges.capacity, "select_edges: capacity must be at least ",
            offsets[rows], ", got ", edges.capacity);
  for_each_row([&](std::int64_t first, std::int64_t last) {
    for (std::int64_t r = first; r < last; ++r) {
      std::int64_t to = offsets[r];
      for_each_kept(keep.data() + r * cols, cols, [&](std::int64_t c) {
        edges.rows[to] = r;
        edges.cols[to] = c;
        edges.values[to] = matrix[r * cols + c];
        ++to;
      });
    }
  });
  return offsets[rows];
}

// ---- cosine similarity ---------------------------------------------------------------------------

constexpr std::int64_t kTileRows = 6;  // with two columns 12 sums: as many as registers hold
constexpr std::int64_t kTileCols = 2;
constexpr std::int64_t kPanel = 24;  // rows of a work item
constexpr std::int64_t kBlock = 16;  // columns whose results are written together, a cache line

// Vectors of length one, zero-padded so that every tile is whole.
struct UnitVectors {
  std::int64_t count, padded_count, padded_size;
  std::vector<float> data;    // [padded_count, padded_size]
  std::vector<float> absent;  // [padded_count]: 0, NaN where the norm is 0 or not finite

  UnitVectors(const float* vectors, std::int64_t count, std::int64_t size, int threads)
      : count(count),
        padded_count(blocks_of(count, kPanel) * kPanel + kBlock),
        // Rows a multiple of 4 KiB apart would share a cache set: odd numbers of cache lines.
        padded_size((blocks_of(size, 16) | 1) * 16),
        data(padded_count * padded_size, 0.0f),
        absent(padded_count, std::numeric_limits<float>::quiet_NaN()) {
    parallel_for(blocks_of(count, kPanel), threads, [&](std::int64_t item, int) {
      const std::int64_t last = std::min((item + 1) * kPanel, count);
      for (std::int64_t n = item * kPanel; n < last; ++n) scale(n, vectors + n * size, size);
    });
  }

  // Vector n, of any length.
  void scale(std::int64_t n, const float* from, std::int64_t size) {
    double squares[4] = {};  // not one sum: each waits for the one before
    std::int64_t d = 0;
    for (; d + 4 <= size; d += 4) {
      for (int i = 0; i < 4; ++i) squares[i] += static_cast<double>(from[d + i]) * from[d + i];
    }
    for (; d < size; ++d) squares[0] += static_cast<double>(from[d]) * from[d];
    const double square = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    if (!(square > 0) || !std::isfinite(square)) return;
    absent[n] = 0;
    const double inverse = 1 / std::sqrt(square);
    float* to = data.data() + n * padded_size;
    for (d = 0; d < size; ++d) to[d] = static_cast<float>(from[d] * inverse);
  }

  const float* row(std::int64_t n) const { return data.data() + n * padded_size; }
};

// dots[i][j] = <a_i, b_j> for kTileRows consecutive rows a and kTileCols rows b. Every pair is
// summed in the same order wherever it stands, so <a, b> and <b, a> are equal bit for bit.
ONP_INLINE void dot_tile(const float* a, const float* b, std::int64_t size,
                         float (&dots)[kTileRows][kTileCols]) {
  using Vec = Lanes<float>;
  Vec sums[kTileRows][kTileCols];
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileCols; ++j) sums[i][j].v = Vec::Vector{};
  }
  for (std::int64_t d = 0; d < size; d += Vec::count) {
    const Vec b0 = Vec::load(b + d), b1 = Vec::load(b + size + d);
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
      const Vec from = Vec::load(a + i * size + d);
      sums[i][0].v += from.v * b0.v;
      sums[i][1].v += from.v * b1.v;
    }
  }
  for (int i = 0; i < kTileRows; ++i) {
    for (int j = 0; j < kTileCols; ++j) dots[i][j] = sums[i][j].sum();
  }
}

// Similarities of the rows of one panel with all rows from the panel on, written both ways.
ONP_INLINE void similarity_panel(const UnitVectors& units, std::int64_t first,
                                 float* similarity) {
  const std::int64_t count = units.count, last = std::min(first + kPanel, count);
  for (std::int64_t begin = first; begin < count; begin += kBlock) {
    const std::int64_t end = std::min(begin + kBlock, count);
    float block[kPanel][kBlock];
    for (std::int64_t r = first; r < last; r += kTileRows) {
      for (std::int64_t c = begin; c < end; c += kTileCols) {
        float dots[kTileRows][kTileCols];
        dot_tile(units.row(r), units.row(c), units.padded_size, dots);
        for (std::int64_t i = 0; i < kTileRows; ++i) {
          for (std::int64_t j = 0; j < kTileCols; ++j) {
            const float cosine = std::max(-1.0f, std::min(dots[i][j], 1.0f));
            block[r - first + i][c - begin + j] = cosine;
          }
        }
      }
    }
    for (std::int64_t i = first; i < last; ++i) {
      const float* values = block[i - first];
      for (std::int64_t j = begin; j < end; ++j) {
        similarity[i * count + j] = values[j - begin] + (units.absent[i] + units.absent[j]);
      }
    }
    for (std::int64_t j = begin; j < end; ++j) {
      for (std::int64_t i = first; i < last; ++i) {
        const float value = block[i - first][j - begin];
        similarity[j * count + i] = value + (units.absent[i] + units.absent[j]);
      }
    }
  }
  for (std::int64_t i = first; i < last; ++i) {
    similarity[i * count + i] = std::numeric_limits<float>::quiet_NaN();
  }
}

void similarity_panel_generic(const UnitVectors& units, std::int64_t first, float* similarity) {
  similarity_panel(units, first, similarity);
}

#ifdef ONP_X86_KERNELS
ONP_TARGET_AVX2 void similarity_panel_avx2(const UnitVectors& units, std::int64_t first,
                                           float* similarity) {
  similarity_panel(units, first, similarity);
}
#endif

}  // namespace

void connection_strength(const float* weight, std::int64_t pairs, std::int64_t kernel, float* out,
                         int threads) {
  ONP_CHECK(pairs >= 0 && kernel >= 0, "connection_strength: sizes must not be negative, got [",
            pairs, ", ", kernel, "]");
  ONP_CHECK(threads >= 1, "connection_strength: threads must be at least 1, got ", threads);
  auto* run = strengths_generic;
#ifdef ONP_X86_KERNELS
  if (machine_has_avx2()) run = strengths_avx2;
#endif
  parallel_for(blocks_of(pairs, kPairsPerItem), threads, [&](std::int64_t item, int) {
    const std::int64_t first = item * kPairsPerItem;
    run(weight + first * kernel, std::min(kPairsPerItem, pairs - first), kernel, out + first);
  });
}

std::int64_t strongest_edges(const float* strength, std::int64_t rows, std::int64_t cols,
                             std::int64_t k, const EdgeSink& edges, int threads) {
  ONP_CHECK(rows >= 0 && cols >= 0, "strongest_edges: sizes must not be negative, got [", rows,
            ", ", cols, "]");
  ONP_CHECK(k >= 0, "strongest_edges: k must not be negative, got ", k);
  ONP_CHECK(threads >= 1, "strongest_edges: threads must be at least 1, got ", threads);
  return select_edges(strength, rows, cols, k, 0.0f, false, edges, threads);
}

std::int64_t similarity_edges(const float* vectors, std::int64_t count, std::int64_t size,
                              float threshold, std::int64_t max_neighbours, const EdgeSink& edges,
                              int threads) {
  ONP_CHECK(count >= 0 && size >= 0, "similarity_edges: sizes must not be negative, got [", count,
            ", ", size, "]");
  ONP_CHECK(threshold >= -1 && threshold <= 1,
            "similarity_edges: threshold must be in [-1, 1], got ", threshold);
  ONP_CHECK(max_neighbours >= 0, "similarity_edges: max_neighbours must not be negative, got ",
            max_neighbours);
  ONP_CHECK(threads >= 1, "similarity_edges: threads must be at least 1, got ", threads);
  const UnitVectors units(vectors, count, size, threads);
  const std::unique_ptr<float[]> similarity(new float[static_cast<std::size_t>(count * count)]);
  auto* panel = similarity_panel_generic;
#ifdef ONP_X86_KERNELS
  if (machine_has_avx2()) panel = similarity_panel_avx2;
#endif
  parallel_for(blocks_of(count, kPanel), threads,
               [&](std::int64_t item, int) { panel(units, item * kPanel, similarity.get()); });
  const float below_threshold = std::nextafter(threshold, -2.0f);
  return select_edges(similarity.get(), count, count, max_neighbours, below_threshold, true, edges,
                      threads);
}

}  // namespace onp
