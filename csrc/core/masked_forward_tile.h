// The kernels of a masked forward, written once over a vector type. Each instruction set's file
// includes this with a Simd of its own; everything here has internal linkage, so that no copy
// compiled for a wider instruction set can be linked into the baseline.
//
// Simd: Vectors with `tile_pixels`; bytes(x): the nearest of 0 to 255, for NaN some; and dot, see
// masked_forward_narrow.h.
#pragma once

#include "core/masked_forward_kernels.h"
#include "core/masked_forward_smooth.h"

namespace onp {
namespace {

// bytes() by plain arithmetic.
template <typename Simd>
ONP_INLINE typename Simd::ByteVec plain_bytes(typename Simd::Vec value) {
  const auto least = Simd::splat(0.0f), most = Simd::splat(255.5f);
  value += Simd::splat(0.5f);
  value = Simd::smaller(Simd::larger(value, least), most);
  const auto whole = __builtin_convertvector(value, typename Simd::IntVec);
  return __builtin_convertvector(whole, typename Simd::ByteVec);
}

template <typename Simd>
struct Tile {
  using Vec = typename Simd::Vec;
  using IntVec = typename Simd::IntVec;
  using Bits = typename Simd::Bits;
  using Index = std::int64_t;
  static constexpr int kLanes = Simd::lanes;
  static constexpr int kPixels = Simd::tile_pixels;
  // Tiles whose addresses are worked out together and reused for every channel block.
  static constexpr int kGroup = 16;
  // Tiles that Winograd multiplies together where fewer than kPixels are left.
  static constexpr int kFew = kPixels / 3;
  // How far ahead rows of weights are asked for. Large layers' come from the last cache, and are
  // waited for without (bench/NOTES.md).
  static constexpr int kRowsAhead = 24;
  static_assert(kFew > 0 && kPixels % kFew == 0, "few tiles may stand for the end of many");
  static_assert(kChannelBlock % kLanes == 0, "a channel block is a whole number of vectors");

  // An output pixel of a block.
  struct Pixel {
    Index image, number;
  };

  // Where the epilogue of some output pixels reads and writes; what a step has not got is not set.
  // Pixels outside the image stand for one inside, from which they come to the same values; or, by
  // Winograd, to others: then pixels are stored in order, and the one inside comes later.
  template <int pixels>
  struct Outputs {
    const float* residual[pixels];
    float* plain[pixels];
    float* final[pixels];
    std::uint8_t* final_bytes[pixels];
    std::uint16_t* final_halves[pixels];
    Index number[pixels];  // of the block's output pixels
    Index kept[pixels];    // in each of the buffers that a gradient keeps
    const float* gates[pixels];

    // Operand by operand: most steps have few, and small convolutions would wait for the others.
    void set(const StepArgs& step, const Pixel (&at)[pixels]) {
      const auto place = [&](const auto& operand, auto& to) {
        if (!operand.data) return;
        for (int p = 0; p < pixels; ++p) to[p] = address(operand, at[p]);
      };
      place(step.residual, residual);
      place(step.plain, plain);
      place(step.final, final);
      place(step.final_bytes, final_bytes);
      place(step.final_halves, final_halves);
      const Kept& k = step.kept;
      if (k.first_passed || k.second_passed) {
        for (int p = 0; p < pixels; ++p) number[p] = at[p].image * step.pixels + at[p].number;
      }
      if (k.offset) {
        for (int p = 0; p < pixels; ++p) {
          kept[p] = at[p].image * k.image_stride + k.offset[at[p].number];
        }
      }
      if (k.gates) {
        for (int p = 0; p < pixels; ++p) gates[p] = k.gates + at[p].image * k.gate_stride;
      }
    }
  };

  // One tile of kPixels output pixels.
  struct Place {
    const float* input[kPixels];
    Pixel pixel[kPixels];
    Outputs<kPixels> outputs;
  };

  // Of a pixel in an Operand, Bytes or Halves.
  template <typename Where>
  static ONP_INLINE auto* address(const Where& where, Pixel at) {
    return where.data + at.image * where.image_stride + where.offset[at.number];
  }

  static ONP_INLINE Vec load(const float* from) {
    Vec value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
  }

  static ONP_INLINE void store(float* to, Vec value) {
    __builtin_memcpy(to, &value, sizeof(value));
  }

  // Those that clamp. NaN passes through, as in torch.
  static ONP_INLINE Vec activate(Vec value, Activation activation) {
    if (activation == Activation::none) return value;
    value = Simd::larger(Simd::splat(0.0f), value);
    if (activation == Activation::relu6) value = Simd::smaller(Simd::splat(6.0f), value);
    return value;
  }

  // Any of them, on vector v of some pixels, from channel c on; slopes: where a gradient keeps
  // those of smooth ones, null: nowhere.
  template <int pixels, int vectors>
  static ONP_INLINE void activate(Vec (&sums)[pixels][vectors], int v, Activation activation,
                                  float* slopes, const Outputs<pixels>& outputs, Index c) {
    if (activation <= Activation::relu6) {
      for (int p = 0; p < pixels; ++p) sums[p][v] = activate(sums[p][v], activation);
      return;
    }
    // Sums whose address is known would not stay in registers.
    Vec values[pixels], derivatives[pixels];
    for (int p = 0; p < pixels; ++p) values[p] = sums[p][v];
    Smooth<Simd>::activate(values, pixels, activation, slopes ? derivatives : nullptr);
    for (int p = 0; p < pixels; ++p) sums[p][v] = values[p];
    for (int p = 0; p < pixels && slopes; ++p) store(slopes + outputs.kept[p] + c, derivatives[p]);
  }

  static ONP_INLINE void store_bytes(std::uint8_t* to, Vec value, Vec levels, Vec zero) {
    const auto bytes = Simd::bytes(Simd::fma(value, levels, zero));
    __builtin_memcpy(to, &bytes, sizeof(bytes));
  }

  // Rounded to the nearest bf16, to the even one of two; NaN stays NaN.
  static ONP_INLINE void store_halves(std::uint16_t* to, Vec value) {
    IntVec bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    const IntVec odd = bits >> 16 & 1;
    const IntVec rounded = value == value ? bits + (odd + 0x7fff) : bits | 0x400000;
    const auto halves = __builtin_convertvector(rounded >> 16, typename Simd::HalfVec);
    __builtin_memcpy(to, &halves, sizeof(halves));
  }

  static ONP_INLINE Vec mask(Vec value, const std::uint32_t* keep) {
    IntVec bits, kept;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    __builtin_memcpy(&kept, keep, sizeof(kept));
    bits &= kept;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
  }

  // Vector v of some pixels, from channel c on, to a buffer that a gradient keeps; null: none.
  template <int pixels, int vectors>
  static ONP_INLINE void keep(float* buffer, const Outputs<pixels>& outputs, Index c, int v,
                              const Vec (&sums)[pixels][vectors]) {
    if (!buffer) return;
    for (int p = 0; p < pixels; ++p) store(buffer + outputs.kept[p] + c, sums[p][v]);
  }

  // Where the vector from channel c on of output pixel `number` has its bits.
  template <typename Byte>
  static ONP_INLINE Byte* bits_at(Byte* passed, Index channels, Index number, Index c) {
    const Index vectors = (channels + kChannelBlock - 1) / kChannelBlock * (kChannelBlock / kLanes);
    return passed + (number * vectors + c / kLanes) * static_cast<Index>(sizeof(Bits));
  }

  // Where an activation that gave vector v of some pixels passes its gradient.
  template <int pixels, int vectors>
  static ONP_INLINE void mark(std::uint8_t* passed, Activation activation, const StepArgs& step,
                              const Outputs<pixels>& outputs, Index c, int v,
                              const Vec (&sums)[pixels][vectors]) {
    if (!passed) return;
    const Vec zero = Simd::splat(0.0f), six = Simd::splat(6.0f);
    for (int p = 0; p < pixels; ++p) {
      Bits bits = Simd::above(sums[p][v], zero);
      if (activation == Activation::relu6) bits &= Simd::above(six, sums[p][v]);
      __builtin_memcpy(bits_at(passed, step.channels, outputs.number[p], c), &bits, sizeof(bits));
    }
  }

  // Finishes `vectors` vectors of some pixels that begin at output channel `channel`.
  template <int pixels, int vectors>
  static ONP_INLINE void finish(const StepArgs& step, const Outputs<pixels>& outputs, Index channel,
                                Vec (&sums)[pixels][vectors]) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const Index c = channel + v * kLanes;
      if (step.bias) {
        const Vec bias = load(step.bias + c);
        for (int p = 0; p < pixels; ++p) sums[p][v] += bias;
      }
      keep(step.kept.result, outputs, c, v, sums);
      if (step.residual.data) {
        for (int p = 0; p < pixels; ++p) sums[p][v] += load(outputs.residual[p] + c);
      }
      activate(sums, v, step.first, step.kept.first_slope, outputs, c);
      mark(step.kept.first_passed, step.first, step, outputs, c, v, sums);
      if (step.plain.data) {
        for (int p = 0; p < pixels; ++p) store(outputs.plain[p] + c, sums[p][v]);
      }
      if (!step.final.data && !step.final_bytes.data && !step.final_halves.data) continue;
      if (step.scale) {
        const Vec scale = load(step.scale + c), shift = load(step.shift + c);
        for (int p = 0; p < pixels; ++p) sums[p][v] = Simd::fma(sums[p][v], scale, shift);
      }
      keep(step.kept.scaled, outputs, c, v, sums);
      activate(sums, v, step.second, step.kept.second_slope, outputs, c);
      mark(step.kept.second_passed, step.second, step, outputs, c, v, sums);
      if (step.keep) {
        for (int p = 0; p < pixels; ++p) sums[p][v] = mask(sums[p][v], step.keep + c);
      }
      keep(step.kept.active, outputs, c, v, sums);
      if (step.kept.gates) {
        for (int p = 0; p < pixels; ++p) sums[p][v] *= load(outputs.gates[p] + c);
      }
      if (step.final.data) {
        for (int p = 0; p < pixels; ++p) store(outputs.final[p] + c, sums[p][v]);
      }
      if (step.final_bytes.data) {
        const Vec levels = load(step.final_bytes.levels + c);
        const Vec zero = Simd::splat(step.final_bytes.zero);
        for (int p = 0; p < pixels; ++p) {
          store_bytes(outputs.final_bytes[p] + c, sums[p][v], levels, zero);
        }
      }
      if (step.final_halves.data) {
        for (int p = 0; p < pixels; ++p) store_halves(outputs.final_halves[p] + c, sums[p][v]);
      }
    }
  }

  template <int pixels, int vectors>
  static ONP_INLINE void clear(Vec (&sums)[pixels][vectors]) {
#pragma GCC unroll 32
    for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[p][v] = Simd::splat(0.0f);
    }
  }

  // sums[p][v] += input[p][i] * row[v], while the row after some more, at `ahead`, is asked for.
  template <int pixels, int vectors>
  static ONP_INLINE void accumulate(const float* const (&input)[pixels], Index i, const float* row,
                                    const float* ahead, Index next_vector,
                                    Vec (&sums)[pixels][vectors]) {
    Vec weights[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const Index from = v * (kLanes < kChannelBlock ? kLanes : next_vector);
      weights[v] = load(row + from);
      if (v * kLanes % kChannelBlock == 0) {  // the other half of a block is in the same line
        __builtin_prefetch(ahead + from);
      }
    }
#pragma GCC unroll 32
    for (int p = 0; p < pixels; ++p) {
      const Vec x = Simd::splat(input[p][i]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[p][v] = Simd::fma(x, weights[v], sums[p][v]);
    }
  }

  // The sum of that over i, rows of weights kChannelBlock apart: over the first `count`, or, if not
  // all, over the `count` places that `live` names.
  template <bool all, int pixels, int vectors>
  static ONP_INLINE void accumulate(const float* const (&input)[pixels], const float* weights,
                                    Index next_vector, const std::int32_t* live, Index count,
                                    Vec (&sums)[pixels][vectors]) {
    if (all) {
      for (Index i = 0; i < count; ++i) {
        accumulate(input, i, weights, weights + kRowsAhead * kChannelBlock, next_vector, sums);
        weights += kChannelBlock;
      }
      return;
    }
    for (Index n = 0; n < count; ++n) {
      const Index i = live[n];
      const Index ahead = n + kRowsAhead < count ? live[n + kRowsAhead] : i + kRowsAhead;
      accumulate(input, i, weights + i * kChannelBlock, weights + ahead * kChannelBlock,
                 next_vector, sums);
    }
  }

  // From one vector of a packed row of weights to the next: the next block holds it if vectors are
  // as wide as blocks.
  static ONP_INLINE Index next_vector(const StepArgs& step) {
    return kLanes == kChannelBlock ? step.block_stride : kLanes;
  }

  static ONP_INLINE const float* block_weights(const StepArgs& step, Index channel) {
    return step.weights + channel / kChannelBlock * step.block_stride + channel % kChannelBlock;
  }

  template <bool all, int vectors>
  static __attribute__((noinline)) void convolve(const StepArgs& step, const Place& place,
                                                 Index channel) {
    const float* weights = block_weights(step, channel);
    const Index count = all ? step.segment_length : step.live_count;
    const Index first = step.first_channel ? step.first_channel[channel / kChannelBlock] : 0;
    Vec sums[kPixels][vectors];
    clear(sums);
    for (Index s = 0; s < step.segment_count; ++s) {
      const Index offset = step.segments[s] + first;
      const float* input[kPixels];
#pragma GCC unroll 32
      for (int p = 0; p < kPixels; ++p) input[p] = place.input[p] + offset;
      accumulate<all>(input, weights, next_vector(step), step.live, count, sums);
      weights += step.segment_length * kChannelBlock;
    }
    finish(step, place.outputs, channel, sums);
  }

  // To the next pixel of a block, image after image; stays at the last. Counted on, as a division
  // takes as long as many multiplications of vectors.
  static ONP_INLINE void advance(const StepArgs& step, Pixel& at) {
    if (at.number + 1 < step.pixels) {
      ++at.number;
    } else if (at.image + 1 < step.images) {
      at = {at.image + 1, 0};
    }
  }

  // The next tile from a pixel on, which moves along; `input` is what the step reads.
  template <typename Input, typename TilePlace>
  static ONP_INLINE void locate(const StepArgs& step, const Input& input, Pixel& at,
                                TilePlace& place) {
    for (int p = 0; p < kPixels; ++p) {
      place.pixel[p] = at;
      place.input[p] = address(input, at);
      advance(step, at);
    }
    place.outputs.set(step, place.pixel);
  }

  // Calls body(places, tiles) for groups of tiles that cover all output pixels of the block.
  template <typename TilePlace, typename Input, typename Body>
  static ONP_INLINE void for_each_group(const StepArgs& step, const Input& input,
                                        const Body& body) {
    TilePlace places[kGroup];
    Pixel at{0, 0};
    const Index total = step.images * step.pixels;
    for (Index begin = 0; begin < total; begin += kGroup * kPixels) {
      int tiles = 0;
      for (; tiles < kGroup && begin + tiles * kPixels < total; ++tiles) {
        locate(step, input, at, places[tiles]);
      }
      body(places, tiles);
    }
  }

  template <typename Body>
  static ONP_INLINE void for_each_group(const StepArgs& step, const Body& body) {
    for_each_group<Place>(step, step.input, body);
  }

  static void convolution(const StepArgs& step) {
    if (step.live) return convolution<false>(step);
    convolution<true>(step);
  }

  template <bool all>
  static void convolution(const StepArgs& step) {
    // Two vectors of a tile share their input channels: not so across the blocks of a grouped one.
    const bool pairs = kLanes < kChannelBlock || !step.first_channel;
    for_each_group(step, [&](const Place* places, int tiles) {
      Index channel = 0;
      if (pairs) {
        for (; channel + kLanes < step.channels; channel += 2 * kLanes) {
          for (int t = 0; t < tiles; ++t) convolve<all, 2>(step, places[t], channel);
        }
      }
      for (; channel < step.channels; channel += kLanes) {
        for (int t = 0; t < tiles; ++t) convolve<all, 1>(step, places[t], channel);
      }
    });
  }

  // ---- Winograd F(2x2, 3x3) and F(4x4, 3x3), A. Lavin and S. Gray, "Fast Algorithms for
  // Convolutional Neural Networks", arXiv 1509.09308: a tile of 2x2 outputs from 4x4 inputs with 16
  // products instead of 36, or of 4x4 from 6x6 with 36 instead of 144. Of stride 2, a sum per side
  // of F(2, 2) or F(4, 2) on every second input, and of the middle weight times the others: 25
  // instead of 36, or 81 instead of 144. Per group of tiles: transform the inputs, a matrix product
  // per point, transform back and finish.

  // Where the output of a tile begins; tiles come row by row, image after image.
  struct Corner {
    Index image = 0, y = 0, x = 0;

    void advance(Index height, Index width, int size) {
      x += size;
      if (x < width) return;
      x = 0;
      y += size;
      if (y < height) return;
      y = 0;
      ++image;
    }
  };

  // The pixels of a tile from the last to the first: where it reaches past the image, those outside
  // are written to the last ones inside, and these then over them.
  template <int size>
  static ONP_INLINE void locate(const StepArgs& step, const Corner& corner, Index height,
                                Outputs<size * size>& outputs) {
    const Index first = corner.y * step.width + corner.x;
    const Index last_y = height - 1 - corner.y, last_x = step.width - 1 - corner.x;
    Pixel pixels[size * size];
    for (int y = 0; y < size; ++y) {
      const Index row = first + (y < last_y ? y : last_y) * step.width;
      for (int x = 0; x < size; ++x) {
        pixels[backwards<size>(y, x)] = {corner.image, row + (x < last_x ? x : last_x)};
      }
    }
    outputs.set(step, pixels);
  }

  template <int size>
  static constexpr int backwards(int y, int x) {
    return size * size - 1 - (y * size + x);
  }

  // 1-D transforms of inputs, in place.
  static ONP_INLINE void transform(Vec (&d)[4]) {
    const Vec sum = d[1] + d[2], difference = d[2] - d[1];
    d[0] -= d[2];
    d[3] = d[1] - d[3];
    d[1] = sum;
    d[2] = difference;
  }

  static ONP_INLINE void transform(Vec (&d)[6]) {
    const Vec two = Simd::splat(2.0f), four = Simd::splat(4.0f), minus_five = Simd::splat(-5.0f);
    const Vec a = Simd::fma(-four, d[2], d[4]), b = Simd::fma(-four, d[1], d[3]);
    const Vec c = d[4] - d[2], e = two * (d[3] - d[1]);
    d[0] = Simd::fma(four, d[0], Simd::fma(minus_five, d[2], d[4]));
    d[5] = Simd::fma(four, d[1], Simd::fma(minus_five, d[3], d[5]));
    d[1] = a + b;
    d[2] = a - b;
    d[3] = c + e;
    d[4] = c - e;
  }

  // Of stride 2: every second one is transformed, the others follow as they are.
  static ONP_INLINE void transform(Vec (&d)[5]) {
    const Vec first = d[2] - d[0], last = d[4] - d[2];
    d[4] = d[3];
    d[3] = d[1];
    d[0] = first;
    d[1] = d[2];
    d[2] = last;
  }

  static ONP_INLINE void transform(Vec (&d)[9]) {
    const Vec two = Simd::splat(2.0f), minus_two = Simd::splat(-2.0f);
    const Vec a = d[6] - d[4], b = Simd::fma(minus_two, d[4], a);  // e3 - e2, e3 - 3 e2
    const Vec first = Simd::fma(two, d[0], Simd::fma(minus_two, d[4], d[6] - d[2]));
    const Vec last = Simd::fma(two, d[2], Simd::fma(minus_two, d[6], d[8] - d[4]));
    const Vec minus = Simd::fma(minus_two, d[2], a), plus = Simd::fma(two, d[2], b);
    const Vec middle = d[6] - d[2];
    const Vec one = d[1], three = d[3], five = d[5], seven = d[7];
    d[0] = first;
    d[1] = minus;
    d[2] = plus;
    d[3] = middle;
    d[4] = last;
    d[5] = one;
    d[6] = three;
    d[7] = five;
    d[8] = seven;
  }

  // 1-D transforms of products to outputs.
  static ONP_INLINE void transform(const Vec (&m)[4], Vec (&out)[2]) {
    out[0] = m[0] + m[1] + m[2];
    out[1] = m[1] - m[2] - m[3];
  }

  static ONP_INLINE void transform(const Vec (&m)[6], Vec (&out)[4]) {
    const Vec a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
    out[0] = m[0] + a + c;
    out[1] = Simd::fma(Simd::splat(2.0f), d, b);
    out[2] = Simd::fma(Simd::splat(4.0f), c, a);
    out[3] = Simd::fma(Simd::splat(8.0f), d, b) + m[5];
  }

  static ONP_INLINE void transform(const Vec (&m)[5], Vec (&out)[2]) {
    out[0] = m[0] + m[1] + m[3];
    out[1] = m[1] + m[2] + m[4];
  }

  static ONP_INLINE void transform(const Vec (&m)[9], Vec (&out)[4]) {
    const Vec a = m[1] + m[2], b = m[1] - m[2];
    out[0] = m[0] + a + m[3] + m[5];
    out[1] = Simd::fma(Simd::splat(2.0f), m[3], b) + m[6];
    out[2] = Simd::fma(Simd::splat(4.0f), m[3], a) + m[7];
    out[3] = Simd::fma(Simd::splat(8.0f), m[3], b) + m[4] + m[8];
  }

  // to[point * distance] = transformed inputs of one vector of channels.
  template <int side>
  static ONP_INLINE void transform_input(const StepArgs& step, const float* from, float* to,
                                         Index distance) {
    Vec d[side][side];  // columns
#pragma GCC unroll 9
    for (int x = 0; x < side; ++x) {
#pragma GCC unroll 9
      for (int y = 0; y < side; ++y) {
        d[x][y] = load(from + y * step.row_stride + x * step.column_stride);
      }
      transform(d[x]);
    }
#pragma GCC unroll 9
    for (int y = 0; y < side; ++y) {
      Vec row[side];
#pragma GCC unroll 9
      for (int x = 0; x < side; ++x) row[x] = d[x][y];
      transform(row);
#pragma GCC unroll 9
      for (int x = 0; x < side; ++x) store(to + (y * side + x) * distance, row[x]);
    }
  }

  // The outputs of one vector of channels from its products.
  template <int size, int side>
  static ONP_INLINE void transform_output(const float* from, Index distance,
                                          Vec (&sums)[size * size][1]) {
    Vec columns[side][size];
#pragma GCC unroll 9
    for (int x = 0; x < side; ++x) {
      Vec products[side];
#pragma GCC unroll 9
      for (int y = 0; y < side; ++y) products[y] = load(from + (y * side + x) * distance);
      transform(products, columns[x]);
    }
#pragma GCC unroll 4
    for (int y = 0; y < size; ++y) {
      Vec row[side], out[size];
#pragma GCC unroll 9
      for (int x = 0; x < side; ++x) row[x] = columns[x][y];
      transform(row, out);
#pragma GCC unroll 4
      for (int x = 0; x < size; ++x) sums[backwards<size>(y, x)][0] = out[x];
    }
  }

  // products[p][..] = inputs[p][..] x weights for `pixels` tiles at one point.
  template <bool all, int pixels, int vectors>
  static __attribute__((noinline)) void multiply(const float* inputs, Index input_stride,
                                                 const float* weights, Index next_vector,
                                                 const std::int32_t* live, Index count,
                                                 float* products, Index product_stride) {
    const float* input[pixels];
    for (int p = 0; p < pixels; ++p) input[p] = inputs + p * input_stride;
    Vec sums[pixels][vectors];
    clear(sums);
    accumulate<all>(input, weights, next_vector, live, count, sums);
    // Unrolled early, or the sums would go through memory once more.
#pragma GCC unroll 32
    for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        store(products + p * product_stride + v * kLanes, sums[p][v]);
      }
    }
  }

  template <int pixels>
  static auto multiply_of(bool all, bool pair) {
    if (all) return pair ? multiply<true, pixels, 2> : multiply<true, pixels, 1>;
    return pair ? multiply<false, pixels, 2> : multiply<false, pixels, 1>;
  }

  template <int size, int stride>
  static void winograd(const StepArgs& step) {
    constexpr int side = winograd_side(size, stride);
    constexpr Index kPoints = winograd_points(size, stride);
    constexpr auto kernel = [](Index point) constexpr {  // of a side's points
      return point < size + 2 ? point : Index{size + 1};
    };
    const Index height = step.pixels / step.width;
    const Index total =
        step.images * ((height + size - 1) / size) * ((step.width + size - 1) / size);
    const Index length = step.segment_length;
    const bool all = !step.live;
    const Index count = all ? length : step.live_count;
    const Index inputs = (length + kLanes - 1) / kLanes * kLanes;
    const Index outputs = (step.channels + kLanes - 1) / kLanes * kLanes;
    // Of narrow layers' large tiles as many as fill the registers: what is transformed then stays
    // in the first cache.
    constexpr Index kNarrow = size == 4 ? kPixels : narrow_tiles(size) / kPixels * kPixels;
    static_assert(kNarrow > 0 && kNarrow <= narrow_tiles(size), "scratch is for so many");
    const bool wide = is_wide(size, length, step.channels);
    const Index together = wide ? kWideTiles / kPixels * kPixels : kNarrow;
    // One more cache line per point: at a multiple of 4 KiB all points would share a cache set.
    const Index input_point = together * inputs + kChannelBlock;
    const Index output_point = together * outputs + kChannelBlock;
    float* const transformed = step.scratch;  // [points][tiles, inputs]
    // [points][tiles, outputs]
    float* const products = transformed + kPoints * input_point;
    Outputs<size * size> places{};
    Corner first;  // of the group, and of the next one
    for (Index begin = 0; begin < total; begin += together) {
      const Index tiles = begin + together < total ? together : total - begin;
      Corner corner = first;
      for (Index t = 0; t < tiles; ++t) {
        const Pixel at{corner.image, corner.y * step.width + corner.x};
        const float* const from = address(step.input, at);
        for (Index c = 0; c < inputs; c += kLanes) {
          transform_input<side>(step, from + c, transformed + t * inputs + c, input_point);
        }
        corner.advance(height, step.width, size);
      }
      for (Index point = 0; point < kPoints; ++point) {
        const float* in = transformed + point * input_point;
        float* out = products + point * output_point;
        const Index which = kernel(point / side) * (size + 2) + kernel(point % side);
        for (Index c = 0; c < outputs; c += 2 * kLanes) {
          const float* weights = block_weights(step, c) + which * length * kChannelBlock;
          const bool pair = c + kLanes < outputs;
          const auto some = [&](auto product, Index t) {
            product(in + t * inputs, inputs, weights, next_vector(step), step.live, count,
                    out + t * outputs + c, outputs);
          };
          Index t = 0;
          for (; t + kPixels - kFew < tiles; t += kPixels) {
            some(multiply_of<kPixels>(all, pair), t);
          }
          for (; t < tiles; t += kFew) some(multiply_of<kFew>(all, pair), t);
        }
      }
      for (Index t = 0; t < tiles; ++t) {
        locate<size>(step, first, height, places);
        for (Index c = 0; c < outputs; c += kLanes) {
          Vec sums[size * size][1];
          transform_output<size, side>(products + t * outputs + c, output_point, sums);
          finish(step, places, c, sums);
        }
        first.advance(height, step.width, size);
      }
    }
  }

  static void depthwise(const StepArgs& step) {
    for_each_group(step, [&](const Place* places, int tiles) {
      for (int t = 0; t < tiles; ++t) {
        const Place& place = places[t];
        for (Index c = 0; c < step.channels; c += kLanes) {
          Vec sums[kPixels][1];
          clear(sums);
          const float* weights = step.weights + c;
          for (Index s = 0; s < step.segment_count; ++s) {
            const Vec weight = load(weights);
            const Index offset = step.segments[s] + c;
#pragma GCC unroll 32
            for (int p = 0; p < kPixels; ++p) {
              sums[p][0] = Simd::fma(load(place.input[p] + offset), weight, sums[p][0]);
            }
            weights += step.block_stride;
          }
          finish(step, place.outputs, c, sums);
        }
      }
    });
  }

  template <bool average>
  static void pool(const StepArgs& step) {
    for_each_group(step, [&](const Place* places, int tiles) {
      for (int t = 0; t < tiles; ++t) {
        const Place& place = places[t];
        for (Index c = 0; c < step.channels; c += kLanes) {
          Vec results[kPixels][1];
          for (int p = 0; p < kPixels; ++p) {
            const Window& window = step.windows[place.pixel[p].number];
            const float* corner = place.input[p] + c;
            Vec result = average ? Simd::splat(0.0f) : load(corner);
            for (Index y = 0; y < window.rows; ++y) {
              for (Index x = 0; x < window.columns; ++x) {
                const Vec value = load(corner + y * step.row_stride + x * step.column_stride);
                if (average) {
                  result += value;
                } else {
                  // NaN wins, as in torch: an unordered comparison takes the new value.
                  result = (result >= value) | (result != result) ? result : value;
                }
              }
            }
            results[p][0] = average ? result * Simd::splat(window.inverse) : result;
          }
          finish(step, place.outputs, c, results);
        }
      }
    });
  }
};

}  // namespace
}  // namespace onp
