// The vector loops of the sort, compiled once per instruction set.
#include "simd.h"
#include "sort_core.h"

namespace fl {
namespace FL_ISA {
namespace {

template <class Key, class Vector>
void count_less(Key* keys, int32_t m, Key* less) {
  constexpr int wide = sizeof(Vector) / sizeof(Key), some = 4 * lanes / wide;   // `some` vectors at a time
  for (int32_t i = m; i % kSortPadding; ++i) keys[i] = 0;
  for (int32_t i = 0; i < m; i += some * wide) {
    Vector own[some], count[some];
    for (int v = 0; v < some; ++v) __builtin_memcpy(&own[v], keys + i + v * wide, sizeof(Vector)), count[v] = Vector{};
    for (int32_t j = 0; j < m; ++j) {
      const Vector other = Vector{} + keys[j];
#pragma GCC unroll 8
      for (int v = 0; v < some; ++v) count[v] -= (Vector)(other < own[v]);
    }
    for (int v = 0; v < some; ++v) __builtin_memcpy(less + i + v * wide, &count[v], sizeof(Vector));
  }
}

typedef int64_t half64 __attribute__((vector_size(4 * lanes)));

}  // namespace

extern const SortLoops<int32_t> sort_float;
extern const SortLoops<int64_t> sort_double;
const SortLoops<int32_t> sort_float = {count_less<int32_t, i32>};
const SortLoops<int64_t> sort_double = {count_less<int64_t, half64>};

}  // namespace FL_ISA
}  // namespace fl
