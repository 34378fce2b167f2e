// The whole native surface of fusedloss on one page: plain C, raw pointers, no torch, no Python.
//
// A tile is a block of score rows in memory. Three primitives read it: fl_statistics merges it into per-row states,
// fl_column_statistics into per-column ones, fl_gradient turns it into the gradient of a loss whose derivatives in those
// statistics are given.
// Everything is caller-allocated. Status 0 is success; otherwise fl_error() says what was wrong (per thread).
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { FL_F32 = 0, FL_BF16 = 1, FL_F16 = 2, FL_F64 = 3 } fl_dtype;   // FL_F64: the sort engine alone

// Scores as stored (a) and as meant (z):
//   z_ij = class_scale_j * scale * cap(a_ij + bias_j) + class_shift_j,   cap(t) = softcap * tanh(t / softcap)
// and z = -inf where a = -inf. Null pointers and softcap = 0 leave their step out. `columns` counts this tile's columns; the first of them is
// class `first_column`; the class vectors below start at that class too. The first row is row `first_row` of the scores,
// which only statistics of columns ask for.
typedef struct {
  const void* data;          // rows x columns, row stride `stride` elements, columns contiguous
  int64_t rows, columns, stride, first_column, first_row;
  int32_t dtype;             // fl_dtype
  float softcap, scale;
  const float *bias, *class_scale, *class_shift;
  const float* scale_pointer;   // on a device: null, or where to read `scale`, which the host then need not wait for
} fl_tile;

typedef enum {               // state (doubles per row; merged into, so start from the identity)   value
  FL_SCORE = 0,              // [count]  sum of z at the wanted columns, identity 0                 z at each `at`
  FL_LOGSUMEXP = 1,          // [2] m, s: sum over e^{factor z - m}, identity (-inf, 0)             m + log s
  FL_SUM = 2,                // [1] sum of operand_j z_j (operand null: z_j), identity 0
  FL_SUM_OF_SQUARES = 3,     // [1] sum of z_j^2, identity 0
  FL_MOMENTS = 4,            // [3] count, mean, M2 = sum (z - mean)^2, identity 0, Chan's merge
  FL_EXPECTATION = 5,        // [3] m, s, t = sum e^{factor z_j - m} v_j, identity (-inf, 0, 0)     t / s
  FL_SUM_OF = 6,             // [2] sum f(u_j), sum f'(u_j) with u_j = factor (z_j - row_i), identity 0
  FL_EXTREME = 7,            // [2 count] the `count` largest factor*z (factor = +1: max, -1: min), in falling
                             //   order of factor*z, ties to the lowest column: count scores z, then count columns.
                             //   identity: z = -factor*inf, column = -1
  FL_COUNT = 8,              // [1] columns that count and whose operand_j is not 0, identity 0; no gradient
  FL_LOGSUMEXP_OF = 9,       // [3] m, s, t: sum e_j and sum e_j g'(u_j), e_j = e^{weight g(u_j) - m}, with     m + log s
                             //   u_j = factor (z_j - row_i), identity (-inf, 0, 0); columns of g = -inf are skipped
} fl_kind;

typedef enum {               // The columns that a statistic looks at: all conditions hold. Scores of -inf are always skipped.
  FL_ALL = 0,
  FL_REST = 1,               // j is not rest_i
  FL_SAME = 2,               // row_label_i = column_label_j
  FL_OTHER = 4,              // row_label_i != column_label_j
  FL_ABOVE = 8,              // not z_ij <= above_i: NaN is looked at
  FL_BELOW = 16,             // not z_ij >= below_i
} fl_where;

typedef enum {               // v_j of FL_EXPECTATION
  FL_V_OPERAND = 0,          // operand_j
  FL_V_SCORE = 1,            // z_j
  FL_V_ABSOLUTE = 2,         // |operand_j - row_i|
  FL_V_SQUARE = 3,           // (operand_j - row_i)^2
} fl_expectation;

typedef enum {               // f(u) of FL_SUM_OF
  FL_F_SOFTPLUS = 0,         // log(1 + e^u)
  FL_F_SIGMOID = 1,          // 1 / (1 + e^-u)
  FL_F_HINGE = 2,            // max(0, u)
  FL_F_SQUARED_HINGE = 3,    // max(0, u)^2
  FL_F_FOCAL = 4,            // softplus(u) * sigmoid(u)^parameter : one sigmoid focal term, u = -score of a positive
} fl_function;

typedef enum {               // g(u) of FL_LOGSUMEXP_OF
  FL_G_LOG_TANH = 0,         // log(1 + tanh u)
  FL_G_LOG_ATAN = 1,         // log(1 + atan u), skipped where atan u <= -1
  FL_G_LOG_RELU = 2,         // log max(0, 1 + u), skipped where u <= -1
  FL_G_CIRCLE = 3,           // max(0, u + parameter) (u - parameter), of derivative g'(u) = max(0, u + parameter)
} fl_log_function;

// Statistics of columns, in fl_column_statistics and as fl_gradient's `across`, are those of the rows of the transposed
// tile: what has an entry per row (rest, at, row_label, above, below, row, state, coefficient) has one per tile column,
// what has one per column (column_label, operand) one per tile row, and rest and at are rows, counted as `first_row` does.
typedef struct {
  int32_t kind, where, function;   // where: fl_where, or-ed; function: that of the kind, where it has one
  int32_t count;                   // columns wanted (FL_SCORE), k (FL_EXTREME), else 1
  double factor, parameter, weight;
  const int64_t* rest;             // rows: the column left out (FL_REST), < 0 for none; class ids, not tile columns
  const int64_t* row_label;        // rows
  const int64_t* column_label;     // columns of this tile
  const float *above, *below;      // rows
  const int64_t* at;               // FL_SCORE: class ids, row stride at_stride (0: shared by the rows); < 0: no column, z = 0
  int64_t at_stride;
  const void* operand;             // class vector (operand_stride 0) or rows x columns matrix, dtype operand_dtype
  int64_t operand_stride;
  int32_t operand_dtype;
  const float* row;                // rows: row parameter, null for 0
  double* state;                   // rows x width, contiguous. fl_gradient reads it finished (all tiles merged).
  void* keep;                      // FL_LOGSUMEXP of factor 1, statistics pass: null, or where to leave
  int64_t keep_stride;             //   e_ij = e^{z_ij - keep_shift[(j / keep_block) * rows + i]} (0 in columns left
  int32_t keep_dtype;              //   out), rows x columns; it may be the tile itself, also narrower, in place.
  int64_t keep_block;              // columns (of this tile) to a shift: on the host all of them, at most
  float* keep_shift;               //   FL_KEPT_COLUMNS; on a device 1 to FL_CUDA_KEPT_COLUMNS
  const float* coefficient;        // fl_gradient: dL/dvalue. FL_SCORE, FL_EXTREME: rows x count. FL_MOMENTS: rows x 2
                                   //   (mean, M2). Others: rows.
} fl_statistic;

// Merge the tile into every statistic's state. Rows are split statically over OpenMP threads: same bits each time.
int fl_statistics(const fl_tile* tile, const fl_statistic* statistics, int32_t count);

// The same for statistics of columns. An operand is a vector; nothing is kept. Here threads own columns.
int fl_column_statistics(const fl_tile* tile, const fl_statistic* statistics, int32_t count);

// What fl_gradient may gather beside the tile; null pointers are left out. All are added to, never cleared.
typedef struct {
  float* bias;               // columns: sum_i of dL/da_ij
  float* class_shift;        // columns: sum_i of dL/dz_ij
  float* class_scale;        // columns: sum_i of dL/dz_ij * scale * cap(a_ij + bias_j)
  double* scale;             // one number: sum_ij of dL/dz_ij * class_scale_j * cap(a_ij + bias_j)
  float* largest;            // columns: max_i |dL/da_ij| (maximised into)
} fl_sums;

// out_ij = dL/da_ij = dz/da * sum_k coefficient_k * psi_k(z_ij), over the statistics of rows and, in `across`, of columns.
// `out` may be the tile itself, also with a narrower out_dtype (same starting address and row pitch in bytes: a bf16 row
// then fills the first half of its fp32 row). Entries whose score is -inf get exactly 0; rows and columns whose
// coefficients are all 0 add exactly 0.
int fl_gradient(const fl_tile* tile, void* out, int64_t out_stride, int32_t out_dtype,
                const fl_statistic* statistics, int32_t count, const fl_statistic* across, int32_t across_count,
                const fl_sums* sums);

#define FL_KEPT_COLUMNS 2048        // to a shift, on the host
#define FL_CUDA_KEPT_COLUMNS 4096   // to a shift, on a device
#define FL_KEPT_LOGARITHM 16        // exponentials are kept up to e^16; larger ones get a keep_shift of their own

// The same from what FL_LOGSUMEXP kept, in place: tile->data holds e^{z - keep_shift} and becomes dL/da. The statistics
// are that one, and FL_SCOREs and FL_COUNTs; softcap must be 0, class_scale and scale sums are not to be had.
int fl_gradient_of_exponentials(const fl_tile* tile, const fl_statistic* statistics, int32_t count, const fl_sums* sums);

// The primitives on a CUDA device: all pointers but `tile`, `statistics` and `sums` themselves are the device's, `stream`
// is a cudaStream_t of the current device. They launch and return: nothing is allocated, nothing waits, a stream in
// capture records them. A pass takes at most FL_CUDA_STATISTICS statistics of rows and as many of columns, but no
// FL_SCORE and FL_EXTREME of columns. What they need beside their arguments the caller allocates: `workspace`, 16-byte
// aligned, of at least as many bytes as the function beside each one says, free for use again in stream order. No atomics:
// the same bits each time. fl_cuda_compiled is 0 where the library was built without nvcc; then the calls fail.
#define FL_CUDA_STATISTICS 8
int fl_cuda_compiled(void);
int64_t fl_cuda_statistics_workspace(const fl_tile* tile, const fl_statistic* statistics, int32_t count);
int fl_cuda_statistics(const fl_tile* tile, const fl_statistic* statistics, int32_t count, void* workspace,
                       int64_t workspace_bytes, void* stream);
int64_t fl_cuda_column_statistics_workspace(const fl_tile* tile, const fl_statistic* statistics, int32_t count);
int fl_cuda_column_statistics(const fl_tile* tile, const fl_statistic* statistics, int32_t count, void* workspace,
                              int64_t workspace_bytes, void* stream);
int64_t fl_cuda_gradient_workspace(const fl_tile* tile, const fl_statistic* statistics, int32_t count,
                                   const fl_statistic* across, int32_t across_count,
                                   const fl_sums* sums);   // of both gradients
int fl_cuda_gradient(const fl_tile* tile, void* out, int64_t out_stride, int32_t out_dtype,
                     const fl_statistic* statistics, int32_t count, const fl_statistic* across, int32_t across_count,
                     const fl_sums* sums, void* workspace, int64_t workspace_bytes, void* stream);
int fl_cuda_gradient_of_exponentials(const fl_tile* tile, const fl_statistic* statistics, int32_t count,
                                     const fl_sums* sums, void* workspace, int64_t workspace_bytes, void* stream);

// Of every row of a matrix the `count` columns given (rising), moved to the row's start, in place.
int fl_take_columns(void* data, int64_t rows, int64_t stride, int32_t dtype, const int64_t* columns, int64_t count);

// C (m x n, fp32, columns contiguous) = A B, or C += A B when accumulate != 0. A is m x k, B is k x n, both of `dtype`;
// of each operand's two strides one must be 1. Products and sums in fp32. Returns nonzero (use another GEMM) where
// this processor has no kernel for the dtype; fl_gemm_available asks without running.
int fl_gemm(int64_t m, int64_t n, int64_t k, const void* a, int64_t a_row, int64_t a_column,
            const void* b, int64_t b_row, int64_t b_column, float* c, int64_t c_row, int32_t dtype, int32_t accumulate);
int fl_gemm_available(int32_t dtype);

// Instruction set in use: "avx512", "avx2" or "portable". Set null to choose by the processor, or one of the names
// (tests run each). Returns nonzero where the processor lacks it.
const char* fl_isa(void);
int fl_set_isa(const char* name);
const char* fl_error(void);

#ifdef __cplusplus
}
#endif
