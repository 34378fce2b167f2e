// What the bindings of every family share. Pointers are plain integers, 0 for null.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "fusedloss.h"
#include "lists.h"

namespace py = pybind11;

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) { return reinterpret_cast<T*>(address); }

// Without the interpreter's lock; the status of `work` as an exception.
template <class Work>
int released(Work work) {
  int status;
  {
    py::gil_scoped_release free;
    status = work();
  }
  if (status > 0) throw std::runtime_error(fl_error());
  return status;
}

inline fl_lists make_lists(int64_t rows, int64_t width, Address offsets, Address mask = 0) {
  return {rows, width, pointer<const int64_t>(offsets), pointer<const uint8_t>(mask)};
}
