// laplace.h in fusedloss._native.
#include "bindings.h"
#include "laplace.h"

namespace {

fl_laplace make(int64_t rows, int64_t width, Address offsets, Address mask, Address alphas, int32_t dtype,
                bool descending) {
  return {make_lists(rows, width, offsets, mask), pointer<const double>(alphas), dtype, descending};
}

using Forward = int (*)(const fl_laplace*, const void*, void*, int32_t*);
using Backward = int (*)(const fl_laplace*, const void*, const int32_t*, const void*, void*, double*);

template <Forward function>
void forward(const fl_laplace& p, Address x, Address out, Address order) {
  released([&] { return function(&p, pointer(x), pointer(out), pointer<int32_t>(order)); });
}

template <Backward function>
void backward(const fl_laplace& p, Address x, Address order, Address g, Address dx, Address dalpha) {
  released([&] {
    return function(&p, pointer(x), pointer<int32_t>(order), pointer(g), pointer(dx), pointer<double>(dalpha));
  });
}

}  // namespace

// Defined here, called by bindings.cpp.
void add_laplace(py::module_& m) {
  using L = fl_laplace;
  py::class_<L>(m, "Laplace")
      .def(py::init(&make), py::arg("rows"), py::arg("width"), py::arg("offsets"), py::arg("mask"), py::arg("alphas"),
           py::arg("dtype"), py::arg("descending"));
  m.def("lapsum_rank", &forward<fl_lapsum_rank>);
  m.def("lapsum_rank_backward", &backward<fl_lapsum_rank_backward>);
  m.def("lapsum_sort", &forward<fl_lapsum_sort>);
  m.def("lapsum_sort_backward", &backward<fl_lapsum_sort_backward>);
  m.def("lapsum_top_k", [](const L& p, Address x, Address k, Address chosen, Address threshold) {
    released([&] {
      return fl_lapsum_top_k(&p, pointer(x), pointer<double>(k), pointer(chosen), pointer<double>(threshold));
    });
  });
  m.def("lapsum_top_k_backward", [](const L& p, Address x, Address k, Address threshold, Address g, Address dx,
                                    Address dk, Address dalpha) {
    released([&] {
      return fl_lapsum_top_k_backward(&p, pointer(x), pointer<double>(k), pointer<double>(threshold), pointer(g),
                                      pointer(dx), pointer<double>(dk), pointer<double>(dalpha));
    });
  });
}
