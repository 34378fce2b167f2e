// fl_gradient on the host, for a range of rows and one instruction set (FL_ISA).
#include "row_statistics.h"

#include "tile_block.h"

namespace fl {
namespace FL_ISA {
namespace {

// s.gradient (+)= psi where the score counts
template <bool first, class F>
void add_derivative(const F& f, const Derivative& d, const float* z, const float* v, int n, Scratch& s) {
  for (int j = 0; j < n; j += lanes) {
    s.prefetch(j);
    f32 x = load(z + j), g = select(left_out(x), 0.0f, f.psi(x, load(v + j), d));
    store(s.gradient + j, first ? g : load(s.gradient + j) + g);
  }
}

// The same for a statistic of columns, whose row parameter and derivative differ from lane to lane. A column whose
// coefficients are all 0 adds 0, whatever its scores are.
template <bool first, class F>
void add_across(const F& of_row, const Across& a, int64_t column, int columns, const float* z, float v, Scratch& s) {
  F f = of_row;
  const float* row = a.statistic->row;
  each_vector(columns, [&](int j, int n) __attribute__((always_inline)) {
    s.prefetch(j);
    if (row) set_row(f, load(row + column + j, n), 0);
    auto at = [&](const float* vector) __attribute__((always_inline)) { return load(vector + column + j); };
    const Derivatives d{at(a.weight), at(a.center), at(a.offset), at(a.level)};
    f32 x = load(z + j);
    i32 silent = d.weight == 0.0f;
    if (F::has_offset) silent &= d.offset == 0.0f;
    silent |= left_out(x);
    f32 g = select(silent, 0.0f, f.psi(x, splat<f32>(v), d));
    store(s.gradient + j, first ? g : load(s.gradient + j) + g);
  });
}

// The scores of a row that a statistic of columns looks at.
const float* seen_across(const Across& a, int64_t row, int64_t first, int columns, const float* z, Scratch& s) {
  const fl_statistic& k = *a.statistic;
  if (hides_some(k)) {
    hide<true>(k, row, first, columns, z, s.seen);
    z = s.seen;
  }
  if (!a.start || k.where == FL_ALL) return z;
  for (const int64_t *e = a.entries + a.start[row], *end = a.entries + a.start[row + 1]; e < end; ++e) {
    if (*e < first || *e >= first + columns) continue;
    if (z != s.seen) __builtin_memcpy(s.seen, z, sizeof(float) * padded(columns));
    z = s.seen;
    s.seen[*e - first] = -INFINITY;
  }
  return z;
}

void add_picked_across(const Across& a, int64_t row, int64_t first, int columns, const float* z, float* gradient) {
  for (const int64_t *e = a.entries + a.start[row], *end = a.entries + a.start[row + 1]; e < end; ++e) {
    int64_t place = *e / a.statistic->count - first;
    if (place >= 0 && place < columns && z[place] != -INFINITY) gradient[place] += a.statistic->coefficient[*e];
  }
}

float operand_of(const fl_statistic& k, int64_t row) {
  float v[lanes] = {1};
  if (k.operand) widen_block(k.operand_dtype, k.operand, row, 1, v, 0);
  return v[0];
}

// Adds the coefficients of a statistic that picks columns, where their scores count.
void add_picked(const fl_statistic& k, int64_t row, int64_t first_class, int columns, const float* z, float* gradient) {
  for (int32_t c = 0; c < k.count; ++c) {
    int64_t column = k.kind == FL_SCORE ? k.at[row * k.at_stride + c] : (int64_t)k.state[(2 * row + 1) * k.count + c];
    int64_t place = column - first_class;
    if (column >= 0 && place >= 0 && place < columns && z[place] != -INFINITY)
      gradient[place] += k.coefficient[row * k.count + c];
  }
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
      if (x > most || x != x) most = x;                        // NaN enters, and stays
    }
}

bool picks(const fl_statistic& k) { return k.kind == FL_SCORE || k.kind == FL_EXTREME; }

// Whether any of a statistic's coefficients in the row is not 0.
bool is_active(const fl_statistic& k, int64_t row) {
  if (k.kind == FL_COUNT) return false;
  int32_t count = k.count;
  if (!picks(k)) with_statistic<f32>(k, 0, [&](const auto& f) { count = f.coefficients; });
  for (int32_t c = 0; c < count; ++c)
    if (k.coefficient[row * count + c] != 0) return true;
  return false;
}

Derivative derivative_of(const fl_statistic& k, int64_t row) {
  Derivative d{};
  with_statistic<f32>(k, 0, [&](const auto& f) {
    d = f.derivative(k, k.state + row * f.width, k.coefficient + row * f.coefficients);
  });
  return d;
}

// What a row's kept exponentials are multiplied by: coefficient * e^{shift - S}.
float factor_of(const fl_statistic& k, int64_t row) {
  const double* state = k.state + 2 * row;
  const double s = state[0] + ::log(state[1]);
  return s == -INFINITY ? 0 : (float)(k.coefficient[row] * ::exp(k.keep_shift[row] - s));
}

}  // namespace

void differentiate(const Across& a, int64_t first_column, int64_t end_column) {
  for (int64_t column = first_column; column < end_column; ++column) {
    const Derivative d = is_active(*a.statistic, column) ? derivative_of(*a.statistic, column) : Derivative{};
    a.weight[column] = d.weight;
    a.center[column] = d.center;
    a.offset[column] = d.offset;
    a.level[column] = d.level;
  }
}

void gradient(const fl_tile& t, const Gradient& to, const fl_statistic* all, int32_t count, const Across* across,
              int32_t across_count, int64_t first_row, int64_t end_row, ColumnSums& sums) {
  Scratch s;
  const bool plain = is_plain(t) && !sums.class_scale && !sums.wants_scale;
  for (int64_t row = first_row; row < end_row; ++row) {
    void* out = const_cast<void*>(row_of(to.out, to.dtype, to.stride, row));
    int32_t active[most_statistics], actives = 0;
    Derivative derivative[most_statistics];
    for (int32_t i = 0; i < count; ++i)
      if (is_active(all[i], row)) derivative[actives] = derivative_of(all[i], row), active[actives++] = i;
    if (actives == 0 && across_count == 0) {
      __builtin_memset(out, 0, size_of(to.dtype) * t.columns);
      continue;
    }
    for (int64_t first = 0; first < t.columns; first += block) {
      const int columns = (int)(t.columns - first < block ? t.columns - first : block), n = padded(columns);
      const int64_t first_class = t.first_column + first;
      const float* z = load_scores<true>(t, plain, row, first, columns, s);
      bool empty = true;
      for (int32_t i = 0; i < actives; ++i) {
        const fl_statistic& k = all[active[i]];
        if (picks(k)) continue;
        const Seen seen(k, row, first, first_class, columns, z, s);
        const float* v = load_operand(k, row, first, columns, s);
        with_statistic<f32>(k, k.row ? k.row[row] : 0, [&](const auto& f) {
          if (empty) add_derivative<true>(f, derivative[i], seen.z, v, n, s);
          else add_derivative<false>(f, derivative[i], seen.z, v, n, s);
        });
        empty = false;
      }
      for (const Across* a = across; a < across + across_count; ++a) {
        if (!a->weight) continue;
        const float* seen = seen_across(*a, row, first, columns, z, s);
        const float v = operand_of(*a->statistic, row);
        with_statistic<f32>(*a->statistic, 0, [&](const auto& f) {
          if (empty) add_across<true>(f, *a, first, columns, seen, v, s);
          else add_across<false>(f, *a, first, columns, seen, v, s);
        });
        empty = false;
      }
      if (empty) __builtin_memset(s.gradient, 0, sizeof s.gradient);
      for (int32_t i = 0; i < actives; ++i)
        if (picks(all[active[i]])) add_picked(all[active[i]], row, first_class, columns, z, s.gradient);
      for (const Across* a = across; a < across + across_count; ++a)
        if (!a->weight && a->start) add_picked_across(*a, row, first, columns, z, s.gradient);
      finish_block(t, plain, first, columns, s, sums);
      narrow_block(to.dtype, s.gradient, columns, out, first);
    }
  }
}

void gradient_of_exponentials(const fl_tile& t, const fl_statistic* all, int32_t count, int64_t first_row,
                              int64_t end_row, ColumnSums& sums) {
  Scratch s;
  const bool plain = is_plain(t);
  for (int64_t row = first_row; row < end_row; ++row) {
    void* data = const_cast<void*>(row_of(t.data, t.dtype, t.stride, row));
    f32 factor{};
    bool any_active = false;
    for (int32_t i = 0; i < count; ++i) {
      any_active |= is_active(all[i], row);
      if (all[i].kind == FL_LOGSUMEXP) factor = splat<f32>(factor_of(all[i], row));
    }
    if (!any_active) {
      __builtin_memset(data, 0, size_of(t.dtype) * t.columns);
      continue;
    }
    for (int64_t first = 0; first < t.columns; first += block) {
      const int columns = (int)(t.columns - first < block ? t.columns - first : block);
      widen_block(t.dtype, data, first, columns, s.z, 0);
      for (int j = 0; j < columns; j += lanes) {
        f32 e = load(s.z + j);
        store(s.gradient + j, select(e == 0.0f, 0.0f, e * factor));   // 0 stays 0, also times infinity
      }
      for (int32_t i = 0; i < count; ++i)
        if (all[i].kind == FL_SCORE) add_picked(all[i], row, t.first_column + first, columns, s.z, s.gradient);
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

}  // namespace FL_ISA
}  // namespace fl
