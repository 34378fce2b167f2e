// pairwise.h in fusedloss._native. Pointers are plain integers, 0 for null.
#include <pybind11/pybind11.h>

namespace py = pybind11;

// Defined here, called by bindings.cpp.
void add_pairwise(py::module_& m) { (void)m; }
