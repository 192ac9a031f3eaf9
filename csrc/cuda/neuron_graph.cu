#include "cuda/neuron_graph.h"

#include <algorithm>

#include "cuda/launch.cuh"

namespace onp {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr std::int64_t kMostBlocks = 1 << 20;

// One thread a pair: neighbouring threads read neighbouring kernels, which share cache lines.
__global__ void strength_by_thread(const float* __restrict__ weight, std::int64_t pairs,
                                   std::int64_t kernel, float* __restrict__ out) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t pair = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       pair < pairs; pair += step) {
    float sum = 0;
    for (std::int64_t k = 0; k < kernel; ++k) sum += fabsf(weight[pair * kernel + k]);
    out[pair] = sum;
  }
}

// One warp a pair, for kernels of at least a warp's width.
__global__ void strength_by_warp(const float* __restrict__ weight, std::int64_t pairs,
                                 std::int64_t kernel, float* __restrict__ out) {
  const int lane = threadIdx.x % kWarp;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * (kThreads / kWarp);
  for (std::int64_t pair =
           static_cast<std::int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
       pair < pairs; pair += step) {
    float sum = 0;
    for (std::int64_t k = lane; k < kernel; k += kWarp) sum += fabsf(weight[pair * kernel + k]);
    for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_xor_sync(~0u, sum, half);
    if (lane == 0) out[pair] = sum;
  }
}

}  // namespace

void connection_strength_cuda(int device, void* stream, const float* weight, std::int64_t pairs,
                              std::int64_t kernel, float* out) {
  ONP_CHECK(pairs >= 0 && kernel >= 0, "connection_strength: sizes must not be negative, got [",
            pairs, ", ", kernel, "]");
  if (pairs == 0) return;
  const DeviceGuard guard(device);
  const bool by_warp = kernel >= kWarp;
  const std::int64_t pairs_per_block = by_warp ? kThreads / kWarp : kThreads;
  const auto blocks = static_cast<unsigned>(
      std::min(kMostBlocks, (pairs + pairs_per_block - 1) / pairs_per_block));
  auto* run = by_warp ? strength_by_warp : strength_by_thread;
  run<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(weight, pairs, kernel, out);
  ONP_CUDA_CHECK(cudaGetLastError());
}

}  // namespace onp
