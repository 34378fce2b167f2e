// What the kernels of soft sort and soft rank share, whichever way a row is walked: items in and out, and the formulas of
// permutahedron.h for one item of a block.
#pragma once
#include <type_traits>

#include "device_pav.h"
#include "device_sort.h"
#include "permutahedron.h"

namespace fl {
namespace FL_ISA {

constexpr int most_sorting = 2 * most_threads;   // threads of a block

struct Problem {
  fl_permutahedron p;
  int32_t sort;                // or rank
  const void* x;
  void* out;                   // ranks or sorted values; backward, their gradient
  int32_t* order;
  void* dx;
  double* dstrength;
  int32_t most;                // the longest row that a block of threads takes; longer ones are passed by

  int64_t items() const { return p.lists.offsets && p.items > 0 ? p.items : p.lists.rows * p.lists.width; }
  FL_FUNCTION int32_t out_type() const { return sort ? p.dtype : p.dtype == FL_F64 ? FL_F64 : FL_F32; }
  FL_FUNCTION int sign() const { return (sort != 0) == (p.descending != 0) ? 1 : -1; }   // v = sign x stands in falling order
  FL_DEVICE bool counts(int64_t item) const { return !p.lists.mask || p.lists.mask[item]; }
};

template <class V>
FL_DEVICE V load(const void* from, int32_t dtype, int64_t at) {
  if constexpr (sizeof(V) == 8) return static_cast<const double*>(from)[at];
  else if (dtype == FL_F32) return static_cast<const float*>(from)[at];
  else return widen_half(static_cast<const uint16_t*>(from)[at], dtype);
}

template <class V>
FL_DEVICE void store(void* to, int32_t dtype, int64_t at, double y) {
  if constexpr (sizeof(V) == 8) static_cast<double*>(to)[at] = y;
  else if (dtype == FL_F32) static_cast<float*>(to)[at] = (float)y;
  else static_cast<uint16_t*>(to)[at] = (uint16_t)narrow_half((float)y, dtype);
}

// Counted while a row is read.
struct Counts { int32_t left_out, above, below, nan; };   // +inf and -inf of v

template <class V>
FL_DEVICE void count(Counts& c, V v) {
  c.nan += v != v, c.above += v == (V)INFINITY, c.below += v == -(V)INFINITY;
}

FL_DEVICE void add_to(Counts* all, const Counts& mine) {
  if (mine.left_out) atomicAdd(&all->left_out, mine.left_out);
  if (mine.above) atomicAdd(&all->above, mine.above);
  if (mine.below) atomicAdd(&all->below, mine.below);
  if (mine.nan) atomicAdd(&all->nan, mine.nan);
}

struct Row {
  int64_t first;               // its first item
  int n;
  Extent extent;
  double strength;
  bool nan;
};

FL_DEVICE Row row_of(const Problem& q, int64_t row) {
  const fl_permutahedron& p = q.p;
  const int64_t first = p.lists.offsets ? p.lists.offsets[row] : row * p.lists.width;
  int64_t n = p.lists.offsets ? p.lists.offsets[row + 1] - first : p.lists.width;
  if (n > p.lists.width) n = 0;                            // refused: no room was made for it
  return {first, (int)n, {0, (int)n, (int)n}, p.strengths ? p.strengths[row] : p.strength, false};
}

FL_DEVICE void settle(Row& row, const Counts& c) {
  row.nan = c.nan > 0 || !(row.strength >= 0);                 // nobody on the host has seen the strengths
  row.extent.counted = row.n - c.left_out;
  row.extent.begin = row.nan ? row.extent.counted : c.above;   // nothing is finite in a row with a NaN
  row.extent.end = row.extent.counted - (row.nan ? 0 : c.below);
}

// ---- forward ---------------------------------------------------------------------------------------------------------

struct Answer { double y; bool starts; };

// Item k of a row, in its order.
template <class V, bool kl>
FL_DEVICE Answer answer(const Pooling<V, kl>& pooling, const Row& row, int k) {
  const Rule<V, kl>& rule = pooling.rule;
  const Extent& e = row.extent;
  if (k >= e.counted) return {0, true};
  if (row.nan) return {NAN, true};
  if (k < e.begin || k >= e.end) {                         // infinite
    if (rule.sort) return {rule.value(k), true};
    const int a = k < e.begin ? 0 : e.end, b = k < e.begin ? e.begin : e.counted;
    return {rule.mean_weight(a, b), k == a};
  }
  const int a = pooling.marks.before(k), b = pooling.marks.behind(k + 1);
  const double v = rule.value(k);
  if (b - a == 1) return {rule.sort ? v : rule.mean_weight(a, b), true};
  const bool same = rule.value(a) == rule.value(b - 1);
  const Suffix from = rule.sums.from(a), to = rule.sums.from(b);
  double y;
  if constexpr (kl) {
    const double lse = rule.sums.over(from, to), length = b - a;
    if (rule.sort) y = rule.value(a) + lse - (k - a) / rule.strength - rule.log_weights(length);
    else if (same) y = rule.mean_weight(a, b);
    else y = ::exp(-rule.sums.apart(rule.value(a), v) - lse) * length * rule.mean_weight(a, b);
  } else {
    const double less = same ? 0 : rule.sums.over(a, b, from, to, v) / (b - a);      // mean(v) - v
    if (rule.sort) y = v + less + (0.5 * ((double)a + b - 1) - k) / rule.strength;
    else y = rule.mean_weight(a, b) - (less == 0 ? 0 : less / rule.strength);
  }
  return {y, k == a};
}

// The same, written; `order` has the item's place, which nobody else looks at.
template <class V, bool kl>
FL_DEVICE void answer_at(const Problem& q, const Pooling<V, kl>& pooling, const Row& row, int k) {
  int32_t& place = q.order[row.first + k];
  const int at = place;
  const Answer found = answer(pooling, row, k);
  place = at | (int32_t)((uint32_t)found.starts << 31);
  if (q.sort) store<V>(q.out, q.p.dtype, row.first + k, k < row.extent.counted ? q.sign() * found.y : 0);
  else static_cast<V*>(q.out)[row.first + at] = (V)found.y;
}

// ---- backward --------------------------------------------------------------------------------------------------------

// The share of item k in its block [a, b) of a soft rank or sort by log-sum-exps.
template <class V>
FL_DEVICE double share(const Rule<V, true>& rule, int a, int b, int k) {
  if (b - a == 1) return 1;
  const double lse = rule.sums.over(rule.sums.from(a), rule.sums.from(b));
  return ::exp(-rule.sums.apart(rule.value(a), rule.value(k)) - lse);
}

// What is summed over a block for its gradient, of item k with gradient g.
template <class V, bool kl>
FL_DEVICE double summand(const Rule<V, kl>& rule, const Marks& marks, int k, double g) {
  if constexpr (kl) {
    if (rule.sort || k < rule.extent.begin || k >= rule.extent.end) return g;
    const int a = marks.before(k), b = marks.behind(k + 1);
    return g * share(rule, a, b, k) * (b - a) * rule.mean_weight(a, b);
  }
  return g;
}

template <class V>
FL_DEVICE V gradient_at(const Problem& q, const Row& row, int k, int at) {
  return load<V>(q.out, q.out_type(), row.first + (q.sort ? k : at));
}

// Item k of a row in its order, and its gradient; 0 where it is left out.
template <class V>
FL_DEVICE void read_sorted(const Problem& q, const Row& row, int k, V& v, V& g, Counts& counts) {
  const int at = q.order[row.first + k] & INT32_MAX;
  v = 0, g = 0;
  if (!q.counts(row.first + at)) {
    ++counts.left_out;
    return;
  }
  v = q.sign() * load<V>(q.x, q.p.dtype, row.first + at);
  count(counts, v);
  g = gradient_at<V>(q, row, k, at);
}

struct Derivatives { double dx, dstrength; };   // of the item, and its part of the row's

// Item k of a row with gradient g, where `sums` are those of `summand`.
template <class V, bool kl>
FL_DEVICE Derivatives derivatives(const Rule<V, kl>& rule, const Marks& marks, const Sums<V>& sums, const Row& row,
                                  int sign, int k, double g) {
  const Extent& e = row.extent;
  const double strength = rule.strength;
  if (k >= e.counted) return {0, 0};
  if (row.nan) return {NAN, NAN};
  if (k < e.begin || k >= e.end) return {rule.sort ? g : 0, 0};
  const int a = marks.before(k), b = marks.behind(k + 1);
  const double length = b - a;
  if (length == 1) return {rule.sort ? g : 0, 0};
  const double all = sums.over(a, b, sums.from(a), sums.from(b), 0);
  double p = 1 / length;
  if constexpr (kl) p = share(rule, a, b, k);
  if (rule.sort) {                                           // dy/de through the weights alone
    double weight = 1 / length;
    if constexpr (kl) weight = ::exp(-(k - a) / strength - rule.log_weights(length));
    return {p * all, sign * (k - a) * (g - weight * all) / (strength * strength)};
  }
  if (strength == 0) return {0, 0};
  const double ds = kl ? p * (g * length * rule.mean_weight(a, b) - all) : g - p * all;
  return {sign * ds / strength, (rule.value(a) - rule.value(k)) * ds / (strength * strength)};
}

// Writes dx of item k; returns its part of dstrength.
template <class V, bool kl>
FL_DEVICE double derivative_at(const Problem& q, const Rule<V, kl>& rule, const Marks& marks, const Sums<V>& sums,
                               const Row& row, int k) {
  const int at = q.order[row.first + k] & INT32_MAX;
  Derivatives d = {0, 0};
  if (k < row.extent.counted) d = derivatives(rule, marks, sums, row, q.sign(), k, gradient_at<V>(q, row, k, at));
  store<V>(q.dx, q.p.dtype, row.first + at, d.dx);
  return d.dstrength;
}

// The sum of every thread's, in a fixed order, to the first thread of a block.
struct WarpTotals { double of[32]; };
FL_DEVICE double block_sum(double x) {
  WarpTotals& warps = shared<WarpTotals>();
#pragma unroll 1
  for (int apart = 1; apart < warp; apart *= 2) x += shuffle(x, apart);
  if (threadIdx.x % warp == 0) warps.of[threadIdx.x / warp] = x;
  barrier<Barrier::scanned>();
  double sum = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < (int)blockDim.x / warp; ++w) sum += warps.of[w];
  return sum;
}

// ---- on the host -----------------------------------------------------------------------------------------------------

// Rows longer than fit in a block's shared memory: permutahedron_long.cu. The workspace's bytes where memory is null.
int64_t long_workspace(const Problem& problem, bool backward);
int run_long(const Problem& problem, bool backward, void* memory, void* stream);

template <class Work>
auto with_kernel(const Problem& q, const Work& work) {   // work(V, kl as a type)
  if (q.p.dtype == FL_F64) return q.p.kl ? work(0.0, std::true_type()) : work(0.0, std::false_type());
  return q.p.kl ? work(0.0f, std::true_type()) : work(0.0f, std::false_type());
}

}  // namespace FL_ISA
}  // namespace fl
