// fl_cuda_gradient and fl_cuda_gradient_of_exponentials: one kernel each way, with and without sums over the rows.
//
// What psi needs of a row is worked out once per row by a kernel of its own. Then a block of threads takes one window of
// columns of several rows: a thread writes where it read, so the tile may be its own output. Sums over rows stay with
// the thread that owns the columns, for as many rows as a float may add up; a last kernel joins these in order.
//
// A gradient narrower than the tile it replaces lies at lower addresses than the scores it is made of. Then one block
// of threads walks the whole row from left to right, with a barrier between reading a window and storing it: what is
// stored falls on scores of this window and of those to its left only, all of them read.
#include "device_across.h"

namespace fl {
namespace FL_ISA {
namespace {

constexpr int rows_with_sums = 32, rows_without = 4;   // to a block of threads

using Entries = Part<1>;

struct Pass {
  fl_tile tile;
  void* out;                  // null: only sums are wanted
  int64_t out_stride;
  int32_t out_dtype;
  fl_statistic statistics[2 * FL_CUDA_STATISTICS];   // `count` of rows, then `columns` of columns
  int32_t count, columns, plain, in_rows;        // in_rows: a block of threads walks whole rows
  int32_t kept, rows_each;              // kept: the log-sum-exp whose exponentials the tile holds, or -1
  int64_t windows, groups;              // of columns, and of rows
  fl_sums sums;
  Derivative* derivative;               // rows x count
  Across across;
  uint32_t* active;                     // rows: bit k is set where statistic k has a coefficient other than 0
  float* factor;                        // shifts x rows: what exponentials are multiplied by
  float *bias, *class_shift, *class_scale, *largest;   // groups x columns, null where not wanted
  double* scale;                        // groups x windows
};

FL_DEVICE bool is_active(const fl_statistic& k, int64_t row) {
  if (k.kind == FL_COUNT) return false;
  const int count = picks(k) ? k.count : k.kind == FL_MOMENTS ? Moments<float>::coefficients : 1;
  for (int c = 0; c < count; ++c)
    if (k.coefficient[row * count + c] != 0) return true;
  return false;
}

// One thread for a row and, of exponentials, for one of its shifts.
__global__ void __launch_bounds__(most_threads) derivative_kernel(const __grid_constant__ Pass p) {
  const int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= p.tile.rows) return;
  if (p.kept >= 0) {
    const fl_statistic& k = p.statistics[p.kept];
    const double* state = k.state + 2 * row;
    const double s = state[0] + ::log(state[1]);
    const int64_t place = blockIdx.y * p.tile.rows + row;
    p.factor[place] = s == -INFINITY ? 0 : (float)(k.coefficient[row] * ::exp(k.keep_shift[place] - s));
  }
  if (blockIdx.y > 0) return;
  uint32_t active = 0;
  for (int i = 0; i < p.count; ++i) {
    const fl_statistic& k = p.statistics[i];
    if (!is_active(k, row)) continue;
    active |= 1u << i;
    if (picks(k) || p.kept >= 0) continue;
    with_statistic<float>(k, 0, [&](const auto& f) {
      p.derivative[row * p.count + i] = f.derivative(k, k.state + row * f.width, k.coefficient + row * f.coefficients);
    });
  }
  p.active[row] = active;
}

// One thread for a column.
__global__ void __launch_bounds__(most_threads) derivative_across_kernel(const __grid_constant__ Pass p) {
  const int64_t column = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= p.tile.columns) return;
  for (int i = 0; i < p.columns; ++i) {
    const fl_statistic& k = p.statistics[p.count + i];
    Derivative d{};
    if (is_active(k, column))
      with_statistic<float>(k, 0, [&](const auto& f) {
        d = f.derivative(k, k.state + column * f.width, k.coefficient + column * f.coefficients);
      });
    p.across.store(i, column, d);
  }
}

// Adds the coefficients of a statistic that picks columns, where their scores count.
FL_DEVICE void add_picked(const fl_statistic& k, int64_t row, int64_t first_class, const Window& w, const float* z,
                          float* g) {
  for (int c = 0; c < k.count; ++c) {
    const int64_t column = k.kind == FL_SCORE ? k.at[row * k.at_stride + c] : (int64_t)k.state[(2 * row + 1) * k.count + c];
    const int64_t place = column - first_class - w.origin;
    if (column < 0 || place < w.low || place >= w.high || place / vector != threadIdx.x) continue;
    const float coefficient = k.coefficient[row * k.count + c];
#pragma unroll
    for (int i = 0; i < vector; ++i)
      if (place % vector == i && z[i] != -INFINITY) g[i] += coefficient;
  }
}

// g = dL/dz of scores z, through the statistics of rows.
template <bool relations>
FL_DEVICE void slopes(const Pass& p, int64_t row, uint32_t active, const Window& w, const float* z, float* g) {
  for (int i = 0; i < p.count; ++i) {
    const fl_statistic& k = p.statistics[i];
    if (!(active >> i & 1) || picks(k)) continue;
    const uint32_t counts = Entries::counting<relations>(k, row, p.tile.first_column, w, z);
    const Derivative d = p.derivative[row * p.count + i];
    float v[vector];
    Entries::load_operand(k, row, w, v);
    with_statistic<float>(k, k.row ? k.row[row] : 0, [&](const auto& f) {
#pragma unroll
      for (int e = 0; e < vector; ++e) {
        const float psi = f.psi(z[e], v[e], d);
        if (counts >> e & 1) g[e] += psi;
      }
    });
  }
}

// g = dL/dz from exponentials e.
FL_DEVICE void slopes_of_exponentials(const Pass& p, int64_t row, const Window& w, const float* e, float* g) {
  const int64_t block = p.statistics[p.kept].keep_block, first = w.origin + Entries::at(0);
  const float* factor = p.factor + row;
  const int64_t from = first < 0 ? 0 : first / block;
  float now = from * block < p.tile.columns ? factor[from * p.tile.rows] : 0;
  int64_t next = (from + 1) * block;    // where the next shift's columns begin
#pragma unroll
  for (int i = 0; i < vector; ++i) {
    if (first + i == next && next < p.tile.columns) {
      now = factor[next / block * p.tile.rows];
      next += block;
    }
    g[i] = e[i] == 0 ? 0 : e[i] * now;  // 0 stays 0, also times infinity
  }
}

FL_DEVICE void store_sums(float* to, const Pass& p, const Window& w, const float* sums) {
  if (!to) return;
  to += blockIdx.x * p.tile.columns;
  store_vector(reinterpret_cast<char*>(to), FL_F32, w.origin + Entries::at(0), w.low - Entries::at(0),
               w.high - Entries::at(0), sums);
}

// Without labels, thresholds and statistics of columns, which are `more`, it needs fewer registers.
template <bool with_sums, bool of_exponentials, bool more>
__global__ void __launch_bounds__(most_threads, with_sums || more ? 2 : 3) gradient_kernel(const __grid_constant__ Pass p) {
  const fl_tile t = with_scale(p.tile);
  const int64_t first_row = (int64_t)blockIdx.x * p.rows_each;
  const int64_t end_row = first_row + p.rows_each < t.rows ? first_row + p.rows_each : t.rows;
  const int64_t first_window = p.in_rows ? 0 : blockIdx.y, end_window = p.in_rows ? p.windows : first_window + 1;
  float bias[vector] = {}, class_shift[vector] = {}, class_scale[vector] = {}, largest[vector] = {};
  double scale = 0;
  Window w{};
  for (int64_t number = first_window; number < end_window; ++number)
    for (int64_t row = first_row; row < end_row; ++row) {
      const char* data = row_of(t.data, t.dtype, t.stride, row);
      // A thread that sums over rows keeps to its columns, wherever the rows begin.
      w = window_of(data, t.dtype, t.columns, number, with_sums ? Entries::room() : 0, Entries::room());
      const uint32_t active = p.active[row];
      const bool looks = active || (more && p.columns > 0);
      const int at = Entries::at(0);
      float z[vector], slope[vector], cap[vector], g[vector] = {};
      if (looks) load_vector(data, t.dtype, w.origin + at, w.low - at, w.high - at, of_exponentials ? 0 : -INFINITY, z);
      if (p.in_rows) barrier<Barrier::loaded>();
      if (looks) {
        if (!p.plain) {
#pragma unroll
          for (int i = 0; i < vector; ++i) {
            const int64_t j = w.origin + at + i;
            slope[i] = cap[i] = 0;
            if (at + i < w.low || at + i >= w.high) continue;
            if (of_exponentials) slope[i] = t.class_scale ? t.scale * t.class_scale[j] : t.scale;
            else z[i] = score_of(t, j, z[i], slope[i], cap[i]);
          }
        }
        if (of_exponentials) slopes_of_exponentials(p, row, w, z, g);
        else slopes<more>(p, row, active, w, z, g);
        for (int i = 0; more && i < p.columns; ++i)
          add_across(p.statistics[p.count + i], p.across.of(i), p.across.pitch, row, t.first_row, w.origin + at,
                     w.low - at, w.high - at, z, g);
        for (int i = 0; i < p.count; ++i)
          if ((active >> i & 1) && picks(p.statistics[i]))
            add_picked(p.statistics[i], row, t.first_column, w, z, g);
        if (with_sums) {
          float scaled = 0;
#pragma unroll
          for (int i = 0; i < vector; ++i) {
            class_shift[i] += g[i];
            if (!of_exponentials && !p.plain && (p.class_scale || p.scale) && g[i] != 0) {
              class_scale[i] += g[i] * cap[i] * t.scale;
              scaled += g[i] * cap[i] * (t.class_scale ? t.class_scale[w.origin + at + i] : 1);
            }
          }
          scale += scaled;
        }
        if (!p.plain) {
#pragma unroll
          for (int i = 0; i < vector; ++i) g[i] = g[i] == 0 ? 0 : g[i] * slope[i];   // also where the slope is NaN
        }
        if (with_sums) {
#pragma unroll
          for (int i = 0; i < vector; ++i) {
            const float x = absolute(g[i]);
            bias[i] += g[i];
            if (largest[i] < x || x != x) largest[i] = x;    // NaN enters, and stays
          }
        }
      }
      if (p.out)
        store_vector(const_cast<char*>(row_of(p.out, p.out_dtype, p.out_stride, row)), p.out_dtype, w.origin + at,
                     w.low - at, w.high - at, g);
    }
  if (!with_sums) return;
  store_sums(p.bias, p, w, bias);
  store_sums(p.class_shift, p, w, class_shift);
  store_sums(p.class_scale, p, w, class_scale);
  store_sums(p.largest, p, w, largest);
  if (!p.scale) return;
  Reduction joined;
  joined.sum<1>(&scale);
  if (threadIdx.x == 0) p.scale[blockIdx.x * p.windows + blockIdx.y] = scale;
}

// The sums of all groups of rows, in their order, one thread to a column; the last block of threads has the scale.
__global__ void __launch_bounds__(most_threads) join_kernel(const __grid_constant__ Pass p) {
  if (blockIdx.x == gridDim.x - 1) {
    if (!p.sums.scale) return;
    double sum = 0;
    for (int64_t i = threadIdx.x; i < p.groups * p.windows; i += blockDim.x) sum += p.scale[i];
    Reduction joined;
    joined.sum<1>(&sum);
    if (threadIdx.x == 0) *p.sums.scale += sum;
    return;
  }
  const int64_t j = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (j >= p.tile.columns) return;
  auto add = [&](float* to, const float* parts) {
    if (!to) return;
    double sum = 0;
    for (int64_t group = 0; group < p.groups; ++group) sum += parts[group * p.tile.columns + j];
    to[j] = (float)(to[j] + sum);
  };
  add(p.sums.bias, p.bias);
  add(p.sums.class_shift, p.class_shift);
  add(p.sums.class_scale, p.class_scale);
  if (p.sums.largest) {
    float& most = p.sums.largest[j];
    for (int64_t group = 0; group < p.groups; ++group) {
      const float x = p.largest[group * p.tile.columns + j];
      if (most < x || x != x) most = x;
    }
  }
}

// ---- on the host ---------------------------------------------------------------------------------------------------

constexpr Abilities able = {FL_CUDA_STATISTICS, FL_CUDA_KEPT_COLUMNS, INT64_MAX, FL_LOGSUMEXP_OF, every_where, true};

int check_both(const fl_tile* tile, const fl_statistic* statistics, int32_t count, const fl_statistic* across,
               int32_t across_count) {
  if (int status = fl::check(tile, statistics, count, true, able)) return status;
  return check_columns(tile, across, across_count, true);
}

bool any(const fl_sums& s) { return s.bias || s.class_shift || s.class_scale || s.scale || s.largest; }

Pass pass_of(const fl_tile& tile, const fl_statistic* statistics, int32_t count, const fl_statistic* across,
             int32_t columns, const fl_sums* sums, bool exponentials, int& threads, Workspace& workspace) {
  Pass p{};
  p.tile = tile;
  p.count = count;
  p.columns = columns;
  p.kept = -1;
  p.sums = sums ? *sums : fl_sums{};
  p.plain = is_plain(tile) && !p.sums.class_scale && !p.sums.scale;
  for (int32_t i = 0; i < count; ++i) {
    p.statistics[i] = statistics[i];
    if (exponentials && statistics[i].kind == FL_LOGSUMEXP) p.kept = i;
  }
  for (int32_t i = 0; i < columns; ++i) p.statistics[count + i] = across[i];
  threads = threads_for(tile.columns, Entries::size);
  p.windows = divided_up(tile.columns + 7, (int64_t)threads * Entries::size);
  p.groups = divided_up(tile.rows, rows_with_sums);
  p.active = workspace.take<uint32_t>(tile.rows);
  p.derivative = workspace.take<Derivative>(exponentials ? 0 : tile.rows * count);
  p.across.pitch = divided_up(tile.columns, vector) * vector;
  p.across.derivative = workspace.take<float>(4 * columns * p.across.pitch);
  const int64_t shifts = exponentials ? divided_up(tile.columns, p.statistics[p.kept].keep_block) : 0;
  p.factor = workspace.take<float>(shifts * tile.rows);
  auto sums_for = [&](const float* wanted) { return workspace.take<float>(wanted ? p.groups * tile.columns : 0); };
  p.bias = sums_for(p.sums.bias);
  p.class_shift = sums_for(p.sums.class_shift);
  p.class_scale = sums_for(p.sums.class_scale);
  p.largest = sums_for(p.sums.largest);
  p.scale = workspace.take<double>(p.sums.scale ? p.groups * p.windows : 0);
  return p;
}

template <bool of_exponentials, bool more>
int run(Pass p, int threads, void* stream) {
  const fl_tile& t = p.tile;
  const int64_t shifts = of_exponentials ? divided_up(t.columns, p.statistics[p.kept].keep_block) : 1;
  const int few = most_threads < 64 ? most_threads : 64;
  if (int status = launch("derivatives", derivative_kernel, divided_up(t.rows, few), shifts, few, stream, p)) return status;
  if (p.columns)
    if (int status = launch("derivatives of columns", derivative_across_kernel, divided_up(t.columns, few), 1, few,
                            stream, p))
      return status;
  if (any(p.sums)) {
    Pass with = p;
    with.rows_each = rows_with_sums;
    with.in_rows = 0;
    if (p.in_rows) with.out = nullptr;  // a second look at the scores, for a tile that is to be narrowed in place
    if (int status = launch("gradient with sums", gradient_kernel<true, of_exponentials, more>, p.groups, p.windows,
                            threads, stream, with))
      return status;
    if (int status = launch("sums", join_kernel, divided_up(t.columns, most_threads) + 1, 1, most_threads, stream, p))
      return status;
    if (!p.in_rows) return 0;
  }
  p.rows_each = p.in_rows ? 1 : rows_without;
  return launch("gradient", gradient_kernel<false, of_exponentials, more>, divided_up(t.rows, p.rows_each),
                p.in_rows ? 1 : p.windows, threads, stream, p);
}

}  // namespace
}  // namespace FL_ISA
}  // namespace fl

extern "C" {

using namespace fl::cuda;

int64_t fl_cuda_gradient_workspace(const fl_tile* tile, const fl_statistic* statistics, int32_t count,
                                   const fl_statistic* across, int32_t across_count, const fl_sums* sums) {
  if (check_both(tile, statistics, count, across, across_count) || tile->rows == 0 || tile->columns == 0) return 0;
  int threads;
  Workspace plain(nullptr), exponentials(nullptr);
  pass_of(*tile, statistics, count, across, across_count, sums, false, threads, plain);
  int kept = 0;
  for (int32_t i = 0; i < count; ++i) kept += statistics[i].kind == FL_LOGSUMEXP && statistics[i].keep_block > 0;
  if (kept) pass_of(*tile, statistics, count, nullptr, 0, sums, true, threads, exponentials);
  return plain.used() > exponentials.used() ? plain.used() : exponentials.used();
}

int fl_cuda_gradient(const fl_tile* tile, void* out, int64_t out_stride, int32_t out_dtype,
                     const fl_statistic* statistics, int32_t count, const fl_statistic* across, int32_t across_count,
                     const fl_sums* sums, void* memory, int64_t bytes, void* stream) {
  if (int status = check_both(tile, statistics, count, across, across_count)) return status;
  if (int status = fl::check_out(*tile, out, out_stride, out_dtype)) return status;
  if (tile->rows == 0 || tile->columns == 0) return 0;
  int threads;
  Workspace workspace(memory);
  Pass p = pass_of(*tile, statistics, count, across, across_count, sums, false, threads, workspace);
  if (int status = check_workspace(memory, bytes, workspace.used())) return status;
  p.out = out;
  p.out_stride = out_stride;
  p.out_dtype = out_dtype;
  p.in_rows = out == tile->data && size_of(out_dtype) < size_of(tile->dtype);
  const bool more = across_count > 0 || has_relations(statistics, count);
  return more ? run<false, true>(p, threads, stream) : run<false, false>(p, threads, stream);
}

int fl_cuda_gradient_of_exponentials(const fl_tile* tile, const fl_statistic* statistics, int32_t count,
                                     const fl_sums* sums, void* memory, int64_t bytes, void* stream) {
  if (int status = fl::check(tile, statistics, count, true, able)) return status;
  if (int status = fl::check_exponentials(*tile, statistics, count, sums)) return status;
  if (tile->rows == 0 || tile->columns == 0) return 0;
  int threads;
  Workspace workspace(memory);
  Pass p = pass_of(*tile, statistics, count, nullptr, 0, sums, true, threads, workspace);
  if (int status = check_workspace(memory, bytes, workspace.used())) return status;
  p.out = const_cast<void*>(tile->data);
  p.out_stride = tile->stride;
  p.out_dtype = tile->dtype;
  return run<true, false>(p, threads, stream);
}

}  // extern "C"
