// What the graph of a network's neurons is made of: connection strengths and chosen edges, of many
// layers at once. CPU memory; csrc/cuda/neuron_graph.h has the CUDA twins. Exact and deterministic:
// the thread count never changes the answer. isa: "auto" or one of instruction_sets().
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace onp {

// The weights of one layer.
struct LayerWeights {
  const float* weight;  // [pairs, kernel]
  std::int64_t pairs, kernel;
};

// A row-major matrix.
struct MatrixView {
  const float* values;  // [rows, cols]
  std::int64_t rows, cols;
};

// out[p] = sum over k of |weight[p, k]|: the L1 norm of the weights between two neurons
// (arXiv 2405.17746).
void connection_strengths(const std::vector<LayerWeights>& layers,
                          const std::vector<float*>& out,  // [pairs] of each layer
                          int threads, const std::string& isa = "auto");

// Edges chosen in each of several matrices. To find them and to write them are two steps, so that
// the caller can make room for as many as there are.
class EdgeChoice {
 public:
  // Entries > 0 that are among the k strongest of their row or of their column, the lower index
  // first among equals. NaN is no edge. Uses 256 bytes a row and thread of scratch.
  static EdgeChoice strongest(const std::vector<MatrixView>& strengths, std::int64_t k, int threads,
                              const std::string& isa = "auto");

  // Pairs r != c of a matrix's rows whose cosine similarity is >= threshold and which are among the
  // max_neighbours most similar of r or of c, the lower index first among equals; both directions.
  // Rows of norm zero or not finite have no edges. Uses about 4 * N * D + 2 * N * N bytes of
  // scratch for [N, D], one matrix after the other.
  static EdgeChoice similar(const std::vector<MatrixView>& vectors, float threshold,
                            std::int64_t max_neighbours, int threads,
                            const std::string& isa = "auto");

  // Where the edges of each matrix begin in the list of all, and at last how many there are.
  std::vector<std::int64_t> bounds() const;

  // All edges, each once, those of a matrix ordered by (row, column).
  void write(std::int64_t* rows, std::int64_t* cols, float* values, int threads) const;

 private:
  struct Part {
    Part(std::int64_t rows, std::int64_t cols);
    // Once `chosen` is: offsets, and the values, of which value(row, column) is one.
    template <typename Value>
    void keep(int threads, const Value& value);

    std::int64_t rows, words;
    std::vector<std::uint64_t> chosen;  // a bit for each entry, [rows, words]
    std::vector<std::int64_t> offsets;  // [rows + 1], of a row's edges among the part's
    std::vector<float> values;          // of the part's edges
  };

  std::vector<Part> parts_;
};

}  // namespace onp
