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

template <typename Value>
Value activate(Value value, onp::Activation activation) {
  if (activation == onp::Activation::none) return value;
  const double x = value, bent = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
  double y = std::max(x, 0.0);
  if (activation == onp::Activation::relu6) y = std::min(y, 6.0);
  if (activation == onp::Activation::gelu) y = x / 2 * std::erfc(-x / std::sqrt(2));
  if (activation == onp::Activation::gelu_tanh) y = x / 2 * (1 + std::tanh(bent));
  if (activation == onp::Activation::silu) y = x / (1 + std::exp(-x));
  const double ramp = std::min(std::max(x + 3, 0.0), 6.0) / 6;
  if (activation == onp::Activation::sigmoid) y = 1 / (1 + std::exp(-x));
  if (activation == onp::Activation::hard_sigmoid) y = ramp;
  if (activation == onp::Activation::hard_swish) y = x * ramp;
  return static_cast<Value>(y);
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

// One output of a step that looks at whole pixels, by definition: channel o of pixel p.
template <typename Value>
Value operate_pixels(const onp::StepSpec& step, const std::vector<onp::BufferShape>& buffers,
                     const std::vector<std::vector<Value>>& values, std::int64_t channels,
                     std::int64_t o, std::int64_t p) {
  const auto at = [&](std::int64_t buffer, std::int64_t channel, std::int64_t pixel) -> double {
    const onp::BufferShape shape = buffers[buffer];
    return values[buffer][channel * shape.height * shape.width + pixel];
  };
  if (step.kind == onp::StepKind::pick) {
    return step.index[p] < 0 ? Value(0) : static_cast<Value>(at(step.input, o, step.index[p]));
  }
  if (step.kind == onp::StepKind::concatenation) {
    std::int64_t buffer = step.input;
    for (const std::int64_t other : step.others) {
      if (o < buffers[buffer].channels) break;
      o -= buffers[buffer].channels;
      buffer = other;
    }
    return static_cast<Value>(at(buffer, o, p));
  }
  if (step.kind == onp::StepKind::product) {
    const onp::BufferShape other = buffers[step.others[0]];
    const bool one = other.height * other.width == 1;
    return static_cast<Value>(at(step.input, o, p) * at(step.others[0], o, one ? 0 : p));
  }
  if (step.kind == onp::StepKind::group_norm) {
    const std::int64_t size = channels / step.heads, begin = o / size * size;
    const std::int64_t pixels = buffers[step.input].height * buffers[step.input].width;
    double mean = 0, variance = 0;
    const auto over_group = [&](auto add) {
      for (std::int64_t c = begin; c < begin + size; ++c) {
        for (std::int64_t i = 0; i < pixels; ++i) add(at(step.input, c, i));
      }
    };
    over_group([&](double x) { mean += x / static_cast<double>(size * pixels); });
    over_group(
        [&](double x) { variance += std::pow(x - mean, 2) / static_cast<double>(size * pixels); });
    return static_cast<Value>((at(step.input, o, p) - mean) / std::sqrt(variance + step.value));
  }
  if (step.kind == onp::StepKind::layer_norm) {
    double mean = 0, variance = 0;
    for (std::int64_t c = 0; c < channels; ++c) mean += at(step.input, c, p) / channels;
    for (std::int64_t c = 0; c < channels; ++c) {
      variance += std::pow(at(step.input, c, p) - mean, 2) / channels;
    }
    return static_cast<Value>((at(step.input, o, p) - mean) / std::sqrt(variance + step.value));
  }
  // Attention: o belongs to one head.
  const std::int64_t size = channels / step.heads, begin = o / size * size;
  const onp::BufferShape keys = buffers[step.others[0]];
  double total = 0, sum = 0;
  for (std::int64_t t = 0; t < keys.height * keys.width; ++t) {
    double score = 0;
    for (std::int64_t d = begin; d < begin + size; ++d) {
      score += at(step.input, step.index[d], p) * at(step.others[0], step.index[channels + d], t);
    }
    const double weight = std::exp(score * step.value);
    total += weight;
    sum += weight * at(step.others[1], step.index[2 * channels + o], t);
  }
  return static_cast<Value>(sum / total);
}
