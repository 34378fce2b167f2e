// The sort of the sort engine: positions of a row's items in order of their values.
#pragma once
#include <stdint.h>

#include <cstdlib>
#include <new>

namespace fl {

// Memory that grows and is never cleared: what no row has written to costs nothing.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  template <class Number>
  Number* room(int64_t count) {
    const size_t bytes = (size_t)count * sizeof(Number);
    if (bytes > bytes_) {
      clear();
      data_ = std::malloc(bytes);
      if (!data_) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return static_cast<Number*>(data_);
  }
  size_t bytes() const { return bytes_; }
  void clear() {
    std::free(data_);
    data_ = nullptr, bytes_ = 0;
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Scratch memory of one thread's sorts, kept from row to row.
struct SortScratch {
  Buffer pairs, counts, positions, values;
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
constexpr int32_t kFew = 256;   // items up to which their places are counted, each against all
template <class T>
struct SortLoops {
  void (*sort_few)(const T* values, bool rising, int32_t m, int32_t* order, double* sorted);   // sorted may be null
  // Keys and positions of items first to end, and back; sorted may be null.
  void (*pairs_of)(const T* values, bool rising, int64_t first, int64_t end, void* pairs);
  void (*of_pairs)(const void* pairs, int64_t first, int64_t end, int32_t* order, double* sorted);
};

#define FL_SORT_LOOPS(isa)                    \
  namespace isa {                             \
  extern const SortLoops<float> sort_float;    \
  extern const SortLoops<double> sort_double;  \
  }
FL_SORT_LOOPS(portable)
#if defined(FL_X86)
FL_SORT_LOOPS(avx2)
FL_SORT_LOOPS(avx512)
#endif
#undef FL_SORT_LOOPS

}  // namespace fl
