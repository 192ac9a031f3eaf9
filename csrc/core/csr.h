// Building graphs in compressed sparse rows.
#pragma once

#include <cstdint>

#include "core/views.h"

namespace onp {

// Sorts edges (rows[e], cols[e]) with their values by (row, column) into a CSR graph. The values
// of an edge given several times are added in the order given. Returns the number of distinct
// edges M <= edges; out_indices and out_values hold that many. Rows and columns outside
// [0, nodes) are refused.
std::int64_t csr_from_edges(std::int64_t nodes, std::int64_t edges,
                            const std::int64_t* rows,   // [edges]
                            const std::int64_t* cols,   // [edges]
                            const float* values,        // [edges]
                            std::int64_t* out_indptr,   // [nodes + 1]
                            std::int64_t* out_indices,  // [edges], the first M filled
                            float* out_values);         // [edges], the first M filled

// Checks a graph given by a caller: indptr rises from 0 to edges, every index is in [0, nodes).
void csr_check(const CsrView& graph, std::int64_t edges);

// The graph with every edge turned round, its rows in ascending order of the original row.
// t_edge[s] is the number, in the original graph, of the edge in transposed slot s.
void csr_transpose(const CsrView& graph,
                   std::int64_t* t_indptr,   // [nodes + 1]
                   std::int64_t* t_indices,  // [E]
                   std::int64_t* t_edge);    // [E]

}  // namespace onp
