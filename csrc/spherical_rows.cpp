// The vector loops of the factored layer. Plain loops: the compiler makes vectors of them, once per instruction set.
#include "spherical_rows.h"

#ifndef FL_ISA
#define FL_ISA portable
#endif
#include "spherical_losses.h"

#define FL_UNALIASED __restrict__

namespace fl {
namespace FL_ISA {
namespace {

constexpr int64_t kLine = 64;    // bytes
constexpr int64_t kAhead = 8;    // rows of P that are asked for before they are needed
constexpr int64_t kSquare = 16;  // a matrix and its transpose are walked in squares of this

template <class A, class B>
double dot(const A* FL_UNALIASED a, const B* FL_UNALIASED b, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) sum += (double)a[j] * (double)b[j];
  return sum;
}

template <class T>
const T* row_of(const fl_factors& f, int64_t index) {
  return static_cast<const T*>(f.p) + index * f.stride;
}

template <int write, class T>
void prefetch(const T* row, int64_t d) {
  const char* const at = reinterpret_cast<const char*>(row);
  for (int64_t byte = 0; byte < d * (int64_t)sizeof(T); byte += kLine) __builtin_prefetch(at + byte, write);
}

template <class T>
void narrow(const double* FL_UNALIASED from, T* FL_UNALIASED to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = (T)from[i];
}

template <class T>
void scaled(const T* FL_UNALIASED from, T* FL_UNALIASED to, T by, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = by * from[i];
}

template <class T>
void change(double* FL_UNALIASED x, const T* FL_UNALIASED change, double keep, double by, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = keep * x[i] + by * change[i];
}

template <class T>
double changed(const double* x, const T* change, double keep, double by, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    const double to = keep * x[i] + by * change[i];
    sum += to * to;
  }
  return sum;
}

template <class T>
void visit(const fl_factors& f, const fl_visit& v, int32_t loss, const double* parameters, int64_t first, int64_t end) {
  const int64_t d = f.d, k = v.k;
  double local[64];   // scores of a row's targets; more of them use alpha's own memory, which is written last
  for (int64_t e = first * k; e < end * k && e < first * k + kAhead; ++e) prefetch<0>(row_of<T>(f, v.target[e]), d);
  for (int64_t i = first; i < end; ++i) {
    const T *h = (const T*)v.h + i * d, *hq = (const T*)v.hq + i * d, *hu = (const T*)v.hu + i * d;
    const int64_t* const target = v.target + i * k;
    double *const alpha = v.alpha + i * k, *const hit = k <= 64 ? local : alpha;
    const double along = dot(h, f.offset, d), squares = dot(hq, h, d);
    for (int64_t j = 0; j < k; ++j) {
      if (i * k + j + kAhead < end * k) prefetch<0>(row_of<T>(f, target[j + kAhead]), d);
      hit[j] = dot(row_of<T>(f, target[j]), hu, d) + along;
    }
    const Row row = {hit, v.share + i * k, alpha, k, dot(h, f.mean, d), squares < 0 ? 0 : squares, (double)f.n};
    const Derivatives out = derivatives(loss, parameters, row);
    v.losses[i] = out.loss, v.t[i] = out.t, v.gamma[i] = out.gamma;
    T* FL_UNALIASED const picked = (T*)v.picked + i * d;
    for (int64_t c = 0; c < d; ++c) picked[c] = 0;
    for (int64_t j = 0; j < k; ++j) {
      const T* FL_UNALIASED const from = row_of<T>(f, target[j]);
      const T weight = (T)alpha[j];
      for (int64_t c = 0; c < d; ++c) picked[c] += weight * from[c];
    }
  }
}

template <class T>
void backward(const fl_factors& f, const fl_visit& v, const double* upstream, const fl_batch& b, T* dh, int64_t first,
              int64_t end) {
  const int64_t d = f.d;
  for (int64_t i = first; i < end; ++i) {
    double ones = 0;
    for (int64_t j = 0; j < v.k; ++j) ones += b.alpha[i * v.k + j] = v.alpha[i * v.k + j] * upstream[i];
    b.t[i] = v.t[i] * upstream[i];
    b.gamma[i] = v.gamma[i] * upstream[i];
    const T up = (T)upstream[i], two = (T)(2 * b.gamma[i]);
    const double t = b.t[i];
    const double* FL_UNALIASED const offset = f.offset;
    const double* FL_UNALIASED const mean = f.mean;
    const T* FL_UNALIASED const hq = (const T*)v.hq + i * d;
    T* FL_UNALIASED const yw = (T*)b.yw + i * d;
    T* FL_UNALIASED const gh = (T*)b.gh + i * d;
    T* FL_UNALIASED const out = dh + i * d;
    for (int64_t c = 0; c < d; ++c) {
      const T target = up * yw[c] + (T)(ones * offset[c]);
      const T all = two * hq[c] + target;
      yw[c] = target;
      gh[c] = all;
      out[c] = all + (T)(t * mean[c]);
    }
  }
}

template <class T>
void weigh(const fl_factors& f, const fl_batch& b, T* hg, T* both, double* along, int64_t first, int64_t end) {
  const int64_t d = f.d;
  for (int64_t i = first; i < end; ++i) {
    const T* FL_UNALIASED const h = (const T*)b.h + i * d;
    along[i] = dot(h, f.offset, d);
    scaled(h, hg + i * d, (T)(2 * b.gamma[i]), d);
    const T* FL_UNALIASED const gh = (const T*)b.gh + i * d;
    const T* FL_UNALIASED const yw = (const T*)b.yw + i * d;
    T* FL_UNALIASED const sum = both + i * d;
    for (int64_t c = 0; c < d; ++c) sum[c] = gh[c] + yw[c];
  }
}

template <class T>
void weighted(const fl_batch& b, int64_t d, const double* weight, double* FL_UNALIASED out, int64_t first,
              int64_t end) {
  for (int64_t c = first; c < end; ++c) out[c] = 0;
  for (int64_t i = 0; i < b.m; ++i) {
    const T* FL_UNALIASED const h = (const T*)b.h + i * d;
    const double by = weight[i];
    for (int64_t c = first; c < end; ++c) out[c] += by * h[c];
  }
}

// act(first row, end row, first column, end column) on squares of rows first to end.
template <class Act>
void by_squares(int64_t size, int64_t first, int64_t end, Act act) {
  for (int64_t i = first; i < end; i += kSquare)
    for (int64_t j = 0; j < size; j += kSquare)
      act(i, i + kSquare < end ? i + kSquare : end, j, j + kSquare < size ? j + kSquare : size);
}

template <class T>
double mirrored(const T* FL_UNALIASED symmetric, T* FL_UNALIASED out, int64_t size, int64_t block,
                const T* FL_UNALIASED by_column, int64_t first, int64_t end) {
  const int64_t known = (first / block + 1) * block < size ? (first / block + 1) * block : size;
  by_squares(size, first, end, [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t middle = known < j0 ? j0 : known < j1 ? known : j1;
      for (int64_t j = j0; j < middle; ++j) out[i * size + j] = by_column[j] * symmetric[i * size + j];
      for (int64_t j = middle; j < j1; ++j) out[i * size + j] = by_column[j] * symmetric[j * size + i];
    }
  });
  return dot(out + first * size, out + first * size, (end - first) * size);
}

template <class T>
void joined(const T* FL_UNALIASED r, T* FL_UNALIASED out, int64_t size, const double* ones, double n, int64_t first,
            int64_t end) {
  by_squares(size, first, end, [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    for (int64_t i = i0; i < i1; ++i) {
      const double by = ones[i] / n;
      for (int64_t j = j0; j < j1; ++j) out[i * size + j] = r[i * size + j] + r[j * size + i] - (T)(by * ones[j]);
    }
  });
}

template <class T>
void less(double* FL_UNALIASED gram, const T* FL_UNALIASED z, int64_t size, double keep, int64_t first, int64_t end) {
  by_squares(size, first, end, [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t j = j0; j < j1; ++j)
        gram[i * size + j] = keep * gram[i * size + j] - ((double)z[i * size + j] + (double)z[j * size + i]);
  });
}

// Adds to sum the weighted rows of a group's entries, columns first to end.
template <class T>
void add_up(const Groups& g, int64_t group, const T* rows, int64_t d, T* FL_UNALIASED sum, int64_t first, int64_t end) {
  for (int64_t e = g.start[group]; e < g.start[group + 1]; ++e) {
    const T* FL_UNALIASED const row = rows + g.entries[e].example * d + first;
    const T weight = (T)g.entries[e].weight;
    for (int64_t c = 0; c < end - first; ++c) sum[c] += weight * row[c];
  }
}

template <class T>
void gather(const Groups& g, const T* rows, int64_t d, T* out, int64_t first, int64_t end) {
  for (int64_t group = first; group < end; ++group) {
    for (int64_t c = 0; c < d; ++c) out[group * d + c] = 0;
    add_up(g, group, rows, d, out + group * d, 0, d);
  }
}

template <class T>
void scatter(const Groups& g, const T* rows, const fl_factors& f, double lr, int64_t first, int64_t end) {
  constexpr int64_t part = 256;
  const T by = (T)-lr;
  T sum[part];
  for (int64_t group = first; group < end; ++group) {
    if (group + kAhead < end) prefetch<1>(row_of<T>(f, g.of[group + kAhead]), f.d);
    T* const row = const_cast<T*>(row_of<T>(f, g.of[group]));
    for (int64_t c0 = 0; c0 < f.d; c0 += part) {
      const int64_t c1 = c0 + part < f.d ? c0 + part : f.d;
      for (int64_t c = 0; c < c1 - c0; ++c) sum[c] = 0;
      add_up(g, group, rows, f.d, sum, c0, c1);
      for (int64_t c = c0; c < c1; ++c) row[c] += by * sum[c - c0];
    }
  }
}

}  // namespace

#define FL_SPHERICAL_TABLE(T) \
  {narrow<T>, scaled<T>, change<T>, changed<T>, visit<T>, backward<T>, weigh<T>, weighted<T>, mirrored<T>, joined<T>, less<T>, \
   gather<T>, scatter<T>}

extern const SphericalRows<float> spherical_float = FL_SPHERICAL_TABLE(float);
extern const SphericalRows<double> spherical_double = FL_SPHERICAL_TABLE(double);

}  // namespace FL_ISA
}  // namespace fl
