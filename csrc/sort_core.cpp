// Short rows are sorted by counting, for every item, the items before it; longer ones by radix, the lowest digit first.
#include "sort_core.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "fusedloss.h"
#include "sort_keys.h"

namespace fl {
namespace {

using portable::Radix;

template <class T>
const SortLoops<T>& pick(const SortLoops<float>& single, const SortLoops<double>& twice) {
  if constexpr (sizeof(T) == sizeof(float)) return (void)twice, single;
  else return (void)single, twice;
}

template <class T>
const SortLoops<T>& loops() {
#if defined(FL_X86)
  const int isa = std::strcmp(fl_isa(), "avx512") == 0 ? 2 : std::strcmp(fl_isa(), "avx2") == 0;
  if (isa == 2) return pick<T>(avx512::sort_float, avx512::sort_double);
  if (isa == 1) return pick<T>(avx2::sort_float, avx2::sort_double);
#endif
  return pick<T>(portable::sort_float, portable::sort_double);
}

constexpr int64_t kMany = 4096, kForThreads = int64_t(1) << 16;

template <class Work>
void each_piece(int64_t m, int pieces, const Work& work) {
  if (pieces == 1) return work(0, 0, m);
#pragma omp parallel for num_threads(pieces) schedule(static, 1)
  for (int p = 0; p < pieces; ++p) work(p, m * p / pieces, m * (p + 1) / pieces);
}

template <class T, int bits>
struct Passes {
  using R = Radix<T>;
  using Pair = typename R::Pair;
  static constexpr int count = (8 * sizeof(typename R::Key) + bits - 1) / bits, size = 1 << bits;
  template <int pass>
  static uint32_t digit(const Pair& pair) { return (uint32_t)(R::key(pair) >> (pass * bits)) & (size - 1); }

  Pair *pairs, *other;          // the pairs as they are, and room for as many
  int64_t m;
  int pieces;
  uint32_t* counts;             // [piece][pass][digit]
  uint32_t* counts_of(int piece, int pass) const { return counts + ((size_t)piece * count + pass) * size; }

  template <int... pass>
  void run(std::integer_sequence<int, pass...>) {
    if (pieces == 1)
      for (int64_t i = 0; i < m; ++i) (++counts[pass * size + digit<pass>(pairs[i])], ...);
    (one<pass>(), ...);
  }

  template <int pass>
  void one() {
    const Pair* const from = pairs;
    if (pieces > 1)
      each_piece(m, pieces, [=](int piece, int64_t first, int64_t end) {
        uint32_t* const own = counts_of(piece, pass);
        for (int64_t i = first; i < end; ++i) ++own[digit<pass>(from[i])];
      });
    uint32_t before = 0, alike = 0;
    for (int piece = 0; piece < pieces; ++piece) alike += counts_of(piece, pass)[digit<pass>(from[0])];
    if (alike == m) return;     // every item has this digit
    for (int d = 0; d < size; ++d)
      for (int piece = 0; piece < pieces; ++piece) before += std::exchange(counts_of(piece, pass)[d], before);
    each_piece(m, pieces, [=, to = other](int piece, int64_t first, int64_t end) {
      uint32_t* const next = counts_of(piece, pass);
      for (int64_t i = first; i < end; ++i) to[next[digit<pass>(from[i])]++] = from[i];
    });
    std::swap(pairs, other);
  }
};

// Returns where the sorted pairs are: in `pairs` or in `other`.
template <class T, int bits>
void* sort_pairs(typename Radix<T>::Pair* pairs, typename Radix<T>::Pair* other, int64_t m, int pieces,
                 Buffer& counts) {
  using All = Passes<T, bits>;
  const int64_t all_counts = (int64_t)pieces * All::count * All::size;
  uint32_t* const zeros = counts.room<uint32_t>(all_counts);
  std::fill(zeros, zeros + all_counts, 0);
  All all = {pairs, other, m, pieces, zeros};
  all.run(std::make_integer_sequence<int, All::count>());
  return all.pairs;
}

// What counts of a masked row, as a row of its own.
template <class T>
int64_t sort_masked(const T* values, const uint8_t* mask, int64_t n, bool rising, int threads, int32_t* order,
                    double* sorted, SortScratch& scratch) {
  int32_t* const positions = scratch.positions.room<int32_t>(n);
  T* const some = scratch.values.room<T>(n);
  int64_t m = 0;
  for (int64_t i = 0; i < n; ++i) positions[m] = (int32_t)i, some[m] = values[i], m += mask[i] != 0;
  sort_row(some, nullptr, m, rising, threads, order, sorted, scratch);
  for (int64_t k = 0; k < m; ++k) order[k] = positions[order[k]];
  for (int64_t i = 0, k = m; i < n; ++i)
    if (!mask[i]) order[k++] = (int32_t)i;
  return m;
}

}  // namespace

template <class T>
int64_t sort_row(const T* values, const uint8_t* mask, int64_t n, bool rising, int threads, int32_t* order,
                 double* sorted, SortScratch& scratch) {
  using Pair = typename Radix<T>::Pair;
  if (mask) return sort_masked(values, mask, n, rising, threads, order, sorted, scratch);
  if (n <= kFew) return loops<T>().sort_few(values, rising, (int32_t)n, order, sorted), n;
  Pair* const pairs = scratch.pairs.room<Pair>(2 * n);
  const int pieces = n >= kForThreads ? threads : 1;
  each_piece(n, pieces, [=](int, int64_t first, int64_t end) {
    loops<T>().pairs_of(values, rising, first, end, pairs);
  });
  const void* const done = n < kMany ? sort_pairs<T, 8>(pairs, pairs + n, n, pieces, scratch.counts)
                                     : sort_pairs<T, 11>(pairs, pairs + n, n, pieces, scratch.counts);
  each_piece(n, pieces, [=](int, int64_t first, int64_t end) { loops<T>().of_pairs(done, first, end, order, sorted); });
  return n;
}

template int64_t sort_row(const float*, const uint8_t*, int64_t, bool, int, int32_t*, double*, SortScratch&);
template int64_t sort_row(const double*, const uint8_t*, int64_t, bool, int, int32_t*, double*, SortScratch&);

}  // namespace fl
