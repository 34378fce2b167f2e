// What the soft sort's and soft rank's forward and backward share: a call, its rows, and their memory.
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#include "arguments.h"
#include "permutahedron.h"
#include "permutahedron_rows.h"
#include "sort_core.h"

namespace fl {

inline const PermutahedronLoops& permutahedron_loops() {
#if defined(FL_X86)
  return std::strcmp(fl_isa(), "avx512") == 0 ? avx512::permutahedron_loops
         : std::strcmp(fl_isa(), "avx2") == 0 ? avx2::permutahedron_loops
                                              : portable::permutahedron_loops;
#else
  return portable::permutahedron_loops;
#endif
}

constexpr int32_t kStarts = INT32_MIN, kPosition = INT32_MAX;
inline int64_t started(int32_t entry) { return (int64_t)((uint32_t)entry >> 31); }   // 0 or 1; no branch
constexpr double kLog2e = 1.44269504088896340736, kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kWorthThreads = 4096, kLongRow = int64_t(1) << 16;   // items of a call, of a row

// Memory of one thread's rows, kept from call to call unless it is large.
struct Scratch {
  SortScratch sort;
  Buffer falling, terms, blocks, numbers, values, gradients, weights, together, out;

  void shrink() {
    Buffer* const all[] = {&sort.pairs, &sort.counts, &sort.positions, &sort.values, &falling, &terms,
                           &blocks,     &numbers,     &values,         &gradients,   &weights, &together, &out};
    size_t bytes = 0;
    for (const Buffer* one : all) bytes += one->bytes();
    for (Buffer* one : all)
      if (bytes > size_t(128) << 20) one->clear();
  }
};

// Rows of values of type V, which is what a call computes on: float, or double for FL_F64.
template <class V>
struct Call {
  const fl_permutahedron& p;
  bool sort;
  const PermutahedronLoops& loops = permutahedron_loops();

  bool half() const { return p.dtype == FL_BF16 || p.dtype == FL_F16; }
  bool rising() const { return sort != (p.descending != 0); }   // s is made of -x
  // Strengths by which ordinary numbers divided overflow give the hard answer.
  double strength(int64_t row) const {
    const double e = p.strengths ? p.strengths[row] : p.strength;
    return e > 0 && e < 1e-300 ? 0 : e;
  }
  size_t item_size() const { return half() ? 2 : sizeof(V); }

  const V* values(const void* from, int64_t first, int64_t count, Buffer& memory) const {
    if constexpr (sizeof(V) == sizeof(float))
      if (half()) {
        float* const wide = memory.room<float>(count);
        loops.widen(p.dtype, (const uint16_t*)from + first, wide, count);
        return wide;
      }
    return (const V*)from + first;
  }
};

// work(row, threads, scratch) for every row, threads over rows, or where there are few and long ones, over each.
template <class Work>
int each_row(const char* name, const fl_lists& lists, const Work& work) {
  const int threads = all_items(lists) >= kWorthThreads ? omp_get_max_threads() : 1;
  const bool within = lists.rows < threads && lists.width >= kLongRow;
  std::atomic<bool> failed{false};
  const auto row_of = [&](int64_t row, int inside) {
    thread_local Scratch scratch;
    try {
      work(row, inside, scratch);
      scratch.shrink();
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  if (within || threads == 1 || lists.rows < 2)
    for (int64_t row = 0; row < lists.rows; ++row) row_of(row, within ? threads : 1);
  else {
    const int team = (int)std::min<int64_t>(threads, lists.rows);
    const int64_t some = std::max<int64_t>(1, lists.rows / (8 * team));
#pragma omp parallel for num_threads(team) schedule(dynamic, some)
    for (int64_t row = 0; row < lists.rows; ++row) row_of(row, 1);
  }
  return failed ? fail("%s: no memory", name) : 0;
}

template <class Run>
int checked(const char* name, const fl_permutahedron* p, const Run& run) {
  if (!p) return fail("%s: null", name);
  if (p->dtype < FL_F32 || p->dtype > FL_F64) return fail("%s: dtype %d is unknown", name, p->dtype);
  if (p->lists.rows < 0 || p->lists.width < 0 || p->lists.width > INT32_MAX)
    return fail("%s: %lld rows of width %lld, expected 0 to 2^31 - 1", name, (long long)p->lists.rows,
                (long long)p->lists.width);
  if (p->lists.rows == 0) return 0;
  try {
    if (p->dtype == FL_F64) return run(double());
    return run(float());
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory", name);
  }
}

}  // namespace fl
