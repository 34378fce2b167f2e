// The sort of the sort engine: positions of a row's items in order of their values.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <vector>

namespace fl {

// Scratch memory of one thread's sorts, kept from row to row.
struct SortScratch {
  std::vector<uint64_t> pairs;
};

// order[0..m): positions, 0 to n - 1, of the m items that count (mask null: all n), in falling order of value, ties in
// rising order of position; +inf first, -inf last, NaN before all. order[m..n): the positions of the others, rising.
// Returns m. T is float or double.
template <class T>
int64_t sort_falling(const T* values, const uint8_t* mask, int64_t n, int32_t* order, SortScratch& scratch) {
  (void)scratch;
  int64_t m = 0;
  for (int64_t i = 0; i < n; ++i)
    if (!mask || mask[i]) order[m++] = (int32_t)i;
  int64_t rest = m;
  for (int64_t i = 0; i < n && mask; ++i)
    if (!mask[i]) order[rest++] = (int32_t)i;
  std::stable_sort(order, order + m, [&](int32_t a, int32_t b) {
    if (values[a] != values[a]) return values[b] == values[b];
    return values[a] > values[b];
  });
  return m;
}

}  // namespace fl
