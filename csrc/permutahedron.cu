// fl_cuda_soft_rank and fl_cuda_soft_sort: a block of threads per row, the row in its shared memory from the sort to the
// answers; one kernel forward, one backward. Rows that do not fit are permutahedron_long.cu's.
#include "device_permutahedron.h"

namespace fl {
namespace FL_ISA {
namespace {

// ---- shared memory of a row ------------------------------------------------------------------------------------------

FL_FUNCTION int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }
template <class S> FL_FUNCTION int64_t bytes_of_cells(int64_t n) { return aligned((n / S::stride + 1) * sizeof(typename S::Cell)); }
FL_FUNCTION int64_t bytes_of_marks(int64_t n) { return aligned(words_of_marks(n) * 4); }

// Values, where keys were before; cells and marks, where the sort's indices were.
template <class V, bool kl>
FL_FUNCTION int64_t forward_bytes(int64_t n) {
  const int64_t after = bytes_of_cells<typename Rule<V, kl>::S>(n) + bytes_of_marks(n), before = aligned(n * 4);
  return aligned(n * sizeof(V)) + (after > before ? after : before);
}
// Values, summands, the cells of both, marks.
template <class V, bool kl>
FL_FUNCTION int64_t backward_bytes(int64_t n) {
  return 2 * aligned(n * sizeof(V)) + bytes_of_cells<LogSums<V>>(kl ? n : 0) + bytes_of_cells<Sums<V>>(n) + bytes_of_marks(n);
}

struct RowCounts { Counts of; };

template <class V, bool kl>
FL_DEVICE Rule<V, kl> rule_of(const Problem& q, const Row& row, const V* values, char* cells) {
  using S = typename Rule<V, kl>::S;
  S sums;
  sums.values = values, sums.cells = reinterpret_cast<typename S::Cell*>(cells);
  sums.begin = row.extent.begin, sums.end = row.extent.end;
  if constexpr (kl) sums.scale = q.sort ? 1 : row.strength;
  return {sums, row.extent, row.strength, q.sort != 0};
}

// ---- kernels ---------------------------------------------------------------------------------------------------------

template <class V, bool kl>
__global__ void __launch_bounds__(most_sorting, 1) forward_kernel(const __grid_constant__ Problem q) {
  using S = typename Rule<V, kl>::S;
  Row row = row_of(q, blockIdx.x);
  const int n = row.n, sign = q.sign();
  if (n == 0 || n > q.most) return;
  char* const memory = dynamic_shared();
  char* const behind = memory + aligned(n * (int64_t)sizeof(V));
  Key<V>* const keys = reinterpret_cast<Key<V>*>(memory);
  int32_t* const indices = reinterpret_cast<int32_t*>(behind);
  Counts& counts = shared<RowCounts>().of;
  if (threadIdx.x == 0) counts = {};
  barrier<Barrier::reduction>();
  Counts mine = {};
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    Key<V> key = last_key<V>();
    if (q.counts(row.first + i)) {
      const V v = sign * load<V>(q.x, q.p.dtype, row.first + i);
      count(mine, v);
      key = key_of(v);
    } else {
      ++mine.left_out;
    }
    keys[i] = key, indices[i] = i;
  }
  add_to(&counts, mine);
  barrier<Barrier::reduction>();
  settle(row, counts);
  block_sort(keys, indices, n);
  int32_t* const order = q.order + row.first;
  V* const values = reinterpret_cast<V*>(memory);
  for (int k = threadIdx.x; k < n; k += blockDim.x) {
    order[k] = indices[k];
    const V v = value_of<V>(keys[k]);
    memcpy(values + k, &v, sizeof v);
  }
  barrier<Barrier::sorted>();
  const Pooling<V, kl> pooling{rule_of<V, kl>(q, row, values, behind),
                               {reinterpret_cast<uint32_t*>(behind + bytes_of_cells<S>(n)), n}};
  block_suffixes(pooling.rule.sums);
  pooling.pool();
  for (int k = threadIdx.x; k < n; k += blockDim.x) answer_at(q, pooling, row, k);
}

template <class V, bool kl>
__global__ void __launch_bounds__(most_sorting, 1) backward_kernel(const __grid_constant__ Problem q) {
  Row row = row_of(q, blockIdx.x);
  const int n = row.n;
  if (n == 0) {
    if (q.dstrength && threadIdx.x == 0) q.dstrength[blockIdx.x] = 0;
    return;
  }
  if (n > q.most) return;
  char* const memory = dynamic_shared();
  V* const values = reinterpret_cast<V*>(memory);
  V* const summands = reinterpret_cast<V*>(memory + aligned(n * (int64_t)sizeof(V)));
  char* const cells = memory + 2 * aligned(n * (int64_t)sizeof(V));
  char* const its_cells = cells + bytes_of_cells<LogSums<V>>(kl ? n : 0);
  const Marks marks{reinterpret_cast<uint32_t*>(its_cells + bytes_of_cells<Sums<V>>(n)), n};
  const int32_t* const order = q.order + row.first;
  Counts& counts = shared<RowCounts>().of;
  if (threadIdx.x == 0) counts = {};
  for (int i = threadIdx.x; i <= n / 32; i += blockDim.x) marks.words[i] = 0;
  barrier<Barrier::reduction>();
  Counts mine = {};
  for (int k = threadIdx.x; k < n; k += blockDim.x) {
    read_sorted(q, row, k, values[k], summands[k], mine);
    if (order[k] < 0) atomicOr(marks.words + (k >> 5), 1u << (k & 31));
  }
  if (threadIdx.x == 0) atomicOr(marks.words + (n >> 5), 1u << (n & 31));
  add_to(&counts, mine);
  barrier<Barrier::reduction>();
  settle(row, counts);
  marks.build_levels();
  const Rule<V, kl> rule = rule_of<V, kl>(q, row, values, cells);
  const Sums<V> sums{summands, reinterpret_cast<Suffix*>(its_cells), row.extent.begin, row.extent.end};
  if constexpr (kl) {
    block_suffixes(rule.sums);
    for (int k = threadIdx.x; k < n; k += blockDim.x) summands[k] = (V)summand(rule, marks, k, summands[k]);
    barrier<Barrier::reduction>();
  }
  block_suffixes(sums);
  double dstrength = 0;
  for (int k = threadIdx.x; k < n; k += blockDim.x) dstrength += derivative_at(q, rule, marks, sums, row, k);
  if (!q.dstrength) return;
  dstrength = block_sum(dstrength);
  if (threadIdx.x == 0) q.dstrength[blockIdx.x] = dstrength;
}

// ---- on the host -----------------------------------------------------------------------------------------------------

int64_t bytes_for(const Problem& q, bool backward, int64_t n) {
  return with_kernel(q, [&](auto v, auto kl) {
    using V = decltype(v);
    return backward ? backward_bytes<V, kl.value>(n) : forward_bytes<V, kl.value>(n);
  });
}

// The longest row that a block of threads can take, and is asked to.
int32_t most_items(const Problem& q, bool backward) {
  const int64_t room = most_dynamic_shared() - 2048;           // less what is there by name
  int64_t low = 0, high = q.p.lists.width;
  while (low < high) {
    const int64_t half = (low + high + 1) / 2;
    if (bytes_for(q, backward, half) <= room) low = half;
    else high = half - 1;
  }
  return (int32_t)low;
}

int check_problem(const Problem& q, bool backward) {
  const fl_permutahedron& p = q.p;
  if (p.lists.rows < 0 || p.lists.width < 0 || p.lists.width >= INT32_MAX)
    return fail("%lld rows of up to %lld items", (long long)p.lists.rows, (long long)p.lists.width);
  if (!is_dtype(p.dtype) && p.dtype != FL_F64) return fail("dtype %d is unknown", p.dtype);
  if (!p.strengths && !(p.strength >= 0)) return fail("strength is %g, expected 0 or more", p.strength);
  if (p.lists.rows == 0 || p.lists.width == 0) return 0;
  if (!q.x || !q.order || !q.out || (backward && !q.dx)) return fail("an array of items is null");
  return 0;
}

int64_t workspace_for(const fl_permutahedron* p, bool sort, bool backward) {
  Problem q{*p, sort, nullptr, nullptr, nullptr, nullptr, nullptr, 0};
  if (p->lists.rows <= 0 || p->lists.width <= 0) return 0;
  q.most = most_items(q, backward);
  return q.most < p->lists.width ? long_workspace(q, backward) : 0;
}

// Rows of one length go one way. Of ragged rows nobody here knows more than `width`: where that is too long, each way
// takes those that are its.
int run(Problem q, bool backward, void* memory, int64_t bytes, void* stream) {
  if (int status = check_problem(q, backward)) return status;
  const int64_t rows = q.p.lists.rows;
  if (rows == 0) return 0;
  q.most = most_items(q, backward);
  if (q.most < q.p.lists.width) {
    if (int status = check_workspace(memory, bytes, long_workspace(q, backward))) return status;
    if (int status = run_long(q, backward, memory, stream)) return status;
    if (!q.p.lists.offsets) return 0;
  }
  const int64_t width = q.most;
  int threads = warp;
  while (threads < most_sorting && threads * 8 < width) threads *= 2;
  return with_kernel(q, [&](auto v, auto kl) {
    using V = decltype(v);
    return backward ? launch("soft sort, backward", backward_kernel<V, kl.value>, rows, 1, threads, stream, q,
                             bytes_for(q, true, width))
                    : launch("soft sort", forward_kernel<V, kl.value>, rows, 1, threads, stream, q,
                             bytes_for(q, false, width));
  });
}

}  // namespace
}  // namespace FL_ISA
}  // namespace fl

extern "C" {

using namespace fl::cuda;

int64_t fl_cuda_soft_rank_workspace(const fl_permutahedron* p) { return workspace_for(p, false, false); }
int64_t fl_cuda_soft_rank_backward_workspace(const fl_permutahedron* p) { return workspace_for(p, false, true); }
int64_t fl_cuda_soft_sort_workspace(const fl_permutahedron* p) { return workspace_for(p, true, false); }
int64_t fl_cuda_soft_sort_backward_workspace(const fl_permutahedron* p) { return workspace_for(p, true, true); }

int fl_cuda_soft_rank(const fl_permutahedron* p, const void* x, void* ranks, int32_t* order, void* workspace,
                      int64_t bytes, void* stream) {
  return run({*p, 0, x, ranks, order, nullptr, nullptr, 0}, false, workspace, bytes, stream);
}
int fl_cuda_soft_rank_backward(const fl_permutahedron* p, const void* x, const int32_t* order, const void* dranks,
                               void* dx, double* dstrength, void* workspace, int64_t bytes, void* stream) {
  return run({*p, 0, x, const_cast<void*>(dranks), const_cast<int32_t*>(order), dx, dstrength, 0}, true, workspace, bytes,
             stream);
}
int fl_cuda_soft_sort(const fl_permutahedron* p, const void* x, void* sorted, int32_t* order, void* workspace,
                      int64_t bytes, void* stream) {
  return run({*p, 1, x, sorted, order, nullptr, nullptr, 0}, false, workspace, bytes, stream);
}
int fl_cuda_soft_sort_backward(const fl_permutahedron* p, const void* x, const int32_t* order, const void* dsorted,
                               void* dx, double* dstrength, void* workspace, int64_t bytes, void* stream) {
  return run({*p, 1, x, const_cast<void*>(dsorted), const_cast<int32_t*>(order), dx, dstrength, 0}, true, workspace, bytes,
             stream);
}

}  // extern "C"
