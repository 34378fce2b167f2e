// fl_gemm: C = A B or C += A B with fp32 results, also from bf16 and fp16 operands, which no BLAS does fast everywhere.
//
// The plan is that of K. Goto and R. van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (ACM TOMS 34,
// 2008): slices of A and B are repacked so that a register kernel reads both in order. Packed panels consist of 32-bit
// words along k: one fp32 number (fp16 is widened while packing) or a pair of bf16 neighbours, so that all three
// dtypes share every line but the load and the multiply-add.
//
// Each number of C is summed over k in an order that depends on k alone: same inputs, same bits, for any thread count.
// bf16 products use vdpbf16ps, which always rounds to nearest even and takes denormal operands and results for zero.
#include "fusedloss.h"

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 11)

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own intrinsics: its bug 105593
#endif

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <utility>

// One target for all: of the functions below only multiply_add<FL_BF16> emits an instruction of avx512bf16.
#define FL_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define FL_INLINE FL_AVX512 inline __attribute__((always_inline))

namespace {

constexpr int64_t kLanes = 16;
// The register tile: 28 sums, 2 vectors of B and 1 number of A fill 31 of the 32 registers.
constexpr int64_t kTileRows = 14, kTileColumns = 2 * kLanes;
// Of each thread: a panel of A and one of B lie in L1, the block of A in L2, the block of C in L2 or L3.
constexpr int64_t kBlockWords = 256, kBlockRowTiles = 38, kBlockColumnTiles = 32;
constexpr int64_t kPackedPart = kBlockWords * (kTileColumns + kBlockRowTiles * kLanes);  // words: 640 KiB
constexpr double kPackingCost = 8;                                                      // a word, in multiply-adds

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The largest block not above `most` that cuts `total` evenly, so that no sliver is left at the end.
constexpr int64_t even_block(int64_t total, int64_t most) {
  return total > 0 ? divide_up(total, divide_up(total, most)) : 0;
}

FL_INLINE __mmask16 first_lanes(int64_t count) { return count >= kLanes ? 0xffff : count > 0 ? (1u << count) - 1 : 0; }

// Sixteen packed words from a matrix of each dtype: `in_depth` takes the next `count` elements along k,
// `across` takes one word (one or two elements `stride` apart, `count` are left) from each of sixteen neighbours.
template <int32_t dtype> struct Format;

template <> struct Format<FL_F32> {
  using Element = float;
  static constexpr int64_t per_word = 1;
  static FL_INLINE __m512 in_depth(const float* p, int64_t count) { return across(p, 0, 0, first_lanes(count)); }
  static FL_INLINE __m512 across(const float* p, int64_t, int64_t, __mmask16 lanes) {
    return _mm512_maskz_loadu_ps(lanes, p);
  }
};

template <> struct Format<FL_F16> {
  using Element = uint16_t;
  static constexpr int64_t per_word = 1;
  static FL_INLINE __m512 in_depth(const uint16_t* p, int64_t count) { return across(p, 0, 0, first_lanes(count)); }
  static FL_INLINE __m512 across(const uint16_t* p, int64_t, int64_t, __mmask16 lanes) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p));
  }
};

template <> struct Format<FL_BF16> {
  using Element = uint16_t;
  static constexpr int64_t per_word = 2;
  static FL_INLINE __m512 in_depth(const uint16_t* p, int64_t count) {
    const __mmask32 present = count >= 2 * kLanes ? ~0u : (1u << count) - 1;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(present, p));
  }
  static FL_INLINE __m512 across(const uint16_t* p, int64_t stride, int64_t count, __mmask16 lanes) {
    __m512i pair = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p));
    if (count > 1) {
      const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p + stride));
      pair = _mm512_or_si512(pair, _mm512_slli_epi32(second, 16));
    }
    return _mm512_castsi512_ps(pair);
  }
};

template <int32_t dtype> FL_INLINE __m512 multiply_add(__m512 sum, __m512 a, __m512 b) {
  if constexpr (dtype == FL_BF16) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  else return _mm512_fmadd_ps(a, b, sum);
}

// 16 x 16 words, in place: 4 x 4 blocks within the 128-bit lanes first, then the lanes themselves.
FL_INLINE void transpose(__m512 (&x)[kLanes]) {
  __m512 y[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(x[i], x[i + 1]));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(x[i + 2], x[i + 3]));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(x[i], x[i + 1]));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(x[i + 2], x[i + 3]));
    y[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
    y[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
    y[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
    y[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 even0 = _mm512_shuffle_f32x4(y[i], y[i + 4], 0x88);
    const __m512 odd0 = _mm512_shuffle_f32x4(y[i], y[i + 4], 0xdd);
    const __m512 even1 = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0x88);
    const __m512 odd1 = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0xdd);
    x[i] = _mm512_shuffle_f32x4(even0, even1, 0x88);
    x[i + 4] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    x[i + 8] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
    x[i + 12] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  }
}

// A or B as the packer sees it: `extent` rows of A or columns of B, `across` apart, along each of which k runs in steps
// of `depth`.
template <int32_t dtype> struct Operand {
  const typename Format<dtype>::Element* data;
  int64_t extent, across, depth;
  Operand part(int64_t begin, int64_t end) const { return {data + begin * across, end - begin, across, depth}; }
};

// Packs elements [k0, k1) of up to `vectors` * 16 rows of A or columns of B as lines of that many words.
// Lanes beyond the extent hold anything: what is computed from them is never stored. Panels to come are prefetched,
// as the hardware does not foresee short runs of many rows.
template <int32_t dtype, int vectors>
FL_AVX512 void pack(const Operand<dtype>& from, int64_t k0, int64_t k1, float* to) {
  using F = Format<dtype>;
  constexpr int64_t line = vectors * kLanes;
  const int64_t words = divide_up(k1 - k0, F::per_word);
  for (int64_t lane = 0; lane < from.extent; lane += kLanes, to += kLanes) {
    const auto* const start = from.data + lane * from.across + k0 * from.depth;
    const int64_t present = std::min(from.extent - lane, kLanes);
    if (from.depth == 1) {
      for (int64_t word = 0; word < words; word += kLanes) {
        const int64_t k = word * F::per_word, filled = std::min(words - word, kLanes);
        __m512 block[kLanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) {
          const auto* const at = start + std::min(i, present - 1) * from.across + k;
          block[i] = F::in_depth(at, k1 - k0 - k);
          _mm_prefetch(at + line * from.across, _MM_HINT_T1);
        }
        transpose(block);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i)
          if (i < filled) _mm512_store_ps(to + (word + i) * line, block[i]);
      }
    } else {
      const __mmask16 lanes = first_lanes(present);
      for (int64_t word = 0, k = 0; word < words; ++word, k += F::per_word) {
        const auto* const at = start + k * from.depth;
        _mm512_store_ps(to + word * line, F::across(at, from.depth, k1 - k0 - k, lanes));
        for (int64_t i = 0; i < F::per_word; ++i) _mm_prefetch(at + i * from.depth + 2 * kLanes, _MM_HINT_T1);
      }
    }
  }
}

// One tile of C from a panel of A and one of B.
template <int32_t dtype, int rows>
FL_AVX512 void multiply(int64_t words, const float* a, const float* b, float* c, int64_t c_row, int64_t columns,
                        bool add) {
  __m512 sum[rows][2];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    _mm_prefetch(c + i * c_row, _MM_HINT_T0);
    _mm_prefetch(c + i * c_row + columns - 1, _MM_HINT_T0);
  }
  for (int64_t word = 0; word < words; ++word, a += kLanes, b += kTileColumns) {
    const __m512 left = _mm512_load_ps(b), right = _mm512_load_ps(b + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      __m512 number = _mm512_set1_ps(a[i]);
      __asm__("" : "+v"(number));  // one load for both products, or the load ports would be the limit
      sum[i][0] = multiply_add<dtype>(sum[i][0], number, left);
      sum[i][1] = multiply_add<dtype>(sum[i][1], number, right);
    }
  }
  const __mmask16 mask[2] = {first_lanes(columns), first_lanes(columns - kLanes)};
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float* const at = c + i * c_row + half * kLanes;
      if (add) sum[i][half] = _mm512_add_ps(sum[i][half], _mm512_maskz_loadu_ps(mask[half], at));
      _mm512_mask_storeu_ps(at, mask[half], sum[i][half]);
    }
  }
}

using Kernel = void (*)(int64_t, const float*, const float*, float*, int64_t, int64_t, bool);

template <int32_t dtype, size_t... i> constexpr std::array<Kernel, sizeof...(i)> kernels_of(std::index_sequence<i...>) {
  return {multiply<dtype, i + 1>...};
}

constexpr int64_t row_tiles(int64_t m) { return divide_up(m, kTileRows); }
constexpr int64_t column_tiles(int64_t n) { return divide_up(n, kTileColumns); }

// One thread's product. `packed` has room for a panel of B and a block of A.
template <int32_t dtype>
void multiply_part(const Operand<dtype>& a, const Operand<dtype>& b, int64_t k, float* c, int64_t c_row,
                   bool accumulate, float* packed) {
  static constexpr auto kernels = kernels_of<dtype>(std::make_index_sequence<kTileRows>());
  constexpr int64_t per_word = Format<dtype>::per_word;
  const int64_t block_rows = even_block(row_tiles(a.extent), kBlockRowTiles) * kTileRows;
  const int64_t block_columns = even_block(column_tiles(b.extent), kBlockColumnTiles) * kTileColumns;
  const int64_t block_k = even_block(divide_up(k, per_word), kBlockWords) * per_word;
  float* const packed_b = packed;
  float* const packed_a = packed + kBlockWords * kTileColumns;

  for (int64_t column0 = 0; column0 < b.extent; column0 += block_columns)
    for (int64_t row0 = 0; row0 < a.extent; row0 += block_rows)
      for (int64_t k0 = 0; k0 < k; k0 += block_k) {  // innermost: this block of C stays in cache
        const int64_t row1 = std::min(a.extent, row0 + block_rows), k1 = std::min(k, k0 + block_k);
        const int64_t column1 = std::min(b.extent, column0 + block_columns), words = divide_up(k1 - k0, per_word);
        float* to = packed_a;
        for (int64_t row = row0; row < row1; row += kTileRows, to += words * kLanes)
          pack<dtype, 1>(a.part(row, std::min(row1, row + kTileRows)), k0, k1, to);
        for (int64_t column = column0; column < column1; column += kTileColumns) {
          const int64_t columns = std::min(column1 - column, kTileColumns);
          pack<dtype, 2>(b.part(column, column + columns), k0, k1, packed_b);
          const float* panel = packed_a;
          for (int64_t row = row0; row < row1; row += kTileRows, panel += words * kLanes)
            kernels[std::min(row1 - row, kTileRows) - 1](words, panel, packed_b, c + row * c_row + column, c_row,
                                                         columns, accumulate || k0 > 0);
        }
      }
}

// How many parts the rows and the columns of C are cut into, one pair of them per thread. No thread waits for another:
// those with the same rows each pack them, which costs little, and far less than barriers do on a busy machine.
struct Grid {
  int64_t rows = 1, columns = 1;
  Grid(int64_t m, int64_t n, int64_t threads) {
    double least = 0;
    for (int64_t r = 1; r <= threads; ++r) {
      const double height = divide_up(row_tiles(m), r) * kTileRows;
      const double width = divide_up(column_tiles(n), threads / r) * kTileColumns;
      const double cost = height * width + kPackingCost * (height + width);
      if (r == 1 || cost < least) least = cost, rows = r, columns = threads / r;
    }
  }
};

// Room for the packed panels of a team; kept from call to call, freed when the calling thread ends.
struct Workspace {
  float* data = nullptr;
  int64_t parts = 0;
  ~Workspace() { std::free(data); }

  float* at_least(int64_t wanted) {
    if (wanted > parts) {
      std::free(data);
      data = static_cast<float*>(std::aligned_alloc(64, size_t(wanted * kPackedPart) * sizeof(float)));
      parts = data ? wanted : 0;
    }
    return data;
  }
};
thread_local Workspace workspace;

template <int32_t dtype>
int product(int64_t m, int64_t n, int64_t k, const void* a, int64_t a_row, int64_t a_column, const void* b,
            int64_t b_row, int64_t b_column, float* c, int64_t c_row, bool accumulate) {
  using Element = typename Format<dtype>::Element;
  const Operand<dtype> left{static_cast<const Element*>(a), m, a_row, a_column};
  const Operand<dtype> right{static_cast<const Element*>(b), n, b_column, b_row};
  const bool worth_a_team = double(m) * double(n) * double(k) > 1e6;
  const Grid grid(m, n, worth_a_team ? omp_get_max_threads() : 1);
  const int64_t parts = grid.rows * grid.columns;
  float* const packed = workspace.at_least(parts);
  if (!packed) return 1;

#pragma omp parallel for schedule(static) if (parts > 1)
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t y = p / grid.columns, x = p % grid.columns;
    const int64_t row0 = row_tiles(m) * y / grid.rows * kTileRows;
    const int64_t row1 = std::min(m, row_tiles(m) * (y + 1) / grid.rows * kTileRows);
    const int64_t column0 = column_tiles(n) * x / grid.columns * kTileColumns;
    const int64_t column1 = std::min(n, column_tiles(n) * (x + 1) / grid.columns * kTileColumns);
    multiply_part<dtype>(left.part(row0, row1), right.part(column0, column1), k, c + row0 * c_row + column0, c_row,
                         accumulate, packed + p * kPackedPart);
  }
  return 0;
}

}  // namespace

extern "C" int fl_gemm_available(int32_t dtype) {
  static const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool bf16 = wide && __builtin_cpu_supports("avx512bf16");
  return dtype == FL_BF16 ? bf16 : (dtype == FL_F32 || dtype == FL_F16) && wide;
}

extern "C" int fl_gemm(int64_t m, int64_t n, int64_t k, const void* a, int64_t a_row, int64_t a_column, const void* b,
                       int64_t b_row, int64_t b_column, float* c, int64_t c_row, int32_t dtype, int32_t accumulate) {
  if (!fl_gemm_available(dtype) || (a_row != 1 && a_column != 1) || (b_row != 1 && b_column != 1)) return 1;
  if (m <= 0 || n <= 0) return 0;
  if (k <= 0) {
    for (int64_t i = 0; i < m && !accumulate; ++i) std::memset(c + i * c_row, 0, size_t(n) * sizeof(float));
    return 0;
  }
  const auto run = dtype == FL_BF16 ? product<FL_BF16> : dtype == FL_F16 ? product<FL_F16> : product<FL_F32>;
  return run(m, n, k, a, a_row, a_column, b, b_row, b_column, c, c_row, accumulate != 0);
}

#else  // no AVX-512 to compile for

extern "C" int fl_gemm_available(int32_t) { return 0; }

extern "C" int fl_gemm(int64_t, int64_t, int64_t, const void*, int64_t, int64_t, const void*, int64_t, int64_t, float*,
                       int64_t, int32_t, int32_t) {
  return 1;
}

#endif
