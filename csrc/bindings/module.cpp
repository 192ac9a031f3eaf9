// The only file that knows pybind11: conversions, GIL release, error mapping.
// Tensors arrive as addresses that the Python caller has validated and keeps alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/check.h"

namespace py = pybind11;

// ---- message passing ---------------------------------------------------------------------------

// ---- neuron graph ------------------------------------------------------------------------------

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

  // ---- neuron graph

  // ---- masked forward
}
