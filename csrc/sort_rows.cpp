// The vector loops of the sort, compiled once per instruction set.
#include "simd.h"
#include "sort_core.h"
#include "sort_keys.h"

namespace fl {
namespace FL_ISA {
namespace {

template <class T>
void pairs_of(const T* values, bool rising, int64_t first, int64_t end, void* pairs) {
  using R = Radix<T>;
  typename R::Pair* const to = (typename R::Pair*)pairs;
#pragma omp simd
  for (int64_t i = first; i < end; ++i) to[i] = R::pair(key_of(values[i], rising), i);
}

template <class T>
void of_pairs(const void* pairs, int64_t first, int64_t end, int32_t* order, double* sorted) {
  using R = Radix<T>;
  const typename R::Pair* const from = (const typename R::Pair*)pairs;
#pragma omp simd
  for (int64_t i = first; i < end; ++i) order[i] = R::position(from[i]);
  if (!sorted) return;
#pragma omp simd
  for (int64_t i = first; i < end; ++i) sorted[i] = value_of<T>(R::key(from[i]));
}

typedef int64_t half64 __attribute__((vector_size(4 * lanes)));

// Of items that have the same key each is given the place of the first: they are told apart one by one.
template <class T>
void sort_few(const T* values, bool rising, int32_t m, int32_t* order, double* sorted) {
  using Key = typename Radix<T>::Key;
  using Signed = std::make_signed_t<Key>;
  typedef std::conditional_t<sizeof(T) == 4, i32, half64> Vector;
  constexpr int wide = sizeof(Vector) / sizeof(Key), some = 4;   // `some` vectors at a time
  static_assert(kFew % (some * wide) == 0);
  Signed keys[kFew], less[kFew];
  uint8_t equal[kFew] = {};
#pragma omp simd
  for (int32_t i = 0; i < m; ++i) keys[i] = (Signed)(key_of(values[i], rising) ^ sign_bit<Key>);
  for (int32_t i = m; i % (some * wide); ++i) keys[i] = 0;
  for (int32_t i = 0; i < m; i += some * wide) {
    Vector own[some], count[some];
    for (int v = 0; v < some; ++v) __builtin_memcpy(&own[v], keys + i + v * wide, sizeof(Vector)), count[v] = Vector{};
    for (int32_t j = 0; j < m; ++j) {
      const Vector other = Vector{} + keys[j];
#pragma GCC unroll 8
      for (int v = 0; v < some; ++v) {
#if defined(__AVX512F__)
        count[v] = other < own[v] ? count[v] + 1 : count[v];   // one masked addition
#else
        count[v] -= (Vector)(other < own[v]);
#endif
      }
    }
    for (int v = 0; v < some; ++v) __builtin_memcpy(less + i + v * wide, &count[v], sizeof(Vector));
  }
  for (int32_t i = 0; i < m; ++i) {
    const int32_t place = (int32_t)less[i] + equal[less[i]]++;
    order[place] = i;
    if (sorted) sorted[place] = value_of<T>((Key)keys[i] ^ sign_bit<Key>);
  }
}

}  // namespace

extern const SortLoops<float> sort_float;
extern const SortLoops<double> sort_double;
const SortLoops<float> sort_float = {sort_few<float>, pairs_of<float>, of_pairs<float>};
const SortLoops<double> sort_double = {sort_few<double>, pairs_of<double>, of_pairs<double>};

}  // namespace FL_ISA
}  // namespace fl
