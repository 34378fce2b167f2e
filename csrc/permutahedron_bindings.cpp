// permutahedron.h in fusedloss._native.
#include "bindings.h"
#include "permutahedron.h"

namespace {

fl_permutahedron make(int64_t rows, int64_t width, Address offsets, Address mask, Address strengths, double strength,
                      int32_t dtype, bool kl, bool descending, int64_t items) {
  const fl_lists lists = make_lists(rows, width, offsets, mask);
  return {lists, pointer<const double>(strengths), strength, dtype, kl, descending, items};
}

void raise_if(int status) {
  if (status) throw std::runtime_error(fl_error());
}

void add_forward(py::module_& m, const char* name, decltype(fl_cuda_soft_rank)* launch) {
  m.def(name, [launch](const fl_permutahedron& p, Address x, Address out, Address order, Address workspace,
                       int64_t bytes, Address stream) {
    raise_if(launch(&p, pointer(x), pointer(out), pointer<int32_t>(order), pointer(workspace), bytes, pointer(stream)));
  });
}

void add_backward(py::module_& m, const char* name, decltype(fl_cuda_soft_rank_backward)* launch) {
  m.def(name, [launch](const fl_permutahedron& p, Address x, Address order, Address g, Address dx, Address dstrength,
                       Address workspace, int64_t bytes, Address stream) {
    raise_if(launch(&p, pointer(x), pointer<int32_t>(order), pointer(g), pointer(dx), pointer<double>(dstrength),
                    pointer(workspace), bytes, pointer(stream)));
  });
}

}  // namespace

// Defined here, called by bindings.cpp.
void add_permutahedron(py::module_& m) {
  using P = fl_permutahedron;
  py::class_<P>(m, "Permutahedron")
      .def(py::init(&make), py::arg("rows"), py::arg("width"), py::arg("offsets"), py::arg("mask"),
           py::arg("strengths"), py::arg("strength"), py::arg("dtype"), py::arg("kl"), py::arg("descending"),
           py::arg("items") = 0)
      .def("__bytes__", [](const P& p) { return py::bytes(reinterpret_cast<const char*>(&p), sizeof p); });
  m.def("soft_rank", [](const P& p, Address x, Address ranks, Address order) {
    released([&] { return fl_soft_rank(&p, pointer(x), pointer(ranks), pointer<int32_t>(order)); });
  });
  m.def("soft_sort", [](const P& p, Address x, Address sorted, Address order) {
    released([&] { return fl_soft_sort(&p, pointer(x), pointer(sorted), pointer<int32_t>(order)); });
  });
  m.def("soft_rank_backward", [](const P& p, Address x, Address order, Address g, Address dx, Address dstrength) {
    released([&] {
      return fl_soft_rank_backward(&p, pointer(x), pointer<int32_t>(order), pointer(g), pointer(dx),
                                   pointer<double>(dstrength));
    });
  });
  m.def("soft_sort_backward", [](const P& p, Address x, Address order, Address g, Address dx, Address dstrength) {
    released([&] {
      return fl_soft_sort_backward(&p, pointer(x), pointer<int32_t>(order), pointer(g), pointer(dx),
                                   pointer<double>(dstrength));
    });
  });

  // On a device. They only launch, which is not worth giving the interpreter away for.
  m.def("cuda_soft_rank_workspace", [](const P& p) { return fl_cuda_soft_rank_workspace(&p); });
  m.def("cuda_soft_rank_backward_workspace", [](const P& p) { return fl_cuda_soft_rank_backward_workspace(&p); });
  m.def("cuda_soft_sort_workspace", [](const P& p) { return fl_cuda_soft_sort_workspace(&p); });
  m.def("cuda_soft_sort_backward_workspace", [](const P& p) { return fl_cuda_soft_sort_backward_workspace(&p); });
  add_forward(m, "cuda_soft_rank", fl_cuda_soft_rank);
  add_forward(m, "cuda_soft_sort", fl_cuda_soft_sort);
  add_backward(m, "cuda_soft_rank_backward", fl_cuda_soft_rank_backward);
  add_backward(m, "cuda_soft_sort_backward", fl_cuda_soft_sort_backward);
}
