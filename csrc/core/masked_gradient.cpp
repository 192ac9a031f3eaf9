#include "core/masked_gradient.h"

#include <algorithm>
#include <utility>

#include "core/check.h"
#include "core/masked_gradient_kernels.h"
#include "core/masked_gradient_program.h"
#include "core/parallel.h"
#include "core/spare.h"

namespace onp {
namespace {

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

}  // namespace

MaskedGradientPlan::MaskedGradientPlan(const std::vector<BufferShape>& buffers,
                                       const std::vector<StepSpec>& steps,
                                       const std::vector<NormUnits>& norms,
                                       const std::vector<ConstantSpec>& constants,
                                       std::int64_t output, std::int64_t sites, std::int64_t units)
    : program_(std::make_unique<GradientProgram>(buffers, steps, norms, constants, output, sites,
                                                 units)) {}

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

// A constant is the same for every image.
Operand operand(const GradientProgram& program, const Block& block, std::int64_t id) {
  if (program.is_constant(id)) {
    return {program.constants[id].data(), program.buffers[id].interior.data(), 0};
  }
  return id < 0 || !block.data[id] ? Operand{} : program.buffers[id].at(block.data[id]);
}

// The block's rows of values [count, width], from a column on.
PerImage rows(const float* values, std::int64_t width, const Block& block, std::int64_t column) {
  if (!values) return {};
  return {values + block.first * width + column, width};
}

}  // namespace

// One call: its arguments and what follows from them for every block.
struct MaskedGradientPlan::Run {
  const GradientProgram& program;
  const MaskedGradientInput& input;
  GradientMode mode;
  GradientLayout layout;
  std::int64_t block;
  const Kernels& kernels;
  const GradientKernels& gradient_kernels;
  bool forwards, backwards;  // what of the network it runs
  Floats gates;              // a copy, as vectors reach past the last one

  Run(const GradientProgram& the_program, const MaskedGradientInput& the_input, bool back)
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
      for (const GradientLayout::Place& at : layout.places) {
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
    const std::int64_t scratch =
        std::max(program.scratch_floats, backwards ? program.backward_scratch_floats : 0);
    auto worker = std::make_unique<Worker>(kept + passing + back + scratch);
    worker->kept = worker->memory.data();
    worker->passing = worker->kept + kept;
    worker->gradients = worker->passing + passing;
    worker->scratch = worker->gradients + back;
    for (std::size_t id = 0; id < layout.places.size(); ++id) {
      const GradientLayout::Place& at = layout.places[id];
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

  struct Backward;

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
  const auto at = [&](std::int64_t id) { return operand(program, place, id); };
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
        std::pair{extra.active, &args.kept.active},
        std::pair{extra.first_slope, &args.kept.first_slope},
        std::pair{extra.second_slope, &args.kept.second_slope}}) {
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
    args.values = operand(program, place, id);
    args.mean = out.mean + begin;
    args.variance = out.variance + begin;
    args.stride = program.units;
    gradient_kernels.moments(args);
  }
}

// One block of images on its way back, from the logits to the images.
struct MaskedGradientPlan::Run::Backward {
  const Run& run;
  const Block& place;
  const Worker& worker;
  const MaskedGradientBackward& out;
  const GradientProgram& program;
  const GradientKernels& kernels;
  std::vector<char> flows;  // buffers whose gradient was written

  Backward(const Run& the_run, const Block& block, const Worker& the_worker,
           const MaskedGradientBackward& the_out)
      : run(the_run),
        place(block),
        worker(the_worker),
        out(the_out),
        program(the_run.program),
        kernels(the_run.gradient_kernels),
        flows(program.gradients.size(), 0) {}

  float* memory(std::int64_t begin) const {
    return begin < 0 ? nullptr : worker.gradients + begin * run.block;
  }
  Operand gradient(std::int64_t id) const {
    return program.gradients[id].at(memory(program.gradient_begin[id]));
  }
  Operand flowing(std::int64_t id) const { return id >= 0 && flows[id] ? gradient(id) : Operand{}; }
  Operand at(std::int64_t id) const { return operand(program, place, id); }
  bool wanted(std::int64_t id) const {
    return id > 0 ? !program.is_constant(id) : id == 0 && out.images;
  }
  // Where sums over a buffer's pixels go, which begin at 0.
  Operand summing(std::int64_t id) {
    const Operand to = gradient(id);
    if (!flows[id]) std::fill_n(to.data, place.images * program.gradients[id].image(), 0.0f);
    flows[id] = 1;
    return to;
  }

  void take_logits();
  bool epilogue(std::size_t s, Operand& operation);
  void operation(std::size_t s, const Operand& operation);
  void convolution(std::size_t s, const Operand& operation);
  void pool(std::size_t s, const Operand& operation);
  void pick(std::size_t s, const Operand& operation);
  void split(std::size_t s, const Operand& operation);
  void product(std::size_t s, const Operand& operation);
  void layer_norm(std::size_t s, const Operand& operation);
  void group_norm(std::size_t s, const Operand& operation);
  void attention(std::size_t s, const Operand& operation);
  void give_images() const;
};

void MaskedGradientPlan::Run::Backward::take_logits() {
  const auto output = static_cast<std::int64_t>(program.output);
  const Buffer& last = program.gradients[program.output];
  const std::int64_t classes = last.shape.channels;
  for (std::int64_t n = 0; n < place.images; ++n) {
    std::copy_n(out.logits + (place.first + n) * classes, classes,
                gradient(output).data + n * last.image());
  }
  flows[program.output] = 1;
}

// From the gradients of what a step wrote to that of its operation. False where none arrives.
bool MaskedGradientPlan::Run::Backward::epilogue(std::size_t s, Operand& operation) {
  const Step& step = program.steps[s];
  const StepSpec& spec = step.spec;
  const Extras& extra = program.extras[s];
  const Reverse& back = program.reverse[s];
  const auto moments = [&](std::int64_t id, std::int64_t unit) {
    if (!run.mode.moments || !out.slope || id < 0) return MomentsPull{};
    return MomentsPull{at(id), rows(out.slope, program.units, place, unit),
                       rows(out.offset, program.units, place, unit)};
  };
  PullArgs pull{};
  pull.images = place.images;
  pull.pixels = pixels_of(back.gradient.shape);
  pull.channels = step.channels;
  pull.final_gradient = flowing(spec.final);
  pull.plain_gradient = flowing(spec.plain);
  pull.scaled = moments(extra.scaled, extra.units.scaled);
  pull.result = moments(extra.result, extra.units.result);
  if (!pull.final_gradient.data && !pull.plain_gradient.data && !pull.scaled.values.data &&
      !pull.result.values.data) {
    return false;
  }
  if (run.mode.gated && spec.site_start >= 0) {
    pull.gates = rows(run.input.gates, program.sites, place, spec.site_start);
    if (out.gates && pull.final_gradient.data) {
      pull.active = at(extra.active);
      pull.gate_gradient = out.gates + place.first * program.sites + spec.site_start;
    }
  }
  pull.second_passed = place.passed(run.layout.passed[s].second);
  pull.second_slope = at(extra.second_slope);
  pull.scale = step.scale.data();
  pull.first_passed = place.passed(run.layout.passed[s].first);
  pull.first_slope = at(extra.first_slope);
  if (wanted(spec.residual)) {
    pull.residual_gradient = gradient(spec.residual);
    pull.add_to_residual = flows[spec.residual];
    flows[spec.residual] = 1;
  }
  pull.operation_gradient = operation = back.gradient.at(memory(program.operation_begin[s]));
  kernels.pull(pull);
  return true;
}

void MaskedGradientPlan::Run::Backward::operation(std::size_t s, const Operand& operation) {
  const StepSpec& spec = program.steps[s].spec;
  if (spec.others.empty() && !wanted(spec.input)) return;
  switch (spec.kind) {
    case StepKind::convolution:
      return convolution(s, operation);
    case StepKind::pick:
      return pick(s, operation);
    case StepKind::concatenation:
      return split(s, operation);
    case StepKind::product:
      return product(s, operation);
    case StepKind::layer_norm:
      return layer_norm(s, operation);
    case StepKind::group_norm:
      return group_norm(s, operation);
    case StepKind::attention:
      return attention(s, operation);
    default:
      return pool(s, operation);
  }
}

void MaskedGradientPlan::Run::Backward::convolution(std::size_t s, const Operand& operation) {
  const StepSpec& spec = program.steps[s].spec;
  const Reverse& back = program.reverse[s];
  const Operand to = back.gaps ? summing(spec.input) : gradient(spec.input);
  for (const Reverse::Part& part : back.parts) {
    StepArgs args = part.step.args(back.gradient, operation.data, place.images);
    args.final = {to.data, part.target.data(), to.image_stride};
    if (flows[spec.input]) args.residual = args.final;
    args.scratch = place.scratch;
    (run.kernels.*part.step.kernel)(args);
  }
  flows[spec.input] = 1;
}

void MaskedGradientPlan::Run::Backward::pool(std::size_t s, const Operand& operation) {
  const Step& step = program.steps[s];
  const std::int64_t input = step.spec.input;
  const Buffer& from = program.buffers[input];
  const std::vector<std::int32_t>& offset = program.reverse[s].gradient_offset;
  const Operand to = summing(input);
  PoolPullArgs args{};
  args.images = place.images;
  args.pixels = static_cast<std::int64_t>(offset.size());
  args.channels = step.channels;
  args.gradient = operation;
  args.input = {place.data[input], step.input_offset.data(), from.image()};
  args.input_row = from.row();
  args.input_column = from.stride;
  args.input_gradient = {to.data, offset.data(), to.image_stride};
  args.gradient_row = program.gradients[input].row();
  args.gradient_column = program.gradients[input].stride;
  args.windows = step.windows.data();
  const bool most = step.spec.kind == StepKind::max_pool;
  (most ? kernels.max_pool : kernels.average_pool)(args);
}

void MaskedGradientPlan::Run::Backward::pick(std::size_t s, const Operand& operation) {
  const Step& step = program.steps[s];
  const Reverse& back = program.reverse[s];
  const Operand to = summing(step.spec.input);
  SplitArgs args{};
  args.images = place.images;
  args.pixels = static_cast<std::int64_t>(back.picked.size());
  args.channels = step.channels;
  args.gradient = {operation.data, back.picked.data(), operation.image_stride};
  args.to = {to.data, back.gradient_offset.data(), to.image_stride};
  args.add = true;
  kernels.split(args);
}

void MaskedGradientPlan::Run::Backward::split(std::size_t s, const Operand& operation) {
  SplitArgs args{};
  args.images = place.images;
  args.pixels = pixels_of(program.reverse[s].gradient.shape);
  args.gradient = operation;
  for (const std::int64_t id : program.steps[s].spec.operands()) {
    args.channels = program.buffers[id].shape.channels;
    if (wanted(id)) {
      args.to = gradient(id);
      args.add = flows[id];
      kernels.split(args);
      flows[id] = 1;
    }
    args.gradient.data += args.channels;
  }
}

void MaskedGradientPlan::Run::Backward::product(std::size_t s, const Operand& operation) {
  const Step& step = program.steps[s];
  const std::int64_t operands[] = {step.spec.input, step.spec.others[0]};
  ProductPullArgs args{};
  args.images = place.images;
  args.pixels = pixels_of(program.reverse[s].gradient.shape);
  args.channels = step.channels;
  args.gradient = operation;
  args.one_pixel = step.keys == 1;
  for (int i = 0; i < 2; ++i) {
    args.input[i] = at(operands[i]);
    if (!wanted(operands[i])) continue;
    args.to[i] = gradient(operands[i]);
    args.add[i] = flows[operands[i]];
    flows[operands[i]] = 1;  // of a square, the second adds to the first
  }
  kernels.product(args);
}

void MaskedGradientPlan::Run::Backward::layer_norm(std::size_t s, const Operand& operation) {
  const Step& step = program.steps[s];
  LayerNormPullArgs args{};
  args.images = place.images;
  args.pixels = pixels_of(program.reverse[s].gradient.shape);
  args.channels = step.channels;
  args.gradient = operation;
  args.input = at(step.spec.input);
  args.epsilon = step.spec.value;
  args.to = gradient(step.spec.input);
  args.add = flows[step.spec.input];
  kernels.layer_norm(args);
  flows[step.spec.input] = 1;
}

void MaskedGradientPlan::Run::Backward::group_norm(std::size_t s, const Operand& operation) {
  const Step& step = program.steps[s];
  GroupNormPullArgs args{};
  args.images = place.images;
  args.pixels = pixels_of(program.reverse[s].gradient.shape);
  args.channels = step.channels;
  args.groups = step.spec.heads;
  args.gradient = operation;
  args.input = at(step.spec.input);
  args.epsilon = step.spec.value;
  args.to = gradient(step.spec.input);
  args.add = flows[step.spec.input];
  args.scratch = place.scratch;
  kernels.group_norm(args);
  flows[step.spec.input] = 1;
}

void MaskedGradientPlan::Run::Backward::attention(std::size_t s, const Operand& operation) {
  const Step& step = program.steps[s];
  AttentionPullArgs args{};
  args.images = place.images;
  args.queries = pixels_of(program.reverse[s].gradient.shape);
  args.keys = step.keys;
  args.channels = step.channels;
  args.heads = step.spec.heads;
  args.index = step.index.data();
  args.factor = step.spec.value;
  args.gradient = operation;
  std::size_t part = 0;
  for (const std::int64_t id : step.spec.operands()) {
    args.input[part] = at(id);
    args.to[part] = wanted(id) ? summing(id) : Operand{};
    ++part;
  }
  args.scratch = place.scratch;
  kernels.attention(args);
}

void MaskedGradientPlan::Run::Backward::give_images() const {
  const Buffer& pixels = program.gradients[0];
  const std::int64_t count = pixels_of(pixels.shape);
  for (std::int64_t n = 0; n < place.images; ++n) {
    const float* from = gradient(0).data + n * pixels.image();
    for (std::int64_t c = 0; c < pixels.shape.channels; ++c) {
      float* plane = out.images + ((place.first + n) * pixels.shape.channels + c) * count;
      for (std::int64_t i = 0; i < count; ++i) {
        plane[i] = flows[0] ? from[pixels.interior[i] + c] : 0.0f;
      }
    }
  }
}

void MaskedGradientPlan::Run::backward(const Block& place, const Worker& worker,
                                       const MaskedGradientBackward& out) const {
  if (out.gates) {
    std::fill_n(out.gates + place.first * program.sites, place.images * program.sites, 0.0f);
  }
  Backward back(*this, place, worker, out);
  back.take_logits();
  for (std::size_t s = program.steps.size(); s-- > 0;) {
    Operand operation;
    if (back.epilogue(s, operation)) back.operation(s, operation);
  }
  if (out.images) back.give_images();
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
