// The kernels that a masked gradient adds to those of a masked forward: elementwise passes over the
// buffers of one block of images, per instruction set. Plain data only, as in
// masked_forward_kernels.h.
#pragma once

#include <cstdint>

#include "core/masked_forward_kernels.h"

namespace onp {

// One value per image and channel: that of channel c of image n is data[n * stride + c].
// Unpadded. Absent if data is null.
struct PerImage {
  const float* data;
  std::int64_t stride;
};

// mean[n, c] and variance[n, c] over the pixels of an image.
struct MomentsArgs {
  std::int64_t images, pixels, channels;
  Operand values;
  float* mean;
  float* variance;
  std::int64_t stride;  // from one image's row to the next
};

// The gradient of values by their mean and variance: values * slope + offset.
struct MomentsPull {
  Operand values;  // absent: no such gradient
  PerImage slope, offset;
};

// A step's epilogue backwards, from the gradients of what it wrote to that of its operation:
//   gate_gradient += sum over pixels of final_gradient * active
//   d = final_gradient * gate;  d = d where the second activation passed, else 0, or d * its slope;
//   d += scaled's moments;      d = d * scale;  d += plain_gradient;
//   d = d where the first activation passed, else 0, or d * its slope;
//   residual_gradient = d or += d;      d += result's moments;    operation_gradient = d
// Absent parts are left out.
struct PullArgs {
  std::int64_t images, pixels, channels;
  Operand final_gradient;
  PerImage gates;
  Operand active;
  float* gate_gradient;               // rows gates.stride apart, null: none
  const std::uint8_t* second_passed;  // as in Kept, null: everywhere
  Operand second_slope;
  MomentsPull scaled;
  const float* scale;
  Operand plain_gradient;
  const std::uint8_t* first_passed;
  Operand first_slope;
  Operand residual_gradient;
  bool add_to_residual;
  MomentsPull result;
  Operand operation_gradient;
};

// A pool backwards: adds to the gradient of its input. A maximum is the first of its window, as in
// torch.
struct PoolPullArgs {
  std::int64_t images, pixels, channels;  // pixels: of the pool's output
  Operand gradient;                       // of the output
  Operand input;                          // offset[i]: where the window of output pixel i begins
  std::int64_t input_row, input_column;   // strides; input is only read for a maximum
  Operand input_gradient;                 // offset[i]: likewise
  std::int64_t gradient_row, gradient_column;
  const Window* windows;
};

// A concatenation backwards, for one of its parts: to = gradient, or to += gradient, where
// `gradient` begins at the part's first channel. And a pick, for the pixels that it picked.
struct SplitArgs {
  std::int64_t images, pixels, channels;  // channels: of the part
  Operand gradient;
  Operand to;
  bool add;
};

// A product backwards: to the first input gradient * the other, to the other gradient * the first,
// each written or, where `add` says so, added; of what is absent, nothing. Where the other has one
// pixel (`one_pixel`) it gets the sum over all pixels.
struct ProductPullArgs {
  std::int64_t images, pixels, channels;
  Operand gradient;
  Operand input[2];
  Operand to[2];
  bool add[2];
  bool one_pixel;
};

// A layer norm backwards: to = the gradient of its input, or to +=.
struct LayerNormPullArgs {
  std::int64_t images, pixels, channels;
  Operand gradient;
  Operand input;
  float epsilon;
  Operand to;
  bool add;
};

// A group norm backwards, likewise.
struct GroupNormPullArgs {
  std::int64_t images, pixels, channels, groups;
  Operand gradient;
  Operand input;
  float epsilon;
  Operand to;
  bool add;
  float* scratch;  // group_scratch(4, channels)
};

// Attention backwards: adds to the gradients of queries, keys and values, of which several may be
// one buffer; of what is absent, nothing.
struct AttentionPullArgs {
  std::int64_t images, queries, keys, channels, heads;
  const std::int32_t* index;  // as in StepArgs
  float factor;               // of the scores
  Operand gradient;
  Operand input[3];  // queries, keys and values
  Operand to[3];
  float* scratch;  // attention_pull_scratch floats
};

constexpr std::int64_t attention_pull_scratch(std::int64_t queries, std::int64_t keys,
                                              std::int64_t size) {
  const auto whole = [](std::int64_t value) {
    return (value + kChannelBlock - 1) / kChannelBlock * kChannelBlock;
  };
  return (3 * queries + 3 * keys) * whole(size) + 2 * (size + keys) * whole(queries);
}

struct GradientKernels {
  const char* name;
  void (*moments)(const MomentsArgs&);
  void (*pull)(const PullArgs&);
  void (*max_pool)(const PoolPullArgs&);
  void (*average_pool)(const PoolPullArgs&);
  void (*split)(const SplitArgs&);
  void (*product)(const ProductPullArgs&);
  void (*layer_norm)(const LayerNormPullArgs&);
  void (*group_norm)(const GroupNormPullArgs&);
  void (*attention)(const AttentionPullArgs&);
};

extern const GradientKernels kGenericGradientKernels;
#ifdef ONP_X86_KERNELS
extern const GradientKernels kAvx2GradientKernels;
extern const GradientKernels kAvx512GradientKernels;
#endif

}  // namespace onp
