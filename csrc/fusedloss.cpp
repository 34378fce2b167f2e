// The C surface's two tile primitives on the host: checks, choice of instruction set, and the split of rows over threads.
#include "fusedloss.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "arguments.h"
#include "row_kernels.h"

namespace {

using fl::Across;
using fl::ColumnSums;
using fl::RowKernels;
using fl::check;
using fl::fail;
using fl::is_dtype;

constexpr fl::Abilities able = {fl::most_statistics, FL_KEPT_COLUMNS, 1, FL_LOGSUMEXP_OF, fl::every_where, false};

// ---- instruction sets ----------------------------------------------------------------------------------------------

// Best first.
const RowKernels* const instruction_sets[] = {
#if defined(FL_X86)
    &fl::avx512::row_kernels,
    &fl::avx2::row_kernels,
#endif
    &fl::portable::row_kernels,
};

bool runs_here(const RowKernels* kernels) {
#if defined(FL_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (kernels == &fl::avx2::row_kernels) return avx2;
  if (kernels == &fl::avx512::row_kernels)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return kernels == &fl::portable::row_kernels;
}

const RowKernels* best() { return *std::find_if(std::begin(instruction_sets), std::end(instruction_sets), runs_here); }

std::atomic<const RowKernels*> chosen{nullptr};

const RowKernels* kernels_in_use() {
  const RowKernels* kernels = chosen.load(std::memory_order_relaxed);
  if (!kernels) chosen.store(kernels = best(), std::memory_order_relaxed);
  return kernels;
}

// ---- threads ---------------------------------------------------------------------------------------------------------

// Waking threads costs as much as some ten thousand scores.
int threads_for(const fl_tile& t) {
  const int64_t most = std::min<int64_t>(t.rows, 1 + t.rows * t.columns / 16384);
  return (int)std::max<int64_t>(1, std::min<int64_t>(most, omp_get_max_threads()));
}

// work(thread, first, end) on equal parts of `size` things.
template <class Work>
void split(int64_t size, int threads, const Work& work) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t here = omp_get_thread_num(), all = omp_get_num_threads();
    work((int)here, size * here / all, size * (here + 1) / all);
  }
}

// Each thread's own sums over its rows, joined in the order of the threads: same bits each time.
class SumsByThread {
 public:
  SumsByThread(const fl_sums& to, int threads, int64_t columns) : to_(to), columns_(columns), sums_(threads) {
    const int vectors = !!to.bias + !!to.class_shift + !!to.class_scale + !!to.largest;
    memory_.resize((size_t)threads * vectors * columns);
    double* next = memory_.data();
    auto take = [&](const float* wanted) { return wanted ? (next += columns) - columns : nullptr; };
    for (ColumnSums& s : sums_) {
      s.bias = take(to.bias);
      s.class_shift = take(to.class_shift);
      s.class_scale = take(to.class_scale);
      s.largest = take(to.largest);
      s.scale = 0;
      s.wants_scale = to.scale != nullptr;
    }
  }

  ColumnSums& operator[](int thread) { return sums_[thread]; }

  void join() {
    auto plus = [](double a, double b) { return a + b; };
    auto most = [](double a, double b) { return b > a || b != b ? b : a; };   // NaN enters, and stays
    split(columns_, memory_.empty() ? 1 : (int)sums_.size(), [&](int, int64_t first, int64_t end) {
      fold(to_.bias, &ColumnSums::bias, plus, first, end);
      fold(to_.class_shift, &ColumnSums::class_shift, plus, first, end);
      fold(to_.class_scale, &ColumnSums::class_scale, plus, first, end);
      fold(to_.largest, &ColumnSums::largest, most, first, end);
    });
    if (to_.scale)
      for (const ColumnSums& s : sums_) *to_.scale += s.scale;
  }

 private:
  template <class Join>
  void fold(float* to, double* ColumnSums::*sum, Join join, int64_t first, int64_t end) {
    if (!to) return;
    for (int64_t j = first; j < end; ++j) {
      double x = (sums_[0].*sum)[j];
      for (size_t thread = 1; thread < sums_.size(); ++thread) x = join(x, (sums_[thread].*sum)[j]);
      to[j] = (float)join(to[j], x);
    }
  }

  fl_sums to_;
  int64_t columns_;
  std::vector<ColumnSums> sums_;
  std::vector<double> memory_;
};

// work(kernels, first, end, the thread's own sums) on equal parts of the rows.
template <class Work>
int split_with_sums(const fl_tile& tile, const fl_sums* sums, const Work& work) {
  const RowKernels* kernels = kernels_in_use();
  const int threads = threads_for(tile);
  try {
    SumsByThread by_thread(sums ? *sums : fl_sums{}, threads, tile.columns);
    split(tile.rows, threads,
          [&](int thread, int64_t first, int64_t end) { work(*kernels, first, end, by_thread[thread]); });
    by_thread.join();
  } catch (const std::bad_alloc&) {
    return fail("no memory for the column sums of %d threads", threads);
  }
  return 0;
}

// Statistics of columns made ready for a walk by rows.
class AcrossRows {
 public:
  AcrossRows(const fl_tile& t, const fl_statistic* all, int32_t count, const RowKernels& kernels)
      : vectors_(count), starts_(count), entries_(count) {
    const int64_t pitch = (t.columns + 15) / 16 * 16;          // whole vectors, of whatever width
    for (int32_t i = 0; i < count; ++i) {
      const fl_statistic& k = all[i];
      Across a{};
      a.statistic = &k;
      if (k.kind == FL_COUNT) continue;
      if (k.kind == FL_SCORE) {
        sort(i, t, t.columns * k.count, [&](int64_t e) { return k.at[e / k.count * k.at_stride + e % k.count]; });
      } else if (k.kind == FL_EXTREME) {
        sort(i, t, t.columns * k.count,
             [&](int64_t e) { return (int64_t)k.state[(2 * (e / k.count) + 1) * k.count + e % k.count]; });
      } else {
        vectors_[i].resize(4 * pitch);
        a.weight = vectors_[i].data();
        a.center = a.weight + pitch, a.offset = a.center + pitch, a.level = a.offset + pitch;
        split(t.columns, threads_for(t),
              [&](int, int64_t first, int64_t end) { kernels.differentiate(a, first, end); });
        if (k.where & FL_REST) sort(i, t, t.columns, [&](int64_t e) { return k.rest[e]; });
      }
      if (!starts_[i].empty()) a.start = starts_[i].data(), a.entries = entries_[i].data();
      ready_.push_back(a);
    }
  }

  const Across* data() const { return ready_.data(); }
  int32_t size() const { return (int32_t)ready_.size(); }

 private:
  // The entries by the row that row_of(entry) names, those of a row in rising order; none of rows outside the tile.
  template <class RowOf>
  void sort(int32_t statistic, const fl_tile& t, int64_t count, RowOf row_of) {
    std::vector<int64_t>&start = starts_[statistic], &entries = entries_[statistic];
    auto each = [&](auto act) {
      for (int64_t e = 0; e < count; ++e)
        if (int64_t row = row_of(e); row >= t.first_row && row < t.first_row + t.rows) act(row - t.first_row, e);
    };
    start.assign(t.rows + 2, 0);
    each([&](int64_t row, int64_t) { ++start[row + 2]; });
    for (int64_t row = 2; row < t.rows + 2; ++row) start[row] += start[row - 1];
    entries.resize(start.back());
    each([&](int64_t row, int64_t e) { entries[start[row + 1]++] = e; });
  }

  std::vector<Across> ready_;
  std::vector<std::vector<float>> vectors_;
  std::vector<std::vector<int64_t>> starts_, entries_;
};

template <class Bits>
void take(Bits* row, const int64_t* columns, int64_t count) {
  for (int64_t j = 0; j < count; ++j) row[j] = row[columns[j]];   // rising: what is read was not yet overwritten
}

}  // namespace

extern "C" {

int fl_statistics(const fl_tile* tile, const fl_statistic* statistics, int32_t count) {
  if (int status = check(tile, statistics, count, false, able)) return status;
  if (tile->rows == 0 || tile->columns == 0 || count == 0) return 0;
  const RowKernels* kernels = kernels_in_use();
  split(tile->rows, threads_for(*tile),
        [&](int, int64_t first, int64_t end) { kernels->statistics(*tile, statistics, count, first, end); });
  return 0;
}

int fl_column_statistics(const fl_tile* tile, const fl_statistic* statistics, int32_t count) {
  if (int status = fl::check_across(tile, statistics, count, false, able)) return status;
  if (tile->rows == 0 || tile->columns == 0 || count == 0) return 0;
  const RowKernels* kernels = kernels_in_use();
  const int64_t columns = tile->columns, parts = (columns + 15) / 16;   // no thread has to share a cache line of a row
  split(parts, (int)std::min<int64_t>(parts, threads_for(*tile)), [&](int, int64_t first, int64_t end) {
    kernels->column_statistics(*tile, statistics, count, 16 * first, std::min(columns, 16 * end));
  });
  return 0;
}

int fl_gradient(const fl_tile* tile, void* out, int64_t out_stride, int32_t out_dtype, const fl_statistic* statistics,
                int32_t count, const fl_statistic* across, int32_t across_count, const fl_sums* sums) {
  if (int status = check(tile, statistics, count, true, able)) return status;
  if (int status = fl::check_across(tile, across, across_count, true, able)) return status;
  if (int status = fl::check_out(*tile, out, out_stride, out_dtype)) return status;
  if (tile->rows == 0 || tile->columns == 0) return 0;
  try {
    const AcrossRows columns(*tile, across, across_count, *kernels_in_use());
    return split_with_sums(*tile, sums, [&](const RowKernels& kernels, int64_t first, int64_t end, ColumnSums& own) {
      kernels.gradient(*tile, {out, out_stride, out_dtype}, statistics, count, columns.data(), columns.size(), first, end,
                       own);
    });
  } catch (const std::bad_alloc&) {
    return fail("no memory for %d statistics of columns", across_count);
  }
}

int fl_gradient_of_exponentials(const fl_tile* tile, const fl_statistic* statistics, int32_t count,
                                const fl_sums* sums) {
  if (int status = check(tile, statistics, count, true, able)) return status;
  if (int status = fl::check_exponentials(*tile, statistics, count, sums)) return status;
  if (tile->rows == 0 || tile->columns == 0) return 0;
  for (int32_t i = 0; i < count; ++i)
    if (statistics[i].kind == FL_LOGSUMEXP && statistics[i].keep_block < tile->columns)
      return fail("statistic %d: keep_block is %lld, but these kernels know one shift for all %lld columns", i,
                  (long long)statistics[i].keep_block, (long long)tile->columns);
  return split_with_sums(*tile, sums, [&](const RowKernels& kernels, int64_t first, int64_t end, ColumnSums& own) {
    kernels.gradient_of_exponentials(*tile, statistics, count, first, end, own);
  });
}

int fl_take_columns(void* data, int64_t rows, int64_t stride, int32_t dtype, const int64_t* columns, int64_t count) {
  if (!is_dtype(dtype)) return fail("dtype %d is unknown", dtype);
  if (rows <= 0 || count <= 0) return 0;
  if (!data || !columns) return fail("data or columns is null");
  fl_tile tile{};
  tile.rows = rows, tile.columns = count;
  split(rows, threads_for(tile), [&](int, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      if (dtype == FL_F32) take(static_cast<uint32_t*>(data) + row * stride, columns, count);
      else take(static_cast<uint16_t*>(data) + row * stride, columns, count);
    }
  });
  return 0;
}

const char* fl_isa(void) { return kernels_in_use()->name; }

int fl_set_isa(const char* name) {
  if (!name) {
    chosen.store(best());
    return 0;
  }
  for (const RowKernels* kernels : instruction_sets)
    if (std::strcmp(kernels->name, name) == 0) {
      if (!runs_here(kernels)) return fail("this processor has no %s", name);
      chosen.store(kernels);
      return 0;
    }
  return fail("instruction set \"%s\" is unknown or not built in", name);
}

const char* fl_error(void) { return fl::error_text; }

}  // extern "C"
