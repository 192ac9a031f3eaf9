#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "core/check.h"
#include "core/csr.h"
#include "core/message_passing.h"

namespace {

struct Graph {
  std::vector<std::int64_t> indptr, indices;

  onp::CsrView view() const {
    return {indptr.data(), indices.data(), static_cast<std::int64_t>(indptr.size()) - 1};
  }
};

Graph random_graph(std::int64_t nodes, std::int64_t most_per_row, std::mt19937& random) {
  Graph graph;
  graph.indptr.push_back(0);
  for (std::int64_t row = 0; row < nodes; ++row) {
    const std::int64_t edges = random() % (most_per_row + 1);
    for (std::int64_t e = 0; e < edges; ++e) graph.indices.push_back(random() % nodes);
    graph.indptr.push_back(static_cast<std::int64_t>(graph.indices.size()));
  }
  return graph;
}

template <typename T>
std::vector<T> random_values(std::int64_t size, std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::vector<T> values(size);
  for (T& value : values) value = static_cast<T>(normal(random));
  return values;
}

template <typename T>
bool close(const std::vector<T>& got, const std::vector<double>& expected, double tolerance) {
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (!(std::abs(got[i] - expected[i]) <= tolerance * (1 + std::abs(expected[i])))) return false;
  }
  return got.size() == expected.size();
}

template <typename T>
void test_sizes(std::int64_t batch, std::int64_t nodes, std::int64_t features, double tolerance) {
  std::mt19937 random(7);
  const Graph graph = random_graph(nodes, 9, random);
  const std::int64_t edges = graph.indptr.back();
  const auto x = random_values<T>(batch * nodes * features, random);
  const auto grad = random_values<T>(batch * nodes * features, random);
  const auto weight = random_values<T>(edges, random);

  std::vector<std::int64_t> t_indptr(nodes + 1), t_indices(edges), t_edge(edges);
  onp::csr_transpose(graph.view(), t_indptr.data(), t_indices.data(), t_edge.data());
  const onp::CsrView transposed{t_indptr.data(), t_indices.data(), nodes};

  std::vector<double> expected(x.size(), 0.0), expected_grad(edges, 0.0);
  std::vector<double> expected_x_grad(x.size(), 0.0);
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t row = 0; row < nodes; ++row) {
      for (std::int64_t e = graph.indptr[row]; e < graph.indptr[row + 1]; ++e) {
        for (std::int64_t d = 0; d < features; ++d) {
          const std::int64_t to = (b * nodes + row) * features + d;
          const std::int64_t from = (b * nodes + graph.indices[e]) * features + d;
          expected[to] += static_cast<double>(weight[e]) * x[from];
          expected_grad[e] += static_cast<double>(grad[to]) * x[from];
          expected_x_grad[from] += static_cast<double>(weight[e]) * grad[to];
        }
      }
    }
  }

  const T poison = std::numeric_limits<T>::quiet_NaN();
  std::vector<T> out(x.size(), poison), weight_grad(edges, poison);
  std::vector<T> x_grad(x.size(), poison), both_weight_grad(edges, poison);
  for (const int threads : {1, 2, 5}) {
    std::vector<T> out_now(x.size(), poison), weight_grad_now(edges, poison);
    onp::message_passing<T>(
        {graph.view(), batch, features, x.data(), weight.data(), out_now.data()}, threads);
    onp::message_passing_weight_grad<T>(
        {graph.view(), batch, features, grad.data(), x.data(), weight_grad_now.data()}, threads);
    std::vector<T> x_grad_now(x.size(), poison), both_now(edges, poison);
    onp::message_passing_gradients<T>({transposed, t_edge.data(), batch, features, grad.data(),
                                       x.data(), weight.data(), x_grad_now.data(), both_now.data()},
                                      threads);
    CHECK(close(x_grad_now, expected_x_grad, tolerance));
    CHECK(close(both_now, expected_grad, tolerance));
    CHECK(threads == 1 || (x_grad_now == x_grad && both_now == both_weight_grad));
    x_grad = x_grad_now;
    both_weight_grad = both_now;
    CHECK(close(out_now, expected, tolerance));
    CHECK(close(weight_grad_now, expected_grad, tolerance));
    CHECK(threads == 1 || (out_now == out && weight_grad_now == weight_grad));
    out = out_now;
    weight_grad = weight_grad_now;
  }
}

void test_bad_arguments() {
  const std::int64_t zero = 0;
  const onp::CsrView empty{&zero, nullptr, 0};
  CHECK_THROWS(onp::message_passing<float>({empty, 1, 1, nullptr, nullptr, nullptr}, 0),
               onp::Error);
  CHECK_THROWS(onp::message_passing<float>({empty, -1, 1, nullptr, nullptr, nullptr}, 1),
               onp::Error);
  onp::MessagePassingGradientsParams<float> none{};
  none.transposed = empty;
  onp::message_passing_gradients(none, 1);
  CHECK_THROWS(onp::message_passing_gradients(none, 0), onp::Error);
}

void test_transpose() {
  std::mt19937 random(3);
  const Graph graph = random_graph(40, 6, random);
  const std::int64_t nodes = 40, edges = graph.indptr.back();
  onp::csr_check(graph.view(), edges);
  CHECK_THROWS(onp::csr_check(graph.view(), edges + 1), onp::Error);
  std::vector<std::int64_t> t_indptr(nodes + 1), t_indices(edges), t_edge(edges);
  onp::csr_transpose(graph.view(), t_indptr.data(), t_indices.data(), t_edge.data());
  onp::csr_check({t_indptr.data(), t_indices.data(), nodes}, edges);
  std::vector<int> seen(edges, 0);
  for (std::int64_t node = 0; node < nodes; ++node) {
    for (std::int64_t slot = t_indptr[node]; slot < t_indptr[node + 1]; ++slot) {
      const std::int64_t edge = t_edge[slot], row = t_indices[slot];
      ++seen[edge];
      CHECK(graph.indices[edge] == node);
      CHECK(graph.indptr[row] <= edge && edge < graph.indptr[row + 1]);
    }
  }
  CHECK(seen == std::vector<int>(edges, 1));
}

}  // namespace

int main() {
  for (const std::int64_t features : {0, 1, 3, 8, 16, 23, 64, 65, 131}) {
    test_sizes<float>(2, 45, features, 1e-4);
    test_sizes<double>(2, 45, features, 1e-12);
  }
  test_sizes<float>(0, 5, 4, 1e-4);
  test_sizes<float>(3, 0, 4, 1e-4);
  test_sizes<float>(1, 1, 4, 1e-4);
  test_bad_arguments();
  test_transpose();
  return report();
}
