#include "core/masked_gradient.h"

#include <algorithm>
#include <set>
#include <utility>

#include "core/check.h"
#include "core/masked_forward_program.h"
#include "core/masked_gradient_kernels.h"
#include "core/parallel.h"
#include "core/spare.h"

namespace onp {
namespace {

constexpr std::int64_t kAbsent = -1;

// A part of a backward convolution: input pixels that see the kernel's taps alike.
struct Part {
  Step step;
  std::vector<std::int32_t> target;  // offsets in the input's gradient
};

// One step backwards.
struct Reverse {
  Buffer gradient;  // of the operation's result, with the halo that `parts` read
  std::vector<Part> parts;
  bool gaps = false;                          // some input pixels see no tap
  std::vector<std::int32_t> gradient_offset;  // pools: of the windows in the input's gradient
};

// Buffers of a step beside those of the forward program; kAbsent where they cannot exist.
struct Extras {
  std::int64_t active = kAbsent;  // final before its gate
  std::int64_t result = kAbsent;  // output of a norm folded into the operation
  std::int64_t scaled = kAbsent;  // output of a norm behind it
  NormUnits units;
};

struct Mode {
  bool gated;
  bool moments;
};

// Where the buffers of one block lie: kept ones for the backward pass, others until last read.
struct Layout {
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

const GradientKernels& gradient_kernels_for(const Kernels& kernels) {
#ifdef ONP_X86_KERNELS
  if (is_avx512(kernels)) {
    return kAvx512GradientKernels;
  }
  if (&kernels == &kAvx2Kernels) return kAvx2GradientKernels;
#endif
  (void)kernels;
  return kGenericGradientKernels;
}

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

// What the operation reads: input and others, in order.
std::vector<std::int64_t> operands(const StepSpec& spec) {
  std::vector<std::int64_t> ids = {spec.input};
  ids.insert(ids.end(), spec.others.begin(), spec.others.end());
  return ids;
}

Buffer plain_buffer(const BufferShape& shape) {
  Buffer buffer;
  buffer.shape = shape;
  buffer.stride = round_up(shape.channels, kChannelBlock);
  return buffer;
}

}  // namespace

struct MaskedGradientPlan::Program : Network {
  std::int64_t units = 0;
  std::vector<Extras> extras;     // of each step
  std::vector<Reverse> reverse;   // of each step
  std::vector<Buffer> gradients;  // of each buffer
  Slots gradient_slots;
  std::vector<std::int64_t> gradient_begin;   // of each buffer, kAbsent: nothing flows back to it
  std::vector<std::int64_t> operation_begin;  // of each step's operation gradient

  void add_extras(const std::vector<StepSpec>& specs, const std::vector<NormUnits>& norms);
  void plan_reverse(const StepSpec& spec, const Step& step);
  void lay_out_gradients();
  Layout lay_out(Mode mode, bool keep) const;
  std::int64_t block(const Layout& layout, const MaskedGradientInput& input) const;
};

void MaskedGradientPlan::Program::add_extras(const std::vector<StepSpec>& specs,
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
    extras.push_back(extra);
  }
}

void MaskedGradientPlan::Program::plan_reverse(const StepSpec& spec, const Step& step) {
  const Buffer& input = buffers[spec.input];
  const Buffer& input_gradient = gradients[spec.input];
  const BufferShape from = input.shape, to = buffers[written_buffer(spec)].shape;
  Reverse back;
  back.gradient = plain_buffer(to);
  if (spec.kind == StepKind::convolution) {
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
        scratch_floats = std::max(scratch_floats, scratch_of(part, to, shape));
        Part placed;
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
      Part& part = back.parts[p];
      parts[p].first.weight = parts[p].second.data();
      const auto pixels = static_cast<std::int64_t>(part.target.size());
      part.step = pack_step(parts[p].first, back.gradient,
                            {from.channels, pixels / part.step.width, part.step.width});
      weight_bytes += part.step.weights.bytes();
    }
  } else {
    back.gradient.place_pixels();
  }
  if (is_windowed(spec.kind) && spec.kind != StepKind::convolution) {
    for (const std::int32_t offset : step.input_offset) {
      const std::int64_t y = offset / input.row() - input.halo;
      const std::int64_t x = offset % input.row() / input.stride - input.halo;
      back.gradient_offset.push_back(static_cast<std::int32_t>(input_gradient.offset(y, x)));
    }
  }
  reverse.push_back(std::move(back));
}

void MaskedGradientPlan::Program::lay_out_gradients() {
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
    claim(spec.residual);
    for (const std::int64_t id : {spec.plain, spec.final}) {
      if (id >= 0 && gradient_begin[id] >= 0) gradient_slots.release(gradients[id], slots[id]);
    }
    for (const std::int64_t id : operands(spec)) claim(id);
    gradient_slots.release(reverse[s].gradient, operation);
  }
}

Layout MaskedGradientPlan::Program::lay_out(Mode mode, bool keep) const {
  Layout layout;
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
      if (activation == Activation::none || !keep) continue;
      *begin = layout.kept_floats;
      layout.kept_floats += passed;
    }
    keeps(spec.kind == StepKind::max_pool, spec.input);
  }
  last_use[output] = steps.size();
  Slots passing;
  std::vector<std::size_t> slots(buffers.size());
  const auto claim = [&](bool wanted, std::int64_t id) {
    if (!wanted || id < 0) return;
    Layout::Place& place = layout.places[id];
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
std::int64_t MaskedGradientPlan::Program::block(const Layout& layout,
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

MaskedGradientPlan::MaskedGradientPlan(const std::vector<BufferShape>& shapes,
                                       const std::vector<StepSpec>& specs,
                                       const std::vector<NormUnits>& norms, std::int64_t output,
                                       std::int64_t sites, std::int64_t units) {
  ONP_CHECK(norms.size() == specs.size(), "masked_gradient: norms must be given for ", specs.size(),
            " steps, got ", norms.size());
  for (const StepSpec& spec : specs) {
    ONP_CHECK((is_windowed(spec.kind) || spec.kind == StepKind::concatenation) &&
                  spec.first <= Activation::relu6 && spec.second <= Activation::relu6,
              "masked_gradient: steps must be convolutions, pools or concatenations, with ReLU or "
              "ReLU6");
  }
  auto program = std::make_unique<Program>();
  static_cast<Network&>(*program) = plan_network(shapes, specs, {}, output, sites);
  program->units = units;
  for (const BufferShape& shape : shapes) {
    program->gradients.push_back(plain_buffer(shape));
    program->gradients.back().place_pixels();
  }
  program->add_extras(specs, norms);
  for (std::size_t s = 0; s < specs.size(); ++s) {
    program->plan_reverse(specs[s], program->steps[s]);
  }
  program->lay_out_gradients();
  program_ = std::move(program);
}

MaskedGradientPlan::~MaskedGradientPlan() = default;

namespace {

// One thread's memory, for blocks of a fixed size.
struct Worker {
  explicit Worker(std::int64_t floats) : memory(floats) {}

  Spare memory;
  float *kept, *passing, *gradients, *scratch;
};

// One block of images: where its buffers lie.
struct Block {
  std::int64_t first, images;
  float* kept;  // what is kept begins at its place in the layout times kept_images
  std::int64_t kept_images;
  std::vector<float*> data;  // of each buffer, null: absent
  float* scratch;

  std::uint8_t* passed(std::int64_t begin) const {
    return begin < 0 ? nullptr : reinterpret_cast<std::uint8_t*>(kept + begin * kept_images);
  }
};

Operand operand(const std::vector<Buffer>& buffers, const Block& block, std::int64_t id) {
  return id < 0 || !block.data[id] ? Operand{} : buffers[id].at(block.data[id]);
}

// The block's rows of values [count, width], from a column on.
PerImage rows(const float* values, std::int64_t width, const Block& block, std::int64_t column) {
  if (!values) return {};
  return {values + block.first * width + column, width};
}

}  // namespace

// One call: its arguments and what follows from them for every block.
struct MaskedGradientPlan::Run {
  const Program& program;
  const MaskedGradientInput& input;
  Mode mode;
  Layout layout;
  std::int64_t block;
  const Kernels& kernels;
  const GradientKernels& gradient_kernels;
  bool forwards, backwards;  // what of the network it runs
  Floats gates;              // a copy, as vectors reach past the last one

  Run(const Program& the_program, const MaskedGradientInput& the_input, bool back)
      : program(the_program),
        input(the_input),
        mode{the_input.gates != nullptr, the_input.moments},
        layout(the_program.lay_out(mode, back || the_input.workspace)),
        block(the_program.block(layout, the_input)),
        kernels(kernels_for(the_input.isa)),
        gradient_kernels(gradient_kernels_for(kernels)),
        forwards(!back || !the_input.workspace),
        backwards(back) {
    if (!mode.gated || !forwards) return;
    const std::int64_t count = input.count * program.sites;
    gates = Floats(count + kChannelBlock);
    std::copy_n(input.gates, count, gates.data());
  }

  // Calls body(block, worker) for all blocks.
  template <typename Body>
  void for_each_block(const Body& body) const {
    std::vector<std::unique_ptr<Worker>> workers(static_cast<std::size_t>(input.threads));
    parallel_for(divide_up(input.count, block), input.threads, [&](std::int64_t b, int thread) {
      std::unique_ptr<Worker>& worker = workers[static_cast<std::size_t>(thread)];
      if (!worker) worker = hire();
      const std::int64_t first = b * block, images = std::min(block, input.count - first);
      Block place{first, images, worker->kept, block, {}, worker->scratch};
      if (input.workspace) {
        place.kept = input.workspace + first * layout.kept_floats;
        place.kept_images = images;
      }
      for (const Layout::Place& at : layout.places) {
        float* data = nullptr;
        if (at.present && at.kept) data = place.kept + at.begin * place.kept_images;
        if (at.present && !at.kept && forwards) data = worker->passing + at.begin * block;
        place.data.push_back(data);
      }
      body(place, *worker);
    });
  }

  std::unique_ptr<Worker> hire() const {
    // The last vector of a buffer may reach past its end.
    const auto floats = [&](bool wanted, std::int64_t per_image) {
      return wanted ? round_up(per_image * block + kChannelBlock, kChannelBlock) : 0;
    };
    const std::int64_t kept = floats(!input.workspace, layout.kept_floats);
    const std::int64_t passing = floats(forwards, layout.passing_floats);
    const std::int64_t back = floats(backwards, program.gradient_slots.floats_per_image);
    auto worker = std::make_unique<Worker>(kept + passing + back + program.scratch_floats);
    worker->kept = worker->memory.data();
    worker->passing = worker->kept + kept;
    worker->gradients = worker->passing + passing;
    worker->scratch = worker->gradients + back;
    for (std::size_t id = 0; id < layout.places.size(); ++id) {
      const Layout::Place& at = layout.places[id];
      if (forwards && at.present && !at.kept) {
        clear_halo(program.buffers[id], block, worker->passing + at.begin * block);
      }
    }
    for (std::size_t s = 0; backwards && s < program.steps.size(); ++s) {
      clear_halo(program.reverse[s].gradient, block,
                 worker->gradients + program.operation_begin[s] * block);
    }
    return worker;
  }

  void forward(const Block& place, const MaskedGradientForward* out) const;
  void forward(const Block& place, std::size_t s) const;
  void moments(const Block& place, std::size_t s, const MaskedGradientForward& out) const;
  void backward(const Block& place, const Worker& worker, const MaskedGradientBackward& out) const;
};

// out: where moments go, null if they are known already.
void MaskedGradientPlan::Run::forward(const Block& place, const MaskedGradientForward* out) const {
  const Buffer& images = program.buffers[0];
  const std::int64_t floats = images.shape.channels * images.shape.height * images.shape.width;
  for (std::size_t id = 0; id < layout.places.size(); ++id) {
    if (layout.places[id].kept) clear_halo(program.buffers[id], place.images, place.data[id]);
  }
  load_images(input.images + place.first * floats, place.images, images, place.data[0]);
  for (std::size_t s = 0; s < program.steps.size(); ++s) {
    forward(place, s);
    if (mode.moments && out) moments(place, s, *out);
  }
}

void MaskedGradientPlan::Run::forward(const Block& place, std::size_t s) const {
  const Step& step = program.steps[s];
  const StepSpec& spec = step.spec;
  const Extras& extra = program.extras[s];
  const auto at = [&](std::int64_t id) { return operand(program.buffers, place, id); };
  StepArgs args = step.args(program.buffers[spec.input], place.data[spec.input], place.images);
  std::vector<Operand> others;
  for (const std::int64_t id : spec.others) others.push_back(at(id));
  args.others = others.data();
  args.residual = at(spec.residual);
  args.first = spec.first;
  args.plain = at(spec.plain);
  args.scale = step.scale.data();
  args.shift = step.shift.data();
  args.second = spec.second;
  args.final = at(spec.final);
  args.scratch = place.scratch;
  for (const auto& [id, data] :
       {std::pair{extra.result, &args.kept.result}, std::pair{extra.scaled, &args.kept.scaled},
        std::pair{extra.active, &args.kept.active}}) {
    const Operand kept = at(id);
    if (!kept.data) continue;
    *data = kept.data;
    args.kept.offset = kept.offset;
    args.kept.image_stride = kept.image_stride;
  }
  args.kept.first_passed = place.passed(layout.passed[s].first);
  args.kept.second_passed = place.passed(layout.passed[s].second);
  if (mode.gated && spec.site_start >= 0) {
    args.kept.gates = gates.data() + place.first * program.sites + spec.site_start;
    args.kept.gate_stride = program.sites;
  }
  (kernels.*step.kernel)(args);
}

void MaskedGradientPlan::Run::moments(const Block& place, std::size_t s,
                                      const MaskedGradientForward& out) const {
  const Extras& extra = program.extras[s];
  const std::pair<std::int64_t, std::int64_t> norms[] = {{extra.units.result, extra.result},
                                                         {extra.units.scaled, extra.scaled}};
  for (const auto& [unit, id] : norms) {
    if (unit < 0) continue;
    const std::int64_t begin = place.first * program.units + unit;
    MomentsArgs args{};
    args.images = place.images;
    args.pixels = static_cast<std::int64_t>(program.buffers[id].interior.size());
    args.channels = program.steps[s].channels;
    args.values = operand(program.buffers, place, id);
    args.mean = out.mean + begin;
    args.variance = out.variance + begin;
    args.stride = program.units;
    gradient_kernels.moments(args);
  }
}

void MaskedGradientPlan::Run::backward(const Block& place, const Worker& worker,
                                       const MaskedGradientBackward& out) const {
  const std::int64_t images = place.images;
  const auto memory = [&](std::int64_t begin) {
    return begin < 0 ? nullptr : worker.gradients + begin * block;
  };
  std::vector<char> flows(program.gradients.size(), 0);  // buffers whose gradient was written
  const auto gradient = [&](std::int64_t id) {
    return program.gradients[id].at(memory(program.gradient_begin[id]));
  };
  const auto flowing = [&](std::int64_t id) {
    return id >= 0 && flows[id] ? gradient(id) : Operand{};
  };
  const auto clear = [&](std::int64_t id) {
    std::fill_n(gradient(id).data, images * program.gradients[id].image(), 0.0f);
  };

  const Buffer& last = program.gradients[program.output];
  const std::int64_t classes = last.shape.channels;
  for (std::int64_t n = 0; n < images; ++n) {
    std::copy_n(out.logits + (place.first + n) * classes, classes,
                gradient(static_cast<std::int64_t>(program.output)).data + n * last.image());
  }
  flows[program.output] = 1;
  if (out.gates) std::fill_n(out.gates + place.first * program.sites, images * program.sites, 0.0f);

  for (std::size_t s = program.steps.size(); s-- > 0;) {
    const Step& step = program.steps[s];
    const StepSpec& spec = step.spec;
    const Extras& extra = program.extras[s];
    const Reverse& back = program.reverse[s];
    const auto at = [&](std::int64_t id) { return operand(program.buffers, place, id); };
    const bool gated = mode.gated && spec.site_start >= 0;

    PullArgs pull{};
    pull.images = images;
    pull.pixels = static_cast<std::int64_t>(back.gradient.interior.size());
    pull.channels = step.channels;
    pull.final_gradient = flowing(spec.final);
    pull.plain_gradient = flowing(spec.plain);
    if (mode.moments && out.slope && extra.scaled >= 0) {
      pull.scaled = {at(extra.scaled), rows(out.slope, program.units, place, extra.units.scaled),
                     rows(out.offset, program.units, place, extra.units.scaled)};
    }
    if (mode.moments && out.slope && extra.result >= 0) {
      pull.result = {at(extra.result), rows(out.slope, program.units, place, extra.units.result),
                     rows(out.offset, program.units, place, extra.units.result)};
    }
    if (!pull.final_gradient.data && !pull.plain_gradient.data && !pull.scaled.values.data &&
        !pull.result.values.data) {
      continue;
    }
    if (gated) pull.gates = rows(input.gates, program.sites, place, spec.site_start);
    if (gated && out.gates && pull.final_gradient.data) {
      pull.active = at(extra.active);
      pull.gate_gradient = out.gates + place.first * program.sites + spec.site_start;
    }
    pull.second_passed = place.passed(layout.passed[s].second);
    pull.scale = step.scale.data();
    pull.first_passed = place.passed(layout.passed[s].first);
    if (spec.residual > 0 || (spec.residual == 0 && out.images)) {
      pull.residual_gradient = gradient(spec.residual);
      pull.add_to_residual = flows[spec.residual];
      flows[spec.residual] = 1;
    }
    pull.operation_gradient = back.gradient.at(memory(program.operation_begin[s]));
    gradient_kernels.pull(pull);

    if (spec.kind == StepKind::concatenation) {
      SplitArgs args{};
      args.images = images;
      args.pixels = pull.pixels;
      args.gradient = pull.operation_gradient;
      for (const std::int64_t id : operands(spec)) {
        args.channels = program.buffers[id].shape.channels;
        if (id > 0 || out.images) {
          args.to = gradient(id);
          args.add = flows[id];
          gradient_kernels.split(args);
          flows[id] = 1;
        }
        args.gradient.data += args.channels;
      }
      continue;
    }
    if (spec.input == 0 && !out.images) continue;
    const Operand to = gradient(spec.input);
    const bool pools = spec.kind != StepKind::convolution;
    if (!flows[spec.input] && (pools || back.gaps)) {
      clear(spec.input);
      flows[spec.input] = pools;
    }
    if (pools) {
      const Buffer& from = program.buffers[spec.input];
      PoolPullArgs args{};
      args.images = images;
      args.pixels = pull.pixels;
      args.channels = step.channels;
      args.gradient = pull.operation_gradient;
      args.input = {place.data[spec.input], step.input_offset.data(), from.image()};
      args.input_row = from.row();
      args.input_column = from.stride;
      args.input_gradient = {to.data, back.gradient_offset.data(), to.image_stride};
      args.gradient_row = program.gradients[spec.input].row();
      args.gradient_column = program.gradients[spec.input].stride;
      args.windows = step.windows.data();
      const bool most = spec.kind == StepKind::max_pool;
      (most ? gradient_kernels.max_pool : gradient_kernels.average_pool)(args);
      continue;
    }
    for (const Part& part : back.parts) {
      StepArgs args = part.step.args(back.gradient, pull.operation_gradient.data, images);
      args.final = {to.data, part.target.data(), to.image_stride};
      if (flows[spec.input]) args.residual = args.final;
      args.scratch = place.scratch;
      (kernels.*part.step.kernel)(args);
    }
    flows[spec.input] = 1;
  }

  if (!out.images) return;
  const Buffer& pixels = program.gradients[0];
  const std::int64_t count = pixels.shape.height * pixels.shape.width;
  for (std::int64_t n = 0; n < images; ++n) {
    const float* from = gradient(0).data + n * pixels.image();
    for (std::int64_t c = 0; c < pixels.shape.channels; ++c) {
      float* plane = out.images + ((place.first + n) * pixels.shape.channels + c) * count;
      for (std::int64_t i = 0; i < count; ++i) {
        plane[i] = flows[0] ? from[pixels.interior[i] + c] : 0.0f;
      }
    }
  }
}

std::int64_t MaskedGradientPlan::workspace_floats(std::int64_t count, bool gated,
                                                  bool moments) const {
  return count * program_->lay_out({gated, moments}, true).kept_floats + kChannelBlock;
}

void MaskedGradientPlan::forward(const MaskedGradientInput& input,
                                 const MaskedGradientForward& out) const {
  ONP_CHECK(input.threads >= 1, "masked_gradient: threads must be positive, got ", input.threads);
  const Run run(*program_, input, false);
  const Buffer& last = program_->buffers[program_->output];
  const std::int64_t classes = last.shape.channels;
  run.for_each_block([&](const Block& place, const Worker&) {
    run.forward(place, &out);
    for (std::int64_t n = 0; n < place.images; ++n) {
      const float* from = place.data[program_->output] + n * last.image() + last.interior[0];
      std::copy_n(from, classes, out.logits + (place.first + n) * classes);
    }
  });
}

void MaskedGradientPlan::backward(const MaskedGradientInput& input,
                                  const MaskedGradientBackward& out) const {
  ONP_CHECK(input.threads >= 1, "masked_gradient: threads must be positive, got ", input.threads);
  ONP_CHECK(input.gates || !out.gates, "masked_gradient: gates must be given for their gradient");
  const Run run(*program_, input, true);
  run.for_each_block([&](const Block& place, const Worker& worker) {
    if (run.forwards) run.forward(place, nullptr);
    run.backward(place, worker, out);
  });
}

}  // namespace onp
