// CUDA twins of core/neuron_graph.h, callable from plain C++.
#pragma once

#include <cstdint>

namespace onp {

// As connection_strength, on device memory; asynchronous on the given cudaStream_t.
void connection_strength_cuda(int device, void* stream,
                              const float* weight,  // [pairs, kernel]
                              std::int64_t pairs, std::int64_t kernel,
                              float* out);  // [pairs]

}  // namespace onp
