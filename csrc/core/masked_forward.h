// Masked forward: a network as a short program of steps over buffers, planned once; one run
// evaluates many masks on many images, in fp32, with convolutions of bf16 or, told the ranges of
// its buffers, of 8 bits. Square 3x3 convolutions of stride 1 or 2 with 16 or more input channels
// go by Winograd, by tiles of 4x4 or 2x2 outputs, where that saves products: the rounding differs a
// little from a direct sum.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/masked_forward_kernels.h"
#include "core/views.h"

namespace onp {

enum class StepKind : int {
  convolution = 0,
  max_pool = 1,
  average_pool = 2,
  pick = 3,           // pixel i is the input's pixel index[i]; zeros where that is -1
  concatenation = 4,  // the channels of `input` and of the `others`, one behind the other
  layer_norm = 5,     // each pixel's channels at mean 0 and variance 1; `value` is the epsilon
  attention = 6,      // softmax(value * queries keys^T) values between pixels, per head
  product = 7,        // `input` times the other one, which may have one pixel for all of its own
  group_norm = 8,     // each group's channels, over all pixels, at mean 0 and variance 1
};

// The shape of one value of one image. Buffer 0 holds the images.
struct BufferShape {
  std::int64_t channels;
  std::int64_t height;
  std::int64_t width;
};

// One step, as the caller describes it. The arrays are read while the plan is built, never later.
// A step computes, per output channel, with absent parts left out:
//   t = operation(input) + bias + residual;  t = first(t);        plain = t
//   t = t * scale + shift;  t = second(t);  t = 0 where pruned;   final = t
// A max pool of window 1 is the identity.
struct StepSpec {
  StepKind kind = StepKind::max_pool;
  std::int64_t input = 0;
  std::int64_t kernel_height = 1, kernel_width = 1;
  std::int64_t stride_height = 1, stride_width = 1;
  std::int64_t pad_height = 0, pad_width = 0;
  std::int64_t groups = 1;
  bool count_include_pad = true;
  std::vector<std::int64_t> others;  // buffers; attention: keys and values, `input` has the queries
  std::vector<std::int64_t> index;   // pick: pixels; attention: [3, heads, D], the channels that
                                     // each head reads of queries, keys and values
  std::int64_t heads = 0;  // output channel h * D + d comes from head h; group norm: groups
  float value = 0;
  const float* weight = nullptr;  // [out channels, in channels / groups, kernel height, width]
  const float* bias = nullptr;    // [out channels]
  std::int64_t residual = -1;     // buffer, -1: none
  Activation first = Activation::none;
  std::int64_t plain = -1;       // buffer, -1: none
  const float* scale = nullptr;  // [out channels], null: none
  const float* shift = nullptr;  // [out channels], null with scale
  Activation second = Activation::none;
  std::int64_t site_start = -1;  // site of output channel 0, -1: not masked
  std::int64_t final = -1;       // buffer, -1: none

  // The buffers that the operation itself reads, in order.
  std::vector<std::int64_t> operands() const {
    std::vector<std::int64_t> ids = {input};
    ids.insert(ids.end(), others.begin(), others.end());
    return ids;
  }
};

// A buffer that no step writes: the same values for every image, read as residuals alone.
struct ConstantSpec {
  std::int64_t buffer;
  const float* values;  // [C, H, W], read while the plan is built
};

// What the values of a buffer that a step's `final` writes were seen to reach, so that convolutions
// may read them as bytes: `lowest` over all channels, `highest` absolute value per channel.
struct RangeSpec {
  std::int64_t buffer;
  float lowest;
  std::vector<float> highest;
};

struct MaskedForwardRun {
  const float* images;  // [count, channels, height, width]
  std::int64_t count;
  MaskView masks;
  float* logits;           // [masks, count, channels of the output buffer]
  bool share;              // keep what a mask has in common with the one before it
  int threads;             // at least 1
  std::int64_t max_bytes;  // bound on one thread's buffers
  std::string isa;         // "auto" or one of instruction_sets()
};

// Names of the kernel tables that this processor runs, widest first.
std::vector<std::string> instruction_sets();

// Immutable once built: several threads may run one plan.
class MaskedForwardPlan {
 public:
  // ranges: convolutions read bytes; halves, without ranges: they read bf16; each where that is
  // worth it. Throws onp::Error for a program that does not fit together.
  MaskedForwardPlan(const std::vector<BufferShape>& buffers, const std::vector<StepSpec>& steps,
                    const std::vector<ConstantSpec>& constants, std::int64_t output,
                    std::int64_t sites, const std::vector<RangeSpec>& ranges = {},
                    bool halves = false);
  ~MaskedForwardPlan();

  // Logits are the same to the last bit for every choice of share, threads and max_bytes.
  // Convolutions may leave out inputs that are pruned, so weights for these need not be numbers.
  void run(const MaskedForwardRun& run) const;

  // The ranges of all buffers that a step's `final` writes, over the masks and images of a run; its
  // logits, threads and max_bytes count for nothing.
  std::vector<RangeSpec> ranges(const MaskedForwardRun& run) const;

  // How many convolutions read bytes or halves.
  std::int64_t narrow_steps() const;

  // The least that max_bytes may be: one thread's buffers for one image.
  std::int64_t least_bytes(bool share) const;

 private:
  struct Program;
  std::unique_ptr<const Program> program_;
};

}  // namespace onp
