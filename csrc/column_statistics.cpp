// fl_column_statistics on the host, for a range of columns and one instruction set (FL_ISA).
//
// A strip of columns is walked in blocks of rows that stay in the first-level cache, copied there as scores: the rows of
// a tile lie apart by powers of two, which would share few cache lines. Lanes are columns; each has its own pivot.
#include "row_statistics.h"

#include "tile_block.h"

namespace fl {
namespace FL_ISA {
namespace {

constexpr int strip_columns = 128, strip_rows = 56;   // 28 KiB
static_assert(strip_columns % lanes == 0 && strip_rows % 4 == 0, "whole vectors, summed by fours");

struct alignas(64) Strip {
  float z[strip_rows * strip_columns];      // scores
  float seen[strip_rows * strip_columns];   // those that a statistic looks at
  float operand[padded(strip_rows)];
  int rows, columns;
  int64_t row, column;                      // of the tile: the strip's first
  const char* next;                         // the block of rows after this one: see Scratch
  int64_t next_stride;
  int next_size;

  // While the vector at row r and column j is worked on, in the order in which the next block lies in memory.
  FL_INLINE void prefetch(int r, int j) const {
    constexpr int vectors = strip_columns / lanes;
    const int place = j / lanes * rows + r;
    __builtin_prefetch(next + place / vectors * next_stride + place % vectors * lanes * next_size);
  }
};

// What a statistic of the strip's columns has summed up, over all blocks of rows so far.
struct alignas(64) Running {
  float pivot[strip_columns];
  double sum[2][strip_columns];

  void clear() {
    for (float& p : pivot) p = -INFINITY;
    for (auto& sums : sum)
      for (double& x : sums) x = 0;
  }
};
constexpr int together = 8;                 // statistics that share a block of rows

void load_strip(const fl_tile& t, bool plain, Strip& s) {
  for (int r = 0; r < s.rows; ++r) {
    float* z = s.z + r * strip_columns;
    const void* row = row_of(t.data, t.dtype, t.stride, s.row + r);
    if (plain) widen_block(t.dtype, row, s.column, s.columns, z, -INFINITY);
    else transform_block<false>(t, row, s.column, s.columns, z);
  }
  s.next_size = (int)size_of(t.dtype);
  s.next_stride = t.stride * s.next_size;
  s.next = static_cast<const char*>(t.data) + (s.row + s.rows) * s.next_stride + s.column * s.next_size;
}

const float* seen_of(const fl_statistic& k, int64_t first_row, Strip& s) {
  if (k.where == FL_ALL) return s.z;
  if (hides_some(k))
    for (int r = 0; r < s.rows; ++r)
      hide<true>(k, s.row + r, s.column, s.columns, s.z + r * strip_columns, s.seen + r * strip_columns);
  else
    __builtin_memcpy(s.seen, s.z, sizeof(float) * strip_columns * s.rows);
  if (k.where & FL_REST)
    for (int j = 0; j < s.columns; ++j) {
      const int64_t rest = k.rest[s.column + j], r = rest - first_row - s.row;
      if (rest >= 0 && r >= 0 && r < s.rows) s.seen[r * strip_columns + j] = -INFINITY;
    }
  return s.seen;
}

// The largest of(x) of the scores x of one vector of columns; of(-inf) is -inf.
template <class Of>
FL_INLINE f32 largest_of(const float* z, int rows, Of of) {
  f32 most[4];
  for (f32& m : most) m = splat<f32>(-INFINITY);
  auto take = [&](int r, f32& m) __attribute__((always_inline)) { m = larger(of(load(z + r * strip_columns)), m); };
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    for (int u = 0; u < 4; ++u) take(r + u, most[u]);
  for (; r < rows; ++r) take(r, most[0]);
  return larger(larger(most[0], most[1]), larger(most[2], most[3]));
}

template <class F>
FL_INLINE f32 pivot_of(const F& f, const float* z, int rows) {
  if constexpr (F::pivot == Pivot::exponent)
    return largest_of(z, rows, [&](f32 x) { f32 slope; return select(left_out(x), x, f.exponent(x, slope)); });
  if constexpr (F::pivot == Pivot::mean) {
    f32 sum{}, count{};
    for (int r = 0; r < rows; ++r) {
      f32 x = load(z + r * strip_columns);
      sum += select(left_out(x), 0.0f, x);
      count += select(left_out(x), 0.0f, splat<f32>(1));
    }
    return select(count > 0.0f, sum / count, 0.0f);
  }
  if constexpr (F::pivot == Pivot::maximum) {
    if (f.factor[0] > 0) {
      f32 most = largest_of(z, rows, [](f32 x) { return x; });
      return select(left_out(most), most, f.factor * most);
    } else {
      return largest_of(z, rows, [&](f32 x) { return select(left_out(x), x, f.factor * x); });
    }
  }
  return f32{};
}

// The means differ from block to block: states are merged at once.
template <class F>
void merge_lanes(const f32& pivot, const f32* sum, int n, double* state) {
  for (int i = 0; i < n; ++i) {
    double sums[F::sums], from[F::width];
    for (int k = 0; k < F::sums; ++k) sums[k] = sum[k][i];
    F::state(pivot[i], sums, from);
    F::merge(state + i * F::width, from);
  }
}

// Sums relative to the largest pivot so far.
template <class F>
void add_lanes(const f32& pivot, const f32* sum, int j, Running& to) {
  if (F::pivot != Pivot::none) {
    const f32 before = load(to.pivot + j);
    const i32 rises = pivot > before;
    if (any(rises))
      for (int i = 0; i < lanes; ++i)
        if (rises[i] && before[i] != -INFINITY)             // else there is nothing, or NaN, to rescale
          for (int k = 0; k < F::sums; ++k) to.sum[k][j + i] *= ::exp((double)before[i] - pivot[i]);
    store(to.pivot + j, pivot);
  }
  for (int k = 0; k < F::sums; ++k) {
    float part[lanes];
    store(part, sum[k]);
    for (int i = 0; i < lanes; ++i) to.sum[k][j + i] += part[i];
  }
}

// One vector of columns, `n` of them within the tile.
template <class F>
void push(const F& f, const float* z, const float* v, int j, int n, const Strip& s, Running& to, double* state) {
  z += j;
  f32 pivot = pivot_of(f, z, s.rows);
  if (F::pivot == Pivot::maximum || F::pivot == Pivot::exponent) {
    const f32 before = load(to.pivot + j);
    pivot = pivot >= before ? pivot : before;
  }
  const f32 p = select(pivot == -INFINITY, 0.0f, pivot);       // none counts so far, or all are NaN
  f32 sum[4][F::sums] = {};
  auto add = [&](int r, f32* into) __attribute__((always_inline)) {
    s.prefetch(r, j);
    f32 x = load(z + r * strip_columns), term[F::sums];
    f.phi(x, splat<f32>(v[r]), p, term);
    for (int k = 0; k < F::sums; ++k) into[k] += select(left_out(x), 0.0f, term[k]);
  };
  int r = 0;
  for (; r + 4 <= s.rows; r += 4) {
    add(r, sum[0]);
    add(r + 1, sum[1]);
    add(r + 2, sum[2]);
    add(r + 3, sum[3]);
  }
  for (; r < s.rows; ++r) add(r, sum[0]);
  for (int k = 0; k < F::sums; ++k) sum[0][k] = (sum[0][k] + sum[1][k]) + (sum[2][k] + sum[3][k]);
  if constexpr (F::pivot == Pivot::mean) merge_lanes<F>(pivot, sum[0], n, state);
  else add_lanes<F>(pivot, sum[0], j, to);
}

// As of rows: vectors are compared with the lists' last scores, and only a hit is looked into.
void push_extreme(const fl_statistic& k, const float* z, int j, int n, int64_t first_row, const Strip& s, double* state) {
  const float factor = (float)k.factor;
  float bound[lanes];
  int32_t ties_lose[lanes];
  auto look = [&](int i, int64_t row) {
    const double* list = state + i * 2 * k.count;
    bound[i] = (float)(factor * list[k.count - 1]);
    ties_lose[i] = list[2 * k.count - 1] >= 0 && list[2 * k.count - 1] < row ? -1 : 0;
  };
  for (int i = 0; i < lanes; ++i) bound[i] = INFINITY, ties_lose[i] = -1;
  for (int i = 0; i < n; ++i) look(i, first_row);
  for (int r = 0; r < s.rows; ++r) {
    f32 x = load(z + r * strip_columns + j), key = factor * x;
    i32 lose;
    __builtin_memcpy(&lose, ties_lose, sizeof lose);
    i32 miss = left_out(x) | (key < load(bound)) | (lose & (key == load(bound)));
    if (!any(~miss)) continue;
    for (int i = 0; i < n; ++i)
      if (!miss[i]) {
        insert_extreme(state + i * 2 * k.count, k.count, k.factor, x[i], (double)(first_row + r));
        look(i, first_row + r + 1);
      }
  }
}

void push_scores(const fl_statistic& k, int64_t first_row, const Strip& s) {
  for (int j = 0; j < s.columns; ++j)
    for (int32_t c = 0; c < k.count; ++c) {
      const int64_t at = k.at[(s.column + j) * k.at_stride + c], r = at - first_row - s.row;
      if (at >= 0 && r >= 0 && r < s.rows) k.state[(s.column + j) * k.count + c] += s.z[r * strip_columns + j];
    }
}

void push_strip(const fl_tile& t, const fl_statistic& k, Strip& s, Running& to) {
  if (k.kind == FL_SCORE) return push_scores(k, t.first_row, s);
  const float* z = seen_of(k, t.first_row, s);
  for (float& v : s.operand) v = 1;
  if (k.operand) widen_block(k.operand_dtype, k.operand, s.row, s.rows, s.operand, 0);
  const int32_t width = width_of<f32>(k);
  each_vector(s.columns, [&](int j, int n) {
    double* state = k.state + (s.column + j) * width;
    if (k.kind == FL_EXTREME) return push_extreme(k, z, j, n, t.first_row + s.row, s, state);
    with_statistic<f32>(k, 0, [&](auto f) {
      if (k.row) set_row(f, load(k.row + s.column + j, n), 0);
      push(f, z, s.operand, j, n, s, to, state);
    });
  });
}

void finish_strip(const fl_statistic& k, const Strip& s, const Running& all) {
  if (k.kind == FL_SCORE || k.kind == FL_EXTREME) return;
  with_statistic<f32>(k, 0, [&](const auto& f) {
    if constexpr (f.pivot != Pivot::mean)
      for (int j = 0; j < s.columns; ++j) {
        double sums[f.sums], from[f.width];
        for (int i = 0; i < f.sums; ++i) sums[i] = all.sum[i][j];
        f.state(all.pivot[j], sums, from);
        f.merge(k.state + (s.column + j) * f.width, from);
      }
  });
}

void push_columns(const fl_tile& t, const fl_statistic* all, int32_t count, int64_t first_column, int64_t end_column) {
  Strip s;
  Running running[together];
  const bool plain = is_plain(t);
  for (s.column = first_column; s.column < end_column; s.column += strip_columns) {
    s.columns = (int)(end_column - s.column < strip_columns ? end_column - s.column : strip_columns);
    for (int32_t i = 0; i < count; ++i) running[i].clear();
    for (s.row = 0; s.row < t.rows; s.row += strip_rows) {
      s.rows = (int)(t.rows - s.row < strip_rows ? t.rows - s.row : strip_rows);
      load_strip(t, plain, s);
      for (int32_t i = 0; i < count; ++i) push_strip(t, all[i], s, running[i]);
    }
    for (int32_t i = 0; i < count; ++i) finish_strip(all[i], s, running[i]);
  }
}

}  // namespace

void column_statistics(const fl_tile& t, const fl_statistic* all, int32_t count, int64_t first_column,
                       int64_t end_column) {
  for (int32_t i = 0; i < count; i += together)
    push_columns(t, all + i, count - i < together ? count - i : together, first_column, end_column);
}

}  // namespace FL_ISA
}  // namespace fl
