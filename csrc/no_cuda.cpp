// The CUDA part of the C surface where the library was built without nvcc.
#include "arguments.h"
#include "permutahedron.h"

namespace {
int refuse() { return fl::fail("fusedloss was built without nvcc: it has no CUDA kernels"); }
}  // namespace

extern "C" {

int fl_cuda_compiled(void) { return 0; }
int64_t fl_cuda_statistics_workspace(const fl_tile*, const fl_statistic*, int32_t) { return 0; }
int64_t fl_cuda_column_statistics_workspace(const fl_tile*, const fl_statistic*, int32_t) { return 0; }
int64_t fl_cuda_gradient_workspace(const fl_tile*, const fl_statistic*, int32_t, const fl_statistic*, int32_t,
                                   const fl_sums*) {
  return 0;
}
int fl_cuda_statistics(const fl_tile*, const fl_statistic*, int32_t, void*, int64_t, void*) { return refuse(); }
int fl_cuda_column_statistics(const fl_tile*, const fl_statistic*, int32_t, void*, int64_t, void*) { return refuse(); }
int fl_cuda_gradient(const fl_tile*, void*, int64_t, int32_t, const fl_statistic*, int32_t, const fl_statistic*, int32_t,
                     const fl_sums*, void*, int64_t, void*) {
  return refuse();
}
int fl_cuda_gradient_of_exponentials(const fl_tile*, const fl_statistic*, int32_t, const fl_sums*, void*, int64_t, void*) {
  return refuse();
}

int64_t fl_cuda_soft_rank_workspace(const fl_permutahedron*) { return 0; }
int64_t fl_cuda_soft_rank_backward_workspace(const fl_permutahedron*) { return 0; }
int64_t fl_cuda_soft_sort_workspace(const fl_permutahedron*) { return 0; }
int64_t fl_cuda_soft_sort_backward_workspace(const fl_permutahedron*) { return 0; }
int fl_cuda_soft_rank(const fl_permutahedron*, const void*, void*, int32_t*, void*, int64_t, void*) { return refuse(); }
int fl_cuda_soft_sort(const fl_permutahedron*, const void*, void*, int32_t*, void*, int64_t, void*) { return refuse(); }
int fl_cuda_soft_rank_backward(const fl_permutahedron*, const void*, const int32_t*, const void*, void*, double*, void*,
                               int64_t, void*) {
  return refuse();
}
int fl_cuda_soft_sort_backward(const fl_permutahedron*, const void*, const int32_t*, const void*, void*, double*, void*,
                               int64_t, void*) {
  return refuse();
}

}  // extern "C"
