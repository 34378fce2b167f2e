// Running log-sum-exps of lists, from each list's end: phi_i = log sum_{m >= i} e^(x_m), and the way back.
#pragma once
#include "fusedloss.h"
#include "lists.h"

#ifdef __cplusplus
extern "C" {
#endif

// No masks. dtype of all arrays: FL_F32 or FL_F64. An item of -inf adds nothing.
int fl_running_logsumexp(const fl_lists* lists, int32_t dtype, const void* x, void* phi);
// dx_i = sum_{k <= i} dphi_k e^(x_i - phi_k)
int fl_running_logsumexp_backward(const fl_lists* lists, int32_t dtype, const void* x, const void* phi,
                                  const void* dphi, void* dx);

#ifdef __cplusplus
}
#endif
