#include "core/neuron_graph.h"

#include <algorithm>
#include <cmath>
#include <limits>
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
  if (kernel == 1) return strengths<1>(weight, pairs, kernel, out);
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

// The k strongest of the values offered; among equals the ones offered first.
class Strongest {
 public:
  explicit Strongest(std::int64_t k) : k_(k) { kept_.reserve(k); }

  void offer(float value, std::int64_t index) {
    if (static_cast<std::int64_t>(kept_.size()) < k_) {
      kept_.push_back({value, index});
      std::push_heap(kept_.begin(), kept_.end(), stronger);
    } else if (k_ > 0 && value > kept_.front().value) {
      std::pop_heap(kept_.begin(), kept_.end(), stronger);
      kept_.back() = {value, index};
      std::push_heap(kept_.begin(), kept_.end(), stronger);
    }
  }

  // Calls use(index) for each kept value, then forgets them.
  template <typename Use>
  void drain(const Use& use) {
    for (const Entry& entry : kept_) use(entry.index);
    kept_.clear();
  }

 private:
  struct Entry {
    float value;
    std::int64_t index;
  };

  // As the heap's "less": its front is the weakest, of equals the one offered last.
  static bool stronger(const Entry& a, const Entry& b) {
    return a.value > b.value || (a.value == b.value && a.index < b.index);
  }

  std::int64_t k_;
  std::vector<Entry> kept_;
};

constexpr std::int64_t kRowsPerItem = 16;
constexpr std::int64_t kColsPerItem = 16;  // one cache line of a row

// Entries >= floor among the k strongest of their row or of their column. NaN is not >= floor.
std::int64_t select_edges(const float* matrix, std::int64_t rows, std::int64_t cols,
                          std::int64_t k, float floor, const EdgeSink& edges, int threads) {
  std::vector<std::uint8_t> keep(rows * cols, 0);
  parallel_for(blocks_of(rows, kRowsPerItem), threads, [&](std::int64_t item, int) {
    Strongest strongest(std::min(k, cols));
    const std::int64_t last = std::min((item + 1) * kRowsPerItem, rows);
    for (std::int64_t r = item * kRowsPerItem; r < last; ++r) {
      const float* row = matrix + r * cols;
      for (std::int64_t c = 0; c < cols; ++c) {
        if (row[c] >= floor) strongest.offer(row[c], c);
      }
      strongest.drain([&](std::int64_t c) { keep[r * cols + c] = 1; });
    }
  });
  parallel_for(blocks_of(cols, kColsPerItem), threads, [&](std::int64_t item, int) {
    const std::int64_t first = item * kColsPerItem;
    const std::int64_t last = std::min(first + kColsPerItem, cols);
    std::vector<Strongest> strongest;
    for (std::int64_t c = first; c < last; ++c) strongest.emplace_back(std::min(k, rows));
    for (std::int64_t r = 0; r < rows; ++r) {
      const float* row = matrix + r * cols;
      for (std::int64_t c = first; c < last; ++c) {
        if (row[c] >= floor) strongest[c - first].offer(row[c], r);
      }
    }
    for (std::int64_t c = first; c < last; ++c)
      strongest[c - first].drain([&](std::int64_t r) { keep[r * cols + c] = 1; });
  });

  std::vector<std::int64_t> offsets(rows + 1, 0);
  parallel_for(blocks_of(rows, kRowsPerItem), threads, [&](std::int64_t item, int) {
    const std::int64_t last = std::min((item + 1) * kRowsPerItem, rows);
    for (std::int64_t r = item * kRowsPerItem; r < last; ++r) {
      const std::uint8_t* row = keep.data() + r * cols;
      offsets[r + 1] = std::accumulate(row, row + cols, std::int64_t{0});
    }
  });
  std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
  ONP_CHECK(offsets[rows] <= edges.capacity, "select_edges: capacity must be at least ",
            offsets[rows], ", got ", edges.capacity);
  parallel_for(blocks_of(rows, kRowsPerItem), threads, [&](std::int64_t item, int) {
    const std::int64_t last = std::min((item + 1) * kRowsPerItem, rows);
    for (std::int64_t r = item * kRowsPerItem; r < last; ++r) {
      std::int64_t to = offsets[r];
      for (std::int64_t c = 0; c < cols; ++c) {
        if (!keep[r * cols + c]) continue;
        edges.rows[to] = r;
        edges.cols[to] = c;
        edges.values[to] = matrix[r * cols + c];
        ++to;
      }
    }
  });
  return offsets[rows];
}

// ---- cosine similarity ---------------------------------------------------------------------------

constexpr std::int64_t kTileRows = 4;
constexpr std::int64_t kTileCols = 2;
constexpr std::int64_t kPanel = 32;  // rows that one work item holds in cache

// Vectors of length one, zero-padded so that every tile is whole.
struct UnitVectors {
  std::int64_t count, padded_count, padded_size;
  std::vector<float> data;           // [padded_count, padded_size]
  std::vector<std::uint8_t> usable;  // [count]: norm finite and not zero

  UnitVectors(const float* vectors, std::int64_t count, std::int64_t size)
      : count(count),
        padded_count(blocks_of(count, kTileRows) * kTileRows),
        padded_size(blocks_of(size, Lanes<float>::count) * Lanes<float>::count),
        data(padded_count * padded_size, 0.0f),
        usable(count, 0) {
    for (std::int64_t n = 0; n < count; ++n) {
      const float* from = vectors + n * size;
      double square = 0;
      for (std::int64_t d = 0; d < size; ++d) square += static_cast<double>(from[d]) * from[d];
      usable[n] = square > 0 && std::isfinite(square);
      if (!usable[n]) continue;
      const double scale = 1 / std::sqrt(square);
      float* to = data.data() + n * padded_size;
      for (std::int64_t d = 0; d < size; ++d) to[d] = static_cast<float>(from[d] * scale);
    }
  }

  const float* row(std::int64_t n) const { return data.data() + n * padded_size; }
};

// dots[i][j] = <a_i, b_j> for kTileRows consecutive rows a and kTileCols rows b. Every pair is
// summed in the same order wherever it stands, so <a, b> and <b, a> are equal bit for bit.
ONP_INLINE void dot_tile(const float* a, const float* b, std::int64_t size,
                         float (&dots)[kTileRows][kTileCols]) {
  using Vec = Lanes<float>;
  Vec sums[kTileRows][kTileCols];
#pragma GCC unroll 4
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileCols; ++j) sums[i][j].v = Vec::Vector{};
  }
  for (std::int64_t d = 0; d < size; d += Vec::count) {
    const Vec b0 = Vec::load(b + d), b1 = Vec::load(b + size + d);
#pragma GCC unroll 4
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
  const std::int64_t count = units.count;
  const std::int64_t last = std::min(first + kPanel, units.padded_count);
  for (std::int64_t c = first; c < units.padded_count; c += kTileCols) {
    for (std::int64_t r = first; r < last; r += kTileRows) {
      float dots[kTileRows][kTileCols];
      dot_tile(units.row(r), units.row(c), units.padded_size, dots);
      for (std::int64_t i = r; i < std::min(r + kTileRows, count); ++i) {
        for (std::int64_t j = c; j < std::min(c + kTileCols, count); ++j) {
          if (i == j || !units.usable[i] || !units.usable[j]) continue;
          const float cosine = std::max(-1.0f, std::min(dots[i - r][j - c], 1.0f));
          similarity[i * count + j] = cosine;
          similarity[j * count + i] = cosine;
        }
      }
    }
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
  const float above_zero = std::numeric_limits<float>::denorm_min();
  return select_edges(strength, rows, cols, k, above_zero, edges, threads);
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
  const UnitVectors units(vectors, count, size);
  std::vector<float> similarity(count * count, std::numeric_limits<float>::quiet_NaN());
  auto* panel = similarity_panel_generic;
#ifdef ONP_X86_KERNELS
  if (machine_has_avx2()) panel = similarity_panel_avx2;
#endif
  parallel_for(blocks_of(count, kPanel), threads, [&](std::int64_t item, int) {
    panel(units, item * kPanel, similarity.data());
  });
  return select_edges(similarity.data(), count, count, max_neighbours, threshold, edges, threads);
}

}  // namespace onp
