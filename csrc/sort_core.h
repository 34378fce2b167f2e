// The sort of the sort engine: positions of a row's items in order of their values.
#pragma once
#include <stdint.h>

#include <vector>

namespace fl {

// Scratch memory of one thread's sorts, kept from row to row.
struct SortScratch {
  std::vector<uint64_t> pairs;
  std::vector<uint32_t> counts;
};

// order[0..m): positions, 0 to n - 1, of the m items that count (mask null: all n), in falling order of value, or in rising
// order, ties (-0 is 0) in rising order of position; +inf first, -inf last (rising: -inf first), NaN before all.
// order[m..n): the positions of the others, rising. sorted: null, or where their m values are to go, negated if `rising`, so
// that they fall. Returns m. T is float or double; n < 2^31. The result is the same for any number of threads.
template <class T>
int64_t sort_row(const T* values, const uint8_t* mask, int64_t n, bool rising, int threads, int32_t* order,
                 double* sorted, SortScratch& scratch);

template <class T>
int64_t sort_falling(const T* values, const uint8_t* mask, int64_t n, int32_t* order, SortScratch& scratch) {
  return sort_row(values, mask, n, false, 1, order, nullptr, scratch);
}

// The vector loops of the sort, compiled once per instruction set.
template <class Key>
struct SortLoops {
  // above[i] = how many of the m keys are less than keys[i]; both arrays have room for m rounded up to `padding`
  void (*count_less)(Key* keys, int32_t m, Key* less);
};
constexpr int32_t kSortPadding = 64;

#define FL_SORT_LOOPS(isa)                    \
  namespace isa {                             \
  extern const SortLoops<int32_t> sort_float;  \
  extern const SortLoops<int64_t> sort_double; \
  }
FL_SORT_LOOPS(portable)
#if defined(FL_X86)
FL_SORT_LOOPS(avx2)
FL_SORT_LOOPS(avx512)
#endif
#undef FL_SORT_LOOPS

}  // namespace fl
