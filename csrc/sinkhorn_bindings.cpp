// sinkhorn.h in fusedloss._native.
#include "bindings.h"
#include "sinkhorn.h"

namespace {

void neural_ndcg(int64_t rows, int64_t width, Address offsets, Address mask, int32_t dtype, double tau, int64_t k,
                 int64_t max_iterations, double tolerance, Address scores, Address gains, Address ndcg,
                 Address ideal, Address dscores) {
  const fl_neural_ndcg_options o = {make_lists(rows, width, offsets, mask),
                                    tau, tolerance, k, max_iterations, dtype};
  released([&] {
    return fl_neural_ndcg(&o, pointer(scores), pointer(gains), pointer(ndcg), pointer(ideal), pointer(dscores));
  });
}

}  // namespace

// Defined here, called by bindings.cpp.
void add_sinkhorn(py::module_& m) {
  m.def("neural_ndcg", &neural_ndcg, py::arg("rows"), py::arg("width"), py::arg("offsets"), py::arg("mask"),
        py::arg("dtype"), py::arg("tau"), py::arg("k"), py::arg("max_iterations"), py::arg("tolerance"),
        py::arg("scores"), py::arg("gains"), py::arg("ndcg"), py::arg("ideal"), py::arg("dscores"));
}
