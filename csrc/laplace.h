// LapSum: sorting, ranking and top-k selection by sums of Laplace distribution functions. Lukasz Struski, Michal B.
// Bednarczyk, Igor T. Podolak and Jacek Tabor, "LapSum - One Method to Differentiate Them All: Ranking, Sorting and
// Top-k Selection", 2025, arXiv 2503.06242.
//
// Lap(z) = e^z / 2 for z <= 0, 1 - e^-z / 2 above. Of a row x of m items that count and alpha > 0:
//   rank   ascending: 1 + sum_{j != i} Lap((x_i - x_j) / alpha); descending: of -x
//   sort   ascending: the b_t with sum_i Lap((b_t - x_i) / alpha) = t - 1/2, t = 1 to m; descending: the same, falling
//   top k  of the largest: p_i = Lap((x_i - b) / alpha) with the b of sum p = k; of the smallest: of -x
// Infinite items stand at their end, hard: ranks of equal ones share their mean, sorted they stand where they are, p is 1
// or 0 and k as far as the finite items can have it. Their gradient is 0. A NaN makes its row NaN.
// Arithmetic is double; every recurrence is by factors e^(-gap / alpha) <= 1, all of it O(m) after the sort.
#pragma once
#include "fusedloss.h"
#include "lists.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  fl_lists lists;
  const double* alphas;    // one per row
  int32_t dtype;           // of all void*: FL_F32 or FL_F64
  int32_t descending;      // 0 or 1; top k: of the largest
} fl_laplace;

// order: one int32 per item, as sort_falling leaves it. Sorted numbers of m items stand in the row's first m places, 0
// behind them. dalpha: one double per row.
int fl_lapsum_rank(const fl_laplace* p, const void* x, void* ranks, int32_t* order);
int fl_lapsum_rank_backward(const fl_laplace* p, const void* x, const int32_t* order, const void* dranks, void* dx,
                            double* dalpha);
int fl_lapsum_sort(const fl_laplace* p, const void* x, void* sorted, int32_t* order);
int fl_lapsum_sort_backward(const fl_laplace* p, const void* x, const int32_t* order, const void* dsorted, void* dx,
                            double* dalpha);

// k: one number per row, 0 to the number of its items (more: as many as there are). threshold: four doubles per row, the
// items on either side of b (of -x for the smallest; infinite where there is none) and e^(-distance to b / alpha) / 2.
int fl_lapsum_top_k(const fl_laplace* p, const void* x, const double* k, void* chosen, double* threshold);
int fl_lapsum_top_k_backward(const fl_laplace* p, const void* x, const double* k, const double* threshold,
                             const void* dchosen, void* dx, double* dk, double* dalpha);

#ifdef __cplusplus
}
#endif
