// networks.h in fusedloss._native.
#include "bindings.h"
#include "networks.h"

namespace {

fl_network make(int64_t rows, int64_t wires, int64_t comparators, int64_t layers, Address low, Address high,
                Address first, int32_t dtype, int32_t distribution, double steepness, double art_lambda) {
  return {rows, wires, comparators, layers, pointer<const int32_t>(low), pointer<const int32_t>(high),
          pointer<const int64_t>(first), dtype, distribution, steepness, art_lambda};
}

}  // namespace

// Defined here, called by bindings.cpp.
void add_networks(py::module_& m) {
  using N = fl_network;
  py::class_<N>(m, "Network")
      .def(py::init(&make), py::arg("rows"), py::arg("wires"), py::arg("comparators"), py::arg("layers"), py::arg("low"),
           py::arg("high"), py::arg("first"), py::arg("dtype"), py::arg("distribution"), py::arg("steepness"),
           py::arg("art_lambda"));
  m.def("network_sort", [](const N& n, Address x, Address active, Address sorted, Address gaps) {
    released([&] { return fl_network_sort(&n, pointer(x), pointer<int64_t>(active), pointer(sorted), pointer(gaps)); });
  });
  m.def("network_sort_backward", [](const N& n, Address gaps, Address dsorted, Address dgaps, Address dx, Address db) {
    released([&] {
      return fl_network_sort_backward(&n, pointer(gaps), pointer(dsorted), pointer(dgaps), pointer(dx),
                                      pointer<double>(db));
    });
  });
  m.def("network_push", [](const N& n, Address gaps, Address v, int64_t stride, int64_t channels, bool transposed,
                           Address out) {
    released([&] { return fl_network_push(&n, pointer(gaps), pointer(v), stride, channels, transposed, pointer(out)); });
  });
  m.def("network_push_backward", [](const N& n, Address gaps, Address v, int64_t stride, int64_t channels,
                                    bool transposed, Address dout, Address dv, Address dgaps, Address db) {
    released([&] {
      return fl_network_push_backward(&n, pointer(gaps), pointer(v), stride, channels, transposed, pointer(dout),
                                      pointer(dv), pointer(dgaps), pointer<double>(db));
    });
  });
}
