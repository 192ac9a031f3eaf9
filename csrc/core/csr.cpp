#include "core/csr.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "core/check.h"

namespace onp {
namespace {

// offsets[k + 1] = number of keys <= k, offsets[0] = 0
void count_offsets(const std::int64_t* keys, std::int64_t size, std::int64_t nodes,
                   std::int64_t* offsets) {
  std::fill(offsets, offsets + nodes + 1, 0);
  for (std::int64_t i = 0; i < size; ++i) ++offsets[keys[i] + 1];
  std::partial_sum(offsets, offsets + nodes + 1, offsets);
}

void check_range(const char* name, const std::int64_t* keys, std::int64_t size,
                 std::int64_t nodes) {
  for (std::int64_t i = 0; i < size; ++i) {
    ONP_CHECK(keys[i] >= 0 && keys[i] < nodes, "csr: ", name, " must be in [0, ", nodes, "), got ",
              keys[i], " at edge ", i);
  }
}

}  // namespace

std::int64_t csr_from_edges(std::int64_t nodes, std::int64_t edges, const std::int64_t* rows,
                            const std::int64_t* cols, const float* values, std::int64_t* out_indptr,
                            std::int64_t* out_indices, float* out_values) {
  ONP_CHECK(nodes >= 0 && edges >= 0, "csr_from_edges: sizes must not be negative, got ", nodes,
            " nodes and ", edges, " edges");
  check_range("rows", rows, edges, nodes);
  check_range("cols", cols, edges, nodes);

  // Stable counting sort by column, then by row.
  std::vector<std::int64_t> next(nodes + 1), by_column(edges), sorted(edges);
  count_offsets(cols, edges, nodes, next.data());
  for (std::int64_t e = 0; e < edges; ++e) by_column[next[cols[e]]++] = e;
  count_offsets(rows, edges, nodes, next.data());
  for (const std::int64_t e : by_column) sorted[next[rows[e]]++] = e;

  std::fill(out_indptr, out_indptr + nodes + 1, 0);
  std::int64_t count = 0, last_row = -1;
  for (const std::int64_t e : sorted) {
    if (rows[e] == last_row && cols[e] == out_indices[count - 1]) {
      out_values[count - 1] += values[e];
      continue;
    }
    last_row = rows[e];
    out_indices[count] = cols[e];
    out_values[count] = values[e];
    ++out_indptr[last_row + 1];
    ++count;
  }
  std::partial_sum(out_indptr, out_indptr + nodes + 1, out_indptr);
  return count;
}

void csr_check(const CsrView& graph, std::int64_t edges) {
  ONP_CHECK(graph.nodes >= 0, "csr: nodes must not be negative, got ", graph.nodes);
  ONP_CHECK(graph.indptr[0] == 0 && graph.indptr[graph.nodes] == edges,
            "csr: indptr must run from 0 to ", edges, ", got ", graph.indptr[0], " to ",
            graph.indptr[graph.nodes]);
  for (std::int64_t n = 0; n < graph.nodes; ++n) {
    ONP_CHECK(graph.indptr[n] <= graph.indptr[n + 1], "csr: indptr must not fall, got ",
              graph.indptr[n + 1], " after ", graph.indptr[n], " at node ", n);
  }
  check_range("indices", graph.indices, edges, graph.nodes);
}

void csr_transpose(const CsrView& graph, std::int64_t* t_indptr, std::int64_t* t_indices,
                   std::int64_t* t_edge) {
  count_offsets(graph.indices, graph.indptr[graph.nodes], graph.nodes, t_indptr);
  std::vector<std::int64_t> next(t_indptr, t_indptr + graph.nodes);
  for (std::int64_t row = 0; row < graph.nodes; ++row) {
    for (std::int64_t e = graph.indptr[row]; e < graph.indptr[row + 1]; ++e) {
      const std::int64_t slot = next[graph.indices[e]]++;
      t_indices[slot] = row;
      t_edge[slot] = e;
    }
  }
}

}  // namespace onp
