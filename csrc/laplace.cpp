// LapSum on the CPU: threads over rows.
#include "laplace.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "arguments.h"
#include "sort_core.h"

namespace fl {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A row in falling order, and sums over what stands above and below each item.
struct Row {
  SortScratch scratch;
  std::vector<int32_t> places;
  std::vector<double> y, gap, decay;   // gap to the next item / alpha, e^-gap
  std::vector<double> above, below;    // sums of e^-distance over the items before, behind
  std::vector<double> above_distance, below_distance;   // sums of distance e^-distance
  int64_t count = 0, first = 0, end = 0;   // items; [first, end) are finite

  // y from an order that is known; negated: of -x, so the order is read from its end.
  template <class T>
  void read(const T* x, const int32_t* order, int64_t m, double alpha, bool negated) {
    count = m;
    y.resize(m), gap.resize(m), decay.resize(m);
    for (int64_t j = 0; j < m; ++j) y[j] = negated ? -(double)x[order[m - 1 - j]] : (double)x[order[j]];
    for (first = 0; first < m && y[first] == kInfinity; ++first) {}
    for (end = m; end > first && y[end - 1] == -kInfinity; --end) {}
    for (int64_t j = 0; j + 1 < m; ++j) {
      gap[j] = y[j] == y[j + 1] ? 0 : (y[j] - y[j + 1]) / alpha;
      decay[j] = std::exp(-gap[j]);
    }
  }

  void add_up() {
    above.resize(count), below.resize(count);
    if (!count) return;
    above[0] = below[count - 1] = 0;
    for (int64_t j = 1; j < count; ++j) above[j] = decay[j - 1] * (above[j - 1] + 1);
    for (int64_t j = count - 2; j >= 0; --j) below[j] = decay[j] * (below[j + 1] + 1);
  }

  void add_up_distances() {
    above_distance.resize(count), below_distance.resize(count);
    if (!count) return;
    above_distance[0] = below_distance[count - 1] = 0;
    for (int64_t j = 1; j < count; ++j)
      above_distance[j] = decay[j - 1] == 0 ? 0 : decay[j - 1] * above_distance[j - 1] + gap[j - 1] * above[j];
    for (int64_t j = count - 2; j >= 0; --j)
      below_distance[j] = decay[j] == 0 ? 0 : decay[j] * below_distance[j + 1] + gap[j] * below[j];
  }
};

// Where sum_i Lap((y_i - b) / alpha) = k: b lies below `above` items. upper and lower are e^(-distance to b / alpha) / 2
// of the items next to it. There, with P and Q the sums of e^-distance over what lies above and below, those neighbours
// included:   k = above - P upper + Q lower,   4 upper lower = e^-gap.
struct Threshold {
  int64_t above;
  double upper, lower, p, q;
};

// k must not fall from call to call; `above` is where the last call ended.
Threshold solve(const Row& row, double k, int64_t above) {
  const auto sum_at = [&](int64_t j) { return (double)j + 0.5 - 0.5 * row.above[j] + 0.5 * row.below[j]; };
  while (above < row.end && sum_at(above) <= k) ++above;
  const bool has_upper = above > row.first, has_lower = above < row.end;
  Threshold t = {above, 0, 0, has_upper ? row.above[above - 1] + 1 : 1, has_lower ? row.below[above] + 1 : 1};
  const double decay = has_upper && has_lower ? row.decay[above - 1] : 0, c = k - (double)above;
  const double root = std::hypot(c, std::sqrt(t.p * t.q * decay));
  if (c <= 0) {   // the larger one first: nothing cancels
    t.upper = has_upper ? (root - c) / (2 * t.p) : 0;
    t.lower = t.upper > 0 ? decay / (4 * t.upper) : 0;
  } else {
    t.lower = has_lower ? (root + c) / (2 * t.q) : 0;
    t.upper = t.lower > 0 ? decay / (4 * t.lower) : 0;
  }
  return t;
}

// What a call gives for one row.
template <class T>
struct Given {
  const T* x;
  const uint8_t* mask;
  int64_t items;
  double alpha;
  bool descending;
};

template <class T>
void fill(const Given<T>& g, T* out, double value) {
  for (int64_t i = 0; i < g.items; ++i) out[i] = !g.mask || g.mask[i] ? (T)value : T(0);
}

template <class T>
bool is_nan(const Given<T>& g, const int32_t* order, int64_t m) {
  return m > 0 && (std::isnan(g.x[order[0]]) || std::isnan(g.alpha));   // NaN sorts before all
}

template <class T>
void rank(const Given<T>& g, T* ranks, int32_t* order, Row& row) {
  const int64_t m = sort_falling(g.x, g.mask, g.items, order, row.scratch);
  if (is_nan(g, order, m)) return fill(g, ranks, NAN);
  row.read(g.x, order, m, g.alpha, false);
  row.add_up();
  for (int64_t j = 0; j < m; ++j) {
    const double less = 0.5 * (row.above[j] - row.below[j]);
    ranks[order[j]] = (T)(g.descending ? (double)(j + 1) - less : (double)(m - j) + less);
  }
  for (int64_t j = m; j < g.items; ++j) ranks[order[j]] = 0;
}

int64_t counted(const uint8_t* mask, int64_t items) {
  return mask ? items - std::count(mask, mask + items, 0) : items;
}

template <class T>
void rank_backward(const Given<T>& g, const int32_t* order, const T* upstream, T* dx, double* dalpha, Row& row) {
  const int64_t m = counted(g.mask, g.items);
  if (is_nan(g, order, m)) return *dalpha = NAN, fill(g, dx, NAN);
  row.read(g.x, order, m, g.alpha, false);
  row.add_up();
  row.add_up_distances();
  const double by = (g.descending ? -0.5 : 0.5) / g.alpha;
  double sum = 0, flow = 0;
  for (int64_t j = 0; j < m; ++j) {   // of the upstreams above, by their distances
    const double v = upstream[order[j]];
    if (j) flow = row.decay[j - 1] * (flow + (double)upstream[order[j - 1]]);
    sum += v * (row.above_distance[j] - row.below_distance[j]);
    row.y[j] = v * (row.above[j] + row.below[j]) - flow;
  }
  flow = 0;
  for (int64_t j = m - 1; j >= 0; --j) {   // and below
    if (j + 1 < m) flow = row.decay[j] * (flow + (double)upstream[order[j + 1]]);
    dx[order[j]] = j >= row.first && j < row.end ? (T)(by * (row.y[j] - flow)) : T(0);
  }
  for (int64_t j = m; j < g.items; ++j) dx[order[j]] = 0;
  *dalpha = by * sum;
}

template <class T>
void sort(const Given<T>& g, T* sorted, int32_t* order, Row& row) {
  const int64_t m = sort_falling(g.x, g.mask, g.items, order, row.scratch);
  std::fill(sorted + m, sorted + g.items, T(0));
  if (is_nan(g, order, m)) return std::fill(sorted, sorted + m, (T)NAN);
  row.read(g.x, order, m, g.alpha, false);
  row.add_up();
  int64_t above = row.first;
  for (int64_t j = 0; j < m; ++j) {
    double b = row.y[j];
    if (j >= row.first && j < row.end) {
      const Threshold t = solve(row, (double)j + 0.5, above);
      above = t.above;
      b = t.upper > t.lower ? row.y[above - 1] + g.alpha * std::log(2 * t.upper)
                            : row.y[above] - g.alpha * std::log(2 * t.lower);
    }
    sorted[g.descending ? j : m - 1 - j] = (T)b;
  }
}

template <class T>
void sort_backward(const Given<T>& g, const int32_t* order, const T* upstream, T* dx, double* dalpha, Row& row) {
  const int64_t m = counted(g.mask, g.items);
  if (is_nan(g, order, m)) return *dalpha = NAN, fill(g, dx, NAN);
  row.read(g.x, order, m, g.alpha, false);
  row.add_up();
  row.add_up_distances();
  std::vector<double>& up = row.y;   // no longer needed: what each item's neighbouring thresholds send it
  std::vector<double> down((size_t)m);
  std::fill(up.begin(), up.end(), 0.0);
  int64_t above = row.first;
  double sum = 0;
  for (int64_t j = row.first; j < row.end; ++j) {
    const Threshold t = solve(row, (double)j + 0.5, above);
    above = t.above;
    const double weight = (double)upstream[g.descending ? j : m - 1 - j] / (t.upper * t.p + t.lower * t.q);
    if (t.upper > 0) {
      up[above - 1] += weight * t.upper;
      sum -= weight * t.upper * (row.above_distance[above - 1] - std::log(2 * t.upper) * t.p);
    }
    if (t.lower > 0) {
      down[above] += weight * t.lower;
      sum += weight * t.lower * (row.below_distance[above] - std::log(2 * t.lower) * t.q);
    }
  }
  for (int64_t j = row.end - 2; j >= row.first; --j) up[j] += row.decay[j] * up[j + 1];
  for (int64_t j = row.first + 1; j < row.end; ++j) down[j] += row.decay[j - 1] * down[j - 1];
  for (int64_t j = 0; j < m; ++j) dx[order[j]] = (T)(up[j] + down[j]);   // infinite ones have been sent nothing
  for (int64_t j = m; j < g.items; ++j) dx[order[j]] = 0;
  *dalpha = sum;
}

// act(item, its y, whether it lies above the threshold, e^(-distance to its side's neighbour of the threshold / alpha)) for
// the finite items that count.
template <class T, class Act>
void each_side(const Given<T>& g, const double* threshold, Act act) {
  for (int64_t i = 0; i < g.items; ++i) {
    const double y = g.descending ? (double)g.x[i] : -(double)g.x[i];
    if ((g.mask && !g.mask[i]) || std::isinf(y)) continue;
    const bool above = y >= threshold[0];
    const double distance = (above ? y - threshold[0] : threshold[1] - y) / g.alpha;
    act(i, above, distance, std::exp(-(distance == distance ? distance : 0)));   // 0/0: at it, alpha = 0
  }
}

template <class T>
void top_k(const Given<T>& g, double k, T* chosen, double* threshold, Row& row) {
  row.places.resize(g.items);
  const int64_t m = sort_falling(g.x, g.mask, g.items, row.places.data(), row.scratch);
  std::fill(threshold, threshold + 4, 0.0);
  if (m && (std::isnan(k) || is_nan(g, row.places.data(), m))) return fill(g, chosen, NAN);
  row.read(g.x, row.places.data(), m, g.alpha, !g.descending);
  row.add_up();
  const Threshold t = solve(row, std::min(std::max(k, (double)row.first), (double)row.end), row.first);
  threshold[0] = t.above > row.first ? row.y[t.above - 1] : kInfinity;
  threshold[1] = t.above < row.end ? row.y[t.above] : -kInfinity;
  threshold[2] = t.upper, threshold[3] = t.lower;
  for (int64_t i = 0; i < g.items; ++i)   // infinite ones; 0 for those left out
    chosen[i] = !(g.mask && !g.mask[i]) && std::isinf(g.x[i]) && (g.x[i] > 0) == g.descending ? T(1) : T(0);
  each_side(g, threshold, [&](int64_t i, bool above, double, double decay) {
    chosen[i] = (T)(above ? 1 - t.upper * decay : t.lower * decay);
  });
}

template <class T>
void top_k_backward(const Given<T>& g, double k, const double* threshold, const T* upstream, T* dx, double* dk,
                    double* dalpha) {
  bool nan = std::isnan(k) || std::isnan(g.alpha);
  int64_t first = 0, end = 0;   // as in Row
  for (int64_t i = 0; i < g.items; ++i) {
    dx[i] = 0;
    if (g.mask && !g.mask[i]) continue;
    nan = nan || std::isnan(g.x[i]);
    const bool infinite = std::isinf(g.x[i]), top = (g.x[i] > 0) == g.descending;
    first += infinite && top;
    end += !infinite || top;
  }
  *dk = *dalpha = 0;
  if (nan) return *dk = *dalpha = NAN, fill(g, dx, NAN);
  if (first == end) return;
  double size[2] = {}, sum[2] = {};   // of e^-distance and of upstream e^-distance, below and above
  each_side(g, threshold, [&](int64_t i, bool above, double, double decay) {
    size[above] += decay;
    sum[above] += decay * (double)upstream[i];
  });
  // Densities of the two sides, and weights in the same ratio where both have vanished: at k = 0, at k = m, or with
  // nothing within reach of the threshold.
  const double density[2] = {threshold[3], threshold[2]};
  double weight[2] = {density[0], density[1]};
  if (!(density[0] + density[1] > 0)) {
    weight[0] = size[1] > 0 ? (size[0] > 0 ? std::sqrt(size[1] / size[0]) : 0) : 1;
    weight[1] = size[0] > 0 ? (size[1] > 0 ? std::sqrt(size[0] / size[1]) : 0) : 1;
  }
  const double mean = (weight[0] * sum[0] + weight[1] * sum[1]) / (weight[0] * size[0] + weight[1] * size[1]);
  const double by = (g.descending ? 1 : -1) / g.alpha;
  double total = 0;
  each_side(g, threshold, [&](int64_t i, bool above, double distance, double decay) {
    const double slope = density[above] * decay * ((double)upstream[i] - mean);
    if (slope == 0) return;
    const double z = distance - std::log(2 * density[above]);
    total -= slope * (above ? z : -z);
    dx[i] = (T)(by * slope);
  });
  *dk = k >= (double)first && k <= (double)end ? mean : 0;
  *dalpha = total / g.alpha;
}

int check(const char* name, const fl_laplace* p) {
  if (!p) return fail("%s: no parameters", name);
  if (p->lists.rows < 0 || p->lists.width < 0) return fail("%s: a negative size", name);
  if (p->lists.rows && !p->alphas) return fail("%s: no alphas", name);
  if (p->lists.width > INT32_MAX) return fail("%s: a row of more than 2^31 - 1 items", name);
  if (p->dtype != FL_F32 && p->dtype != FL_F64) return fail("%s: dtype %d is unknown", name, p->dtype);
  return 0;
}

// act(given, row, its first item, scratch) of every row.
template <class T, class Act>
int each_row(const char* name, const fl_laplace* p, const void* x, Act act) {
  bool failed = false;
#pragma omp parallel if (p->lists.rows > 1)
  {
    Row scratch;
#pragma omp for schedule(dynamic)
    for (int64_t r = 0; r < p->lists.rows; ++r) {
      const int64_t at = first_item(p->lists, r);
      const Given<T> given = {(const T*)x + at, p->lists.mask ? p->lists.mask + at : nullptr, count_items(p->lists, r),
                              p->alphas[r], p->descending != 0};
      try {
        act(given, r, at, scratch);
      } catch (const std::bad_alloc&) {
#pragma omp atomic write
        failed = true;
      }
    }
  }
  return failed ? fail("%s: no memory", name) : 0;
}

// act(a number of the type in use)
template <class Act>
int with_type(const char* name, const fl_laplace* p, Act act) {
  if (int status = check(name, p)) return status;
  return p->dtype == FL_F32 ? act(0.0f) : act(0.0);
}

}  // namespace
}  // namespace fl

extern "C" {

int fl_lapsum_rank(const fl_laplace* p, const void* x, void* ranks, int32_t* order) {
  return fl::with_type("lapsum_rank", p, [&](auto number) {
    using T = decltype(number);
    return fl::each_row<T>("lapsum_rank", p, x, [&](const fl::Given<T>& g, int64_t, int64_t at, fl::Row& row) {
      fl::rank(g, (T*)ranks + at, order + at, row);
    });
  });
}

int fl_lapsum_rank_backward(const fl_laplace* p, const void* x, const int32_t* order, const void* dranks, void* dx,
                            double* dalpha) {
  return fl::with_type("lapsum_rank_backward", p, [&](auto number) {
    using T = decltype(number);
    return fl::each_row<T>("lapsum_rank_backward", p, x, [&](const fl::Given<T>& g, int64_t r, int64_t at, fl::Row& row) {
      fl::rank_backward(g, order + at, (const T*)dranks + at, (T*)dx + at, dalpha + r, row);
    });
  });
}

int fl_lapsum_sort(const fl_laplace* p, const void* x, void* sorted, int32_t* order) {
  return fl::with_type("lapsum_sort", p, [&](auto number) {
    using T = decltype(number);
    return fl::each_row<T>("lapsum_sort", p, x, [&](const fl::Given<T>& g, int64_t, int64_t at, fl::Row& row) {
      fl::sort(g, (T*)sorted + at, order + at, row);
    });
  });
}

int fl_lapsum_sort_backward(const fl_laplace* p, const void* x, const int32_t* order, const void* dsorted, void* dx,
                            double* dalpha) {
  return fl::with_type("lapsum_sort_backward", p, [&](auto number) {
    using T = decltype(number);
    return fl::each_row<T>("lapsum_sort_backward", p, x, [&](const fl::Given<T>& g, int64_t r, int64_t at, fl::Row& row) {
      fl::sort_backward(g, order + at, (const T*)dsorted + at, (T*)dx + at, dalpha + r, row);
    });
  });
}

int fl_lapsum_top_k(const fl_laplace* p, const void* x, const double* k, void* chosen, double* threshold) {
  return fl::with_type("lapsum_top_k", p, [&](auto number) {
    using T = decltype(number);
    return fl::each_row<T>("lapsum_top_k", p, x, [&](const fl::Given<T>& g, int64_t r, int64_t at, fl::Row& row) {
      fl::top_k(g, k[r], (T*)chosen + at, threshold + 4 * r, row);
    });
  });
}

int fl_lapsum_top_k_backward(const fl_laplace* p, const void* x, const double* k, const double* threshold,
                             const void* dchosen, void* dx, double* dk, double* dalpha) {
  return fl::with_type("lapsum_top_k_backward", p, [&](auto number) {
    using T = decltype(number);
    return fl::each_row<T>("lapsum_top_k_backward", p, x, [&](const fl::Given<T>& g, int64_t r, int64_t at, fl::Row&) {
      fl::top_k_backward(g, k[r], threshold + 4 * r, (const T*)dchosen + at, (T*)dx + at, dk + r, dalpha + r);
    });
  });
}
}
