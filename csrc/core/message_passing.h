// Weighted neighbour sums on one CSR graph for a batch of feature matrices, and their gradients.
#pragma once

#include <cstdint>

#include "core/simd.h"
#include "core/views.h"

namespace onp {

// out[b, i, :] = sum over e in row i of weight[e] * x[b, indices[e], :]
template <typename T>
struct MessagePassingParams {
  CsrView graph;  // N nodes, E edges, every index in [0, N)
  std::int64_t batch;
  std::int64_t features;
  const T* x;       // [B, N, D]
  const T* weight;  // [E]
  T* out;           // [B, N, D]
};

// weight_grad[e] = sum over b, d of grad[b, i, d] * x[b, indices[e], d], where e is in row i
template <typename T>
struct MessagePassingWeightGradParams {
  CsrView graph;
  std::int64_t batch;
  std::int64_t features;
  const T* grad;   // [B, N, D], gradient of out
  const T* x;      // [B, N, D]
  T* weight_grad;  // [E]
};

// Both gradients in one pass over the transposed graph, which reads each row of grad once an edge:
// x_grad[b, j, :] = sum over slots s in its row j of weight[edge[s]] * grad[b, indices[s], :], and
// weight_grad as above. Uses 32 bytes a slot of scratch for the nodes that a thread is at.
template <typename T>
struct MessagePassingGradientsParams {
  CsrView transposed;
  const std::int64_t* edge;  // [E], of each slot: a permutation
  std::int64_t batch;
  std::int64_t features;
  const T* grad;    // [B, N, D]
  const T* x;       // [B, N, D]
  const T* weight;  // [E]
  T* x_grad;        // [B, N, D]
  T* weight_grad;   // [E]
};

// The gradient of x alone is message_passing over the transposed graph with the permuted weights.
// Each output is computed by one thread in a fixed order: the thread count never changes a bit.
// Instantiated for float, double and Bf16, whose sums are floats.
template <typename T>
void message_passing(const MessagePassingParams<T>& params, int threads);

template <typename T>
void message_passing_weight_grad(const MessagePassingWeightGradParams<T>& params, int threads);

template <typename T>
void message_passing_gradients(const MessagePassingGradientsParams<T>& params, int threads);

}  // namespace onp
