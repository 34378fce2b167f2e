// running.h in fusedloss._native.
#include "bindings.h"
#include "running.h"

// Defined here, called by bindings.cpp.
void add_running(py::module_& m) {
  m.def("running_logsumexp", [](int64_t rows, int64_t width, Address offsets, int32_t dtype, Address x, Address phi) {
    const fl_lists lists = make_lists(rows, width, offsets);
    released([&] { return fl_running_logsumexp(&lists, dtype, pointer(x), pointer(phi)); });
  });
  m.def("running_logsumexp_backward", [](int64_t rows, int64_t width, Address offsets, int32_t dtype, Address x,
                                         Address phi, Address dphi, Address dx) {
    const fl_lists lists = make_lists(rows, width, offsets);
    released([&] {
      return fl_running_logsumexp_backward(&lists, dtype, pointer(x), pointer(phi), pointer(dphi), pointer(dx));
    });
  });
}
