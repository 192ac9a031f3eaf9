#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "core/check.h"
#include "core/masked_gradient.h"
#include "naive_step.h"
#include "token_steps.h"

namespace {

using onp::Activation;
using onp::BufferShape;
using onp::StepKind;
using onp::StepSpec;
using Doubles = std::vector<double>;

struct Network {
  std::vector<BufferShape> buffers;
  std::vector<StepSpec> steps;
  std::vector<onp::NormUnits> norms;
  std::vector<onp::ConstantSpec> constants;
  std::int64_t output = 0;
  std::int64_t sites = 0;
  std::int64_t units = 0;

  std::int64_t pixels() const { return buffers[0].channels * buffers[0].height * buffers[0].width; }
  std::int64_t classes() const { return buffers[output].channels; }
};

struct Outputs {
  Doubles logits, mean, variance;
};

// One image, [C, H, W] buffers and plain loops in double precision.
Outputs naive(const Network& network, const Doubles& image, const Doubles& gates) {
  std::vector<Doubles> values(network.buffers.size());
  values[0] = image;
  for (const onp::ConstantSpec& one : network.constants) {
    const BufferShape shape = network.buffers[one.buffer];
    values[one.buffer].assign(one.values, one.values + shape.channels * shape.height * shape.width);
  }
  Outputs out;
  out.mean.resize(network.units);
  out.variance.resize(network.units);
  for (std::size_t s = 0; s < network.steps.size(); ++s) {
    const StepSpec& step = network.steps[s];
    const BufferShape from = network.buffers[step.input];
    const BufferShape to = network.buffers[step.final >= 0 ? step.final : step.plain];
    const std::int64_t pixels = to.height * to.width;
    for (const std::int64_t id : {step.plain, step.final}) {
      if (id >= 0) values[id].resize(to.channels * pixels);
    }
    for (std::int64_t o = 0; o < to.channels; ++o) {
      Doubles result(pixels), scaled(pixels);
      for (std::int64_t p = 0; p < pixels; ++p) {
        const std::int64_t at = o * pixels + p;
        double t = step.kind <= StepKind::average_pool
                       ? operate(step, from, to, values[step.input], o, p / to.width, p % to.width)
                       : operate_pixels(step, network.buffers, values, to.channels, o, p);
        if (step.bias) t += step.bias[o];
        result[p] = t;
        if (step.residual >= 0) t += values[step.residual][at];
        t = activate(t, step.first);
        if (step.plain >= 0) values[step.plain][at] = t;
        if (step.scale) t = t * step.scale[o] + step.shift[o];
        scaled[p] = t;
        t = activate(t, step.second);
        if (step.site_start >= 0) t *= gates[step.site_start + o];
        if (step.final >= 0) values[step.final][at] = t;
      }
      const auto tell = [&](std::int64_t first, const Doubles& norm) {
        if (first < 0) return;
        double sum = 0, squares = 0;
        for (const double x : norm) sum += x;
        const double mean = sum / static_cast<double>(pixels);
        for (const double x : norm) squares += (x - mean) * (x - mean);
        out.mean[first + o] = mean;
        out.variance[first + o] = squares / static_cast<double>(pixels);
      };
      tell(network.norms[s].result, result);
      tell(network.norms[s].scaled, scaled);
    }
  }
  out.logits = values[network.output];
  return out;
}

// Backward passes of every kind: both Winograd tiles, phases of a stride, input pixels that no
// window reads, a residual sum, pools, depthwise taps, a concatenation that reads one value twice;
// buffers with one and with several readers.
Network every_step(std::vector<Values>& arrays, std::mt19937& random) {
  const auto values = [&](std::int64_t size, double spread, double middle = 0.0) {
    arrays.push_back(random_values(size, random));
    for (float& value : arrays.back()) value = static_cast<float>(middle + spread * value);
    return arrays.back().data();
  };
  const auto convolution = [&](std::int64_t from, std::int64_t to, std::int64_t in,
                               std::int64_t out, std::int64_t kernel, std::int64_t stride) {
    StepSpec step;
    step.kind = StepKind::convolution;
    step.input = from;
    step.final = to;
    step.kernel_height = step.kernel_width = kernel;
    step.stride_height = step.stride_width = stride;
    step.pad_height = step.pad_width = kernel == 3 ? 1 : 0;
    const double fan = static_cast<double>(in * kernel * kernel);
    step.weight = values(out * in * kernel * kernel, std::sqrt(2 / fan));
    return step;
  };
  Network network;
  network.buffers = {{3, 16, 13}, {20, 8, 7}, {20, 8, 7}, {20, 8, 7}, {20, 5, 5},
                     {24, 5, 5},  {17, 3, 3}, {17, 3, 3}, {17, 3, 3}, {51, 2, 2},
                     {5, 1, 1},   {51, 3, 3}, {17, 4, 4}, {17, 3, 3}};
  StepSpec stem = convolution(0, 2, 3, 20, 3, 2);  // 0 -> 1 without gates, 2 with them
  stem.plain = 1;
  stem.scale = values(20, 0.3, 1.0);
  stem.shift = values(20, 0.3);
  stem.second = Activation::relu;
  stem.site_start = 0;
  StepSpec large = convolution(2, 3, 20, 20, 3, 1);  // 2 -> 3, Winograd tiles of 4, some cut
  large.bias = values(20, 0.3);
  large.residual = 1;
  large.first = Activation::relu;
  large.scale = values(20, 0.3, 2.0);
  large.shift = values(20, 0.3);
  large.second = Activation::relu6;
  large.site_start = 20;
  StepSpec halved = convolution(2, 12, 20, 17, 3, 2);  // 2 -> 12, Winograd of stride 2, cut
  halved.bias = values(17, 0.3);
  halved.first = Activation::relu;
  halved.site_start = 108;
  StepSpec trimmed;  // 12 -> 13
  trimmed.kind = StepKind::max_pool;
  trimmed.input = 12;
  trimmed.kernel_height = trimmed.kernel_width = 2;
  trimmed.final = 13;
  StepSpec pool;  // 3 -> 4
  pool.kind = StepKind::max_pool;
  pool.input = 3;
  pool.kernel_height = 4;
  pool.kernel_width = 3;
  pool.final = 4;
  StepSpec small = convolution(4, 5, 20, 24, 3, 1);  // 4 -> 5, tiles of 2, some cut
  small.bias = values(24, 0.3);
  StepSpec shortcut = convolution(4, 6, 20, 17, 1, 2);  // 4 -> 6, read twice
  StepSpec strided = convolution(5, 7, 24, 17, 3, 2);   // 5 -> 7
  strided.residual = 6;
  strided.first = Activation::relu;
  strided.site_start = 40;
  StepSpec depthwise = convolution(7, 8, 1, 17, 3, 1);  // 7 -> 8
  depthwise.groups = 17;
  depthwise.bias = values(17, 0.3);
  depthwise.residual = 13;
  depthwise.second = Activation::relu6;
  StepSpec joined;  // 8, 6, 8 -> 11
  joined.kind = StepKind::concatenation;
  joined.input = 8;
  joined.others = {6, 8};
  joined.final = 11;
  joined.scale = values(51, 0.3, 1.0);
  joined.shift = values(51, 0.3);
  joined.second = Activation::relu;
  joined.site_start = 57;
  StepSpec average;  // 11 -> 9
  average.kind = StepKind::average_pool;
  average.input = 11;
  average.kernel_height = average.kernel_width = 3;
  average.stride_height = average.stride_width = 2;
  average.pad_height = average.pad_width = 1;
  average.count_include_pad = false;
  average.final = 9;
  StepSpec linear = convolution(9, 10, 51, 5, 2, 1);  // 9 -> 10
  linear.bias = values(5, 0.3);
  network.steps = {stem,     large,   halved,    trimmed, pool,    small,
                   shortcut, strided, depthwise, joined,  average, linear};
  network.norms = {{-1, 0}, {20, 40}, {135, -1}, {}, {}, {60, -1}, {}, {}, {}, {-1, 84}, {}, {}};
  network.output = 10;
  network.sites = 125;
  network.units = 152;
  return network;
}

// Layer norm, attention, a pick with zeros, smooth activations, a constant.
Network tokens(std::vector<Values>& arrays, std::mt19937& random) {
  auto network = token_steps<Network>(arrays, random);
  network.norms.resize(network.steps.size());
  return network;
}

using Build = Network (*)(std::vector<Values>&, std::mt19937&);

onp::MaskedGradientPlan plan_of(const Network& network) {
  return onp::MaskedGradientPlan(network.buffers, network.steps, network.norms, network.constants,
                                 network.output, network.sites, network.units);
}

// What a pass is asked for, [count, ..] each, and the gradients that reach its outputs.
struct Batch {
  std::int64_t count;
  Values images, gates;
  Values logits, mean, variance;
};

Batch random_batch(const Network& network, std::int64_t count, std::mt19937& random) {
  Batch batch;
  batch.count = count;
  batch.images = random_values(count * network.pixels(), random);
  batch.gates = random_values(count * network.sites, random);
  for (float& gate : batch.gates) gate = 0.7f + 0.2f * gate;
  for (std::int64_t n = 0; n < count; ++n) batch.gates[n * network.sites + 3 * n + 2] = 0;
  batch.logits = random_values(count * network.classes(), random);
  batch.mean = random_values(count * network.units, random);
  batch.variance = random_values(count * network.units, random);
  return batch;
}

struct Results {
  Values logits, mean, variance, images, gates;
  bool operator==(const Results& other) const {
    const auto same = [](const Values& a, const Values& b) {
      const std::size_t bytes = a.size() * sizeof(float);
      return a.size() == b.size() && (bytes == 0 || !std::memcmp(a.data(), b.data(), bytes));
    };
    return same(logits, other.logits) && same(mean, other.mean) && same(variance, other.variance) &&
           same(images, other.images) && same(gates, other.gates);
  }
};

struct Options {
  bool gated = true, moments = true, keep = true;
  int threads = 1;
  std::string isa = "auto";
};

// Both passes. The workspace is full of NaN, as memory that was used before may be.
Results run(const onp::MaskedGradientPlan& plan, const Network& network, const Batch& batch,
            const Options& options) {
  const auto empty = [&](std::int64_t width) { return Values(batch.count * width, NAN); };
  Results out;
  out.logits = empty(network.classes());
  out.images = empty(network.pixels());
  if (options.gated) out.gates = empty(network.sites);
  if (options.moments) out.mean = empty(network.units), out.variance = empty(network.units);
  Values workspace;
  if (options.keep) {
    const auto floats = plan.workspace_floats(batch.count, options.gated, options.moments);
    workspace.assign(static_cast<std::size_t>(floats), NAN);
  }
  const onp::MaskedGradientInput input{batch.images.data(),
                                       batch.count,
                                       options.gated ? batch.gates.data() : nullptr,
                                       options.keep ? workspace.data() : nullptr,
                                       options.moments,
                                       options.threads,
                                       options.isa};
  plan.forward(input, {out.logits.data(), options.moments ? out.mean.data() : nullptr,
                       options.moments ? out.variance.data() : nullptr});
  Values slope, offset;  // of each norm's output, from the gradients of its moments
  for (std::size_t s = 0; options.moments && s < network.steps.size(); ++s) {
    const StepSpec& step = network.steps[s];
    const BufferShape to = network.buffers[step.final];
    const auto pixels = static_cast<float>(to.height * to.width);
    slope.resize(batch.count * network.units);
    offset.resize(batch.count * network.units);
    for (const std::int64_t first : {network.norms[s].result, network.norms[s].scaled}) {
      for (std::int64_t n = 0; first >= 0 && n < batch.count; ++n) {
        for (std::int64_t u = first; u < first + to.channels; ++u) {
          const std::int64_t at = n * network.units + u;
          slope[at] = 2 * batch.variance[at] / pixels;
          offset[at] = batch.mean[at] / pixels - slope[at] * out.mean[at];
        }
      }
    }
  }
  plan.backward(input, {batch.logits.data(), options.moments ? slope.data() : nullptr,
                        options.moments ? offset.data() : nullptr, out.images.data(),
                        options.gated ? out.gates.data() : nullptr});
  return out;
}

Doubles part(const Values& values, std::int64_t width, std::int64_t row) {
  return Doubles(values.begin() + row * width, values.begin() + (row + 1) * width);
}

bool close(const Values& values, std::int64_t row, const Doubles& expected) {
  const auto width = static_cast<std::int64_t>(expected.size());
  bool all = true;
  for (std::int64_t i = 0; i < width; ++i) {
    all &= std::fabs(values[row * width + i] - expected[i]) <= 1e-3 + 1e-3 * std::fabs(expected[i]);
  }
  return all;
}

void test_equals_finite_differences(Build build) {
  std::mt19937 random(1);
  std::vector<Values> arrays;
  const Network network = build(arrays, random);
  const onp::MaskedGradientPlan plan = plan_of(network);
  const Batch batch = random_batch(network, 2, random);
  std::vector<Results> results;
  for (const std::string& isa : onp::instruction_sets()) {
    Options options;
    options.isa = isa;
    results.push_back(run(plan, network, batch, options));
  }
  for (std::int64_t n = 0; n < batch.count; ++n) {
    Doubles image = part(batch.images, network.pixels(), n);
    Doubles gates = part(batch.gates, network.sites, n);
    const Outputs outputs = naive(network, image, gates);
    for (const Results& found : results) {
      CHECK(close(found.logits, n, outputs.logits));
      CHECK(close(found.mean, n, outputs.mean));
      CHECK(close(found.variance, n, outputs.variance));
    }
    const auto loss = [&] {
      const Outputs out = naive(network, image, gates);
      double sum = 0;
      const auto add = [&](const Doubles& values, const Values& by) {
        const auto width = static_cast<std::int64_t>(values.size());
        for (std::int64_t i = 0; i < width; ++i) sum += values[i] * by[n * width + i];
      };
      add(out.logits, batch.logits);
      add(out.mean, batch.mean);
      add(out.variance, batch.variance);
      return sum;
    };
    // Steps so small that hardly any activation changes sides between the two ends.
    const auto check = [&](Doubles& at, std::int64_t i, const Values Results::*gradient) {
      constexpr double kStep = 1e-6;
      const double value = at[i];
      at[i] = value + kStep;
      const double above = loss();
      at[i] = value - kStep;
      const double expected = (above - loss()) / (2 * kStep);
      at[i] = value;
      for (const Results& found : results) {
        const double got = (found.*gradient)[n * static_cast<std::int64_t>(at.size()) + i];
        CHECK(std::fabs(got - expected) <= 1e-3 + 1e-3 * std::fabs(expected));
      }
    };
    for (std::int64_t i = n; i < network.pixels(); i += 29) check(image, i, &Results::images);
    for (std::int64_t i = n; i < network.sites; i += 2) check(gates, i, &Results::gates);
  }
}

void test_same_bytes_whatever_the_options(Build build) {
  std::mt19937 random(2);
  std::vector<Values> arrays;
  const Network network = build(arrays, random);
  const onp::MaskedGradientPlan plan = plan_of(network);
  for (const std::int64_t count : {0, 1, 5}) {
    const Batch batch = random_batch(network, count, random);
    for (const std::string& isa : onp::instruction_sets()) {
      for (const bool gated : {false, true}) {
        for (const bool moments : {false, true}) {
          const Results first = run(plan, network, batch, {gated, moments, true, 1, isa});
          CHECK((run(plan, network, batch, {gated, moments, true, 2, isa}) == first));
          CHECK((run(plan, network, batch, {gated, moments, false, 1, isa}) == first));
          CHECK((run(plan, network, batch, {gated, moments, false, 2, isa}) == first));
        }
      }
    }
  }
}

// Several blocks pass through one thread's memory: what one leaves must not reach the next.
void test_an_image_is_alone(Build build) {
  std::mt19937 random(4);
  std::vector<Values> arrays;
  const Network network = build(arrays, random);
  const onp::MaskedGradientPlan plan = plan_of(network);
  const Batch many = random_batch(network, 18, random);
  Batch all = many;  // the same images again and again
  const auto repeat = [](const Values& values) {
    Values repeated;
    for (int time = 0; time < 8; ++time) {
      repeated.insert(repeated.end(), values.begin(), values.end());
    }
    return repeated;
  };
  all.count = 8 * many.count;
  for (Values Batch::*values :
       {&Batch::images, &Batch::gates, &Batch::logits, &Batch::mean, &Batch::variance}) {
    all.*values = repeat(many.*values);
  }
  for (const bool keep : {false, true}) {
    Results expected = run(plan, network, many, {true, true, keep, 1, "auto"});
    for (Values Results::*values : {&Results::logits, &Results::mean, &Results::variance,
                                    &Results::images, &Results::gates}) {
      expected.*values = repeat(expected.*values);
    }
    CHECK((run(plan, network, all, {true, true, keep, 1, "auto"}) == expected));
  }
}

void test_refuses() {
  std::mt19937 random(3);
  std::vector<Values> arrays;
  const Network good = every_step(arrays, random);
  Network bad = good;
  bad.norms.pop_back();
  CHECK_THROWS(plan_of(bad), onp::Error);
  bad = good;
  bad.units = 134;
  CHECK_THROWS(plan_of(bad), onp::Error);
  bad = good;
  bad.steps[1].final = 12;
  CHECK_THROWS(plan_of(bad), onp::Error);
  bad = good;
  const Values constant(20 * 7 * 7);
  bad.constants = {{4, constant.data()}};  // which a step writes
  CHECK_THROWS(plan_of(bad), onp::Error);

  const onp::MaskedGradientPlan plan = plan_of(good);
  const Batch batch = random_batch(good, 1, random);
  Options options;
  options.threads = 0;
  CHECK_THROWS(run(plan, good, batch, options), onp::Error);
  options.threads = 1;
  options.isa = "mmx";
  CHECK_THROWS(run(plan, good, batch, options), onp::Error);
}

}  // namespace

int main() {
  test_equals_finite_differences(every_step);
  test_equals_finite_differences(tokens);
  test_same_bytes_whatever_the_options(every_step);
  test_same_bytes_whatever_the_options(tokens);
  test_an_image_is_alone(every_step);
  test_an_image_is_alone(tokens);
  test_refuses();
  return report();
}
