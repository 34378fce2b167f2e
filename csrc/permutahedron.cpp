// The soft sort and soft rank on the CPU.
#include "permutahedron.h"

#include "arguments.h"

extern "C" {
int fl_soft_rank(const fl_permutahedron*, const void*, void*, int32_t*) { return fl::fail("soft_rank: to be written"); }
int fl_soft_sort(const fl_permutahedron*, const void*, void*, int32_t*) { return fl::fail("soft_sort: to be written"); }
int fl_soft_rank_backward(const fl_permutahedron*, const void*, const int32_t*, const void*, void*, double*) {
  return fl::fail("soft_rank_backward: to be written");
}
int fl_soft_sort_backward(const fl_permutahedron*, const void*, const int32_t*, const void*, void*, double*) {
  return fl::fail("soft_sort_backward: to be written");
}
}
