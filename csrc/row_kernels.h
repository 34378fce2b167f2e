// What the row kernels, compiled once per instruction set, offer to fusedloss.cpp: the primitives on a range of rows or
// columns.
#pragma once
#include "fusedloss.h"

namespace fl {

constexpr int32_t most_statistics = 256;   // in one pass

// One thread's sums over its rows, as fl_sums has them; null, or wants_scale = false: not asked for.
struct ColumnSums {
  double *bias, *class_shift, *class_scale, *largest;
  double scale;
  bool wants_scale;
};

// A statistic of columns as the gradient reads it, row by row. Owned by the caller, made once for all threads.
struct Across {
  const fl_statistic* statistic;
  float *weight, *center, *offset, *level;   // of every column, `Derivative` says what; null where it picks single scores
  const int64_t *start, *entries;            // null, or of row i the entries from start[i] to start[i + 1]: columns whose
};                                           //   `rest` the row is, or what picks it: column * count + number

struct Gradient {
  void* out;
  int64_t stride;
  int32_t dtype;
};

struct RowKernels {
  const char* name;
  void (*statistics)(const fl_tile&, const fl_statistic*, int32_t count, int64_t first_row, int64_t end_row);
  void (*column_statistics)(const fl_tile&, const fl_statistic*, int32_t count, int64_t first_column,
                            int64_t end_column);
  void (*differentiate)(const Across&, int64_t first_column, int64_t end_column);   // fills in weight to level
  void (*gradient)(const fl_tile&, const Gradient&, const fl_statistic*, int32_t count, const Across*,
                   int32_t across_count, int64_t first_row, int64_t end_row, ColumnSums&);
  void (*gradient_of_exponentials)(const fl_tile&, const fl_statistic*, int32_t count, int64_t first_row,
                                   int64_t end_row, ColumnSums&);
};

namespace portable { extern const RowKernels row_kernels; }
#if defined(FL_X86)
namespace avx2 { extern const RowKernels row_kernels; }
namespace avx512 { extern const RowKernels row_kernels; }
#endif

}  // namespace fl
