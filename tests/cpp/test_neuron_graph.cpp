#include "core/neuron_graph.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "core/check.h"
#include "core/csr.h"

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Edges {
  std::vector<std::int64_t> rows, cols;
  std::vector<float> values;

  explicit Edges(std::int64_t capacity)
      : rows(capacity, -1), cols(capacity, -1), values(capacity, kNaN) {}

  onp::EdgeSink sink() {
    return {rows.data(), cols.data(), values.data(), static_cast<std::int64_t>(rows.size())};
  }
  void cut(std::int64_t count) {
    rows.resize(count);
    cols.resize(count);
    values.resize(count);
  }
  bool operator==(const Edges& other) const {
    return std::tie(rows, cols, values) == std::tie(other.rows, other.cols, other.values);
  }
  std::vector<std::pair<std::int64_t, std::int64_t>> pairs() const {
    std::vector<std::pair<std::int64_t, std::int64_t>> found;
    for (std::size_t e = 0; e < rows.size(); ++e) found.emplace_back(rows[e], cols[e]);
    return found;
  }
};

std::vector<float> random_values(std::int64_t size, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(size);
  for (float& value : values) value = normal(random);
  return values;
}

Edges strongest(const std::vector<float>& matrix, std::int64_t rows, std::int64_t cols,
                std::int64_t k, int threads) {
  Edges edges(rows * cols);
  edges.cut(onp::strongest_edges(matrix.data(), rows, cols, k, edges.sink(), threads));
  return edges;
}

Edges similar(const std::vector<float>& vectors, std::int64_t count, std::int64_t size,
              float threshold, std::int64_t most, int threads) {
  Edges edges(count * count);
  edges.cut(onp::similarity_edges(vectors.data(), count, size, threshold, most, edges.sink(),
                                  threads));
  return edges;
}

// Whether entry (r, c) is > 0 and fewer than k entries of its row or of its column come first.
bool belongs(const std::vector<float>& matrix, std::int64_t rows, std::int64_t cols,
             std::int64_t r, std::int64_t c, std::int64_t k) {
  const float value = matrix[r * cols + c];
  std::int64_t before_in_row = 0, before_in_col = 0;
  for (std::int64_t j = 0; j < cols; ++j) {
    const float other = matrix[r * cols + j];
    before_in_row += other > value || (other == value && j < c);
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    const float other = matrix[i * cols + c];
    before_in_col += other > value || (other == value && i < r);
  }
  return value > 0 && (before_in_row < k || before_in_col < k);
}

void test_strength() {
  for (const std::int64_t kernel : {0, 1, 4, 8, 9, 25, 49}) {
    const std::int64_t pairs = 8193;  // one more than a work item
    const auto weight = random_values(pairs * kernel, 5);
    std::vector<float> one(pairs, kNaN), three(pairs, kNaN);
    onp::connection_strength(weight.data(), pairs, kernel, one.data(), 1);
    onp::connection_strength(weight.data(), pairs, kernel, three.data(), 3);
    CHECK(one == three);
    for (std::int64_t p = 0; p < pairs; ++p) {
      double expected = 0;
      for (std::int64_t k = 0; k < kernel; ++k) expected += std::fabs(weight[p * kernel + k]);
      CHECK(std::fabs(one[p] - expected) <= 1e-5 * (1 + expected));
    }
  }
  onp::connection_strength(nullptr, 0, 9, nullptr, 2);
  CHECK_THROWS(onp::connection_strength(nullptr, -1, 9, nullptr, 2), onp::Error);
  CHECK_THROWS(onp::connection_strength(nullptr, 0, 9, nullptr, 0), onp::Error);
}

void test_strongest() {
  const std::pair<std::int64_t, std::int64_t> sizes[] = {{0, 3}, {3, 0}, {1, 1}, {17, 33}, {40, 5}};
  for (const auto& [rows, cols] : sizes) {
    auto matrix = random_values(rows * cols, 11);
    for (std::size_t i = 0; i < matrix.size(); i += 3) matrix[i] = std::round(matrix[i]);  // ties
    for (const std::int64_t k : {0, 1, 3, 50}) {
      const Edges edges = strongest(matrix, rows, cols, k, 1);
      CHECK(edges == strongest(matrix, rows, cols, k, 4));
      std::vector<std::pair<std::int64_t, std::int64_t>> expected;
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < cols; ++c) {
          if (belongs(matrix, rows, cols, r, c, k)) expected.emplace_back(r, c);
        }
      }
      CHECK(edges.pairs() == expected);
      for (std::size_t e = 0; e < edges.rows.size(); ++e)
        CHECK(edges.values[e] == matrix[edges.rows[e] * cols + edges.cols[e]]);
    }
  }
  CHECK(strongest({kNaN, 0.0f, -1.0f, kNaN}, 2, 2, 2, 1).rows.empty());
  Edges small(1);
  const std::vector<float> ones(4, 1.0f);
  CHECK_THROWS(onp::strongest_edges(ones.data(), 2, 2, 2, small.sink(), 1), onp::Error);
  CHECK_THROWS(onp::strongest_edges(ones.data(), 2, 2, -1, small.sink(), 1), onp::Error);
}

void test_similar() {
  for (const std::int64_t count : {0, 1, 3, 37, 70}) {
    const std::int64_t size = 19;
    const auto vectors = random_values(count * size, 3);
    const Edges all = similar(vectors, count, size, -1.0f, count, 1);
    CHECK(all == similar(vectors, count, size, -1.0f, count, 3));
    CHECK(static_cast<std::int64_t>(all.rows.size()) == count * (count - (count > 0)));
    for (std::size_t e = 0; e < all.rows.size(); ++e) {
      double ab = 0, aa = 0, bb = 0;
      for (std::int64_t d = 0; d < size; ++d) {
        const double a = vectors[all.rows[e] * size + d], b = vectors[all.cols[e] * size + d];
        ab += a * b;
        aa += a * a;
        bb += b * b;
      }
      CHECK(std::fabs(all.values[e] - ab / std::sqrt(aa * bb)) < 1e-5);
    }
    const Edges few = similar(vectors, count, size, 0.1f, 2, 2);
    const auto pairs = few.pairs();
    const std::set<std::pair<std::int64_t, std::int64_t>> found(pairs.begin(), pairs.end());
    for (std::size_t e = 0; e < few.rows.size(); ++e) {
      CHECK(few.values[e] >= 0.1f);
      CHECK(found.count({few.cols[e], few.rows[e]}) == 1);
    }
    CHECK(static_cast<std::int64_t>(few.rows.size()) <= 4 * count);
  }
  CHECK(similar({}, 3, 0, -1.0f, 2, 1).rows.empty());
  CHECK(similar({0, 0, 1, 1, kNaN, 1}, 3, 2, -1.0f, 2, 1).rows.empty());
  CHECK(similar({1, 2, 2, 4, 0, 0}, 3, 2, 0.999f, 2, 1).rows.size() == 2);
  CHECK_THROWS(similar({1, 2, 2, 4}, 2, 2, 1.5f, 2, 1), onp::Error);
  CHECK_THROWS(similar({1, 2, 2, 4}, 2, 2, kNaN, 2, 1), onp::Error);
  CHECK_THROWS(similar({1, 2, 2, 4}, 2, 2, 0.5f, -1, 1), onp::Error);
}

void test_csr() {
  const std::vector<std::int64_t> rows{2, 0, 2, 2, 0}, cols{1, 2, 0, 1, 0};
  const std::vector<float> values{1, 2, 3, 4, 5};
  std::vector<std::int64_t> indptr(4, -1), indices(5, -1);
  std::vector<float> summed(5, kNaN);
  const std::int64_t count = onp::csr_from_edges(3, 5, rows.data(), cols.data(), values.data(),
                                                 indptr.data(), indices.data(), summed.data());
  indices.resize(count);
  summed.resize(count);
  CHECK((indptr == std::vector<std::int64_t>{0, 2, 2, 4}));
  CHECK((indices == std::vector<std::int64_t>{0, 2, 0, 1}));
  CHECK((summed == std::vector<float>{5, 2, 3, 5}));
  CHECK_THROWS(onp::csr_from_edges(2, 5, rows.data(), cols.data(), values.data(), indptr.data(),
                                   indices.data(), summed.data()),
               onp::Error);
  std::int64_t empty = -1;
  CHECK(onp::csr_from_edges(0, 0, nullptr, nullptr, nullptr, &empty, nullptr, nullptr) == 0);
  CHECK(empty == 0);
}

}  // namespace

int main() {
  test_strength();
  test_strongest();
  test_similar();
  test_csr();
  return report();
}
