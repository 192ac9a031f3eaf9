// Masked gradient: logits of a network with frozen weights whose sites are scaled by real gates,
// the moments of its norms' outputs, and their gradients by images and gates, image by image.
//
// The backward convolutions are forward ones, with transposed and flipped weights, and run on the
// kernels of the masked forward. What only the backward pass reads again is kept between the two
// in the caller's workspace, or computed anew block by block where there is none.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/masked_forward.h"

namespace onp {

// Norms whose outputs a step computes, as the first of their units; -1: none.
struct NormUnits {
  std::int64_t result = -1;  // folded into the operation: result + bias is the norm's output
  std::int64_t scaled = -1;  // t * scale + shift is
};

struct MaskedGradientInput {
  const float* images;  // [count, channels, height, width]
  std::int64_t count;
  const float* gates;  // [count, sites], null: all 1
  float* workspace;    // workspace_floats(count, ..), null: keep nothing
  bool moments;
  int threads;      // at least 1; this and isa are the same in both passes over one workspace
  std::string isa;  // "auto" or one of instruction_sets()
};

struct MaskedGradientForward {
  float* logits;    // [count, classes]
  float* mean;      // [count, units]: over the pixels of each norm's output; null without moments
  float* variance;  // [count, units]: mean squared distance from it
};

struct MaskedGradientBackward {
  const float* logits;  // [count, classes]: gradients of the loss by the logits
  // [count, units]: the gradient by a norm's output is output * slope + offset; null: none.
  const float* slope;
  const float* offset;
  float* images;  // [count, channels, height, width], null: not wanted
  float* gates;   // [count, sites], null: not wanted; only where gates are given
};

struct GradientProgram;

// Immutable once built: several threads may run one plan.
class MaskedGradientPlan {
 public:
  // norms: one for each step. Throws onp::Error for a program that does not fit together.
  MaskedGradientPlan(const std::vector<BufferShape>& buffers, const std::vector<StepSpec>& steps,
                     const std::vector<NormUnits>& norms,
                     const std::vector<ConstantSpec>& constants, std::int64_t output,
                     std::int64_t sites, std::int64_t units);
  ~MaskedGradientPlan();

  // Results are the same to the last bit for every number of threads, with and without workspace.
  void forward(const MaskedGradientInput& input, const MaskedGradientForward& out) const;
  void backward(const MaskedGradientInput& input, const MaskedGradientBackward& out) const;

  std::int64_t workspace_floats(std::int64_t count, bool gated, bool moments) const;

 private:
  struct Run;
  std::unique_ptr<const GradientProgram> program_;
};

}  // namespace onp
