// sinkhorn.h in fusedloss._native. Pointers are plain integers, 0 for null.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "sinkhorn.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

void neural_ndcg(int64_t rows, int64_t width, uintptr_t offsets, uintptr_t mask, int32_t dtype, double tau, int64_t k,
                 int64_t max_iterations, double tolerance, uintptr_t scores, uintptr_t gains, uintptr_t ndcg,
                 uintptr_t ideal, uintptr_t dscores) {
  const fl_neural_ndcg_options o = {{rows, width, pointer<const int64_t>(offsets), pointer<const uint8_t>(mask)},
                                    tau, tolerance, k, max_iterations, dtype};
  int status;
  {
    py::gil_scoped_release free;
    status = fl_neural_ndcg(&o, pointer<void>(scores), pointer<void>(gains), pointer<void>(ndcg), pointer<void>(ideal),
                            pointer<void>(dscores));
  }
  if (status) throw std::runtime_error(fl_error());
}

}  // namespace

// Defined here, called by bindings.cpp.
void add_sinkhorn(py::module_& m) {
  m.def("neural_ndcg", &neural_ndcg, py::arg("rows"), py::arg("width"), py::arg("offsets"), py::arg("mask"),
        py::arg("dtype"), py::arg("tau"), py::arg("k"), py::arg("max_iterations"), py::arg("tolerance"),
        py::arg("scores"), py::arg("gains"), py::arg("ndcg"), py::arg("ideal"), py::arg("dscores"));
}
