// What the C surface checks before any kernel runs, on the host and on a device alike, and how it says what was wrong.
#pragma once
#include <cmath>
#include <cstdarg>
#include <cstdio>

#include "fusedloss.h"

namespace fl {

constexpr int32_t every_where = FL_REST | FL_SAME | FL_OTHER | FL_ABOVE | FL_BELOW;

// What a set of kernels can take.
struct Abilities {
  int32_t statistics;          // in one pass
  int64_t kept_columns;        // most columns to a shift
  int64_t shifts;              // most shifts to a row
  int32_t last_kind;           // fl_kind
  int32_t where;               // fl_where that it knows, or-ed
  bool scale_in_memory;        // reads fl_tile.scale_pointer
};

inline thread_local char error_text[256];

inline int fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error_text, sizeof error_text, format, arguments);
  va_end(arguments);
  return 1;
}


inline bool is_dtype(int32_t dtype) { return dtype == FL_F32 || dtype == FL_BF16 || dtype == FL_F16; }

inline int check_tile(const fl_tile* t) {
  if (!t) return fail("tile is null");
  if (t->rows < 0 || t->columns < 0)
    return fail("tile has %lld rows and %lld columns", (long long)t->rows, (long long)t->columns);
  if (!t->data && t->rows > 0 && t->columns > 0) return fail("tile data is null");
  if (!is_dtype(t->dtype)) return fail("tile dtype %d is unknown", t->dtype);
  if (t->first_column < 0) return fail("tile first_column is %lld, expected >= 0", (long long)t->first_column);
  if (t->first_row < 0) return fail("tile first_row is %lld, expected >= 0", (long long)t->first_row);
  if (!(t->softcap >= 0) || std::isinf(t->softcap)) return fail("tile softcap is %g, expected 0 or more", t->softcap);
  return 0;
}

inline int check_keep(int32_t i, const fl_statistic& k, const fl_tile& t, const Abilities& able) {
  if (k.kind != FL_LOGSUMEXP || k.factor != 1)
    return fail("statistic %d: only a log-sum-exp of factor 1 keeps exponentials", i);
  if (k.keep_block < 1 || k.keep_block > able.kept_columns)
    return fail("statistic %d: keep_block is %lld, expected 1 to %lld", i, (long long)k.keep_block,
                (long long)able.kept_columns);
  if ((t.columns + k.keep_block - 1) / k.keep_block > able.shifts)
    return fail("statistic %d: %lld columns in blocks of %lld are more than the %lld shifts to be had", i,
                (long long)t.columns, (long long)k.keep_block, (long long)able.shifts);
  if (!is_dtype(k.keep_dtype)) return fail("statistic %d: keep_dtype %d is unknown", i, k.keep_dtype);
  if (!k.keep_shift) return fail("statistic %d: keep_shift is null", i);
  if (t.rows > 1 && k.keep_stride < t.columns)
    return fail("statistic %d: keep_stride %lld is less than the %lld columns", i, (long long)k.keep_stride,
                (long long)t.columns);
  return 0;
}

inline int check_where(int32_t i, const fl_statistic& k, int64_t rows, int64_t columns, const Abilities& able) {
  const bool labelled = k.where & (FL_SAME | FL_OTHER), any_rows = rows > 0;
  if ((k.where & ~able.where) || ((k.where & FL_SAME) && (k.where & FL_OTHER)))
    return fail("statistic %d: where %d is unknown", i, k.where);
  if ((k.where & FL_REST) && !k.rest && any_rows) return fail("statistic %d: FL_REST without rest", i);
  if (labelled && ((!k.row_label && any_rows) || (!k.column_label && columns > 0)))
    return fail("statistic %d: FL_SAME or FL_OTHER without labels", i);
  if ((k.where & FL_ABOVE) && !k.above && any_rows) return fail("statistic %d: FL_ABOVE without above", i);
  if ((k.where & FL_BELOW) && !k.below && any_rows) return fail("statistic %d: FL_BELOW without below", i);
  return 0;
}

inline int check_statistic(int32_t i, const fl_statistic& k, const fl_tile& t, bool differentiated,
                           const Abilities& able) {
  const bool counted = k.kind == FL_SCORE || k.kind == FL_EXTREME, any_rows = t.rows > 0;
  if (k.kind < FL_SCORE || k.kind > able.last_kind) return fail("statistic %d: kind %d is unknown", i, k.kind);
  if (int status = check_where(i, k, t.rows, t.columns, able)) return status;
  if (counted ? k.count < 0 : k.count != 1) return fail("statistic %d: count is %d", i, k.count);
  if (k.kind == FL_EXPECTATION && (k.function < FL_V_OPERAND || k.function > FL_V_SQUARE))
    return fail("statistic %d: fl_expectation %d is unknown", i, k.function);
  if (k.kind == FL_SUM_OF && (k.function < FL_F_SOFTPLUS || k.function > FL_F_FOCAL))
    return fail("statistic %d: fl_function %d is unknown", i, k.function);
  if (k.kind == FL_SUM_OF && k.function == FL_F_FOCAL && !(k.parameter >= 0))
    return fail("statistic %d: the focal exponent is %g, expected >= 0", i, k.parameter);
  if (k.kind == FL_LOGSUMEXP_OF && (k.function < FL_G_LOG_TANH || k.function > FL_G_CIRCLE))
    return fail("statistic %d: fl_log_function %d is unknown", i, k.function);
  if (k.kind == FL_EXTREME && std::fabs(k.factor) != 1)
    return fail("statistic %d: the factor of FL_EXTREME is %g, expected 1 or -1", i, k.factor);
  if (k.kind == FL_EXPECTATION && k.function != FL_V_SCORE && !k.operand && any_rows && t.columns > 0)
    return fail("statistic %d: an expectation of an operand has none", i);
  if (k.operand && !is_dtype(k.operand_dtype))
    return fail("statistic %d: operand_dtype %d is unknown", i, k.operand_dtype);
  if (k.kind == FL_SCORE && k.count > 0 && !k.at && any_rows) return fail("statistic %d: FL_SCORE without columns", i);
  if (counted && k.count == 0) return 0;
  if (!k.state && any_rows) return fail("statistic %d: state is null", i);
  if (k.keep && !differentiated)
    if (int status = check_keep(i, k, t, able)) return status;
  if (differentiated && !k.coefficient && any_rows && k.kind != FL_COUNT) return fail("statistic %d: coefficient is null", i);
  return 0;
}

inline int check(const fl_tile* tile, const fl_statistic* statistics, int32_t count, bool differentiated,
                 const Abilities& able) {
  if (int status = check_tile(tile)) return status;
  if (tile->scale_pointer && !able.scale_in_memory) return fail("tile scale_pointer is for devices");
  if (count < 0 || count > able.statistics) return fail("%d statistics, expected 0 to %d", count, able.statistics);
  if (count > 0 && !statistics) return fail("statistics is null");
  for (int32_t i = 0; i < count; ++i)
    if (int status = check_statistic(i, statistics[i], *tile, differentiated, able)) return status;
  return 0;
}

// The same for statistics of columns: those of the rows of the transposed tile.
inline int check_across(const fl_tile* tile, const fl_statistic* statistics, int32_t count, bool differentiated,
                        const Abilities& able) {
  if (int status = check_tile(tile)) return status;
  fl_tile transposed = *tile;
  transposed.rows = tile->columns, transposed.columns = tile->rows;
  for (int32_t i = 0; i < count && statistics; ++i) {
    if (statistics[i].operand_stride) return fail("statistic %d: the operand of a column's statistic is a vector", i);
    if (statistics[i].keep) return fail("statistic %d: only statistics of rows keep exponentials", i);
  }
  return check(&transposed, statistics, count, differentiated, able);
}

// Where fl_gradient writes to. A tile without entries has nothing to write.
inline int check_out(const fl_tile& tile, const void* out, int64_t out_stride, int32_t out_dtype) {
  if (!is_dtype(out_dtype)) return fail("out_dtype %d is unknown", out_dtype);
  if (tile.rows == 0 || tile.columns == 0) return 0;
  if (!out) return fail("out is null");
  if (tile.rows > 1 && out_stride < tile.columns)
    return fail("out_stride %lld is less than the %lld columns", (long long)out_stride, (long long)tile.columns);
  const int64_t in_size = tile.dtype == FL_F32 ? 4 : 2, out_size = out_dtype == FL_F32 ? 4 : 2;
  if (out == tile.data && (out_size > in_size || (tile.rows > 1 && out_stride * out_size != tile.stride * in_size)))
    return fail("in place, out must be no wider than the tile, with the same row pitch in bytes");
  return 0;
}

// What fl_gradient_of_exponentials asks beyond `check`.
inline int check_exponentials(const fl_tile& tile, const fl_statistic* statistics, int32_t count, const fl_sums* sums) {
  if (tile.softcap != 0 || (sums && (sums->class_scale || sums->scale)))
    return fail("exponentials say nothing of a softcap, and give no class_scale and scale sums");
  if (tile.rows == 0 || tile.columns == 0) return 0;
  int kept = 0;
  for (int32_t i = 0; i < count; ++i) {
    const fl_statistic& k = statistics[i];
    kept += k.kind == FL_LOGSUMEXP && k.keep_shift;
    if (k.kind == FL_LOGSUMEXP && k.keep_block < 1)
      return fail("statistic %d: keep_block is %lld, expected 1 or more", i, (long long)k.keep_block);
    if (k.kind != FL_LOGSUMEXP && k.kind != FL_SCORE && k.kind != FL_COUNT)
      return fail("statistic %d: kind %d cannot be read off exponentials", i, k.kind);
  }
  return kept == 1 ? 0 : fail("expected one FL_LOGSUMEXP with its keep_shift, got %d", kept);
}

}  // namespace fl
