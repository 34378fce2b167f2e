// Sparsemax and entmax-1.5 and their Fenchel-Young losses: rows of scores through a threshold, p_j = [s z_j - t]_+^e with
// sum p = 1. Andre Martins and Ramon Astudillo, "From Softmax to Sparsemax", ICML 2016, arXiv 1602.02068; Ben Peters,
// Vlad Niculae and Andre Martins, "Sparse Sequence-to-Sequence Models", ACL 2019, arXiv 1905.05702.
//
//   sparsemax   s = 1    e = 1   L = 1/2 sum_j (p_j - y_j)^2 + [t - z_y]_+
//   entmax-1.5  s = 1/2  e = 2   L = 2/3 ((1 - r_y)^2 (2 + r_y) + sum_{j != y} r_j^3) + 2 [t - z_y / 2]_+,  r = sqrt(p)
//
// y is the target's unit vector; both losses have the gradient p - y, and are sums of terms >= 0: nothing cancels.
// Scores of -inf have p = 0 and gradient 0; where there is nothing else p = 0 and L = inf. Scores of +inf share p among
// themselves. A NaN makes its row NaN.
#pragma once
#include "fusedloss.h"
#include "lists.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { FL_SPARSEMAX = 0, FL_ENTMAX15 = 1 } fl_simplex;

typedef struct {
  fl_lists lists;            // without a mask
  int32_t kind;              // fl_simplex
  int32_t dtype;             // of scores: FL_F32, FL_BF16, FL_F16 or FL_F64
  const void* scores;
  int64_t stride;            // elements from row to row of scores; not read with offsets
  int32_t out_dtype;
  void* out;                 // may be null in fl_threshold_loss; may lie in the scores' memory, row in row
  int64_t out_stride;
} fl_threshold;

int fl_threshold_project(const fl_threshold* t);   // out = p

// target: of each row its y. factor: doubles; null: 1. losses: doubles. out = factor (p - y), 0 where the factor is 0.
int fl_threshold_loss(const fl_threshold* t, const int64_t* target, const double* factor, double* losses);

// out = dL/dz of rows whose p are t->scores, given g = dL/dp in the same type and with the same strides.
int fl_threshold_backward(const fl_threshold* t, const void* g);

#ifdef __cplusplus
}

namespace fl {

struct ThresholdLoss {
  const int64_t* target;   // null: out is p
  const double *factor;
  double* losses;
};

// Of rows first to end. The scratch of a thread is threshold_scratch(longest row) bytes, aligned to 64.
struct ThresholdRows {
  void (*rows)(const fl_threshold&, const ThresholdLoss&, int64_t first, int64_t end, char* scratch);
  void (*backward)(const fl_threshold&, const void* g, int64_t first, int64_t end);
};
inline int64_t threshold_scratch(int64_t width) { return (width + 64) * (int64_t)(sizeof(double) + sizeof(int32_t)); }

namespace portable { extern const ThresholdRows threshold_rows; }
#if defined(FL_X86)
namespace avx2 { extern const ThresholdRows threshold_rows; }
namespace avx512 { extern const ThresholdRows threshold_rows; }
#endif

}  // namespace fl
#endif
