// fl_cuda_statistics: a block of threads reads a row window by window, once, and keeps the window in registers while
// every statistic looks at it. Where a tile has few rows, several blocks share a row: each leaves its states in the
// workspace, and a second kernel merges them in the order of the columns.
#include "device_states.h"

namespace fl {
namespace FL_ISA {
namespace {

struct Pass : States {
  fl_tile tile;
  int32_t softmax;            // the log-sum-exp of the common family below, or -1
  int32_t plain;
  int64_t step;               // of the windows, 0: as many columns as the threads hold
  int64_t windows_each;       // to a split
};

using Scores = Part<2>;       // 16 columns of the window to a thread: that many floats are summed before a double

// ---- states --------------------------------------------------------------------------------------------------------

// No barrier follows: single scores are added by the threads that clear them, and whoever else reads a state has passed
// the barrier of a reduction.
FL_DEVICE void clear_partial(const Pass& p, int64_t row, int split) {
  if (!p.partial) return;
  for (int i = 0; i < p.count; ++i)
    for (int k = threadIdx.x; k < p.width[i]; k += blockDim.x)
      state_of(p, i, row, split)[k] = identity(p.statistics[i], k);
}

// ---- statistics that pick columns ----------------------------------------------------------------------------------

// Single scores are read where they lie, before anything is kept in the tile.
FL_DEVICE void push_scores(const fl_tile& t, const fl_statistic& k, const char* data, int64_t row, int64_t first,
                           int64_t end, double* state) {
  for (int c = threadIdx.x; c < k.count; c += blockDim.x) {
    const int64_t at = k.at[row * k.at_stride + c], place = at - t.first_column;
    if (at < 0 || place < first || place >= end) continue;
    float slope, cap;
    state[c] += score_of(t, place, load_one(data, t.dtype, place), slope, cap);
  }
}

// The window's best are found one by one, which few windows have more than the first one to offer: a score that does
// not come before the last on the list is no candidate. Thread 0 keeps the list.
FL_DEVICE void push_extreme(const fl_statistic& k, const float* z, uint32_t counts, int64_t first_class,
                            Reduction& joined, double* state) {
  const float factor = (float)k.factor;
  barrier<Barrier::list>();             // the list is as the window before left it
  const double last = state[k.count - 1], last_column = state[2 * k.count - 1];
#pragma unroll
  for (int i = 0; i < Scores::size; ++i) {
    const float key = factor * z[i], bound = (float)(factor * last);
    const int64_t column = first_class + Scores::at(i / vector) + i % vector;
    const bool nan = key != key, last_nan = bound != bound;
    const bool before = last_column < 0 || (nan && !last_nan) || key > bound ||
                        ((key == bound || (nan && last_nan)) && column < last_column);
    if (!before) counts &= ~(1u << i);
  }
  for (int n = 0; n < k.count; ++n) {
    float key = 0;
    int place = -1;
#pragma unroll
    for (int i = 0; i < Scores::size; ++i) {
      const int here = Scores::at(i / vector) + i % vector;
      if ((counts >> i & 1) && Reduction::precedes(factor * z[i], here, key, place)) key = factor * z[i], place = here;
    }
    joined.first_of(key, place);
    if (place < 0) return;
#pragma unroll
    for (int i = 0; i < Scores::size; ++i)
      if (place == Scores::at(i / vector) + i % vector) counts &= ~(1u << i);
    if (threadIdx.x == 0) insert_extreme(state, k.count, k.factor, factor * key, (double)(first_class + place));
  }
}

// ---- kernels ---------------------------------------------------------------------------------------------------------

// Any statistics.
__global__ void __launch_bounds__(most_threads, 2) statistics_kernel(const __grid_constant__ Pass p) {
  const fl_tile t = with_scale(p.tile);
  const int64_t row = blockIdx.x;
  const int split = blockIdx.y;
  const char* data = row_of(t.data, t.dtype, t.stride, row);
  clear_partial(p, row, split);
  Reduction joined;
  for (int64_t number = split * p.windows_each; number < (split + 1) * p.windows_each; ++number) {
    const Window w = window_of(data, t.dtype, t.columns, number, p.step, Scores::room());
    if (w.low >= w.high) break;
    float z[Scores::size], v[Scores::size];
    Scores::load_scores(t, p.plain, data, w, z);
    for (int i = 0; i < p.count; ++i) {
      const fl_statistic& k = p.statistics[i];
      double* state = state_of(p, i, row, split);
      if (k.kind == FL_SCORE) {
        push_scores(t, k, data, row, w.origin + w.low, w.origin + w.high, state);
        continue;
      }
      const uint32_t counts = Scores::counting<true>(k, row, t.first_column, w, z);
      if (k.kind == FL_EXTREME) {
        if (k.count > 0) push_extreme(k, z, counts, t.first_column + w.origin, joined, state);
        continue;
      }
      Scores::load_operand(k, row, w, v);
      with_statistic<float>(k, k.row ? k.row[row] : 0,
                            [&](const auto& f) { push<Scores::size>(f, k.factor, z, v, counts, joined, state); });
    }
  }
}

// One log-sum-exp of factor 1, with single scores and counts: all that a softmax loss asks for, and the one case in which
// something is kept. Each thread carries a sum of its own along the row, relative to a pivot common to all; only the
// pivot is joined in every window.
//
// What is kept may lie in the tile's own row, narrower, at lower addresses than the scores it is made of: every thread
// has its part of the window in registers before it comes to the barrier in `largest`, and none stores before that
// barrier. Stores of a window therefore fall on scores of this window and of those to its left only, all of them read.
template <bool plain, bool relations>
__global__ void __launch_bounds__(most_threads, relations ? 2 : 3) softmax_kernel(const __grid_constant__ Pass p) {
  const fl_tile t = with_scale(p.tile);
  const fl_statistic& k = p.statistics[p.softmax];
  const int64_t row = blockIdx.x;
  const int split = blockIdx.y;
  const char* data = row_of(t.data, t.dtype, t.stride, row);
  char* keep = k.keep ? const_cast<char*>(row_of(k.keep, k.keep_dtype, k.keep_stride, row)) : nullptr;
  clear_partial(p, row, split);
  Reduction joined;
  float m = -INFINITY;
  double total = 0;
  for (int64_t number = split * p.windows_each; number < (split + 1) * p.windows_each; ++number) {
    const Window w = window_of(data, t.dtype, t.columns, number, p.step, Scores::room());
    if (w.low >= w.high) break;
    float z[Scores::size];
    Scores::load_scores(t, plain, data, w, z);
    for (int i = 0; i < p.count; ++i) {
      const fl_statistic& other = p.statistics[i];
      double* state = state_of(p, i, row, split);
      if (other.kind == FL_SCORE) push_scores(t, other, data, row, w.origin + w.low, w.origin + w.high, state);
      if (other.kind == FL_COUNT) {
        float v[Scores::size];
        Scores::load_operand(other, row, w, v);
        const uint32_t counts = Scores::counting<relations>(other, row, t.first_column, w, z);
        push<Scores::size>(Count<float>(other, 0), 1, z, v, counts, joined, state);
      }
    }
    const uint32_t counts = Scores::counting<relations>(k, row, t.first_column, w, z);
    float most = -INFINITY;
#pragma unroll
    for (int i = 0; i < Scores::size; ++i) {
      if (!(counts >> i & 1)) z[i] = -INFINITY;
      most = larger(z[i], most);
    }
    most = joined.largest(most);
    double share = 1;                   // of this window's sum, when it is relative to a smaller pivot than the row's
    if (most > m) {
      total *= ::exp((double)m - most);
      m = most;
    } else if (keep && most != m && most != -INFINITY) {
      share = ::exp((double)most - m);
    }
    float pivot = keep ? most : m;
    if (pivot == -INFINITY) pivot = 0;
    float sum = 0;
    Scores::each(w, [&](int u) {
#pragma unroll
      for (int i = 0; i < vector; ++i) {
        float& x = z[u * vector + i];
        x = exp(x - pivot);             // exp(-inf) is 0: what is left out keeps nothing
        sum += x;
      }
      if (keep)
        store_vector(keep, k.keep_dtype, w.origin + Scores::at(u), w.low - Scores::at(u), w.high - Scores::at(u),
                     z + u * vector);
    });
    total += sum * share;
    if (keep && threadIdx.x == 0) k.keep_shift[number * t.rows + row] = pivot;
  }
  joined.sum<1>(&total);
  const double from[2] = {m, total};
  if (threadIdx.x == 0) Exponential<1>::merge(state_of(p, p.softmax, row, split), from);
}

// ---- on the host ---------------------------------------------------------------------------------------------------

// Whether blocks that share a row would store over scores that another has yet to read.
bool keeps_in_tile(const fl_tile& t, const fl_statistic& k) {
  const char *tile = static_cast<const char*>(t.data), *keep = static_cast<const char*>(k.keep);
  const char* tile_end = row_of(tile, t.dtype, t.stride, t.rows - 1) + t.columns * size_of(t.dtype);
  const char* keep_end = row_of(keep, k.keep_dtype, k.keep_stride, t.rows - 1) + t.columns * size_of(k.keep_dtype);
  return k.keep && keep < tile_end && tile < keep_end;
}

int prepare(Pass& p, int& threads, Workspace& workspace) {
  const fl_tile& t = p.tile;
  int softmaxes = 0, others = 0;
  bool together = false;
  p.step = 0;
  for (int32_t i = 0; i < p.count; ++i) {
    const fl_statistic& k = p.statistics[i];
    if (k.kind == FL_LOGSUMEXP && k.factor == 1) ++softmaxes, p.softmax = i;
    else if (k.kind != FL_SCORE && k.kind != FL_COUNT) ++others;
    if (k.keep) p.step = k.keep_block, together = keeps_in_tile(t, k);
  }
  if (softmaxes != 1 || others) {
    p.softmax = -1;
    if (p.step) return fail("exponentials are kept beside FL_SCORE and FL_COUNT only");
  }
  threads = threads_for(p.step && p.step < t.columns ? p.step : t.columns, Scores::size);
  const int64_t room = (int64_t)threads * Scores::size;
  const int64_t windows = p.step ? divided_up(t.columns, p.step) : divided_up(t.columns + 7, room);
  int64_t splits = t.rows >= enough_blocks || together ? 1 : divided_up(enough_blocks, t.rows);
  p.windows_each = divided_up(windows, splits < windows ? splits : windows);
  p.splits = (int32_t)divided_up(windows, p.windows_each);
  p.plain = is_plain(t);
  p.partial = workspace.take<double>(p.splits > 1 ? p.splits * t.rows * p.total_width : 0);
  return 0;
}

constexpr int64_t room_for_kept = (int64_t)most_threads * Scores::size;
constexpr Abilities able = {FL_CUDA_STATISTICS,
                            room_for_kept < FL_CUDA_KEPT_COLUMNS ? room_for_kept : FL_CUDA_KEPT_COLUMNS, INT64_MAX,
                            FL_LOGSUMEXP_OF, every_where, true};

Pass pass_of(const fl_tile& tile, const fl_statistic* statistics, int32_t count) {
  Pass p{};
  p.tile = tile;
  set_states(p, statistics, count, tile.rows);
  return p;
}

}  // namespace
}  // namespace FL_ISA
}  // namespace fl

extern "C" {

using namespace fl::cuda;

int fl_cuda_compiled(void) { return 1; }

int64_t fl_cuda_statistics_workspace(const fl_tile* tile, const fl_statistic* statistics, int32_t count) {
  if (fl::check(tile, statistics, count, false, able) || tile->rows == 0 || tile->columns == 0) return 0;
  Pass p = pass_of(*tile, statistics, count);
  Workspace workspace(nullptr);
  int threads;
  return prepare(p, threads, workspace) ? 0 : workspace.used();
}

int fl_cuda_statistics(const fl_tile* tile, const fl_statistic* statistics, int32_t count, void* memory, int64_t bytes,
                       void* stream) {
  if (int status = fl::check(tile, statistics, count, false, able)) return status;
  if (tile->rows == 0 || tile->columns == 0 || count == 0) return 0;
  Pass p = pass_of(*tile, statistics, count);
  Workspace workspace(memory);
  int threads;
  if (int status = prepare(p, threads, workspace)) return status;
  if (int status = check_workspace(memory, bytes, workspace.used())) return status;
  void (*kernel)(Pass) = p.softmax < 0   ? statistics_kernel
                         : has_relations(p.statistics, count)
                             ? p.plain ? softmax_kernel<true, true> : softmax_kernel<false, true>
                             : p.plain ? softmax_kernel<true, false> : softmax_kernel<false, false>;
  if (int status = launch("statistics", kernel, tile->rows, p.splits, threads, stream, p)) return status;
  return merge_splits(p, stream);
}

}  // extern "C"
