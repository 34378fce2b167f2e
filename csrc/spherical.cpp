// The factored layer's forward and backward, and its one pass over all of P. The step is in spherical_step.cpp.
#include "spherical.h"

#include "fusedloss.h"
#include "spherical_tools.h"

namespace fl {
namespace {

template <class T>
const SphericalRows<T>& table(const SphericalRows<float>& single, const SphericalRows<double>& twice) {
  if constexpr (sizeof(T) == sizeof(float)) return single;
  else return twice;
}

template <class T>
int visit(const fl_factors& f, const fl_blas& blas, const fl_visit& v, int32_t loss, const double* parameters) {
  const int64_t m = v.m, d = f.d;
  const SphericalRows<T>& rows = spherical_rows<T>();
  const Blas<T> by(blas);
  Room room;
  T *const gram = room.take<T>(d * d), *const u = room.take<T>(d * d), *const h = (T*)v.h;
  Tasks tasks(blas, (double)m * d * d);
  tasks.slice(d, [=, &f, &rows](int64_t i, int64_t end) {
    rows.narrow(f.gram + i * d, gram + i * d, (end - i) * d);
    rows.narrow(f.u + i * d, u + i * d, (end - i) * d);
  });
  tasks.run();
  tasks.slice(m, [=, &f, &v, &rows, &by](int64_t i, int64_t end) {
    by.product('n', 'n', end - i, d, d, 1, h + i * d, d, gram, d, 0, (T*)v.hq + i * d, d);
    by.product('n', 't', end - i, d, d, 1, h + i * d, d, u, d, 0, (T*)v.hu + i * d, d);
    rows.visit(f, v, loss, parameters, i, end);
  });
  tasks.run();
  return 0;
}

template <class T>
int backward(const fl_factors& f, const fl_blas& blas, const fl_visit& v, const double* upstream, const fl_batch& b,
             T* dh) {
  const int64_t m = v.m, d = f.d;
  const SphericalRows<T>& rows = spherical_rows<T>();
  const Blas<T> by(blas);
  Room room;
  T* const u = room.take<T>(d * d);
  Tasks tasks(blas, (double)m * d * d);
  tasks.slice(d, [=, &f, &rows](int64_t i, int64_t end) { rows.narrow(f.u + i * d, u + i * d, (end - i) * d); });
  tasks.run();
  tasks.slice(m, [=, &f, &v, &b, &rows, &by](int64_t i, int64_t end) {
    by.product('n', 'n', end - i, d, d, 1, (T*)v.picked + i * d, d, u, d, 0, (T*)b.yw + i * d, d);
    rows.backward(f, v, upstream, b, dh, i, end);
  });
  tasks.run();
  return 0;
}

template <class T>
int multiply(const fl_factors& f, const fl_blas& blas, const double* by) {
  constexpr int64_t block = 256;
  const int64_t d = f.d;
  const Blas<T> blas_of(blas);
  Tasks tasks(blas, (double)f.n * d * d);
  Room room;
  T *const k = room.take<T>(d * d), *const old = room.take<T>(omp_get_max_threads() * block * d);
  spherical_rows<T>().narrow(by, k, d * d);
  tasks.each(divide_up(f.n, block), [&](int64_t i) {
    const int64_t rows = std::min(block, f.n - i * block);
    T *const p = (T*)f.p + i * block * f.stride, *const from = old + omp_get_thread_num() * block * d;
    for (int64_t row = 0; row < rows; ++row) std::memcpy(from + row * d, p + row * f.stride, (size_t)d * sizeof(T));
    blas_of.product('n', 'n', rows, d, d, 1, from, d, k, d, 0, p, f.stride);
  });
  return 0;
}

int no_memory(const char* name) { return fail("%s: no memory", name); }

}  // namespace

template <class T>
const SphericalRows<T>& spherical_rows() {
#if defined(FL_X86)
  if (std::strcmp(fl_isa(), "avx512") == 0) return table<T>(avx512::spherical_float, avx512::spherical_double);
  if (std::strcmp(fl_isa(), "avx2") == 0) return table<T>(avx2::spherical_float, avx2::spherical_double);
#endif
  return table<T>(portable::spherical_float, portable::spherical_double);
}
template const SphericalRows<float>& spherical_rows<float>();
template const SphericalRows<double>& spherical_rows<double>();

}  // namespace fl

extern "C" {

int fl_spherical_visit(const fl_factors* f, const fl_blas* blas, const fl_visit* v, int32_t loss,
                       const double* parameters) {
  if (int status = fl::check("visit", f, blas)) return status;
  if (int status = fl::check_examples("visit", f, v->m, v->k, v->target)) return status;
  if (loss < FL_SPHERICAL_SQUARED || loss > FL_SPHERICAL_Z) return fl::fail("visit: loss %d is unknown", loss);
  if (v->m == 0) return 0;
  try {
    return f->type == FL_SPHERICAL_FLOAT ? fl::visit<float>(*f, *blas, *v, loss, parameters)
                                         : fl::visit<double>(*f, *blas, *v, loss, parameters);
  } catch (const std::bad_alloc&) {
    return fl::no_memory("visit");
  }
}

int fl_spherical_backward(const fl_factors* f, const fl_blas* blas, const fl_visit* v, const double* upstream,
                          const fl_batch* b, void* dh) {
  if (int status = fl::check("backward", f, blas)) return status;
  if (int status = fl::check_examples("backward", f, v->m, v->k, v->target)) return status;
  if (v->m == 0) return 0;
  try {
    return f->type == FL_SPHERICAL_FLOAT ? fl::backward(*f, *blas, *v, upstream, *b, (float*)dh)
                                         : fl::backward(*f, *blas, *v, upstream, *b, (double*)dh);
  } catch (const std::bad_alloc&) {
    return fl::no_memory("backward");
  }
}

int fl_spherical_multiply(const fl_factors* f, const fl_blas* blas, const double* by) {
  if (int status = fl::check("multiply", f, blas)) return status;
  if (!by) return fl::fail("multiply: the matrix is null");
  try {
    return f->type == FL_SPHERICAL_FLOAT ? fl::multiply<float>(*f, *blas, by) : fl::multiply<double>(*f, *blas, by);
  } catch (const std::bad_alloc&) {
    return fl::no_memory("multiply");
  }
}

}  // extern "C"
