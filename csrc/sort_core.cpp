// Short rows are sorted by counting, for every item, the items before it; longer ones by radix, the lowest digit first.
#include "sort_core.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "fusedloss.h"

namespace fl {
namespace {

// Bits that rise as the value falls, 0 for NaN. A key and the position of its item make a pair.
template <class T> struct Radix;

template <>
struct Radix<float> {
  using Key = uint32_t;
  using Pair = uint64_t;
  static constexpr Key sign = 0x80000000u;
  static Pair pair(Key key, int64_t i) { return (Pair)key << 32 | (Pair)i; }
  static Key key(Pair p) { return (Key)(p >> 32); }
  static int32_t position(Pair p) { return (int32_t)p; }
};

template <>
struct Radix<double> {
  using Key = uint64_t;
  struct Pair {
    uint64_t key;
    int64_t position;
  };
  static constexpr Key sign = 0x8000000000000000u;
  static Pair pair(Key key, int64_t i) { return {key, i}; }
  static Key key(const Pair& p) { return p.key; }
  static int32_t position(const Pair& p) { return (int32_t)p.position; }
};

template <class T>
typename Radix<T>::Key key_of(T x, bool rising) {
  using Key = typename Radix<T>::Key;
  const T falling = (rising ? -x : x) + T(0);   // -0 becomes 0
  Key bits;
  std::memcpy(&bits, &falling, sizeof bits);
  bits = bits & Radix<T>::sign ? bits : bits ^ (Radix<T>::sign - 1);
  return x == x ? bits : 0;
}

template <class T>
double value_of(typename Radix<T>::Key key) {
  T value;
  key = key & Radix<T>::sign ? key : key ^ (Radix<T>::sign - 1);
  std::memcpy(&value, &key, sizeof value);
  return value;
}

template <class T>
auto loops() {
  using Key = std::make_signed_t<typename Radix<T>::Key>;
  const auto pick = [](const SortLoops<int32_t>& single, const SortLoops<int64_t>& twice) -> const SortLoops<Key>& {
    if constexpr (sizeof(T) == sizeof(float)) return (void)twice, single;
    else return (void)single, twice;
  };
#if defined(FL_X86)
  static const int isa = std::strcmp(fl_isa(), "avx512") == 0 ? 2 : std::strcmp(fl_isa(), "avx2") == 0;
  if (isa == 2) return pick(avx512::sort_float, avx512::sort_double);
  if (isa == 1) return pick(avx2::sort_float, avx2::sort_double);
#endif
  return pick(portable::sort_float, portable::sort_double);
}

constexpr int64_t kFew = 192, kMany = 4096, kForThreads = int64_t(1) << 16;
static_assert(kFew % kSortPadding == 0);

// position: null where item i is at position i.
template <class T>
void sort_few(const T* values, const int32_t* position, int32_t m, bool rising, int32_t* order, double* sorted) {
  using Key = typename Radix<T>::Key;
  using Signed = std::make_signed_t<Key>;
  Signed keys[kFew], less[kFew];
  uint8_t equal[kFew] = {};                     // how many equal keys have their place
  for (int32_t i = 0; i < m; ++i)
    keys[i] = (Signed)(key_of(values[position ? position[i] : i], rising) ^ Radix<T>::sign);
  loops<T>().count_less(keys, m, less);
  for (int32_t i = 0; i < m; ++i) {
    const int32_t place = (int32_t)less[i] + equal[less[i]]++;
    order[place] = position ? position[i] : i;
    if (sorted) sorted[place] = value_of<T>((Key)keys[i] ^ Radix<T>::sign);
  }
}

template <class Work>
void each_piece(int64_t m, int pieces, const Work& work) {
  if (pieces == 1) return work(0, 0, m);
#pragma omp parallel for num_threads(pieces) schedule(static, 1)
  for (int p = 0; p < pieces; ++p) work(p, m * p / pieces, m * (p + 1) / pieces);
}

// Returns where the sorted pairs are: in `pairs` or in `other`.
template <class T, int bits>
typename Radix<T>::Pair* sort_pairs(typename Radix<T>::Pair* pairs, typename Radix<T>::Pair* other, int64_t m,
                                    int pieces, std::vector<uint32_t>& counts) {
  using R = Radix<T>;
  constexpr int passes = (8 * sizeof(typename R::Key) + bits - 1) / bits, size = 1 << bits;
  const auto digit = [](const typename R::Pair& pair, int pass) {
    return (uint32_t)(R::key(pair) >> (pass * bits)) & (size - 1);
  };
  counts.assign((size_t)pieces * passes * size, 0);
  uint32_t* const all = counts.data();
  if (pieces == 1)
    for (int64_t i = 0; i < m; ++i) {
#pragma GCC unroll 8
      for (int pass = 0; pass < passes; ++pass) ++all[pass * size + digit(pairs[i], pass)];
    }
  for (int pass = 0; pass < passes; ++pass) {
    const auto counts_of = [=](int piece) { return all + ((size_t)piece * passes + pass) * size; };
    if (pieces > 1)
      each_piece(m, pieces, [=](int piece, int64_t first, int64_t end) {
        uint32_t* const own = counts_of(piece);
        for (int64_t i = first; i < end; ++i) ++own[digit(pairs[i], pass)];
      });
    uint32_t before = 0, alike = 0;
    for (int piece = 0; piece < pieces; ++piece) alike += counts_of(piece)[digit(pairs[0], pass)];
    if (alike == m) continue;                   // every item has this digit
    for (int d = 0; d < size; ++d)
      for (int piece = 0; piece < pieces; ++piece) {
        uint32_t& count = counts_of(piece)[d];
        const uint32_t here = count;
        count = before, before += here;
      }
    each_piece(m, pieces, [=](int piece, int64_t first, int64_t end) {
      uint32_t* const next = counts_of(piece);
      for (int64_t i = first; i < end; ++i) other[next[digit(pairs[i], pass)]++] = pairs[i];
    });
    std::swap(pairs, other);
  }
  return pairs;
}

}  // namespace

template <class T>
int64_t sort_row(const T* values, const uint8_t* mask, int64_t n, bool rising, int threads, int32_t* order,
                 double* sorted, SortScratch& scratch) {
  using R = Radix<T>;
  using Pair = typename R::Pair;
  int64_t m = n;
  if (mask) {
    m = 0;
    for (int64_t i = 0; i < n; ++i) m += mask[i] != 0;
    int64_t in = 0, out = m;
    for (int64_t i = 0; i < n; ++i) order[mask[i] ? in++ : out++] = (int32_t)i;
  }
  if (m <= kFew) {
    int32_t position[kFew];
    if (mask) std::copy(order, order + m, position);
    sort_few(values, mask ? position : nullptr, (int32_t)m, rising, order, sorted);
    return m;
  }
  const size_t words = sizeof(Pair) / sizeof(uint64_t);
  if (scratch.pairs.size() < 2 * words * m) scratch.pairs.resize(2 * words * m);
  Pair *pairs = reinterpret_cast<Pair*>(scratch.pairs.data()), *const other = pairs + m;
  const int pieces = m >= kForThreads ? threads : 1;
  each_piece(m, pieces, [=](int, int64_t first, int64_t end) {
    if (mask)
      for (int64_t i = first; i < end; ++i) pairs[i] = R::pair(key_of(values[order[i]], rising), order[i]);
    else
      for (int64_t i = first; i < end; ++i) pairs[i] = R::pair(key_of(values[i], rising), i);
  });
  pairs = m < kMany ? sort_pairs<T, 8>(pairs, other, m, pieces, scratch.counts)
                    : sort_pairs<T, 11>(pairs, other, m, pieces, scratch.counts);
  each_piece(m, pieces, [=](int, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) order[i] = R::position(pairs[i]);
    for (int64_t i = first; i < end && sorted; ++i) sorted[i] = value_of<T>(R::key(pairs[i]));
  });
  return m;
}

template int64_t sort_row(const float*, const uint8_t*, int64_t, bool, int, int32_t*, double*, SortScratch&);
template int64_t sort_row(const double*, const uint8_t*, int64_t, bool, int, int32_t*, double*, SortScratch&);

}  // namespace fl
