// What a step must be to fit its buffers.
#include "core/check.h"
#include "core/masked_forward_program.h"

namespace onp {
namespace {

std::int64_t output_size(std::int64_t size, std::int64_t kernel, std::int64_t stride,
                         std::int64_t pad) {
  return (size + 2 * pad - kernel) / stride + 1;
}

// Where a window's outputs lie.
void check_windows(const StepSpec& spec, const BufferShape& from, const BufferShape& to) {
  ONP_CHECK(spec.kernel_height > 0 && spec.kernel_width > 0 && spec.stride_height > 0 &&
                spec.stride_width > 0 && spec.pad_height >= 0 && spec.pad_width >= 0,
            "masked_forward: kernel and stride must be positive and padding not negative");
  const std::int64_t height =
      output_size(from.height, spec.kernel_height, spec.stride_height, spec.pad_height);
  const std::int64_t width =
      output_size(from.width, spec.kernel_width, spec.stride_width, spec.pad_width);
  // A pool may round its size up, if its last windows begin inside the image.
  const bool pools = spec.kind != StepKind::convolution;
  const auto fits = [&](std::int64_t floor, std::int64_t size, std::int64_t stride,
                        std::int64_t pad, std::int64_t given) {
    return given == floor || (pools && given == floor + 1 && floor * stride - pad < size);
  };
  ONP_CHECK(from.height + 2 * spec.pad_height >= spec.kernel_height &&
                from.width + 2 * spec.pad_width >= spec.kernel_width &&
                fits(height, from.height, spec.stride_height, spec.pad_height, to.height) &&
                fits(width, from.width, spec.stride_width, spec.pad_width, to.width),
            "masked_forward: final must be [", height, ", ", width, "] pixels, got [", to.height,
            ", ", to.width, "]");
  if (spec.kind == StepKind::convolution) {
    ONP_CHECK(spec.weight, "masked_forward: weight must be given for a convolution");
    ONP_CHECK(spec.groups > 0 && from.channels % spec.groups == 0 && to.channels % spec.groups == 0,
              "masked_forward: groups must divide the channels, got ", spec.groups);
    return;
  }
  ONP_CHECK(from.channels == to.channels, "masked_forward: pooling must keep the channels, got ",
            from.channels, " and ", to.channels);
  ONP_CHECK(2 * spec.pad_height <= spec.kernel_height && 2 * spec.pad_width <= spec.kernel_width,
            "masked_forward: a pool's padding must be at most half its kernel");
}

void check_attention(const StepSpec& spec, const std::vector<BufferShape>& buffers,
                     const BufferShape& to) {
  ONP_CHECK(spec.others.size() == 2, "masked_forward: attention must read keys and values, got ",
            spec.others.size());
  ONP_CHECK(spec.heads > 0 && to.channels % spec.heads == 0,
            "masked_forward: heads must divide the channels, got ", spec.heads);
  ONP_CHECK(static_cast<std::int64_t>(spec.index.size()) == 3 * to.channels,
            "masked_forward: index must hold ", 3 * to.channels, " channels, got ",
            spec.index.size());
  const std::int64_t inputs[] = {spec.input, spec.others[0], spec.others[1]};
  ONP_CHECK(pixels_of(buffers[inputs[0]]) == pixels_of(to) &&
                pixels_of(buffers[inputs[1]]) == pixels_of(buffers[inputs[2]]),
            "masked_forward: attention must have a query for each output and a value for each key");
  for (std::size_t i = 0; i < spec.index.size(); ++i) {
    const std::int64_t part = static_cast<std::int64_t>(i) / to.channels;
    ONP_CHECK(spec.index[i] >= 0 && spec.index[i] < buffers[inputs[part]].channels,
              "masked_forward: index must hold channels of what it reads, got ", spec.index[i]);
  }
}

void check_product(const StepSpec& spec, const std::vector<BufferShape>& buffers,
                   const BufferShape& to) {
  ONP_CHECK(spec.others.size() == 1, "masked_forward: a product must read one other buffer, got ",
            spec.others.size());
  const BufferShape other = buffers[spec.others[0]];
  const bool same = other.height == to.height && other.width == to.width;
  ONP_CHECK(other.channels == to.channels && (same || pixels_of(other) == 1),
            "masked_forward: a product's other buffer must have the shape of final or one pixel, ",
            "got [", other.channels, ", ", other.height, ", ", other.width, "]");
}

// Of the kinds that look at whole pixels.
void check_pixels(const StepSpec& spec, const std::vector<BufferShape>& buffers,
                  const BufferShape& from, const BufferShape& to) {
  if (spec.kind == StepKind::attention) return check_attention(spec, buffers, to);
  std::int64_t channels = from.channels;
  if (spec.kind == StepKind::concatenation) {
    for (const std::int64_t id : spec.others) {
      channels += buffers[id].channels;
      ONP_CHECK(buffers[id].height == to.height && buffers[id].width == to.width,
                "masked_forward: what is concatenated must have the pixels of final, got [",
                buffers[id].height, ", ", buffers[id].width, "]");
    }
  }
  ONP_CHECK(channels == to.channels, "masked_forward: final must have ", channels,
            " channels, got ", to.channels);
  if (spec.kind == StepKind::product) check_product(spec, buffers, to);
  ONP_CHECK(spec.kind != StepKind::group_norm || (spec.heads > 0 && channels % spec.heads == 0),
            "masked_forward: groups must divide the channels, got ", spec.heads);
  if (spec.kind != StepKind::pick) {
    ONP_CHECK(from.height == to.height && from.width == to.width, "masked_forward: final must be [",
              from.height, ", ", from.width, "] pixels, got [", to.height, ", ", to.width, "]");
    return;
  }
  ONP_CHECK(static_cast<std::int64_t>(spec.index.size()) == pixels_of(to),
            "masked_forward: index must hold ", pixels_of(to), " pixels, got ", spec.index.size());
  for (const std::int64_t pixel : spec.index) {
    ONP_CHECK(pixel >= -1 && pixel < pixels_of(from),
              "masked_forward: index must hold pixels of the input or -1, got ", pixel);
  }
}

}  // namespace

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
    ONP_CHECK(other.channels == to.channels && other.height == to.height && other.width == to.width,
              "masked_forward: residual and plain must have the shape of final, got [",
              other.channels, ", ", other.height, ", ", other.width, "]");
  }
  std::vector<std::int64_t> reads = {spec.input, spec.residual};
  for (const std::int64_t id : spec.others) {
    ONP_CHECK(is_buffer(id), "masked_forward: others must be buffers, got ", id);
    reads.push_back(id);
  }
  for (const std::int64_t read : reads) {
    ONP_CHECK(read < 0 || (read != spec.plain && read != spec.final),
              "masked_forward: a step must not write a buffer that it reads, got ", read);
  }
  ONP_CHECK(spec.plain < 0 || spec.plain != spec.final,
            "masked_forward: plain and final must differ, got ", spec.plain);
  ONP_CHECK(spec.kind >= StepKind::convolution && spec.kind <= StepKind::group_norm,
            "masked_forward: unknown kind of step, got ", static_cast<int>(spec.kind));
  for (const Activation activation : {spec.first, spec.second}) {
    ONP_CHECK(activation >= Activation::none && activation <= Activation::hard_swish,
              "masked_forward: unknown activation, got ", static_cast<int>(activation));
  }
  if (is_windowed(spec.kind)) {
    check_windows(spec, from, to);
  } else {
    check_pixels(spec, buffers, from, to);
  }
  ONP_CHECK(!spec.scale == !spec.shift, "masked_forward: scale and shift must come together");
}

}  // namespace onp
