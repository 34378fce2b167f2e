// The vector loops of soft sort and soft rank, compiled once per instruction set.
#include "permutahedron_rows.h"

#include "fusedloss.h"
#include "simd.h"

namespace fl {
namespace FL_ISA {
namespace {

template <class Half>
void widen_all(const Half* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load(from + i));
  if (i < count) store(to + i, load(from + i, (int)(count - i)), (int)(count - i));
}

template <class Half>
void narrow_all(const float* from, Half* to, int64_t count) {
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load(from + i));
  if (i < count) store(to + i, load(from + i, (int)(count - i)), (int)(count - i));
}

void widen_row(int32_t dtype, const void* from, float* to, int64_t count) {
  if (dtype == FL_BF16) widen_all((const bf16*)from, to, count);
  else widen_all((const f16*)from, to, count);
}

void narrow_row(int32_t dtype, const float* from, void* to, int64_t count) {
  if (dtype == FL_BF16) narrow_all(from, (bf16*)to, count);
  else narrow_all(from, (f16*)to, count);
}

// 2^r, |r| <= 1/2: the exponential's series, whose next term is below 2^-53.
FL_INLINE double root_power(double r) {
  const double x = r * 0.693147180559945309417;
  double y = 1.0 / 479001600;
  y = y * x + 1.0 / 39916800;
  y = y * x + 1.0 / 3628800;
  y = y * x + 1.0 / 362880;
  y = y * x + 1.0 / 40320;
  y = y * x + 1.0 / 5040;
  y = y * x + 1.0 / 720;
  y = y * x + 1.0 / 120;
  y = y * x + 1.0 / 24;
  y = y * x + 1.0 / 6;
  y = y * x + 0.5;
  y = y * x + 1.0;
  return y * x + 1.0;
}

constexpr double shift = 0x1.8p52;   // added to a small integer, it leaves that in the low bits

void exp2_row(const double* exponents, double* power, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const double t = exponents[i] > -1000 ? exponents[i] : -1000, biased = t + shift;
    const int64_t bits = bits_of<int64_t>(root_power(t - (biased - shift))) + (bits_of<int64_t>(biased) << 52);
    power[i] = exponents[i] > -1000 ? bits_of<double>(bits) : 0.0;
  }
}

void exp2_wide_row(const double* values, double by, double* power, double* quotient, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const double whole = values[i] * by;
    const double t = whole > 0x1p1000 ? 0x1p1000 : whole < -0x1p1000 ? -0x1p1000 : whole, n = __builtin_rint(t);
#if defined(__FMA__)
    double r = (t - n) + __builtin_fma(values[i], by, -t);   // the product's rounding counts where t is large
    r = r > 1 ? 1 : r < -1 ? -1 : r;
#else
    const double r = t - n;
#endif
    const double q = __builtin_floor(n * 0x1p-8);
    quotient[i] = q;
    power[i] = bits_of<double>(bits_of<int64_t>(root_power(r)) + (bits_of<int64_t>((n - q * 256) + shift) << 52));
  }
}

int64_t gaps_row(const double* falling, double far, int64_t count) {
  int64_t all = 0;
#pragma omp simd reduction(+ : all)
  for (int64_t i = 0; i < count - 1; ++i) all += falling[i] - falling[i + 1] >= far;
  return all;
}

int64_t negative_row(const int32_t* numbers, int64_t count) {
  int64_t all = 0;
  while (count > 0) {                       // counted in 32 bits as long as these suffice
    const int64_t some = count < (1 << 30) ? count : 1 << 30;
    int32_t part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = 0; i < some; ++i) part += (int32_t)((uint32_t)numbers[i] >> 31);
    all += part, numbers += some, count -= some;
  }
  return all;
}

template <class Number>
double sum_row(const Number* gradients, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += gradients[i];
  return sum;
}

void weighted_row(const double* weights, const double* gradients, int64_t count, double* of_weights, double* of_both) {
  double one = 0, both = 0;
#pragma omp simd reduction(+ : one, both)
  for (int64_t i = 0; i < count; ++i) one += weights[i], both += weights[i] * gradients[i];
  *of_weights = one, *of_both = both;
}

}  // namespace

extern const PermutahedronLoops permutahedron_loops;
const PermutahedronLoops permutahedron_loops = {widen_row,    narrow_row,      exp2_row,       exp2_wide_row, gaps_row,
                                                negative_row, sum_row<double>, sum_row<float>, weighted_row};

}  // namespace FL_ISA
}  // namespace fl
