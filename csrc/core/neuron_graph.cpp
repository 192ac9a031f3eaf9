#include "core/neuron_graph.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "core/check.h"
#include "core/masked_forward_program.h"
#include "core/neuron_graph_kernels.h"
#include "core/parallel.h"
#include "core/spare.h"

namespace onp {
namespace {

const GraphKernels& graph_kernels_for(const std::string& isa) {
  const Kernels& kernels = kernels_for(isa);
#ifdef ONP_X86_KERNELS
  if (is_avx512(kernels)) return kAvx512GraphKernels;
  if (&kernels == &kAvx2Kernels) return kAvx2GraphKernels;
#endif
  (void)kernels;
  return kGenericGraphKernels;
}

std::int64_t blocks_of(std::int64_t items, std::int64_t block) {
  return (items + block - 1) / block;
}

// Floats from row to row: rows a multiple of 4 KiB apart would share a cache set, so odd numbers of
// cache lines.
std::int64_t line_stride(std::int64_t cols) {
  constexpr std::int64_t line = 16;
  return (blocks_of(cols, line) | 1) * line;
}

// Of work items: pairs of connection strengths, and rows of what is chosen.
constexpr std::int64_t kPairsPerItem = 8192;
constexpr std::int64_t kRowsPerItem = 64;
constexpr std::int64_t kWord = 64;                               // bits
constexpr std::int64_t kTogetherFloats = std::int64_t{1} << 18;  // 1 MiB

void check_matrices(const char* op, const std::vector<MatrixView>& matrices, int threads) {
  for (const MatrixView& matrix : matrices) {
    ONP_CHECK(matrix.rows >= 0 && matrix.cols >= 0, op, ": sizes must not be negative, got [",
              matrix.rows, ", ", matrix.cols, "]");
  }
  ONP_CHECK(threads >= 1, op, ": threads must be at least 1, got ", threads);
}

// Calls use(column) for the columns chosen in a row.
template <typename Use>
void for_each_chosen(const std::uint64_t* words, std::int64_t count, const Use& use) {
  for (std::int64_t w = 0; w < count; ++w) {
    for (std::uint64_t bits = words[w]; bits; bits &= bits - 1) {
      use(w * kWord + __builtin_ctzll(bits));
    }
  }
}

// ---- the strongest entries of a matrix

void choose_in_rows(const GraphKernels& kernels, const Choice& choice, int threads) {
  parallel_for(blocks_of(choice.rows, kRowsPerItem), threads, [&](std::int64_t item, int) {
    const std::int64_t first = item * kRowsPerItem;
    std::vector<float> values(whole_groups(choice.cols));
    kernels.choose_in_rows(choice, first, std::min(first + kRowsPerItem, choice.rows),
                           values.data());
  });
}

// Turned, columns are rows. Those of one word at a time, so that no two threads write one.
void choose_in_columns(const GraphKernels& kernels, const Choice& choice, int threads) {
  const std::int64_t rows = choice.rows, stride = line_stride(rows), words = blocks_of(rows, kWord);
  parallel_for(choice.words, threads, [&](std::int64_t word, int) {
    const std::int64_t first = word * kWord, count = std::min(kWord, choice.cols - first);
    const Spare turned(count * stride);
    kernels.turn(choice.matrix + first, rows, count, choice.stride, turned.data(), stride);
    std::vector<std::uint64_t> chosen(count * words);
    std::vector<float> values(whole_groups(rows));
    const Choice columns{turned.data(), count,      rows,          stride,
                         choice.k,      choice.bar, chosen.data(), words};
    kernels.choose_in_rows(columns, 0, count, values.data());
    for (std::int64_t c = 0; c < count; ++c) {
      for_each_chosen(chosen.data() + c * words, words, [&](std::int64_t r) {
        choice.chosen[r * choice.words + word] |= std::uint64_t{1} << c;
      });
    }
  });
}

// ---- cosine similarity

// The unit vectors, and all blocks of their dot products.
void fill_panels(const GraphKernels& kernels, const float* vectors, const Panels& panels,
                 int threads) {
  parallel_for(panels.panels, threads,
               [&](std::int64_t p, int) { kernels.fill_panel(vectors, p, panels); });
  // Panels that are taken together stay in the second cache; every thread has some to do.
  const std::int64_t in_cache = kTogetherFloats / std::max(kPanel * panels.size, std::int64_t{1});
  const std::int64_t shared = panels.panels / (std::int64_t{4} * threads);
  const std::int64_t together =
      std::max(std::min({kMostTogether, in_cache, shared}), std::int64_t{1});
  parallel_for(blocks_of(panels.panels, together), threads, [&](std::int64_t item, int) {
    const std::int64_t p = item * together;
    kernels.fill_blocks(panels, p, std::min(together, panels.panels - p));
  });
}

// A panel's rows at a time; what a column chooses is what its row does.
void choose_similar(const GraphKernels& kernels, const Panels& panels, const Choice& choice,
                    int threads) {
  parallel_for(panels.panels, threads, [&](std::int64_t p, int) {
    const Spare rows(kPanel * choice.stride);
    kernels.cosines(panels, p, rows.data(), choice.stride);
    Choice here = choice;
    here.matrix = rows.data();
    here.chosen += p * kPanel * choice.words;
    std::vector<float> values(whole_groups(choice.cols));
    const std::int64_t count = std::min(kPanel, choice.rows - p * kPanel);
    kernels.choose_in_rows(here, 0, count, values.data());
  });
  for (std::int64_t r = 0; r < choice.rows; ++r) {
    for_each_chosen(choice.chosen + r * choice.words, choice.words, [&](std::int64_t c) {
      choice.chosen[c * choice.words + r / kWord] |= std::uint64_t{1} << r % kWord;
    });
  }
}

}  // namespace

void bring_largest(float* values, std::int64_t size, std::int64_t k) {
  std::nth_element(values, values + (k - 1), values + size, std::greater<float>());
}

void connection_strengths(const std::vector<LayerWeights>& layers, const std::vector<float*>& out,
                          int threads, const std::string& isa) {
  ONP_CHECK(out.size() == layers.size(), "connection_strengths: out must be of ", layers.size(),
            " layers, got ", out.size());
  ONP_CHECK(threads >= 1, "connection_strengths: threads must be at least 1, got ", threads);
  struct Item {
    const LayerWeights* layer;
    std::int64_t first;
    float* out;
  };
  std::vector<Item> items;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const LayerWeights& layer = layers[i];
    ONP_CHECK(layer.pairs >= 0 && layer.kernel >= 0,
              "connection_strengths: sizes must not be negative, got [", layer.pairs, ", ",
              layer.kernel, "]");
    for (std::int64_t first = 0; first < layer.pairs; first += kPairsPerItem) {
      items.push_back({&layer, first, out[i] + first});
    }
  }
  const GraphKernels& kernels = graph_kernels_for(isa);
  parallel_for(static_cast<std::int64_t>(items.size()), threads, [&](std::int64_t i, int) {
    const auto& [layer, first, to] = items[i];
    const std::int64_t left = layer->pairs - first, kernel = layer->kernel;
    kernels.strengths(layer->weight + first * kernel, std::min(kPairsPerItem, left), kernel,
                      left * kernel, to);
  });
}

// ---- what is chosen

EdgeChoice::Part::Part(std::int64_t rows, std::int64_t cols)
    : rows(rows), words(blocks_of(cols, kWord)), chosen(rows * words, 0), offsets(rows + 1, 0) {}

template <typename Value>
void EdgeChoice::Part::keep(int threads, const Value& value) {
  for (std::int64_t r = 0; r < rows; ++r) {
    std::int64_t count = 0;
    for (std::int64_t w = 0; w < words; ++w) count += __builtin_popcountll(chosen[r * words + w]);
    offsets[r + 1] = offsets[r] + count;
  }
  values.resize(offsets[rows]);
  parallel_for(blocks_of(rows, kRowsPerItem), threads, [&](std::int64_t item, int) {
    const std::int64_t last = std::min((item + 1) * kRowsPerItem, rows);
    for (std::int64_t r = item * kRowsPerItem; r < last; ++r) {
      float* to = values.data() + offsets[r];
      for_each_chosen(chosen.data() + r * words, words,
                      [&](std::int64_t c) { *to++ = value(r, c); });
    }
  });
}

EdgeChoice EdgeChoice::strongest(const std::vector<MatrixView>& strengths, std::int64_t k,
                                 int threads, const std::string& isa) {
  ONP_CHECK(k >= 0, "strongest_edges: k must not be negative, got ", k);
  check_matrices("strongest_edges", strengths, threads);
  const GraphKernels& kernels = graph_kernels_for(isa);
  EdgeChoice found;
  for (const MatrixView& matrix : strengths) {
    Part& part = found.parts_.emplace_back(matrix.rows, matrix.cols);
    if (matrix.rows == 0 || matrix.cols == 0 || k == 0) continue;
    const Choice choice{matrix.values, matrix.rows,        matrix.cols, matrix.cols, k,
                        0.0f,          part.chosen.data(), part.words};
    choose_in_rows(kernels, choice, threads);
    choose_in_columns(kernels, choice, threads);
    part.keep(threads,
              [&](std::int64_t r, std::int64_t c) { return matrix.values[r * matrix.cols + c]; });
  }
  return found;
}

EdgeChoice EdgeChoice::similar(const std::vector<MatrixView>& vectors, float threshold,
                               std::int64_t max_neighbours, int threads, const std::string& isa) {
  ONP_CHECK(threshold >= -1 && threshold <= 1,
            "similarity_edges: threshold must be in [-1, 1], got ", threshold);
  ONP_CHECK(max_neighbours >= 0, "similarity_edges: max_neighbours must not be negative, got ",
            max_neighbours);
  check_matrices("similarity_edges", vectors, threads);
  const GraphKernels& kernels = graph_kernels_for(isa);
  const float below_threshold = std::nextafter(threshold, -2.0f);
  EdgeChoice found;
  for (const MatrixView& matrix : vectors) {
    const std::int64_t count = matrix.rows, size = matrix.cols;
    Part& part = found.parts_.emplace_back(count, count);
    if (count == 0 || max_neighbours == 0) continue;
    const std::int64_t blocks = blocks_of(count, kPanel), triangle = blocks * (blocks + 1) / 2;
    const Spare units(blocks * kPanel * size), absent(blocks * kPanel);
    const Spare dots(triangle * kPanel * kPanel);
    const Panels panels{count, size, blocks, units.data(), absent.data(), dots.data()};
    fill_panels(kernels, matrix.values, panels, threads);
    const std::int64_t stride = line_stride(blocks * kPanel);
    const Choice choice{
        nullptr,   count, count, stride, max_neighbours, below_threshold, part.chosen.data(),
        part.words};
    choose_similar(kernels, panels, choice, threads);
    part.keep(threads, [&](std::int64_t r, std::int64_t c) {
      const auto [i, j] = std::minmax(r, c);
      const float* block = block_of(panels, i / kPanel, j / kPanel);
      return std::clamp(block[i % kPanel * kPanel + j % kPanel], -1.0f, 1.0f);
    });
  }
  return found;
}

std::vector<std::int64_t> EdgeChoice::bounds() const {
  std::vector<std::int64_t> bounds{0};
  for (const Part& part : parts_) bounds.push_back(bounds.back() + part.offsets.back());
  return bounds;
}

void EdgeChoice::write(std::int64_t* rows, std::int64_t* cols, float* values, int threads) const {
  ONP_CHECK(threads >= 1, "write: threads must be at least 1, got ", threads);
  struct Item {
    const Part* part;
    std::int64_t first, start;
  };
  std::vector<Item> items;
  std::int64_t start = 0;
  for (const Part& part : parts_) {
    for (std::int64_t r = 0; r < part.rows; r += kRowsPerItem) items.push_back({&part, r, start});
    start += part.offsets.back();
  }
  parallel_for(static_cast<std::int64_t>(items.size()), threads, [&](std::int64_t i, int) {
    const auto& [part, first, begin] = items[i];
    const std::int64_t last = std::min(first + kRowsPerItem, part->rows);
    for (std::int64_t r = first; r < last; ++r) {
      std::int64_t to = begin + part->offsets[r];
      for_each_chosen(part->chosen.data() + r * part->words, part->words, [&](std::int64_t c) {
        rows[to] = r;
        cols[to] = c;
        ++to;
      });
    }
    std::copy(part->values.begin() + part->offsets[first],
              part->values.begin() + part->offsets[last], values + begin + part->offsets[first]);
  });
}

}  // namespace onp
