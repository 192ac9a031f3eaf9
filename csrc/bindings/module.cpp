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
#include "core/masked_forward.h"

namespace py = pybind11;

// ---- message passing ---------------------------------------------------------------------------

// ---- neuron graph ------------------------------------------------------------------------------

// ---- masked forward ----------------------------------------------------------------------------

using Pair = std::pair<std::int64_t, std::int64_t>;

const float* floats_at(std::uintptr_t address) { return reinterpret_cast<const float*>(address); }

std::unique_ptr<onp::MaskedForwardPlan> masked_forward_plan(
    const std::vector<std::tuple<std::int64_t, std::int64_t, std::int64_t>>& buffers,
    const std::vector<onp::StepSpec>& steps, std::int64_t output, std::int64_t sites) {
  std::vector<onp::BufferShape> shapes;
  for (const auto& [channels, height, width] : buffers) shapes.push_back({channels, height, width});
  return std::make_unique<onp::MaskedForwardPlan>(std::move(shapes), steps, output, sites);
}

onp::StepSpec masked_forward_step(int kind, std::int64_t input, Pair kernel, Pair stride,
                                  Pair padding, std::int64_t groups, bool count_include_pad,
                                  std::uintptr_t weight, std::uintptr_t bias,
                                  std::int64_t residual, int first, std::int64_t plain,
                                  std::uintptr_t scale, std::uintptr_t shift, int second,
                                  std::int64_t site_start, std::int64_t final) {
  onp::StepSpec step;
  step.kind = static_cast<onp::StepKind>(kind);
  step.input = input;
  std::tie(step.kernel_height, step.kernel_width) = kernel;
  std::tie(step.stride_height, step.stride_width) = stride;
  std::tie(step.pad_height, step.pad_width) = padding;
  step.groups = groups;
  step.count_include_pad = count_include_pad;
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

  // ---- neuron graph

  // ---- masked forward
  m.def("instruction_sets", &onp::instruction_sets);
  py::class_<onp::StepSpec>(m, "MaskedForwardStep")
      .def(py::init(&masked_forward_step), py::kw_only(), py::arg("kind"), py::arg("input"),
           py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("groups"),
           py::arg("count_include_pad"), py::arg("weight"), py::arg("bias"), py::arg("residual"),
           py::arg("first"), py::arg("plain"), py::arg("scale"), py::arg("shift"),
           py::arg("second"), py::arg("site_start"), py::arg("final"));
  py::class_<onp::MaskedForwardPlan>(m, "MaskedForwardPlan")
      .def(py::init(&masked_forward_plan), py::arg("buffers"), py::arg("steps"), py::arg("output"),
           py::arg("sites"))
      .def("least_bytes", &onp::MaskedForwardPlan::least_bytes, py::arg("share"))
      .def("run", &masked_forward_run, py::kw_only(), py::arg("images"), py::arg("count"),
           py::arg("masks"), py::arg("batch"), py::arg("words"), py::arg("logits"),
           py::arg("share"), py::arg("threads"), py::arg("max_bytes"), py::arg("isa"));
}
