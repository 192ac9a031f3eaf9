#include "core/message_passing.h"

#include <algorithm>
#include <vector>

#include "core/check.h"
#include "core/pages.h"
#include "core/parallel.h"
#include "core/simd.h"

namespace onp {
namespace {

constexpr std::int64_t kRowsPerItem = 32;
constexpr std::int64_t kAhead = 12;  // edges whose features are asked for beforehand
constexpr std::int64_t kLine = 64;   // bytes

ONP_INLINE void prefetch(const void* from, std::int64_t bytes) {
  for (std::int64_t at = 0; at < bytes; at += kLine) {
    __builtin_prefetch(static_cast<const char*>(from) + at);
  }
}

// out[d .. d + Vectors * lanes) of one row, held in registers over all its edges. end: of all
// edges' indices.
template <typename T, int Vectors>
ONP_INLINE void row_tile(const std::int64_t* indices, const std::int64_t* end, const T* weight,
                         std::int64_t edges, const T* x, std::int64_t features, T* out) {
  using Vec = Lanes<T>;
  constexpr std::int64_t bytes = Vectors * Vec::count * static_cast<std::int64_t>(sizeof(T));
  Vec sums[Vectors];
#pragma GCC unroll 8
  for (int k = 0; k < Vectors; ++k) sums[k].v = typename Vec::Vector{};
  for (std::int64_t e = 0; e < edges; ++e) {
    const T* from = x + indices[e] * features;
    if (end - indices > e + kAhead) prefetch(x + indices[e + kAhead] * features, bytes);
    const typename Vec::Sum scale = weight[e];
#pragma GCC unroll 8
    for (int k = 0; k < Vectors; ++k) sums[k].v += Vec::load(from + k * Vec::count).v * scale;
  }
#pragma GCC unroll 8
  for (int k = 0; k < Vectors; ++k) sums[k].store(out + k * Vec::count);
}

// Rows [first, last) of one batch entry: x and out point at that entry.
template <typename T>
ONP_INLINE void sum_rows(const MessagePassingParams<T>& p, const T* x, T* out, std::int64_t first,
                         std::int64_t last) {
  constexpr std::int64_t lanes = Lanes<T>::count;
  const std::int64_t features = p.features;
  const std::int64_t* end = p.graph.indices + p.graph.indptr[p.graph.nodes];
  for (std::int64_t row = first; row < last; ++row) {
    const std::int64_t begin = p.graph.indptr[row];
    const std::int64_t edges = p.graph.indptr[row + 1] - begin;
    const std::int64_t* indices = p.graph.indices + begin;
    const T* weight = p.weight + begin;
    T* to = out + row * features;
    std::int64_t d = 0;
    for (; d + 8 * lanes <= features; d += 8 * lanes)
      row_tile<T, 8>(indices, end, weight, edges, x + d, features, to + d);
    for (; d + 2 * lanes <= features; d += 2 * lanes)
      row_tile<T, 2>(indices, end, weight, edges, x + d, features, to + d);
    for (; d + lanes <= features; d += lanes)
      row_tile<T, 1>(indices, end, weight, edges, x + d, features, to + d);
    for (; d < features; ++d) {
      typename Lanes<T>::Sum sum = 0;
      for (std::int64_t e = 0; e < edges; ++e) sum += weight[e] * x[indices[e] * features + d];
      to[d] = T(sum);
    }
  }
}

template <typename T>
ONP_INLINE typename Lanes<T>::Sum dot(const T* a, const T* b, std::int64_t size) {
  using Vec = Lanes<T>;
  Vec even, odd;
  even.v = odd.v = typename Vec::Vector{};
  std::int64_t d = 0;
  for (; d + 2 * Vec::count <= size; d += 2 * Vec::count) {
    even.v += Vec::load(a + d).v * Vec::load(b + d).v;
    odd.v += Vec::load(a + d + Vec::count).v * Vec::load(b + d + Vec::count).v;
  }
  typename Vec::Sum tail = 0;
  for (; d < size; ++d) tail += a[d] * b[d];
  even.v += odd.v;
  return even.sum() + tail;
}

template <typename T>
ONP_INLINE void dot_rows(const MessagePassingWeightGradParams<T>& p, std::int64_t first,
                         std::int64_t last) {
  using Sum = typename Lanes<T>::Sum;
  const std::int64_t* indptr = p.graph.indptr;
  const std::int64_t begin = indptr[first], edges = indptr[p.graph.nodes];
  const std::int64_t bytes = p.features * static_cast<std::int64_t>(sizeof(T));
  std::vector<Sum> sums(indptr[last] - begin, Sum(0));
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const T* grad = p.grad + b * p.graph.nodes * p.features;
    const T* x = p.x + b * p.graph.nodes * p.features;
    for (std::int64_t row = first; row < last; ++row) {
      for (std::int64_t e = indptr[row]; e < indptr[row + 1]; ++e) {
        if (e + kAhead < edges) prefetch(x + p.graph.indices[e + kAhead] * p.features, bytes);
        sums[e - begin] +=
            dot(grad + row * p.features, x + p.graph.indices[e] * p.features, p.features);
      }
    }
  }
  for (std::size_t e = 0; e < sums.size(); ++e) p.weight_grad[begin + e] = T(sums[e]);
}

// Of one node and x[d .. d + Vectors * lanes): the gradient of x, over its slots, and each slot's
// part of its weight's gradient, added to `products` lane by lane. ask: for what is read further
// on.
template <typename T, int Vectors>
ONP_INLINE void gradient_tile(const MessagePassingGradientsParams<T>& p, std::int64_t begin,
                              std::int64_t end, bool ask, const T* grad, const T* x, T* x_grad,
                              typename Lanes<T>::Sum* products) {
  using Vec = Lanes<T>;
  using Sums = Lanes<typename Vec::Sum>;
  const std::int64_t* rows = p.transposed.indices;
  const std::int64_t slots = p.transposed.indptr[p.transposed.nodes];
  const std::int64_t bytes = p.features * static_cast<std::int64_t>(sizeof(T));
  Vec own[Vectors];
  Sums sums[Vectors];
#pragma GCC unroll 4
  for (int k = 0; k < Vectors; ++k) {
    own[k] = Vec::load(x + k * Vec::count);
    sums[k].v = typename Sums::Vector{};
  }
  for (std::int64_t s = begin; s < end; ++s, products += Sums::count) {
    const T* from = grad + rows[s] * p.features;
    if (ask && s + kAhead < slots) {
      prefetch(grad + rows[s + kAhead] * p.features, bytes);
      __builtin_prefetch(p.weight + p.edge[s + kAhead]);
    }
    const typename Vec::Sum scale = p.weight[p.edge[s]];
    Sums product = Sums::load(products);
#pragma GCC unroll 4
    for (int k = 0; k < Vectors; ++k) {
      const Vec values = Vec::load(from + k * Vec::count);
      sums[k].v += values.v * scale;
      product.v += values.v * own[k].v;
    }
    product.store(products);
  }
#pragma GCC unroll 4
  for (int k = 0; k < Vectors; ++k) {
    Vec sum;
    sum.v = sums[k].v;
    sum.store(x_grad + k * Vec::count);
  }
}

template <typename T>
ONP_INLINE void gradients_of_nodes(const MessagePassingGradientsParams<T>& p, std::int64_t first,
                                   std::int64_t last) {
  using Vec = Lanes<T>;
  using Sums = Lanes<typename Vec::Sum>;
  constexpr std::int64_t lanes = Vec::count;
  const std::int64_t* indptr = p.transposed.indptr;
  const std::int64_t start = indptr[first], features = p.features;
  // Lanes of a slot's products are added up once, after all batch entries.
  std::vector<typename Vec::Sum> products((indptr[last] - start) * Sums::count, 0);
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const std::int64_t offset = b * p.transposed.nodes * features;
    const T* grad = p.grad + offset;
    for (std::int64_t node = first; node < last; ++node) {
      const std::int64_t begin = indptr[node], end = indptr[node + 1];
      const std::int64_t at = offset + node * features;
      auto* of_slots = products.data() + (begin - start) * Sums::count;
      std::int64_t d = 0;
      for (; d + 4 * lanes <= features; d += 4 * lanes) {
        gradient_tile<T, 4>(p, begin, end, d == 0, grad + d, p.x + at + d, p.x_grad + at + d,
                            of_slots);
      }
      for (; d + lanes <= features; d += lanes) {
        gradient_tile<T, 1>(p, begin, end, d == 0, grad + d, p.x + at + d, p.x_grad + at + d,
                            of_slots);
      }
      for (; d < features; ++d) {
        typename Vec::Sum sum = 0;
        for (std::int64_t s = begin; s < end; ++s) {
          const typename Vec::Sum value = grad[p.transposed.indices[s] * features + d];
          sum += p.weight[p.edge[s]] * value;
          of_slots[(s - begin) * Sums::count] += value * p.x[at + d];
        }
        p.x_grad[at + d] = T(sum);
      }
    }
  }
  for (std::int64_t s = start; s < indptr[last]; ++s) {
    if (s + kAhead < indptr[last]) __builtin_prefetch(p.weight_grad + p.edge[s + kAhead], 1);
    p.weight_grad[p.edge[s]] = T(Sums::load(products.data() + (s - start) * Sums::count).sum());
  }
}

template <typename T>
void sum_rows_generic(const MessagePassingParams<T>& p, const T* x, T* out, std::int64_t first,
                      std::int64_t last) {
  sum_rows(p, x, out, first, last);
}

template <typename T>
void dot_rows_generic(const MessagePassingWeightGradParams<T>& p, std::int64_t first,
                      std::int64_t last) {
  dot_rows(p, first, last);
}

template <typename T>
void gradients_of_nodes_generic(const MessagePassingGradientsParams<T>& p, std::int64_t first,
                                std::int64_t last) {
  gradients_of_nodes(p, first, last);
}

#ifdef ONP_X86_KERNELS
template <typename T>
ONP_TARGET_AVX2 void gradients_of_nodes_avx2(const MessagePassingGradientsParams<T>& p,
                                             std::int64_t first, std::int64_t last) {
  gradients_of_nodes(p, first, last);
}

template <typename T>
ONP_TARGET_AVX2 void sum_rows_avx2(const MessagePassingParams<T>& p, const T* x, T* out,
                                   std::int64_t first, std::int64_t last) {
  sum_rows(p, x, out, first, last);
}

template <typename T>
ONP_TARGET_AVX2 void dot_rows_avx2(const MessagePassingWeightGradParams<T>& p, std::int64_t first,
                                   std::int64_t last) {
  dot_rows(p, first, last);
}
#endif

std::int64_t blocks_of(std::int64_t nodes) { return (nodes + kRowsPerItem - 1) / kRowsPerItem; }

// All nodes, as many a work item as a block has; a kernel takes all batch entries of its nodes.
template <typename Params>
void run_blocks(void (*kernel)(const Params&, std::int64_t, std::int64_t), const Params& params,
                std::int64_t nodes, int threads) {
  parallel_for(blocks_of(nodes), threads, [&](std::int64_t item, int) {
    const std::int64_t first = item * kRowsPerItem;
    kernel(params, first, std::min(first + kRowsPerItem, nodes));
  });
}

void check_sizes(const char* op, std::int64_t batch, std::int64_t nodes, std::int64_t features,
                 int threads) {
  ONP_CHECK(batch >= 0 && nodes >= 0 && features >= 0, op, ": sizes must not be negative, got [",
            batch, ", ", nodes, ", ", features, "]");
  ONP_CHECK(threads >= 1, op, ": threads must be at least 1, got ", threads);
}

}  // namespace

template <typename T>
void message_passing(const MessagePassingParams<T>& params, int threads) {
  const std::int64_t nodes = params.graph.nodes;
  check_sizes("message_passing", params.batch, nodes, params.features, threads);
  auto* kernel = sum_rows_generic<T>;
#ifdef ONP_X86_KERNELS
  if (machine_has_avx2()) kernel = sum_rows_avx2<T>;
#endif
  ask_for_large_pages(params.out, params.batch * nodes * params.features);
  const std::int64_t blocks = blocks_of(nodes);
  parallel_for(params.batch * blocks, threads, [&](std::int64_t item, int) {
    const std::int64_t offset = item / blocks * nodes * params.features;
    const std::int64_t first = item % blocks * kRowsPerItem;
    kernel(params, params.x + offset, params.out + offset, first,
           std::min(first + kRowsPerItem, nodes));
  });
}

template <typename T>
void message_passing_weight_grad(const MessagePassingWeightGradParams<T>& params, int threads) {
  const std::int64_t nodes = params.graph.nodes;
  check_sizes("message_passing_weight_grad", params.batch, nodes, params.features, threads);
  auto* kernel = dot_rows_generic<T>;
#ifdef ONP_X86_KERNELS
  if (machine_has_avx2()) kernel = dot_rows_avx2<T>;
#endif
  run_blocks(kernel, params, nodes, threads);
}

template <typename T>
void message_passing_gradients(const MessagePassingGradientsParams<T>& params, int threads) {
  const std::int64_t nodes = params.transposed.nodes;
  check_sizes("message_passing_gradients", params.batch, nodes, params.features, threads);
  auto* kernel = gradients_of_nodes_generic<T>;
#ifdef ONP_X86_KERNELS
  if (machine_has_avx2()) kernel = gradients_of_nodes_avx2<T>;
#endif
  ask_for_large_pages(params.x_grad, params.batch * nodes * params.features);
  run_blocks(kernel, params, nodes, threads);
}

template void message_passing(const MessagePassingParams<float>&, int);
template void message_passing(const MessagePassingParams<double>&, int);
template void message_passing(const MessagePassingParams<Bf16>&, int);
template void message_passing_weight_grad(const MessagePassingWeightGradParams<float>&, int);
template void message_passing_weight_grad(const MessagePassingWeightGradParams<double>&, int);
template void message_passing_weight_grad(const MessagePassingWeightGradParams<Bf16>&, int);
template void message_passing_gradients(const MessagePassingGradientsParams<float>&, int);
template void message_passing_gradients(const MessagePassingGradientsParams<double>&, int);
template void message_passing_gradients(const MessagePassingGradientsParams<Bf16>&, int);

}  // namespace onp
