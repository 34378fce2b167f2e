// The C surface's two tile primitives on the host: checks, choice of instruction set, and the split of rows over threads.
#include "fusedloss.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

#include "row_kernels.h"

namespace {

using fl::ColumnSums;
using fl::RowKernels;

thread_local char error_text[256];

int fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error_text, sizeof error_text, format, arguments);
  va_end(arguments);
  return 1;
}

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

// ---- checks --------------------------------------------------------------------------------------------------------

bool is_dtype(int32_t dtype) { return dtype == FL_F32 || dtype == FL_BF16 || dtype == FL_F16; }

int check_tile(const fl_tile* t) {
  if (!t) return fail("tile is null");
  if (t->rows < 0 || t->columns < 0)
    return fail("tile has %lld rows and %lld columns", (long long)t->rows, (long long)t->columns);
  if (!t->data && t->rows > 0 && t->columns > 0) return fail("tile data is null");
  if (!is_dtype(t->dtype)) return fail("tile dtype %d is unknown", t->dtype);
  if (t->first_column < 0) return fail("tile first_column is %lld, expected >= 0", (long long)t->first_column);
  if (!(t->softcap >= 0) || std::isinf(t->softcap)) return fail("tile softcap is %g, expected 0 or more", t->softcap);
  return 0;
}

int check_statistic(int32_t i, const fl_statistic& k, const fl_tile& t, bool differentiated) {
  const bool counted = k.kind == FL_SCORE || k.kind == FL_EXTREME, any_rows = t.rows > 0;
  if (k.kind < FL_SCORE || k.kind > FL_COUNT) return fail("statistic %d: kind %d is unknown", i, k.kind);
  if (k.where != FL_ALL && k.where != FL_REST) return fail("statistic %d: where %d is unknown", i, k.where);
  if (counted ? k.count < 0 : k.count != 1) return fail("statistic %d: count is %d", i, k.count);
  if (k.kind == FL_EXPECTATION && (k.function < FL_V_OPERAND || k.function > FL_V_SQUARE))
    return fail("statistic %d: fl_expectation %d is unknown", i, k.function);
  if (k.kind == FL_SUM_OF && (k.function < FL_F_SOFTPLUS || k.function > FL_F_FOCAL))
    return fail("statistic %d: fl_function %d is unknown", i, k.function);
  if (k.kind == FL_SUM_OF && k.function == FL_F_FOCAL && !(k.parameter >= 0))
    return fail("statistic %d: the focal exponent is %g, expected >= 0", i, k.parameter);
  if (k.kind == FL_EXTREME && std::fabs(k.factor) != 1)
    return fail("statistic %d: the factor of FL_EXTREME is %g, expected 1 or -1", i, k.factor);
  if (k.kind == FL_EXPECTATION && k.function != FL_V_SCORE && !k.operand && any_rows)
    return fail("statistic %d: an expectation of an operand has none", i);
  if (k.operand && !is_dtype(k.operand_dtype))
    return fail("statistic %d: operand_dtype %d is unknown", i, k.operand_dtype);
  if (k.kind == FL_SCORE && k.count > 0 && !k.at && any_rows) return fail("statistic %d: FL_SCORE without columns", i);
  if (k.where == FL_REST && !k.rest && any_rows) return fail("statistic %d: FL_REST without rest", i);
  if (counted && k.count == 0) return 0;
  if (!k.state && any_rows) return fail("statistic %d: state is null", i);
  if (k.keep && !differentiated) {
    if (k.kind != FL_LOGSUMEXP || k.factor != 1 || t.columns > FL_KEPT_COLUMNS)
      return fail("statistic %d: only a log-sum-exp of factor 1 over at most %d columns keeps exponentials", i,
                  FL_KEPT_COLUMNS);
    if (!is_dtype(k.keep_dtype)) return fail("statistic %d: keep_dtype %d is unknown", i, k.keep_dtype);
    if (!k.keep_shift) return fail("statistic %d: keep_shift is null", i);
    if (t.rows > 1 && k.keep_stride < t.columns)
      return fail("statistic %d: keep_stride %lld is less than the %lld columns", i, (long long)k.keep_stride,
                  (long long)t.columns);
  }
  if (differentiated && !k.coefficient && any_rows && k.kind != FL_COUNT) return fail("statistic %d: coefficient is null", i);
  return 0;
}

int check(const fl_tile* tile, const fl_statistic* statistics, int32_t count, bool differentiated) {
  if (int status = check_tile(tile)) return status;
  if (count < 0 || count > fl::most_statistics)
    return fail("%d statistics, expected 0 to %d", count, fl::most_statistics);
  if (count > 0 && !statistics) return fail("statistics is null");
  for (int32_t i = 0; i < count; ++i)
    if (int status = check_statistic(i, statistics[i], *tile, differentiated)) return status;
  return 0;
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
    auto most = [](double a, double b) { return b <= a ? a : b; };   // so written, NaN passes
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

template <class Bits>
void take(Bits* row, const int64_t* columns, int64_t count) {
  for (int64_t j = 0; j < count; ++j) row[j] = row[columns[j]];   // rising: what is read was not yet overwritten
}

}  // namespace

extern "C" {

int fl_statistics(const fl_tile* tile, const fl_statistic* statistics, int32_t count) {
  if (int status = check(tile, statistics, count, false)) return status;
  if (tile->rows == 0 || tile->columns == 0 || count == 0) return 0;
  const RowKernels* kernels = kernels_in_use();
  split(tile->rows, threads_for(*tile),
        [&](int, int64_t first, int64_t end) { kernels->statistics(*tile, statistics, count, first, end); });
  return 0;
}

int fl_gradient(const fl_tile* tile, void* out, int64_t out_stride, int32_t out_dtype, const fl_statistic* statistics,
                int32_t count, const fl_sums* sums) {
  if (int status = check(tile, statistics, count, true)) return status;
  if (!is_dtype(out_dtype)) return fail("out_dtype %d is unknown", out_dtype);
  if (tile->rows == 0 || tile->columns == 0) return 0;
  if (!out) return fail("out is null");
  if (tile->rows > 1 && out_stride < tile->columns)
    return fail("out_stride %lld is less than the %lld columns", (long long)out_stride, (long long)tile->columns);
  const int64_t in_size = tile->dtype == FL_F32 ? 4 : 2, out_size = out_dtype == FL_F32 ? 4 : 2;
  if (out == tile->data && (out_size > in_size || (tile->rows > 1 && out_stride * out_size != tile->stride * in_size)))
    return fail("in place, out must be no wider than the tile, with the same row pitch in bytes");
  return split_with_sums(*tile, sums, [&](const RowKernels& kernels, int64_t first, int64_t end, ColumnSums& own) {
    kernels.gradient(*tile, {out, out_stride, out_dtype}, statistics, count, first, end, own);
  });
}

int fl_gradient_of_exponentials(const fl_tile* tile, const fl_statistic* statistics, int32_t count,
                                const fl_sums* sums) {
  if (int status = check(tile, statistics, count, true)) return status;
  if (tile->softcap != 0 || (sums && (sums->class_scale || sums->scale)))
    return fail("exponentials say nothing of a softcap, and give no class_scale and scale sums");
  if (tile->rows == 0 || tile->columns == 0) return 0;
  int kept = 0;
  for (int32_t i = 0; i < count; ++i) {
    const fl_statistic& k = statistics[i];
    kept += k.kind == FL_LOGSUMEXP && k.keep_shift;
    if (k.kind != FL_LOGSUMEXP && k.kind != FL_SCORE && k.kind != FL_COUNT)
      return fail("statistic %d: kind %d cannot be read off exponentials", i, k.kind);
  }
  if (kept != 1) return fail("expected one FL_LOGSUMEXP with its keep_shift, got %d", kept);
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

const char* fl_error(void) { return error_text; }

}  // extern "C"
