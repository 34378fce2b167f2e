// Soft sort and soft rank: Euclidean (l2) and log-KL projections onto the permutahedron. Mathieu Blondel, Olivier Teboul,
// Quentin Berthet and Josip Djolonga, "Fast Differentiable Sorting and Ranking", ICML 2020, arXiv 2002.08871.
//
// Of a row x of m items that count, strength e >= 0; "falling" below means as the direction has it:
//   rank   ascending (the smallest item gets 1): items in falling order of x; descending: in rising order.
//          s = +-x / e in that order, w = (m, m - 1, ..., 1)
//   sort   ascending: items in rising order of x; descending: in falling order.
//          s = -x (ascending) or x (descending) in that order, w = (m, ..., 1) / e; the output is -y ascending, y descending
// Blocks are the maximal runs that pooling adjacent violators leaves. In block B, of length |B|:
//   rank l2   y_i = mean_B(w) + (s_i - mean_B(s))          rank kl   y_i = softmax_B(s)_i sum_B(w)
//   sort l2   y_i = w_i - mean_B(w) + mean_B(s)            sort kl   y_i = w_i - LSE_B(w) + LSE_B(s)
// e = 0 is the hard answer: equal items share their mean rank and give no gradient; the hard sort.
// So are strengths below 1e-300, by which ordinary numbers divided overflow.
// Infinite items stand at their end and are no part of any other block: their rank is hard (equal ones share their mean),
// its gradient 0; the soft sort returns them where they stand, and the finite items are sorted among themselves. A NaN
// makes its row NaN.
#pragma once
#include "fusedloss.h"
#include "lists.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  fl_lists lists;
  const double* strengths;     // null, or one e per row
  double strength;             // e of every row where strengths is null
  int32_t dtype;               // of values: FL_F32, FL_BF16, FL_F16 or FL_F64
  int32_t kl, descending;      // 0 or 1
  int64_t items;               // of all rows, or more: read on a device, with offsets, which only the device can look at
                               // (and then lists.width may be too much; the longest row is best). 0: rows * width
} fl_permutahedron;

// order, one int32 per item, is all that is kept: entry k of a row is the position (0 to n - 1) of the k-th item as the
// row's blocks have them, with bit 31 set where a block starts. Items that are masked out come last, each a block of its
// own. Ranks and their gradients are FL_F32, or FL_F64 for FL_F64 values; a soft sort and its gradient have the values'
// type. The soft sort's outputs of m items stand in the row's first m places, 0 behind them.
// dx has the values' type. dstrength: null, or the derivative in e of each row (rows doubles).
int fl_soft_rank(const fl_permutahedron* p, const void* x, void* ranks, int32_t* order);
int fl_soft_rank_backward(const fl_permutahedron* p, const void* x, const int32_t* order, const void* dranks, void* dx,
                          double* dstrength);
int fl_soft_sort(const fl_permutahedron* p, const void* x, void* sorted, int32_t* order);
int fl_soft_sort_backward(const fl_permutahedron* p, const void* x, const int32_t* order, const void* dsorted, void* dx,
                          double* dstrength);

// The same on a device: every pointer is the device's, `strengths` too. The workspace is aligned to 16 bytes.
int64_t fl_cuda_soft_rank_workspace(const fl_permutahedron* p);
int64_t fl_cuda_soft_rank_backward_workspace(const fl_permutahedron* p);
int64_t fl_cuda_soft_sort_workspace(const fl_permutahedron* p);
int64_t fl_cuda_soft_sort_backward_workspace(const fl_permutahedron* p);
int fl_cuda_soft_rank(const fl_permutahedron* p, const void* x, void* ranks, int32_t* order, void* workspace,
                      int64_t bytes, void* stream);
int fl_cuda_soft_rank_backward(const fl_permutahedron* p, const void* x, const int32_t* order, const void* dranks,
                               void* dx, double* dstrength, void* workspace, int64_t bytes, void* stream);
int fl_cuda_soft_sort(const fl_permutahedron* p, const void* x, void* sorted, int32_t* order, void* workspace,
                      int64_t bytes, void* stream);
int fl_cuda_soft_sort_backward(const fl_permutahedron* p, const void* x, const int32_t* order, const void* dsorted,
                               void* dx, double* dstrength, void* workspace, int64_t bytes, void* stream);

#ifdef __cplusplus
}
#endif
