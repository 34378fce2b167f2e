// threshold.h in fusedloss._native.
#include "bindings.h"
#include "threshold.h"

namespace {

fl_threshold make(int32_t kind, int64_t rows, int64_t width, Address offsets, int32_t dtype, Address scores,
                  int64_t stride, int32_t out_dtype, Address out, int64_t out_stride) {
  return {make_lists(rows, width, offsets), kind, dtype, pointer<const void>(scores), stride,
          out_dtype, pointer(out), out_stride};
}

}  // namespace

// Defined here, called by bindings.cpp.
void add_threshold(py::module_& m) {
  using T = fl_threshold;
  py::class_<T>(m, "Threshold")
      .def(py::init(&make), py::arg("kind"), py::arg("rows"), py::arg("width"), py::arg("offsets"), py::arg("dtype"),
           py::arg("scores"), py::arg("stride"), py::arg("out_dtype"), py::arg("out"), py::arg("out_stride"));
  m.def("threshold_project", [](const T& t) { released([&] { return fl_threshold_project(&t); }); });
  m.def("threshold_loss", [](const T& t, Address target, Address factor, Address losses) {
    released([&] {
      return fl_threshold_loss(&t, pointer<int64_t>(target), pointer<double>(factor), pointer<double>(losses));
    });
  });
  m.def("threshold_backward",
        [](const T& t, Address g) { released([&] { return fl_threshold_backward(&t, pointer(g)); }); });
}
