// spherical.h in fusedloss._native. Pointers are plain integers, 0 for null.
#include <pybind11/pybind11.h>

#include <array>
#include <stdexcept>
#include <string>

#include "fusedloss.h"
#include "spherical.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) { return reinterpret_cast<T*>(address); }

template <class Work>
int released(Work work) {
  int status;
  {
    py::gil_scoped_release free;
    status = work();
  }
  if (status > 0) throw std::runtime_error(std::string("fusedloss.spherical: ") + fl_error());
  return status;
}

fl_blas make_blas(Address gemm, Address getrf, Address trsm, Address set_threads) {
  return {pointer<void>(gemm), pointer<void>(getrf), pointer<void>(trsm), pointer<void>(set_threads)};
}

fl_factors make_factors(int64_t n, int64_t d, int64_t stride, int32_t type, Address p, Address u, Address inverse,
                        Address gram, Address offset, Address mean) {
  return {n, d, stride, type, pointer<void>(p), pointer<double>(u), pointer<double>(inverse), pointer<double>(gram),
          pointer<double>(offset), pointer<double>(mean)};
}

void visit(const fl_factors& f, const fl_blas& blas, int32_t loss, double first, double second, double third, int64_t m,
           int64_t k, Address h, Address target, Address share, Address losses, Address t, Address gamma, Address alpha,
           Address hq, Address hu, Address picked) {
  const std::array<double, 3> parameters = {first, second, third};
  fl_visit v{};
  v.m = m, v.k = k, v.h = pointer<void>(h), v.target = pointer<int64_t>(target), v.share = pointer<double>(share);
  v.losses = pointer<double>(losses), v.t = pointer<double>(t), v.gamma = pointer<double>(gamma);
  v.alpha = pointer<double>(alpha);
  v.hq = pointer<void>(hq), v.hu = pointer<void>(hu), v.picked = pointer<void>(picked);
  released([&] { return fl_spherical_visit(&f, &blas, &v, loss, parameters.data()); });
}

void backward(const fl_factors& f, const fl_blas& blas, int64_t m, int64_t k, Address target, Address upstream,
              Address visit_t, Address visit_gamma, Address visit_alpha, Address hq, Address picked, Address t,
              Address gamma, Address alpha, Address yw, Address gh, Address dh) {
  fl_visit v{};
  v.m = m, v.k = k, v.target = pointer<int64_t>(target);
  v.t = pointer<double>(visit_t), v.gamma = pointer<double>(visit_gamma), v.alpha = pointer<double>(visit_alpha);
  v.hq = pointer<void>(hq), v.picked = pointer<void>(picked);
  fl_batch b{};
  b.m = m, b.k = k;
  b.t = pointer<double>(t), b.gamma = pointer<double>(gamma), b.alpha = pointer<double>(alpha);
  b.yw = pointer<void>(yw), b.gh = pointer<void>(gh);
  released([&] { return fl_spherical_backward(&f, &blas, &v, pointer<double>(upstream), &b, pointer<void>(dh)); });
}

bool step(const fl_factors& f, const fl_blas& blas, double lr, double keep, double limit, int64_t m, int64_t k,
          Address h, Address target, Address t, Address gamma, Address alpha, Address hu, Address yw, Address gh) {
  fl_batch b{};
  b.m = m, b.k = k, b.h = pointer<void>(h), b.target = pointer<int64_t>(target);
  b.t = pointer<double>(t), b.gamma = pointer<double>(gamma), b.alpha = pointer<double>(alpha);
  b.hu = pointer<void>(hu), b.yw = pointer<void>(yw), b.gh = pointer<void>(gh);
  return released([&] { return fl_spherical_step(&f, &blas, &b, lr, keep, limit); }) != FL_SPHERICAL_ILL;
}

void multiply(const fl_factors& f, const fl_blas& blas, Address by) {
  released([&] { return fl_spherical_multiply(&f, &blas, pointer<double>(by)); });
}

}  // namespace

// Defined here, called by bindings.cpp.
void add_spherical(py::module_& m) {
  py::class_<fl_blas>(m, "Blas").def(py::init(&make_blas), py::arg("gemm"), py::arg("getrf"), py::arg("trsm"),
                                     py::arg("set_threads"));
  py::class_<fl_factors>(m, "Factors")
      .def(py::init(&make_factors), py::arg("n"), py::arg("d"), py::arg("stride"), py::arg("type"), py::arg("p"),
           py::arg("u") = 0, py::arg("inverse") = 0, py::arg("gram") = 0, py::arg("offset") = 0, py::arg("mean") = 0);
  m.def("spherical_visit", &visit);
  m.def("spherical_backward", &backward);
  m.def("spherical_step", &step);
  m.def("spherical_multiply", &multiply);
#define FL_CONSTANT(name) m.attr("SPHERICAL_" #name) = (int)FL_SPHERICAL_##name;
  FL_CONSTANT(FLOAT) FL_CONSTANT(DOUBLE) FL_CONSTANT(SQUARED) FL_CONSTANT(SOFTMAX) FL_CONSTANT(TAYLOR) FL_CONSTANT(Z)
#undef FL_CONSTANT
}
