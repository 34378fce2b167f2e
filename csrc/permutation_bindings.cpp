// permutation.h in fusedloss._native. Pointers are plain integers, 0 for null.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "permutation.h"

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

fl_permutation make(int64_t rows, int64_t width, Address offsets, Address counts, Address tau, int64_t columns,
                    int32_t dtype, int32_t relaxation) {
  return {{rows, width, pointer<const int64_t>(offsets), nullptr}, pointer<const int64_t>(counts),
          pointer<const double>(tau), columns, dtype, relaxation};
}

void order(int64_t rows, int64_t width, Address offsets, Address mask, int32_t dtype, Address scores, Address index) {
  const fl_lists lists = {rows, width, pointer<const int64_t>(offsets), pointer<const uint8_t>(mask)};
  released([&] { return fl_permutation_order(&lists, dtype, pointer<void>(scores), pointer<int64_t>(index)); });
}

}  // namespace

// Defined here, called by bindings.cpp.
void add_permutation(py::module_& m) {
  using P = fl_permutation;
  py::class_<P>(m, "Permutation")
      .def(py::init(&make), py::arg("rows"), py::arg("width"), py::arg("offsets"), py::arg("counts"), py::arg("tau"),
           py::arg("columns"), py::arg("dtype"), py::arg("relaxation"));
  m.def("permutation_order", &order);
  m.def("permutation_product", [](const P& p, Address t, Address v, Address y, Address rest, Address deviation) {
    released([&] {
      return fl_permutation_product(&p, pointer<void>(t), pointer<void>(v), pointer<void>(y), pointer<void>(rest),
                                    pointer<void>(deviation));
    });
  });
  m.def("permutation_transposed", [](const P& p, Address t, Address rest, Address u, Address x) {
    released([&] {
      return fl_permutation_transposed(&p, pointer<void>(t), pointer<void>(rest), pointer<void>(u), pointer<void>(x));
    });
  });
  m.def("permutation_gradient", [](const P& p, Address t, Address rest, Address u, Address v, Address deviation,
                                   Address dt, Address dtau, Address x) {
    released([&] {
      return fl_permutation_gradient(&p, pointer<void>(t), pointer<void>(rest), pointer<void>(u), pointer<void>(v),
                                     pointer<void>(deviation), pointer<void>(dt), pointer<double>(dtau),
                                     pointer<void>(x));
    });
  });
}
