#include "core/masked_forward.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "core/check.h"
#include "naive_step.h"

namespace {

using onp::Activation;
using onp::BufferShape;
using onp::StepKind;
using onp::StepSpec;
using Words = std::vector<std::uint64_t>;

struct Network {
  std::vector<BufferShape> buffers;
  std::vector<StepSpec> steps;
  std::int64_t output = 0;
  std::int64_t sites = 0;
};

float activate(float value, Activation activation) {
  if (activation == Activation::none) return value;
  return std::min(std::max(value, 0.0f), activation == Activation::relu6 ? 6.0f : 1e30f);
}

// Logits of one mask on one image, [C, H, W] buffers and plain loops.
Values naive(const Network& network, const Words& mask, const float* image) {
  const BufferShape first = network.buffers[0];
  std::vector<Values> values(network.buffers.size());
  values[0].assign(image, image + first.channels * first.height * first.width);
  for (const StepSpec& step : network.steps) {
    const BufferShape from = network.buffers[step.input];
    const BufferShape to = network.buffers[step.final >= 0 ? step.final : step.plain];
    for (const std::int64_t id : {step.plain, step.final}) {
      if (id >= 0) values[id].resize(to.channels * to.height * to.width);
    }
    for (std::int64_t o = 0; o < to.channels; ++o) {
      for (std::int64_t p = 0; p < to.height * to.width; ++p) {
        const std::int64_t at = o * to.height * to.width + p;
        float t = operate(step, from, to, values[step.input], o, p / to.width, p % to.width);
        if (step.bias) t += step.bias[o];
        if (step.residual >= 0) t += values[step.residual][at];
        t = activate(t, step.first);
        if (step.plain >= 0) values[step.plain][at] = t;
        if (step.scale) t = t * step.scale[o] + step.shift[o];
        t = activate(t, step.second);
        const std::int64_t site = step.site_start + o;
        if (step.site_start >= 0 && (mask[site / 64] >> (site % 64) & 1)) t = 0;
        if (step.final >= 0) values[step.final][at] = t;
      }
    }
  }
  return values[network.output];
}

// Every kind of step and of epilogue; channel counts off the vector widths; odd sizes.
Network every_step(std::vector<Values>& arrays, std::mt19937& random) {
  const auto values = [&](std::int64_t size) {
    arrays.push_back(random_values(size, random));
    return arrays.back().data();
  };
  Network network;
  network.buffers = {{3, 11, 13}, {20, 6, 7}, {20, 6, 7}, {20, 6, 7}, {48, 6, 7}, {48, 3, 4},
                     {48, 3, 4},  {37, 2, 2}, {37, 2, 2}, {37, 1, 1}, {5, 1, 1}, {48, 3, 4}};
  StepSpec stem;  // 0 -> 1 unmasked, 2 masked
  stem.kind = StepKind::convolution;
  stem.kernel_height = stem.kernel_width = 3;
  stem.stride_height = stem.stride_width = 2;
  stem.pad_height = stem.pad_width = 1;
  stem.weight = values(20 * 3 * 9);
  stem.plain = 1;
  stem.scale = values(20);
  stem.shift = values(20);
  stem.second = Activation::relu;
  stem.site_start = 0;
  stem.final = 2;
  StepSpec grouped = stem;  // 2 -> 3, with the residual sum
  grouped.input = 2;
  grouped.stride_height = grouped.stride_width = 1;
  grouped.groups = 5;
  grouped.weight = values(20 * 4 * 9);
  grouped.bias = values(20);
  grouped.residual = 1;
  grouped.first = Activation::relu6;
  grouped.plain = -1;
  grouped.scale = grouped.shift = nullptr;
  grouped.second = Activation::none;
  grouped.site_start = 20;
  grouped.final = 3;
  StepSpec wide = grouped;  // 3 -> 4
  wide.input = 3;
  wide.kernel_width = 5;
  wide.pad_width = 2;
  wide.groups = 1;
  wide.weight = values(48 * 20 * 15);
  wide.bias = nullptr;
  wide.residual = -1;
  wide.site_start = -1;
  wide.plain = -1;
  wide.final = 4;
  StepSpec pool;  // 4 -> 5
  pool.kind = StepKind::max_pool;
  pool.input = 4;
  pool.kernel_height = pool.kernel_width = 3;
  pool.stride_height = pool.stride_width = 2;
  pool.pad_height = pool.pad_width = 1;
  pool.final = 5;
  StepSpec depthwise = stem;  // 5 -> 6
  depthwise.input = 5;
  depthwise.stride_height = depthwise.stride_width = 1;
  depthwise.groups = 48;
  depthwise.weight = values(48 * 9);
  depthwise.bias = values(48);
  depthwise.plain = -1;
  depthwise.scale = depthwise.shift = nullptr;
  depthwise.second = Activation::relu6;
  depthwise.site_start = 40;
  depthwise.final = 6;
  StepSpec square;  // 6 -> 11: the shape that goes by Winograd, an odd number of rows
  square.kind = StepKind::convolution;
  square.input = 6;
  square.kernel_height = square.kernel_width = 3;
  square.pad_height = square.pad_width = 1;
  square.weight = values(48 * 48 * 9);
  square.bias = values(48);
  square.residual = 5;
  square.final = 11;
  StepSpec even;  // 11 -> 7, from channels without padding: whole kernel rows at once
  even.kind = StepKind::convolution;
  even.input = 11;
  even.kernel_height = even.kernel_width = 3;
  even.stride_height = even.stride_width = 2;
  even.pad_height = even.pad_width = 1;
  even.weight = values(37 * 48 * 9);
  even.final = 7;
  StepSpec average = pool;  // 7 -> 8
  average.kind = StepKind::average_pool;
  average.input = 7;
  average.stride_height = average.stride_width = 1;
  average.count_include_pad = false;
  average.final = 8;
  StepSpec global;  // 8 -> 9
  global.kind = StepKind::average_pool;
  global.input = 8;
  global.kernel_height = global.kernel_width = 2;
  global.site_start = 88;
  global.final = 9;
  StepSpec linear;  // 9 -> 10
  linear.kind = StepKind::convolution;
  linear.input = 9;
  linear.weight = values(5 * 37);
  linear.bias = values(5);
  linear.final = 10;
  network.steps = {stem, grouped, wide, pool, depthwise, square, even, average, global, linear};
  network.output = 10;
  network.sites = 125;
  return network;
}

Values run(const onp::MaskedForwardPlan& plan, const Network& network, const Words& words,
           const Values& images, std::int64_t count, bool share, int threads,
           std::int64_t max_bytes, const std::string& isa) {
  const auto batch = static_cast<std::int64_t>(words.size()) / 2;
  Values logits(static_cast<std::size_t>(batch * count * network.buffers[network.output].channels),
                NAN);
  onp::MaskedForwardRun run;
  run.images = images.data();
  run.count = count;
  run.masks = {words.data(), batch, 2};
  run.logits = logits.data();
  run.share = share;
  run.threads = threads;
  run.max_bytes = max_bytes;
  run.isa = isa;
  plan.run(run);
  return logits;
}

void test_equals_naive() {
  std::mt19937 random(1);
  std::vector<Values> arrays;
  const Network network = every_step(arrays, random);
  const onp::MaskedForwardPlan plan(network.buffers, network.steps, network.output, network.sites);
  arrays.clear();  // the plan holds copies
  std::mt19937 again(1);
  const Network reference = every_step(arrays, again);
  const std::int64_t count = 7, batch = 5, pixels = 3 * 11 * 13;
  const Values images = random_values(count * pixels, random);
  Words words(2 * batch);
  for (std::size_t w = 2; w < words.size(); ++w) words[w] = random() & random();
  words[4] = words[2];  // a mask that differs from its neighbour in late layers only
  Values expected;
  for (std::int64_t mask = 0; mask < batch; ++mask) {
    for (std::int64_t n = 0; n < count; ++n) {
      const Words bits(words.begin() + 2 * mask, words.begin() + 2 * mask + 2);
      for (const float logit : naive(reference, bits, images.data() + n * pixels)) {
        expected.push_back(logit);
      }
    }
  }
  for (const std::string& isa : onp::instruction_sets()) {
    const Values first =
        run(plan, network, words, images, count, false, 1, std::int64_t{1} << 30, isa);
    bool close = true;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      close &= std::fabs(first[i] - expected[i]) <= 1e-3f + 1e-4f * std::fabs(expected[i]);
    }
    CHECK(close);
    for (const bool share : {false, true}) {
      for (const int threads : {1, 3}) {
        for (const std::int64_t times : {1, 3, 100}) {
          const std::int64_t bytes = times * plan.least_bytes(share);
          CHECK(run(plan, network, words, images, count, share, threads, bytes, isa) == first);
        }
      }
    }
  }
}

void test_empty() {
  std::mt19937 random(2);
  std::vector<Values> arrays;
  const Network network = every_step(arrays, random);
  const onp::MaskedForwardPlan plan(network.buffers, network.steps, network.output, network.sites);
  CHECK(run(plan, network, {}, Values(3 * 11 * 13), 1, true, 2, 1 << 30, "auto").empty());
  CHECK(run(plan, network, {0, 0}, {}, 0, true, 2, 1 << 30, "auto").empty());
}

void test_refuses() {
  std::mt19937 random(3);
  std::vector<Values> arrays;
  const Network good = every_step(arrays, random);
  const auto build = [](const Network& n) {
    onp::MaskedForwardPlan(n.buffers, n.steps, n.output, n.sites);
  };
  build(good);
  Network bad = good;
  bad.steps[1].input = 12;
  CHECK_THROWS(build(bad), onp::Error);
  bad = good;
  bad.steps[1].input = 4;  // read before it is written
  CHECK_THROWS(build(bad), onp::Error);
  bad = good;
  bad.buffers[5].width = 5;
  CHECK_THROWS(build(bad), onp::Error);
  bad = good;
  bad.steps[1].groups = 3;
  CHECK_THROWS(build(bad), onp::Error);
  bad = good;
  bad.sites = 100;
  CHECK_THROWS(build(bad), onp::Error);
  bad = good;
  bad.output = 8;
  CHECK_THROWS(build(bad), onp::Error);

  const onp::MaskedForwardPlan plan(good.buffers, good.steps, good.output, good.sites);
  const Values image(3 * 11 * 13);
  CHECK_THROWS(run(plan, good, {0, 0}, image, 1, true, 0, 1 << 30, "auto"), onp::Error);
  CHECK_THROWS(run(plan, good, {0, 0}, image, 1, true, 1, 1000, "auto"), onp::Error);
  CHECK_THROWS(run(plan, good, {0, 0}, image, 1, true, 1, 1 << 30, "mmx"), onp::Error);
}

}  // namespace

int main() {
  test_equals_naive();
  test_empty();
  test_refuses();
  return report();
}
