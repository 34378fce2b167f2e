// A tile's rows on a device: windows of columns in the registers of a block of threads, and sums over its threads.
//
// A block of threads reads a window of a row at once, each thread `vectors` times eight neighbouring columns. Rows
// begin anywhere, so a window's first vector may begin a few columns early, where 16-byte accesses are aligned. Columns
// outside of the window hold -inf, which every statistic leaves out.
#pragma once
#include "row_statistics.h"

namespace fl {
namespace FL_ISA {

constexpr int vector = 8;   // columns: 16 bytes of halves, twice 16 of floats

struct alignas(16) Chunk { uint32_t words[4]; };

struct Window {
  int64_t origin;   // the column where thread 0 begins to read
  int low, high;    // columns [origin + low, origin + high) are the window
};

FL_FUNCTION int64_t size_of(int32_t dtype) { return dtype == FL_F32 ? 4 : 2; }

FL_FUNCTION const char* row_of(const void* data, int32_t dtype, int64_t stride, int64_t row) {
  return static_cast<const char*>(data) + row * stride * size_of(dtype);
}

FL_FUNCTION bool is_plain(const fl_tile& t) {
  return !t.bias && !t.class_scale && !t.class_shift && t.softcap == 0 && t.scale == 1 && !t.scale_pointer;
}

// The tile with its scale as a number: read once, for all of a thread's scores.
FL_DEVICE fl_tile with_scale(fl_tile t) {
  if (t.scale_pointer) t.scale = *t.scale_pointer;
  return t;
}

// Window `number` of a row that begins at `row`, of `step` columns; with step 0, of as many as the threads hold, `room`,
// and moved to where rows are aligned. Windows of a given step are so only if the threads have room for the difference.
FL_DEVICE Window window_of(const char* row, int32_t dtype, int64_t columns, int64_t number, int64_t step, int room) {
  const int early = (int)((reinterpret_cast<uintptr_t>(row) & 15) / size_of(dtype));
  const bool aligned = step == 0 || step + early <= room;
  const int64_t first = step == 0 ? number * room - early : number * step;
  const int64_t end = step == 0 ? first + room : first + step;
  const int64_t origin = step != 0 && aligned ? first - early : first;
  const int64_t low = (first > 0 ? first : 0) - origin, high = (end < columns ? end : columns) - origin;
  return {origin, (int)low, (int)(high > low ? high : low)};
}

// ---- one vector ----------------------------------------------------------------------------------------------------

FL_DEVICE bool is_aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

FL_DEVICE float load_one(const void* row, int32_t dtype, int64_t column) {
  if (dtype == FL_F32) return static_cast<const float*>(row)[column];
  return widen_half(static_cast<const uint16_t*>(row)[column], dtype);
}

// Columns column + [low, high) of the eight from `column` on; `padding` in the others.
FL_DEVICE void load_vector(const char* row, int32_t dtype, int64_t column, int low, int high, float padding, float* to) {
  const char* from = row + column * size_of(dtype);
  if (low <= 0 && high >= vector && is_aligned(from)) {
    const Chunk* chunks = reinterpret_cast<const Chunk*>(from);
    if (dtype == FL_F32) {
      const Chunk a = chunks[0], b = chunks[1];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        union { uint32_t bits; float number; } x = {a.words[i]}, y = {b.words[i]};
        to[i] = x.number;
        to[4 + i] = y.number;
      }
    } else {
      const Chunk a = chunks[0];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[2 * i] = widen_half(a.words[i] & 0xffff, dtype);
        to[2 * i + 1] = widen_half(a.words[i] >> 16, dtype);
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < vector; ++i) to[i] = i >= low && i < high ? load_one(row, dtype, column + i) : padding;
}

FL_DEVICE void store_vector(char* row, int32_t dtype, int64_t column, int low, int high, const float* from) {
  char* to = row + column * size_of(dtype);
  if (low <= 0 && high >= vector && is_aligned(to)) {
    Chunk* chunks = reinterpret_cast<Chunk*>(to);
    Chunk a, b;
    if (dtype == FL_F32) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        union { float number; uint32_t bits; } x = {from[i]}, y = {from[4 + i]};
        a.words[i] = x.bits;
        b.words[i] = y.bits;
      }
      chunks[1] = b;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a.words[i] = narrow_half(from[2 * i], dtype) | narrow_half(from[2 * i + 1], dtype) << 16;
    }
    chunks[0] = a;
    return;
  }
#pragma unroll
  for (int i = 0; i < vector; ++i)
    if (i >= low && i < high) {
      if (dtype == FL_F32) reinterpret_cast<float*>(to)[i] = from[i];
      else reinterpret_cast<uint16_t*>(to)[i] = (uint16_t)narrow_half(from[i], dtype);
    }
}

// ---- scores --------------------------------------------------------------------------------------------------------

// The score that the stored value `a` of column j stands for, dz/da, and cap(a + bias) (0 where the score is -inf).
FL_DEVICE float score_of(const fl_tile& t, int64_t j, float a, float& slope, float& cap) {
  const bool absent = a == -INFINITY;           // a softcap would make it finite, a scale of 0 NaN
  slope = t.scale;
  if (t.bias) a += t.bias[j];
  if (t.class_scale) slope *= t.class_scale[j];
  const float scale = slope;
  if (t.softcap != 0) {
    float flatness;
    a = tanh(a * (1 / t.softcap), flatness) * t.softcap;
    slope *= flatness;
  }
  float z = a * scale;
  if (t.class_shift) z += t.class_shift[j];
  if (absent) z = -INFINITY;
  cap = z == -INFINITY ? 0 : a;
  return z;
}

FL_FUNCTION bool picks(const fl_statistic& k) { return k.kind == FL_SCORE || k.kind == FL_EXTREME; }

// Statistics of columns, of the kinds that are sums.
inline int check_columns(const fl_tile* tile, const fl_statistic* statistics, int32_t count, bool differentiated) {
  constexpr Abilities able = {FL_CUDA_STATISTICS, 0, 0, FL_LOGSUMEXP_OF, every_where, true};
  if (int status = fl::check_across(tile, statistics, count, differentiated, able)) return status;
  for (int32_t i = 0; i < count; ++i)
    if (picks(statistics[i])) return fail("statistic %d: kind %d of columns has no CUDA kernel", i, statistics[i].kind);
  return 0;
}

inline bool has_relations(const fl_statistic* statistics, int32_t count) {
  for (int32_t i = 0; i < count; ++i)
    if (statistics[i].where & ~FL_REST) return true;
  return false;
}

// Which of a thread's scores z, of those in `bits`, labels and thresholds leave. Score i is in row(i) and column(i) of
// what the statistic takes for the tile.
template <int size, class Row, class Column>
FL_DEVICE uint32_t related(const fl_statistic& k, const float* z, uint32_t bits, Row row, Column column) {
  if (k.where & (FL_SAME | FL_OTHER)) {
    uint32_t equal = 0;
#pragma unroll
    for (int i = 0; i < size; ++i)
      if (bits >> i & 1) equal |= (uint32_t)(k.row_label[row(i)] == k.column_label[column(i)]) << i;
    bits &= k.where & FL_SAME ? equal : ~equal;
  }
  uint32_t beyond = 0;
  if (k.where & FL_ABOVE)
#pragma unroll
    for (int i = 0; i < size; ++i)
      if (bits >> i & 1) beyond |= (uint32_t)(z[i] <= k.above[row(i)]) << i;
  if (k.where & FL_BELOW)
#pragma unroll
    for (int i = 0; i < size; ++i)
      if (bits >> i & 1) beyond |= (uint32_t)(z[i] >= k.below[row(i)]) << i;
  return bits & ~beyond;
}

// A thread's part of a window.
template <int vectors>
struct Part {
  static constexpr int size = vectors * vector;

  FL_DEVICE static int room() { return size * blockDim.x; }
  FL_DEVICE static int at(int u) { return (u * (int)blockDim.x + (int)threadIdx.x) * vector; }   // from the origin

  // Vectors that lie beyond the window for all threads cost nothing.
  template <class Body>
  FL_DEVICE static void each(const Window& w, Body body) {
#pragma unroll
    for (int u = 0; u < vectors; ++u)
      if (u * (int)blockDim.x * vector < w.high) body(u);
  }

  FL_DEVICE static void load(const char* row, int32_t dtype, const Window& w, float padding, float* to) {
#pragma unroll
    for (int i = 0; i < size; ++i) to[i] = padding;
    each(w, [&](int u) {
      load_vector(row, dtype, w.origin + at(u), w.low - at(u), w.high - at(u), padding, to + u * vector);
    });
  }

  FL_DEVICE static void load_scores(const fl_tile& t, bool plain, const char* row, const Window& w, float* z) {
    load(row, t.dtype, w, -INFINITY, z);
    if (plain) return;
    each(w, [&](int u) {
#pragma unroll
      for (int i = 0; i < vector; ++i) {
        const int place = at(u) + i;
        float slope, cap, &x = z[u * vector + i];
        if (place >= w.low && place < w.high) x = score_of(t, w.origin + place, x, slope, cap);
      }
    });
  }

  FL_DEVICE static void load_operand(const fl_statistic& k, int64_t row, const Window& w, float* v) {
    if (k.operand)
      return load(row_of(k.operand, k.operand_dtype, k.operand_stride, row), k.operand_dtype, w, 0, v);
#pragma unroll
    for (int i = 0; i < size; ++i) v[i] = 1;
  }

  // Bit i is set where score i counts. Kernels that know no labels and thresholds need fewer registers.
  template <bool relations>
  FL_DEVICE static uint32_t counting(const fl_statistic& k, int64_t row, int64_t first_class, const Window& w,
                                     const float* z) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < size; ++i) bits |= (uint32_t)(z[i] != -INFINITY) << i;
    if (relations && (k.where & ~FL_REST))
      bits = related<size>(k, z, bits, [&](int) { return row; },
                           [&](int i) { return w.origin + at(i / vector) + i % vector; });
    if (!(k.where & FL_REST) || k.rest[row] < 0) return bits;
    const int64_t away = k.rest[row] - first_class - w.origin;
    if (away < w.low || away >= w.high) return bits;
    const uint32_t place = (uint32_t)away, owner = place / vector % blockDim.x;
    const uint32_t index = place / vector / blockDim.x * vector + place % vector;
    return owner == threadIdx.x ? bits & ~(1u << index) : bits;
  }
};

// ---- over the threads of a block -------------------------------------------------------------------------------------

struct Exchange { double parts[2][3][most_threads / warp]; };

// Joins a number of every thread, in an order that depends on nothing but their count; all threads get the result.
// There is one barrier in each, which callers rely on too: two places are used in turn, and who writes to a place again has passed the barrier
// of the join in between, before which all had read it.
class Reduction {
 public:
  FL_DEVICE Reduction() : memory_(shared<Exchange>()) {}
  FL_DEVICE bool leads() const { return threadIdx.x == 0; }

  template <int n>
  FL_DEVICE void sum(double* x) {
#pragma unroll
    for (int k = 0; k < n; ++k)
      for (int apart = warp / 2; apart > 0; apart /= 2) x[k] += __shfl_xor_sync(0xffffffffu, x[k], apart);
    join<n>(x, [](double* a, const double* b) {
      for (int k = 0; k < n; ++k) a[k] += b[k];
    });
  }

  FL_DEVICE float largest(float x) {   // NaN is passed over
    for (int apart = warp / 2; apart > 0; apart /= 2) x = larger(__shfl_xor_sync(0xffffffffu, x, apart), x);
    double all = x;
    join<1>(&all, [](double* a, const double* b) { *a = *b > *a ? *b : *a; });
    return (float)all;
  }

  // The candidate that comes first on a list of extremes: keys fall, ties go to the lower place; place -1 is none.
  FL_DEVICE void first_of(float& key, int& place) {
    for (int apart = warp / 2; apart > 0; apart /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, key, apart);
      const int other_place = __shfl_xor_sync(0xffffffffu, place, apart);
      if (precedes(other, other_place, key, place)) key = other, place = other_place;
    }
    double both[2] = {key, (double)place};
    join<2>(both, [](double* a, const double* b) {
      if (precedes((float)b[0], (int)b[1], (float)a[0], (int)a[1])) a[0] = b[0], a[1] = b[1];
    });
    key = (float)both[0];
    place = (int)both[1];
  }

  FL_DEVICE static bool precedes(float key, int place, float other, int other_place) {
    if (place < 0 || other_place < 0) return place >= 0;
    const bool nan = key != key, other_nan = other != other;
    if (nan != other_nan) return nan;
    return key > other || ((nan || key == other) && place < other_place);
  }

 private:
  template <int n, class Join>
  FL_DEVICE void join(double* x, Join join_two) {
    const int warps = blockDim.x / warp;
    double(*parts)[most_threads / warp] = memory_.parts[turn_];
    turn_ ^= 1;
    if (threadIdx.x % warp == 0)
      for (int k = 0; k < n; ++k) parts[k][threadIdx.x / warp] = x[k];
    barrier<Barrier::reduction>();
    for (int k = 0; k < n; ++k) x[k] = parts[k][0];
    for (int i = 1; i < warps; ++i) {
      double other[n];
      for (int k = 0; k < n; ++k) other[k] = parts[k][i];
      join_two(x, other);
    }
  }

  Exchange& memory_;
  int turn_ = 0;
};

}  // namespace FL_ISA
}  // namespace fl
