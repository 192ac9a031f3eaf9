// What a planned network is made of: buffers, steps with packed weights, and where buffers lie in
// memory. Shared by the masked forward and the masked gradient, whose backward convolutions are
// steps of the same kind.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <tuple>
#include <vector>

#include "core/masked_forward.h"
#include "core/masked_forward_kernels.h"

namespace onp {

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

constexpr std::int64_t divide_up(std::int64_t value, std::int64_t by) {
  return (value + by - 1) / by;
}

// Zeroed floats on a cache line boundary.
class Floats {
 public:
  Floats() = default;
  explicit Floats(std::int64_t size)
      : size_(size), data_(new (kAlignment) float[static_cast<std::size_t>(size)]()) {}

  float* data() const { return data_.get(); }
  float& operator[](std::int64_t i) const { return data_[static_cast<std::size_t>(i)]; }
  explicit operator bool() const { return size_ > 0; }
  std::int64_t bytes() const { return size_ * static_cast<std::int64_t>(sizeof(float)); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(float* data) const { ::operator delete[](data, kAlignment); }
  };
  std::int64_t size_ = 0;
  std::unique_ptr<float[], Delete> data_;
};

enum class Number { floats, bytes, halves };

// Images are stored one after the other, each [height + 2 halo][width + 2 halo][stride]. The halo
// is zero and never written; lanes past `channels` hold whatever the vectors left there.
struct Buffer {
  BufferShape shape;
  Number number = Number::floats;  // others are copies of what another buffer holds as floats
  std::int64_t halo = 0;
  std::int64_t stride = 0;             // values from one pixel to the next
  std::vector<std::int32_t> interior;  // [height * width]
  std::uint8_t zero = 0;               // of bytes: that which stands for 0, of the halo too
  Floats levels;  // of bytes: per channel, padded, bytes from one value to that plus 1

  std::int64_t row() const { return (shape.width + 2 * halo) * stride; }
  std::int64_t image() const {
    return round_up((shape.height + 2 * halo) * row(), values_a_float() * kChannelBlock);
  }
  // Of the caller's [C, H, W].
  std::int64_t floats() const { return shape.channels * shape.height * shape.width; }
  std::int64_t values_a_float() const {
    return number == Number::bytes ? kQuad : number == Number::halves ? kPair : 1;
  }
  std::int64_t image_floats() const { return image() / values_a_float(); }
  // May point into the halo: y and x from -halo.
  std::int64_t offset(std::int64_t y, std::int64_t x) const {
    return (y + halo) * row() + (x + halo) * stride;
  }
  // Once shape, halo and stride stand. Throws onp::Error for an image of 2^31 values or more.
  void place_pixels();
  Operand at(float* data) const { return {data, interior.data(), image()}; }
  // Absent where they are no bytes, or halves.
  Bytes bytes_at(float* data) const {
    if (number != Number::bytes) return {};
    return {reinterpret_cast<std::uint8_t*>(data), interior.data(), image(), levels.data(),
            static_cast<float>(zero)};
  }
  Halves halves_at(float* data) const {
    if (number != Number::halves) return {};
    return {reinterpret_cast<std::uint16_t*>(data), interior.data(), image()};
  }
};

struct Step {
  StepSpec spec;  // its arrays are gone: use the ones below
  std::int64_t channels = 0;
  std::int64_t width = 0;  // output pixels of a row
  void (*Kernels::*kernel)(const StepArgs&) = nullptr;
  std::vector<std::int32_t> input_offset;
  std::vector<std::int32_t> segments;
  std::vector<std::int32_t> first_channel;
  std::vector<Window> windows;
  std::int64_t segment_length = 0;
  std::int64_t block_stride = 0;
  std::vector<std::int64_t> reads;  // buffers, constants left out; copies by what they are of
  std::int64_t input_narrow = -1;   // narrow copies that stand for `input` and are written beside
  std::int64_t final_narrow = -1;   // `final`, -1: none
  bool final_floats = true;         // whether anything reads the floats of `final`
  std::vector<std::int32_t> index;  // see StepArgs
  std::int64_t keys = 0;
  std::int64_t keep_begin = 0;        // into one thread's keep words of a masked forward
  std::int64_t input_pruned_by = -1;  // step that prunes channels of its input, -1: not asked for
  Floats weights, bias, scale, shift, unit;
  std::vector<std::int8_t> byte_weights;
  std::vector<std::uint16_t> half_weights;

  // Whether it reads a buffer other than by its narrow copy.
  bool reads_floats(std::int64_t buffer) const;

  // The operation alone, on a block of images: no residual and nothing to write yet.
  StepArgs args(const Buffer& from, float* input, std::int64_t images) const;
};

// Throws onp::Error for a step that does not fit the buffers.
void check_step(const StepSpec& spec, const std::vector<BufferShape>& buffers);

inline std::int64_t pixels_of(const BufferShape& shape) { return shape.height * shape.width; }

// Whether a step's outputs each read a window of one input.
inline bool is_windowed(StepKind kind) { return kind <= StepKind::average_pool; }

inline std::int64_t written_buffer(const StepSpec& spec) {
  return spec.final >= 0 ? spec.final : spec.plain;
}

// Pixels around `from` that a convolution reads (a pool stays inside), and the scratch it needs, by
// what it reads.
std::int64_t halo_of(const StepSpec& spec, const BufferShape& from, const BufferShape& to,
                     Number number = Number::floats);
std::int64_t scratch_of(const StepSpec& spec, const BufferShape& from, const BufferShape& to,
                        std::int64_t keys = 0, Number number = Number::floats);

// Whether a convolution may read bytes: not of few channels, nor for a single pixel, where that
// would save little; nor of groups, nor where its sums might not fit 32 bits.
bool suits_bytes(const StepSpec& spec, const BufferShape& from, const BufferShape& to);

// Whether it may read halves: as for bytes; and not where Winograd by tiles of 4 in fp32 saves more
// (of stride 2 it saves less than halves do).
bool suits_halves(const StepSpec& spec, const BufferShape& from, const BufferShape& to);

// The step with its weights packed for the kernel that suits it and `from`, which may be a narrow
// copy of its input; what it reads besides its input is left to plan_network.
Step pack_step(const StepSpec& spec, const Buffer& from, const BufferShape& to);

struct Network {
  std::vector<Buffer> buffers;    // those of the caller, then narrow copies
  std::vector<Floats> constants;  // one a buffer, empty but for constants
  std::vector<Step> steps;
  std::size_t output = 0;
  std::int64_t sites = 0;
  std::int64_t scratch_floats = 0;
  std::int64_t weight_bytes = 0;
};

// Throws onp::Error for a program that does not fit together. With `ranges`, convolutions whose
// input has one and that are worth it (see suits_bytes) read bytes; with `halves` instead, those
// that are worth it read halves.
Network plan_network(const std::vector<BufferShape>& shapes, const std::vector<StepSpec>& specs,
                     const std::vector<ConstantSpec>& constants, std::int64_t output,
                     std::int64_t sites, const std::vector<RangeSpec>& ranges = {},
                     bool halves = false);

// Where buffers lie: slot s begins at begin[s] * images in the block. Only buffers of one shape
// and halo share a slot: the halo then stays zero.
class Slots {
 public:
  std::size_t claim(const Buffer& buffer);
  void release(const Buffer& buffer, std::size_t slot);

  std::int64_t floats_per_image = 0;
  std::vector<std::int64_t> begin;

 private:
  using Key = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, Number, int>;
  static Key key(const Buffer& b) {
    return {b.shape.height, b.shape.width, b.stride, b.halo, b.number, b.zero};
  }
  std::map<Key, std::vector<std::size_t>> free_;
};

// A block of images grows until its buffers take this much, a few megabytes or a share of the
// weights: small blocks keep activations in cache, large ones spread a pass over the weights on
// more pixels.
std::int64_t block_bytes(std::int64_t weight_bytes);

// The kernel table of an instruction set, "auto" for the widest. Throws onp::Error.
const Kernels& kernels_for(const std::string& isa);

// Zeroes what is around the pixels of the images in a buffer, which steps read and none writes; all
// of a buffer of bytes.
void clear_halo(const Buffer& buffer, std::int64_t images, float* data);

// NCHW to the channels-last layout of a buffer.
void load_images(const float* images, std::int64_t count, const Buffer& buffer, float* data);

}  // namespace onp
