// The vector loops of soft sort and soft rank, compiled once per instruction set.
#pragma once
#include <stdint.h>

namespace fl {

struct PermutahedronLoops {
  // Of half precision: dtype is FL_BF16 or FL_F16.
  void (*widen)(int32_t dtype, const void* from, float* to, int64_t count);
  void (*narrow)(int32_t dtype, const float* from, void* to, int64_t count);
  // power = 2^exponents; exponents <= 0, results below 2^-1000 are 0
  void (*exp2)(const double* exponents, double* power, int64_t count);
  // 2^(values * by) = power * 2^(256 quotient), the quotient an integer, 1/2 < power < 2^256. |values * by| < 2^1000.
  void (*exp2_wide)(const double* values, double by, double* power, double* quotient, int64_t count);
  // How many of the falling values lie so far or farther above the next; how many of the numbers are negative.
  int64_t (*gaps)(const double* falling, double far, int64_t count);
  int64_t (*negative)(const int32_t* numbers, int64_t count);
  // Sums of the gradients, of the weights, and of their products.
  double (*sum)(const double* gradients, int64_t count);
  double (*sum_floats)(const float* gradients, int64_t count);
  void (*weighted)(const double* weights, const double* gradients, int64_t count, double* of_weights, double* of_both);
};

#define FL_PERMUTAHEDRON_LOOPS(isa) \
  namespace isa {                   \
  extern const PermutahedronLoops permutahedron_loops; \
  }
FL_PERMUTAHEDRON_LOOPS(portable)
#if defined(FL_X86)
FL_PERMUTAHEDRON_LOOPS(avx2)
FL_PERMUTAHEDRON_LOOPS(avx512)
#endif
#undef FL_PERMUTAHEDRON_LOOPS

}  // namespace fl
