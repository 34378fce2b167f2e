// What the vector loops over bands, compiled once per instruction set, offer to permutation.cpp.
#pragma once
#include "permutation.h"

namespace fl {

// The places or the items of one list: D_ij / tau is x_i x_j - p_i - p_j (NeuralSort) or -(x_i - x_j)^2 (SoftSort squared),
// of place i and item j or of item and place alike. x and p are readable one vector beyond the list's end.
struct Side {
  const double *x, *p;
  const int32_t *from, *to;   // of each, which of the other side are in the band
};

// Of each item.
template <class T>
struct Slopes { double *total, *moment, *along; T* x; };

// Both take own indices [first, first + lanes) that are below count.
template <class T>
struct PermutationRows {
  int lanes;
  // Over others o != own: mass = sum of e^D, out[own, c] = sum of e^D (values[o, c] - base[own, c]); mass and base may be null.
  // With `moment` e^D is multiplied by x_own - x_o.
  void (*sums)(int32_t relaxation, bool moment, const Side& own, const Side& other, int64_t count, int64_t first,
               const T* values, const T* base, int64_t columns, double* mass, double* out);
  // Own are items j, others places i. Over i != j, with d_ij = e^D sum_c r_ic (v_jc - v_ic - deviation_ic):
  // sum of d_ij into total, of d_ij times (j - i) or (x_j - x_i) into moment, of d_ij D into along, and of e^D r_ic into x
  // unless it is null.
  void (*slopes)(int32_t relaxation, const Side& items, const Side& places, int64_t count, int64_t first, const T* r,
                 const T* v, const T* deviation, int64_t columns, const Slopes<T>& out);
};

template <class T> const PermutationRows<T>& permutation_rows();   // of the instruction set in use

#define FL_PERMUTATION_ROWS(isa)                           \
  namespace isa {                                          \
  extern const PermutationRows<float> permutation_float;   \
  extern const PermutationRows<double> permutation_double; \
  }
FL_PERMUTATION_ROWS(portable)
#if defined(FL_X86)
FL_PERMUTATION_ROWS(avx2)
FL_PERMUTATION_ROWS(avx512)
#endif
#undef FL_PERMUTATION_ROWS

}  // namespace fl
