// Sums over the pairs of a list, on the CPU: plain C, raw pointers, no torch, no Python. No pair is kept: beside its
// outputs a call takes O(n) memory. Values are FL_F32 or FL_F64; sums are in double, and the same bits come out for any
// number of threads.
#pragma once
#include <stdint.h>

#include "lists.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {                 // f of a pair's difference of scores x, times sigma
  FL_PAIR_SOFTPLUS = 0,        // log(1 + e^-x)
  FL_PAIR_LOGISTIC = 1,        // 1 / (1 + e^x)
} fl_pair_function;

// w of a pair of items of relevance r and 1-based rank p (by falling score, ties in rising order of position), with
// discounts A(p) = 1 / log2(1 + p), gains g = (2^r - 1) / max(1e-10, the k first A(p) (2^r - 1) in the best order) and
// delta(p) = A(p) - A(p + 1).
typedef enum {
  FL_PAIR_ONE = 0,             // 1
  FL_PAIR_DIFFERENCE = 1,      // |r_i - r_j|
  FL_PAIR_SQUARES = 2,         // |r_i^2 - r_j^2|
  FL_PAIR_NDCG1 = 3,           // g_i A(p_i), over all ordered pairs, i = j too, whatever their relevance
  FL_PAIR_NDCG2 = 4,           // |g_i - g_j| delta(|p_i - p_j|)
  FL_PAIR_LAMBDARANK = 5,      // |g_i - g_j| |A(p_i) - A(p_j)|
  FL_PAIR_NDCG2PP = 6,         // |g_i - g_j| (mu delta(|p_i - p_j|) + |A(p_i) - A(p_j)|)
} fl_pair_weight;

typedef struct {
  fl_lists lists;
  int32_t dtype, function, weight;
  double sigma, mu, scale;
  int64_t k;                   // only items of rank <= k take part; 0: all
} fl_pairs;

// Of each list, losses = scale sum of w_ij f(sigma (s_i - s_j)) over pairs with r_i > r_j, its gradient in the scores
// (one number per item, the weights being constants), and the number of pairs.
// A relevance that is NaN makes its list's loss and gradient NaN.
int fl_pair_losses(const fl_pairs* p, const void* scores, const void* relevance, void* losses, void* gradient,
                   int64_t* pairs);

// p_i = 1 + sum over j != i of 1 / (1 + e^(sigma (s_i - s_j))): soft 1-based positions by falling score. What is masked
// out gets 0. Of p only lists, dtype and sigma are read.
int fl_soft_positions(const fl_pairs* p, const void* scores, void* positions);
// positions' upstream gradients -> dscores.
int fl_soft_positions_backward(const fl_pairs* p, const void* scores, const void* upstream, void* dscores);

#ifdef __cplusplus
}
#endif
