// The two tile primitives on the host, for a range of rows and one instruction set (FL_ISA).
//
// A row is walked in blocks that stay in the first-level cache. A block is widened to floats and transformed into
// scores once (where it is made of scores already, it is read in place); every statistic then reads the scores. The
// block is padded to whole vectors with -inf, which every statistic leaves out, so that no loop over scores has a
// tail. A row's `rest` column is left out the same way.
#include "row_statistics.h"

#include "row_kernels.h"

namespace fl {
namespace FL_ISA {
namespace {

constexpr int block = FL_KEPT_COLUMNS;   // columns

struct alignas(64) Scratch {
  float z[block];              // scores
  float operand[block];
  float ones[block];           // the operand of a statistic that has none
  float gradient[block];       // dL/dz, then dL/da
  float slope[block];          // dz/da
  float cap[block];            // cap(a + bias), 0 where the score is -inf
  Scratch() {
    for (float& x : ones) x = 1;
  }
};

FL_INLINE int padded(int columns) { return (columns + lanes - 1) / lanes * lanes; }
FL_INLINE i32 left_out(f32 z) { return z == -INFINITY; }

// ---- loading -----------------------------------------------------------------------------------------------------

template <class T>
void widen_block(const void* row, int64_t first, int columns, float* to, float padding) {
  const T* from = static_cast<const T*>(row) + first;
  each_vector(columns, [&](int j, int n) { store(to + j, load(from + j, n)); });
  for (int j = columns; j < padded(columns); ++j) to[j] = padding;
}

void widen_block(int32_t dtype, const void* row, int64_t first, int columns, float* to, float padding) {
  if (dtype == FL_F32) widen_block<float>(row, first, columns, to, padding);
  if (dtype == FL_BF16) widen_block<bf16>(row, first, columns, to, padding);
  if (dtype == FL_F16) widen_block<f16>(row, first, columns, to, padding);
}

FL_INLINE const void* row_of(const void* data, int32_t dtype, int64_t stride, int64_t row) {
  return static_cast<const char*>(data) + row * stride * (dtype == FL_F32 ? 4 : 2);
}

bool is_plain(const fl_tile& t) {
  return !t.bias && !t.class_scale && !t.class_shift && t.softcap == 0 && t.scale == 1;
}

// Turns the stored values in z into scores.
template <bool with_slope>
void transform_block(const fl_tile& t, int64_t first, int columns, Scratch& s) {
  const float inverse_softcap = 1 / t.softcap;
  each_vector(columns, [&](int j, int n) {
    f32 a = load(s.z + j), slope = splat<f32>(t.scale);
    if (t.bias) a += load(t.bias + first + j, n);
    if (t.class_scale) slope *= load(t.class_scale + first + j, n);
    f32 z = a, scale = slope;
    if (t.softcap != 0) {
      f32 flatness;
      z = tanh(a * inverse_softcap, flatness) * t.softcap;
      slope *= flatness;
    }
    f32 cap = z;
    z *= scale;
    if (t.class_shift) z += load(t.class_shift + first + j, n);
    store(s.z + j, z);
    if (with_slope) {
      store(s.slope + j, slope);
      store(s.cap + j, select(left_out(z), 0.0f, cap));
    }
  });
  for (int j = columns; j < padded(columns); ++j) s.z[j] = -INFINITY;
}

// The block's scores: in s.z, or where they lie in the tile.
template <bool with_slope>
const float* load_scores(const fl_tile& t, bool plain, int64_t row, int64_t first, int columns, Scratch& s,
                         bool borrow) {
  const void* data = row_of(t.data, t.dtype, t.stride, row);
  if (borrow && plain && t.dtype == FL_F32 && columns % lanes == 0) return static_cast<const float*>(data) + first;
  widen_block(t.dtype, data, first, columns, s.z, -INFINITY);
  if (!plain) transform_block<with_slope>(t, first, columns, s);
  return s.z;
}

const float* load_operand(const fl_statistic& k, int64_t row, int64_t first, int columns, Scratch& s) {
  if (!k.operand) return s.ones;
  widen_block(k.operand_dtype, row_of(k.operand, k.operand_dtype, k.operand_stride, row), first, columns, s.operand, 0);
  return s.operand;
}

// For as long as it lives, the score of the row's `rest` column is -inf (and the block, if it is the one, in s.z).
class WithoutRest {
 public:
  FL_INLINE WithoutRest(const fl_statistic& k, int64_t row, int64_t first_class, int columns, const float*& z, Scratch& s) {
    if (k.where != FL_REST) return;
    int64_t place = k.rest[row] - first_class;
    if (k.rest[row] < 0 || place < 0 || place >= columns) return;
    if (z != s.z) __builtin_memcpy(s.z, z, sizeof(float) * padded(columns));
    z = s.z;
    score_ = s.z + place;
    kept_ = *score_;
    *score_ = -INFINITY;
  }
  FL_INLINE ~WithoutRest() {
    if (score_) *score_ = kept_;
  }
  WithoutRest(const WithoutRest&) = delete;

 private:
  float* score_ = nullptr;
  float kept_ = 0;
};

// ---- statistics ----------------------------------------------------------------------------------------------------

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

template <class F>
void push(const F& f, double factor, const float* z, const float* v, int n, double* state) {
  double pivot = 0;
  if (F::pivot == Pivot::mean) pivot = block_mean(z, n);
  if (F::pivot == Pivot::maximum) {
    pivot = block_maximum(z, n, factor);
    if (!(pivot >= state[0])) pivot = (float)state[0];         // then the states merge without rescaling
  }
  const f32 p = splat<f32>(pivot == -INFINITY ? 0 : pivot);    // none counts so far, or all are NaN
  f32 sum[4][F::sums] = {};
  auto add = [&](int j, int u) __attribute__((always_inline)) {
    f32 x = load(z + j), term[F::sums];
    f.phi(x, load(v + j), p, term);
    for (int k = 0; k < F::sums; ++k) sum[u][k] += select(left_out(x), 0.0f, term[k]);
  };
  int j = 0;
  for (; j + 4 * lanes <= n; j += 4 * lanes) add(j, 0), add(j + lanes, 1), add(j + 2 * lanes, 2), add(j + 3 * lanes, 3);
  for (; j < n; j += lanes) add(j, 0);
  double total[F::sums], from[F::width];
  for (int k = 0; k < F::sums; ++k) total[k] = sum_of_lanes((sum[0][k] + sum[1][k]) + (sum[2][k] + sum[3][k]));
  F::state(pivot, total, from);
  F::merge(state, from);
}

template <class T>
double keep_block(const float* z, int columns, float pivot, void* row) {
  T* to = static_cast<T*>(row);
  f32 sum[4] = {};
  int j = 0;
  auto add = [&](int j, int u) __attribute__((always_inline)) {
    f32 e = exp(load(z + j) - pivot);           // exp(-inf) is 0: what is left out keeps nothing
    store(to + j, e);
    sum[u] += e;
  };
  for (; j + 4 * lanes <= columns; j += 4 * lanes)
    add(j, 0), add(j + lanes, 1), add(j + 2 * lanes, 2), add(j + 3 * lanes, 3);
  for (; j < columns; j += lanes) {
    f32 e = exp(load(z + j) - pivot);           // the padding is -inf too
    store(to + j, e, columns - j);
    sum[0] += e;
  }
  return sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// FL_LOGSUMEXP that keeps its exponentials: relative to this block's maximum, in the words of the caller.
void push_keeping(const fl_statistic& k, int64_t row, const float* z, int columns, double* state) {
  const double most = block_maximum(z, padded(columns), 1);
  const float pivot = most == -INFINITY ? 0 : (float)most;
  k.keep_shift[row] = pivot;
  void* to = const_cast<void*>(row_of(k.keep, k.keep_dtype, k.keep_stride, row));
  double sum = 0;
  if (k.keep_dtype == FL_F32) sum = keep_block<float>(z, columns, pivot, to);
  if (k.keep_dtype == FL_BF16) sum = keep_block<bf16>(z, columns, pivot, to);
  if (k.keep_dtype == FL_F16) sum = keep_block<f16>(z, columns, pivot, to);
  const double from[2] = {most, sum};
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

int32_t width_of(const fl_statistic& k) {
  if (k.kind == FL_SCORE) return k.count;
  if (k.kind == FL_EXTREME) return 2 * k.count;
  int32_t width = 0;
  with_statistic<f32>(k, 0, [&](const auto& f) { width = f.width; });
  return width;
}

void statistics(const fl_tile& t, const fl_statistic* all, int32_t count, int64_t first_row, int64_t end_row) {
  Scratch s;
  const bool plain = is_plain(t);
  int32_t width[most_statistics];
  bool keeps = false;          // then the scores are copied first: they may be overwritten
  for (int32_t i = 0; i < count; ++i) width[i] = width_of(all[i]), keeps |= all[i].keep != nullptr;
  for (int64_t row = first_row; row < end_row; ++row)
    for (int64_t first = 0; first < t.columns; first += block) {
      const int columns = (int)(t.columns - first < block ? t.columns - first : block), n = padded(columns);
      const int64_t first_class = t.first_column + first;
      const float* z = load_scores<false>(t, plain, row, first, columns, s, !keeps);
      for (int32_t i = 0; i < count; ++i) {
        const fl_statistic& k = all[i];
        double* state = k.state + row * width[i];
        if (k.kind == FL_SCORE) {
          push_scores(k, row, z, first_class, columns, state);
          continue;
        }
        WithoutRest rest(k, row, first_class, columns, z, s);
        if (k.kind == FL_EXTREME) {
          push_extreme(k, z, n, first_class, state);
          continue;
        }
        if (k.keep) {
          push_keeping(k, row, z, columns, state);
          continue;
        }
        const float* v = load_operand(k, row, first, columns, s);
        with_statistic<f32>(k, k.row ? k.row[row] : 0,
                            [&](const auto& f) { push(f, k.factor, z, v, n, state); });
      }
    }
}

// ---- gradient ------------------------------------------------------------------------------------------------------

// gradient (+)= psi where the score counts
template <bool first, class F>
void add_derivative(const F& f, const Derivative& d, const float* z, const float* v, int n, float* gradient) {
  for (int j = 0; j < n; j += lanes) {
    f32 x = load(z + j), g = select(left_out(x), 0.0f, f.psi(x, load(v + j), d));
    store(gradient + j, first ? g : load(gradient + j) + g);
  }
}

void add_at(int64_t column, float coefficient, int64_t first_class, int columns, const float* z, float* gradient) {
  int64_t place = column - first_class;
  if (column >= 0 && place >= 0 && place < columns && z[place] != -INFINITY) gradient[place] += coefficient;
}

template <class T>
void narrow_block(const float* from, int columns, void* row, int64_t first) {
  T* to = static_cast<T*>(row) + first;
  each_vector(columns, [&](int j, int n) { store(to + j, load(from + j), n); });
}

void narrow_block(int32_t dtype, const float* from, int columns, void* row, int64_t first) {
  if (dtype == FL_F32) narrow_block<float>(from, columns, row, first);
  if (dtype == FL_BF16) narrow_block<bf16>(from, columns, row, first);
  if (dtype == FL_F16) narrow_block<f16>(from, columns, row, first);
}

// From dL/dz to dL/da, and into the sums that were asked for.
void finish_block(const fl_tile& t, bool plain, int64_t first, int columns, Scratch& s, ColumnSums& sums) {
  float* g = s.gradient;
  auto add_to = [&](double* sum, auto term) {
    if (sum)
      for (int j = 0; j < columns; ++j) sum[first + j] += term(j);
  };
  add_to(sums.class_shift, [&](int j) { return (double)g[j]; });
  add_to(sums.class_scale, [&](int j) { return (double)g[j] * s.cap[j] * t.scale; });
  if (sums.wants_scale) {
    f32 sum{};
    each_vector(columns, [&](int j, int n) {
      f32 x = load(g + j) * load(s.cap + j);
      sum += select(load(g + j) == 0.0f, 0.0f, t.class_scale ? x * load(t.class_scale + first + j, n) : x);
    });
    sums.scale += sum_of_lanes(sum);
  }
  if (!plain) each_vector(columns, [&](int j, int) { store(g + j, load(g + j) * load(s.slope + j)); });
  add_to(sums.bias, [&](int j) { return (double)g[j]; });
  if (sums.largest)
    for (int j = 0; j < columns; ++j) {
      double x = __builtin_fabs(g[j]), &most = sums.largest[first + j];
      most = x <= most ? most : x;                             // so written, NaN passes
    }
}

// A statistic's psi for one row; whether any of its coefficients there is not 0.
bool derivative_of(const fl_statistic& k, int32_t width, int64_t row, Derivative& d) {
  auto any_of = [&](int32_t n) {
    for (int32_t c = 0; c < n; ++c)
      if (k.coefficient[row * n + c] != 0) return true;
    return false;
  };
  if (k.kind == FL_SCORE || k.kind == FL_EXTREME) return any_of(k.count);
  bool active = false;
  with_statistic<f32>(k, 0, [&](const auto& f) {
    active = any_of(f.coefficients);
    if (active) d = f.derivative(k, k.state + row * width, k.coefficient + row * f.coefficients, 0);
  });
  return active;
}

void gradient(const fl_tile& t, const Gradient& to, const fl_statistic* all, int32_t count, int64_t first_row,
              int64_t end_row, ColumnSums& sums) {
  Scratch s;
  const bool plain = is_plain(t) && !sums.class_scale && !sums.wants_scale;
  int32_t width[most_statistics];
  for (int32_t i = 0; i < count; ++i) width[i] = width_of(all[i]);
  for (int64_t row = first_row; row < end_row; ++row) {
    void* out = const_cast<void*>(row_of(to.out, to.dtype, to.stride, row));
    Derivative derivative[most_statistics];
    bool active[most_statistics], any_active = false;
    for (int32_t i = 0; i < count; ++i)
      any_active |= active[i] = derivative_of(all[i], width[i], row, derivative[i]);
    if (!any_active) {
      __builtin_memset(out, 0, (size_t)t.columns * (to.dtype == FL_F32 ? 4 : 2));
      continue;
    }
    for (int64_t first = 0; first < t.columns; first += block) {
      const int columns = (int)(t.columns - first < block ? t.columns - first : block), n = padded(columns);
      const int64_t first_class = t.first_column + first;
      const float* z = load_scores<true>(t, plain, row, first, columns, s, true);
      bool empty = true;
      for (int32_t i = 0; i < count; ++i) {
        const fl_statistic& k = all[i];
        if (!active[i] || k.kind == FL_SCORE || k.kind == FL_EXTREME) continue;
        WithoutRest rest(k, row, first_class, columns, z, s);
        const float* v = load_operand(k, row, first, columns, s);
        with_statistic<f32>(k, k.row ? k.row[row] : 0, [&](const auto& f) {
          if (empty) add_derivative<true>(f, derivative[i], z, v, n, s.gradient);
          else add_derivative<false>(f, derivative[i], z, v, n, s.gradient);
        });
        empty = false;
      }
      if (empty) __builtin_memset(s.gradient, 0, sizeof s.gradient);
      for (int32_t i = 0; i < count; ++i) {
        const fl_statistic& k = all[i];
        if (!active[i]) continue;
        for (int32_t c = 0; k.kind == FL_SCORE && c < k.count; ++c)
          add_at(k.at[row * k.at_stride + c], k.coefficient[row * k.count + c], first_class, columns, z, s.gradient);
        for (int32_t c = 0; k.kind == FL_EXTREME && c < k.count; ++c)
          add_at((int64_t)k.state[row * width[i] + k.count + c], k.coefficient[row * k.count + c], first_class, columns, z, s.gradient);
      }
      finish_block(t, plain, first, columns, s, sums);
      narrow_block(to.dtype, s.gradient, columns, out, first);
    }
  }
}

// What a row's kept exponentials are multiplied by: coefficient * e^{shift - S}.
float factor_of(const fl_statistic& k, int64_t row) {
  const double* state = k.state + 2 * row;
  const double s = state[0] + ::log(state[1]);
  return s == -INFINITY ? 0 : (float)(k.coefficient[row] * ::exp(k.keep_shift[row] - s));
}

void gradient_of_exponentials(const fl_tile& t, const fl_statistic* all, int32_t count, int64_t first_row,
                              int64_t end_row, ColumnSums& sums) {
  Scratch s;
  const bool plain = is_plain(t);
  for (int64_t row = first_row; row < end_row; ++row) {
    void* data = const_cast<void*>(row_of(t.data, t.dtype, t.stride, row));
    f32 factor{};
    for (int32_t i = 0; i < count; ++i)
      if (all[i].kind == FL_LOGSUMEXP) factor = splat<f32>(factor_of(all[i], row));
    for (int64_t first = 0; first < t.columns; first += block) {
      const int columns = (int)(t.columns - first < block ? t.columns - first : block);
      widen_block(t.dtype, data, first, columns, s.z, 0);
      for (int j = 0; j < columns; j += lanes) {
        f32 e = load(s.z + j);
        store(s.gradient + j, select(e == 0.0f, 0.0f, e * factor));   // 0 stays 0, also times infinity
      }
      for (int32_t i = 0; i < count; ++i)
        for (int32_t c = 0; all[i].kind == FL_SCORE && c < all[i].count; ++c)
          add_at(all[i].at[row * all[i].at_stride + c], all[i].coefficient[row * all[i].count + c],
                 t.first_column + first, columns, s.z, s.gradient);
      if (!plain)
        each_vector(columns, [&](int j, int n) {
          f32 slope = splat<f32>(t.scale);
          store(s.slope + j, t.class_scale ? slope * load(t.class_scale + first + j, n) : slope);
        });
      finish_block(t, plain, first, columns, s, sums);
      narrow_block(t.dtype, s.gradient, columns, data, first);
    }
  }
}

}  // namespace

extern const RowKernels row_kernels = {FL_ISA_NAME, statistics, gradient, gradient_of_exponentials};

}  // namespace FL_ISA
}  // namespace fl
