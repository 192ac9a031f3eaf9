// What the graph of a network's neurons is made of: connection strengths and chosen edges.
#pragma once

#include <cstdint>

namespace onp {

// out[p] = sum over k of |weight[p, k]|: the L1 norm of the weights between two neurons
// (arXiv 2405.17746). CPU memory; csrc/cuda/neuron_graph.h has the CUDA twin.
void connection_strength(const float* weight,  // [pairs, kernel]
                         std::int64_t pairs, std::int64_t kernel,
                         float* out,  // [pairs]
                         int threads);

// Room for `capacity` edges that the caller owns.
struct EdgeSink {
  std::int64_t* rows;  // [capacity]
  std::int64_t* cols;  // [capacity]
  float* values;       // [capacity]
  std::int64_t capacity;
};

// Both return the number of edges written, each once, ordered by (row, column). They are exact
// and deterministic: the thread count never changes the answer.

// Entries > 0 that are among the k strongest of their row or of their column, the lower index
// first among equals. NaN is no edge. At most rows * min(k, cols) + cols * min(k, rows) edges.
std::int64_t strongest_edges(const float* strength,  // [rows, cols]
                             std::int64_t rows, std::int64_t cols, std::int64_t k,
                             const EdgeSink& edges, int threads);

// Pairs r != c whose cosine similarity is >= threshold and which are among the max_neighbours
// most similar of r or of c, the lower index first among equals; both directions are written.
// Vectors of norm zero or not finite have no edges. Uses 4 * count * count bytes of scratch.
// At most 2 * count * max_neighbours edges.
std::int64_t similarity_edges(const float* vectors,  // [count, size]
                              std::int64_t count, std::int64_t size, float threshold,
                              std::int64_t max_neighbours, const EdgeSink& edges, int threads);

}  // namespace onp
