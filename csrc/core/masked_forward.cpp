#include "core/masked_forward.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "core/check.h"
#include "core/masked_forward_program.h"
#include "core/parallel.h"
#include "core/spare.h"

namespace onp {

constexpr std::size_t kNowhere = ~std::size_t{0};
// Of 32 places of a segment, the most at which those of pruned channels are left out: to look up
// which are left takes as long as a few more would (bench/NOTES.md).
constexpr std::int64_t kMostLive = 29;

// Where the buffers of a program lie; constants, and floats that only narrow copies stand for,
// nowhere.
struct Layout {
  Slots slots;
  std::vector<std::size_t> slot_of_buffer;
};

struct MaskedForwardPlan::Program : Network {
  std::int64_t keep_words = 0;
  Layout kept;    // a slot for every buffer
  Layout reused;  // buffers share slots where their lives do not overlap

  void lay_out();
  void find_pruned_inputs();
};

namespace {

// Whether channels that are 0 stay 0: a pool without anything behind it but an activation.
bool passes_zeros(const Step& step) {
  const StepSpec& spec = step.spec;
  const bool pool = spec.kind == StepKind::max_pool || spec.kind == StepKind::average_pool ||
                    spec.kind == StepKind::pick;
  const auto clamps = [](Activation one) { return one <= Activation::relu6; };
  return pool && !step.bias && !step.scale && spec.residual < 0 && clamps(spec.first) &&
         clamps(spec.second);
}

}  // namespace

// Which convolutions may leave out inputs that a step has pruned, right before them or before a
// pool. Grouped ones may not, whose blocks read inputs of their own, nor those of bytes, whose 0
// the bias may make up for.
void MaskedForwardPlan::Program::find_pruned_inputs() {
  std::vector<std::int64_t> pruned_by(buffers.size(), -1);
  for (std::size_t s = 0; s < steps.size(); ++s) {
    Step& step = steps[s];
    const StepSpec& spec = step.spec;
    const bool suits = spec.kind == StepKind::convolution && spec.groups == 1;
    if (suits && step.byte_weights.empty()) step.input_pruned_by = pruned_by[spec.input];
    if (passes_zeros(step)) {
      if (spec.plain >= 0) pruned_by[spec.plain] = pruned_by[spec.input];
      if (spec.final >= 0) pruned_by[spec.final] = pruned_by[spec.input];
    }
    if (spec.final >= 0 && spec.site_start >= 0) {
      pruned_by[spec.final] = static_cast<std::int64_t>(s);
    }
  }
}

void MaskedForwardPlan::Program::lay_out() {
  std::vector<std::size_t> last_use(buffers.size(), 0);
  // A step that reads the narrow copy of a buffer does not read its floats.
  const auto reads = [&](const Step& step) {
    std::set<std::int64_t> all(step.reads.begin(), step.reads.end());  // some read one twice
    if (step.input_narrow >= 0) {
      if (!step.reads_floats(step.spec.input)) all.erase(step.spec.input);
      all.insert(step.input_narrow);
    }
    return all;
  };
  const auto writes = [](const Step& step) {
    std::vector<std::int64_t> all = {step.spec.plain, step.final_narrow};
    if (step.final_floats) all.push_back(step.spec.final);
    all.erase(std::remove_if(all.begin(), all.end(), [](auto id) { return id < 0; }), all.end());
    return all;
  };
  for (std::size_t s = 0; s < steps.size(); ++s) {
    for (const std::int64_t id : reads(steps[s])) last_use[id] = s;
  }
  last_use[0] = last_use[output] = steps.size();  // read again by the next mask, and as logits
  kept.slot_of_buffer.resize(buffers.size(), kNowhere);
  kept.slot_of_buffer[0] = kept.slots.claim(buffers[0]);
  reused.slot_of_buffer.resize(buffers.size(), kNowhere);
  const auto claim = [&](std::int64_t id) {
    reused.slot_of_buffer[id] = reused.slots.claim(buffers[id]);
  };
  claim(0);
  for (std::size_t s = 0; s < steps.size(); ++s) {
    for (const std::int64_t id : writes(steps[s])) {
      kept.slot_of_buffer[id] = kept.slots.claim(buffers[id]);
      claim(id);
    }
    for (const std::int64_t id : reads(steps[s])) {
      if (last_use[id] == s) reused.slots.release(buffers[id], reused.slot_of_buffer[id]);
    }
  }
}

MaskedForwardPlan::MaskedForwardPlan(const std::vector<BufferShape>& shapes,
                                     const std::vector<StepSpec>& specs,
                                     const std::vector<ConstantSpec>& constants,
                                     std::int64_t output, std::int64_t sites,
                                     const std::vector<RangeSpec>& ranges, bool halves) {
  auto program = std::make_unique<Program>();
  static_cast<Network&>(*program) =
      plan_network(shapes, specs, constants, output, sites, ranges, halves);
  for (Step& step : program->steps) {
    if (step.spec.site_start < 0) continue;
    step.keep_begin = program->keep_words;
    program->keep_words += round_up(step.channels, kChannelBlock);
  }
  program->find_pruned_inputs();
  program->lay_out();
  program_ = std::move(program);
}

MaskedForwardPlan::~MaskedForwardPlan() = default;

namespace {

// One thread's memory: the buffers of one block of images and the mask they were computed under.
class Worker {
 public:
  Worker(const Network& network, const Layout& layout, std::int64_t block, std::int64_t keep_words)
      // The last vector of a buffer may reach past its end.
      : network_(network),
        floats_(round_up(network.scratch_floats, kChannelBlock) +
                layout.slots.floats_per_image * block + kChannelBlock),
        keep_(static_cast<std::size_t>(keep_words)),
        pruned_(network.steps.size()),
        stale_(network.buffers.size()) {
    float* const begin = floats_.data() + round_up(network.scratch_floats, kChannelBlock);
    for (std::size_t id = 0; id < network.buffers.size(); ++id) {
      const std::size_t slot = layout.slot_of_buffer[id];
      data_.push_back(slot == kNowhere ? nullptr : begin + layout.slots.begin[slot] * block);
      if (data_[id]) clear_halo(network.buffers[id], block, data_[id]);
    }
    std::size_t most = 0;
    for (const Step& step : network.steps) most = std::max(most, step.spec.others.size());
    others_.resize(most);
    std::int64_t longest = 0;
    for (const Step& step : network.steps) longest = std::max(longest, step.segment_length);
    live_.reserve(static_cast<std::size_t>(longest));
  }

  float* data(std::size_t buffer) const { return data_[buffer]; }

  // Absent for -1; a constant is the same for every image.
  Operand operand(std::int64_t buffer) const {
    if (buffer < 0) return {nullptr, nullptr, 0};
    const auto id = static_cast<std::size_t>(buffer);
    const Floats& constant = network_.constants[id];
    if (!constant) return network_.buffers[id].at(data_[id]);
    return {constant.data(), network_.buffers[id].interior.data(), 0};
  }

  // A narrow copy, as what it is made of.
  Bytes bytes(std::int64_t buffer) const {
    return buffer < 0 ? Bytes{} : network_.buffers[buffer].bytes_at(data_[buffer]);
  }
  Halves halves(std::int64_t buffer) const {
    return buffer < 0 ? Halves{} : network_.buffers[buffer].halves_at(data_[buffer]);
  }

  const Operand* others(const Step& step) {
    for (std::size_t i = 0; i < step.spec.others.size(); ++i) {
      others_[i] = operand(step.spec.others[i]);
    }
    return others_.data();
  }

  float* scratch() const { return floats_.data(); }

  // Sets the keep words of `step` under a mask; says whether they changed.
  bool set_keep(const Step& step, const MaskView& masks, std::int64_t mask) {
    bool changed = false;
    std::int64_t& pruned = pruned_[static_cast<std::size_t>(&step - network_.steps.data())];
    pruned = 0;
    for (std::int64_t c = 0; c < step.channels; ++c) {
      const std::uint32_t word = masks.pruned(mask, step.spec.site_start + c) ? 0u : ~0u;
      std::uint32_t& kept = keep_[static_cast<std::size_t>(step.keep_begin + c)];
      changed |= kept != word;
      kept = word;
      pruned += word == 0;
    }
    return changed;
  }

  // The keep words of `step`, or null if it prunes nothing.
  const std::uint32_t* keep(const Step& step) const {
    const std::uint32_t* words = keep_.data() + step.keep_begin;
    const bool all = std::all_of(words, words + step.channels, [](auto word) { return word != 0; });
    return all ? nullptr : words;
  }

  // Sets which places of a segment are multiplied, unless next to nothing of its input is pruned.
  void set_live(const Step& step, StepArgs& args) {
    if (step.input_pruned_by < 0) return;
    const auto by = static_cast<std::size_t>(step.input_pruned_by);
    const std::int64_t channels = network_.steps[by].channels;
    if (32 * (channels - pruned_[by]) > kMostLive * channels) return;
    const std::uint32_t* words = keep_.data() + network_.steps[by].keep_begin;
    const std::int64_t together = step.half_weights.empty() ? 1 : kPair;
    const std::int64_t places = divide_up(channels, together);  // of one tap
    const auto kept = [](auto word) { return word != 0; };
    live_.clear();
    for (std::int64_t first = 0; first < step.segment_length; first += places) {
      for (std::int64_t place = 0; place < places; ++place) {
        const auto begin = place * together, end = std::min(begin + together, channels);
        if (std::any_of(words + begin, words + end, kept)) {
          live_.push_back(static_cast<std::int32_t>(first + place));
        }
      }
    }
    const auto count = static_cast<std::int64_t>(live_.size());
    if (32 * count > kMostLive * step.segment_length) return;
    args.live = live_.data();  // reserved, and so not null though nothing were left
    args.live_count = count;
  }

  // Whether a buffer's values are not those of the current mask's predecessor.
  std::vector<char>& stale() { return stale_; }

 private:
  const Network& network_;
  Spare floats_;
  std::vector<float*> data_;
  std::vector<Operand> others_;
  std::vector<std::uint32_t> keep_;
  std::vector<std::int64_t> pruned_;  // channels of each step
  std::vector<std::int32_t> live_;
  std::vector<char> stale_;
};

void run_step(const Step& step, const Network& network, Worker& worker, std::int64_t images,
              const Kernels& kernels) {
  const StepSpec& spec = step.spec;
  const auto input =
      static_cast<std::size_t>(step.input_narrow < 0 ? spec.input : step.input_narrow);
  StepArgs args = step.args(network.buffers[input], worker.data(input), images);
  args.others = worker.others(step);
  args.residual = worker.operand(spec.residual);
  args.first = spec.first;
  args.plain = worker.operand(spec.plain);
  args.scale = step.scale.data();
  args.shift = step.shift.data();
  args.second = spec.second;
  args.keep = spec.site_start >= 0 ? worker.keep(step) : nullptr;
  worker.set_live(step, args);
  args.final = worker.operand(step.final_floats ? spec.final : -1);
  args.final_bytes = worker.bytes(step.final_narrow);
  args.final_halves = worker.halves(step.final_narrow);
  args.scratch = worker.scratch();
  (kernels.*step.kernel)(args);
}

void check_masks(const MaskView& masks, std::int64_t sites) {
  ONP_CHECK(masks.words_per_mask * 64 >= sites, "masked_forward: masks must have ", sites,
            " bits, got ", masks.words_per_mask, " words");
}

// Takes the values of one image into a range.
void widen(RangeSpec& range, const Buffer& buffer, const float* image) {
  for (const std::int32_t pixel : buffer.interior) {
    for (std::size_t c = 0; c < range.highest.size(); ++c) {
      const float value = image[static_cast<std::size_t>(pixel) + c];
      range.lowest = std::min(range.lowest, value);
      range.highest[c] = std::max(range.highest[c], std::abs(value));
    }
  }
}

}  // namespace

std::int64_t MaskedForwardPlan::least_bytes(bool share) const {
  const Layout& layout = share ? program_->kept : program_->reused;
  return (layout.slots.floats_per_image + program_->scratch_floats) *
         static_cast<std::int64_t>(sizeof(float));
}

std::int64_t MaskedForwardPlan::narrow_steps() const {
  const auto reads_narrow = [](const Step& step) { return step.input_narrow >= 0; };
  return std::count_if(program_->steps.begin(), program_->steps.end(), reads_narrow);
}

std::vector<RangeSpec> MaskedForwardPlan::ranges(const MaskedForwardRun& run) const {
  const Program& program = *program_;
  check_masks(run.masks, program.sites);
  ONP_CHECK(narrow_steps() == 0, "masked_forward: ranges must be measured by a plan in fp32");
  const Kernels& kernels = kernels_for(run.isa);
  std::vector<RangeSpec> found;
  for (const Step& step : program.steps) {
    if (step.spec.final < 0) continue;
    found.push_back(
        {step.spec.final, 0, std::vector<float>(static_cast<std::size_t>(step.channels))});
  }
  const Buffer& input = program.buffers[0];
  Worker worker(program, program.kept, 1, program.keep_words);
  for (std::int64_t n = 0; n < run.count; ++n) {
    load_images(run.images + n * input.floats(), 1, input, worker.data(0));
    for (std::int64_t mask = 0; mask < run.masks.batch; ++mask) {
      auto range = found.begin();
      for (const Step& step : program.steps) {
        if (step.spec.site_start >= 0) worker.set_keep(step, run.masks, mask);
        run_step(step, program, worker, 1, kernels);
        if (step.spec.final >= 0) {
          widen(*range++, program.buffers[step.spec.final], worker.data(step.spec.final));
        }
      }
    }
  }
  return found;
}

void MaskedForwardPlan::run(const MaskedForwardRun& run) const {
  const Program& program = *program_;
  ONP_CHECK(run.threads >= 1, "masked_forward: threads must be positive, got ", run.threads);
  check_masks(run.masks, program.sites);
  const std::int64_t least = least_bytes(run.share);
  ONP_CHECK(least <= run.max_bytes, "masked_forward: max_bytes must be at least ", least, ", got ",
            run.max_bytes);
  const Kernels& kernels = kernels_for(run.isa);
  if (run.count == 0 || run.masks.batch == 0) return;

  const Layout& layout = run.share ? program.kept : program.reused;
  constexpr std::int64_t size = sizeof(float);
  const std::int64_t wanted = block_bytes(program.weight_bytes);
  const std::int64_t allowed = std::min(wanted, run.max_bytes - size * program.scratch_floats);
  const std::int64_t image_bytes = size * layout.slots.floats_per_image;
  const std::int64_t most = std::max(allowed / image_bytes, std::int64_t{1});
  // Blocks are smaller than memory allows only where few masks would leave threads idle, masks
  // split between tasks only where the images alone do not keep the threads busy.
  const std::int64_t tasks = run.threads == 1 ? 1 : 4 * run.threads;
  const std::int64_t blocks =
      std::min(std::max(divide_up(run.count, most), divide_up(tasks, run.masks.batch)), run.count);
  const std::int64_t block = divide_up(run.count, blocks);
  const std::int64_t parts = divide_up(tasks, blocks);
  const std::int64_t chunk = divide_up(run.masks.batch, std::min(parts, run.masks.batch));
  const std::int64_t chunks = divide_up(run.masks.batch, chunk);

  std::vector<std::unique_ptr<Worker>> workers(static_cast<std::size_t>(run.threads));
  const Buffer& input = program.buffers[0];
  const Buffer& output = program.buffers[program.output];
  const std::int64_t classes = output.shape.channels;

  parallel_for(blocks * chunks, run.threads, [&](std::int64_t task, int thread) {
    std::unique_ptr<Worker>& slot = workers[static_cast<std::size_t>(thread)];
    if (!slot) {
      slot = std::make_unique<Worker>(program, layout, block, program.keep_words);
    }
    Worker& worker = *slot;
    const std::int64_t first = task / chunks * block;
    const std::int64_t images = std::min(block, run.count - first);
    if (images <= 0) return;
    load_images(run.images + first * input.floats(), images, input, worker.data(0));
    const std::int64_t begin = task % chunks * chunk;
    const std::int64_t end = std::min(begin + chunk, run.masks.batch);
    for (std::int64_t mask = begin; mask < end; ++mask) {
      // With a slot for every buffer, what the previous mask left is still there: a step runs
      // again only if something it reads, or its own part of the mask, has changed.
      const bool fresh = mask == begin || !run.share;
      std::vector<char>& stale = worker.stale();
      stale[0] = fresh;
      for (const Step& step : program.steps) {
        const StepSpec& spec = step.spec;
        const bool pruned = spec.site_start >= 0 && worker.set_keep(step, run.masks, mask);
        const bool moved = std::any_of(step.reads.begin(), step.reads.end(),
                                       [&](std::int64_t id) { return stale[id] != 0; });
        if (moved || pruned) {
          run_step(step, program, worker, images, kernels);
        }
        if (spec.plain >= 0) stale[spec.plain] = moved;
        if (spec.final >= 0) stale[spec.final] = moved || pruned;
      }
      for (std::int64_t n = 0; n < images; ++n) {
        const float* from = worker.data(program.output) + n * output.image() + output.interior[0];
        float* to = run.logits + (mask * run.count + first + n) * classes;
        std::copy(from, from + classes, to);
      }
    }
  });
}

}  // namespace onp
