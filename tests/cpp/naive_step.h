// Steps by definition, with plain loops, and random values to run them on.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "core/masked_forward.h"

using Values = std::vector<float>;

inline Values random_values(std::int64_t size, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Values values(static_cast<std::size_t>(size));
  for (float& value : values) value = normal(random);
  return values;
}

// One output of a step's operation, by definition. `input` is one image, [C, H, W].
template <typename Value>
Value operate(const onp::StepSpec& step, const onp::BufferShape& from, const onp::BufferShape& to,
              const std::vector<Value>& input, std::int64_t o, std::int64_t y, std::int64_t x) {
  const std::int64_t group_inputs = from.channels / step.groups;
  const bool convolution = step.kind == onp::StepKind::convolution;
  const std::int64_t first = convolution ? o / (to.channels / step.groups) * group_inputs : o;
  double sum = 0, most = -INFINITY;
  int inside = 0;
  for (std::int64_t i = 0; i < (convolution ? group_inputs : 1); ++i) {
    for (std::int64_t ky = 0; ky < step.kernel_height; ++ky) {
      for (std::int64_t kx = 0; kx < step.kernel_width; ++kx) {
        const std::int64_t row = y * step.stride_height + ky - step.pad_height;
        const std::int64_t column = x * step.stride_width + kx - step.pad_width;
        if (row < 0 || row >= from.height || column < 0 || column >= from.width) continue;
        const double value = input[((first + i) * from.height + row) * from.width + column];
        const std::int64_t tap = ky * step.kernel_width + kx;
        const std::int64_t taps = step.kernel_height * step.kernel_width;
        sum += convolution ? value * step.weight[(o * group_inputs + i) * taps + tap] : value;
        most = std::max(most, value);
        ++inside;
      }
    }
  }
  if (convolution) return static_cast<Value>(sum);
  if (step.kind == onp::StepKind::max_pool) return static_cast<Value>(most);
  const auto all = static_cast<int>(step.kernel_height * step.kernel_width);
  return static_cast<Value>(sum / (step.count_include_pad ? all : inside));
}
