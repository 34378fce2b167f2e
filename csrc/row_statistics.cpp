// fl_statistics on the host, for a range of rows and one instruction set (FL_ISA).
#include "row_statistics.h"

#include "tile_block.h"

namespace fl {
namespace FL_ISA {
namespace {

// The largest factor*z of those that count; -inf if none.
double block_maximum(const float* z, int n, double factor) {
  const float sign = factor < 0 ? -1.0f : 1.0f;
  f32 most[4];
  for (f32& m : most) m = splat<f32>(-INFINITY);
  int j = 0;
  if (sign > 0) {
    for (; j + 4 * lanes <= n; j += 4 * lanes)
      for (int u = 0; u < 4; ++u) most[u] = larger(load(z + j + u * lanes), most[u]);
    for (; j < n; j += lanes) most[0] = larger(load(z + j), most[0]);
  } else {
    for (; j < n; j += lanes) {
      f32 x = load(z + j);
      most[0] = larger(select(left_out(x), x, -x), most[0]);
    }
  }
  float x = largest_lane(larger(larger(most[0], most[1]), larger(most[2], most[3])));
  return x == -INFINITY ? x : (float)(factor * sign * x);
}

double block_mean(const float* z, int n) {
  f32 sum{}, count{};
  for (int j = 0; j < n; j += lanes) {
    f32 x = load(z + j);
    sum += select(left_out(x), 0.0f, x);
    count += select(left_out(x), 0.0f, splat<f32>(1));
  }
  double c = sum_of_lanes(count);
  return c > 0 ? (float)(sum_of_lanes(sum) / c) : 0;
}

// total[k] = the sums of what body(j, sum) adds to sum[0], sum[1] ... for every vector j of n columns. The compiler and
// the processor have four sums of each kind to add to; no lane adds more than 32 floats before they become a double.
template <int kinds, class Body>
FL_INLINE void sum_block(int n, double* total, Body body) {
  for (int k = 0; k < kinds; ++k) total[k] = 0;
  for (int first = 0, end; first < n; first = end) {
    end = n - first < 128 * lanes ? n : first + 128 * lanes;
    f32 sum[4][kinds] = {};
    int j = first;
    for (; j + 4 * lanes <= end; j += 4 * lanes) {
      body(j, sum[0]);
      body(j + lanes, sum[1]);
      body(j + 2 * lanes, sum[2]);
      body(j + 3 * lanes, sum[3]);
    }
    for (; j < end; j += lanes) body(j, sum[0]);
    for (int k = 0; k < kinds; ++k) total[k] += sum_of_lanes((sum[0][k] + sum[1][k]) + (sum[2][k] + sum[3][k]));
  }
}

// The largest of a statistic's own exponents.
template <class F>
double largest_exponent(const F& f, const float* z, int n) {
  f32 most = splat<f32>(-INFINITY);
  for (int j = 0; j < n; j += lanes) {
    f32 x = load(z + j), slope;
    most = larger(select(left_out(x), x, f.exponent(x, slope)), most);
  }
  return largest_lane(most);
}

template <class F>
void push(const F& f, double factor, const float* z, const float* v, int n, const Scratch& s, double* state) {
  double pivot = 0;
  if (F::pivot == Pivot::mean) pivot = block_mean(z, n);
  if constexpr (F::pivot == Pivot::exponent) pivot = largest_exponent(f, z, n);
  if (F::pivot == Pivot::maximum) pivot = block_maximum(z, n, factor);
  if (F::pivot == Pivot::maximum || F::pivot == Pivot::exponent) {
    if (!(pivot >= state[0])) pivot = (float)state[0];         // then the states merge without rescaling
  }
  const f32 p = splat<f32>(pivot == -INFINITY ? 0 : pivot);    // none counts so far, or all are NaN
  double total[F::sums], from[F::width];
  sum_block<F::sums>(n, total, [&](int j, f32* sum) __attribute__((always_inline)) {
    s.prefetch(j);
    f32 x = load(z + j), term[F::sums];
    f.phi(x, load(v + j), p, term);
    for (int k = 0; k < F::sums; ++k) sum[k] += select(left_out(x), 0.0f, term[k]);
  });
  F::state(pivot, total, from);
  F::merge(state, from);
}

template <class T>
double keep_block(const float* z, int columns, float pivot, void* row) {
  T* to = static_cast<T*>(row);
  double total;
  sum_block<1>(padded(columns), &total, [&](int j, f32* sum) __attribute__((always_inline)) {
    f32 e = exp(load(z + j) - pivot);           // exp(-inf) is 0: what is left out keeps nothing
    store(to + j, e, columns - j);
    sum[0] += e;
  });
  return total;
}

// FL_LOGSUMEXP that keeps its exponentials. All blocks of a row share the first one's pivot where they can: the gradient
// is then one factor per row times what is kept. A float16 holds no number far from 1, there each block has its maximum.
void push_keeping(const fl_statistic& k, int64_t row, const float* z, int columns, double* state) {
  const double most = block_maximum(z, padded(columns), 1);
  const bool shared = k.keep_dtype != FL_F16 && state[0] != -INFINITY && most <= state[0] + FL_KEPT_LOGARITHM;
  const float pivot = shared ? (float)state[0] : most == -INFINITY ? 0 : (float)most;
  k.keep_shift[row] = pivot;
  void* to = const_cast<void*>(row_of(k.keep, k.keep_dtype, k.keep_stride, row));
  double sum = 0;
  if (k.keep_dtype == FL_F32) sum = keep_block<float>(z, columns, pivot, to);
  if (k.keep_dtype == FL_BF16) sum = keep_block<bf16>(z, columns, pivot, to);
  if (k.keep_dtype == FL_F16) sum = keep_block<f16>(z, columns, pivot, to);
  const double from[2] = {pivot, sum};
  if (most != -INFINITY) Exponential<1>::merge(state, from);
}

// Scores beyond the last on the list are rare: whole vectors are compared with it, and only a hit is looked into.
void push_extreme(const fl_statistic& k, const float* z, int n, int64_t first_class, double* state) {
  const double &last = state[k.count - 1], &last_column = state[2 * k.count - 1];
  const float factor = (float)k.factor;
  for (int j = 0; j < n; j += lanes) {
    f32 x = load(z + j), key = factor * x;
    const float bound = (float)(factor * last);
    bool ties_lose = last_column >= 0 && last_column < first_class + j;
    i32 miss = left_out(x) | (ties_lose ? key <= bound : key < bound);
    if (!any(~miss)) continue;
    for (int i = j; i < j + lanes; ++i)
      if (z[i] != -INFINITY) insert_extreme(state, k.count, k.factor, z[i], (double)(first_class + i));
  }
}

void push_scores(const fl_statistic& k, int64_t row, const float* z, int64_t first_class, int columns, double* state) {
  for (int32_t c = 0; c < k.count; ++c) {
    int64_t at = k.at[row * k.at_stride + c], place = at - first_class;
    if (at >= 0 && place >= 0 && place < columns) state[c] += z[place];
  }
}

}  // namespace

void statistics(const fl_tile& t, const fl_statistic* all, int32_t count, int64_t first_row, int64_t end_row) {
  Scratch s;
  const bool plain = is_plain(t);
  int32_t width[most_statistics];
  int32_t order[most_statistics], ordered = 0;
  for (int32_t i = 0; i < count; ++i) width[i] = width_of<f32>(all[i]);
  for (int keeps = 0; keeps < 2; ++keeps)       // exponentials last: they may be kept where the scores lie
    for (int32_t i = 0; i < count; ++i)
      if (keeps == (all[i].keep != nullptr)) order[ordered++] = i;
  for (int64_t row = first_row; row < end_row; ++row)
    for (int64_t first = 0; first < t.columns; first += block) {
      const int columns = (int)(t.columns - first < block ? t.columns - first : block), n = padded(columns);
      const int64_t first_class = t.first_column + first;
      const float* z = load_scores<false>(t, plain, row, first, columns, s);
      for (int32_t o = 0; o < count; ++o) {
        const fl_statistic& k = all[order[o]];
        double* state = k.state + row * width[order[o]];
        if (k.kind == FL_SCORE) {
          push_scores(k, row, z, first_class, columns, state);
          continue;
        }
        const Seen seen(k, row, first, first_class, columns, z, s);
        if (k.kind == FL_EXTREME) {
          push_extreme(k, seen.z, n, first_class, state);
          continue;
        }
        if (k.keep) {
          push_keeping(k, row, seen.z, columns, state);
          continue;
        }
        const float* v = load_operand(k, row, first, columns, s);
        with_statistic<f32>(k, k.row ? k.row[row] : 0,
                            [&](const auto& f) { push(f, k.factor, seen.z, v, n, s, state); });
      }
    }
}

extern const RowKernels row_kernels = {FL_ISA_NAME, statistics, column_statistics, differentiate, gradient,
                                     gradient_of_exponentials};

}  // namespace FL_ISA
}  // namespace fl
