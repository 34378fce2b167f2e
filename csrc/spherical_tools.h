// What spherical.cpp and spherical_step.cpp work with: checks, products, and tasks for threads.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "arguments.h"
#include "room.h"
#include "spherical_rows.h"

namespace fl {

inline int check(const char* name, const fl_factors* f, const fl_blas* blas) {
  if (!f || !blas) return fail("%s: factors or blas is null", name);
  if (f->type != FL_SPHERICAL_FLOAT && f->type != FL_SPHERICAL_DOUBLE)
    return fail("%s: type %d is unknown", name, f->type);
  if (f->n < 1 || f->d < 1 || f->stride < f->d || f->stride > INT32_MAX)
    return fail("%s: %lld classes of %lld features with row stride %lld", name, (long long)f->n, (long long)f->d,
                (long long)f->stride);
  if (!f->p) return fail("%s: P is null", name);
  if (!blas->gemm || !blas->getrf || !blas->trsm) return fail("%s: a routine of the BLAS is null", name);
  return 0;
}

inline int check_examples(const char* name, const fl_factors* f, int64_t m, int64_t k, const int64_t* target) {
  if (!f->u || !f->inverse || !f->gram || !f->offset || !f->mean) return fail("%s: a factor is null", name);
  if (m < 0 || k < 0 || m > INT32_MAX || (k > 0 && m > INT32_MAX / k))   // the BLAS counts in 32 bits
    return fail("%s: %lld examples of %lld targets", name, (long long)m, (long long)k);
  for (int64_t e = 0; e < m * k; ++e)
    if (target[e] < 0 || target[e] >= f->n)
      return fail("%s: target %lld of example %lld is not one of %lld classes", name, (long long)target[e],
                  (long long)(e / k), (long long)f->n);
  return 0;
}

template <class T>
class Blas {
 public:
  explicit Blas(const fl_blas& b) : gemm_((Gemm)b.gemm), getrf_((Getrf)b.getrf), trsm_((Trsm)b.trsm) {}

  // C (m x n) = alpha A B + beta C, all by rows; `t` is for an operand whose transpose lies in memory.
  void product(char a_is, char b_is, int64_t m, int64_t n, int64_t k, T alpha, const T* a, int64_t a_row, const T* b,
               int64_t b_row, T beta, T* c, int64_t c_row) const {
    if (m == 0 || n == 0) return;
    const int32_t rows = (int32_t)m, columns = (int32_t)n, depth = (int32_t)k;
    const int32_t lda = (int32_t)a_row, ldb = (int32_t)b_row, ldc = (int32_t)c_row;
    gemm_(&b_is, &a_is, &columns, &rows, &depth, &alpha, b, &ldb, a, &lda, &beta, c, &ldc);
  }

  // In place; returns the smallest pivot's size.
  T factorise(T* a, int64_t size, int32_t* pivots) const {
    const int32_t n = (int32_t)size;
    int32_t info;
    getrf_(&n, &n, a, &n, pivots, &info);
    T least = std::abs(a[0]);
    for (int64_t i = 1; i < size; ++i)
      if (const T pivot = std::abs(a[i * size + i]); !(pivot >= least)) least = pivot;
    return least;
  }

  // Columns first to end of X (size x width) <- A^-1 X, where `factors` is what `factorise` made of A.
  // To Fortran, which sees transposes, A^T = P L U, and X^T becomes X^T U^-1 L^-1 P^T.
  void solve(const T* factors, const int32_t* pivots, int64_t size, T* x, int64_t width, int64_t first,
             int64_t end) const {
    const int32_t rows = (int32_t)(end - first), n = (int32_t)size, pitch = (int32_t)width;
    const T one = 1;
    trsm_("R", "U", "N", "N", &rows, &n, &one, factors, &n, x + first, &pitch);
    trsm_("R", "L", "N", "U", &rows, &n, &one, factors, &n, x + first, &pitch);
    for (int64_t i = size - 1; i >= 0; --i)
      if (const int64_t j = pivots[i] - 1; j != i)
        std::swap_ranges(x + i * width + first, x + i * width + end, x + j * width + first);
  }

 private:
  using Int = const int32_t*;
  using Gemm = void (*)(const char*, const char*, Int, Int, Int, const T*, const T*, Int, const T*, Int, const T*, T*,
                        Int);
  using Getrf = void (*)(Int, Int, T*, Int, int32_t*, int32_t*);
  using Trsm = void (*)(const char*, const char*, const char*, const char*, Int, Int, const T*, const T*, Int, T*, Int);
  Gemm gemm_;
  Getrf getrf_;
  Trsm trsm_;
};

// While it lives, BLAS calls of this thread use no other threads.
class Alone {
 public:
  explicit Alone(const fl_blas& blas) : set_((int (*)(int))blas.set_threads), before_(set_ ? set_(1) : 0) {}
  ~Alone() {
    if (set_) set_(before_);
  }

 private:
  int (*set_)(int);
  int before_;
};

// Work that may be done in any order, cut without regard to the number of threads: same bits for any of them.
class Tasks {
 public:
  // `work` is about that many multiply-adds of a product; small calls are not worth waking threads.
  Tasks(const fl_blas& blas, double work) : blas_(blas), threads_(work > 5e5 ? omp_get_max_threads() : 1) {}

  // Rows to a slice, of equal slices: at least 64 or so up to four of them, then 128, which products are faster on.
  static int64_t height(int64_t rows) {
    const int64_t slices = std::max(divide_up(rows, 128), std::min<int64_t>(4, divide_up(rows, 64)));
    return rows ? divide_up(divide_up(rows, slices), 8) * 8 : 1;
  }

  template <class Work>
  void add(Work work) {
    tasks_.push_back(std::move(work));
  }
  // work(first, end) on slices of rows, the last one first: it is the dearest where a triangle is computed.
  template <class Work>
  void slice(int64_t rows, Work work) {
    const int64_t step = height(rows);
    for (int64_t first = (divide_up(rows, step) - 1) * step; first >= 0; first -= step)
      tasks_.push_back([=] { work(first, std::min(rows, first + step)); });
  }

  void run() {
    const int64_t count = (int64_t)tasks_.size();
    each(count, [&](int64_t i) { tasks_[i](); });
    tasks_.clear();
  }

  template <class Work>
  void each(int64_t count, const Work& work) {
#pragma omp parallel num_threads((int)std::min<int64_t>(count, threads_)) if (threads_ > 1 && count > 1)
    {
      const Alone alone(blas_);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < count; ++i) work(i);
    }
  }

 private:
  const fl_blas& blas_;
  int threads_;
  std::vector<std::function<void()>> tasks_;
};

}  // namespace fl
