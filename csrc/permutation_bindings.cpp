// permutation.h in fusedloss._native.
#include "bindings.h"
#include "permutation.h"

namespace {

fl_permutation make(int64_t rows, int64_t width, Address offsets, Address counts, Address tau, int64_t columns,
                    int32_t dtype, int32_t relaxation) {
  return {make_lists(rows, width, offsets), pointer<const int64_t>(counts),
          pointer<const double>(tau), columns, dtype, relaxation};
}

void order(int64_t rows, int64_t width, Address offsets, Address mask, int32_t dtype, Address scores, Address index) {
  const fl_lists lists = make_lists(rows, width, offsets, mask);
  released([&] { return fl_permutation_order(&lists, dtype, pointer(scores), pointer<int64_t>(index)); });
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
      return fl_permutation_product(&p, pointer(t), pointer(v), pointer(y), pointer(rest), pointer(deviation));
    });
  });
  m.def("permutation_transposed", [](const P& p, Address t, Address rest, Address u, Address x) {
    released([&] {
      return fl_permutation_transposed(&p, pointer(t), pointer(rest), pointer(u), pointer(x));
    });
  });
  m.def("permutation_gradient", [](const P& p, Address t, Address rest, Address u, Address v, Address deviation,
                                   Address dt, Address dtau, Address x) {
    released([&] {
      return fl_permutation_gradient(&p, pointer(t), pointer(rest), pointer(u), pointer(v),
                                     pointer(deviation), pointer(dt), pointer<double>(dtau),
                                     pointer(x));
    });
  });
}
