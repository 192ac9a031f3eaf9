// The only file that knows pybind11: conversions, GIL release, error mapping.
// Tensors arrive as addresses that the Python caller has validated and keeps alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/check.h"
#include "core/csr.h"
#include "core/message_passing.h"
#include "core/neuron_graph.h"
#ifdef ONP_WITH_CUDA
#include "cuda/neuron_graph.h"
#endif

namespace py = pybind11;

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// ---- message passing ---------------------------------------------------------------------------

onp::CsrView csr_view(Address indptr, Address indices, std::int64_t nodes) {
  return {at<const std::int64_t>(indptr), at<const std::int64_t>(indices), nodes};
}

void csr_check(Address indptr, Address indices, std::int64_t nodes, std::int64_t edges) {
  py::gil_scoped_release release;
  onp::csr_check(csr_view(indptr, indices, nodes), edges);
}

void csr_transpose(Address indptr, Address indices, std::int64_t nodes, Address t_indptr,
                   Address t_indices, Address t_edge) {
  py::gil_scoped_release release;
  onp::csr_transpose(csr_view(indptr, indices, nodes), at<std::int64_t>(t_indptr),
                     at<std::int64_t>(t_indices), at<std::int64_t>(t_edge));
}

void message_passing(bool float64, Address x, Address weight, Address indptr, Address indices,
                     Address out, std::int64_t batch, std::int64_t nodes, std::int64_t features,
                     int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    onp::message_passing<T>({csr_view(indptr, indices, nodes), batch, features, at<const T>(x),
                             at<const T>(weight), at<T>(out)},
                            threads);
  };
  py::gil_scoped_release release;
  float64 ? run(0.0) : run(0.0f);
}

void message_passing_weight_grad(bool float64, Address grad, Address x, Address indptr,
                                 Address indices, Address weight_grad, std::int64_t batch,
                                 std::int64_t nodes, std::int64_t features, int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    onp::message_passing_weight_grad<T>({csr_view(indptr, indices, nodes), batch, features,
                                         at<const T>(grad), at<const T>(x), at<T>(weight_grad)},
                                        threads);
  };
  py::gil_scoped_release release;
  float64 ? run(0.0) : run(0.0f);
}

// ---- neuron graph ------------------------------------------------------------------------------

void connection_strength(Address weight, std::int64_t pairs, std::int64_t kernel, Address out,
                         int threads) {
  py::gil_scoped_release release;
  onp::connection_strength(at<const float>(weight), pairs, kernel, at<float>(out), threads);
}

#ifdef ONP_WITH_CUDA
void connection_strength_cuda(int device, Address stream, Address weight, std::int64_t pairs,
                              std::int64_t kernel, Address out) {
  py::gil_scoped_release release;
  onp::connection_strength_cuda(device, at<void>(stream), at<const float>(weight), pairs, kernel,
                                at<float>(out));
}
#endif

onp::EdgeSink edge_sink(Address rows, Address cols, Address values, std::int64_t capacity) {
  return {at<std::int64_t>(rows), at<std::int64_t>(cols), at<float>(values), capacity};
}

std::int64_t strongest_edges(Address strength, std::int64_t rows, std::int64_t cols,
                             std::int64_t k, Address out_rows, Address out_cols,
                             Address out_values, std::int64_t capacity, int threads) {
  py::gil_scoped_release release;
  return onp::strongest_edges(at<const float>(strength), rows, cols, k,
                              edge_sink(out_rows, out_cols, out_values, capacity), threads);
}

std::int64_t similarity_edges(Address vectors, std::int64_t count, std::int64_t size,
                              float threshold, std::int64_t max_neighbours, Address out_rows,
                              Address out_cols, Address out_values, std::int64_t capacity,
                              int threads) {
  py::gil_scoped_release release;
  return onp::similarity_edges(at<const float>(vectors), count, size, threshold, max_neighbours,
                               edge_sink(out_rows, out_cols, out_values, capacity), threads);
}

std::int64_t csr_from_edges(std::int64_t nodes, std::int64_t edges, Address rows, Address cols,
                            Address values, Address out_indptr, Address out_indices,
                            Address out_values) {
  py::gil_scoped_release release;
  return onp::csr_from_edges(nodes, edges, at<const std::int64_t>(rows),
                             at<const std::int64_t>(cols), at<const float>(values),
                             at<std::int64_t>(out_indptr), at<std::int64_t>(out_indices),
                             at<float>(out_values));
}

// ---- masked forward ----------------------------------------------------------------------------

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const onp::Error& caught) {
      py::object type = py::module_::import("onp.errors").attr("NativeError");
      py::set_error(type, caught.what());
    }
  });

  // ---- build facts
#ifdef ONP_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif

  // ---- message passing
  m.def("csr_check", &csr_check);
  m.def("csr_transpose", &csr_transpose);
  m.def("message_passing", &message_passing);
  m.def("message_passing_weight_grad", &message_passing_weight_grad);

  // ---- neuron graph
  m.def("connection_strength", &connection_strength);
#ifdef ONP_WITH_CUDA
  m.def("connection_strength_cuda", &connection_strength_cuda);
#endif
  m.def("strongest_edges", &strongest_edges);
  m.def("similarity_edges", &similarity_edges);
  m.def("csr_from_edges", &csr_from_edges);

  // ---- masked forward
}
