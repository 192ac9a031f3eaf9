#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "core/check.h"
#include "core/masked_forward.h"
#include "naive_step.h"
#include "token_steps.h"

namespace {

using onp::Activation;
using onp::BufferShape;
using onp::StepKind;
using onp::StepSpec;
using Words = std::vector<std::uint64_t>;

struct Network {
  std::vector<BufferShape> buffers;
  std::vector<StepSpec> steps;
  std::vector<onp::ConstantSpec> constants;
  std::int64_t output = 0;
  std::int64_t sites = 0;

  std::vector<onp::RangeSpec> ranges;
  bool halves = false;

  onp::MaskedForwardPlan plan() const {
    return {buffers, steps, constants, output, sites, ranges, halves};
  }
};

// Logits of one mask on one image, [C, H, W] buffers and plain loops.
Values naive(const Network& network, const Words& mask, const float* image) {
  const BufferShape first = network.buffers[0];
  std::vector<Values> values(network.buffers.size());
  values[0].assign(image, image + first.channels * first.height * first.width);
  for (const onp::ConstantSpec& one : network.constants) {
    const BufferShape shape = network.buffers[one.buffer];
    values[one.buffer].assign(one.values, one.values + shape.channels * shape.height * shape.width);
  }
  for (const StepSpec& step : network.steps) {
    const BufferShape from = network.buffers[step.input];
    const BufferShape to = network.buffers[step.final >= 0 ? step.final : step.plain];
    for (const std::int64_t id : {step.plain, step.final}) {
      if (id >= 0) values[id].resize(to.channels * to.height * to.width);
    }
    for (std::int64_t o = 0; o < to.channels; ++o) {
      for (std::int64_t p = 0; p < to.height * to.width; ++p) {
        const std::int64_t at = o * to.height * to.width + p;
        float t = step.kind <= StepKind::average_pool
                      ? operate(step, from, to, values[step.input], o, p / to.width, p % to.width)
                      : operate_pixels(step, network.buffers, values, to.channels, o, p);
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
                     {48, 3, 4},  {37, 2, 1}, {37, 2, 1}, {37, 1, 1}, {5, 1, 1},  {48, 3, 4}};
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
  StepSpec square;  // 6 -> 11: the shape that goes by Winograd, three rows of a tile
  square.kind = StepKind::convolution;
  square.input = 6;
  square.kernel_height = square.kernel_width = 3;
  square.pad_height = square.pad_width = 1;
  square.weight = values(48 * 48 * 9);
  square.bias = values(48);
  square.residual = 5;
  square.final = 11;
  StepSpec even;  // 11 -> 7, from channels without padding: whole kernel rows at once; too few
                  // outputs for Winograd
  even.kind = StepKind::convolution;
  even.input = 11;
  even.kernel_height = even.kernel_width = 3;
  even.stride_height = 2;
  even.stride_width = 4;
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
  global.kernel_height = 2;
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

using Build = Network (*)(std::vector<Values>&, std::mt19937&);

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

void test_equals_naive(Build build) {
  std::mt19937 random(1);
  std::vector<Values> arrays;
  const Network network = build(arrays, random);
  const onp::MaskedForwardPlan plan = network.plan();
  arrays.clear();  // the plan holds copies
  std::mt19937 again(1);
  const Network reference = build(arrays, again);
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

// Maps of all sizes by the tiles that suit them, whole and cut; more inputs and outputs than whole
// vectors. height, width: of the outputs; `rest` more rows and columns are read, 0 or 1 of
// stride 2.
struct WinogradCase {
  std::int64_t height, width, inputs, outputs, count, stride = 1, rest = 0;
  std::int64_t pad_height = 1, pad_width = 1;
};

void test_winograd(const WinogradCase& c) {
  const std::int64_t height = c.height, width = c.width, inputs = c.inputs, outputs = c.outputs;
  const std::int64_t count = c.count;
  const std::int64_t read_height = (height - 1) * c.stride + 3 + c.rest - 2 * c.pad_height;
  const std::int64_t read_width = (width - 1) * c.stride + 3 + c.rest - 2 * c.pad_width;
  constexpr std::int64_t kDifferent = 3;  // images, which come again and again
  std::mt19937 random(7);
  const Values lift = random_values(inputs * 2, random);
  Values weights = random_values(outputs * inputs * 9, random);
  for (float& weight : weights) weight /= std::sqrt(static_cast<float>(inputs));
  const Values bias = random_values(outputs, random);
  Network network;
  network.buffers = {{2, read_height, read_width},
                     {inputs, read_height, read_width},
                     {outputs, height, width},
                     {outputs, height, width},
                     {3, 1, 1},
                     {outputs, height, width}};
  StepSpec first;  // 0 -> 1
  first.kind = StepKind::convolution;
  first.weight = lift.data();
  first.first = Activation::relu;
  first.final = 1;
  StepSpec square = first;  // 1 -> 2 and, masked, 3
  square.input = 1;
  square.kernel_height = square.kernel_width = 3;
  square.pad_height = c.pad_height;
  square.pad_width = c.pad_width;
  square.stride_height = square.stride_width = c.stride;
  square.weight = weights.data();
  square.bias = bias.data();
  square.plain = 2;
  square.site_start = 0;
  square.final = 3;
  StepSpec again = square;  // 1 -> 5, masked, on top of the first
  again.residual = 2;
  again.plain = -1;
  again.final = 5;
  StepSpec sum = square;  // 5 -> 4: every pixel counts by itself
  const Values positions = random_values(3 * outputs * height * width, random);
  sum.input = 5;
  sum.kernel_height = height;
  sum.kernel_width = width;
  sum.pad_height = sum.pad_width = 0;
  sum.stride_height = sum.stride_width = 1;
  sum.weight = positions.data();
  sum.bias = nullptr;
  sum.first = Activation::none;
  sum.plain = sum.site_start = -1;
  sum.residual = 6;
  sum.final = 4;
  StepSpec other = sum;  // 3 -> 6
  other.input = 3;
  other.residual = -1;
  other.final = 6;
  network.buffers.push_back({3, 1, 1});
  network.steps = {first, square, again, other, sum};
  network.output = 4;
  network.sites = outputs;
  const onp::MaskedForwardPlan plan = network.plan();
  const Words words((static_cast<std::size_t>(outputs) + 63) / 64, 0x1111111111111111u);
  const std::int64_t pixels = 2 * read_height * read_width;
  const Values different = random_values(kDifferent * pixels, random);
  Values images, expected;
  for (std::int64_t n = 0; n < count; ++n) {
    const float* const image = different.data() + n % kDifferent * pixels;
    images.insert(images.end(), image, image + pixels);
    if (n >= kDifferent) continue;
    for (const float logit : naive(network, words, image)) expected.push_back(logit);
  }
  for (const std::string& isa : onp::instruction_sets()) {
    for (const int threads : {1, 2}) {
      Values logits(static_cast<std::size_t>(count * 3), NAN);
      onp::MaskedForwardRun run;
      run.images = images.data();
      run.count = count;
      run.masks = {words.data(), 1, static_cast<std::int64_t>(words.size())};
      run.logits = logits.data();
      run.share = false;
      run.threads = threads;
      run.max_bytes = std::int64_t{1} << 30;
      run.isa = isa;
      plan.run(run);
      bool close = true;
      for (std::size_t i = 0; i < logits.size(); ++i) {
        const float wanted = expected[i % expected.size()];
        close &= std::fabs(logits[i] - wanted) <= 1e-3f + 1e-4f * std::fabs(wanted);
      }
      CHECK(close);
    }
  }
}

void test_winograd_sizes() {
  for (std::int64_t height = 1; height <= 9; ++height) {
    for (std::int64_t width = 1; width <= 9; ++width) {
      test_winograd({height, width, 17, 20, 4});
      for (const std::int64_t rest : {0, 1}) test_winograd({height, width, 17, 20, 4, 2, rest});
    }
  }
  for (const std::int64_t stride : {1, 2}) {
    test_winograd({14, 14, 16, 48, 2, stride});
    test_winograd({10, 13, 33, 5, 7, stride});
    for (std::int64_t pad = 0; pad <= 3; ++pad) {
      test_winograd({9, 10, 16, 16, 3, stride, 0, pad, 3 - pad});
      test_winograd({7, 8, 16, 16, 3, stride, stride - 1, 2, pad});
    }
    // Weights that fit no cache.
    test_winograd({4, 3, 352, 340, 50, stride});
    test_winograd({2, 2, 512, 520, 26, stride});
  }
}

// A step in whose output bytes are exact: images of whole sixteenths go through unchanged to some
// channels each, so that only the weights behind it are rounded.
struct ByteCase {
  std::int64_t inputs, outputs, height, width, kernel, stride;
  bool negative;
};

// As a byte convolution rounds them: 127 levels either way per output channel, of the weights times
// what one level of their input is worth.
Values rounded_weights(const Values& weights, std::int64_t outputs, const Values& levels,
                       std::int64_t taps) {
  const auto row = static_cast<std::int64_t>(weights.size()) / outputs;
  Values rounded(weights.size());
  for (std::int64_t o = 0; o < outputs; ++o) {
    double most = 0;
    for (std::int64_t i = 0; i < row; ++i) {
      most = std::max(most, std::abs(double{weights[o * row + i]} / levels[i / taps]));
    }
    for (std::int64_t i = 0; i < row; ++i) {
      const double level = levels[i / taps], unit = most / 127;
      const double scaled = double{weights[o * row + i]} / level / unit;
      rounded[o * row + i] = static_cast<float>(std::round(scaled) * unit * level);
    }
  }
  return rounded;
}

void test_bytes(const ByteCase& c) {
  std::mt19937 random(5);
  const std::int64_t pad = c.kernel / 2, taps = c.kernel * c.kernel;
  const std::int64_t height = (c.height + 2 * pad - c.kernel) / c.stride + 1;
  const std::int64_t width = (c.width + 2 * pad - c.kernel) / c.stride + 1;
  Values copies(c.inputs * 3);  // weights of the first step
  for (std::int64_t o = 0; o < c.inputs; ++o) copies[o * 3 + o % 3] = 1;
  Values weights = random_values(c.outputs * c.inputs * taps, random);
  const Values bias = random_values(c.outputs, random), scale = random_values(c.outputs, random);
  const Values shift = random_values(c.outputs, random);
  const Values head = random_values(5 * c.outputs, random);
  Network network;
  network.buffers = {{3, c.height, c.width},
                     {c.inputs, c.height, c.width},
                     {c.outputs, height, width},
                     {c.outputs, height, width},
                     {c.outputs, height, width},
                     {c.outputs, 1, 1},
                     {5, 1, 1}};
  StepSpec first;  // 0 -> 1, some of it pruned
  first.kind = StepKind::convolution;
  first.weight = copies.data();
  first.site_start = 0;
  first.final = 1;
  StepSpec middle;  // 1 -> 2 and 3, every part of an epilogue
  middle.kind = StepKind::convolution;
  middle.input = 1;
  middle.kernel_height = middle.kernel_width = c.kernel;
  middle.stride_height = middle.stride_width = c.stride;
  middle.pad_height = middle.pad_width = pad;
  middle.weight = weights.data();
  middle.bias = bias.data();
  middle.first = Activation::relu;
  middle.plain = 2;
  middle.scale = scale.data();
  middle.shift = shift.data();
  middle.second = Activation::relu;
  middle.site_start = c.inputs;
  middle.final = 3;
  StepSpec sum = middle;  // 1 -> 4, a residual and no bias
  sum.bias = sum.scale = sum.shift = nullptr;
  sum.first = sum.second = Activation::none;
  sum.residual = 2;
  sum.plain = -1;
  sum.site_start = -1;
  sum.final = 4;
  StepSpec pool;  // 4 -> 5
  pool.kind = StepKind::average_pool;
  pool.input = 4;
  pool.kernel_height = height;
  pool.kernel_width = width;
  pool.final = 5;
  StepSpec linear;  // 5 -> 6: floats, of a single pixel
  linear.kind = StepKind::convolution;
  linear.input = 5;
  linear.weight = head.data();
  linear.final = 6;
  network.steps = {first, middle, sum, pool, linear};
  network.output = 6;
  network.sites = c.inputs + c.outputs;
  const float level = c.negative ? 16 : 32;
  onp::RangeSpec range{1, c.negative ? -1.0f : 0.0f, {}};
  for (std::int64_t i = 0; i < c.inputs; ++i) {
    // Every third channel has a range of its own; one that is far too small is widened to an
    // eighth.
    const float most = (c.negative ? 127 : 255) / level / 1.5f;  // what the plan leaves as room
    range.highest.push_back(i % 3 == 0 ? most : i % 3 == 1 ? most / 2 : most / 1000);
  }
  network.ranges = {range};
  Values levels;
  for (std::int64_t i = 0; i < c.inputs; ++i) {
    levels.push_back(i % 3 == 0 ? level : i % 3 == 1 ? 2 * level : 8 * level);
  }
  const onp::MaskedForwardPlan plan = network.plan();
  CHECK(plan.narrow_steps() == 2);

  const std::int64_t count = 3, batch = 3;
  Values images(count * 3 * c.height * c.width);
  const std::int64_t pixels = c.height * c.width;
  for (std::size_t i = 0; i < images.size(); ++i) {
    // Whole sixteenths inside every channel's range: -15/16 to 15/16, or 0 to 15/16.
    const int sixteenths = static_cast<int>(random() % 16);
    images[i] = (c.negative && random() % 2 ? -sixteenths : sixteenths) / 16.0f;
    if (static_cast<std::int64_t>(i) / pixels % 3 == 2) images[i] *= 0.9375f;
    images[i] = std::round(images[i] * level) / level;
  }
  Words words(2 * batch);
  for (std::size_t w = 2; w < words.size(); ++w) words[w] = random() & random();
  const Values rounded = rounded_weights(weights, c.outputs, levels, taps);
  std::copy(rounded.begin(), rounded.end(), weights.begin());  // the plan holds copies
  Values expected;
  for (std::int64_t mask = 0; mask < batch; ++mask) {
    for (std::int64_t n = 0; n < count; ++n) {
      const Words bits(words.begin() + 2 * mask, words.begin() + 2 * mask + 2);
      for (const float x : naive(network, bits, images.data() + n * 3 * pixels)) {
        expected.push_back(x);
      }
    }
  }
  for (const std::string& isa : onp::instruction_sets()) {
    const Values got = run(plan, network, words, images, count, false, 1, 1 << 30, isa);
    bool close = true;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      close &= std::fabs(got[i] - expected[i]) <= 1e-4f + 1e-4f * std::fabs(expected[i]);
    }
    CHECK(close);
    for (const bool share : {false, true}) {
      for (const int threads : {1, 3}) {
        for (const std::int64_t times : {1, 2, 100}) {
          const std::int64_t bytes = times * plan.least_bytes(share);
          CHECK(run(plan, network, words, images, count, share, threads, bytes, isa) == got);
        }
      }
    }
  }
}

// Close to fp32 in every instruction set, and the same whatever the options are.
void test_halves(Build build, std::int64_t half_steps) {
  std::mt19937 random(7);
  std::vector<Values> arrays;
  Network network = build(arrays, random);
  const std::int64_t count = 3;
  const Values images = random_values(count * 3 * 11 * 13, random);
  const Words words = {0, 0, random() & random(), random() & random()};
  const Values floats =
      run(network.plan(), network, words, images, count, true, 1, 1 << 30, "auto");
  network.halves = true;
  const onp::MaskedForwardPlan plan = network.plan();
  CHECK(plan.narrow_steps() == half_steps);
  for (const std::string& isa : onp::instruction_sets()) {
    const Values once = run(plan, network, words, images, count, false, 1, 1 << 30, isa);
    double most = 0, error = 0;
    for (std::size_t i = 0; i < floats.size(); ++i) {
      most = std::max(most, std::abs(double{floats[i]}));
      error = std::max(error, std::abs(double{floats[i]} - once[i]));
    }
    CHECK(error > 0 && error < 0.02 * most);
    for (const bool share : {false, true}) {
      for (const std::int64_t times : {1, 2, 100}) {
        const std::int64_t bytes = times * plan.least_bytes(share);
        CHECK(run(plan, network, words, images, count, share, 3, bytes, isa) == once);
      }
    }
  }
  network.ranges = {{1, 0.0f, {}}};
  CHECK_THROWS(network.plan(), onp::Error);
}

// What a plan measures, another takes; ranges that no convolution of bytes reads are left alone.
void test_ranges(Build build, std::int64_t byte_steps) {
  std::mt19937 random(6);
  std::vector<Values> arrays;
  Network network = build(arrays, random);
  const onp::MaskedForwardPlan plan = network.plan();
  CHECK(plan.narrow_steps() == 0);
  const std::int64_t count = 2;
  const Values images = random_values(count * 3 * 11 * 13, random);
  const Words words = {0, 0, random() & random(), random() & random()};
  onp::MaskedForwardRun asked{};
  asked.images = images.data();
  asked.count = count;
  asked.masks = {words.data(), 2, 2};
  asked.isa = "auto";
  network.ranges = plan.ranges(asked);
  CHECK(network.ranges.size() == network.steps.size());
  const onp::MaskedForwardPlan bytes = network.plan();
  CHECK(bytes.narrow_steps() == byte_steps);
  CHECK_THROWS(bytes.ranges(asked), onp::Error);
  const Values floats = run(plan, network, words, images, count, true, 1, 1 << 30, "auto");
  double most = 0, error = 0;
  for (const std::string& isa : onp::instruction_sets()) {
    const Values rough = run(bytes, network, words, images, count, true, 1, 1 << 30, isa);
    for (std::size_t i = 0; i < floats.size(); ++i) {
      most = std::max(most, std::abs(double{floats[i]}));
      error = std::max(error, std::abs(double{floats[i]} - rough[i]));
    }
  }
  CHECK(error > 0 && error < 0.05 * most);

  const auto refuses = [&](auto change) {
    Network bad = network;
    change(bad.ranges);
    CHECK_THROWS(bad.plan(), onp::Error);
  };
  refuses([](auto& ranges) { ranges[0].buffer = 99; });
  refuses([](auto& ranges) { ranges[1].buffer = ranges[0].buffer; });
  refuses([](auto& ranges) { ranges[0].highest.pop_back(); });
  refuses([](auto& ranges) {
    for (auto& one : ranges) one.highest.assign(one.highest.size(), INFINITY);
  });
}

void test_empty() {
  std::mt19937 random(2);
  std::vector<Values> arrays;
  const Network network = every_step(arrays, random);
  const onp::MaskedForwardPlan plan = network.plan();
  CHECK(run(plan, network, {}, Values(3 * 11 * 13), 1, true, 2, 1 << 30, "auto").empty());
  CHECK(run(plan, network, {0, 0}, {}, 0, true, 2, 1 << 30, "auto").empty());
}

void test_refuses() {
  std::mt19937 random(3);
  std::vector<Values> arrays;
  const Network good = every_step(arrays, random);
  const auto build = [](const Network& n) { n.plan(); };
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

  const onp::MaskedForwardPlan plan = good.plan();
  const Values image(3 * 11 * 13);
  CHECK_THROWS(run(plan, good, {0, 0}, image, 1, true, 0, 1 << 30, "auto"), onp::Error);
  CHECK_THROWS(run(plan, good, {0, 0}, image, 1, true, 1, 1000, "auto"), onp::Error);
  CHECK_THROWS(run(plan, good, {0, 0}, image, 1, true, 1, 1 << 30, "mmx"), onp::Error);
}

void test_refuses_tokens() {
  std::mt19937 random(4);
  std::vector<Values> arrays;
  const Network good = token_steps<Network>(arrays, random);
  good.plan();
  const auto refuses = [&](auto change) {
    Network bad = good;
    change(bad);
    CHECK_THROWS(bad.plan(), onp::Error);
  };
  refuses([](Network& n) { n.steps[1].index[3] = 30; });
  refuses([](Network& n) { n.steps[1].index.pop_back(); });
  refuses([](Network& n) { n.steps[2].input = 1; });
  refuses([](Network& n) { n.steps[3].input = 3; });  // a constant is no input
  refuses([](Network& n) { n.steps[4].index[59] = 60; });
  refuses([](Network& n) { n.steps[4].heads = 3; });
  refuses([](Network& n) { n.steps[4].others = {5}; });
  refuses([](Network& n) { n.steps[4].others = {5, 1}; });
  refuses([](Network& n) { n.steps[5].others = {10, 5}; });
  refuses([](Network& n) { n.steps[5].others = {10, 7}; });  // written by itself
  refuses([](Network& n) { n.steps[8].others = {4}; });      // of other channels
  refuses([](Network& n) { n.steps[8].others = {11, 7}; });
  refuses([](Network& n) { n.buffers[11] = {60, 2, 1}; });
  refuses([](Network& n) { n.steps[10].heads = 7; });
  refuses([](Network& n) { n.steps[10].heads = 0; });
  refuses([](Network& n) { n.constants[0].buffer = 2; });
  refuses([](Network& n) { n.constants[0].buffer = 0; });
  refuses([](Network& n) { n.steps[0].kind = static_cast<StepKind>(9); });
  refuses([](Network& n) { n.steps[0].first = static_cast<Activation>(9); });
  refuses([](Network& n) { n.constants[0].values = nullptr; });
  refuses([](Network& n) { n.steps[2].input = n.steps[2].residual = 3; });
  refuses([](Network& n) { n.output = 0; });
  refuses([](Network& n) {  // no step writes it
    n.buffers.push_back({5, 1, 1});
    n.constants.push_back({11, n.constants[0].values});
    n.output = 11;
  });
}

}  // namespace

int main() {
  test_equals_naive(every_step);
  test_equals_naive(token_steps<Network>);
  test_winograd_sizes();
  for (const bool negative : {false, true}) {
    test_bytes({16, 16, 7, 5, 3, 1, negative});
    test_bytes({18, 37, 8, 8, 3, 2, negative});
    test_bytes({32, 5, 6, 9, 1, 1, negative});
    test_bytes({33, 48, 5, 5, 5, 2, negative});
  }
  test_ranges(every_step, 3);
  test_ranges(token_steps<Network>, 1);
  test_halves(every_step, 2);
  test_halves(token_steps<Network>, 1);
  test_empty();
  test_refuses();
  test_refuses_tokens();
  return report();
}
