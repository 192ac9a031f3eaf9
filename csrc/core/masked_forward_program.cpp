#include "core/masked_forward_program.h"

#include <algorithm>
#include <limits>

#include "core/check.h"

namespace onp {
namespace {

constexpr std::int64_t kBlockBytes = 4 << 20;
constexpr std::int64_t kWeightsPerBlock = 8;

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

// Larger tiles save more products, but their weights take more memory: they suit maps that have
// several of them, without parts.
int winograd_size(const BufferShape& to) {
  const bool large = to.height >= 8 && to.width >= 8;
  return large && to.height % 4 == 0 && to.width % 4 == 0 ? 4 : 2;
}

// Rows of G for tiles of 2 and 4: transformed kernels are G g G^T.
constexpr double kSmallTile[][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
constexpr double kLargeTile[][3] = {{1. / 4, 0, 0},
                                    {-1. / 6, -1. / 6, -1. / 6},
                                    {-1. / 6, 1. / 6, -1. / 6},
                                    {1. / 24, 1. / 12, 1. / 6},
                                    {1. / 24, -1. / 12, 1. / 6},
                                    {0, 0, 1}};

void pack_winograd(Step& step, const Buffer& from, int size) {
  const std::int64_t inputs = from.shape.channels;
  const double(*rows)[3] = size == 2 ? kSmallTile : kLargeTile;
  const std::int64_t side = size + 2, points = winograd_points(size);
  step.kernel = size == 2 ? &Kernels::winograd2 : &Kernels::winograd4;
  step.segment_length = inputs;
  step.block_stride = points * inputs * kChannelBlock;
  step.weights = Floats(divide_up(step.channels, kChannelBlock) * step.block_stride);
  for (std::int64_t o = 0; o < step.channels; ++o) {
    float* packed =
        step.weights.data() + o / kChannelBlock * step.block_stride + o % kChannelBlock;
    for (std::int64_t i = 0; i < inputs; ++i) {
      const float* kernel = step.spec.weight + (o * inputs + i) * 9;
      for (std::int64_t point = 0; point < points; ++point) {
        const double* down = rows[point / side];
        const double* across = rows[point % side];
        double sum = 0;
        for (int tap = 0; tap < 9; ++tap) sum += down[tap / 3] * kernel[tap] * across[tap % 3];
        packed[(point * inputs + i) * kChannelBlock] = static_cast<float>(sum);
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

bool is_depthwise(const StepSpec& spec, const BufferShape& from, const BufferShape& to) {
  return spec.groups > 1 && spec.groups == from.channels && spec.groups == to.channels;
}

}  // namespace

void Buffer::place_pixels() {
  ONP_CHECK(image() <= std::numeric_limits<std::int32_t>::max(),
            "masked_forward: one image of a buffer must have fewer than 2^31 values, got ",
            image());
  interior.clear();
  for (std::int64_t y = 0; y < shape.height; ++y) {
    for (std::int64_t x = 0; x < shape.width; ++x) {
      interior.push_back(static_cast<std::int32_t>(offset(y, x)));
    }
  }
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

std::int64_t halo_of(const StepSpec& spec, const BufferShape& from, const BufferShape& to) {
  if (spec.kind != StepKind::convolution) return 0;
  // A Winograd tile at the end of an odd size reads one pixel further.
  const bool tiles = suits_winograd(spec, from.channels, to.channels);
  const auto beyond = [&](std::int64_t size, std::int64_t outputs, std::int64_t kernel,
                          std::int64_t stride, std::int64_t pad) {
    const std::int64_t odd = tiles && outputs % 2 ? 1 : 0;
    const std::int64_t end = (outputs - 1) * stride - pad + kernel + odd;
    return std::max({std::int64_t{0}, pad, end - size});
  };
  return std::max(
      beyond(from.height, to.height, spec.kernel_height, spec.stride_height, spec.pad_height),
      beyond(from.width, to.width, spec.kernel_width, spec.stride_width, spec.pad_width));
}

std::int64_t scratch_of(const StepSpec& spec, const BufferShape& from, const BufferShape& to) {
  if (spec.kind != StepKind::convolution || !suits_winograd(spec, from.channels, to.channels)) {
    return 0;
  }
  return winograd_scratch(winograd_size(to), round_up(from.channels, kChannelBlock),
                          round_up(to.channels, kChannelBlock));
}

Step pack_step(const StepSpec& spec, const Buffer& from, const BufferShape& to) {
  Step step;
  step.spec = spec;
  step.channels = to.channels;
  step.width = to.width;
  place_windows(step, from, to);
  if (spec.kind != StepKind::convolution) {
    const bool most = spec.kind == StepKind::max_pool;
    step.kernel = most ? &Kernels::max_pool : &Kernels::average_pool;
  } else if (is_depthwise(spec, from.shape, to)) {
    pack_depthwise(step, from);
  } else if (suits_winograd(spec, from.shape.channels, to.channels)) {
    pack_winograd(step, from, winograd_size(to));
  } else {
    pack_convolution(step, from);
  }
  step.bias = padded(spec.bias, to.channels);
  step.scale = padded(spec.scale, to.channels);
  step.shift = padded(spec.shift, to.channels);
  step.spec.weight = step.spec.bias = step.spec.scale = step.spec.shift = nullptr;
  return step;
}

StepArgs Step::args(const Buffer& from, float* input, std::int64_t images) const {
  StepArgs args{};
  args.images = images;
  args.pixels = static_cast<std::int64_t>(input_offset.size());
  args.channels = channels;
  args.input = {input, input_offset.data(), from.image()};
  args.weights = weights.data();
  args.segments = segments.data();
  args.segment_count = static_cast<std::int64_t>(segments.size());
  args.segment_length = segment_length;
  args.block_stride = block_stride;
  args.first_channel = first_channel.empty() ? nullptr : first_channel.data();
  args.windows = windows.data();
  args.row_stride = from.row();
  args.column_stride = from.stride;
  args.bias = bias.data();
  args.width = width;
  return args;
}

Network plan_network(const std::vector<BufferShape>& shapes, const std::vector<StepSpec>& specs,
                     std::int64_t output, std::int64_t sites) {
  Network network;
  ONP_CHECK(output >= 0 && output < static_cast<std::int64_t>(shapes.size()),
            "masked_forward: output must be a buffer, got ", output);
  ONP_CHECK(shapes[output].height == 1 && shapes[output].width == 1,
            "masked_forward: output must be one pixel, got [", shapes[output].height, ", ",
            shapes[output].width, "]");
  std::vector<bool> written(shapes.size(), false);
  written[0] = true;
  network.output = static_cast<std::size_t>(output);
  network.sites = sites;
  for (const BufferShape& shape : shapes) {
    ONP_CHECK(shape.channels > 0 && shape.height > 0 && shape.width > 0,
              "masked_forward: a buffer must hold at least one value, got [", shape.channels, ", ",
              shape.height, ", ", shape.width, "]");
    Buffer buffer;
    buffer.shape = shape;
    // Kernels write whole vectors; the images are written channel by channel.
    buffer.stride = network.buffers.empty() ? shape.channels
                                             : round_up(shape.channels, kChannelBlock);
    network.buffers.push_back(std::move(buffer));
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
    const BufferShape to = shapes[written_buffer(spec)];
    ONP_CHECK(spec.site_start < 0 || spec.site_start + to.channels <= sites,
              "masked_forward: a step's sites must lie in [0, ", sites, "), got ", spec.site_start,
              " and ", to.channels, " channels");
    Buffer& from = network.buffers[spec.input];
    from.halo = std::max(from.halo, halo_of(spec, from.shape, to));
    network.scratch_floats = std::max(network.scratch_floats, scratch_of(spec, from.shape, to));
  }
  ONP_CHECK(written[output], "masked_forward: output must be written by a step");
  for (Buffer& buffer : network.buffers) buffer.place_pixels();
  for (const StepSpec& spec : specs) {
    const BufferShape to = shapes[written_buffer(spec)];
    network.steps.push_back(pack_step(spec, network.buffers[spec.input], to));
    network.weight_bytes += network.steps.back().weights.bytes();
  }
  return network;
}

std::size_t Slots::claim(const Buffer& buffer) {
  std::vector<std::size_t>& free = free_[key(buffer)];
  if (!free.empty()) {
    const std::size_t slot = free.back();
    free.pop_back();
    return slot;
  }
  begin.push_back(floats_per_image);
  floats_per_image += buffer.image();
  return begin.size() - 1;
}

void Slots::release(const Buffer& buffer, std::size_t slot) {
  free_[key(buffer)].push_back(slot);
}

std::int64_t block_bytes(std::int64_t weight_bytes) {
  return std::max(kBlockBytes, weight_bytes / kWeightsPerBlock);
}

const Kernels& kernels_for(const std::string& isa) {
  for (const Kernels* table : kernel_tables()) {
    if (isa == "auto" || isa == table->name) return *table;
  }
  throw Error(concat("masked_forward: isa must be auto or a set that this processor runs, got ",
                     isa));
}

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

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* table : kernel_tables()) names.emplace_back(table->name);
  return names;
}

}  // namespace onp
