// NeuralNDCG: the NDCG of a relaxed permutation, and its gradient. Przemysław Pobrotyn and Radosław Białobrzeski,
// "NeuralNDCG: Direct Optimisation of a Ranking Metric via Differentiable Relaxation of Sorting", 2021, arXiv 2102.07831.
//
// Of a list of n items that count, scores t falling, A_j = sum_k |t_j - t_k|, i and j from 0:
//   P_ij = softmax_j(((n - 1 - 2 i) t_j - A_j) / tau)                       NeuralSort
//   v = 1 / (P^T u), u = 1 / (P v), again and again from u = 1              Sinkhorn, columns before rows
//   NDCG = sum_{i < k} u_i sum_j P_ij v_j gain_j / log2(i + 2) / ideal,     ideal: the same of the gains in falling order
// until all sums of columns of diag(u) P diag(v) are within `tolerance` of 1, those of its rows being 1.
//
// Neither P nor a product of it is kept for the gradient, but u and v of each step: with them the iteration is gone
// through backwards. P itself is a band about its diagonal (sinkhorn.cpp).
#pragma once
#include "fusedloss.h"
#include "lists.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  fl_lists lists;
  double tau;                  // above 0
  double tolerance;            // 0: all of max_iterations
  int64_t k;                   // ranks that count; 0: all
  int64_t max_iterations;      // 0: P as it is
  int32_t dtype;               // of everything below: FL_F32 or FL_F64
} fl_neural_ndcg_options;

// ndcg and ideal: one number per list; 0 and no gradient where ideal is not above 0. dscores: null, or the derivative of
// each list's NDCG, one number per item. A score that is infinite or NaN makes its list NaN.
int fl_neural_ndcg(const fl_neural_ndcg_options* options, const void* scores, const void* gains, void* ndcg, void* ideal,
                   void* dscores);

#ifdef __cplusplus
}
#endif
