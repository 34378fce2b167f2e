// Soft sort and soft rank of rows that do not fit in a block's shared memory. A radix sort of the device, then blocks of
// threads on chunks of rows: each pools its own, a kernel per level merges neighbours, a warp to a merge, and a last one
// writes what permutahedron.cu's does. Sums are scanned in the chunks, then over their totals, then carried back. Rows of
// any lengths lie one after the other, and which a block of threads has, it finds among their offsets. Shorter ones that
// permutahedron.cu has seen to are passed by.
#if defined(FL_CUDA_ON_HOST)
#include <algorithm>
#include <numeric>
#include <vector>
#else
#include <cub/device/device_radix_sort.cuh>
#endif

#include "device_permutahedron.h"

#if !defined(FL_SORTED_CHUNK)
#define FL_SORTED_CHUNK 4096
#endif

namespace fl {
namespace FL_ISA {
namespace {

constexpr int chunk = FL_SORTED_CHUNK;            // items of a block of threads; whole words of marks
static_assert(chunk % 32 == 0, "cells and words of marks belong to one chunk");

template <class V, bool kl>
struct Long {
  using Main = typename Rule<V, kl>::S;
  Problem q;
  int64_t items;                                  // of all rows, or more
  int32_t passed_by;                              // rows up to this length
  uint64_t *keys, *sorted_keys;
  int32_t *indices, *sorted_indices;
  V *values, *summands;
  typename Main::Cell* cells;
  Suffix *its_cells, *totals, *behind;            // of the summands; a row's chunks, and what is behind each
  uint32_t* words;
  Counts* counts;
  double* parts;
  int32_t size;                                   // of the segments to merge
  bool of_summands;                               // scanned: or of values

  FL_DEVICE int64_t first(int64_t r) const { return q.p.lists.offsets ? q.p.lists.offsets[r] : r * q.p.lists.width; }
  // Rows of n items have n / unit + 1 places of this many: of all, those of row r are from place(r, unit) on.
  FL_DEVICE int64_t place(int64_t r, int64_t unit) const { return first(r) / unit + 2 * r; }
  // The last row whose places begin no later; with no unit, whose items do.
  FL_DEVICE int row_at(int64_t which, int64_t unit) const {
    int64_t low = 0, high = q.p.lists.rows;
    while (high - low > 1) {
      const int64_t half = (low + high) / 2;
      if ((unit ? place(half, unit) : first(half)) <= which) low = half;
      else high = half;
    }
    return (int)low;
  }
  static int64_t places(int64_t rows, int64_t items, int64_t unit) { return items / unit + 2 * rows + 1; }

  FL_DEVICE Row row(int r) const {
    Row found = row_of(q, r);
    settle(found, counts[r]);
    return found;
  }
  FL_DEVICE Marks marks(int r, const Row& row) const { return {words + row.first / 16 + 8 * (int64_t)r, row.n}; }
  FL_DEVICE V* values_of(const Row& row) const { return values + row.first; }
  FL_DEVICE Sums<V> sums(int r, const Row& row) const {
    return {summands + row.first, its_cells + place(r, Sums<V>::stride), row.extent.begin, row.extent.end};
  }
  FL_DEVICE Main main(int r, const Row& row) const {
    Main s;
    s.values = values_of(row), s.cells = cells + place(r, Main::stride);
    s.begin = row.extent.begin, s.end = row.extent.end;
    if constexpr (kl) s.scale = q.sort ? 1 : row.strength;
    return s;
  }
  FL_DEVICE Rule<V, kl> rule(int r, const Row& row) const { return {main(r, row), row.extent, row.strength, q.sort != 0}; }
};

// The part of a row's extent in the chunk from `low` on, counted from there.
FL_DEVICE Extent clipped(const Extent& e, int low) {
  auto clip = [&](int k) { return k < low ? 0 : k - low < chunk ? k - low : chunk; };
  return {clip(e.begin), clip(e.end), e.counted - low};
}

template <class S>
FL_DEVICE S in_chunk(S s, int low) {
  const Extent part = clipped({s.begin, s.end, 0}, low);
  s.values += low, s.cells += low / S::stride, s.begin = part.begin, s.end = part.end;
  return s;
}

// ---- kernels: most have a block of threads per chunk -------------------------------------------------------------------

#define FL_SORTED_KERNEL(name) \
  template <class V, bool kl>  \
  __global__ void __launch_bounds__(most_sorting, 1) name(const __grid_constant__ Long<V, kl> l)
// Which row and which of its chunks a block of threads has; none, if it is one too many.
#define FL_HERE                                                           \
  const int r = l.row_at(blockIdx.x, chunk);                              \
  const int64_t from = (blockIdx.x - l.place(r, chunk)) * chunk;          \
  const Row row = l.row(r);                                               \
  if (row.n <= l.passed_by || from > row.n) return;                       \
  [[maybe_unused]] const int low = (int)from, high = from + chunk < row.n ? low + chunk : row.n

FL_SORTED_KERNEL(clear_kernel) {
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < l.items || i < l.q.p.lists.rows;
       i += (int64_t)gridDim.x * blockDim.x) {
    if (i < l.q.p.lists.rows) l.counts[i] = {};
    if (l.keys && i < l.items) l.keys[i] = ~(uint64_t)0, l.indices[i] = -1;   // for what no row has
  }
}

// Every row's, for all are sorted. Items of fp64 go by their place among all; sorted again, by row, they are back there.
FL_SORTED_KERNEL(gather_kernel) {
  const int r = l.row_at(blockIdx.x, chunk);
  const int64_t low = (blockIdx.x - l.place(r, chunk)) * chunk;
  const Row row = row_of(l.q, r);
  const int sign = l.q.sign();
  Counts mine = {};
  for (int64_t i = low + threadIdx.x; i < low + chunk && i < row.n; i += blockDim.x) {
    Key<V> key = last_key<V>();
    if (l.q.counts(row.first + i)) {
      const V v = sign * load<V>(l.q.x, l.q.p.dtype, row.first + i);
      count(mine, v);
      key = key_of(v);
    } else {
      ++mine.left_out;
    }
    l.keys[row.first + i] = sizeof(V) == 8 ? (uint64_t)key : (uint64_t)r << 32 | key;
    l.indices[row.first + i] = sizeof(V) == 8 ? (int32_t)(row.first + i) : (int32_t)i;
  }
  add_to(l.counts + r, mine);
}

// Of fp64: the rows of what has been sorted, for a second sort.
FL_SORTED_KERNEL(rows_kernel) {
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < l.items; i += (int64_t)gridDim.x * blockDim.x) {
    const int64_t item = l.sorted_indices[i];
    l.keys[i] = item < 0 ? (uint64_t)l.q.p.lists.rows : (uint64_t)l.row_at(item, 0);
    l.indices[i] = (int32_t)item;
  }
}

// Values back from the keys, their chunk's sums, and its blocks.
FL_SORTED_KERNEL(leaf_kernel) {
  using S = typename Long<V, kl>::Main;
  FL_HERE;
  char* const memory = dynamic_shared();
  V* const values = reinterpret_cast<V*>(memory);
  for (int k = low + threadIdx.x; k < high; k += blockDim.x) {
    const int64_t at = row.first + k;
    const int32_t found = l.sorted_indices[at];
    V v = 0;
    if constexpr (sizeof(V) < 8) v = value_of<V>((Key<V>)l.sorted_keys[at]);
    else if (k < row.extent.counted) v = value_of<V>(key_of((V)(l.q.sign() * load<V>(l.q.x, l.q.p.dtype, found))));
    values[k - low] = l.values[at] = v;
    l.q.order[at] = sizeof(V) < 8 ? found : (int32_t)(found - row.first);
  }
  barrier<Barrier::sorted>();
  const S whole = l.main(r, row);
  S part = in_chunk(whole, low);
  typename S::Cell* const to = part.cells;
  part.values = values, part.cells = reinterpret_cast<typename S::Cell*>(memory + chunk * sizeof(V));
  const Suffix total = block_suffixes(part);
  if (threadIdx.x == 0) l.totals[blockIdx.x] = total;
  const Rule<V, kl> rule{part, clipped(row.extent, low), row.strength, l.q.sort != 0};
  const Pooling<V, kl> pooling{rule, {reinterpret_cast<uint32_t*>(part.cells + chunk / S::stride + 1), chunk}};
  pooling.pool();
  for (int i = threadIdx.x; i * S::stride < part.end; i += blockDim.x) to[i] = part.cells[i];
  for (int i = threadIdx.x; i < chunk / 32 && low / 32 + i <= row.n / 32; i += blockDim.x)
    l.marks(r, row).words[low / 32 + i] = pooling.marks.words[i];
}

// What a chunk's sums lack, of the chunks behind it. One block of threads per row.
FL_SORTED_KERNEL(carry_kernel) {
  const int r = blockIdx.x;
  const Row row = l.row(r);
  if (row.n <= l.passed_by) return;
  const int chunks = row.n / chunk + 1;
  const Suffix* totals = l.totals + l.place(r, chunk);
  Suffix* behind = l.behind + l.place(r, chunk);
  if (kl && !l.of_summands) block_suffixes(Totals<typename Long<V, kl>::Main>{totals, behind, 0, chunks, l.main(r, row)});
  else block_suffixes(Totals<Sums<V>>{totals, behind, 0, chunks, l.sums(r, row)});
  l.marks(r, row).build_levels();
}

template <class S>
FL_DEVICE void spread(const S& s, Suffix behind) {
  for (int c = threadIdx.x; c * S::stride < s.end; c += blockDim.x)
    s.cells[c] = s.pack(s.join(s.unpack(s.cells[c], c * S::stride), behind));
}
FL_SORTED_KERNEL(spread_kernel) {
  FL_HERE;
  if (from + chunk > row.n) return;                 // the last
  const Suffix behind = l.behind[blockIdx.x + 1];
  if (l.of_summands) spread(in_chunk(l.sums(r, row), low), behind);
  else spread(in_chunk(l.main(r, row), low), behind);
}

FL_SORTED_KERNEL(scan_kernel) {
  FL_HERE;
  const Suffix total = l.of_summands ? block_suffixes(in_chunk(l.sums(r, row), low))
                                     : block_suffixes(in_chunk(l.main(r, row), low));
  if (threadIdx.x == 0) l.totals[blockIdx.x] = total;
}

// Segments of `size` positions and the ones behind them. A warp to each.
FL_SORTED_KERNEL(merge_kernel) {
  const int64_t which = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / warp, both = 2 * (int64_t)l.size;
  const int r = l.row_at(which, both);
  const Row row = l.row(r);
  if (row.n <= l.passed_by) return;
  const int64_t first = (which - l.place(r, both)) * both, middle = first + l.size, last = first + both;
  const int low = first > row.extent.begin ? (int)first : row.extent.begin;
  const int high = last < row.extent.end ? (int)last : row.extent.end;
  if (middle >= high || low >= middle) return;
  Pooling<V, kl>{l.rule(r, row), l.marks(r, row)}.merge_by_warp(low, (int)middle, high);
}

FL_SORTED_KERNEL(answer_kernel) {
  FL_HERE;
  const Pooling<V, kl> pooling{l.rule(r, row), l.marks(r, row)};
  for (int k = low + threadIdx.x; k < high; k += blockDim.x) answer_at(l.q, pooling, row, k);
}

// ---- backward ----------------------------------------------------------------------------------------------------------

FL_SORTED_KERNEL(gather_sorted_kernel) {
  FL_HERE;
  const int32_t* const order = l.q.order + row.first;
  Counts mine = {};
  for (int k = low + threadIdx.x; k < high; k += blockDim.x)
    read_sorted(l.q, row, k, l.values[row.first + k], l.summands[row.first + k], mine);
  for (int i = low / 32 + threadIdx.x; i < low / 32 + chunk / 32 && i <= row.n / 32; i += blockDim.x) {
    uint32_t word = 0;
    for (int k = i * 32; k < i * 32 + 32 && k <= row.n; ++k) word |= (uint32_t)(k == row.n || order[k] < 0) << (k & 31);
    l.marks(r, row).words[i] = word;
  }
  add_to(l.counts + r, mine);
}

FL_SORTED_KERNEL(summand_kernel) {
  FL_HERE;
  const Rule<V, kl> rule = l.rule(r, row);
  V* const summands = l.summands + row.first;
  for (int k = low + threadIdx.x; k < high && k < row.extent.counted; k += blockDim.x)
    summands[k] = (V)summand(rule, l.marks(r, row), k, summands[k]);
}

FL_SORTED_KERNEL(derivative_kernel) {
  FL_HERE;
  const Rule<V, kl> rule = l.rule(r, row);
  double part = 0;
  for (int k = low + threadIdx.x; k < high; k += blockDim.x)
    part += derivative_at(l.q, rule, l.marks(r, row), l.sums(r, row), row, k);
  part = block_sum(part);
  if (threadIdx.x == 0) l.parts[blockIdx.x] = part;
}

FL_SORTED_KERNEL(total_kernel) {
  const int r = blockIdx.x;
  const Row row = l.row(r);
  if (row.n <= l.passed_by) return;
  double sum = 0;
  for (int c = threadIdx.x; c <= row.n / chunk; c += blockDim.x) sum += l.parts[l.place(r, chunk) + c];
  sum = block_sum(sum);
  if (threadIdx.x == 0) l.q.dstrength[r] = sum;
}

// ---- on the host -------------------------------------------------------------------------------------------------------

// Stable, by the lowest bits. With null memory, how much is needed.
int sort_pairs(void* memory, size_t& bytes, const uint64_t* keys, uint64_t* sorted, const int32_t* indices, int32_t* into,
               int64_t items, int bits, void* stream) {
#if defined(FL_CUDA_ON_HOST)
  (void)bits, (void)stream;
  if (!memory) return bytes = 64, 0;
  std::vector<int64_t> order((size_t)items);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[a] < keys[b]; });
  for (int64_t k = 0; k < items; ++k) sorted[k] = keys[order[k]], into[k] = indices[order[k]];
  return 0;
#else
  const cudaError_t status =
      cub::DeviceRadixSort::SortPairs(memory, bytes, keys, sorted, indices, into, items, 0, bits, (cudaStream_t)stream);
  if (status == cudaSuccess) return 0;
  cudaGetLastError();
  return fail("soft sort: %s", cudaGetErrorString(status));
#endif
}

template <class V, bool kl>
struct Run {
  using Main = typename Long<V, kl>::Main;
  Long<V, kl> l{};
  void* temporary = nullptr;
  size_t temporary_bytes = 0;
  int64_t rows, width, used;

  Run(const Problem& q, bool backward, void* memory) : rows(q.p.lists.rows), width(q.p.lists.width) {
    Workspace workspace(memory);
    const int64_t items = q.items(), chunks = Long<V, kl>::places(rows, items, chunk);
    l.q = q, l.items = items, l.passed_by = q.p.lists.offsets ? q.most : 0;
    l.values = workspace.take<V>(items);
    l.cells = workspace.take<typename Main::Cell>(kl || !backward ? Long<V, kl>::places(rows, items, Main::stride) : 0);
    l.words = workspace.take<uint32_t>(items / 16 + 8 * (rows + 1));   // words_of_marks(n) <= n / 16 + 7
    l.counts = workspace.take<Counts>(rows);
    l.totals = workspace.take<Suffix>(chunks);
    l.behind = workspace.take<Suffix>(chunks);
    if (backward) {
      l.summands = workspace.take<V>(items);
      l.its_cells = workspace.take<Suffix>(Long<V, kl>::places(rows, items, Sums<V>::stride));
      l.parts = workspace.take<double>(chunks);
    } else {
      l.keys = workspace.take<uint64_t>(items), l.sorted_keys = workspace.take<uint64_t>(items);
      l.indices = workspace.take<int32_t>(items), l.sorted_indices = workspace.take<int32_t>(items);
      if (sorted(64, nullptr)) temporary_bytes = 0;   // no device: nothing will run
      temporary = workspace.take<char>((int64_t)temporary_bytes);
    }
    used = workspace.used();
  }

  int sorted(int bits, void* stream) {
    return sort_pairs(temporary, temporary_bytes, l.keys, l.sorted_keys, l.indices, l.sorted_indices, l.items, bits, stream);
  }
  int bits_of_rows() const {
    int bits = 0;
    while (rows >> bits) ++bits;
    return bits;
  }
  int start(void (*kernel)(Long<V, kl>), int64_t blocks, void* stream, int64_t shared = 0, int threads = 256) const {
    return launch("soft sort of long rows", kernel, blocks, 1, threads, stream, l, shared);
  }
  int on_chunks(void (*kernel)(Long<V, kl>), void* stream, int64_t shared = 0, int threads = 256) const {
    return start(kernel, Long<V, kl>::places(rows, l.items, chunk), stream, shared, threads);
  }
  int on_items(void (*kernel)(Long<V, kl>), void* stream) const {
    const int64_t blocks = divided_up(l.items > rows ? l.items : rows, 256);
    return start(kernel, blocks < 4096 ? blocks : 4096, stream);
  }
  int carry(void* stream) const {
    int status = start(carry_kernel<V, kl>, rows, stream);
    return status ? status : on_chunks(spread_kernel<V, kl>, stream);
  }
  int scan(bool of_summands, void* stream) {
    l.of_summands = of_summands;
    int status = on_chunks(scan_kernel<V, kl>, stream);
    return status ? status : carry(stream);
  }

  int forward(void* stream) {
    if (sizeof(V) == 8 && l.items > INT32_MAX) return fail("%lld items of fp64 in long rows", (long long)l.items);
    if (int status = on_chunks(gather_kernel<V, kl>, stream)) return status;
    if (int status = sorted(sizeof(V) == 8 ? 64 : 32 + bits_of_rows(), stream)) return status;
    if (sizeof(V) == 8) {
      if (int status = on_items(rows_kernel<V, kl>, stream)) return status;
      if (int status = sorted(bits_of_rows(), stream)) return status;
    }
    const int64_t shared = chunk * sizeof(V) + (chunk / Main::stride + 1) * sizeof(typename Main::Cell) + words_of_marks(chunk) * 4;
    if (int status = on_chunks(leaf_kernel<V, kl>, stream, shared, most_sorting)) return status;
    if (int status = carry(stream)) return status;
    for (int64_t size = chunk; size < width; size *= 2) {
      l.size = (int32_t)size;
      const int64_t merges = Long<V, kl>::places(rows, l.items, 2 * size);
      if (int status = start(merge_kernel<V, kl>, divided_up(merges, 4), stream, 0, 4 * warp)) return status;
    }
    return on_chunks(answer_kernel<V, kl>, stream);
  }

  int backwards(void* stream) {
    if (int status = on_chunks(gather_sorted_kernel<V, kl>, stream)) return status;
    if (kl) {
      if (int status = scan(false, stream)) return status;
      if (int status = on_chunks(summand_kernel<V, kl>, stream)) return status;
    }
    if (int status = scan(true, stream)) return status;
    if (int status = on_chunks(derivative_kernel<V, kl>, stream)) return status;
    return l.q.dstrength ? start(total_kernel<V, kl>, rows, stream) : 0;
  }

  int all(bool backward, void* stream) {
    if (int status = on_items(clear_kernel<V, kl>, stream)) return status;
    return backward ? backwards(stream) : forward(stream);
  }
};

}  // namespace

int64_t long_workspace(const Problem& q, bool backward) {
  return with_kernel(q, [&](auto v, auto kl) { return Run<decltype(v), kl.value>(q, backward, nullptr).used; });
}

int run_long(const Problem& q, bool backward, void* memory, void* stream) {
  return with_kernel(q, [&](auto v, auto kl) { return Run<decltype(v), kl.value>(q, backward, memory).all(backward, stream); });
}

}  // namespace FL_ISA
}  // namespace fl
