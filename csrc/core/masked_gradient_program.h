// What a masked gradient is planned into beside its forward program: each step backwards, and where
// the buffers of both passes lie.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "core/masked_forward_program.h"
#include "core/masked_gradient.h"

namespace onp {

constexpr std::int64_t kAbsent = -1;

// Which outputs a call asks for.
struct GradientMode {
  bool gated;
  bool moments;
};

// One step backwards.
struct Reverse {
  // A part of a backward convolution: input pixels that see the kernel's taps alike.
  struct Part {
    Step step;
    std::vector<std::int32_t> target;  // offsets in the input's gradient
  };
  Buffer gradient;  // of the operation's result, with the halo that `parts` read
  std::vector<Part> parts;
  bool gaps = false;  // some input pixels see no tap
  // Offsets in the input's gradient: of a pool's windows; of a pick's pixels, zeros left out,
  std::vector<std::int32_t> gradient_offset;
  std::vector<std::int32_t> picked;  // and of these in `gradient`
};

// Buffers of a step beside those of the forward program; kAbsent where they cannot exist.
struct Extras {
  std::int64_t active = kAbsent;        // final before its gate
  std::int64_t result = kAbsent;        // output of a norm folded into the operation
  std::int64_t scaled = kAbsent;        // output of a norm behind it
  std::int64_t first_slope = kAbsent;   // derivatives of activations that are not a matter of
  std::int64_t second_slope = kAbsent;  // passing or not
  NormUnits units;
};

// Where the buffers of one block lie: kept ones for the backward pass, others until last read.
struct GradientLayout {
  struct Place {
    bool present = false, kept = false;
    std::int64_t begin = 0;  // times images in the block
  };
  // Of each step, where it is kept whether its activations passed; kAbsent without one.
  struct Passed {
    std::int64_t first = kAbsent, second = kAbsent;
  };
  std::vector<Place> places;
  std::vector<Passed> passed;
  std::int64_t kept_floats = 0, passing_floats = 0;  // per image
};

struct GradientProgram : Network {
  // As MaskedGradientPlan's constructor.
  GradientProgram(const std::vector<BufferShape>& shapes, const std::vector<StepSpec>& specs,
                  const std::vector<NormUnits>& norms, const std::vector<ConstantSpec>& constants,
                  std::int64_t output, std::int64_t sites, std::int64_t units);

  GradientLayout lay_out(GradientMode mode, bool keep) const;

  // Images that are worked on together.
  std::int64_t block(const GradientLayout& layout, const MaskedGradientInput& input) const;

  bool is_constant(std::int64_t id) const {
    return id >= 0 && id < static_cast<std::int64_t>(constants.size()) && constants[id];
  }

  std::int64_t units;
  std::int64_t backward_scratch_floats = 0;  // where that is more than scratch_floats
  std::vector<Extras> extras;                // of each step
  std::vector<Reverse> reverse;              // of each step
  std::vector<Buffer> gradients;             // of each buffer of the caller
  Slots gradient_slots;
  std::vector<std::int64_t> gradient_begin;   // of each buffer, kAbsent: nothing flows back to it
  std::vector<std::int64_t> operation_begin;  // of each step's operation gradient

 private:
  void add_extras(const std::vector<StepSpec>& specs, const std::vector<NormUnits>& norms);
  void plan_reverse(const StepSpec& spec, const Step& step);
  void reverse_convolution(const StepSpec& spec, Reverse& back);
  void lay_out_gradients();
};

}  // namespace onp
