// fl_cuda_column_statistics: a thread walks down a column, its neighbours down the columns beside it, so that a warp
// reads whole lines of the tile. Sixteen scores at a time are in registers while every statistic looks at them; nothing is
// exchanged between threads. Where a tile has few columns, several blocks of threads share them: each takes a range of
// rows and leaves its states in the workspace, and a second kernel merges them in the order of the rows.
#include "device_states.h"

namespace fl {
namespace FL_ISA {
namespace {

constexpr int batch = 16;       // rows: that many floats are summed before a double
constexpr int64_t fewest_rows = 64;   // to a block of threads: with fewer, states are much of what is moved

struct Pass : States {
  fl_tile tile;
  int32_t plain;
  int64_t rows_each;            // to a split
};

// Scores of a column in `batch` rows from `row` on, -inf beyond `end`. All are on their way before the first is needed.
FL_DEVICE void load_scores(const fl_tile& t, bool plain, int64_t column, int64_t row, int64_t end, float* z) {
  const char* from = row_of(t.data, t.dtype, t.stride, row) + column * size_of(t.dtype);
  const int64_t pitch = t.stride * size_of(t.dtype);
  if (t.dtype == FL_F32) {
#pragma unroll
    for (int i = 0; i < batch; ++i)
      z[i] = row + i < end ? *reinterpret_cast<const float*>(from + i * pitch) : -INFINITY;
  } else {
    uint16_t half[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i)
      half[i] = row + i < end ? *reinterpret_cast<const uint16_t*>(from + i * pitch) : (uint16_t)0;
#pragma unroll
    for (int i = 0; i < batch; ++i) z[i] = row + i < end ? widen_half(half[i], t.dtype) : -INFINITY;
  }
  if (plain) return;
#pragma unroll
  for (int i = 0; i < batch; ++i) {
    float slope, cap;
    z[i] = score_of(t, column, z[i], slope, cap);
  }
}

FL_DEVICE void load_operand(const fl_statistic& k, int64_t row, int64_t end, float* v) {
#pragma unroll
  for (int i = 0; i < batch; ++i)
    v[i] = !k.operand ? 1 : row + i < end ? load_one(k.operand, k.operand_dtype, row + i) : 0;
}

// Bit i is set where score i counts.
FL_DEVICE uint32_t counting(const fl_statistic& k, int64_t column, int64_t row, int64_t first_row, const float* z) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < batch; ++i) bits |= (uint32_t)(z[i] != -INFINITY) << i;
  if (k.where & ~FL_REST)
    bits = related<batch>(k, z, bits, [&](int) { return column; }, [&](int i) { return row + i; });
  if (!(k.where & FL_REST)) return bits;
  const int64_t place = k.rest[column] - first_row - row;   // negative too where nothing is left out
  return place >= 0 && place < batch ? bits & ~(1u << place) : bits;
}

__global__ void __launch_bounds__(most_threads, 2) column_kernel(const __grid_constant__ Pass p) {
  const fl_tile t = with_scale(p.tile);
  const int64_t column = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, first = blockIdx.y * p.rows_each;
  const int64_t end = first + p.rows_each < t.rows ? first + p.rows_each : t.rows;
  if (column >= t.columns) return;
  double states[FL_CUDA_STATISTICS * widest_sum];
  for (int i = 0; i < p.count; ++i)
    for (int k = 0; k < p.width[i]; ++k) states[p.offset[i] + k] = identity(p.statistics[i], k);
  Alone alone;
  for (int64_t row = first; row < end; row += batch) {
    float z[batch], v[batch];
    load_scores(t, p.plain, column, row, end, z);
    for (int i = 0; i < p.count; ++i) {
      const fl_statistic& k = p.statistics[i];
      const uint32_t counts = counting(k, column, row, t.first_row, z);
      load_operand(k, row, end, v);
      with_statistic<float>(k, k.row ? k.row[column] : 0, [&](const auto& f) {
        push<batch>(f, k.factor, z, v, counts, alone, states + p.offset[i]);
      });
    }
  }
  for (int i = 0; i < p.count; ++i) {
    double* into = state_of(p, i, column, blockIdx.y);
    const double* from = states + p.offset[i];
    if (p.partial)
      for (int k = 0; k < p.width[i]; ++k) into[k] = from[k];
    else
      merge(p.statistics[i], into, from);
  }
}

// ---- on the host ---------------------------------------------------------------------------------------------------

Pass prepare(const fl_tile& t, const fl_statistic* statistics, int32_t count, int& threads, Workspace& workspace) {
  Pass p{};
  p.tile = t;
  p.plain = is_plain(t);
  set_states(p, statistics, count, t.columns);
  for (threads = warp; threads < most_threads && threads < t.columns;) threads *= 2;
  const int64_t splits = divided_up(enough_blocks, divided_up(t.columns, threads)), each = divided_up(t.rows, splits);
  p.rows_each = divided_up(each > fewest_rows ? each : fewest_rows, batch) * batch;
  p.splits = (int32_t)divided_up(t.rows, p.rows_each);
  p.partial = workspace.take<double>(p.splits > 1 ? p.splits * t.columns * p.total_width : 0);
  return p;
}

}  // namespace
}  // namespace FL_ISA
}  // namespace fl

extern "C" {

using namespace fl::cuda;

int64_t fl_cuda_column_statistics_workspace(const fl_tile* tile, const fl_statistic* statistics, int32_t count) {
  if (check_columns(tile, statistics, count, false) || tile->rows == 0 || tile->columns == 0) return 0;
  Workspace workspace(nullptr);
  int threads;
  prepare(*tile, statistics, count, threads, workspace);
  return workspace.used();
}

int fl_cuda_column_statistics(const fl_tile* tile, const fl_statistic* statistics, int32_t count, void* memory,
                              int64_t bytes, void* stream) {
  if (int status = check_columns(tile, statistics, count, false)) return status;
  if (tile->rows == 0 || tile->columns == 0 || count == 0) return 0;
  Workspace workspace(memory);
  int threads;
  const Pass p = prepare(*tile, statistics, count, threads, workspace);
  if (int status = check_workspace(memory, bytes, workspace.used())) return status;
  const int64_t strips = divided_up(tile->columns, threads);
  if (int status = launch("column statistics", column_kernel, strips, p.splits, threads, stream, p)) return status;
  return merge_splits(p, stream);
}

}  // extern "C"
