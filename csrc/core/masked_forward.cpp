#include "core/masked_forward.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <new>
#include <tuple>

#include "core/check.h"
#include "core/parallel.h"

namespace onp {
namespace {

constexpr std::size_t kAlignment = 64;
// A block of images grows until its buffers take this much, or this share of the weights: small
// blocks keep activations in cache, large ones spread a pass over the weights on more pixels.
constexpr std::int64_t kBlockBytes = 4 << 20;
constexpr std::int64_t kWeightsPerBlock = 8;

std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

std::int64_t divide_up(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

// Zeroed floats on a cache line boundary.
class Floats {
 public:
  Floats() = default;
  explicit Floats(std::int64_t size)
      : size_(size),
        data_(new (std::align_val_t{kAlignment}) float[static_cast<std::size_t>(size)]()) {}

  float* data() const { return data_.get(); }
  std::int64_t bytes() const { return size_ * static_cast<std::int64_t>(sizeof(float)); }

 private:
  struct Delete {
    void operator()(float* data) const {
      ::operator delete[](data, std::align_val_t{kAlignment});
    }
  };
  std::int64_t size_ = 0;
  std::unique_ptr<float[], Delete> data_;
};

// Images are stored one after the other, each [height + 2 halo][width + 2 halo][stride]. The halo
// is zero and never written; lanes past `channels` hold whatever the vectors left there.
struct Buffer {
  BufferShape shape;
  std::int64_t halo = 0;
  std::int64_t stride = 0;  // floats from one pixel to the next
  std::vector<std::int32_t> interior;  // [height * width]

  std::int64_t row() const { return (shape.width + 2 * halo) * stride; }
  std::int64_t image() const {
    return round_up((shape.height + 2 * halo) * row(), kChannelBlock);
  }
  // May point into the halo: y and x from -halo.
  std::int64_t offset(std::int64_t y, std::int64_t x) const {
    return (y + halo) * row() + (x + halo) * stride;
  }
};

// Where the buffers of a program lie: slot s begins at slot_begin[s] * images in the block.
struct Layout {
  std::vector<std::size_t> slot_of_buffer;
  std::vector<std::int64_t> slot_begin;
  std::int64_t floats_per_image = 0;
};

struct Step {
  StepSpec spec;  // its arrays are gone: use the ones below
  std::int64_t channels = 0;
  void (*Kernels::*kernel)(const StepArgs&) = nullptr;
  std::vector<std::int32_t> input_offset;
  std::vector<std::int32_t> segments;
  std::vector<std::int32_t> first_channel;
  std::vector<Window> windows;
  std::int64_t segment_length = 0;
  std::int64_t block_stride = 0;
  std::int64_t keep_begin = 0;  // into one thread's keep words
  Floats weights, bias, scale, shift;
};

// The per-channel array padded with zeros, or nothing.
Floats padded(const float* values, std::int64_t channels) {
  if (!values) return {};
  Floats copy(round_up(channels, kChannelBlock));
  std::copy(values, values + channels, copy.data());
  return copy;
}

std::int64_t output_size(std::int64_t size, std::int64_t kernel, std::int64_t stride,
                         std::int64_t pad) {
  return (size + 2 * pad - kernel) / stride + 1;
}

void check_step(const StepSpec& spec, const std::vector<BufferShape>& buffers) {
  const auto count = static_cast<std::int64_t>(buffers.size());
  const auto is_buffer = [&](std::int64_t id) { return id >= 0 && id < count; };
  ONP_CHECK(is_buffer(spec.input), "masked_forward: input must be a buffer, got ", spec.input);
  ONP_CHECK(spec.final > 0 || spec.plain > 0,
            "masked_forward: a step must write a buffer other than the images, got plain ",
            spec.plain, " and final ", spec.final);
  const std::int64_t out = spec.final > 0 ? spec.final : spec.plain;
  ONP_CHECK(is_buffer(out), "masked_forward: final must be a buffer, got ", out);
  const BufferShape from = buffers[spec.input], to = buffers[out];
  for (const std::int64_t id : {spec.residual, spec.plain}) {
    if (id < 0) continue;
    ONP_CHECK(is_buffer(id), "masked_forward: plain and residual must be buffers, got ", id);
    const BufferShape other = buffers[id];
    ONP_CHECK(other.channels == to.channels && other.height == to.height &&
                  other.width == to.width,
              "masked_forward: residual and plain must have the shape of final, got [",
              other.channels, ", ", other.height, ", ", other.width, "]");
  }
  for (const std::int64_t read : {spec.input, spec.residual}) {
    ONP_CHECK(read < 0 || (read != spec.plain && read != spec.final),
              "masked_forward: a step must not write a buffer that it reads, got ", read);
  }
  ONP_CHECK(spec.plain < 0 || spec.plain != spec.final,
            "masked_forward: plain and final must differ, got ", spec.plain);
  ONP_CHECK(spec.kernel_height > 0 && spec.kernel_width > 0 && spec.stride_height > 0 &&
                spec.stride_width > 0 && spec.pad_height >= 0 && spec.pad_width >= 0,
            "masked_forward: kernel and stride must be positive and padding not negative");
  const std::int64_t height =
      output_size(from.height, spec.kernel_height, spec.stride_height, spec.pad_height);
  const std::int64_t width =
      output_size(from.width, spec.kernel_width, spec.stride_width, spec.pad_width);
  ONP_CHECK(from.height + 2 * spec.pad_height >= spec.kernel_height &&
                from.width + 2 * spec.pad_width >= spec.kernel_width && height == to.height &&
                width == to.width,
            "masked_forward: final must be [", height, ", ", width, "] pixels, got [", to.height,
            ", ", to.width, "]");
  if (spec.kind == StepKind::convolution) {
    ONP_CHECK(spec.weight, "masked_forward: weight must be given for a convolution");
    ONP_CHECK(spec.groups > 0 && from.channels % spec.groups == 0 &&
                  to.channels % spec.groups == 0,
              "masked_forward: groups must divide the channels, got ", spec.groups);
  } else {
    ONP_CHECK(from.channels == to.channels,
              "masked_forward: pooling must keep the channels, got ", from.channels, " and ",
              to.channels);
    ONP_CHECK(2 * spec.pad_height <= spec.kernel_height && 2 * spec.pad_width <= spec.kernel_width,
              "masked_forward: a pool's padding must be at most half its kernel");
  }
  ONP_CHECK(!spec.scale == !spec.shift, "masked_forward: scale and shift must come together");
}

// Offsets of the window of each output pixel. A pool's windows are cut to the image.
void place_windows(Step& step, const Buffer& from, const BufferShape& to) {
  const StepSpec& spec = step.spec;
  for (std::int64_t y = 0; y < to.height; ++y) {
    for (std::int64_t x = 0; x < to.width; ++x) {
      const std::int64_t top = y * spec.stride_height - spec.pad_height;
      const std::int64_t left = x * spec.stride_width - spec.pad_width;
      if (spec.kind == StepKind::convolution) {
        step.input_offset.push_back(static_cast<std::int32_t>(from.offset(top, left)));
        continue;
      }
      const std::int64_t begin_y = std::max<std::int64_t>(top, 0);
      const std::int64_t begin_x = std::max<std::int64_t>(left, 0);
      const auto rows = std::min(top + spec.kernel_height, from.shape.height) - begin_y;
      const auto columns = std::min(left + spec.kernel_width, from.shape.width) - begin_x;
      const auto divisor =
          spec.count_include_pad ? spec.kernel_height * spec.kernel_width : rows * columns;
      step.input_offset.push_back(static_cast<std::int32_t>(from.offset(begin_y, begin_x)));
      step.windows.push_back({static_cast<std::int32_t>(rows), static_cast<std::int32_t>(columns),
                              1.0f / static_cast<float>(divisor)});
    }
  }
}

void pack_depthwise(Step& step, const Buffer& from) {
  const StepSpec& spec = step.spec;
  step.kernel = &Kernels::depthwise;
  step.block_stride = round_up(step.channels, kChannelBlock);
  const std::int64_t taps = spec.kernel_height * spec.kernel_width;
  step.weights = Floats(taps * step.block_stride);
  for (std::int64_t tap = 0; tap < taps; ++tap) {
    const std::int64_t y = tap / spec.kernel_width, x = tap % spec.kernel_width;
    step.segments.push_back(static_cast<std::int32_t>(y * from.row() + x * from.stride));
    for (std::int64_t c = 0; c < step.channels; ++c) {
      step.weights.data()[tap * step.block_stride + c] = spec.weight[c * taps + tap];
    }
  }
}

// Each block of output channels reads the input channels of the groups that it touches: all of
// them without groups. Weights between a group and another group's inputs are zero.
void pack_convolution(Step& step, const Buffer& from) {
  const StepSpec& spec = step.spec;
  const std::int64_t group_inputs = from.shape.channels / spec.groups;
  const std::int64_t group_outputs = step.channels / spec.groups;
  const std::int64_t blocks = divide_up(step.channels, kChannelBlock);
  std::int64_t span = 0;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t last = std::min((block + 1) * kChannelBlock, step.channels) - 1;
    const std::int64_t first_group = block * kChannelBlock / group_outputs;
    span = std::max(span, (last / group_outputs + 1 - first_group) * group_inputs);
  }
  if (spec.groups > 1) {
    for (std::int64_t block = 0; block < blocks; ++block) {
      const std::int64_t first = block * kChannelBlock / group_outputs * group_inputs;
      step.first_channel.push_back(
          static_cast<std::int32_t>(std::min(first, from.shape.channels - span)));
    }
  }
  // Without gaps between pixels a whole kernel row is one segment.
  const bool rows = span == from.stride;
  step.segment_length = rows ? spec.kernel_width * span : span;
  for (std::int64_t y = 0; y < spec.kernel_height; ++y) {
    for (std::int64_t x = 0; x < (rows ? 1 : spec.kernel_width); ++x) {
      step.segments.push_back(static_cast<std::int32_t>(y * from.row() + x * from.stride));
    }
  }
  const std::int64_t taps = spec.kernel_height * spec.kernel_width;
  step.kernel = &Kernels::convolution;
  step.block_stride = taps * span * kChannelBlock;
  step.weights = Floats(blocks * step.block_stride);
  for (std::int64_t o = 0; o < step.channels; ++o) {
    const std::int64_t block = o / kChannelBlock;
    const std::int64_t begin = step.first_channel.empty() ? 0 : step.first_channel[block];
    const std::int64_t shift = o / group_outputs * group_inputs - begin;
    float* packed = step.weights.data() + block * step.block_stride + o % kChannelBlock;
    for (std::int64_t i = 0; i < group_inputs; ++i) {
      for (std::int64_t tap = 0; tap < taps; ++tap) {
        packed[(tap * span + shift + i) * kChannelBlock] =
            spec.weight[(o * group_inputs + i) * taps + tap];
      }
    }
  }
}

// Narrow layers lose more to the transforms than they save.
bool suits_winograd(const StepSpec& spec, std::int64_t inputs, std::int64_t outputs) {
  return spec.kernel_height == 3 && spec.kernel_width == 3 && spec.stride_height == 1 &&
         spec.stride_width == 1 && spec.groups == 1 && inputs >= kChannelBlock &&
         outputs >= kChannelBlock;
}

// G g G^T of every 3x3 kernel g, G = [1 0 0; 1/2 1/2 1/2; 1/2 -1/2 1/2; 0 0 1].
void pack_winograd(Step& step, const Buffer& from) {
  const std::int64_t inputs = from.shape.channels;
  step.kernel = &Kernels::winograd;
  step.segment_length = inputs;
  step.block_stride = kWinogradPoints * inputs * kChannelBlock;
  step.weights = Floats(divide_up(step.channels, kChannelBlock) * step.block_stride);
  const auto transform = [](const double* g, int stride, double* to, int to_stride) {
    const double ends = 0.5 * (g[0] + g[2 * stride]), middle = 0.5 * g[stride];
    to[0] = g[0];
    to[to_stride] = ends + middle;
    to[2 * to_stride] = ends - middle;
    to[3 * to_stride] = g[2 * stride];
  };
  for (std::int64_t o = 0; o < step.channels; ++o) {
    float* packed =
        step.weights.data() + o / kChannelBlock * step.block_stride + o % kChannelBlock;
    for (std::int64_t i = 0; i < inputs; ++i) {
      double kernel[3 * 3], columns[4 * 3], points[4 * 4];
      std::copy_n(step.spec.weight + (o * inputs + i) * 9, 9, kernel);
      for (int x = 0; x < 3; ++x) transform(kernel + x, 3, columns + x, 3);
      for (int y = 0; y < 4; ++y) transform(columns + 3 * y, 1, points + 4 * y, 1);
      for (std::int64_t point = 0; point < kWinogradPoints; ++point) {
        packed[(point * inputs + i) * kChannelBlock] = static_cast<float>(points[point]);
      }
    }
  }
}

const std::vector<const Kernels*>& kernel_tables() {
  static const std::vector<const Kernels*> tables = [] {
    std::vector<const Kernels*> found;
#ifdef ONP_X86_KERNELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      found.push_back(&kAvx512Kernels);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      found.push_back(&kAvx2Kernels);
    }
#endif
    found.push_back(&kGenericKernels);
    return found;
  }();
  return tables;
}

const Kernels& kernels_for(const std::string& isa) {
  for (const Kernels* table : kernel_tables()) {
    if (isa == "auto" || isa == table->name) return *table;
  }
  throw Error(concat("masked_forward: isa must be auto or a set that this processor runs, got ",
                     isa));
}

}  // namespace

struct MaskedForwardPlan::Program {
  std::vector<Buffer> buffers;
  std::vector<Step> steps;
  std::size_t output = 0;
  std::int64_t sites = 0;
  std::int64_t keep_words = 0;
  std::int64_t scratch_floats = 0;
  std::int64_t weight_bytes = 0;
  Layout kept;    // a slot for every buffer
  Layout reused;  // buffers share slots where their lives do not overlap

  void lay_out();
};

void MaskedForwardPlan::Program::lay_out() {
  const auto add_slot = [](Layout& layout, std::int64_t floats) {
    layout.slot_begin.push_back(layout.floats_per_image);
    layout.floats_per_image += floats;
    return layout.slot_begin.size() - 1;
  };
  std::vector<std::size_t> last_use(buffers.size(), 0);
  for (std::size_t s = 0; s < steps.size(); ++s) {
    for (const std::int64_t id : {steps[s].spec.input, steps[s].spec.residual}) {
      if (id >= 0) last_use[id] = s;
    }
  }
  last_use[0] = last_use[output] = steps.size();  // read again by the next mask, and as logits
  for (const Buffer& buffer : buffers) {
    kept.slot_of_buffer.push_back(add_slot(kept, buffer.image()));
  }
  // Only buffers of one shape and halo share a slot: the halo then stays zero.
  using Key = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
  const auto key = [](const Buffer& b) {
    return Key{b.shape.height, b.shape.width, b.stride, b.halo};
  };
  std::map<Key, std::vector<std::size_t>> free_slots;
  reused.slot_of_buffer.resize(buffers.size());
  const auto claim = [&](std::int64_t id) {
    std::vector<std::size_t>& free = free_slots[key(buffers[id])];
    if (free.empty()) free.push_back(add_slot(reused, buffers[id].image()));
    reused.slot_of_buffer[id] = free.back();
    free.pop_back();
  };
  claim(0);
  for (std::size_t s = 0; s < steps.size(); ++s) {
    const StepSpec& spec = steps[s].spec;
    for (const std::int64_t id : {spec.plain, spec.final}) {
      if (id >= 0) claim(id);
    }
    const auto release = [&](std::int64_t id) {
      free_slots[key(buffers[id])].push_back(reused.slot_of_buffer[id]);
    };
    if (last_use[spec.input] == s) release(spec.input);
    if (spec.residual >= 0 && spec.residual != spec.input && last_use[spec.residual] == s) {
      release(spec.residual);
    }
  }
}

MaskedForwardPlan::MaskedForwardPlan(std::vector<BufferShape> shapes,
                                     const std::vector<StepSpec>& specs, std::int64_t output,
                                     std::int64_t sites) {
  auto program = std::make_unique<Program>();
  ONP_CHECK(output >= 0 && output < static_cast<std::int64_t>(shapes.size()),
            "masked_forward: output must be a buffer, got ", output);
  ONP_CHECK(shapes[output].height == 1 && shapes[output].width == 1,
            "masked_forward: output must be one pixel, got [", shapes[output].height, ", ",
            shapes[output].width, "]");
  std::vector<bool> written(shapes.size(), false);
  written[0] = true;
  program->output = static_cast<std::size_t>(output);
  program->sites = sites;
  for (const BufferShape& shape : shapes) {
    ONP_CHECK(shape.channels > 0 && shape.height > 0 && shape.width > 0,
              "masked_forward: a buffer must hold at least one value, got [", shape.channels, ", ",
              shape.height, ", ", shape.width, "]");
    Buffer buffer;
    buffer.shape = shape;
    // Kernels write whole vectors; the images are written channel by channel.
    buffer.stride = program->buffers.empty() ? shape.channels
                                             : round_up(shape.channels, kChannelBlock);
    program->buffers.push_back(std::move(buffer));
  }
  for (const StepSpec& spec : specs) {
    check_step(spec, shapes);
    for (const std::int64_t id : {spec.input, spec.residual}) {
      ONP_CHECK(id < 0 || written[id], "masked_forward: buffer ", id,
                " must be written before it is read");
    }
    for (const std::int64_t id : {spec.plain, spec.final}) {
      if (id < 0) continue;
      ONP_CHECK(!written[id], "masked_forward: buffer ", id, " must be written once");
      written[id] = true;
    }
    const std::int64_t channels = shapes[spec.final >= 0 ? spec.final : spec.plain].channels;
    ONP_CHECK(spec.site_start < 0 || spec.site_start + channels <= sites,
              "masked_forward: a step's sites must lie in [0, ", sites, "), got ", spec.site_start,
              " and ", channels, " channels");
    if (spec.kind == StepKind::convolution) {
      Buffer& from = program->buffers[spec.input];
      std::int64_t halo = std::max(spec.pad_height, spec.pad_width);
      if (suits_winograd(spec, from.shape.channels, channels)) {
        // The last tile of an odd size reads one pixel further.
        const BufferShape to = shapes[spec.final >= 0 ? spec.final : spec.plain];
        halo += to.height % 2 || to.width % 2 ? 1 : 0;
        const std::int64_t floats = winograd_scratch(
            round_up(from.shape.channels, kChannelBlock), round_up(channels, kChannelBlock));
        program->scratch_floats = std::max(program->scratch_floats, floats);
      }
      from.halo = std::max(from.halo, halo);
    }
  }
  ONP_CHECK(written[output], "masked_forward: output must be written by a step");
  for (Buffer& buffer : program->buffers) {
    ONP_CHECK(buffer.image() <= std::numeric_limits<std::int32_t>::max(),
              "masked_forward: one image of a buffer must have fewer than 2^31 values, got ",
              buffer.image());
    for (std::int64_t y = 0; y < buffer.shape.height; ++y) {
      for (std::int64_t x = 0; x < buffer.shape.width; ++x) {
        buffer.interior.push_back(static_cast<std::int32_t>(buffer.offset(y, x)));
      }
    }
  }
  for (const StepSpec& spec : specs) {
    const Buffer& from = program->buffers[spec.input];
    const BufferShape to = shapes[spec.final >= 0 ? spec.final : spec.plain];
    Step step;
    step.spec = spec;
    step.channels = to.channels;
    place_windows(step, from, to);
    if (spec.kind != StepKind::convolution) {
      const bool most = spec.kind == StepKind::max_pool;
      step.kernel = most ? &Kernels::max_pool : &Kernels::average_pool;
    } else if (spec.groups > 1 && spec.groups == from.shape.channels &&
               spec.groups == to.channels) {
      pack_depthwise(step, from);
    } else if (suits_winograd(spec, from.shape.channels, to.channels)) {
      pack_winograd(step, from);
    } else {
      pack_convolution(step, from);
    }
    program->weight_bytes += step.weights.bytes();
    step.bias = padded(spec.bias, to.channels);
    step.scale = padded(spec.scale, to.channels);
    step.shift = padded(spec.shift, to.channels);
    if (spec.site_start >= 0) {
      step.keep_begin = program->keep_words;
      program->keep_words += round_up(to.channels, kChannelBlock);
    }
    step.spec.weight = step.spec.bias = step.spec.scale = step.spec.shift = nullptr;
    program->steps.push_back(std::move(step));
  }
  program->lay_out();
  program_ = std::move(program);
}

MaskedForwardPlan::~MaskedForwardPlan() = default;

namespace {

// One thread's memory: the buffers of one block of images and the mask they were computed under.
class Worker {
 public:
  Worker(const std::vector<Buffer>& buffers, const Layout& layout, std::int64_t block,
         std::int64_t keep_words, std::int64_t scratch_floats)
      // The last vector of a buffer may reach past its end.
      : floats_(layout.floats_per_image * block + kChannelBlock),
        scratch_(scratch_floats),
        keep_(static_cast<std::size_t>(keep_words)),
        stale_(buffers.size()) {
    for (const std::size_t slot : layout.slot_of_buffer) {
      data_.push_back(floats_.data() + layout.slot_begin[slot] * block);
    }
  }

  float* data(std::size_t buffer) const { return data_[buffer]; }
  float* scratch() const { return scratch_.data(); }

  // Sets the keep words of `step` under a mask; says whether they changed.
  bool set_keep(const Step& step, const MaskView& masks, std::int64_t mask) {
    bool changed = false;
    for (std::int64_t c = 0; c < step.channels; ++c) {
      const std::uint32_t word = masks.pruned(mask, step.spec.site_start + c) ? 0u : ~0u;
      std::uint32_t& kept = keep_[static_cast<std::size_t>(step.keep_begin + c)];
      changed |= kept != word;
      kept = word;
    }
    return changed;
  }

  // The keep words of `step`, or null if it prunes nothing.
  const std::uint32_t* keep(const Step& step) const {
    const std::uint32_t* words = keep_.data() + step.keep_begin;
    const bool all = std::all_of(words, words + step.channels, [](auto word) { return word != 0; });
    return all ? nullptr : words;
  }

  // Whether a buffer's values are not those of the current mask's predecessor.
  std::vector<char>& stale() { return stale_; }

 private:
  Floats floats_, scratch_;
  std::vector<float*> data_;
  std::vector<std::uint32_t> keep_;
  std::vector<char> stale_;
};

// NCHW to the channels-last layout of buffer 0.
void load_images(const float* images, std::int64_t count, const Buffer& buffer, float* data) {
  const std::int64_t pixels = buffer.shape.height * buffer.shape.width;
  for (std::int64_t n = 0; n < count; ++n) {
    for (std::int64_t c = 0; c < buffer.shape.channels; ++c) {
      const float* plane = images + (n * buffer.shape.channels + c) * pixels;
      float* image = data + n * buffer.image() + c;
      for (std::int64_t i = 0; i < pixels; ++i) image[buffer.interior[i]] = plane[i];
    }
  }
}

void run_step(const Step& step, const std::vector<Buffer>& buffers, const Worker& worker,
              std::int64_t images, const Kernels& kernels) {
  const StepSpec& spec = step.spec;
  const auto operand = [&](std::int64_t id) -> Operand {
    if (id < 0) return {nullptr, nullptr, 0};
    const Buffer& buffer = buffers[id];
    return {worker.data(static_cast<std::size_t>(id)), buffer.interior.data(), buffer.image()};
  };
  const Buffer& from = buffers[spec.input];
  StepArgs args{};
  args.images = images;
  args.pixels = static_cast<std::int64_t>(step.input_offset.size());
  args.channels = step.channels;
  args.input = operand(spec.input);
  args.input.offset = step.input_offset.data();
  args.weights = step.weights.data();
  args.segments = step.segments.data();
  args.segment_count = static_cast<std::int64_t>(step.segments.size());
  args.segment_length = step.segment_length;
  args.block_stride = step.block_stride;
  args.first_channel = step.first_channel.empty() ? nullptr : step.first_channel.data();
  args.windows = step.windows.data();
  args.row_stride = from.row();
  args.column_stride = from.stride;
  args.bias = step.bias.data();
  args.residual = operand(spec.residual);
  args.first = spec.first;
  args.plain = operand(spec.plain);
  args.scale = step.scale.data();
  args.shift = step.shift.data();
  args.second = spec.second;
  args.keep = spec.site_start >= 0 ? worker.keep(step) : nullptr;
  args.final = operand(spec.final);
  args.width = buffers[spec.final >= 0 ? spec.final : spec.plain].shape.width;
  args.scratch = worker.scratch();
  (kernels.*step.kernel)(args);
}

}  // namespace

std::int64_t MaskedForwardPlan::least_bytes(bool share) const {
  const Layout& layout = share ? program_->kept : program_->reused;
  return (layout.floats_per_image + program_->scratch_floats) *
         static_cast<std::int64_t>(sizeof(float));
}

void MaskedForwardPlan::run(const MaskedForwardRun& run) const {
  const Program& program = *program_;
  ONP_CHECK(run.threads >= 1, "masked_forward: threads must be positive, got ", run.threads);
  ONP_CHECK(run.masks.words_per_mask * 64 >= program.sites, "masked_forward: masks must have ",
            program.sites, " bits, got ", run.masks.words_per_mask, " words");
  const std::int64_t least = least_bytes(run.share);
  ONP_CHECK(least <= run.max_bytes, "masked_forward: max_bytes must be at least ", least, ", got ",
            run.max_bytes);
  const Kernels& kernels = kernels_for(run.isa);
  if (run.count == 0 || run.masks.batch == 0) return;

  const Layout& layout = run.share ? program.kept : program.reused;
  constexpr std::int64_t size = sizeof(float);
  const std::int64_t wanted = std::max(kBlockBytes, program.weight_bytes / kWeightsPerBlock);
  const std::int64_t allowed = std::min(wanted, run.max_bytes - size * program.scratch_floats);
  const std::int64_t most = std::max(allowed / (size * layout.floats_per_image), std::int64_t{1});
  const std::int64_t blocks = divide_up(run.count, std::min(most, run.count));
  const std::int64_t block = divide_up(run.count, blocks);
  // Masks are split between tasks only where the images alone do not keep the threads busy.
  const std::int64_t parts = run.threads == 1 ? 1 : divide_up(4 * run.threads, blocks);
  const std::int64_t chunk = divide_up(run.masks.batch, std::min(parts, run.masks.batch));
  const std::int64_t chunks = divide_up(run.masks.batch, chunk);

  std::vector<std::unique_ptr<Worker>> workers(static_cast<std::size_t>(run.threads));
  const Buffer& input = program.buffers[0];
  const std::int64_t image_floats =
      input.shape.channels * input.shape.height * input.shape.width;
  const Buffer& output = program.buffers[program.output];
  const std::int64_t classes = output.shape.channels;

  parallel_for(blocks * chunks, run.threads, [&](std::int64_t task, int thread) {
    std::unique_ptr<Worker>& slot = workers[static_cast<std::size_t>(thread)];
    if (!slot) {
      slot = std::make_unique<Worker>(program.buffers, layout, block, program.keep_words,
                                      program.scratch_floats);
    }
    Worker& worker = *slot;
    const std::int64_t first = task / chunks * block;
    const std::int64_t images = std::min(block, run.count - first);
    if (images <= 0) return;
    load_images(run.images + first * image_floats, images, input, worker.data(0));
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
        const bool moved = stale[spec.input] || (spec.residual >= 0 && stale[spec.residual]);
        if (moved || pruned) run_step(step, program.buffers, worker, images, kernels);
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

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* table : kernel_tables()) names.emplace_back(table->name);
  return names;
}

}  // namespace onp
