// Soft sort and soft rank of rows that do not fit in a block's shared memory. A radix sort of the device, then blocks of
// threads on chunks of rows: each pools its own, a kernel per level merges neighbours, a warp to a merge, and a last one
// writes what permutahedron.cu's does. Sums are scanned in the chunks, then over their totals, then carried back.
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
#if !defined(FL_SORTED_AT_ONCE)
#define FL_SORTED_AT_ONCE (1 << 24)
#endif

namespace fl {
namespace FL_ISA {
namespace {

constexpr int chunk = FL_SORTED_CHUNK;            // items of a block of threads; whole words of marks
constexpr int64_t at_once = FL_SORTED_AT_ONCE;    // items, or one row: what the workspace is for
static_assert(chunk % 32 == 0, "cells and words of marks belong to one chunk");

template <class V, bool kl>
struct Long {
  using Main = typename Rule<V, kl>::S;
  Problem q;
  int64_t first_row;
  int32_t rows, pitch, chunks;                    // of this time; items and chunks of a row here
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

  FL_DEVICE int64_t words_per_row() const { return words_of_marks(pitch); }
  FL_DEVICE Row row(int r) const {
    Row found = row_of(q, first_row + r);
    settle(found, counts[r]);
    return found;
  }
  FL_DEVICE Marks marks(int r) const { return {words + r * words_per_row(), pitch}; }
  FL_DEVICE V* values_of(int r) const { return values + (int64_t)r * pitch; }
  FL_DEVICE Sums<V> sums(int r, const Row& row) const {
    return {summands + (int64_t)r * pitch, its_cells + (int64_t)r * (pitch / Sums<V>::stride + 1), row.extent.begin,
            row.extent.end};
  }
  FL_DEVICE Main main(int r, const Row& row) const {
    Main s;
    s.values = values_of(r), s.cells = cells + (int64_t)r * (pitch / Main::stride + 1);
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

// Sums of whole chunks, as if they were items.
template <class S>
struct Totals {
  static constexpr int stride = 1;
  using Cell = Suffix;
  const Suffix* totals;
  Suffix* cells;
  int begin, end;
  S s;
  FL_DEVICE Suffix none() const { return s.none(); }
  FL_DEVICE Suffix item(int k) const { return totals[k]; }
  FL_DEVICE Suffix join(Suffix a, Suffix b) const { return s.join(a, b); }
  FL_DEVICE Cell pack(Suffix a) const { return a; }
  FL_DEVICE Suffix unpack(Cell a, int) const { return a; }
};

// ---- kernels: all but `clear`, `carry` and `merge` have a block of threads per chunk -----------------------------------

#define FL_SORTED_KERNEL(name) \
  template <class V, bool kl>  \
  __global__ void __launch_bounds__(most_sorting, 1) name(const __grid_constant__ Long<V, kl> l)
#define FL_HERE                                                                \
  const int r = blockIdx.x / l.chunks, low = (int)blockIdx.x % l.chunks * chunk; \
  [[maybe_unused]] const int high = low + chunk

FL_SORTED_KERNEL(clear_kernel) {
  for (int r = threadIdx.x; r < l.rows; r += blockDim.x) l.counts[r] = {};
}

FL_SORTED_KERNEL(gather_kernel) {
  FL_HERE;
  const Row row = row_of(l.q, l.first_row + r);
  const int sign = l.q.sign();
  Counts mine = {};
  for (int i = low + threadIdx.x; i < high && i < l.pitch; i += blockDim.x) {
    Key<V> key = last_key<V>();                      // behind the row's end too: stable, so behind what is left out
    if (i < row.n && l.q.counts(row.first + i)) {
      const V v = sign * load<V>(l.q.x, l.q.p.dtype, row.first + i);
      count(mine, v);
      key = key_of(v);
    } else if (i < row.n) {
      ++mine.left_out;
    }
    const int64_t at = (int64_t)r * l.pitch + i;
    l.keys[at] = sizeof(V) == 8 ? (uint64_t)key : (uint64_t)r << 32 | key;
    l.indices[at] = i;
  }
  add_to(l.counts + r, mine);
}

// Values back from the keys, their chunk's sums, and its blocks.
FL_SORTED_KERNEL(leaf_kernel) {
  using S = typename Long<V, kl>::Main;
  FL_HERE;
  const Row row = l.row(r);
  char* const memory = dynamic_shared();
  V* const values = reinterpret_cast<V*>(memory);
  for (int k = low + threadIdx.x; k < high && k < row.n; k += blockDim.x) {
    const int64_t at = (int64_t)r * l.pitch + k;
    const V v = value_of<V>((Key<V>)l.sorted_keys[at]);
    values[k - low] = l.values[at] = v;
    l.q.order[row.first + k] = l.sorted_indices[at];
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
  for (int i = threadIdx.x; i < chunk / 32 && low / 32 + i <= l.pitch / 32; i += blockDim.x)
    l.marks(r).words[low / 32 + i] = pooling.marks.words[i];
}

// What a chunk's sums lack, of the chunks behind it. One block of threads per row.
FL_SORTED_KERNEL(carry_kernel) {
  const int r = blockIdx.x;
  const Row row = l.row(r);
  const Suffix* totals = l.totals + (int64_t)r * l.chunks;
  Suffix* behind = l.behind + (int64_t)r * l.chunks;
  if (kl && !l.of_summands) block_suffixes(Totals<typename Long<V, kl>::Main>{totals, behind, 0, l.chunks, l.main(r, row)});
  else block_suffixes(Totals<Sums<V>>{totals, behind, 0, l.chunks, l.sums(r, row)});
  l.marks(r).build_levels();
}

template <class S>
FL_DEVICE void spread(const S& s, Suffix behind) {
  for (int c = threadIdx.x; c * S::stride < s.end; c += blockDim.x)
    s.cells[c] = s.pack(s.join(s.unpack(s.cells[c], c * S::stride), behind));
}
FL_SORTED_KERNEL(spread_kernel) {
  FL_HERE;
  if (low / chunk + 1 == l.chunks) return;
  const Row row = l.row(r);
  const Suffix behind = l.behind[blockIdx.x + 1];
  if (l.of_summands) spread(in_chunk(l.sums(r, row), low), behind);
  else spread(in_chunk(l.main(r, row), low), behind);
}

FL_SORTED_KERNEL(scan_kernel) {
  FL_HERE;
  const Row row = l.row(r);
  const Suffix total = l.of_summands ? block_suffixes(in_chunk(l.sums(r, row), low)) : block_suffixes(in_chunk(l.main(r, row), low));
  if (threadIdx.x == 0) l.totals[blockIdx.x] = total;
}

// Segments of `size` positions and the ones behind them. A warp to each.
FL_SORTED_KERNEL(merge_kernel) {
  const int64_t merges = l.pitch / (2 * (int64_t)l.size) + 1, which = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / warp;
  if (which >= merges * l.rows) return;
  const int r = (int)(which / merges);
  const Row row = l.row(r);
  const int64_t first = which % merges * 2 * l.size, middle = first + l.size, last = middle + l.size;
  const int low = first > row.extent.begin ? (int)first : row.extent.begin;
  const int high = last < row.extent.end ? (int)last : row.extent.end;
  if (low >= middle || middle >= high) return;
  Pooling<V, kl>{l.rule(r, row), l.marks(r)}.merge_by_warp(low, (int)middle, high);
}

FL_SORTED_KERNEL(answer_kernel) {
  FL_HERE;
  const Row row = l.row(r);
  const Pooling<V, kl> pooling{l.rule(r, row), l.marks(r)};
  for (int k = low + threadIdx.x; k < high && k < row.n; k += blockDim.x) answer_at(l.q, pooling, row, k);
}

// ---- backward ----------------------------------------------------------------------------------------------------------

FL_SORTED_KERNEL(gather_sorted_kernel) {
  FL_HERE;
  const Row row = row_of(l.q, l.first_row + r);
  const int32_t* const order = l.q.order + row.first;
  Counts mine = {};
  for (int k = low + threadIdx.x; k < high && k < row.n; k += blockDim.x)
    read_sorted(l.q, row, k, l.values_of(r)[k], l.summands[(int64_t)r * l.pitch + k], mine);
  for (int i = low / 32 + threadIdx.x; i < high / 32 && i <= l.pitch / 32; i += blockDim.x) {
    uint32_t word = 0;
    for (int k = i * 32; k < i * 32 + 32 && k <= row.n; ++k) word |= (uint32_t)(k == row.n || order[k] < 0) << (k & 31);
    l.marks(r).words[i] = word;
  }
  add_to(l.counts + r, mine);
}

FL_SORTED_KERNEL(summand_kernel) {
  FL_HERE;
  const Row row = l.row(r);
  const Rule<V, kl> rule = l.rule(r, row);
  V* const summands = l.summands + (int64_t)r * l.pitch;
  for (int k = low + threadIdx.x; k < high && k < row.extent.counted; k += blockDim.x)
    summands[k] = (V)summand(rule, l.marks(r), k, summands[k]);
}

FL_SORTED_KERNEL(derivative_kernel) {
  FL_HERE;
  const Row row = l.row(r);
  const Rule<V, kl> rule = l.rule(r, row);
  double part = 0;
  for (int k = low + threadIdx.x; k < high && k < row.n; k += blockDim.x)
    part += derivative_at(l.q, rule, l.marks(r), l.sums(r, row), row, k);
  part = block_sum(part);
  if (threadIdx.x == 0) l.parts[blockIdx.x] = part;
}

FL_SORTED_KERNEL(total_kernel) {
  double sum = 0;
  for (int c = threadIdx.x; c < l.chunks; c += blockDim.x) sum += l.parts[(int64_t)blockIdx.x * l.chunks + c];
  sum = block_sum(sum);
  if (threadIdx.x == 0) l.q.dstrength[l.first_row + blockIdx.x] = sum;
}

// ---- on the host -------------------------------------------------------------------------------------------------------

// Items of whole rows: in one sort where the row's number fits above the key, else row by row. Null memory: its bytes.
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
  Long<V, kl> l{};
  bool backward;
  void* temporary;
  size_t temporary_bytes = 0;
  int bits;                    // of a key
  int64_t items;               // sorted at once
  int64_t used;

  Run(const Problem& q, bool backward, void* memory) : backward(backward) {
    using Main = typename Long<V, kl>::Main;
    const int64_t width = q.p.lists.width, most = at_once / width > 1 ? at_once / width : 1;
    const int64_t rows = q.p.lists.rows < most ? q.p.lists.rows : most;
    Workspace workspace(memory);
    l.q = q, l.pitch = (int32_t)width, l.chunks = (int32_t)(width / chunk + 1), l.rows = (int32_t)rows;
    l.values = workspace.take<V>(rows * width);
    l.cells = workspace.take<typename Main::Cell>(kl || !backward ? rows * (width / Main::stride + 1) : 0);
    l.words = workspace.take<uint32_t>(rows * words_of_marks(width));
    l.counts = workspace.take<Counts>(rows);
    l.totals = workspace.take<Suffix>(rows * l.chunks);
    l.behind = workspace.take<Suffix>(rows * l.chunks);
    if (backward) {
      l.summands = workspace.take<V>(rows * width);
      l.its_cells = workspace.take<Suffix>(rows * (width / Sums<V>::stride + 1));
      l.parts = workspace.take<double>(rows * l.chunks);
    } else {
      bits = 8 * (int)sizeof(V);
      items = width * (sizeof(V) == 8 ? 1 : rows);
      for (int64_t r = rows - 1; r > 0 && sizeof(V) < 8; r /= 2) ++bits;
      l.keys = workspace.take<uint64_t>(rows * width), l.sorted_keys = workspace.take<uint64_t>(rows * width);
      l.indices = workspace.take<int32_t>(rows * width), l.sorted_indices = workspace.take<int32_t>(rows * width);
      if (sort_pairs(nullptr, temporary_bytes, l.keys, l.sorted_keys, l.indices, l.sorted_indices, items, bits, nullptr))
        temporary_bytes = 0;   // no device: nothing will run
      temporary = workspace.take<char>((int64_t)temporary_bytes);
    }
    used = workspace.used();
  }

  int start(void (*kernel)(Long<V, kl>), int64_t blocks, void* stream, int64_t shared = 0, int threads = 256) const {
    return launch("soft sort of long rows", kernel, blocks, 1, threads, stream, l, shared);
  }
  int scan(bool of_summands, void* stream) {
    l.of_summands = of_summands;
    int status = start(scan_kernel<V, kl>, blocks(), stream);
    return status ? status : carry(stream);
  }
  int carry(void* stream) const {
    int status = start(carry_kernel<V, kl>, l.rows, stream);
    return status ? status : start(spread_kernel<V, kl>, blocks(), stream);
  }
  int64_t blocks() const { return (int64_t)l.rows * l.chunks; }

  int forward(void* stream) {
    using Main = typename Long<V, kl>::Main;
    if (int status = start(gather_kernel<V, kl>, blocks(), stream)) return status;
    for (int64_t first = 0; first < (int64_t)l.rows * l.pitch; first += items) {
      const int64_t most = (int64_t)l.rows * l.pitch - first;
      if (int status = sort_pairs(temporary, temporary_bytes, l.keys + first, l.sorted_keys + first, l.indices + first,
                                  l.sorted_indices + first, items < most ? items : most, bits, stream))
        return status;
    }
    const int64_t shared = chunk * sizeof(V) + (chunk / Main::stride + 1) * sizeof(typename Main::Cell) + words_of_marks(chunk) * 4;
    if (int status = start(leaf_kernel<V, kl>, blocks(), stream, shared, most_sorting)) return status;
    if (int status = carry(stream)) return status;
    for (int64_t size = chunk; size < l.pitch; size *= 2) {
      l.size = (int32_t)size;
      const int64_t warps = (l.pitch / (2 * size) + 1) * l.rows;
      if (int status = start(merge_kernel<V, kl>, divided_up(warps, 4), stream, 0, 4 * warp)) return status;
    }
    return start(answer_kernel<V, kl>, blocks(), stream);
  }

  int backwards(void* stream) {
    if (int status = start(gather_sorted_kernel<V, kl>, blocks(), stream)) return status;
    if (kl) {
      if (int status = scan(false, stream)) return status;
      if (int status = start(summand_kernel<V, kl>, blocks(), stream)) return status;
    }
    if (int status = scan(true, stream)) return status;
    if (int status = start(derivative_kernel<V, kl>, blocks(), stream)) return status;
    return l.q.dstrength ? start(total_kernel<V, kl>, l.rows, stream) : 0;
  }

  int all(void* stream) {
    const int64_t rows = l.q.p.lists.rows, most = l.rows;
    for (; l.first_row < rows; l.first_row += most) {
      l.rows = (int32_t)(rows - l.first_row < most ? rows - l.first_row : most);
      if (int status = start(clear_kernel<V, kl>, 1, stream)) return status;
      if (int status = backward ? backwards(stream) : forward(stream)) return status;
    }
    return 0;
  }
};

}  // namespace

int64_t long_workspace(const Problem& q, bool backward) {
  return with_kernel(q, [&](auto v, auto kl) { return Run<decltype(v), kl.value>(q, backward, nullptr).used; });
}

int run_long(const Problem& q, bool backward, void* memory, void* stream) {
  return with_kernel(q, [&](auto v, auto kl) { return Run<decltype(v), kl.value>(q, backward, memory).all(stream); });
}

}  // namespace FL_ISA
}  // namespace fl
