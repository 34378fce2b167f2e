// pairwise.h in fusedloss._native. Pointers are plain integers, 0 for null.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "fusedloss.h"
#include "pairwise.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) { return reinterpret_cast<T*>(address); }

template <class Work>
void released(Work work) {
  int status;
  {
    py::gil_scoped_release free;
    status = work();
  }
  if (status) throw std::runtime_error(fl_error());
}

fl_pairs make(int64_t rows, int64_t width, Address offsets, Address mask, int32_t dtype, double sigma, int32_t function,
              int32_t weight, double mu, double scale, int64_t k) {
  return {{rows, width, pointer<const int64_t>(offsets), pointer<const uint8_t>(mask)}, dtype, function, weight, sigma,
          mu, scale, k};
}

}  // namespace

// Defined here, called by bindings.cpp.
void add_pairwise(py::module_& m) {
  using P = fl_pairs;
  py::class_<P>(m, "Pairs").def(py::init(&make), py::arg("rows"), py::arg("width"), py::arg("offsets"), py::arg("mask"),
                                py::arg("dtype"), py::arg("sigma"), py::arg("function") = 0, py::arg("weight") = 0,
                                py::arg("mu") = 0.0, py::arg("scale") = 1.0, py::arg("k") = 0);
  m.def("pair_losses", [](const P& p, Address scores, Address relevance, Address losses, Address gradient,
                          Address pairs) {
    released([&] {
      return fl_pair_losses(&p, pointer<void>(scores), pointer<void>(relevance), pointer<void>(losses),
                            pointer<void>(gradient), pointer<int64_t>(pairs));
    });
  });
  m.def("soft_positions", [](const P& p, Address scores, Address positions) {
    released([&] { return fl_soft_positions(&p, pointer<void>(scores), pointer<void>(positions)); });
  });
  m.def("soft_positions_backward", [](const P& p, Address scores, Address upstream, Address dscores) {
    released([&] {
      return fl_soft_positions_backward(&p, pointer<void>(scores), pointer<void>(upstream), pointer<void>(dscores));
    });
  });
}
