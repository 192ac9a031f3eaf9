#include "core/masked_forward_program.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/check.h"

namespace onp {
namespace {

constexpr std::int64_t kBlockBytes = 4 << 20;
constexpr std::int64_t kWeightsPerBlock = 2;

// The per-channel array padded with zeros, or nothing.
Floats padded(const float* values, std::int64_t channels) {
  if (!values) return {};
  Floats copy(round_up(channels, kChannelBlock));
  std::copy(values, values + channels, copy.data());
  return copy;
}

// Offsets of the window of each output pixel. A pool's windows are cut to the image.
void place_windows(Step& step, const Buffer& from, const BufferShape& to) {
  const StepSpec& spec = step.spec;
  if (spec.kind == StepKind::pick) {  // a pool of windows of one pixel; the halo is zero
    for (const std::int64_t pixel : spec.index) {
      step.input_offset.push_back(pixel < 0 ? static_cast<std::int32_t>(from.offset(-1, -1))
                                            : from.interior[static_cast<std::size_t>(pixel)]);
      step.windows.push_back({1, 1, 1.0f});
    }
    return;
  }
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
      const auto padded_rows =
          std::min(spec.kernel_height, from.shape.height + spec.pad_height - top);
      const auto padded_columns =
          std::min(spec.kernel_width, from.shape.width + spec.pad_width - left);
      const auto divisor = spec.count_include_pad ? padded_rows * padded_columns : rows * columns;
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

// The segments of a convolution that reads, of a pixel, `count` times `together` channels.
void place_segments(Step& step, const Buffer& from, std::int64_t count, std::int64_t together) {
  const StepSpec& spec = step.spec;
  // Without gaps between pixels a whole kernel row is one segment.
  const bool rows = count * together == from.stride;
  step.segment_length = rows ? spec.kernel_width * count : count;
  for (std::int64_t y = 0; y < spec.kernel_height; ++y) {
    for (std::int64_t x = 0; x < (rows ? 1 : spec.kernel_width); ++x) {
      step.segments.push_back(static_cast<std::int32_t>(y * from.row() + x * from.stride));
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
  place_segments(step, from, span, 1);
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

// Weights times the inputs' values per level, in 127 levels either way per output channel.
void pack_byte_convolution(Step& step, const Buffer& from) {
  const StepSpec& spec = step.spec;
  const std::int64_t inputs = from.shape.channels;
  const std::int64_t taps = spec.kernel_height * spec.kernel_width;
  const std::int64_t quads = divide_up(inputs, kQuad);
  place_segments(step, from, quads, kQuad);
  step.kernel = &Kernels::byte_convolution;
  const std::int64_t channels = round_up(step.channels, kChannelBlock);
  step.block_stride = taps * quads * kChannelBlock * kQuad;
  step.byte_weights.resize(static_cast<std::size_t>(channels / kChannelBlock * step.block_stride));
  step.unit = Floats(channels);
  if (!step.bias) step.bias = Floats(channels);
  std::vector<double> row(static_cast<std::size_t>(inputs * taps));
  for (std::int64_t o = 0; o < step.channels; ++o) {
    double most = 0;
    for (std::int64_t i = 0; i < inputs * taps; ++i) {
      row[i] = static_cast<double>(spec.weight[o * inputs * taps + i]) / from.levels[i / taps];
      most = std::max(most, std::abs(row[i]));
    }
    const double unit = most > 0 ? most / 127 : 1;
    std::int8_t* packed = step.byte_weights.data() + o / kChannelBlock * step.block_stride +
                          o % kChannelBlock * kQuad;
    double sum = 0;
    for (std::int64_t i = 0; i < inputs; ++i) {
      for (std::int64_t tap = 0; tap < taps; ++tap) {
        const auto weight = static_cast<std::int8_t>(std::lround(row[i * taps + tap] / unit));
        packed[(tap * quads + i / kQuad) * kChannelBlock * kQuad + i % kQuad] = weight;
        sum += weight;
      }
    }
    step.unit[o] = static_cast<float>(unit);
    step.bias[o] -= static_cast<float>(from.zero * unit * sum);
  }
}

// The nearest bf16, the even one of two.
std::uint16_t half_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void pack_half_convolution(Step& step, const Buffer& from) {
  const StepSpec& spec = step.spec;
  const std::int64_t inputs = from.shape.channels;
  const std::int64_t taps = spec.kernel_height * spec.kernel_width;
  const std::int64_t pairs = divide_up(inputs, kPair);
  place_segments(step, from, pairs, kPair);
  step.kernel = &Kernels::half_convolution;
  step.block_stride = taps * pairs * kChannelBlock * kPair;
  const std::int64_t blocks = divide_up(step.channels, kChannelBlock);
  step.half_weights.resize(static_cast<std::size_t>(blocks * step.block_stride));
  for (std::int64_t o = 0; o < step.channels; ++o) {
    std::uint16_t* packed = step.half_weights.data() + o / kChannelBlock * step.block_stride +
                            o % kChannelBlock * kPair;
    for (std::int64_t i = 0; i < inputs; ++i) {
      for (std::int64_t tap = 0; tap < taps; ++tap) {
        packed[(tap * pairs + i / kPair) * kChannelBlock * kPair + i % kPair] =
            half_of(spec.weight[(o * inputs + i) * taps + tap]);
      }
    }
  }
}

// Per pair of channels.
std::int64_t winograd_products(int size, int stride, const BufferShape& to) {
  return winograd_points(size, stride) * divide_up(to.height, size) * divide_up(to.width, size);
}

// The tiles of a convolution that goes by Winograd, 1: of one that does not. Few inputs lose more
// to the transforms than they save; few outputs (the images, backwards) do not. Larger tiles save
// products but where much of them lies outside the map; what they save has to pay for transforms.
int winograd_size(const StepSpec& spec, std::int64_t inputs, const BufferShape& to) {
  const std::int64_t stride = spec.stride_height;
  if (spec.kind != StepKind::convolution || spec.kernel_height != 3 || spec.kernel_width != 3 ||
      stride > 2 || spec.stride_width != stride || spec.groups != 1 || inputs < kChannelBlock) {
    return 1;
  }
  const auto products = [&](int size) {
    return static_cast<double>(winograd_products(size, static_cast<int>(stride), to));
  };
  const int size = products(4) <= 0.85 * products(2) ? 4 : 2;
  return products(size) <= 0.75 * 9 * static_cast<double>(pixels_of(to)) ? size : 1;
}

// Rows of G for tiles of 2 and 4, and of stride 2: transformed kernels are G g G^T.
constexpr double kSmallTile[][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
constexpr double kLargeTile[][3] = {{1. / 4, 0, 0},
                                    {-1. / 6, -1. / 6, -1. / 6},
                                    {-1. / 6, 1. / 6, -1. / 6},
                                    {1. / 24, 1. / 12, 1. / 6},
                                    {1. / 24, -1. / 12, 1. / 6},
                                    {0, 0, 1}};
constexpr double kSmallStrided[][3] = {{-1, 0, 0}, {1, 0, 1}, {0, 0, 1}, {0, 1, 0}};
constexpr double kLargeStrided[][3] = {
    {1. / 2, 0, 0}, {-1. / 2, 0, -1. / 2}, {-1. / 6, 0, 1. / 6}, {1. / 6, 0, 1. / 3}, {0, 0, 1},
    {0, 1, 0}};

void pack_winograd(Step& step, const Buffer& from, int size) {
  const std::int64_t inputs = from.shape.channels;
  const bool small = size == 2, strided = step.spec.stride_height == 2;
  const double(*rows)[3] = strided ? small ? kSmallStrided : kLargeStrided
                           : small ? kSmallTile
                                   : kLargeTile;
  const std::int64_t side = size + 2, points = winograd_kernels(size);
  step.kernel = strided ? small ? &Kernels::strided_winograd2 : &Kernels::strided_winograd4
                : small ? &Kernels::winograd2
                        : &Kernels::winograd4;
  step.segment_length = inputs;
  step.block_stride = points * inputs * kChannelBlock;
  step.weights = Floats(divide_up(step.channels, kChannelBlock) * step.block_stride);
  for (std::int64_t o = 0; o < step.channels; ++o) {
    float* packed = step.weights.data() + o / kChannelBlock * step.block_stride + o % kChannelBlock;
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
      if (__builtin_cpu_supports("avx512vnni")) {
        if (__builtin_cpu_supports("avx512bf16")) found.push_back(&kAvx512Bf16Kernels);
        found.push_back(&kAvx512VnniKernels);
      }
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

// Of everything but convolutions.
auto kernel_of(StepKind kind) -> void (*Kernels::*)(const StepArgs&) {
  switch (kind) {
    case StepKind::average_pool:
      return &Kernels::average_pool;
    case StepKind::concatenation:
      return &Kernels::concatenation;
    case StepKind::layer_norm:
      return &Kernels::layer_norm;
    case StepKind::attention:
      return &Kernels::attention;
    case StepKind::product:
      return &Kernels::product;
    case StepKind::group_norm:
      return &Kernels::group_norm;
    default:
      return &Kernels::max_pool;
  }
}

// Bytes reach this far beyond the ranges: pruning moves values, and what is cut off errs more than
// what is rounded a little coarser.
constexpr float kRoom = 1.5f;
// Of the widest channel's range, so that channels that were silent have some room too.
constexpr float kLeastShare = 1.0f / 8;

// Appends a buffer of bytes to what a step's `final` writes, has a range and is read by a
// convolution that suits bytes. The id of each buffer's bytes, -1: none.
std::vector<std::int64_t> add_bytes(std::vector<Buffer>& buffers,
                                    const std::vector<StepSpec>& specs,
                                    const std::vector<RangeSpec>& ranges) {
  const std::size_t given = buffers.size();
  std::vector<std::int64_t> bytes_of(given, -1);
  std::vector<bool> ranged(given, false);
  for (const RangeSpec& range : ranges) {
    ONP_CHECK(range.buffer >= 0 && range.buffer < static_cast<std::int64_t>(given) &&
                  !ranged[range.buffer],
              "masked_forward: a range must be of a buffer, and one for each, got ", range.buffer);
    ranged[range.buffer] = true;
    const BufferShape shape = buffers[range.buffer].shape;
    ONP_CHECK(static_cast<std::int64_t>(range.highest.size()) == shape.channels,
              "masked_forward: a range must have ", shape.channels, " channels, got ",
              range.highest.size());
    bool written = false, read = false;
    for (const StepSpec& spec : specs) {
      const std::int64_t to = written_buffer(spec);
      written |= spec.final == range.buffer;
      read |= spec.input == range.buffer && suits_bytes(spec, shape, buffers[to].shape);
    }
    if (!written || !read) continue;
    Buffer bytes;
    bytes.shape = shape;
    bytes.stride = round_up(shape.channels, kChannelBlock);
    bytes.number = Number::bytes;
    bytes.zero = range.lowest < 0 ? 128 : 0;
    bytes.levels = Floats(bytes.stride);
    const float most = *std::max_element(range.highest.begin(), range.highest.end());
    ONP_CHECK(std::isfinite(most) && std::isfinite(range.lowest),
              "masked_forward: a range must be finite, got one of buffer ", range.buffer);
    const float span = range.lowest < 0 ? 127.0f : 255.0f, floor = most > 0 ? most : 1.0f;
    for (std::int64_t c = 0; c < shape.channels; ++c) {
      bytes.levels[c] = span / (kRoom * std::max(range.highest[c], kLeastShare * floor));
    }
    bytes_of[range.buffer] = static_cast<std::int64_t>(buffers.size());
    buffers.push_back(std::move(bytes));
  }
  return bytes_of;
}

// Appends a copy in bf16 of every buffer that a step's `final` writes and a convolution reads that
// suits halves. The id of each buffer's copy, -1: none.
std::vector<std::int64_t> add_halves(std::vector<Buffer>& buffers,
                                     const std::vector<StepSpec>& specs) {
  std::vector<std::int64_t> halves_of(buffers.size(), -1);
  std::vector<bool> written(buffers.size(), false);
  for (const StepSpec& spec : specs) {
    if (spec.final >= 0) written[spec.final] = true;
  }
  for (const StepSpec& spec : specs) {
    const BufferShape shape = buffers[spec.input].shape;
    const BufferShape to = buffers[written_buffer(spec)].shape;
    if (!written[spec.input] || halves_of[spec.input] >= 0 || !suits_halves(spec, shape, to)) {
      continue;
    }
    Buffer halves;
    halves.shape = shape;
    halves.stride = round_up(shape.channels, kChannelBlock);
    halves.number = Number::halves;
    halves_of[spec.input] = static_cast<std::int64_t>(buffers.size());
    buffers.push_back(std::move(halves));
  }
  return halves_of;
}

// Everything that a step reads: its constants too.
std::vector<std::int64_t> all_reads(const StepSpec& spec) {
  std::vector<std::int64_t> reads = spec.operands();
  if (spec.residual >= 0) reads.push_back(spec.residual);
  return reads;
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

std::int64_t halo_of(const StepSpec& spec, const BufferShape& from, const BufferShape& to,
                     Number number) {
  if (spec.kind == StepKind::pick) {
    return std::count(spec.index.begin(), spec.index.end(), -1) > 0 ? 1 : 0;
  }
  if (spec.kind != StepKind::convolution) return 0;
  // Winograd tiles that reach past the outputs read further.
  const bool floats = number == Number::floats;
  const std::int64_t tile = floats ? winograd_size(spec, from.channels, to) : 1;
  const auto beyond = [&](std::int64_t size, std::int64_t outputs, std::int64_t kernel,
                          std::int64_t stride, std::int64_t pad) {
    const std::int64_t end = (round_up(outputs, tile) - 1) * stride - pad + kernel;
    return std::max({std::int64_t{0}, pad, end - size});
  };
  return std::max(
      beyond(from.height, to.height, spec.kernel_height, spec.stride_height, spec.pad_height),
      beyond(from.width, to.width, spec.kernel_width, spec.stride_width, spec.pad_width));
}

std::int64_t scratch_of(const StepSpec& spec, const BufferShape& from, const BufferShape& to,
                        std::int64_t keys, Number number) {
  if (spec.kind == StepKind::concatenation) return round_up(to.channels, kChannelBlock);
  if (spec.kind == StepKind::group_norm) return group_scratch(2, to.channels);
  if (spec.kind == StepKind::attention) {
    return attention_scratch(pixels_of(to), keys, to.channels / spec.heads, to.channels);
  }
  const int tile = winograd_size(spec, from.channels, to);
  if (tile == 1 || number != Number::floats) return 0;
  return winograd_scratch(tile, static_cast<int>(spec.stride_height),
                          round_up(from.channels, kChannelBlock),
                          round_up(to.channels, kChannelBlock));
}

bool suits_bytes(const StepSpec& spec, const BufferShape& from, const BufferShape& to) {
  constexpr std::int64_t kMostProducts = std::numeric_limits<std::int32_t>::max() / (255 * 127);
  const std::int64_t taps = spec.kernel_height * spec.kernel_width;
  return spec.kind == StepKind::convolution && spec.groups == 1 && from.channels >= kChannelBlock &&
         pixels_of(to) > 1 && round_up(from.channels, kQuad) * taps <= kMostProducts;
}

bool suits_halves(const StepSpec& spec, const BufferShape& from, const BufferShape& to) {
  return spec.kind == StepKind::convolution && spec.groups == 1 && from.channels >= kChannelBlock &&
         pixels_of(to) > 1 &&
         (spec.stride_height == 2 || winograd_size(spec, from.channels, to) < 4);
}

Step pack_step(const StepSpec& spec, const Buffer& from, const BufferShape& to) {
  Step step;
  step.spec = spec;
  step.channels = to.channels;
  step.width = to.width;
  if (is_windowed(spec.kind) || spec.kind == StepKind::pick) {
    place_windows(step, from, to);
  } else {
    step.input_offset = from.interior;
  }
  step.bias = padded(spec.bias, to.channels);
  if (spec.kind != StepKind::convolution) {
    step.kernel = kernel_of(spec.kind);
  } else if (from.number == Number::bytes) {
    pack_byte_convolution(step, from);
  } else if (from.number == Number::halves) {
    pack_half_convolution(step, from);
  } else if (is_depthwise(spec, from.shape, to)) {
    pack_depthwise(step, from);
  } else if (const int tile = winograd_size(spec, from.shape.channels, to); tile > 1) {
    pack_winograd(step, from, tile);
  } else {
    pack_convolution(step, from);
  }
  step.scale = padded(spec.scale, to.channels);
  step.shift = padded(spec.shift, to.channels);
  step.spec.weight = step.spec.bias = step.spec.scale = step.spec.shift = nullptr;
  return step;
}

bool Step::reads_floats(std::int64_t buffer) const {
  const auto& others = spec.others;
  return (spec.input == buffer && input_narrow < 0) || spec.residual == buffer ||
         std::find(others.begin(), others.end(), buffer) != others.end();
}

StepArgs Step::args(const Buffer& from, float* input, std::int64_t images) const {
  StepArgs args{};
  args.images = images;
  args.pixels = static_cast<std::int64_t>(input_offset.size());
  args.channels = channels;
  if (from.number == Number::floats) args.input = {input, input_offset.data(), from.image()};
  args.input_bytes = from.bytes_at(input);
  args.input_halves = from.halves_at(input);
  args.input_bytes.offset = args.input_halves.offset = input_offset.data();
  args.byte_weights = byte_weights.data();
  args.half_weights = half_weights.data();
  args.unit = unit.data();
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
  args.index = index.data();
  args.other_count = static_cast<std::int64_t>(spec.others.size());
  args.heads = spec.heads;
  args.keys = keys;
  args.value = spec.value;
  return args;
}

Network plan_network(const std::vector<BufferShape>& shapes, const std::vector<StepSpec>& specs,
                     const std::vector<ConstantSpec>& constants, std::int64_t output,
                     std::int64_t sites, const std::vector<RangeSpec>& ranges, bool halves) {
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
    buffer.stride =
        network.buffers.empty() ? shape.channels : round_up(shape.channels, kChannelBlock);
    network.buffers.push_back(std::move(buffer));
  }
  std::vector<bool> constant(shapes.size(), false);
  for (const ConstantSpec& one : constants) {
    ONP_CHECK(one.buffer > 0 && one.buffer < static_cast<std::int64_t>(shapes.size()) &&
                  !written[one.buffer],
              "masked_forward: a constant must be a buffer of its own, got ", one.buffer);
    ONP_CHECK(one.values, "masked_forward: a constant must have values");
    written[one.buffer] = constant[one.buffer] = true;
  }
  for (const StepSpec& spec : specs) check_step(spec, shapes);
  ONP_CHECK(!halves || ranges.empty(), "masked_forward: ranges are of bytes, not of halves");
  const std::vector<std::int64_t> narrow_of =
      halves ? add_halves(network.buffers, specs) : add_bytes(network.buffers, specs, ranges);
  const auto suits = halves ? suits_halves : suits_bytes;
  const auto read_by = [&](const StepSpec& spec) {
    const std::int64_t narrow = narrow_of[spec.input];
    const bool fits = narrow >= 0 && suits(spec, shapes[spec.input], shapes[written_buffer(spec)]);
    return fits ? narrow : spec.input;
  };
  for (const StepSpec& spec : specs) {
    for (const std::int64_t id : all_reads(spec)) {
      ONP_CHECK(written[id], "masked_forward: buffer ", id, " must be written before it is read");
    }
    const auto varies = [&](std::int64_t id) { return !constant[id]; };
    ONP_CHECK(varies(spec.input) && std::all_of(spec.others.begin(), spec.others.end(), varies),
              "masked_forward: a constant must be a residual, got a step that reads ", spec.input);
    for (const std::int64_t id : {spec.plain, spec.final}) {
      if (id < 0) continue;
      ONP_CHECK(!written[id], "masked_forward: buffer ", id, " must be written once");
      written[id] = true;
    }
    const BufferShape to = shapes[written_buffer(spec)];
    ONP_CHECK(spec.site_start < 0 || spec.site_start + to.channels <= sites,
              "masked_forward: a step's sites must lie in [0, ", sites, "), got ", spec.site_start,
              " and ", to.channels, " channels");
    Buffer& from = network.buffers[read_by(spec)];
    from.halo = std::max(from.halo, halo_of(spec, from.shape, to, from.number));
    const bool attends = spec.kind == StepKind::attention;
    const std::int64_t keys = attends ? pixels_of(shapes[spec.others[0]]) : 0;
    network.scratch_floats =
        std::max(network.scratch_floats, scratch_of(spec, from.shape, to, keys, from.number));
  }
  ONP_CHECK(output > 0 && written[output] && !constant[output],
            "masked_forward: output must be written by a step");
  for (Buffer& buffer : network.buffers) buffer.place_pixels();
  for (const StepSpec& spec : specs) {
    const BufferShape to = shapes[written_buffer(spec)];
    network.steps.push_back(pack_step(spec, network.buffers[read_by(spec)], to));
    Step& step = network.steps.back();
    if (read_by(spec) != spec.input) step.input_narrow = read_by(spec);
    if (spec.final >= 0) step.final_narrow = narrow_of[spec.final];
    for (const std::int64_t id : all_reads(spec)) {
      if (!constant[id]) step.reads.push_back(id);
    }
    if (spec.kind == StepKind::attention) {
      step.index.assign(spec.index.begin(), spec.index.end());
      step.keys = pixels_of(shapes[spec.others[0]]);
    } else if (spec.kind == StepKind::product) {
      step.keys = pixels_of(shapes[spec.others[0]]);
    } else if (spec.kind == StepKind::concatenation) {
      step.index.push_back(static_cast<std::int32_t>(shapes[spec.input].channels));
      for (const std::int64_t id : spec.others) {
        step.index.push_back(static_cast<std::int32_t>(shapes[id].channels));
      }
    }
    network.weight_bytes +=
        step.weights.bytes() +
        static_cast<std::int64_t>(step.byte_weights.size() +
                                  step.half_weights.size() * sizeof(std::uint16_t));
  }
  for (Step& step : network.steps) {
    if (step.final_narrow < 0 || step.spec.final == output) continue;
    step.final_floats = std::any_of(network.steps.begin(), network.steps.end(),
                                    [&](const Step& s) { return s.reads_floats(step.spec.final); });
  }
  network.constants.resize(network.buffers.size());
  for (const ConstantSpec& one : constants) {
    const Buffer& buffer = network.buffers[one.buffer];
    network.constants[one.buffer] = Floats(buffer.image() + kChannelBlock);
    load_images(one.values, 1, buffer, network.constants[one.buffer].data());
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
  floats_per_image += buffer.image_floats();
  return begin.size() - 1;
}

void Slots::release(const Buffer& buffer, std::size_t slot) { free_[key(buffer)].push_back(slot); }

std::int64_t block_bytes(std::int64_t weight_bytes) {
  return std::max(kBlockBytes, weight_bytes / kWeightsPerBlock);
}

const Kernels& kernels_for(const std::string& isa) {
  for (const Kernels* table : kernel_tables()) {
    if (isa == "auto" || isa == table->name) return *table;
  }
  throw Error(concat("isa must be auto or a set that this processor runs, got ", isa));
}

void clear_halo(const Buffer& buffer, std::int64_t images, float* data) {
  if (buffer.number != Number::floats) {
    std::memset(data, buffer.zero,
                static_cast<std::size_t>(images * buffer.image_floats()) * sizeof(float));
    return;
  }
  const std::int64_t row = buffer.row(), side = buffer.halo * buffer.stride;
  for (std::int64_t n = 0; n < images && buffer.halo > 0; ++n) {
    float* image = data + n * buffer.image();
    std::fill_n(image, buffer.halo * row + side, 0.0f);
    for (std::int64_t y = 0; y < buffer.shape.height; ++y) {
      float* end = image + (buffer.halo + y + 1) * row - side;
      const bool last = y + 1 == buffer.shape.height;
      std::fill(end, last ? image + buffer.image() : end + 2 * side, 0.0f);
    }
  }
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
