// CUDA twins of core/neuron_graph.h callable from plain C++. A network takes as many
// launches as a layer. Addresses are of device memory, streams are cudaStream_t.
#pragma once

#include <cstdint>
#include <vector>

#include "core/neuron_graph.h"

namespace onp {

// As connection_strengths, the pairs of a layer behind those of the layer before it.
// Asynchronous.
void connection_strengths_cuda(int device, void* stream, const std::vector<LayerWeights>& layers,
                               float* out);  // [sum of pairs]

// As EdgeChoice: as exact, and the same in every run. choose, allocate what it says, then write.
class EdgeSelection {
 public:
  static EdgeSelection strongest(const std::vector<MatrixView>& strengths, std::int64_t k);

  // Cosine similarities are summed in another order than on the CPU, and are as symmetric.
  static EdgeSelection similar(const std::vector<MatrixView>& vectors, float threshold,
                               std::int64_t max_neighbours);

  // Of the memory that choose fills and write reads; 16-byte aligned.
  std::int64_t scratch_bytes() const { return parts_.bytes; }

  // Where the edges of each matrix begin in the list of all, and at last how many there are.
  // Waits for the stream: these numbers are all that is copied to the host.
  std::vector<std::int64_t> choose(int device, void* stream, void* scratch) const;

  // All edges, those of a matrix ordered by (row, column). Asynchronous.
  void write(int device, void* stream, const void* scratch, std::int64_t* rows, std::int64_t* cols,
             float* values) const;

 private:
  // Offsets into the scratch memory, in bytes.
  struct Parts {
    std::int64_t row_cuts, column_cuts, offsets, flags, bounds, units, similarity, bytes;
  };

  EdgeSelection(const std::vector<MatrixView>& given, bool similar, float bar, std::int64_t k);

  std::vector<MatrixView> given_;
  bool similar_;  // given are vectors, whose similarities are chosen from
  float bar_;     // edges are above it
  int k_;
  Parts parts_{};
};

}  // namespace onp
