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
#include "core/masked_forward.h"
#include "core/neuron_graph.h"

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Edges {
  std::vector<std::int64_t> bounds, rows, cols;
  std::vector<float> values;

  Edges(const onp::EdgeChoice& choice, int threads)
      : bounds(choice.bounds()),
        rows(bounds.back(), -1),
        cols(bounds.back(), -1),
        values(bounds.back(), kNaN) {
    choice.write(rows.data(), cols.data(), values.data(), threads);
  }
  bool operator==(const Edges& other) const {
    return std::tie(bounds, rows, cols, values) ==
           std::tie(other.bounds, other.rows, other.cols, other.values);
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
                std::int64_t k, int threads, const std::string& isa = "auto") {
  return {onp::EdgeChoice::strongest({{matrix.data(), rows, cols}}, k, threads, isa), threads};
}

Edges similar(const std::vector<float>& vectors, std::int64_t count, std::int64_t size,
              float threshold, std::int64_t most, int threads, const std::string& isa = "auto") {
  return {onp::EdgeChoice::similar({{vectors.data(), count, size}}, threshold, most, threads, isa),
          threads};
}

// Whether entry (r, c) is > 0 and fewer than k entries of its row or of its column come first.
bool belongs(const std::vector<float>& matrix, std::int64_t rows, std::int64_t cols, std::int64_t r,
             std::int64_t c, std::int64_t k) {
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

void test_strength(const std::string& isa) {
  for (const std::int64_t kernel : {0, 1, 2, 4, 8, 9, 16, 25, 49}) {
    const std::int64_t pairs = 8193, few = 37;  // one more than a work item, and a second layer
    auto weight = random_values((pairs + few) * kernel, 5);
    const std::vector<onp::LayerWeights> layers{{weight.data(), pairs, kernel},
                                                {weight.data() + pairs * kernel, few, kernel}};
    std::vector<float> one(pairs + few, kNaN), three(pairs + few, kNaN);
    onp::connection_strengths(layers, {one.data(), one.data() + pairs}, 1, isa);
    onp::connection_strengths(layers, {three.data(), three.data() + pairs}, 3, isa);
    CHECK(one == three);
    for (std::int64_t p = 0; p < pairs + few; ++p) {
      double expected = 0;
      for (std::int64_t k = 0; k < kernel; ++k) expected += std::fabs(weight[p * kernel + k]);
      CHECK(std::fabs(one[p] - expected) <= 1e-5 * (1 + expected));
    }
    // Equal pairs have equal strengths, wherever they stand.
    std::vector<float> equal((pairs + few) * kernel), all(pairs + few, kNaN);
    for (std::int64_t i = 0; i < (pairs + few) * kernel; ++i)
      equal[i] = .1f + i % std::max<std::int64_t>(kernel, 1);
    onp::connection_strengths({{equal.data(), pairs + few, kernel}}, {all.data()}, 2, isa);
    CHECK(all == std::vector<float>(pairs + few, all[0]));
    if (kernel == 0) continue;
    weight[40 * kernel] = kNaN;  // spoils its own pair alone
    onp::connection_strengths(layers, {three.data(), three.data() + pairs}, 1, isa);
    for (std::int64_t p = 0; p < pairs; ++p)
      CHECK(p == 40 ? three[p] != three[p] : three[p] == one[p]);
  }
  onp::connection_strengths({{nullptr, 0, 9}}, {nullptr}, 2, isa);
  onp::connection_strengths({}, {}, 2, isa);
  CHECK_THROWS(onp::connection_strengths({{nullptr, -1, 9}}, {nullptr}, 2, isa), onp::Error);
  CHECK_THROWS(onp::connection_strengths({{nullptr, 0, 9}}, {nullptr}, 0, isa), onp::Error);
  CHECK_THROWS(onp::connection_strengths({{nullptr, 0, 9}}, {}, 1, isa), onp::Error);
}

void test_strongest(const std::string& isa) {
  const std::pair<std::int64_t, std::int64_t> sizes[] = {{0, 3},  {3, 0},    {1, 1},  {17, 33},
                                                         {40, 5}, {70, 131}, {16, 64}};
  for (const auto& [rows, cols] : sizes) {
    auto matrix = random_values(rows * cols, 11);
    for (std::size_t i = 0; i < matrix.size(); i += 3) matrix[i] = std::round(matrix[i]);  // ties
    for (std::size_t i = 0; i < matrix.size(); i += 29) matrix[i] = kNaN;
    for (const std::int64_t k : {0, 1, 3, 12, 13, 50, 1000}) {
      const Edges edges = strongest(matrix, rows, cols, k, 1, isa);
      CHECK(edges == strongest(matrix, rows, cols, k, 4, isa));
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
  CHECK(strongest({kNaN, 0.0f, -1.0f, kNaN}, 2, 2, 2, 1, isa).rows.empty());
  constexpr float huge = std::numeric_limits<float>::infinity();
  constexpr float tiny = std::numeric_limits<float>::denorm_min();
  CHECK(strongest({huge, huge, tiny, -0.0f}, 1, 4, 1, 1, isa).rows.size() == 3);  // by column
  const std::vector<float> equal(40 * 40, 1.0f);
  for (const auto& [r, c] : strongest(equal, 40, 40, 2, 2, isa).pairs()) CHECK(r < 2 || c < 2);
  const std::vector<float> ones(4, 1.0f);
  CHECK_THROWS(strongest(ones, 2, 2, -1, 1, isa), onp::Error);
  CHECK_THROWS(strongest(ones, 2, 2, 1, 0, isa), onp::Error);
}

void test_many() {
  const auto first = random_values(20 * 30, 1), second = random_values(7 * 9, 2);
  const std::vector<onp::MatrixView> both{
      {first.data(), 20, 30}, {nullptr, 0, 4}, {second.data(), 7, 9}};
  const Edges edges(onp::EdgeChoice::strongest(both, 2, 2), 2);
  const Edges of_first = strongest(first, 20, 30, 2, 1), of_second = strongest(second, 7, 9, 2, 1);
  const std::int64_t count = static_cast<std::int64_t>(of_first.rows.size());
  const std::int64_t all = count + static_cast<std::int64_t>(of_second.rows.size());
  CHECK((edges.bounds == std::vector<std::int64_t>{0, count, count, all}));
  const auto expected = [&](std::int64_t e, const auto& part) {
    return e < count ? (of_first.*part)[e] : (of_second.*part)[e - count];
  };
  for (std::int64_t e = 0; e < all; ++e) {
    CHECK(edges.rows[e] == expected(e, &Edges::rows));
    CHECK(edges.cols[e] == expected(e, &Edges::cols));
    CHECK(edges.values[e] == expected(e, &Edges::values));
  }
  CHECK(
      (Edges(onp::EdgeChoice::similar({}, 0.5f, 2, 1), 1).bounds == std::vector<std::int64_t>{0}));
}

void test_similar(const std::string& isa) {
  for (const std::int64_t count : {0, 1, 3, 37, 70, 550}) {
    const std::int64_t size = count == 70 ? 147 : 19;  // more than is summed at a time
    const auto vectors = random_values(count * size, 3);
    const Edges all = similar(vectors, count, size, -1.0f, count, 1, isa);
    CHECK(all == similar(vectors, count, size, -1.0f, count, 3, isa));
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
    const Edges few = similar(vectors, count, size, 0.1f, 2, 2, isa);
    const auto pairs = few.pairs();
    const std::set<std::pair<std::int64_t, std::int64_t>> found(pairs.begin(), pairs.end());
    for (std::size_t e = 0; e < few.rows.size(); ++e) {
      CHECK(few.values[e] >= 0.1f);
      CHECK(found.count({few.cols[e], few.rows[e]}) == 1);
    }
    CHECK(static_cast<std::int64_t>(few.rows.size()) <= 4 * count);
  }
  CHECK(similar({}, 3, 0, -1.0f, 2, 1, isa).rows.empty());
  CHECK(similar({0, 0, 1, 1, kNaN, 1}, 3, 2, -1.0f, 2, 1, isa).rows.empty());
  CHECK(similar({1, 2, 2, 4, 0, 0}, 3, 2, 0.999f, 2, 1, isa).rows.size() == 2);
  // Lengths beyond what a float's inverse can say.
  CHECK(similar({1e-42f, 2e-42f, 1e38f, 2e38f}, 2, 2, 0.99f, 2, 1, isa).rows.size() == 2);
  CHECK_THROWS(similar({1, 2, 2, 4}, 2, 2, 1.5f, 2, 1, isa), onp::Error);
  CHECK_THROWS(similar({1, 2, 2, 4}, 2, 2, kNaN, 2, 1, isa), onp::Error);
  CHECK_THROWS(similar({1, 2, 2, 4}, 2, 2, 0.5f, -1, 1, isa), onp::Error);
  CHECK_THROWS(similar({1, 2, 2, 4}, 2, 2, 0.5f, 1, 1, "mmx"), onp::Error);
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
  for (const std::string& isa : onp::instruction_sets()) {
    test_strength(isa);
    test_strongest(isa);
    test_similar(isa);
  }
  test_many();
  test_csr();
  return report();
}
