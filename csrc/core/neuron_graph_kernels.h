// The kernels of the neuron graph, one table per instruction set. Plain data only: the files that
// implement the tables are compiled for different instruction sets, so nothing with external
// linkage may be instantiated in them.
#pragma once

#include <cstdint>

namespace onp {

// Values are dealt out in groups. The k-th strongest of the groups' maxima is at most the k-th
// strongest value: few values pass a bar just below it, and whole vectors are left behind at once.
constexpr std::int64_t kGroups = 16;
constexpr std::int64_t kMostForBars = 12;  // with a larger k too many would pass

constexpr std::int64_t whole_groups(std::int64_t items) {
  return (items + kGroups - 1) / kGroups * kGroups;
}

// What is chosen in the rows of a matrix: the k strongest above a bar, among equals the ones of
// lower index. NaN is above no bar.
struct Choice {
  const float* matrix;  // [rows, cols], rows `stride` apart
  std::int64_t rows, cols, stride, k;
  float bar;
  std::uint64_t* chosen;  // a bit for each entry, [rows, words]
  std::int64_t words;
};

// Brings the k largest of `size` > k to the front, the least of them to place k - 1.
void bring_largest(float* values, std::int64_t size, std::int64_t k);

// Unit vectors side by side, in panels of kPanel, and zeros behind the last; and their dot
// products.
constexpr std::int64_t kPanel = 32;
constexpr std::int64_t kMostTogether = 4;  // panels
struct Panels {
  std::int64_t count, size;  // vectors, and the length of each
  std::int64_t panels;
  float* units;   // [panels, size, kPanel]
  float* absent;  // [panels, kPanel]: 0, NaN where a vector is zero or not finite
  float* blocks;  // of dot products, [kPanel, kPanel], of panels p and q >= p, a triangle of them
};

static inline float* block_of(const Panels& all, std::int64_t p, std::int64_t q) {
  return all.blocks + (p * all.panels - p * (p - 1) / 2 + q - p) * kPanel * kPanel;
}

struct GraphKernels {
  // See connection_strengths(); `readable` floats may be read from `weight`.
  void (*strengths)(const float* weight, std::int64_t pairs, std::int64_t kernel,
                    std::int64_t readable, float* out);
  // Chooses in the rows [first, last). values: room for whole_groups(cols).
  void (*choose_in_rows)(const Choice& choice, std::int64_t first, std::int64_t last,
                         float* values);
  // out[c, r] = matrix[r, c]
  void (*turn)(const float* matrix, std::int64_t rows, std::int64_t cols, std::int64_t stride,
               float* out, std::int64_t out_stride);
  // Fills panel p from `vectors` [count, size].
  void (*fill_panel)(const float* vectors, std::int64_t p, const Panels& panels);
  // The blocks of `together` panels from p on, at most kMostTogether, with all from each of them
  // on. Every pair is summed in the same order wherever it stands.
  void (*fill_blocks)(const Panels& panels, std::int64_t p, std::int64_t together);
  // The cosines of panel p's vectors with all, `rows` [kPanel, panels * kPanel], rows `stride`
  // apart; NaN where a vector is absent and of a vector with itself.
  void (*cosines)(const Panels& panels, std::int64_t p, float* rows, std::int64_t stride);
};

extern const GraphKernels kGenericGraphKernels;
extern const GraphKernels kAvx2GraphKernels;
extern const GraphKernels kAvx512GraphKernels;

}  // namespace onp
