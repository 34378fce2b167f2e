// States of statistics on a device: where they lie, how a thread's scores come into them, how what several blocks of
// threads found is merged. Those of columns are the rows' of the transposed tile; so they are called here.
#pragma once
#include "device_tile.h"

namespace fl {
namespace FL_ISA {
namespace {

constexpr int widest_sum = 3;   // doubles of state that a statistic has, if it is a sum

struct States {
  fl_statistic statistics[FL_CUDA_STATISTICS];
  int32_t width[FL_CUDA_STATISTICS], offset[FL_CUDA_STATISTICS];   // of a statistic in a row of `partial`
  int32_t count, total_width, splits;
  int64_t rows;
  double* partial;            // splits x rows x total_width; null: states are merged at once
};

void set_states(States& s, const fl_statistic* statistics, int32_t count, int64_t rows) {
  s.count = count;
  s.rows = rows;
  s.total_width = 0;
  for (int32_t i = 0; i < count; ++i) {
    s.statistics[i] = statistics[i];
    s.offset[i] = s.total_width;
    s.total_width += s.width[i] = width_of<float>(statistics[i]);
  }
}

// Blocks of threads that keep any device busy. A number of its own: the result's bits depend on it.
constexpr int64_t enough_blocks = 512;

FL_DEVICE double* state_of(const States& s, int i, int64_t row, int split) {
  if (!s.partial) return s.statistics[i].state + row * s.width[i];
  return s.partial + (split * s.rows + row) * s.total_width + s.offset[i];
}

// The identity of the state's k-th number.
FL_DEVICE double identity(const fl_statistic& s, int k) {
  if (s.kind == FL_LOGSUMEXP || s.kind == FL_LOGSUMEXP_OF || s.kind == FL_EXPECTATION) return k == 0 ? -INFINITY : 0;
  if (s.kind == FL_EXTREME) return k < s.count ? -s.factor * INFINITY : -1;
  return 0;
}

// Sums merge by their kind alone; of all functions that a kind has one copy of this is enough.
FL_DEVICE void merge(const fl_statistic& s, double* into, const double* from) {
  switch (s.kind) {
    case FL_LOGSUMEXP: return Exponential<1>::merge(into, from);
    case FL_EXPECTATION: case FL_LOGSUMEXP_OF: return Exponential<2>::merge(into, from);
    case FL_MOMENTS: return Moments<float>::merge(into, from);
    case FL_SUM_OF: return Added<2>::merge(into, from);
    default: return Added<1>::merge(into, from);
  }
}

// A thread that has a row to itself, where others join theirs by a Reduction.
struct Alone {
  template <int n>
  FL_DEVICE void sum(double*) {}
  FL_DEVICE float largest(float x) { return x; }
  FL_DEVICE bool leads() const { return true; }
};

// All threads come by the pivot; the one that leads merges into the state. Between its writes and the others' reads in
// the next window lies the barrier of the pivot's reduction, between those reads and its next writes that of the sums'.
template <int size, class F, class Joined>
FL_DEVICE void push(const F& f, double factor, const float* z, const float* v, uint32_t counts, Joined& joined,
                    double* state) {
  double pivot = 0;
  if (F::pivot == Pivot::mean) {
    double sums[2] = {0, 0};
    float sum = 0;
#pragma unroll
    for (int i = 0; i < size; ++i)
      if (counts >> i & 1) sum += z[i];
    sums[0] = sum;
    sums[1] = __popc(counts);
    joined.template sum<2>(sums);
    pivot = sums[1] > 0 ? (float)(sums[0] / sums[1]) : 0;
  }
  if (F::pivot == Pivot::maximum) {
    const float sign = factor < 0 ? -1.0f : 1.0f;
    float most = -INFINITY;
#pragma unroll
    for (int i = 0; i < size; ++i)
      if (counts >> i & 1) most = larger(sign * z[i], most);
    most = joined.largest(most);
    pivot = most == -INFINITY ? most : (float)(factor * sign * most);
  }
  if constexpr (F::pivot == Pivot::exponent) {
    float most = -INFINITY, slope;
#pragma unroll
    for (int i = 0; i < size; ++i)
      if (counts >> i & 1) most = larger(f.exponent(z[i], slope), most);
    pivot = joined.largest(most);
  }
  if (F::pivot == Pivot::maximum || F::pivot == Pivot::exponent) {
    if (!(pivot >= state[0])) pivot = (float)state[0];
  }
  const float p = pivot == -INFINITY ? 0 : (float)pivot;
  float sum[F::sums] = {};
#pragma unroll
  for (int i = 0; i < size; ++i) {
    float term[F::sums];
    f.phi(z[i], v[i], p, term);
#pragma unroll
    for (int k = 0; k < F::sums; ++k) sum[k] += counts >> i & 1 ? term[k] : 0;
  }
  double total[F::sums], from[F::width];
  for (int k = 0; k < F::sums; ++k) total[k] = sum[k];
  joined.template sum<F::sums>(total);
  if (!joined.leads()) return;
  F::state(pivot, total, from);
  F::merge(state, from);
}

// A thread merges what a row's splits found, in their order.
__global__ void __launch_bounds__(most_threads) merge_kernel(const __grid_constant__ States s) {
  const int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= s.rows) return;
  const fl_statistic& k = s.statistics[blockIdx.y];
  double* into = k.state + row * s.width[blockIdx.y];
  for (int split = 0; split < s.splits; ++split) {
    const double* from = state_of(s, (int)blockIdx.y, row, split);
    if (k.kind == FL_SCORE)
      for (int c = 0; c < k.count; ++c) into[c] += from[c];
    else if (k.kind == FL_EXTREME)
      for (int c = 0; c < k.count && from[k.count + c] >= 0; ++c)
        insert_extreme(into, k.count, k.factor, from[c], from[k.count + c]);
    else
      merge(k, into, from);
  }
}

int merge_splits(const States& s, void* stream) {
  if (s.splits == 1) return 0;
  const int few = most_threads < 64 ? most_threads : 64;
  return launch("merge of statistics", merge_kernel, divided_up(s.rows, few), s.count, few, stream, s);
}

}  // namespace
}  // namespace FL_ISA
}  // namespace fl
