// Relaxed permutation matrices P that are never stored: NeuralSort (Aditya Grover, Eric Wang, Aaron Zweig and Stefano
// Ermon, "Stochastic Optimization of Sorting Networks via Continuous Relaxations", ICLR 2019, arXiv 1903.08850) and
// SoftSort (Sebastian Prillo and Julian Eisenschlos, "SoftSort: A Continuous Relaxation for the argsort Operator", ICML
// 2020, arXiv 2006.16038). Row i of P is a place, in falling order, column j an item.
//
// Everything here is in sorted order: item j of a list is the one that stands at place j of its sort. With t the sorted
// scores of m items that count, t_1 >= ... >= t_m, P is the softmax by rows of D / tau, where D_ii = 0 is each row's peak:
//   NeuralSort   D_ij = (m + 1 - 2i) (t_j - t_i) - (A_j - A_i),   A_j = sum_k |t_j - t_k|
//   SoftSort     D_ij = -|t_i - t_j|^power
// Away from the peak D falls, and where it starts and ends to be worth a sum moves one way from row to row: P is a band
// about the diagonal. What is left out of a row, at most m exp(-cutoff), is below half a unit in the last place of the
// row's sum, which is at least 1. SoftSort of power 1 needs no band: its exponentials are two first-order recurrences.
#pragma once
#include "fusedloss.h"
#include "lists.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { FL_NEURAL_SORT = 0, FL_SOFT_SORT = 1, FL_SOFT_SORT_SQUARED = 2 } fl_relaxation;

typedef struct {
  fl_lists lists;          // of sorted items; no mask
  const int64_t* counts;   // null, or how many of each list count, its first ones: of the others 0 is written
  const double* tau;       // one per list
  int64_t columns;         // of v, u, y, x: (items, columns)
  int32_t dtype;           // of all void*: FL_F32 or FL_F64
  int32_t relaxation;      // fl_relaxation
} fl_permutation;

// Where in all lists' items, counted from the first list on, the k-th item of the list's sort lies. dtype is that of the
// scores, FL_F32 or FL_F64; items that are masked out come last.
int fl_permutation_order(const fl_lists* lists, int32_t dtype, const void* scores, int64_t* index);

// y = P v; rest_i = sum over j != i of exp(D_ij / tau), so that P_ij = exp(D_ij / tau) / (1 + rest_i); and deviation = y - v,
// which in rounded numbers keeps what y loses where v is large. Without columns: rest alone.
int fl_permutation_product(const fl_permutation* p, const void* t, const void* v, void* y, void* rest, void* deviation);

// x = P^T u, given the product's rest.
int fl_permutation_transposed(const fl_permutation* p, const void* t, const void* rest, const void* u, void* x);

// The gradient of u^T P v in t, in tau (one double per list), and in v where x is not null. Where v and deviation are null,
// u has one column and it is that of u^T rest.
int fl_permutation_gradient(const fl_permutation* p, const void* t, const void* rest, const void* u, const void* v,
                            const void* deviation, void* dt, double* dtau, void* x);

#ifdef __cplusplus
}
#endif
