// The factored spherical layer on the CPU: plain C, raw pointers, no torch, no Python.
//
// W = P U + 1 (offset + mean)^T, n classes of d features, is never made. Three calls are one step of gradient descent,
// as fusedloss/spherical/steps.py means them; none of them costs more where n is larger. Matrices are contiguous by
// rows, except that P has a row stride. `void*` is float or double, as `type` says: the type of P and of products over
// examples; all else is double. Everything is caller-allocated; scratch of up to 64 MiB is kept per thread.
// Status 0 is success; otherwise fl_error() says what was wrong, and nothing was changed.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { FL_SPHERICAL_FLOAT = 0, FL_SPHERICAL_DOUBLE = 1 } fl_spherical_type;

typedef enum {                 // parameters, as the files of fusedloss/losses name them
  FL_SPHERICAL_SQUARED = 0,    // value, k, 1 for mean_over_classes
  FL_SPHERICAL_SOFTMAX = 1,    // eps
  FL_SPHERICAL_TAYLOR = 2,     // none
  FL_SPHERICAL_Z = 3,          // a, b, eps
} fl_spherical_loss;

// Fortran routines with 32-bit integers, all of `type`: sgemm_, sgetrf_, strsm_ or dgemm_, dgetrf_, dtrsm_. They are
// called by many threads at once. `set_threads` is null or MKL_Set_Num_Threads_Local.
typedef struct {
  void *gemm, *getrf, *trsm, *set_threads;
} fl_blas;

typedef struct {
  int64_t n, d, stride;              // stride: elements from row to row of P
  int32_t type;                      // fl_spherical_type
  void* p;                           // n x d
  double *u, *inverse, *gram;        // d x d: U, its inverse, (W - 1 mean^T)^T (W - 1 mean^T)
  double *offset, *mean;             // d
} fl_factors;

// Examples and what a visit leaves of them. A function reads and writes what its line says; the rest may be null.
typedef struct {
  int64_t m, k;                      // examples, targets of each
  const void* h;                     // m x d
  const int64_t* target;             // m x k, in [0, n)
  const double* share;               // m x k: weights of the targets, 0 for none there
  double *losses, *t, *gamma;        // m
  double* alpha;                     // m x k
  void *hq, *hu, *picked;            // m x d: H gram, H U^T, sum_k alpha_k P[target_k]
} fl_visit;

typedef struct {
  int64_t m, k;
  const void* h;                     // m x d
  const int64_t* target;             // m x k
  double *alpha, *t, *gamma;         // m x k, m, m: derivatives times upstream gradients
  const void* hu;                    // m x d
  void *yw, *gh;                     // m x d: sum_k alpha_k (w_target - mean), 2 gamma hq + yw
} fl_batch;

// h, target, share -> losses, t, gamma, alpha, hq, hu, picked.
int fl_spherical_visit(const fl_factors* f, const fl_blas* blas, const fl_visit* visit, int32_t loss,
                       const double* parameters);

// A visit's t, gamma, alpha, hq, picked and upstream (m) -> the batch's alpha, t, gamma, yw, gh and dh (m x d).
int fl_spherical_backward(const fl_factors* f, const fl_blas* blas, const fl_visit* visit, const double* upstream,
                          const fl_batch* batch, void* dh);

// W <- keep W - lr dL/dW. Same inputs, same bits, for any number of threads. FL_SPHERICAL_ILL: U E would have
// |U E| |(U E)^-1| / d above `limit`, or be far from size 1, or have no inverse, and nothing was changed; P U E has to be
// made, which is left to the caller.
#define FL_SPHERICAL_ILL -1
#define FL_SPHERICAL_SMALLEST 1e-6   // of |U E| / sqrt(d)
#define FL_SPHERICAL_LARGEST 8
int fl_spherical_step(const fl_factors* f, const fl_blas* blas, const fl_batch* batch, double lr, double keep,
                      double limit);

// P <- P by (d x d), in place, block by block. Of the factors only P is looked at.
int fl_spherical_multiply(const fl_factors* f, const fl_blas* blas, const double* by);

#ifdef __cplusplus
}
#endif
