// The kernels of a masked forward, one table per instruction set, and the arguments of one step.
// Plain data only: the files that implement the tables are compiled for different instruction
// sets, so nothing with external linkage may be instantiated in them.
#pragma once

#include <cstdint>

namespace onp {

// Output channels of one packed weight block; channel strides are multiples of it.
constexpr int kChannelBlock = 16;

// Input channels whose bytes, or halves (bf16), are multiplied and summed at once: 32 bits.
constexpr int kQuad = 4;
constexpr int kPair = 2;

// A Winograd convolution of 3x3 kernels gives tiles of `size` x `size` output pixels. Per side of a
// tile it reads and multiplies `winograd_side` values. Of stride 2 these are size + 1 points of
// F(size, 2) on every second input, and the `size` inputs between, which are all multiplied by the
// same: either way there are size + 2 transformed kernels a side.
constexpr int winograd_side(int size, int stride) { return stride == 1 ? size + 2 : 2 * size + 1; }
constexpr int winograd_points(int size, int stride) {
  return winograd_side(size, stride) * winograd_side(size, stride);
}
constexpr int winograd_kernels(int size) { return (size + 2) * (size + 2); }

// Tiles that it multiplies together at most: few, so that what is transformed stays in a thread's
// own caches, but many where the weights fit no cache and each group reads them from memory.
constexpr int kWideTiles = 48;
constexpr int narrow_tiles(int size) { return size == 2 ? 24 : 12; }
constexpr bool is_wide(int size, std::int64_t inputs, std::int64_t outputs) {
  return winograd_kernels(size) * inputs * outputs >= 4 << 20;
}

// Floats of scratch that it needs for these padded channel counts.
constexpr std::int64_t winograd_scratch(int size, int stride, std::int64_t inputs,
                                        std::int64_t outputs) {
  const std::int64_t tiles = is_wide(size, inputs, outputs) ? kWideTiles : narrow_tiles(size);
  return winograd_points(size, stride) * (tiles * (inputs + outputs) + 2 * kChannelBlock);
}

// Attention: queries that are taken together at most, and floats of scratch for `keys` pixels and
// heads of `size` channels: a head's keys and values, some queries with their scores and answers,
// the outputs of all heads.
constexpr int kMostQueries = 32;
constexpr std::int64_t attention_scratch(std::int64_t queries, std::int64_t keys, std::int64_t size,
                                         std::int64_t outputs) {
  const auto whole = [](std::int64_t value) {
    return (value + kChannelBlock - 1) / kChannelBlock * kChannelBlock;
  };
  return keys * (size + whole(size)) + kMostQueries * (keys + size + whole(size)) +
         queries * whole(outputs);
}

// Group norm: floats of scratch for sums of `rows` kinds per channel.
constexpr std::int64_t group_scratch(std::int64_t rows, std::int64_t channels) {
  return rows * ((channels + kChannelBlock - 1) / kChannelBlock * kChannelBlock);
}

// Those up to relu6 clamp; of the others a gradient keeps the slopes.
enum class Activation : int {
  none = 0,
  relu = 1,
  relu6 = 2,
  gelu = 3,
  gelu_tanh = 4,
  silu = 5,
  sigmoid = 6,
  hard_sigmoid = 7,  // relu6(x + 3) / 6
  hard_swish = 8,    // x times that
};

// A buffer as one step sees it: pixel i of image n begins at
// data + n * image_stride + offset[i]; its channels are contiguous. Absent if data is null.
struct Operand {
  float* data;
  const std::int32_t* offset;  // [pixels]
  std::int64_t image_stride;
};

// A buffer's copy in 8 bits: a value is (byte - zero) / levels[channel].
struct Bytes {
  std::uint8_t* data;
  const std::int32_t* offset;  // [pixels]
  std::int64_t image_stride;
  const float* levels;  // per channel, padded
  float zero;
};

// A buffer's copy in bf16.
struct Halves {
  std::uint16_t* data;
  const std::int32_t* offset;  // [pixels]
  std::int64_t image_stride;
};

// The part of a pooling window that lies inside the image.
struct Window {
  std::int32_t rows;
  std::int32_t columns;
  float inverse;  // 1 / divisor of an average
};

// Floats that hold, for every pixel of an image and every padded channel, whether an activation
// passes its gradient. Their form is the kernels' own.
constexpr std::int64_t passed_floats(std::int64_t pixels, std::int64_t channels) {
  return pixels * ((channels + kChannelBlock - 1) / kChannelBlock);
}

// What a masked gradient keeps of an epilogue, and what it multiplies by. Absent where null.
struct Kept {
  float* result;  // this and the next four: buffers of one layout
  float* scaled;
  float* active;
  float* first_slope;  // derivatives of smooth activations
  float* second_slope;
  const std::int32_t* offset;  // [pixels]
  std::int64_t image_stride;
  std::uint8_t* first_passed;  // passed_floats() an image, one image after the other
  std::uint8_t* second_passed;
  const float* gates;  // a factor per channel: that of channel c of image n at n * gate_stride + c
  std::int64_t gate_stride;
};

// One step over a block of images. Every kernel ends in the same epilogue, per output channel:
//   t = t + bias;             kept.result = t;
//   t = first(t + residual);  kept.first_passed = whether it passes, or kept.first_slope;
//                             plain = t;
//   t = t * scale + shift;    kept.scaled = t;
//   t = second(t);            kept.second_passed, or kept.second_slope;
//   t = t & keep;             kept.active = t;
//   t = t * kept.gates;       final = t, final_bytes = t in 8 bits, final_halves = t in bf16
// Per-channel arrays are padded to a multiple of kChannelBlock.
struct StepArgs {
  std::int64_t images;
  std::int64_t pixels;    // output pixels of one image
  std::int64_t channels;  // output channels
  Operand input;          // offset[i]: where the window of output pixel i begins

  // Convolution: weights [channel blocks][segments][segment_length][kChannelBlock]. A segment is a
  // run of contiguous inputs (one kernel row, or one tap) at segments[s] from the window's begin;
  // first_channel[block] is the first input channel that the block reads.
  // Winograd: transformed weights, a segment for each of the winograd_kernels; segments is unused.
  // Depthwise: weights [segments][channels, padded], one segment a tap.
  const float* weights;
  const std::int32_t* segments;
  std::int64_t segment_count;
  std::int64_t segment_length;
  std::int64_t block_stride;
  const std::int32_t* first_channel;  // null: all blocks begin at input channel 0

  // Convolutions that are neither grouped nor of bytes: the places in a segment, in turn, that are
  // multiplied; the inputs of the others are 0, whatever their weights are. Null: all of them.
  const std::int32_t* live;
  std::int64_t live_count;

  // Convolution of bytes: reads `input_bytes` instead of `input`. Weights
  // [channel blocks][segments][segment_length][kChannelBlock][kQuad], segments and block_stride
  // in bytes, segment_length in quads of input channels. `unit` times the sum of products, per
  // output channel, is the result; the bias makes up for the zero of the bytes.
  Bytes input_bytes;
  const std::int8_t* byte_weights;
  const float* unit;

  // Convolution of halves: the same with `input_halves` and pairs of input channels, summed in
  // fp32; weights [channel blocks][segments][segment_length][kChannelBlock][kPair], segments and
  // block_stride in halves.
  Halves input_halves;
  const std::uint16_t* half_weights;

  // Pooling: one window per output pixel.
  const Window* windows;

  // Pooling and Winograd: strides of one row and one column of the input.
  std::int64_t row_stride;
  std::int64_t column_stride;

  // Winograd: output pixels of a row.
  std::int64_t width;

  // Winograd, concatenation, attention, group norm.
  float* scratch;

  // Concatenation: the inputs behind the first, and the channels of each, the first's too.
  // Attention: keys and values, `keys` pixels each, and the channels that each head reads of
  // queries, keys and values, [3][heads][channels / heads]. Product: the other input, of `keys`
  // pixels: all of them, or one.
  const Operand* others;
  std::int64_t other_count;
  const std::int32_t* index;
  std::int64_t heads;  // group norm: groups
  std::int64_t keys;

  float value;  // norms: epsilon; attention: factor of the scores

  const float* bias;  // null: none
  Operand residual;
  Activation first;
  Operand plain;
  const float* scale;  // null: no scale and shift
  const float* shift;
  Activation second;
  const std::uint32_t* keep;  // per channel all ones (kept) or 0 (pruned); null: all kept
  Kept kept;
  Operand final;
  Bytes final_bytes;
  Halves final_halves;
};

struct Kernels {
  const char* name;
  void (*convolution)(const StepArgs&);
  void (*winograd2)(const StepArgs&);  // tiles of 2 and of 4
  void (*winograd4)(const StepArgs&);
  void (*strided_winograd2)(const StepArgs&);  // of stride 2
  void (*strided_winograd4)(const StepArgs&);
  void (*depthwise)(const StepArgs&);
  void (*byte_convolution)(const StepArgs&);
  void (*half_convolution)(const StepArgs&);
  void (*max_pool)(const StepArgs&);
  void (*average_pool)(const StepArgs&);
  void (*concatenation)(const StepArgs&);
  void (*layer_norm)(const StepArgs&);
  void (*attention)(const StepArgs&);
  void (*product)(const StepArgs&);
  void (*group_norm)(const StepArgs&);
};

extern const Kernels kGenericKernels;
#ifdef ONP_X86_KERNELS
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAvx512Bf16Kernels;
void byte_convolution_vnni(const StepArgs& step);
void half_convolution_bf16(const StepArgs& step);

// Which differ from those for AVX-512 in convolutions of bytes and halves alone.
inline bool is_avx512(const Kernels& kernels) {
  return &kernels == &kAvx512Kernels || &kernels == &kAvx512VnniKernels ||
         &kernels == &kAvx512Bf16Kernels;
}
#endif

}  // namespace onp
