// pairwise.h in fusedloss._native.
#include "bindings.h"
#include "pairwise.h"

namespace {

fl_pairs make(int64_t rows, int64_t width, Address offsets, Address mask, int32_t dtype, double sigma, int32_t function,
              int32_t weight, double mu, double scale, int64_t k) {
  return {make_lists(rows, width, offsets, mask), dtype, function, weight, sigma, mu, scale, k};
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
      return fl_pair_losses(&p, pointer(scores), pointer(relevance), pointer(losses),
                            pointer(gradient), pointer<int64_t>(pairs));
    });
  });
  m.def("soft_positions", [](const P& p, Address scores, Address positions) {
    released([&] { return fl_soft_positions(&p, pointer(scores), pointer(positions)); });
  });
  m.def("soft_positions_backward", [](const P& p, Address scores, Address upstream, Address dscores) {
    released([&] {
      return fl_soft_positions_backward(&p, pointer(scores), pointer(upstream), pointer(dscores));
    });
  });
}
