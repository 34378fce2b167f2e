// What the vector loops of NeuralNDCG, compiled once per instruction set, offer to sinkhorn.cpp.
#pragma once
#include <stdint.h>

namespace fl {

constexpr int64_t kBlock = 4;     // rows of P that are worked on together
constexpr int64_t kAlign = 32;    // bands of blocks start and end at multiples of this; vectors of columns are as long

// P of one list, as blocks of kBlock rows, each a dense matrix of the columns low[block] to high[block]. Columns and
// rows from n on are 0.
template <class T>
struct Band {
  int64_t n, padded, blocks, widest;
  double inverse_tau, cutoff;      // entries below e^-cutoff of their row's largest are 0
  const double *t, *w;             // scores, falling, and sum_{m < j} (t_m - t_m+1)(2 m + 1); infinite from n on
  const int64_t *low, *high, *at;  // of each block; `at`: where its entries lie in p
  T* p;                            // null: there is no room for it, and blocks are computed each time
};

// The logit of (i, j) below that of (i, i), the row's largest: nothing large cancels, t being double.
inline double below_peak(const double* t, const double* w, double inverse_tau, int64_t i, int64_t j) {
  return (w[i] - w[j] + 2.0 * (double)i * (t[i] - t[j])) * inverse_tau;
}

enum class Sweep { given, inverse, adjoint };

template <class T>
struct SinkhornRows {
  void (*fill)(const Band<T>&, int64_t first, int64_t end);   // these blocks of p
  // With a = P x, for the rows of these blocks, in one pass over them:
  //   given    y = a,           m = weight
  //   inverse  y = 1 / a,       m = y
  //   adjoint  y = -weight^2 a, m = y
  // sums += P^T m. `own` has room for a block.
  void (*sweep)(const Band<T>&, Sweep, int64_t first, int64_t end, const T* x, const T* weight, T* y, T* sums, T* own);
  // With G = sum_r left_r right_r^T and D = P (G - sum_j P G), of `terms` vectors each, `padded` apart:
  // sums += sum_i D_ij, moments += sum_i (middle_j - i) D_ij. `own` has room for two blocks.
  void (*gradient)(const Band<T>&, int64_t first, int64_t end, int64_t terms, const T* left, const T* right,
                   const T* middle, T* sums, T* moments, T* own);
};

template <class T> const SinkhornRows<T>& sinkhorn_rows();   // of the instruction set in use

#define FL_SINKHORN_ROWS(isa)                        \
  namespace isa {                                    \
  extern const SinkhornRows<float> sinkhorn_float;   \
  extern const SinkhornRows<double> sinkhorn_double; \
  }
FL_SINKHORN_ROWS(portable)
#if defined(FL_X86)
FL_SINKHORN_ROWS(avx2)
FL_SINKHORN_ROWS(avx512)
#endif
#undef FL_SINKHORN_ROWS

}  // namespace fl
