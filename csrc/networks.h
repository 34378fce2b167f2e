// Differentiable sorting networks: Felix Petersen, Christian Borgelt, Hilde Kuehne and Oliver Deussen, "Differentiable
// Sorting Networks for Scalable Sorting and Ranking Supervision", ICML 2021, arXiv 2105.04019; the Cauchy and optimal
// distributions: "Monotonic Differentiable Sorting Networks", ICLR 2022, arXiv 2203.09630.
//
// A network is a list of comparators, in layers; those of one layer share no wire. Comparator t of a row, on wires
// low[t] and high[t] that hold a and b, of gap d = b - a (0 where a = b, infinite ones too) and share c = 1 - F(steepness d):
//   a <- a + c d,   b <- b - c d.
// A gap of +inf leaves both alone, -inf exchanges them; neither has a gradient. Channels v, vectors of numbers on each
// wire, go through the same comparators, v_low += c D, v_high -= c D with D = v_high - v_low: forwards the product with
// the relaxed permutation matrix (rows: places, columns: items), backwards with its transpose.
#pragma once
#include "fusedloss.h"

#ifdef __cplusplus
extern "C" {
#endif

// F of v = steepness d. logistic_phi: of v = steepness d / (|d| + 1e-10)^art_lambda.
typedef enum {
  FL_CAUCHY = 0, FL_LOGISTIC = 1, FL_LOGISTIC_PHI = 2, FL_GAUSSIAN = 3, FL_RECIPROCAL = 4, FL_OPTIMAL = 5
} fl_distribution;

typedef struct {
  int64_t rows, wires, comparators, layers;
  const int32_t *low, *high;   // of each comparator
  const int64_t* first;        // layers + 1: the first comparator of each layer
  int32_t dtype;               // of all void*: FL_F32 or FL_F64
  int32_t distribution;        // fl_distribution
  double steepness, art_lambda;
} fl_network;

// x, sorted: (rows, wires). gaps: (rows, comparators). active: null, or of each row how many layers it goes through; the
// gaps of the others are +inf. dsteepness: (rows) doubles, each row's share of the derivative.
int fl_network_sort(const fl_network* net, const void* x, const int64_t* active, void* sorted, void* gaps);
int fl_network_sort_backward(const fl_network* net, const void* gaps, const void* dsorted, const void* dgaps, void* dx,
                             double* dsteepness);

// v: (rows, wires, channels), row r at v + r * row_stride (0: one for all rows); out, dout, dv contiguous. dv may be null.
int fl_network_push(const fl_network* net, const void* gaps, const void* v, int64_t row_stride, int64_t channels,
                    int32_t transposed, void* out);
int fl_network_push_backward(const fl_network* net, const void* gaps, const void* v, int64_t row_stride,
                             int64_t channels, int32_t transposed, const void* dout, void* dv, void* dgaps,
                             double* dsteepness);

#ifdef __cplusplus
}
#endif
