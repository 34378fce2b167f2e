// A tile's rows in blocks of columns: loading them as scores, and storing what became of them.
//
// A row is walked in blocks that stay in the first-level cache. A block is widened to floats and transformed into
// scores once (where it is made of scores already, it is read in place); every statistic then reads the scores. The
// block is padded to whole vectors with -inf, which every statistic leaves out, so that no loop over scores has a
// tail. The columns that a statistic does not look at are left out the same way.
#pragma once
#include "row_kernels.h"
#include "simd.h"

namespace fl {
namespace FL_ISA {

void statistics(const fl_tile&, const fl_statistic*, int32_t count, int64_t first_row, int64_t end_row);
void column_statistics(const fl_tile&, const fl_statistic*, int32_t count, int64_t first_column, int64_t end_column);
void differentiate(const Across&, int64_t first_column, int64_t end_column);
void gradient(const fl_tile&, const Gradient&, const fl_statistic*, int32_t count, const Across*, int32_t across_count,
              int64_t first_row, int64_t end_row, ColumnSums&);
void gradient_of_exponentials(const fl_tile&, const fl_statistic*, int32_t count, int64_t first_row, int64_t end_row,
                              ColumnSums&);

namespace {

constexpr int block = FL_KEPT_COLUMNS;   // columns
static_assert(block % lanes == 0, "a full block needs no padding");

struct alignas(64) Scratch {
  float z[block];              // scores
  float seen[block];           // those that a statistic looks at
  float operand[block];
  float ones[block];           // the operand of a statistic that has none
  float gradient[block];       // dL/dz, then dL/da
  float slope[block];          // dz/da
  float cap[block];            // cap(a + bias), 0 where the score is -inf
  const char* next;            // where in the tile the next block lies, and its bytes to a column
  int next_size;

  Scratch() {
    for (float& x : ones) x = 1;
  }
  // While column j of this block is worked on: what processors' own prefetching of a tile in main memory falls short of.
  FL_INLINE void prefetch(int j) const { __builtin_prefetch(next + j * next_size); }
};

FL_INLINE constexpr int padded(int columns) { return (columns + lanes - 1) / lanes * lanes; }
FL_INLINE i32 left_out(f32 z) { return z == -INFINITY; }

// ---- loading -----------------------------------------------------------------------------------------------------

template <class T>
inline void widen_block(const void* row, int64_t first, int columns, float* to, float padding) {
  const T* from = static_cast<const T*>(row) + first;
  each_vector(columns, [&](int j, int n) { store(to + j, load(from + j, n)); });
  for (int j = columns; j < padded(columns); ++j) to[j] = padding;
}

inline void widen_block(int32_t dtype, const void* row, int64_t first, int columns, float* to, float padding) {
  if (dtype == FL_F32) widen_block<float>(row, first, columns, to, padding);
  if (dtype == FL_BF16) widen_block<bf16>(row, first, columns, to, padding);
  if (dtype == FL_F16) widen_block<f16>(row, first, columns, to, padding);
}

FL_INLINE int64_t size_of(int32_t dtype) { return dtype == FL_F32 ? 4 : 2; }

FL_INLINE const void* row_of(const void* data, int32_t dtype, int64_t stride, int64_t row) {
  return static_cast<const char*>(data) + row * stride * size_of(dtype);
}

inline bool is_plain(const fl_tile& t) {
  return !t.bias && !t.class_scale && !t.class_shift && t.softcap == 0 && t.scale == 1;
}

// What the stored values of a row mean. `s`: where slope and cap go, if they are wanted.
template <bool with_slope, bool similar, class T>
inline void transform_block(const fl_tile& t, const void* row, int64_t first, int columns, float* scores, Scratch* s) {
  const T* from = static_cast<const T*>(row) + first;
  const float inverse_softcap = 1 / t.softcap;
  each_vector(columns, [&](int j, int n) {
    f32 a = load(from + j, n), slope = splat<f32>(t.scale);
    const i32 absent = left_out(a);
    if (!similar && t.bias) a += load(t.bias + first + j, n);
    if (!similar && t.class_scale) slope *= load(t.class_scale + first + j, n);
    f32 z = a, scale = slope;
    if (!similar && t.softcap != 0) {
      f32 flatness;
      z = tanh(a * inverse_softcap, flatness) * t.softcap;
      slope *= flatness;
    }
    f32 cap = z;
    z = multiply_add(z, scale, t.class_shift ? load(t.class_shift + first + j, n) : f32{});
    z = select(absent, -INFINITY, z);           // a softcap would make it finite, a scale of 0 NaN
    store(scores + j, z);
    if (with_slope) {
      store(s->slope + j, slope);
      store(s->cap + j, select(left_out(z), 0.0f, cap));
    }
  });
  for (int j = columns; j < padded(columns); ++j) scores[j] = -INFINITY;
}

template <bool with_slope>
inline void transform_block(const fl_tile& t, const void* row, int64_t first, int columns, float* to, Scratch* s = nullptr) {
  const bool similar = !t.bias && !t.class_scale && t.softcap == 0;     // as similarities are
  if (t.dtype == FL_F32 && similar) return transform_block<with_slope, true, float>(t, row, first, columns, to, s);
  if (t.dtype == FL_F32) transform_block<with_slope, false, float>(t, row, first, columns, to, s);
  if (t.dtype == FL_BF16) transform_block<with_slope, false, bf16>(t, row, first, columns, to, s);
  if (t.dtype == FL_F16) transform_block<with_slope, false, f16>(t, row, first, columns, to, s);
}

// The block's scores: in s.z, or where they lie in the tile.
template <bool with_slope>
inline const float* load_scores(const fl_tile& t, bool plain, int64_t row, int64_t first, int columns, Scratch& s) {
  const void* data = row_of(t.data, t.dtype, t.stride, row);
  s.next_size = (int)size_of(t.dtype);
  s.next = static_cast<const char*>(data) + (first + columns) * s.next_size;
  if (plain && t.dtype == FL_F32 && columns % lanes == 0) return static_cast<const float*>(data) + first;
  if (plain) widen_block(t.dtype, data, first, columns, s.z, -INFINITY);
  else transform_block<with_slope>(t, data, first, columns, s.z, &s);
  return s.z;
}

inline const float* load_operand(const fl_statistic& k, int64_t row, int64_t first, int columns, Scratch& s) {
  if (!k.operand) return s.ones;
  widen_block(k.operand_dtype, row_of(k.operand, k.operand_dtype, k.operand_stride, row), first, columns, s.operand, 0);
  return s.operand;
}

// A statistic of as many rows as there are lanes, where it has a row parameter, and their derivatives.
template <class F>
FL_INLINE auto set_row(F& f, f32 row, int) -> decltype((void)(f.row = row)) { f.row = row; }
template <class F>
FL_INLINE void set_row(F&, f32, long) {}

struct Derivatives { f32 weight, center, offset, level; };

// ---- relations -----------------------------------------------------------------------------------------------------

FL_INLINE bool hides_some(const fl_statistic& k) { return k.where & ~FL_REST; }

// A row's scores, -inf where the labels and thresholds of a statistic hide them. `across`: of a statistic of columns.
template <bool across>
inline void hide(const fl_statistic& k, int64_t row, int64_t first, int columns, const float* z, float* seen) {
  const bool labelled = k.where & (FL_SAME | FL_OTHER);
  const int64_t* labels = labelled ? (across ? k.row_label : k.column_label) + first : nullptr;
  const int64_t label = labelled ? (across ? k.column_label : k.row_label)[row] : 0;
  const i32 other = i32{} - (k.where & FL_SAME ? 1 : 0);
  auto limit = [&](const float* limits, int j, int n) __attribute__((always_inline)) {
    return across ? load(limits + first + j, n) : splat<f32>(limits[row]);
  };
  each_vector(columns, [&](int j, int n) {
    f32 x = load(z + j);
    i32 hidden = labelled ? equal(labels + j, n, label) ^ other : i32{};
    if (k.where & FL_ABOVE) hidden |= x <= limit(k.above, j, n);      // so written, NaN is seen
    if (k.where & FL_BELOW) hidden |= x >= limit(k.below, j, n);
    store(seen + j, select(hidden, -INFINITY, x));
  });
  for (int j = columns; j < padded(columns); ++j) seen[j] = -INFINITY;
}

// For as long as it lives, `z` are the scores that a statistic of the row looks at. A single one is hidden where it lies,
// once the block is in s.z; others cost a copy.
class Seen {
 public:
  FL_INLINE Seen(const fl_statistic& k, int64_t row, int64_t first, int64_t first_class, int columns, const float*& scores,
                 Scratch& s) {
    z = scores;
    if (hides_some(k)) {
      hide<false>(k, row, first, columns, scores, s.seen);
      z = s.seen;
    }
    if (!(k.where & FL_REST)) return;
    int64_t place = k.rest[row] - first_class;
    if (k.rest[row] < 0 || place < 0 || place >= columns) return;
    if (z != s.seen) {
      if (z != s.z) __builtin_memcpy(s.z, z, sizeof(float) * padded(columns));
      z = scores = s.z;
      hidden_ = s.z + place;
      kept_ = *hidden_;
    }
    (z == s.seen ? s.seen : s.z)[place] = -INFINITY;
  }
  FL_INLINE ~Seen() {
    if (hidden_) *hidden_ = kept_;
  }
  Seen(const Seen&) = delete;

  const float* z;

 private:
  float* hidden_ = nullptr;
  float kept_ = 0;
};

// ---- storing ------------------------------------------------------------------------------------------------------

template <class T>
inline void narrow_block(const float* from, int columns, void* row, int64_t first) {
  T* to = static_cast<T*>(row) + first;
  each_vector(columns, [&](int j, int n) { store(to + j, load(from + j), n); });
}

inline void narrow_block(int32_t dtype, const float* from, int columns, void* row, int64_t first) {
  if (dtype == FL_F32) narrow_block<float>(from, columns, row, first);
  if (dtype == FL_BF16) narrow_block<bf16>(from, columns, row, first);
  if (dtype == FL_F16) narrow_block<f16>(from, columns, row, first);
}

}  // namespace
}  // namespace FL_ISA
}  // namespace fl
