// The vector loops over pairs, compiled once per instruction set. Doubles go one by one.
#include "pairwise_rows.h"

#include "simd.h"

namespace fl {
namespace FL_ISA {

template <class V, class T> FL_INLINE V every(T x) { return V{} + x; }   // splat, of doubles too
FL_INLINE double load(const double* p) { return *p; }
FL_INLINE double exp(double x) { return ::exp(x); }
FL_INLINE double log1p(double x) { return ::log1p(x); }
FL_INLINE double absolute(double x) { return ::fabs(x); }
FL_INLINE double select(bool mask, double a, double b) { return mask ? a : b; }

namespace {

template <class T> struct Vector;
template <> struct Vector<float> {
  typedef f32 values;
  typedef i32 integers;
  static constexpr int width = lanes;
  FL_INLINE static i32 integers_at(const int32_t* p) { i32 x; __builtin_memcpy(&x, p, sizeof x); return x; }
  FL_INLINE static f32 gather(const float* table, i32 at) {
#if defined(__AVX512F__)
    return (f32)_mm512_i32gather_ps((__m512i)at, table, 4);
#elif defined(__AVX2__)
    return (f32)_mm256_i32gather_ps(table, (__m256i)at, 4);
#else
    f32 x{};
    for (int i = 0; i < lanes; ++i) x[i] = table[at[i]];
    return x;
#endif
  }
  // Lanes j, j + 1, ... that lie in [first, end).
  FL_INLINE static i32 within(int64_t j, int64_t first, int64_t end) {
    i32 lane;
    for (int i = 0; i < lanes; ++i) lane[i] = i;
    const i32 low = i32{} + (int32_t)(first - j), high = i32{} + (int32_t)(end - j);
    return (lane >= low) & (lane < high);
  }
};
template <> struct Vector<double> {
  typedef double values;
  typedef int32_t integers;
  static constexpr int width = 1;
  FL_INLINE static int32_t integers_at(const int32_t* p) { return *p; }
  FL_INLINE static double gather(const double* table, int32_t at) { return table[at]; }
  FL_INLINE static bool within(int64_t j, int64_t first, int64_t end) { return j >= first && j < end; }
};

template <class V>
struct Terms {   // what a pair adds: to the sum, and to its two items
  V sum, i, j;
};

FL_INLINE double sum_of(f32 x) { return sum_of_lanes(x); }
FL_INLINE double sum_of(double x) { return x; }
FL_INLINE void add(double* to, f32 x, int64_t n) {
  if (n >= lanes) {
    for (int l = 0; l < lanes; ++l) to[l] += x[l];
  } else {
    for (int l = 0; l < n; ++l) to[l] += x[l];
  }
}
FL_INLINE void add(double* to, double x, int64_t) { *to += x; }

// Every pair of the block once, in vectors of j. Single numbers are summed over at most 32 items or 512 partners, then
// in double.
template <class T, class Pair>
FL_INLINE double walk(const PairItems<T>& items, int64_t first, int64_t end, double* to, const Pair& pair) {
  typedef Vector<T> Of;
  typedef typename Of::values V;
  constexpr int64_t span = 32 * Of::width;
  V own[kPairBlock];
  double whole[kPairBlock] = {}, sum[Of::width] = {};
  const int block = (int)(end - first);
  for (int64_t begin = items.partner[first]; begin < items.count; begin += span) {
    const int64_t stop = begin + span < items.count ? begin + span : items.count;
    for (int i = 0; i < block; ++i) own[i] = V{};
    for (int64_t j = begin; j < stop; j += Of::width) {
      V theirs{}, some{};
      if (j >= items.partner[end - 1] && j + Of::width <= items.count) {
        for (int i = 0; i < block; ++i) {
          const Terms<V> t = pair(first + i, j);
          own[i] += t.i, theirs += t.j, some += t.sum;
        }
      } else {
        for (int i = 0; i < block; ++i) {
          const auto counts = Of::within(j, items.partner[first + i], items.count);
          const Terms<V> t = pair(first + i, j);
          own[i] += select(counts, t.i, V{}), theirs += select(counts, t.j, V{}), some += select(counts, t.sum, V{});
        }
      }
      add(to + j, theirs, items.count - j);
      add(sum, some, Of::width);
    }
    for (int i = 0; i < block; ++i) whole[i] += sum_of(own[i]);
  }
  for (int i = 0; i < block; ++i) to[first + i] += whole[i];
  double total = 0;
  for (int l = 0; l < Of::width; ++l) total += sum[l];
  return total;
}

template <class T>
FL_INLINE typename Vector<T>::values weight(const PairItems<T>& p, PairForm form, int64_t i, int64_t j) {
  typedef Vector<T> Of;
  typedef typename Of::values V;
  if (form == PairForm::one) return every<V>((T)1);
  if (form == PairForm::own) return every<V>(p.a[i]);
  V w = absolute(every<V>(p.a[i]) - load(p.a + j));
  if (form == PairForm::product) {
    V by = absolute(every<V>(p.b[i]) - load(p.b + j));
    if (p.table) {
      typename Of::integers apart = Of::integers_at(p.rank + j) - p.rank[i];
      by += Of::gather(p.table, apart < 0 ? -apart : apart);
    }
    w *= by;
  }
  return w;
}

// What is behind the last item has any score, relevance and rank 0: select() drops it.
template <int32_t function, PairForm form, class T>
double sums(const PairItems<T>& p, int64_t first, int64_t end, double* to) {
  typedef typename Vector<T>::values V;
  const T sigma = (T)p.sigma;
  return walk(p, first, end, to, [&](int64_t i, int64_t j) -> Terms<V> {
    const V x = (every<V>(p.score[i]) - load(p.score + j)) * sigma, w = weight(p, form, i, j);
    const V u = exp(-absolute(x)), one = every<V>((T)1), part = one / (one + u);
    const V falling = select(x < 0, part, u * part);   // 1 / (1 + e^x)
    V f, slope;
    if (function == FL_PAIR_SOFTPLUS) {
      f = log1p(u) + select(x < 0, -x, V{});
      slope = falling;
    } else {
      f = falling;
      slope = u * part * part;
    }
    const V g = w * slope * sigma;
    return {w * f, -g, g};
  });
}

template <class T>
double losses(const PairItems<T>& p, int32_t function, PairForm form, int64_t first, int64_t end, double* to) {
  if (function == FL_PAIR_LOGISTIC) return sums<FL_PAIR_LOGISTIC, PairForm::one>(p, first, end, to);
  switch (form) {
    case PairForm::one: return sums<FL_PAIR_SOFTPLUS, PairForm::one>(p, first, end, to);
    case PairForm::gap: return sums<FL_PAIR_SOFTPLUS, PairForm::gap>(p, first, end, to);
    case PairForm::product: return sums<FL_PAIR_SOFTPLUS, PairForm::product>(p, first, end, to);
    default: return sums<FL_PAIR_SOFTPLUS, PairForm::own>(p, first, end, to);
  }
}

template <class T>
void positions(const PairItems<T>& p, int64_t first, int64_t end, double* to) {
  typedef typename Vector<T>::values V;
  const T sigma = (T)p.sigma;
  walk(p, first, end, to, [&](int64_t i, int64_t j) -> Terms<V> {
    const V x = (every<V>(p.score[i]) - load(p.score + j)) * sigma, u = exp(-absolute(x));
    const V large = every<V>((T)1) / (every<V>((T)1) + u), small = u * large;
    return {V{}, select(x < 0, large, small), select(x < 0, small, large)};
  });
}

template <class T>
void positions_backward(const PairItems<T>& p, int64_t first, int64_t end, double* to) {
  typedef typename Vector<T>::values V;
  const T sigma = (T)p.sigma;
  walk(p, first, end, to, [&](int64_t i, int64_t j) -> Terms<V> {
    const V u = exp(-absolute((every<V>(p.score[i]) - load(p.score + j)) * sigma));
    const V part = every<V>((T)1) / (every<V>((T)1) + u);
    const V g = (every<V>(p.a[i]) - load(p.a + j)) * (u * part * part * sigma);
    return {V{}, -g, g};
  });
}

}  // namespace

extern const PairRows<float> pair_float = {losses<float>, positions<float>, positions_backward<float>};
extern const PairRows<double> pair_double = {losses<double>, positions<double>, positions_backward<double>};

}  // namespace FL_ISA
}  // namespace fl
