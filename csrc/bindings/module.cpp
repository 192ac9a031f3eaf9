// The only file that knows pybind11: conversions, GIL release, error mapping.
// Tensors arrive as addresses that the Python caller has validated and keeps alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/csr.h"
#include "core/masked_forward.h"
#include "core/masked_gradient.h"
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

// Calls run with a value of the type that torch calls `dtype`.
template <typename Run>
void with_type(const std::string& dtype, const Run& run) {
  if (dtype == "float32") return run(0.0f);
  if (dtype == "float64") return run(0.0);
  ONP_CHECK(dtype == "bfloat16",
            "message_passing: dtype must be float32, float64 or bfloat16, got ", dtype);
  run(onp::Bf16(0.0f));
}

void message_passing(const std::string& dtype, Address x, Address weight, Address indptr,
                     Address indices, Address out, std::int64_t batch, std::int64_t nodes,
                     std::int64_t features, int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    onp::message_passing<T>({csr_view(indptr, indices, nodes), batch, features, at<const T>(x),
                             at<const T>(weight), at<T>(out)},
                            threads);
  };
  py::gil_scoped_release release;
  with_type(dtype, run);
}

void message_passing_weight_grad(const std::string& dtype, Address grad, Address x, Address indptr,
                                 Address indices, Address weight_grad, std::int64_t batch,
                                 std::int64_t nodes, std::int64_t features, int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    onp::message_passing_weight_grad<T>({csr_view(indptr, indices, nodes), batch, features,
                                         at<const T>(grad), at<const T>(x), at<T>(weight_grad)},
                                        threads);
  };
  py::gil_scoped_release release;
  with_type(dtype, run);
}

void message_passing_gradients(const std::string& dtype, Address grad, Address x, Address weight,
                               Address t_indptr, Address t_indices, Address t_edge, Address x_grad,
                               Address weight_grad, std::int64_t batch, std::int64_t nodes,
                               std::int64_t features, int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    onp::message_passing_gradients<T>(
        {csr_view(t_indptr, t_indices, nodes), at<const std::int64_t>(t_edge), batch, features,
         at<const T>(grad), at<const T>(x), at<const T>(weight), at<T>(x_grad), at<T>(weight_grad)},
        threads);
  };
  py::gil_scoped_release release;
  with_type(dtype, run);
}

// ---- neuron graph ------------------------------------------------------------------------------

using Sizes = std::tuple<Address, std::int64_t, std::int64_t>;

std::vector<onp::LayerWeights> layer_weights(const std::vector<Sizes>& layers) {
  std::vector<onp::LayerWeights> given;
  given.reserve(layers.size());
  for (const auto& [weight, pairs, kernel] : layers) {
    given.push_back({at<const float>(weight), pairs, kernel});
  }
  return given;
}

std::vector<onp::MatrixView> matrix_views(const std::vector<Sizes>& matrices) {
  std::vector<onp::MatrixView> given;
  given.reserve(matrices.size());
  for (const auto& [values, rows, cols] : matrices) {
    given.push_back({at<const float>(values), rows, cols});
  }
  return given;
}

void connection_strengths(const std::vector<Sizes>& layers, const std::vector<Address>& out,
                          int threads) {
  py::gil_scoped_release release;
  std::vector<float*> places;
  for (Address address : out) places.push_back(at<float>(address));
  onp::connection_strengths(layer_weights(layers), places, threads);
}

onp::EdgeChoice edge_choice_strongest(const std::vector<Sizes>& strengths, std::int64_t k,
                                      int threads) {
  py::gil_scoped_release release;
  return onp::EdgeChoice::strongest(matrix_views(strengths), k, threads);
}

onp::EdgeChoice edge_choice_similar(const std::vector<Sizes>& vectors, float threshold,
                                    std::int64_t max_neighbours, int threads) {
  py::gil_scoped_release release;
  return onp::EdgeChoice::similar(matrix_views(vectors), threshold, max_neighbours, threads);
}

void edge_choice_write(const onp::EdgeChoice& choice, Address rows, Address cols, Address values,
                       int threads) {
  py::gil_scoped_release release;
  choice.write(at<std::int64_t>(rows), at<std::int64_t>(cols), at<float>(values), threads);
}

#ifdef ONP_WITH_CUDA
void connection_strengths_cuda(int device, Address stream, const std::vector<Sizes>& layers,
                               Address out) {
  py::gil_scoped_release release;
  onp::connection_strengths_cuda(device, at<void>(stream), layer_weights(layers), at<float>(out));
}

onp::EdgeSelection edge_selection_strongest(const std::vector<Sizes>& strengths, std::int64_t k) {
  return onp::EdgeSelection::strongest(matrix_views(strengths), k);
}

onp::EdgeSelection edge_selection_similar(const std::vector<Sizes>& vectors, float threshold,
                                          std::int64_t max_neighbours) {
  return onp::EdgeSelection::similar(matrix_views(vectors), threshold, max_neighbours);
}

std::vector<std::int64_t> edge_selection_choose(const onp::EdgeSelection& selection, int device,
                                                Address stream, Address scratch) {
  py::gil_scoped_release release;
  return selection.choose(device, at<void>(stream), at<void>(scratch));
}

void edge_selection_write(const onp::EdgeSelection& selection, int device, Address stream,
                          Address scratch, Address rows, Address cols, Address values) {
  py::gil_scoped_release release;
  selection.write(device, at<void>(stream), at<const void>(scratch), at<std::int64_t>(rows),
                  at<std::int64_t>(cols), at<float>(values));
}
#endif

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

using Pair = std::pair<std::int64_t, std::int64_t>;

const float* floats_at(std::uintptr_t address) { return reinterpret_cast<const float*>(address); }

using Shape = std::tuple<std::int64_t, std::int64_t, std::int64_t>;
using Constant = std::pair<std::int64_t, std::uintptr_t>;
using Range = std::tuple<std::int64_t, float, std::vector<float>>;

std::vector<onp::BufferShape> shapes_of(const std::vector<Shape>& buffers) {
  std::vector<onp::BufferShape> shapes;
  for (const auto& [channels, height, width] : buffers) shapes.push_back({channels, height, width});
  return shapes;
}

std::vector<onp::ConstantSpec> constants_of(const std::vector<Constant>& constants) {
  std::vector<onp::ConstantSpec> specs;
  for (const auto& [buffer, values] : constants) specs.push_back({buffer, floats_at(values)});
  return specs;
}

std::unique_ptr<onp::MaskedForwardPlan> masked_forward_plan(const std::vector<Shape>& buffers,
                                                            const std::vector<onp::StepSpec>& steps,
                                                            const std::vector<Constant>& constants,
                                                            std::int64_t output, std::int64_t sites,
                                                            const std::vector<Range>& ranges,
                                                            bool halves) {
  std::vector<onp::RangeSpec> specs;
  for (const auto& [buffer, lowest, highest] : ranges) specs.push_back({buffer, lowest, highest});
  return std::make_unique<onp::MaskedForwardPlan>(
      shapes_of(buffers), steps, constants_of(constants), output, sites, specs, halves);
}

onp::StepSpec masked_forward_step(int kind, std::int64_t input, Pair kernel, Pair stride,
                                  Pair padding, std::int64_t groups, bool count_include_pad,
                                  std::vector<std::int64_t> others, std::vector<std::int64_t> index,
                                  std::int64_t heads, float value, std::uintptr_t weight,
                                  std::uintptr_t bias, std::int64_t residual, int first,
                                  std::int64_t plain, std::uintptr_t scale, std::uintptr_t shift,
                                  int second, std::int64_t site_start, std::int64_t final) {
  onp::StepSpec step;
  step.kind = static_cast<onp::StepKind>(kind);
  step.input = input;
  std::tie(step.kernel_height, step.kernel_width) = kernel;
  std::tie(step.stride_height, step.stride_width) = stride;
  std::tie(step.pad_height, step.pad_width) = padding;
  step.groups = groups;
  step.count_include_pad = count_include_pad;
  step.others = std::move(others);
  step.index = std::move(index);
  step.heads = heads;
  step.value = value;
  step.weight = floats_at(weight);
  step.bias = floats_at(bias);
  step.residual = residual;
  step.first = static_cast<onp::Activation>(first);
  step.plain = plain;
  step.scale = floats_at(scale);
  step.shift = floats_at(shift);
  step.second = static_cast<onp::Activation>(second);
  step.site_start = site_start;
  step.final = final;
  return step;
}

void masked_forward_run(const onp::MaskedForwardPlan& plan, std::uintptr_t images,
                        std::int64_t count, std::uintptr_t masks, std::int64_t batch,
                        std::int64_t words, std::uintptr_t logits, bool share, int threads,
                        std::int64_t max_bytes, const std::string& isa) {
  onp::MaskedForwardRun run;
  run.images = floats_at(images);
  run.count = count;
  run.masks = {reinterpret_cast<const std::uint64_t*>(masks), batch, words};
  run.logits = reinterpret_cast<float*>(logits);
  run.share = share;
  run.threads = threads;
  run.max_bytes = max_bytes;
  run.isa = isa;
  py::gil_scoped_release release;
  plan.run(run);
}

std::vector<Range> masked_forward_ranges(const onp::MaskedForwardPlan& plan, std::uintptr_t images,
                                         std::int64_t count, std::uintptr_t masks,
                                         std::int64_t batch, std::int64_t words,
                                         const std::string& isa) {
  onp::MaskedForwardRun run{};
  run.images = floats_at(images);
  run.count = count;
  run.masks = {reinterpret_cast<const std::uint64_t*>(masks), batch, words};
  run.isa = isa;
  py::gil_scoped_release release;
  std::vector<Range> ranges;
  for (const onp::RangeSpec& one : plan.ranges(run)) {
    ranges.emplace_back(one.buffer, one.lowest, one.highest);
  }
  return ranges;
}

// ---- masked gradient ---------------------------------------------------------------------------

std::unique_ptr<onp::MaskedGradientPlan> masked_gradient_plan(
    const std::vector<Shape>& buffers, const std::vector<onp::StepSpec>& steps,
    const std::vector<Pair>& norms, const std::vector<Constant>& constants, std::int64_t output,
    std::int64_t sites, std::int64_t units) {
  std::vector<onp::NormUnits> norm_units;
  for (const auto& [result, scaled] : norms) norm_units.push_back({result, scaled});
  return std::make_unique<onp::MaskedGradientPlan>(shapes_of(buffers), steps, norm_units,
                                                   constants_of(constants), output, sites, units);
}

onp::MaskedGradientInput masked_gradient_input(Address images, std::int64_t count, Address gates,
                                               Address workspace, bool moments, int threads,
                                               const std::string& isa) {
  return {at<const float>(images),
          count,
          at<const float>(gates),
          at<float>(workspace),
          moments,
          threads,
          isa};
}

void masked_gradient_forward(const onp::MaskedGradientPlan& plan,
                             const onp::MaskedGradientInput& input, Address logits, Address mean,
                             Address variance) {
  py::gil_scoped_release release;
  plan.forward(input, {at<float>(logits), at<float>(mean), at<float>(variance)});
}

void masked_gradient_backward(const onp::MaskedGradientPlan& plan,
                              const onp::MaskedGradientInput& input, Address logits, Address slope,
                              Address offset, Address images, Address gates) {
  py::gil_scoped_release release;
  plan.backward(input, {at<const float>(logits), at<const float>(slope), at<const float>(offset),
                        at<float>(images), at<float>(gates)});
}

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
  m.def("message_passing_gradients", &message_passing_gradients);

  // ---- neuron graph
  m.def("connection_strengths", &connection_strengths);
  py::class_<onp::EdgeChoice>(m, "EdgeChoice")
      .def_static("strongest", &edge_choice_strongest)
      .def_static("similar", &edge_choice_similar)
      .def_property_readonly("bounds", &onp::EdgeChoice::bounds)
      .def("write", &edge_choice_write);
#ifdef ONP_WITH_CUDA
  m.def("connection_strengths_cuda", &connection_strengths_cuda);
  py::class_<onp::EdgeSelection>(m, "EdgeSelection")
      .def_static("strongest", &edge_selection_strongest)
      .def_static("similar", &edge_selection_similar)
      .def_property_readonly("scratch_bytes", &onp::EdgeSelection::scratch_bytes)
      .def("choose", &edge_selection_choose)
      .def("write", &edge_selection_write);
#endif
  m.def("csr_from_edges", &csr_from_edges);

  // ---- masked forward
  m.def("instruction_sets", &onp::instruction_sets);
  py::class_<onp::StepSpec>(m, "MaskedForwardStep")
      .def(py::init(&masked_forward_step), py::kw_only(), py::arg("kind"), py::arg("input"),
           py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("groups"),
           py::arg("count_include_pad"), py::arg("others"), py::arg("index"), py::arg("heads"),
           py::arg("value"), py::arg("weight"), py::arg("bias"), py::arg("residual"),
           py::arg("first"), py::arg("plain"), py::arg("scale"), py::arg("shift"),
           py::arg("second"), py::arg("site_start"), py::arg("final"));
  py::class_<onp::MaskedForwardPlan>(m, "MaskedForwardPlan")
      .def(py::init(&masked_forward_plan), py::arg("buffers"), py::arg("steps"),
           py::arg("constants"), py::arg("output"), py::arg("sites"), py::arg("ranges"),
           py::arg("halves"))
      .def_property_readonly("narrow_steps", &onp::MaskedForwardPlan::narrow_steps)
      .def("ranges", &masked_forward_ranges, py::kw_only(), py::arg("images"), py::arg("count"),
           py::arg("masks"), py::arg("batch"), py::arg("words"), py::arg("isa"))
      .def("least_bytes", &onp::MaskedForwardPlan::least_bytes, py::arg("share"))
      .def("run", &masked_forward_run, py::kw_only(), py::arg("images"), py::arg("count"),
           py::arg("masks"), py::arg("batch"), py::arg("words"), py::arg("logits"),
           py::arg("share"), py::arg("threads"), py::arg("max_bytes"), py::arg("isa"));

  // ---- masked gradient
  py::class_<onp::MaskedGradientInput>(m, "MaskedGradientInput")
      .def(py::init(&masked_gradient_input), py::kw_only(), py::arg("images"), py::arg("count"),
           py::arg("gates"), py::arg("workspace"), py::arg("moments"), py::arg("threads"),
           py::arg("isa"));
  py::class_<onp::MaskedGradientPlan>(m, "MaskedGradientPlan")
      .def(py::init(&masked_gradient_plan), py::arg("buffers"), py::arg("steps"), py::arg("norms"),
           py::arg("constants"), py::arg("output"), py::arg("sites"), py::arg("units"))
      .def("workspace_floats", &onp::MaskedGradientPlan::workspace_floats, py::arg("count"),
           py::arg("gated"), py::arg("moments"))
      .def("forward", &masked_gradient_forward, py::arg("input"), py::kw_only(), py::arg("logits"),
           py::arg("mean"), py::arg("variance"))
      .def("backward", &masked_gradient_backward, py::arg("input"), py::kw_only(),
           py::arg("logits"), py::arg("slope"), py::arg("offset"), py::arg("images"),
           py::arg("gates"));
}
