// Running log-sum-exps on the CPU: one scan each way, threads over lists.
#include "running.h"

#include <cmath>

#include "arguments.h"

namespace fl {
namespace {

constexpr int64_t kMany = 4096;   // items that are worth threads

template <class T>
T ratio(T a, T b) { return a == b ? 1 : std::exp(a - b); }   // e^(a - b), also of two infinities

// Sums are relative to the largest item so far, in double.
template <class T>
void forward(const T* x, int64_t n, T* phi) {
  if (n == 0) return;
  T top = x[n - 1];
  double sum = 0;
  for (int64_t i = n - 1; i >= 0; --i) {
    if (x[i] > top) {
      sum = sum * ratio(top, x[i]) + 1;
      top = x[i];
    } else {
      sum += ratio(x[i], top);
    }
    phi[i] = top + std::log((T)sum);
  }
}

// phi falls, so that no ratio is above 1.
template <class T>
void backward(const T* x, const T* phi, const T* dphi, int64_t n, T* dx) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum = (i ? sum * ratio(phi[i], phi[i - 1]) : 0) + dphi[i];
    dx[i] = (T)(sum * ratio(x[i], phi[i]));
  }
}

template <class Work>
int each_list(const char* name, const fl_lists* lists, int32_t dtype, Work work) {
  if (!lists || lists->rows < 0 || lists->width < 0) return fail("%s: lists", name);
  if (dtype != FL_F32 && dtype != FL_F64) return fail("%s: dtype %d is unknown", name, dtype);
#pragma omp parallel for schedule(dynamic) if (lists->rows > 1 && all_items(*lists) >= kMany)
  for (int64_t row = 0; row < lists->rows; ++row) {
    const int64_t first = first_item(*lists, row), n = count_items(*lists, row);
    if (dtype == FL_F32) work(0.0f, first, n);
    else work(0.0, first, n);
  }
  return 0;
}

}  // namespace
}  // namespace fl

extern "C" {

int fl_running_logsumexp(const fl_lists* lists, int32_t dtype, const void* x, void* phi) {
  return fl::each_list("running_logsumexp", lists, dtype, [&](auto zero, int64_t first, int64_t n) {
    using T = decltype(zero);
    fl::forward(static_cast<const T*>(x) + first, n, static_cast<T*>(phi) + first);
  });
}

int fl_running_logsumexp_backward(const fl_lists* lists, int32_t dtype, const void* x, const void* phi,
                                  const void* dphi, void* dx) {
  return fl::each_list("running_logsumexp_backward", lists, dtype, [&](auto zero, int64_t first, int64_t n) {
    using T = decltype(zero);
    fl::backward(static_cast<const T*>(x) + first, static_cast<const T*>(phi) + first,
                 static_cast<const T*>(dphi) + first, n, static_cast<T*>(dx) + first);
  });
}

}
