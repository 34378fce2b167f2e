// What row_statistics.cpp, compiled once per instruction set, offers to fusedloss.cpp: both primitives on a range of rows.
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

struct Gradient {
  void* out;
  int64_t stride;
  int32_t dtype;
};

struct RowKernels {
  const char* name;
  void (*statistics)(const fl_tile&, const fl_statistic*, int32_t count, int64_t first_row, int64_t end_row);
  void (*gradient)(const fl_tile&, const Gradient&, const fl_statistic*, int32_t count, int64_t first_row,
                   int64_t end_row, ColumnSums&);
  void (*gradient_of_exponentials)(const fl_tile&, const fl_statistic*, int32_t count, int64_t first_row,
                                   int64_t end_row, ColumnSums&);
};

namespace portable { extern const RowKernels row_kernels; }
#if defined(FL_X86)
namespace avx2 { extern const RowKernels row_kernels; }
namespace avx512 { extern const RowKernels row_kernels; }
#endif

}  // namespace fl
