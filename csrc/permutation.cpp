// NeuralSort and SoftSort on the CPU. Lists are shared out among the threads, or, of few lists, the vectors of each list;
// a vector's sums are those of one thread, in one order, so that no result depends on the number of threads.
#include "permutation.h"

#include <omp.h>

#include <cmath>
#include <cstring>
#include <new>
#include <type_traits>

#include "arguments.h"
#include "permutation_rows.h"
#include "permutation_scans.h"
#include "sort_core.h"

namespace fl {

template <class T>
const PermutationRows<T>& table(const PermutationRows<float>& f, const PermutationRows<double>& d) {
  if constexpr (std::is_same_v<T, float>) return (void)d, f;
  else return (void)f, d;
}

template <class T>
const PermutationRows<T>& permutation_rows() {
#if defined(FL_X86)
  if (std::strcmp(fl_isa(), "avx512") == 0) return table<T>(avx512::permutation_float, avx512::permutation_double);
  if (std::strcmp(fl_isa(), "avx2") == 0) return table<T>(avx2::permutation_float, avx2::permutation_double);
#endif
  return table<T>(portable::permutation_float, portable::permutation_double);
}
template const PermutationRows<float>& permutation_rows<float>();
template const PermutationRows<double>& permutation_rows<double>();

namespace {

constexpr int64_t kMostLanes = 16;

template <class T, class Work>
void each_list(const fl_permutation& p, const void* t, Work work) {
  const int threads = omp_get_max_threads();
  const bool shared = p.lists.rows >= threads;
  auto run = [&](int64_t row, int inside) {
    const int64_t first = first_item(p.lists, row), items = count_items(p.lists, row);
    work(List<T>{p, first, items, p.counts ? p.counts[row] : items, p.tau[row], (const T*)t + first, inside}, row);
  };
  bool failed = false;   // memory: an exception may not leave a parallel region
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (shared && threads > 1)
  for (int64_t row = 0; row < p.lists.rows; ++row) try {
      run(row, shared ? 1 : threads);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      failed = true;
    }
  if (failed) throw std::bad_alloc();
}

// ---- bands -------------------------------------------------------------------------------------------------------------

template <class T>
struct Band {
  std::vector<double> numbers;
  std::vector<int32_t> ends;
  Side places, items;

  explicit Band(const List<T>& list) : numbers(4 * (list.count + kMostLanes)), ends(4 * list.count) {
    const int64_t m = list.count, padded = m + kMostLanes;
    double *const x = numbers.data(), *const a = x + padded, *const w = a + padded, *const c = w + padded;
    int32_t *const lo = ends.data(), *const hi = lo + m, *const from = hi + m, *const to = from + m;
    const bool neural = list.p.relaxation == FL_NEURAL_SORT;
    const double scale = 1 / (neural ? list.tau : std::sqrt(list.tau)), middle = list.middle();
    for (int64_t j = 0; j < m; ++j) x[j] = ((double)list.t[j] - middle) * scale;
    if (neural) {
      for (int64_t j = 0; j + 1 < m; ++j) a[j + 1] = a[j] + (x[j] - x[j + 1]) * (double)(2 * (j + 1) - m);   // of A_j - A_1
      for (int64_t i = 0; i < m; ++i) w[i] = (double)(m - 1 - 2 * i), c[i] = w[i] * x[i] - a[i];
    }
    constexpr bool single = std::is_same_v<T, float>;
    const double rounding = std::log((double)std::max<int64_t>(m, 1)) + (single ? 17.4 : 37.5);   // m exp(-this) is 2^-25, 2^-54
    const double cutoff = std::max(rounding, single ? 32.0 : 45.0);
    auto inside = [&](int64_t i, int64_t j) {
      const double apart = x[i] - x[j];
      return (neural ? w[i] * x[j] - a[j] - c[i] : -apart * apart) >= -cutoff;
    };
    for (int64_t i = 0, low = 0, high = 0; i < m; ++i) {
      while (low < i && !inside(i, low)) ++low;
      high = std::max(high, i + 1);
      while (high < m && inside(i, high)) ++high;
      lo[i] = (int32_t)low, hi[i] = (int32_t)high;
    }
    for (int64_t j = 0, low = 0, high = 0; j < m; ++j) {
      while (hi[low] <= j) ++low;
      while (high < m && lo[high] <= j) ++high;
      from[j] = (int32_t)low, to[j] = (int32_t)high;
    }
    items = {x, a, from, to};
    places = neural ? Side{w, c, lo, hi} : Side{x, a, lo, hi};
  }
};

// work(first) for every vector of a list.
template <class T, class Work>
void each_vector(const List<T>& list, Work work) {
  const int64_t size = permutation_rows<T>().lanes, vectors = (list.count + size - 1) / size;
  bool failed = false;
#pragma omp parallel for schedule(dynamic, 4) num_threads(list.threads) if (list.threads > 1 && vectors > 8)
  for (int64_t i = 0; i < vectors; ++i) try {
      work(i * size);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      failed = true;
    }
  if (failed) throw std::bad_alloc();
}

template <class T>
void banded_sums(const List<T>& list, const T* v, double* mass, double* out) {
  const Band<T> band(list);
  each_vector(list, [&](int64_t first) {
    permutation_rows<T>().sums(list.p.relaxation, false, band.places, band.items, list.count, first, v, v,
                               list.p.columns, mass, out);
  });
}

template <class T>
void banded_transposed(const List<T>& list, const T* r, double* out) {
  const Band<T> band(list);
  each_vector(list, [&](int64_t first) {
    permutation_rows<T>().sums(list.p.relaxation, false, band.items, band.places, list.count, first, r, (const T*)nullptr,
                               list.p.columns, (double*)nullptr, out);
  });
}

// Of NeuralSort, with d_ij the derivative in D_ij and C_j = sum_i d_ij:
//   tau dt_j = sum_i (w_i - w_j) d_ij + sum over k before j of C_k - sum over k behind j of C_k
// where |t_j - t_k| of equal scores has derivative 0: they are neither before nor behind each other.
// `diagonal`: the derivatives in D_ii.
template <class T>
void neural_slopes(const List<T>& list, const std::vector<double>& diagonal, std::vector<double>& total,
                   const std::vector<double>& moment, double* dt) {
  const int64_t m = list.count;
  double all = 0, before = 0;
  for (int64_t j = 0; j < m; ++j) all += total[j] += diagonal[j];
  for (int64_t start = 0, end; start < m; start = end) {
    double tied = 0;
    for (end = start; end < m && list.t[end] == list.t[start]; ++end) tied += total[end];
    for (int64_t j = start; j < end; ++j)
      dt[j] = (2 * moment[j] + (double)(start + end - 1 - 2 * j) * total[j] + before - (all - before - tied)) / list.tau;
    before += tied;
  }
}

template <class T>
void banded_slopes(const List<T>& list, const T* r, const T* v, const T* deviation, const std::vector<double>& diagonal,
                   double* dt, double& dtau, T* x) {
  const Band<T> band(list);
  const int64_t m = list.count, columns = list.p.columns;
  const auto& rows = permutation_rows<T>();
  std::vector<double> total(m), moment(m), along(m);
  const Slopes<T> slopes = {total.data(), moment.data(), along.data(), x};
  const bool neural = list.p.relaxation == FL_NEURAL_SORT;
  each_vector(list, [&](int64_t first) {
    rows.slopes(list.p.relaxation, band.items, band.places, m, first, r, v, deviation, columns, slopes);
  });
  for (int64_t j = 0; j < m; ++j) dtau -= along[j] / list.tau;
  if (neural) return neural_slopes(list, diagonal, total, moment, dt);
  std::vector<double> mass(m), out(m * columns);
  each_vector(list, [&](int64_t first) {
    rows.sums(list.p.relaxation, true, band.places, band.items, m, first, v, v, columns, mass.data(), out.data());
  });
  for (int64_t i = 0; i < m; ++i) {
    double own = moment[i];
    for (int64_t c = i * columns; c < (i + 1) * columns; ++c)
      own += (double)r[c] * (out[c] - (double)deviation[c] * mass[i]);
    dt[i] = -2 * own / std::sqrt(list.tau);
  }
}

// ---- the surface ---------------------------------------------------------------------------------------------------------

template <class T>
int order(const fl_lists& lists, const T* scores, int64_t* index) {
  bool failed = false;
#pragma omp parallel if (lists.rows > 1)
  {
    SortScratch scratch;
    std::vector<int32_t> positions;
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < lists.rows; ++row) try {
        const int64_t first = first_item(lists, row), n = count_items(lists, row);
        positions.resize(n);
        sort_falling(scores + first, lists.mask ? lists.mask + first : nullptr, n, positions.data(), scratch);
        for (int64_t i = 0; i < n; ++i) index[first + i] = first + positions[i];
      } catch (const std::bad_alloc&) {
#pragma omp atomic write
        failed = true;
      }
  }
  return failed ? fail("permutation: no memory") : 0;
}

template <class T>
int product(const fl_permutation& p, const void* t, const void* v_all, void* y_all, void* rest_all, void* deviation_all) {
  each_list<T>(p, t, [&](const List<T>& list, int64_t) {
    const T* v = list.of((const T*)v_all, p.columns);
    T *y = list.of((T*)y_all, p.columns), *rest = list.of((T*)rest_all), *deviation = list.of((T*)deviation_all, p.columns);
    const bool finite = list.finite();
    list.fill(y, p.columns, !finite), list.fill(rest, 1, !finite), list.fill(deviation, p.columns, !finite);
    if (!finite || list.count == 0) return;
    std::vector<double> mass(list.count), sums(list.count * p.columns);
    if (p.relaxation == FL_SOFT_SORT) scanned_sums(list, v, mass.data(), sums.data());
    else banded_sums(list, v, mass.data(), sums.data());
    for (int64_t i = 0; i < list.count; ++i) {
      rest[i] = (T)mass[i];
      for (int64_t c = i * p.columns; c < (i + 1) * p.columns; ++c) {
        const double change = sums[c] / (1 + mass[i]);
        deviation[c] = (T)change, y[c] = (T)((double)v[c] + change);
      }
    }
  });
  return 0;
}

// u / (1 + rest)
template <class T>
std::vector<T> weights(const List<T>& list, const T* rest, const T* u) {
  const int64_t columns = list.p.columns;
  std::vector<T> r(list.count * columns);
  for (int64_t i = 0; i < list.count; ++i)
    for (int64_t c = i * columns; c < (i + 1) * columns; ++c) r[c] = u[c] / (1 + rest[i]);
  return r;
}

template <class T>
int transposed(const fl_permutation& p, const void* t, const void* rest, const void* u, void* x_all) {
  each_list<T>(p, t, [&](const List<T>& list, int64_t) {
    T* x = list.of((T*)x_all, p.columns);
    const bool finite = list.finite();
    list.fill(x, p.columns, !finite);
    if (!finite || list.count == 0 || p.columns == 0) return;
    const std::vector<T> r = weights(list, list.of((const T*)rest), list.of((const T*)u, p.columns));
    std::vector<double> sums(r.size());
    if (p.relaxation == FL_SOFT_SORT) scanned_transposed(list, r.data(), sums.data());
    else banded_transposed(list, r.data(), sums.data());
    for (size_t i = 0; i < r.size(); ++i) x[i] = (T)(sums[i] + (double)r[i]);   // and each row's peak
  });
  return 0;
}

template <class T>
int gradient(const fl_permutation& p, const void* t, const void* rest_all, const void* u_all, const void* v_all,
             const void* deviation_all, void* dt_all, double* dtau, void* x_all) {
  each_list<T>(p, t, [&](const List<T>& list, int64_t row) {
    const int64_t m = list.count, columns = p.columns;
    const T *rest = list.of((const T*)rest_all), *u = list.of((const T*)u_all, columns);
    T *dt = list.of((T*)dt_all), *x = list.of((T*)x_all, columns);
    const bool finite = list.finite();
    list.fill(dt, 1, !finite), list.fill(x, columns, !finite);
    dtau[row] = finite ? 0 : NAN;
    if (!finite || m == 0) return;
    // Of the sum of e^D over j != i, which has no weights 1 / (1 + rest), v_j - v_i - deviation_i is 1 at every j != i.
    const bool whole = v_all;
    const std::vector<T> none(whole ? 0 : m), ones(whole ? 0 : m, (T)-1);
    const T* v = whole ? list.of((const T*)v_all, columns) : none.data();
    const T* deviation = whole ? list.of((const T*)deviation_all, columns) : ones.data();
    const std::vector<T> r = whole ? weights(list, rest, u) : std::vector<T>(u, u + m);
    std::vector<double> diagonal(m), slopes(m);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t c = i * columns; c < (i + 1) * columns; ++c)
        diagonal[i] -= (double)r[c] * (double)(whole ? deviation[c] : rest[i]);
    if (p.relaxation == FL_SOFT_SORT) scanned_slopes(list, r.data(), v, deviation, slopes.data(), dtau[row], x);
    else banded_slopes(list, r.data(), v, deviation, diagonal, slopes.data(), dtau[row], x);
    for (int64_t i = 0; i < m * columns && x; ++i) x[i] += r[i];
    for (int64_t j = 0; j < m; ++j) dt[j] = (T)slopes[j];
  });
  return 0;
}

int check_permutation(const char* name, const fl_permutation* p) {
  if (!p) return fail("%s: the permutation is null", name);
  if (p->dtype != FL_F32 && p->dtype != FL_F64) return fail("%s: dtype %d, expected FL_F32 or FL_F64", name, p->dtype);
  if (p->relaxation < FL_NEURAL_SORT || p->relaxation > FL_SOFT_SORT_SQUARED)
    return fail("%s: relaxation %d is unknown", name, p->relaxation);
  if (p->lists.rows < 0 || p->lists.width < 0 || p->columns < 0) return fail("%s: a negative size", name);
  if (p->lists.mask) return fail("%s: sorted lists have counts, no mask", name);
  if (p->lists.rows > 0 && !p->tau) return fail("%s: tau is null", name);
  return 0;
}

}  // namespace
}  // namespace fl

// One call for float, one for double; no exception leaves.
#define FL_BY_TYPE(dtype, call_float, call_double)       \
  try {                                                  \
    return (dtype) == FL_F64 ? call_double : call_float; \
  } catch (const std::bad_alloc&) {                      \
    return fl::fail("permutation: no memory");           \
  }

extern "C" {

int fl_permutation_order(const fl_lists* lists, int32_t dtype, const void* scores, int64_t* index) {
  if (dtype != FL_F32 && dtype != FL_F64) return fl::fail("order: dtype %d, expected FL_F32 or FL_F64", dtype);
  FL_BY_TYPE(dtype, fl::order(*lists, (const float*)scores, index), fl::order(*lists, (const double*)scores, index))
}

int fl_permutation_product(const fl_permutation* p, const void* t, const void* v, void* y, void* rest, void* deviation) {
  if (int status = fl::check_permutation("product", p)) return status;
  FL_BY_TYPE(p->dtype, fl::product<float>(*p, t, v, y, rest, deviation), fl::product<double>(*p, t, v, y, rest, deviation))
}

int fl_permutation_transposed(const fl_permutation* p, const void* t, const void* rest, const void* u, void* x) {
  if (int status = fl::check_permutation("transposed", p)) return status;
  FL_BY_TYPE(p->dtype, fl::transposed<float>(*p, t, rest, u, x), fl::transposed<double>(*p, t, rest, u, x))
}

int fl_permutation_gradient(const fl_permutation* p, const void* t, const void* rest, const void* u, const void* v,
                            const void* deviation, void* dt, double* dtau, void* x) {
  if (int status = fl::check_permutation("gradient", p)) return status;
  if (fl::all_items(p->lists) > 0 && (!v != !deviation || (!v && p->columns != 1)))
    return fl::fail("gradient: v goes with deviation, or one column");
  FL_BY_TYPE(p->dtype, fl::gradient<float>(*p, t, rest, u, v, deviation, dt, dtau, x),
             fl::gradient<double>(*p, t, rest, u, v, deviation, dt, dtau, x))
}
}
