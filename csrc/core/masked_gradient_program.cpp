#include "core/masked_gradient_program.h"

#include <algorithm>
#include <set>

#include "core/check.h"
#include "core/masked_gradient_kernels.h"

namespace onp {
namespace {

// One dimension of a backward convolution: input positions whose distance to the window grid is
// the same see the same taps, and their windows follow each other.
struct Phase {
  std::int64_t first, count;  // input positions first, first + stride, ..
  std::int64_t stride;
  std::int64_t tap, taps;  // of the kernel: tap, tap + stride, ..
  std::int64_t pad;        // of the backward convolution over these positions
};

std::vector<Phase> phases(std::int64_t size, std::int64_t outputs, std::int64_t kernel,
                          std::int64_t stride, std::int64_t pad) {
  // One output has no neighbours: a wide stride then leaves a single tap to each position.
  if (outputs == 1) stride = std::max(stride, kernel);
  std::vector<Phase> all;
  for (std::int64_t tap = 0; tap < stride; ++tap) {
    const std::int64_t first = ((tap - pad) % stride + stride) % stride;
    if (first >= size) continue;
    const std::int64_t taps = tap < kernel ? divide_up(kernel - tap, stride) : 0;
    all.push_back({first, divide_up(size - first, stride), stride, tap, taps,
                   taps - 1 - (first + pad) / stride});
  }
  return all;
}

// The taps of two phases with inputs and outputs exchanged, last tap first:
// [in channels, out channels / groups, taps, taps].
std::vector<float> exchanged(const StepSpec& spec, std::int64_t inputs, std::int64_t outputs,
                             const Phase& y, const Phase& x) {
  const std::int64_t group_inputs = inputs / spec.groups, group_outputs = outputs / spec.groups;
  std::vector<float> weights;
  for (std::int64_t i = 0; i < inputs; ++i) {
    for (std::int64_t o = 0; o < group_outputs; ++o) {
      const std::int64_t out = i / group_inputs * group_outputs + o;
      const float* kernel = spec.weight + (out * group_inputs + i % group_inputs) *
                                              spec.kernel_height * spec.kernel_width;
      for (std::int64_t v = y.taps - 1; v >= 0; --v) {
        for (std::int64_t u = x.taps - 1; u >= 0; --u) {
          weights.push_back(
              kernel[(y.tap + v * y.stride) * spec.kernel_width + x.tap + u * x.stride]);
        }
      }
    }
  }
  return weights;
}

bool is_smooth(Activation activation) { return activation > Activation::relu6; }

Buffer plain_buffer(const BufferShape& shape) {
  Buffer buffer;
  buffer.shape = shape;
  buffer.stride = round_up(shape.channels, kChannelBlock);
  return buffer;
}

}  // namespace

GradientProgram::GradientProgram(const std::vector<BufferShape>& shapes,
                                 const std::vector<StepSpec>& specs,
                                 const std::vector<NormUnits>& norms,
                                 const std::vector<ConstantSpec>& constant_specs,
                                 std::int64_t output_buffer, std::int64_t site_count,
                                 std::int64_t unit_count)
    : Network(plan_network(shapes, specs, constant_specs, output_buffer, site_count)),
      units(unit_count) {
  ONP_CHECK(norms.size() == specs.size(), "masked_gradient: norms must be given for ", specs.size(),
            " steps, got ", norms.size());
  for (const BufferShape& shape : shapes) {
    gradients.push_back(plain_buffer(shape));
    gradients.back().place_pixels();
  }
  add_extras(specs, norms);
  for (std::size_t s = 0; s < specs.size(); ++s) plan_reverse(specs[s], steps[s]);
  lay_out_gradients();
}

void GradientProgram::add_extras(const std::vector<StepSpec>& specs,
                                 const std::vector<NormUnits>& norms) {
  const auto add = [&](const StepSpec& spec) {
    buffers.push_back(plain_buffer(buffers[written_buffer(spec)].shape));
    buffers.back().place_pixels();
    return static_cast<std::int64_t>(buffers.size()) - 1;
  };
  for (std::size_t s = 0; s < specs.size(); ++s) {
    const StepSpec& spec = specs[s];
    Extras extra;
    extra.units = norms[s];
    const std::int64_t channels = steps[s].channels;
    for (const std::int64_t first : {norms[s].result, norms[s].scaled}) {
      ONP_CHECK(first < 0 || first + channels <= units,
                "masked_gradient: a norm's units must lie in [0, ", units, "), got ", first,
                " and ", channels, " channels");
    }
    ONP_CHECK(spec.final >= 0 || (norms[s].scaled < 0 && spec.site_start < 0),
              "masked_gradient: a step with sites or a norm behind it must write final");
    if (spec.site_start >= 0) extra.active = add(spec);
    if (norms[s].result >= 0) extra.result = add(spec);
    if (norms[s].scaled >= 0) extra.scaled = add(spec);
    if (is_smooth(spec.first)) extra.first_slope = add(spec);
    if (is_smooth(spec.second)) extra.second_slope = add(spec);
    extras.push_back(extra);
  }
}

void GradientProgram::plan_reverse(const StepSpec& spec, const Step& step) {
  const Buffer& input = buffers[spec.input];
  const Buffer& input_gradient = gradients[spec.input];
  Reverse back;
  back.gradient = plain_buffer(buffers[written_buffer(spec)].shape);
  if (spec.kind == StepKind::convolution) {
    reverse_convolution(spec, back);
  } else {
    back.gradient.place_pixels();
  }
  if (spec.kind == StepKind::max_pool || spec.kind == StepKind::average_pool) {
    for (const std::int32_t offset : step.input_offset) {
      const std::int64_t y = offset / input.row() - input.halo;
      const std::int64_t x = offset % input.row() / input.stride - input.halo;
      back.gradient_offset.push_back(static_cast<std::int32_t>(input_gradient.offset(y, x)));
    }
  } else if (spec.kind == StepKind::pick) {
    for (std::size_t pixel = 0; pixel < spec.index.size(); ++pixel) {
      if (spec.index[pixel] < 0) continue;
      const auto from = static_cast<std::size_t>(spec.index[pixel]);
      back.gradient_offset.push_back(input_gradient.interior[from]);
      back.picked.push_back(back.gradient.interior[pixel]);
    }
  } else if (spec.kind == StepKind::group_norm) {
    backward_scratch_floats = std::max(backward_scratch_floats, group_scratch(4, step.channels));
  } else if (spec.kind == StepKind::attention) {
    const std::int64_t floats = attention_pull_scratch(pixels_of(back.gradient.shape), step.keys,
                                                       step.channels / spec.heads);
    backward_scratch_floats = std::max(backward_scratch_floats, floats);
  }
  reverse.push_back(std::move(back));
}

void GradientProgram::reverse_convolution(const StepSpec& spec, Reverse& back) {
  const Buffer& input_gradient = gradients[spec.input];
  const BufferShape from = buffers[spec.input].shape, to = back.gradient.shape;
  std::vector<std::pair<StepSpec, std::vector<float>>> parts;
  for (const Phase& y :
       phases(from.height, to.height, spec.kernel_height, spec.stride_height, spec.pad_height)) {
    for (const Phase& x :
         phases(from.width, to.width, spec.kernel_width, spec.stride_width, spec.pad_width)) {
      if (y.taps == 0 || x.taps == 0) {
        back.gaps = true;
        continue;
      }
      StepSpec part;
      part.kind = StepKind::convolution;
      part.kernel_height = y.taps, part.kernel_width = x.taps;
      part.pad_height = y.pad, part.pad_width = x.pad;
      part.groups = spec.groups;
      const BufferShape shape{from.channels, y.count, x.count};
      back.gradient.halo = std::max(back.gradient.halo, halo_of(part, to, shape));
      backward_scratch_floats = std::max(backward_scratch_floats, scratch_of(part, to, shape));
      Reverse::Part placed;
      for (std::int64_t v = 0; v < y.count; ++v) {
        for (std::int64_t u = 0; u < x.count; ++u) {
          placed.target.push_back(static_cast<std::int32_t>(
              input_gradient.offset(y.first + v * y.stride, x.first + u * x.stride)));
        }
      }
      placed.step.width = shape.width;
      placed.step.spec = part;
      back.parts.push_back(std::move(placed));
      parts.emplace_back(part, exchanged(spec, from.channels, to.channels, y, x));
    }
  }
  back.gradient.place_pixels();
  for (std::size_t p = 0; p < parts.size(); ++p) {
    Reverse::Part& part = back.parts[p];
    parts[p].first.weight = parts[p].second.data();
    const auto pixels = static_cast<std::int64_t>(part.target.size());
    part.step = pack_step(parts[p].first, back.gradient,
                          {from.channels, pixels / part.step.width, part.step.width});
    weight_bytes += part.step.weights.bytes();
  }
}

void GradientProgram::lay_out_gradients() {
  gradient_begin.assign(buffers.size(), kAbsent);
  std::vector<std::size_t> slots(buffers.size());
  const auto claim = [&](std::int64_t id) {
    if (id < 0 || gradient_begin[id] >= 0) return;
    slots[id] = gradient_slots.claim(gradients[id]);
    gradient_begin[id] = gradient_slots.begin[slots[id]];
  };
  operation_begin.resize(steps.size());
  claim(static_cast<std::int64_t>(output));
  for (std::size_t s = steps.size(); s-- > 0;) {
    const StepSpec& spec = steps[s].spec;
    const std::size_t operation = gradient_slots.claim(reverse[s].gradient);
    operation_begin[s] = gradient_slots.begin[operation];
    if (!is_constant(spec.residual)) claim(spec.residual);
    for (const std::int64_t id : {spec.plain, spec.final}) {
      if (id >= 0 && gradient_begin[id] >= 0) gradient_slots.release(gradients[id], slots[id]);
    }
    for (const std::int64_t id : spec.operands()) claim(id);
    gradient_slots.release(reverse[s].gradient, operation);
  }
}

GradientLayout GradientProgram::lay_out(GradientMode mode, bool keep) const {
  GradientLayout layout;
  layout.places.resize(buffers.size());
  layout.passed.resize(steps.size());
  std::vector<std::size_t> last_use(buffers.size(), 0);
  std::vector<char> kept(buffers.size(), 0);
  for (std::size_t s = 0; s < steps.size(); ++s) {
    const StepSpec& spec = steps[s].spec;
    const Extras& extra = extras[s];
    for (const std::int64_t id : steps[s].reads) last_use[id] = s;
    const auto keeps = [&](bool needed, std::int64_t id) {
      if (needed && id >= 0) kept[id] = keep;
    };
    keeps(mode.gated, extra.active);
    keeps(mode.moments, extra.result);
    keeps(mode.moments, extra.scaled);
    const std::int64_t passed =
        round_up(passed_floats(pixels_of(buffers[written_buffer(spec)].shape), steps[s].channels),
                 kChannelBlock);
    for (const auto& [activation, begin] : {std::pair{spec.first, &layout.passed[s].first},
                                            std::pair{spec.second, &layout.passed[s].second}}) {
      if (activation == Activation::none || is_smooth(activation) || !keep) continue;
      *begin = layout.kept_floats;
      layout.kept_floats += passed;
    }
    keeps(true, extra.first_slope);
    keeps(true, extra.second_slope);
    const bool again = spec.kind == StepKind::max_pool || spec.kind == StepKind::layer_norm ||
                       spec.kind == StepKind::attention || spec.kind == StepKind::product ||
                       spec.kind == StepKind::group_norm;  // reads its operands once more
    for (const std::int64_t id : spec.operands()) keeps(again, id);
  }
  last_use[output] = steps.size();
  Slots passing;
  std::vector<std::size_t> slots(buffers.size());
  const auto claim = [&](bool wanted, std::int64_t id) {
    if (!wanted || id < 0) return;
    GradientLayout::Place& place = layout.places[id];
    place.present = true;
    place.kept = kept[id];
    if (kept[id]) {
      place.begin = layout.kept_floats;
      layout.kept_floats += buffers[id].image();
    } else {
      slots[id] = passing.claim(buffers[id]);
      place.begin = passing.begin[slots[id]];
    }
  };
  const auto release = [&](std::int64_t id) {
    if (id >= 0 && layout.places[id].present && !kept[id]) {
      passing.release(buffers[id], slots[id]);
    }
  };
  claim(true, 0);
  for (std::size_t s = 0; s < steps.size(); ++s) {
    const StepSpec& spec = steps[s].spec;
    const Extras& extra = extras[s];
    claim(true, spec.plain);
    claim(true, spec.final);
    claim(mode.gated && keep, extra.active);
    claim(keep, extra.first_slope);
    claim(keep, extra.second_slope);
    claim(mode.moments, extra.result);
    claim(mode.moments, extra.scaled);
    for (const std::int64_t id : {extra.active, extra.result, extra.scaled}) release(id);
    const std::set<std::int64_t> reads(steps[s].reads.begin(), steps[s].reads.end());
    for (const std::int64_t id : reads) {
      if (last_use[id] == s) release(id);
    }
  }
  layout.passing_floats = passing.floats_per_image;
  return layout;
}

// What is kept in a workspace passes through the cache once and does not count.
std::int64_t GradientProgram::block(const GradientLayout& layout,
                                    const MaskedGradientInput& input) const {
  const std::int64_t floats = std::max(layout.passing_floats, gradient_slots.floats_per_image) +
                              (input.workspace ? 0 : layout.kept_floats);
  const std::int64_t bytes = floats * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t most = std::max(block_bytes(weight_bytes) / bytes, std::int64_t{1});
  // As many blocks for every thread: a last one alone would be waited for.
  const std::int64_t blocks = round_up(std::max(divide_up(input.count, most), std::int64_t{1}),
                                       static_cast<std::int64_t>(input.threads));
  return std::max(divide_up(input.count, blocks), std::int64_t{1});
}

}  // namespace onp
