// The vector loops of NeuralNDCG, compiled once per instruction set.
#include "sinkhorn_rows.h"

#include <cmath>

#include "simd.h"

namespace fl {
namespace FL_ISA {
namespace {

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(4 * lanes)));
  static constexpr int64_t size = 4 * lanes / (int64_t)sizeof(T);
};

template <class V, class T>
FL_INLINE V get(const T* p) { V x; __builtin_memcpy(&x, p, sizeof x); return x; }
template <class V, class T>
FL_INLINE void put(T* p, V x) { __builtin_memcpy(p, &x, sizeof x); }

template <class T, class V>
FL_INLINE T total(V x) {
  T part[Vector<T>::size];
  __builtin_memcpy(part, &x, sizeof x);
  for (int64_t half = Vector<T>::size / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

// e^x where x >= least, else 0, in place; returns their sum.
FL_INLINE float exponentials(float* x, int64_t count, float least) {
  f32 sum{};
  for (int64_t j = 0; j < count; j += lanes) {
    const f32 at = load(x + j), e = select(at < least, 0.0f, exp(at));
    store(x + j, e);
    sum += e;
  }
  return total<float>(sum);
}
FL_INLINE double exponentials(double* x, int64_t count, double least) {
  double sum = 0;
  for (int64_t j = 0; j < count; ++j) sum += x[j] = x[j] < least ? 0.0 : std::exp(x[j]);
  return sum;
}

template <class T>
void compute(const Band<T>& band, int64_t block, T* p) {
  const int64_t low = band.low[block], width = band.high[block] - low;
  const double *const t = band.t + low, *const w = band.w + low;
  for (int64_t r = 0; r < kBlock; ++r, p += width) {
    const int64_t i = block * kBlock + r;
    if (i >= band.n) {
      for (int64_t j = 0; j < width; ++j) p[j] = 0;
      continue;
    }
    const double wi = band.w[i], ti = band.t[i], twice = 2.0 * (double)i, by = band.inverse_tau;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const double x = (wi - w[j] + twice * (ti - t[j])) * by;
      p[j] = (T)(x > 0 ? 0 : x);     // rounding; a NaN stays
    }
    const T scale = 1 / exponentials(p, width, (T)-band.cutoff);
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) p[j] *= scale;
  }
}

template <class T>
FL_INLINE const T* entries(const Band<T>& band, int64_t block, T* own) {
  if (band.p) return band.p + band.at[block];
  compute(band, block, own);
  return own;
}

template <class T>
void fill(const Band<T>& band, int64_t first, int64_t end) {
  for (int64_t block = first; block < end; ++block) compute(band, block, band.p + band.at[block]);
}

template <class T>
void sweep(const Band<T>& band, Sweep kind, int64_t first, int64_t end, const T* x, const T* weight, T* y, T* sums,
           T* own) {
  using V = typename Vector<T>::type;
  constexpr int64_t size = Vector<T>::size;
  for (int64_t block = first; block < end; ++block) {
    const int64_t low = band.low[block], width = band.high[block] - low;
    const T *const p0 = entries(band, block, own), *const p1 = p0 + width, *const p2 = p1 + width, *const p3 = p2 + width;
    const T* const from = x + low;
    T* const into = sums + low;
    V a0{}, a1{}, a2{}, a3{};
    for (int64_t j = 0; j < width; j += size) {
      const V at = get<V>(from + j);
      a0 += get<V>(p0 + j) * at, a1 += get<V>(p1 + j) * at, a2 += get<V>(p2 + j) * at, a3 += get<V>(p3 + j) * at;
    }
    const T a[kBlock] = {total<T>(a0), total<T>(a1), total<T>(a2), total<T>(a3)};
    T m[kBlock] = {};
    for (int64_t r = 0, i = block * kBlock; r < kBlock; ++r, ++i) {
      if (i >= band.n) {
        y[i] = 0;
        continue;
      }
      y[i] = kind == Sweep::given ? a[r] : kind == Sweep::inverse ? 1 / a[r] : -weight[i] * weight[i] * a[r];
      m[r] = kind == Sweep::given ? weight[i] : y[i];
    }
    for (int64_t j = 0; j < width; j += size)
      put(into + j, get<V>(into + j) + ((get<V>(p0 + j) * m[0] + get<V>(p1 + j) * m[1]) +
                                        (get<V>(p2 + j) * m[2] + get<V>(p3 + j) * m[3])));
  }
}

template <class T>
void gradient(const Band<T>& band, int64_t first, int64_t end, int64_t terms, const T* left, const T* right,
              const T* middle, T* sums, T* moments, T* own) {
  using V = typename Vector<T>::type;
  constexpr int64_t size = Vector<T>::size;
  T* const g = own + kBlock * band.widest;
  for (int64_t block = first; block < end; ++block) {
    const int64_t low = band.low[block], width = band.high[block] - low, row = block * kBlock;
    const T* const p = entries(band, block, own);
    V inner[kBlock] = {};
    for (int64_t j = 0; j < width; j += 2 * size) {
      V a[kBlock][2] = {};
      const T *l = left + row, *k = right + low + j;
      for (int64_t term = 0; term < terms; ++term, l += band.padded, k += band.padded) {
        const V k0 = get<V>(k), k1 = get<V>(k + size);
#pragma GCC unroll 4
        for (int64_t r = 0; r < kBlock; ++r) a[r][0] += k0 * l[r], a[r][1] += k1 * l[r];
      }
#pragma GCC unroll 4
      for (int64_t r = 0; r < kBlock; ++r) {
        put(g + r * width + j, a[r][0]), put(g + r * width + j + size, a[r][1]);
        inner[r] += get<V>(p + r * width + j) * a[r][0] + get<V>(p + r * width + j + size) * a[r][1];
      }
    }
    T mean[kBlock];
    for (int64_t r = 0; r < kBlock; ++r) mean[r] = total<T>(inner[r]);
    for (int64_t j = 0; j < width; j += size) {
      V sum = get<V>(sums + low + j), moment = get<V>(moments + low + j);
      const V at = get<V>(middle + low + j);
#pragma GCC unroll 4
      for (int64_t r = 0; r < kBlock; ++r) {
        const V d = get<V>(p + r * width + j) * (get<V>(g + r * width + j) - mean[r]);
        sum += d, moment += d * (at - (T)(row + r));
      }
      put(sums + low + j, sum), put(moments + low + j, moment);
    }
  }
}

}  // namespace

extern const SinkhornRows<float> sinkhorn_float;
extern const SinkhornRows<double> sinkhorn_double;
const SinkhornRows<float> sinkhorn_float = {fill, sweep, gradient};
const SinkhornRows<double> sinkhorn_double = {fill, sweep, gradient};

}  // namespace FL_ISA
}  // namespace fl
