// The vector loops of NeuralSort and SoftSort, compiled once per instruction set: a vector of places, or of items, against
// one item, or place, after the other, so that all sums stay in registers. Exponents are made in double, where digits
// would be lost, and rounded to the type of the sums; these go into doubles every few steps.
#include "permutation_rows.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace fl {
namespace FL_ISA {
namespace {

constexpr int64_t kStep = 64;   // others that are summed in T before the sums are widened

typedef double f64 __attribute__((vector_size(4 * lanes)));   // half as many as floats

template <class V>
FL_INLINE V take(const double* p) { V x; __builtin_memcpy(&x, p, sizeof x); return x; }

// Vectors of T, and the doubles that one of them is made of.
template <class T> struct Vector;

template <>
struct Vector<float> {
  using V = f32;
  static constexpr int size = lanes;
  struct Wide { f64 low, high; };
  static FL_INLINE Wide wide(const double* p) { return {take<f64>(p), take<f64>(p + lanes / 2)}; }
  template <class F> static FL_INLINE Wide map(const Wide& a, const Wide& b, F f) { return {f(a.low, b.low), f(a.high, b.high)}; }
  static FL_INLINE V narrow(const Wide& w) {
#if defined(__AVX512F__)
    const __m512 low = _mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)w.low));
    return (f32)_mm512_insertf32x8(low, _mm512_cvtpd_ps((__m512d)w.high), 1);
#elif defined(__AVX2__)
    return (f32)_mm256_set_m128(_mm256_cvtpd_ps((__m256d)w.high), _mm256_cvtpd_ps((__m256d)w.low));
#else
    float all[lanes];
    for (int i = 0; i < lanes / 2; ++i) all[i] = (float)w.low[i], all[i + lanes / 2] = (float)w.high[i];
    return load(all);
#endif
  }
  static FL_INLINE V exponential(V x) { return exp(x); }
  static FL_INLINE V indices(int64_t from) {
    f32 x;
    for (int i = 0; i < lanes; ++i) x[i] = (float)i;
    return x + (float)from;
  }
  static FL_INLINE V without(V e, int lane) {
    e[lane] = 0;
    return e;
  }
};

template <>
struct Vector<double> {
  using V = f64;
  static constexpr int size = lanes / 2;
  struct Wide { f64 all; };
  static FL_INLINE Wide wide(const double* p) { return {take<f64>(p)}; }
  template <class F> static FL_INLINE Wide map(const Wide& a, const Wide& b, F f) { return {f(a.all, b.all)}; }
  static FL_INLINE V narrow(const Wide& w) { return w.all; }
  static FL_INLINE V exponential(V x) {
    for (int i = 0; i < size; ++i) x[i] = std::exp(x[i]);
    return x;
  }
  static FL_INLINE V indices(int64_t from) {
    f64 x;
    for (int i = 0; i < size; ++i) x[i] = (double)(from + i);
    return x;
  }
  static FL_INLINE V without(V e, int lane) {
    e[lane] = 0;
    return e;
  }
};

// Column `column` of rows [first, first + n) of a matrix; 0 behind.
template <class T>
FL_INLINE typename Vector<T>::V gathered(const T* matrix, int64_t first, int n, int64_t columns, int64_t column) {
  T some[Vector<T>::size] = {};
  for (int i = 0; i < n; ++i) some[i] = matrix[(first + i) * columns + column];
  typename Vector<T>::V x;
  __builtin_memcpy(&x, some, sizeof x);
  return x;
}

template <int relaxation, class T>
struct Own {
  using L = Vector<T>;
  typename L::Wide x, p;

  FL_INLINE Own(const Side& side, int64_t first) : x(L::wide(side.x + first)), p(L::wide(side.p + first)) {}
  FL_INLINE typename L::V logits(double other_x, double other_p) const {
    return L::narrow(L::map(x, p, [=](f64 a, f64 b) -> f64 {
      if constexpr (relaxation == FL_NEURAL_SORT) return (a * other_x - other_p) - b;
      const f64 apart = a - other_x;
      return -(apart * apart);
    }));
  }
  FL_INLINE typename L::V apart(double other_x) const {
    return L::narrow(L::map(x, x, [=](f64 a, f64) -> f64 { return a - other_x; }));
  }
};

// body(others from, to, whether own ones are among them) for runs of at most kStep others.
template <class Body>
FL_INLINE void each_run(int64_t from, int64_t to, int64_t first, int n, Body body) {
  const int64_t ends[] = {from, std::min(first, to), std::min(first + n, to), to};
  for (int part = 0; part < 3; ++part)
    for (int64_t o = ends[part]; o < ends[part + 1]; o += kStep) {
      const int64_t end = std::min(o + kStep, ends[part + 1]);
      if (part == 1) body(o, end, true);
      else body(o, end, false);
    }
}

template <class T>
FL_INLINE void widen_into(double* sums, typename Vector<T>::V part) {
  for (int i = 0; i < Vector<T>::size; ++i) sums[i] += (double)part[i];
}

template <int relaxation, bool moment, class T, int K>
FL_INLINE void some_sums(const Side& own, const Side& other, int64_t first, int n, const T* values, const T* base,
                         int64_t columns, int64_t column, double* mass, double* out) {
  using L = Vector<T>;
  using V = typename L::V;
  const Own<relaxation, T> mine(own, first);
  V start[K + 1];
  for (int c = 0; c < K; ++c) start[c] = base ? gathered(base, first, n, columns, column + c) : V{};
  double sums[(K + 1) * L::size] = {};
  each_run(own.from[first], own.to[first + n - 1], first, n, [&](int64_t o, int64_t end, bool diagonal) __attribute__((always_inline)) {
    V part[K + 1] = {};
    for (; o < end; ++o) {
      V e = L::exponential(mine.logits(other.x[o], other.p[o]));
      if (diagonal) e = L::without(e, (int)(o - first));
      if constexpr (moment) e *= mine.apart(other.x[o]);
      part[K] += e;
#pragma GCC unroll 4
      for (int c = 0; c < K; ++c) part[c] += e * (values[o * columns + column + c] - start[c]);
    }
#pragma GCC unroll 5
    for (int c = 0; c <= K; ++c) widen_into<T>(sums + c * L::size, part[c]);
  });
  for (int i = 0; i < n; ++i) {
    for (int c = 0; c < K; ++c) out[(first + i) * columns + column + c] = sums[c * L::size + i];
    if (mass) mass[first + i] = sums[K * L::size + i];
  }
}

template <int relaxation, bool moment, class T>
void all_sums(const Side& own, const Side& other, int64_t count, int64_t first, const T* values, const T* base,
              int64_t columns, double* mass, double* out) {
  const int n = (int)std::min<int64_t>(Vector<T>::size, count - first);
  if (columns == 0) return some_sums<relaxation, moment, T, 0>(own, other, first, n, values, base, 0, 0, mass, out);
  int64_t c = 0;
  for (; c + 4 <= columns; c += 4, mass = nullptr)
    some_sums<relaxation, moment, T, 4>(own, other, first, n, values, base, columns, c, mass, out);
  for (; c < columns; ++c, mass = nullptr)
    some_sums<relaxation, moment, T, 1>(own, other, first, n, values, base, columns, c, mass, out);
}

template <class T>
void sums(int32_t relaxation, bool moment, const Side& own, const Side& other, int64_t count, int64_t first,
          const T* values, const T* base, int64_t columns, double* mass, double* out) {
  auto* const run = relaxation == FL_NEURAL_SORT ? &all_sums<FL_NEURAL_SORT, false, T>
                    : moment                     ? &all_sums<FL_SOFT_SORT_SQUARED, true, T>
                                                 : &all_sums<FL_SOFT_SORT_SQUARED, false, T>;
  run(own, other, count, first, values, base, columns, mass, out);
}

// One column is the common case and stays in registers; of several, the own v and the sums lie in `scratch`.
template <int relaxation, class T, bool one>
void some_slopes(const Side& items, const Side& places, int64_t first, int n, const T* r, const T* v,
                           const T* deviation, int64_t columns, const Slopes<T>& out) {
  using L = Vector<T>;
  using V = typename L::V;
  const Own<relaxation, T> mine(items, first);
  const V index = L::indices(0);
  std::vector<double> wide_x((one ? 1 : columns) * L::size, 0.0);
  std::vector<V> scratch(one ? 0 : 2 * columns);
  V* const own_v = scratch.data();
  V* const part_x = own_v + columns;
  for (int64_t c = 0; c < columns && !one; ++c) own_v[c] = gathered(v, first, n, columns, c);
  const V only_v = gathered(v, first, n, columns, 0);
  double sums[3 * L::size] = {};
  each_run(items.from[first], items.to[first + n - 1], first, n, [&](int64_t o, int64_t end, bool diagonal) __attribute__((always_inline)) {
    V part = {}, part_moment = {}, part_tau = {}, only_x = {};
    if (!one) std::fill(part_x, part_x + columns, V{});
    for (; o < end; ++o) {
      const V logits = mine.logits(places.x[o], places.p[o]);
      V e = L::exponential(logits), slope = {};
      if (diagonal) e = L::without(e, (int)(o - first));
      if constexpr (one) {
        e *= r[o];
        only_x += e;
        slope = e * ((only_v - v[o]) - deviation[o]);
      } else {
        const T *const r_o = r + o * columns, *const v_o = v + o * columns, *const deviation_o = deviation + o * columns;
        for (int64_t c = 0; c < columns; ++c) {
          part_x[c] += e * r_o[c];
          slope += r_o[c] * ((own_v[c] - v_o[c]) - deviation_o[c]);
        }
        slope *= e;
      }
      part += slope, part_tau += slope * logits;
      if constexpr (relaxation == FL_NEURAL_SORT) part_moment += slope * (index + (T)(first - o));
      else part_moment += slope * mine.apart(places.x[o]);
    }
    widen_into<T>(sums, part), widen_into<T>(sums + L::size, part_moment), widen_into<T>(sums + 2 * L::size, part_tau);
    if (one) widen_into<T>(wide_x.data(), only_x);
    else for (int64_t c = 0; c < columns; ++c) widen_into<T>(wide_x.data() + c * L::size, part_x[c]);
  });
  for (int i = 0; i < n; ++i) {
    out.total[first + i] = sums[i], out.moment[first + i] = sums[L::size + i], out.along[first + i] = sums[2 * L::size + i];
    for (int64_t c = 0; c < columns && out.x; ++c) out.x[(first + i) * columns + c] = (T)wide_x[c * L::size + i];
  }
}

template <class T>
void slopes(int32_t relaxation, const Side& items, const Side& places, int64_t count, int64_t first, const T* r,
            const T* v, const T* deviation, int64_t columns, const Slopes<T>& out) {
  const int n = (int)std::min<int64_t>(Vector<T>::size, count - first);
  const bool neural = relaxation == FL_NEURAL_SORT;
  auto* const run = columns == 1 ? (neural ? &some_slopes<FL_NEURAL_SORT, T, true> : &some_slopes<FL_SOFT_SORT_SQUARED, T, true>)
                                 : (neural ? &some_slopes<FL_NEURAL_SORT, T, false> : &some_slopes<FL_SOFT_SORT_SQUARED, T, false>);
  run(items, places, first, n, r, v, deviation, columns, out);
}

}  // namespace

extern const PermutationRows<float> permutation_float = {Vector<float>::size, &sums<float>, &slopes<float>};
extern const PermutationRows<double> permutation_double = {Vector<double>::size, &sums<double>, &slopes<double>};

}  // namespace FL_ISA
}  // namespace fl
