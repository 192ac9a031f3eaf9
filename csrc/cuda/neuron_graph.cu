#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/launch.cuh"
#include "cuda/neuron_graph.h"

namespace onp {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAll = ~0u;               // lanes of a warp
constexpr int kItems = 64;                   // of a table: it is passed by value, at most 4 KiB
constexpr std::int64_t kMostRows = 1 << 30;  // and columns: indices of loops are int

__host__ __device__ constexpr std::int64_t blocks_of(std::int64_t items, std::int64_t block) {
  return (items + block - 1) / block;
}

// What a launch works on.
template <typename Item>
struct Table {
  int count;
  Item items[kItems];
};

// The last item that does not start after `place`: the one that holds it, as starts ascend.
template <typename Item>
__device__ const Item& holder(const Table<Item>& table, std::int64_t Item::*start,
                              std::int64_t place) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.items[middle].*start <= place) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return table.items[low];
}

// Calls launch(table, first, last) for runs of items that fit a table.
template <typename Item, typename Launch>
void for_each_table(const std::vector<Item>& items, const Launch& launch) {
  const std::size_t count = items.size();
  for (std::size_t first = 0; first < count; first += kItems) {
    const std::size_t last = std::min(first + kItems, count);
    Table<Item> table{};
    table.count = static_cast<int>(last - first);
    std::copy(items.begin() + first, items.begin() + last, table.items);
    launch(table, first, last);
  }
}

unsigned grid_of(std::int64_t blocks) {
  ONP_CHECK(blocks <= std::numeric_limits<int>::max(), "neuron_graph: ", blocks,
            " blocks are more than a CUDA grid has");
  return static_cast<unsigned>(blocks);
}

// ---- connection strength -----------------------------------------------------------------------

constexpr int kMostStaged = 25;   // 5x5: of the kernels whose pairs a thread sums
constexpr int kPairsPerWarp = 8;  // of larger kernels
constexpr int kPairsByWarps = kWarps * kPairsPerWarp;

struct Layer {
  const float* weight;  // [pairs, kernel]
  std::int64_t pairs, kernel;
  std::int64_t first_out;
  std::int64_t first_block;
};
static_assert(sizeof(Table<Layer>) <= 4096);

__host__ __device__ constexpr int pairs_of_block(std::int64_t kernel) {
  return kernel <= kMostStaged ? kThreads : kPairsByWarps;
}

// A block sums kThreads pairs with small kernels, or kPairsByWarps with large ones.
__global__ void strengths_kernel(const __grid_constant__ Table<Layer> table,
                                 float* __restrict__ out) {
  __shared__ float staged[kThreads * kMostStaged];
  const std::int64_t block = table.items[0].first_block + blockIdx.x;
  const Layer& layer = holder(table, &Layer::first_block, block);
  const int most = pairs_of_block(layer.kernel);
  const std::int64_t first = (block - layer.first_block) * most;
  const std::int64_t left = layer.pairs - first;
  const int pairs = left < most ? static_cast<int>(left) : most;
  const float* __restrict__ weight = layer.weight + first * layer.kernel;
  out += layer.first_out + first;
  if (layer.kernel <= kMostStaged) {  // neighbours read neighbours, which a pair's floats are not
    const int kernel = static_cast<int>(layer.kernel), count = pairs * kernel;
#pragma unroll 8
    for (int i = threadIdx.x; i < count; i += kThreads) staged[i] = fabsf(weight[i]);
    __syncthreads();
    const int pair = threadIdx.x;
    if (pair >= pairs) return;
    float sum = 0;
    for (int k = 0; k < kernel; ++k) sum += staged[pair * kernel + k];
    out[pair] = sum;
    return;
  }
  const int lane = threadIdx.x % kWarp;
  for (int pair = threadIdx.x / kWarp; pair < pairs; pair += kWarps) {
    float sum = 0;
    for (std::int64_t k = lane; k < layer.kernel; k += kWarp) {
      sum += fabsf(weight[pair * layer.kernel + k]);
    }
    for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_xor_sync(kAll, sum, half);
    if (lane == 0) out[pair] = sum;
  }
}

// ---- choosing the strongest entries of matrices ------------------------------------------------

// A cut is the key of the weakest entry that a row or a column chooses; 0: all above the bar.
using Key = unsigned long long;

struct Matrix {
  const float* values;
  std::int64_t pitch;  // floats from a row to the next
  int rows, cols;
  std::int64_t first_row;    // among the rows of all matrices
  std::int64_t first_word;   // among the words of all rows' flags
  std::int64_t first_group;  // among the groups of a warp's columns
};
static_assert(sizeof(Table<Matrix>) <= 4096);

__host__ __device__ constexpr int words_of(int cols) { return (cols - 1) / kWarp + (cols > 0); }

// Numbers that sort as values do, at least 1; 0 for those not above the bar, NaN among them.
__device__ unsigned rank_of(float value, float bar) {
  constexpr unsigned sign = 0x80000000u;
  if (!(value > bar)) return 0;
  const unsigned bits = __float_as_uint(value + 0.0f);  // -0 and 0 are equal
  return bits & sign ? ~bits : bits | sign;
}

// Sorts by rank, among equals the lower index first.
__device__ Key key_of(unsigned rank, int index) {
  return static_cast<Key>(rank) << 32 | ~static_cast<unsigned>(index);
}

// Looks for the k-th highest of more than k ranks, which has so many lower bounds that
// it can be found by counting: count(rank >= low) >= k > count(rank > high) = above.
struct Bisection {
  unsigned low, high;
  int above;
  bool exact;  // count(rank >= low) == k

  __device__ bool open() const { return low < high && !exact; }
  __device__ unsigned middle() const { return low + (high - low + 1) / 2; }
  __device__ void narrow(int from_middle_on, int k) {
    if (from_middle_on >= k) {
      low = middle();
      exact = from_middle_on == k;
    } else {
      high = middle() - 1;
      above = from_middle_on;
    }
  }
};

__device__ int place_of_bit(unsigned word, int number) {  // its number-th set bit, from 1
  for (; number > 1; --number) word &= word - 1;
  return __ffs(word) - 1;
}

// The cut of a row, by a warp; the same in all lanes.
__device__ Key row_cut(const float* __restrict__ row, int cols, int k, float bar) {
  const int lane = threadIdx.x % kWarp;
  unsigned least = ~0u, most = 0;
  int count = 0;
#pragma unroll 4
  for (int c = lane; c < cols; c += kWarp) {
    const unsigned rank = rank_of(row[c], bar);
    least = min(least, rank - 1);  // 0 is no rank
    most = max(most, rank);
    count += rank > 0;
  }
  if (__reduce_add_sync(kAll, count) <= k) return 0;
  Bisection search{__reduce_min_sync(kAll, least) + 1, __reduce_max_sync(kAll, most), 0, false};
  while (search.open()) {
    const unsigned middle = search.middle();
    count = 0;
#pragma unroll 4
    for (int c = lane; c < cols; c += kWarp) count += rank_of(row[c], bar) >= middle;
    search.narrow(__reduce_add_sync(kAll, count), k);
  }
  const Key all_equals = static_cast<Key>(search.low) << 32;
  if (search.exact) return all_equals;
  int wanted = k - search.above;
  for (int first = 0; first < cols; first += kWarp) {
    const int c = first + lane;
    const bool equal = c < cols && rank_of(row[c], bar) == search.low;
    const unsigned equals = __ballot_sync(kAll, equal);
    if (__popc(equals) >= wanted) return key_of(search.low, first + place_of_bit(equals, wanted));
    wanted -= __popc(equals);
  }
  return all_equals;  // not reached: there are more than `wanted` equals
}

// What the warps of a block know of a warp's columns.
struct ColumnShare {
  unsigned words[kWarps][kWarp];

  // combine over the warps, for each lane.
  template <typename Combine>
  __device__ unsigned over_warps(unsigned mine, const Combine& combine) {
    const int lane = threadIdx.x % kWarp;
    __syncthreads();  // until the words before are read
    words[threadIdx.x / kWarp][lane] = mine;
    __syncthreads();
    unsigned all = words[0][lane];
    for (int warp = 1; warp < kWarps; ++warp) all = combine(all, words[warp][lane]);
    return all;
  }
};

struct Add {
  __device__ unsigned operator()(unsigned a, unsigned b) const { return a + b; }
};
struct Least {
  __device__ unsigned operator()(unsigned a, unsigned b) const { return a < b ? a : b; }
};
struct Most {
  __device__ unsigned operator()(unsigned a, unsigned b) const { return a > b ? a : b; }
};

// The cuts of columns that stand side by side, by a block: a lane a column, and the rows dealt out
// to the warps.
__device__ void cut_columns(const Matrix& matrix, std::int64_t group, int k, float bar,
                            ColumnShare& share, Key* __restrict__ cuts) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const std::int64_t column = group * kWarp + lane;
  const int each = (matrix.rows - 1) / kWarps + 1;
  const int first = min(warp * each, matrix.rows);
  const int last = column < matrix.cols ? min(first + each, matrix.rows) : first;
  const float* __restrict__ values = matrix.values + column;
  const std::int64_t pitch = matrix.pitch;

  unsigned least = ~0u, most = 0, count = 0;
#pragma unroll 4
  for (int r = first; r < last; ++r) {
    const unsigned rank = rank_of(values[r * pitch], bar);
    least = min(least, rank - 1);
    most = max(most, rank);
    count += rank > 0;
  }
  const bool many = share.over_warps(count, Add()) > static_cast<unsigned>(k);
  least = share.over_warps(least, Least());
  most = share.over_warps(most, Most());
  Bisection search{least + 1, most, 0, !many};
  while (__syncthreads_or(search.open())) {
    const unsigned middle = search.middle();
    count = 0;
    if (search.open()) {
#pragma unroll 4
      for (int r = first; r < last; ++r) count += rank_of(values[r * pitch], bar) >= middle;
    }
    const unsigned from_middle_on = share.over_warps(count, Add());
    if (search.open()) search.narrow(static_cast<int>(from_middle_on), k);
  }

  int equals = 0;
  if (!search.exact) {
    for (int r = first; r < last; ++r) equals += rank_of(values[r * pitch], bar) == search.low;
  }
  share.over_warps(equals, Add());
  if (search.exact) {
    if (warp == 0) cuts[lane] = many ? static_cast<Key>(search.low) << 32 : 0;
    return;
  }
  int wanted = k - search.above;  // of the equals, in the order of the warps
  for (int before = 0; before < warp; ++before) {
    wanted -= static_cast<int>(share.words[before][lane]);
  }
  if (wanted < 1 || wanted > equals) return;  // another warp has the last of them
  int r = first;
  for (; r < last; ++r) {
    wanted -= rank_of(values[r * pitch], bar) == search.low;
    if (wanted == 0) break;
  }
  cuts[lane] = key_of(search.low, r);
}

// The first `groups` blocks make the cuts of columns, the others those of rows, a warp a row.
__global__ void cuts_kernel(const __grid_constant__ Table<Matrix> table, std::int64_t groups,
                            std::int64_t last_row, int k, float bar, Key* __restrict__ row_cuts,
                            Key* __restrict__ column_cuts) {
  __shared__ ColumnShare share;
  if (blockIdx.x < groups) {
    const std::int64_t group = table.items[0].first_group + blockIdx.x;
    const Matrix& matrix = holder(table, &Matrix::first_group, group);
    cut_columns(matrix, group - matrix.first_group, k, bar, share, column_cuts + group * kWarp);
    return;
  }
  const std::int64_t row =
      table.items[0].first_row + (blockIdx.x - groups) * kWarps + threadIdx.x / kWarp;
  if (row >= last_row) return;
  const Matrix& matrix = holder(table, &Matrix::first_row, row);
  const float* values = matrix.values + (row - matrix.first_row) * matrix.pitch;
  const Key cut = row_cut(values, matrix.cols, k, bar);
  if (threadIdx.x % kWarp == 0) row_cuts[row] = cut;
}

// Flags of the entries that are chosen, and their number in each row; a warp a row.
// column_cuts: null if the matrices are symmetric.
__global__ void flags_kernel(const __grid_constant__ Table<Matrix> table, std::int64_t last_row,
                             float bar, const Key* __restrict__ row_cuts,
                             const Key* __restrict__ column_cuts, unsigned* __restrict__ flags,
                             std::int64_t* __restrict__ counts) {
  const std::int64_t row = table.items[0].first_row +
                           static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= last_row) return;
  const int lane = threadIdx.x % kWarp;
  const Matrix& matrix = holder(table, &Matrix::first_row, row);
  const int r = static_cast<int>(row - matrix.first_row), cols = matrix.cols;
  const float* __restrict__ values = matrix.values + r * matrix.pitch;
  const Key* __restrict__ cuts = column_cuts == nullptr ? row_cuts + matrix.first_row
                                                        : column_cuts + matrix.first_group * kWarp;
  const Key cut = row_cuts[row];
  flags += matrix.first_word + static_cast<std::int64_t>(r) * words_of(cols);
  int count = 0;
#pragma unroll 4
  for (int first = 0; first < cols; first += kWarp) {
    const int c = first + lane;
    bool chosen = false;
    if (c < cols) {
      const unsigned rank = rank_of(values[c], bar);
      chosen = rank > 0 && (key_of(rank, c) >= cut || key_of(rank, r) >= cuts[c]);
    }
    const unsigned word = __ballot_sync(kAll, chosen);
    if (lane == 0) flags[first / kWarp] = word;
    count += __popc(word);
  }
  if (lane == 0) counts[row] = count;
}

constexpr int kScanThreads = 1024;

// Turns the counts of rows into where each row's edges begin, and says where each matrix's do;
// one block. Goes on from bounds[first_matrix] unless this is the first table.
__global__ void scan_kernel(const __grid_constant__ Table<Matrix> table, std::int64_t first_matrix,
                            std::int64_t last_row, std::int64_t* __restrict__ counts,
                            std::int64_t* __restrict__ bounds) {
  __shared__ std::int64_t sums[kScanThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  std::int64_t before = first_matrix == 0 ? 0 : bounds[first_matrix];
  for (std::int64_t first = table.items[0].first_row; first < last_row; first += kScanThreads) {
    const std::int64_t row = first + threadIdx.x;
    const std::int64_t mine = row < last_row ? counts[row] : 0;
    std::int64_t sum = mine;  // of the warp up to this lane
    for (int step = 1; step < kWarp; step *= 2) {
      const std::int64_t other = __shfl_up_sync(kAll, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == kWarp - 1) sums[warp] = sum;
    __syncthreads();
    std::int64_t begin = before;
    for (int other = 0; other < kScanThreads / kWarp; ++other) {
      if (other == warp) begin = before;
      before += sums[other];
    }
    if (row < last_row) counts[row] = begin + sum - mine;
    __syncthreads();
  }
  const int matrix = threadIdx.x;
  if (matrix == 0 && first_matrix == 0) bounds[0] = 0;
  if (matrix >= table.count) return;
  const std::int64_t next = matrix + 1 < table.count ? table.items[matrix + 1].first_row : last_row;
  bounds[first_matrix + matrix + 1] = next < last_row ? counts[next] : before;
}

// Writes the chosen entries, a warp a row.
__global__ void write_kernel(const __grid_constant__ Table<Matrix> table, std::int64_t last_row,
                             const unsigned* __restrict__ flags,
                             const std::int64_t* __restrict__ offsets,
                             std::int64_t* __restrict__ rows, std::int64_t* __restrict__ cols,
                             float* __restrict__ values) {
  const std::int64_t row = table.items[0].first_row +
                           static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= last_row) return;
  const int lane = threadIdx.x % kWarp;
  const Matrix& matrix = holder(table, &Matrix::first_row, row);
  const std::int64_t r = row - matrix.first_row;
  const float* __restrict__ from = matrix.values + r * matrix.pitch;
  const int words = words_of(matrix.cols);
  flags += matrix.first_word + r * words;
  std::int64_t to = offsets[row];
  for (int w = 0; w < words; ++w) {
    const unsigned word = flags[w];
    if (word >> lane & 1u) {
      const std::int64_t place = to + __popc(word & ((1u << lane) - 1));
      const int c = w * kWarp + lane;
      rows[place] = r;
      cols[place] = c;
      values[place] = from[c];
    }
    to += __popc(word);
  }
}

// ---- cosine similarity -------------------------------------------------------------------------

constexpr int kTile = 64;  // rows and columns of similarities that a block makes
constexpr int kStep = 16;  // of the vectors' entries
constexpr int kSide = 4;   // rows and columns of a thread
static_assert(kTile * kTile == kThreads * kSide * kSide);
static_assert(kTile * kStep == kThreads * 4);  // a float4 a thread

// Vectors of length one [padded count, padded size] and their similarities [padded count]^2.
struct Vectors {
  const float* values;  // [count, size]
  int count, size;
  std::int64_t first_row;          // among the padded vectors of all
  std::int64_t units, similarity;  // where they begin
  std::int64_t first_tile;
};
static_assert(sizeof(Table<Vectors>) <= 4096);

__host__ __device__ constexpr std::int64_t padded_count(int count) {
  return blocks_of(count, kTile) * kTile;
}

// At least one step, so that vectors of size 0 can be told from others, too.
__host__ __device__ constexpr std::int64_t padded_size(int size) {
  return size == 0 ? kStep : blocks_of(size, kStep) * kStep;
}

// Scales vectors to length one, a warp a vector. Those of norm zero or not finite become NaN,
// padding becomes 0.
__global__ void units_kernel(const __grid_constant__ Table<Vectors> table, std::int64_t last_row,
                             float* __restrict__ units) {
  const std::int64_t row = table.items[0].first_row +
                           static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= last_row) return;
  const int lane = threadIdx.x % kWarp;
  const Vectors& vectors = holder(table, &Vectors::first_row, row);
  const std::int64_t n = row - vectors.first_row, padded = padded_size(vectors.size);
  const bool real = n < vectors.count;
  const int size = real ? vectors.size : 0;
  const float* __restrict__ from = vectors.values + n * vectors.size;
  float* __restrict__ to = units + vectors.units + n * padded;
  double square = 0;
#pragma unroll 4
  for (int d = lane; d < size; d += kWarp) square += static_cast<double>(from[d]) * from[d];
  for (int half = kWarp / 2; half > 0; half /= 2) square += __shfl_xor_sync(kAll, square, half);
  const bool usable = square > 0 && isfinite(square);
  const double inverse = usable ? 1 / sqrt(square) : 0;
  const float rest = usable || !real ? 0.0f : __uint_as_float(0x7fc00000u);
#pragma unroll 4
  for (int d = lane; d < padded; d += kWarp) {
    to[d] = usable && d < size ? static_cast<float>(from[d] * inverse) : rest;
  }
}

// A step's part of a tile's vectors, by entry: what the threads of a warp read stands together.
struct alignas(16) Strip {
  float entries[kStep][kTile + 4];
};

__device__ float4 load_strip(const float* __restrict__ units, std::int64_t padded) {
  const int row = threadIdx.x / 4, quad = threadIdx.x % 4;
  return *reinterpret_cast<const float4*>(units + row * padded + 4 * quad);
}

__device__ void store_strip(Strip& strip, const float4& loaded) {
  const int row = threadIdx.x / 4, quad = threadIdx.x % 4;
  strip.entries[4 * quad][row] = loaded.x;
  strip.entries[4 * quad + 1][row] = loaded.y;
  strip.entries[4 * quad + 2][row] = loaded.z;
  strip.entries[4 * quad + 3][row] = loaded.w;
}

__device__ float clamped(float cosine) {  // fminf and fmaxf would lose NaN
  return cosine > 1 ? 1.0f : cosine < -1 ? -1.0f : cosine;
}

// Similarities of the tiles on and above the diagonal, written both ways. Every pair is summed in
// the same order wherever it stands. NaN on the diagonal.
__global__ void __launch_bounds__(kThreads)
    similarity_kernel(const __grid_constant__ Table<Vectors> table,
                      const float* __restrict__ all_units, float* __restrict__ all_similarity) {
  __shared__ Strip strips[2][2];
  const std::int64_t block = table.items[0].first_tile + blockIdx.x;
  const Vectors& vectors = holder(table, &Vectors::first_tile, block);
  const std::int64_t pitch = padded_count(vectors.count), padded = padded_size(vectors.size);
  std::int64_t tile = block - vectors.first_tile, tile_row = 0;
  for (std::int64_t tiles = pitch / kTile; tile >= tiles - tile_row; ++tile_row) {
    tile -= tiles - tile_row;
  }
  const std::int64_t first = tile_row * kTile, second = (tile_row + tile) * kTile;
  const float* __restrict__ units = all_units + vectors.units;
  const float* __restrict__ one = units + first * padded;
  const float* __restrict__ other = units + second * padded;
  const int y = threadIdx.x / (kTile / kSide), x = threadIdx.x % (kTile / kSide);
  float sums[kSide][kSide] = {};
  store_strip(strips[0][0], load_strip(one, padded));
  store_strip(strips[0][1], load_strip(other, padded));
  __syncthreads();
  int now = 0;
  for (std::int64_t d = kStep; d <= padded; d += kStep) {
    float4 next_one{}, next_other{};
    if (d < padded) {  // on their way while the sums are made
      next_one = load_strip(one + d, padded);
      next_other = load_strip(other + d, padded);
    }
#pragma unroll
    for (int e = 0; e < kStep; ++e) {
      const float4 a = *reinterpret_cast<const float4*>(&strips[now][0].entries[e][kSide * y]);
      const float4 b = *reinterpret_cast<const float4*>(&strips[now][1].entries[e][kSide * x]);
      const float rows[kSide] = {a.x, a.y, a.z, a.w}, cols[kSide] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
#pragma unroll
        for (int j = 0; j < kSide; ++j) sums[i][j] = fmaf(rows[i], cols[j], sums[i][j]);
      }
    }
    if (d < padded) {
      now ^= 1;
      store_strip(strips[now][0], next_one);
      store_strip(strips[now][1], next_other);
      __syncthreads();
    }
  }
  const std::int64_t row = first + kSide * y, col = second + kSide * x;
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
      sums[i][j] = row + i == col + j ? __uint_as_float(0x7fc00000u) : clamped(sums[i][j]);
    }
  }
  float* __restrict__ similarity = all_similarity + vectors.similarity;
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
    *reinterpret_cast<float4*>(similarity + (row + i) * pitch + col) =
        make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
  }
  if (tile == 0) return;  // on the diagonal, whose tiles are whole
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
    *reinterpret_cast<float4*>(similarity + (col + j) * pitch + row) =
        make_float4(sums[0][j], sums[1][j], sums[2][j], sums[3][j]);
  }
}

// ---- tables ------------------------------------------------------------------------------------

// How much the items of a list take together.
struct Extent {
  std::int64_t rows = 0, words = 0, groups = 0;
};

struct VectorExtent {
  std::int64_t rows = 0, units = 0, similarity = 0, tiles = 0;
};

std::vector<Matrix> matrices_of(const std::vector<MatrixView>& given, Extent& extent) {
  std::vector<Matrix> matrices;
  matrices.reserve(given.size());
  for (const MatrixView& one : given) {
    const int rows = static_cast<int>(one.rows), cols = static_cast<int>(one.cols);
    matrices.push_back(
        {one.values, one.cols, rows, cols, extent.rows, extent.words, extent.groups});
    extent.rows += rows;
    extent.words += one.rows * words_of(cols);
    extent.groups += words_of(cols);
  }
  return matrices;
}

std::vector<Vectors> vectors_of(const std::vector<MatrixView>& given, VectorExtent& extent) {
  std::vector<Vectors> vectors;
  vectors.reserve(given.size());
  for (const MatrixView& one : given) {
    const int count = static_cast<int>(one.rows), size = static_cast<int>(one.cols);
    const std::int64_t padded = padded_count(count), tiles = padded / kTile;
    vectors.push_back(
        {one.values, count, size, extent.rows, extent.units, extent.similarity, extent.tiles});
    extent.rows += padded;
    extent.units += padded * padded_size(size);
    extent.similarity += padded * padded;
    extent.tiles += tiles * (tiles + 1) / 2;
  }
  return vectors;
}

// The similarities of vectors, which are symmetric: no cuts of columns.
std::vector<Matrix> similarities_of(const std::vector<Vectors>& vectors, const float* similarity,
                                    Extent& extent) {
  std::vector<Matrix> matrices;
  matrices.reserve(vectors.size());
  for (const Vectors& one : vectors) {
    matrices.push_back({similarity + one.similarity, padded_count(one.count), one.count, one.count,
                        extent.rows, extent.words, 0});
    extent.rows += one.count;
    extent.words += static_cast<std::int64_t>(one.count) * words_of(one.count);
  }
  return matrices;
}

// `start` of an item, or behind the last one the end of all.
template <typename Item>
std::int64_t start_of(const std::vector<Item>& items, std::size_t index, std::int64_t Item::*start,
                      std::int64_t end) {
  return index < items.size() ? items[index].*start : end;
}

void queue_similarities(const std::vector<Vectors>& vectors, const VectorExtent& extent,
                        float* units, float* similarity, cudaStream_t stream) {
  for_each_table(vectors, [&](const Table<Vectors>& table, std::size_t first, std::size_t last) {
    const std::int64_t last_row = start_of(vectors, last, &Vectors::first_row, extent.rows);
    const std::int64_t last_tile = start_of(vectors, last, &Vectors::first_tile, extent.tiles);
    const unsigned rows = grid_of(blocks_of(last_row - vectors[first].first_row, kWarps));
    const unsigned tiles = grid_of(last_tile - vectors[first].first_tile);
    if (rows == 0) return;
    units_kernel<<<rows, kThreads, 0, stream>>>(table, last_row, units);
    ONP_CUDA_CHECK(cudaGetLastError());
    similarity_kernel<<<tiles, kThreads, 0, stream>>>(table, units, similarity);
    ONP_CUDA_CHECK(cudaGetLastError());
  });
}

template <typename T>
T* part_of(void* scratch, std::int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(scratch) + offset);
}

template <typename T>
const T* part_of(const void* scratch, std::int64_t offset) {
  return reinterpret_cast<const T*>(static_cast<const char*>(scratch) + offset);
}

}  // namespace

void connection_strengths_cuda(int device, void* stream, const std::vector<LayerWeights>& layers,
                               float* out) {
  std::vector<Layer> items;
  items.reserve(layers.size());
  std::int64_t outs = 0, blocks = 0;
  for (const LayerWeights& layer : layers) {
    ONP_CHECK(layer.pairs >= 0 && layer.kernel >= 0,
              "connection_strength: sizes must not be negative, got [", layer.pairs, ", ",
              layer.kernel, "]");
    items.push_back({layer.weight, layer.pairs, layer.kernel, outs, blocks});
    outs += layer.pairs;
    blocks += blocks_of(layer.pairs, pairs_of_block(layer.kernel));
  }
  if (outs == 0) return;
  const DeviceGuard guard(device);
  for_each_table(items, [&](const Table<Layer>& table, std::size_t first, std::size_t last) {
    const std::int64_t end = start_of(items, last, &Layer::first_block, blocks);
    const unsigned grid = grid_of(end - items[first].first_block);
    if (grid == 0) return;
    strengths_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(table, out);
    ONP_CUDA_CHECK(cudaGetLastError());
  });
}

EdgeSelection::EdgeSelection(const std::vector<MatrixView>& given, bool similar, float bar,
                             std::int64_t k)
    : given_(given),
      similar_(similar),
      bar_(bar),
      k_(static_cast<int>(std::min<std::int64_t>(k, std::numeric_limits<int>::max()))) {
  const char* op = similar ? "similarity_edges" : "strongest_edges";
  ONP_CHECK(k >= 0, op, ": the number of edges must not be negative, got ", k);
  for (const MatrixView& one : given) {
    ONP_CHECK(std::min(one.rows, one.cols) >= 0 && std::max(one.rows, one.cols) <= kMostRows, op,
              ": sizes must be from 0 to ", kMostRows, ", got [", one.rows, ", ", one.cols, "]");
  }
  Extent extent;
  VectorExtent padded;
  if (similar) {
    similarities_of(vectors_of(given, padded), nullptr, extent);
  } else {
    matrices_of(given, extent);
  }
  constexpr std::int64_t line = 256;
  const auto take = [&](std::int64_t count, std::int64_t size) {
    const std::int64_t offset = parts_.bytes;
    parts_.bytes += blocks_of(count * size, line) * line;
    return offset;
  };
  parts_.row_cuts = take(extent.rows, sizeof(Key));
  parts_.column_cuts = take(extent.groups * kWarp, sizeof(Key));
  parts_.offsets = take(extent.rows, sizeof(std::int64_t));
  parts_.flags = take(extent.words, sizeof(unsigned));
  parts_.bounds = take(static_cast<std::int64_t>(given.size()) + 1, sizeof(std::int64_t));
  parts_.units = take(padded.units, sizeof(float));
  parts_.similarity = take(padded.similarity, sizeof(float));
}

EdgeSelection EdgeSelection::strongest(const std::vector<MatrixView>& strengths, std::int64_t k) {
  return EdgeSelection(strengths, false, 0.0f, k);
}

EdgeSelection EdgeSelection::similar(const std::vector<MatrixView>& vectors, float threshold,
                                     std::int64_t max_neighbours) {
  ONP_CHECK(threshold >= -1 && threshold <= 1,
            "similarity_edges: threshold must be in [-1, 1], got ", threshold);
  return EdgeSelection(vectors, true, std::nextafter(threshold, -2.0f), max_neighbours);
}

std::vector<std::int64_t> EdgeSelection::choose(int device, void* stream, void* scratch) const {
  std::vector<std::int64_t> bounds(given_.size() + 1, 0);
  if (given_.empty() || k_ == 0) return bounds;
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  Extent extent;
  std::vector<Matrix> matrices;
  if (similar_) {
    VectorExtent padded;
    auto* const similarity = part_of<float>(scratch, parts_.similarity);
    const std::vector<Vectors> vectors = vectors_of(given_, padded);
    queue_similarities(vectors, padded, part_of<float>(scratch, parts_.units), similarity, queue);
    matrices = similarities_of(vectors, similarity, extent);
  } else {
    matrices = matrices_of(given_, extent);
  }
  auto* const row_cuts = part_of<Key>(scratch, parts_.row_cuts);
  auto* const column_cuts = similar_ ? nullptr : part_of<Key>(scratch, parts_.column_cuts);
  auto* const flags = part_of<unsigned>(scratch, parts_.flags);
  auto* const offsets = part_of<std::int64_t>(scratch, parts_.offsets);
  auto* const bounds_there = part_of<std::int64_t>(scratch, parts_.bounds);
  for_each_table(matrices, [&](const Table<Matrix>& table, std::size_t first, std::size_t last) {
    const std::int64_t last_row = start_of(matrices, last, &Matrix::first_row, extent.rows);
    const std::int64_t last_group = start_of(matrices, last, &Matrix::first_group, extent.groups);
    const std::int64_t row_blocks = blocks_of(last_row - matrices[first].first_row, kWarps);
    const std::int64_t groups = last_group - matrices[first].first_group;
    if (row_blocks > 0) {
      cuts_kernel<<<grid_of(groups + row_blocks), kThreads, 0, queue>>>(
          table, groups, last_row, k_, bar_, row_cuts, column_cuts);
      ONP_CUDA_CHECK(cudaGetLastError());
      flags_kernel<<<grid_of(row_blocks), kThreads, 0, queue>>>(table, last_row, bar_, row_cuts,
                                                                column_cuts, flags, offsets);
      ONP_CUDA_CHECK(cudaGetLastError());
    }
    scan_kernel<<<1, kScanThreads, 0, queue>>>(table, static_cast<std::int64_t>(first), last_row,
                                               offsets, bounds_there);
    ONP_CUDA_CHECK(cudaGetLastError());
  });
  ONP_CUDA_CHECK(cudaMemcpyAsync(bounds.data(), bounds_there, bounds.size() * sizeof bounds[0],
                                 cudaMemcpyDeviceToHost, queue));
  ONP_CUDA_CHECK(cudaStreamSynchronize(queue));
  return bounds;
}

void EdgeSelection::write(int device, void* stream, const void* scratch, std::int64_t* rows,
                          std::int64_t* cols, float* values) const {
  if (given_.empty() || k_ == 0) return;
  const DeviceGuard guard(device);
  Extent extent;
  VectorExtent padded;
  const std::vector<Matrix> matrices =
      similar_ ? similarities_of(vectors_of(given_, padded),
                                 part_of<float>(scratch, parts_.similarity), extent)
               : matrices_of(given_, extent);
  for_each_table(matrices, [&](const Table<Matrix>& table, std::size_t first, std::size_t last) {
    const std::int64_t last_row = start_of(matrices, last, &Matrix::first_row, extent.rows);
    const std::int64_t blocks = blocks_of(last_row - matrices[first].first_row, kWarps);
    if (blocks == 0) return;
    write_kernel<<<grid_of(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        table, last_row, part_of<unsigned>(scratch, parts_.flags),
        part_of<std::int64_t>(scratch, parts_.offsets), rows, cols, values);
    ONP_CUDA_CHECK(cudaGetLastError());
  });
}

}  // namespace onp
