// running.h in fusedloss._native. Pointers are plain integers, 0 for null.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "running.h"

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

}  // namespace

// Defined here, called by bindings.cpp.
void add_running(py::module_& m) {
  m.def("running_logsumexp", [](int64_t rows, int64_t width, Address offsets, int32_t dtype, Address x, Address phi) {
    const fl_lists lists = {rows, width, pointer<const int64_t>(offsets), nullptr};
    released([&] { return fl_running_logsumexp(&lists, dtype, pointer<void>(x), pointer<void>(phi)); });
  });
  m.def("running_logsumexp_backward", [](int64_t rows, int64_t width, Address offsets, int32_t dtype, Address x,
                                         Address phi, Address dphi, Address dx) {
    const fl_lists lists = {rows, width, pointer<const int64_t>(offsets), nullptr};
    released([&] {
      return fl_running_logsumexp_backward(&lists, dtype, pointer<void>(x), pointer<void>(phi), pointer<void>(dphi),
                                           pointer<void>(dx));
    });
  });
}
