// Vectors of floats, as wide as the instruction set this file is compiled for, with the loads, stores and elementary
// functions that the row kernels need. GCC's and Clang's vector extensions: the same source serves every processor.
//
// Files that include this are compiled once per instruction set, each time with its own name for FL_ISA. Everything
// lies in that namespace and is forced inline, so that no AVX-512 code can be linked in place of a portable copy.
#pragma once
#include <math.h>
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"   // GCC 12's own intrinsics: its bug 105593
#endif
#endif

#ifndef FL_ISA
#define FL_ISA portable
#endif
#define FL_INLINE inline __attribute__((always_inline))

namespace fl {
namespace FL_ISA {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float f32 __attribute__((vector_size(4 * lanes)));
typedef int32_t i32 __attribute__((vector_size(4 * lanes)));
typedef uint32_t u32 __attribute__((vector_size(4 * lanes)));
typedef uint16_t u16 __attribute__((vector_size(2 * lanes)));
typedef int64_t i64 __attribute__((vector_size(8 * lanes)));

// Storage types: only their bits are of interest.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class To, class From>
FL_INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "same bits, another type");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class V> FL_INLINE V splat(float x) { return V{} + x; }
FL_INLINE f32 select(i32 mask, f32 a, f32 b) { return mask ? a : b; }
FL_INLINE f32 select(i32 mask, f32 a, float b) { return mask ? a : splat<f32>(b); }
FL_INLINE f32 select(i32 mask, float a, f32 b) { return mask ? splat<f32>(a) : b; }
FL_INLINE f32 absolute(f32 x) { return bits_of<f32>(bits_of<i32>(x) & 0x7fffffff); }
FL_INLINE f32 leading_bits(f32 x) { return bits_of<f32>(bits_of<i32>(x) & ~0xfff); }   // 12 of the 24
// a b + c, rounded once where the processor can. Left to the compiler, two passes over the same tile may differ.
FL_INLINE f32 multiply_add(f32 a, f32 b, f32 c) {
#if defined(__AVX512F__)
  return (f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
FL_INLINE f32 larger(f32 a, f32 b) { return a > b ? a : b; }   // b where either is NaN

FL_INLINE bool any(i32 mask) {
  uint64_t words[lanes / 2], all = 0;
  __builtin_memcpy(words, &mask, sizeof words);
  for (int i = 0; i < lanes / 2; ++i) all |= words[i];
  return all != 0;
}

// The upper half of the lanes is joined with the lower until one is left; sums in double.
template <class Number, class Join>
FL_INLINE Number join_lanes(f32 x, Join join) {
  Number part[lanes];
  for (int i = 0; i < lanes; ++i) part[i] = x[i];
#pragma GCC unroll 8
  for (int half = lanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) part[i] = join(part[i], part[i + half]);
  return part[0];
}

FL_INLINE double sum_of_lanes(f32 x) {
  return join_lanes<double>(x, [](double a, double b) { return a + b; });
}
FL_INLINE float largest_lane(f32 x) {
  return join_lanes<float>(x, [](float a, float b) { return a > b ? a : b; });
}

// ---- half precision ----------------------------------------------------------------------------------------------

FL_INLINE f32 widen(u16 x, bf16) { return bits_of<f32>(__builtin_convertvector(x, u32) << 16); }

FL_INLINE u16 narrow(f32 x, bf16) {
  u32 bits = bits_of<u32>(x);
  u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;    // to nearest, ties to even; carries into the exponent
  u32 quiet = (bits >> 16) | 0x40;                             // a NaN stays one even where its low bits go
  return __builtin_convertvector(x == x ? rounded : quiet, u16);
}

#if defined(__AVX512F__)
FL_INLINE f32 widen(u16 x, f16) { return (f32)_mm512_cvtph_ps((__m256i)x); }
FL_INLINE u16 narrow(f32 x, f16) { return (u16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
FL_INLINE f32 widen(u16 x, f16) { return (f32)_mm256_cvtph_ps((__m128i)x); }
FL_INLINE u16 narrow(f32 x, f16) { return (u16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
FL_INLINE f32 widen(u16 x, f16) {
  u32 half = __builtin_convertvector(x, u32);
  u32 sign = (half & 0x8000) << 16;
  f32 value = bits_of<f32>((half & 0x7fff) << 13) * 0x1p112f;  // moves the exponent's bias; exact, denormals too
  u32 special = bits_of<u32>((half & 0x7c00) == 0x7c00) & 0x7f800000;
  return bits_of<f32>(bits_of<u32>(value) | special | sign);
}

FL_INLINE u16 narrow(f32 x, f16) {
  u32 bits = bits_of<u32>(x), sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  // Below 2^-14 the result is denormal: adding 1/2 leaves its bits, rounded by the addition, at the bottom.
  u32 small = bits_of<u32>(bits_of<f32>(bits) + 0.5f) - bits_of<u32>(splat<f32>(0.5f));
  u32 normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  u32 half = bits < (113u << 23) ? small : normal;
  half = half > 0x7c00 ? u32{} + 0x7c00 : half;                // beyond 65504, rounded: infinity
  half = bits > 0x7f800000 ? u32{} + 0x7e00 : half;
  return __builtin_convertvector(half | sign, u16);
}
#endif

// ---- memory ------------------------------------------------------------------------------------------------------

FL_INLINE f32 load(const float* p) { f32 x; __builtin_memcpy(&x, p, sizeof x); return x; }
FL_INLINE void store(float* p, f32 x) { __builtin_memcpy(p, &x, sizeof x); }

template <class Half>
FL_INLINE f32 load(const Half* p) { u16 x; __builtin_memcpy(&x, p, sizeof x); return widen(x, Half{}); }

template <class Half>
FL_INLINE void store(Half* p, f32 x) { u16 half = narrow(x, Half{}); __builtin_memcpy(p, &half, sizeof half); }

// The first `n` lanes only: memory past a row's end is not ours to touch. The other lanes load as 0.
template <class T>
FL_INLINE f32 load(const T* p, int n) {
  if (n >= lanes) return load(p);
  T some[lanes] = {};
  for (int i = 0; i < n; ++i) some[i] = p[i];
  return load(some);
}

template <class T>
FL_INLINE void store(T* p, f32 x, int n) {
  if (n >= lanes) return store(p, x);
  T some[lanes];
  store(some, x);
  for (int i = 0; i < n; ++i) p[i] = some[i];
}

// Where the integers are the given one; of the first `n` only, the other lanes are not.
FL_INLINE i32 equal(const int64_t* p, int n, int64_t to) {
  if (n >= lanes) {
#if defined(__AVX512F__)
    const __m512i all = _mm512_set1_epi64(to);
    const __mmask8 low = _mm512_cmpeq_epi64_mask(_mm512_loadu_si512(p), all);
    const __mmask8 high = _mm512_cmpeq_epi64_mask(_mm512_loadu_si512(p + 8), all);
    return (i32)_mm512_movm_epi32(_mm512_kunpackb(high, low));
#elif defined(__AVX2__)
    const __m256i all = _mm256_set1_epi64x(to), *x = reinterpret_cast<const __m256i*>(p);
    const __m256 low = (__m256)_mm256_cmpeq_epi64(_mm256_loadu_si256(x), all);
    const __m256 high = (__m256)_mm256_cmpeq_epi64(_mm256_loadu_si256(x + 1), all);
    return (i32)_mm256_permute4x64_epi64((__m256i)_mm256_shuffle_ps(low, high, 0x88), 0xd8);
#else
    i64 x;
    __builtin_memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x == to, i32);
#endif
  }
  i32 same{};
  for (int i = 0; i < n; ++i) same[i] = p[i] == to ? -1 : 0;
  return same;
}

// body(first, n) for every vector of `columns`: n = lanes, a constant to the compiler, in all but a ragged last one.
template <class Body>
FL_INLINE void each_vector(int columns, Body body) {
  int j = 0;
  for (; j + lanes <= columns; j += lanes) body(j, lanes);
  if (j < columns) body(j, columns - j);
}

// ---- elementary functions: relative error of at most 2 units in the last place -------------------------------------

// For x <= 88, as every caller's is (scores below their maximum, minus an absolute value). Results below 2^-126 are 0,
// exp(-inf) included. x = n log 2 + r, |r| <= log(2)/2, or with a table of 2^(k/16) in a register, which saves a third
// of the multiplications, x = n log(2)/16 + r; minimax polynomials of e^r that keep its first coefficients.
// Adding 1.5 * 2^23 rounds n to an integer that then stands in the low bits. log 2 has two parts, the first exact in
// products with n also where there is no FMA.
FL_INLINE f32 exp(f32 x) {
#if defined(__AVX512F__)
  const u32 table = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
                     0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
  const float shift = 0x1.8p23f;               // entries: the bits of 2^(k/16), less k << 19, which n brings along
  f32 t = x * (16 * 1.44269504f) + shift, n = t - shift;
  f32 r = x - n * (0.693359375f / 16);
  r = r + n * (2.12194440e-4f / 16);
  u32 bits = bits_of<u32>(t);
  f32 power = bits_of<f32>((u32)_mm512_permutexvar_epi32((__m512i)bits, (__m512i)table) + (bits << 19));
  f32 q = (1.6666792333126068e-1f * r + 5.000172257423401e-1f) * r + 1.0f;
  f32 y = power * r * q + power;
#else
  const float shift = 0x1.8p23f + 127;         // the low bits come biased, as an exponent is
  f32 t = x * 1.44269504f + shift, n = t - shift;
  f32 r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  f32 p = 1.4061422552913427e-3f * r + 8.379058912396431e-3f;
  p = p * r + 4.166477173566818e-2f;
  p = p * r + 1.6666364669799805e-1f;
  p = p * r + 5.000000596046448e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  f32 y = p * bits_of<f32>(bits_of<i32>(t) << 23);
#endif
  return select(x < -87.336544f, 0.0f, y);
}

// log(1 + x) for -1/2 <= x <= 1, = 2 artanh(x / (2 + x)); nothing cancels where x is tiny.
FL_INLINE f32 log1p(f32 x) {
  f32 s = x / (x + 2.0f), y = s * s;
  f32 q = 2.4300932884216309e-1f * y + 2.1427658200263977e-1f;
  q = q * y + 2.861688435077667e-1f;
  q = q * y + 3.999887704849243e-1f;
  q = q * y + 6.666667461395264e-1f;
  return s * y * q + (s + s);
}

// log(x) for 0, normal numbers above it, infinity and NaN: x = 2^k m, m in [sqrt(1/2), sqrt(2)).
FL_INLINE f32 log(f32 x) {
  i32 bits = bits_of<i32>(x) - 0x3f3504f3, k = bits >> 23;
  f32 m = bits_of<f32>((bits & 0x7fffff) + 0x3f3504f3), n = __builtin_convertvector(k, f32);
  f32 y = n * 0.693359375f + (log1p(m - 1.0f) - n * 2.12194440e-4f);
  y = select(x == 0.0f, -INFINITY, y);
  return select(x < INFINITY, y, x);
}

// By the tangents' difference to 0, 1 or infinity, whichever is near.
FL_INLINE f32 atan(f32 x) {
  f32 u = absolute(x);
  const i32 far = u > 2.414213562f, middle = u > 0.414213562f;
  f32 start = select(far, 1.57079633f, select(middle, 0.785398163f, splat<f32>(0)));
  f32 t = select(far, -1.0f / u, select(middle, (u - 1.0f) / (u + 1.0f), u)), y = t * t;
  f32 q = 8.05374449538e-2f * y - 1.38776856032e-1f;
  q = q * y + 1.99777106478e-1f;
  q = q * y - 3.33329491539e-1f;
  f32 angle = start + (q * y * t + t);
  return bits_of<f32>(bits_of<i32>(angle) | (bits_of<i32>(x) & INT32_MIN));
}

// tanh(x), and its derivative 1 - tanh^2 without the cancellation that the formula suffers near +-1.
FL_INLINE f32 tanh(f32 x, f32& slope) {
  f32 e = exp(absolute(x) * -2.0f), d = e + 1.0f, y = x * x;
  slope = 4.0f * e / (d * d);
  f32 q = -5.717045161873102e-3f * y + 2.065058797597885e-2f;
  q = q * y - 5.374349653720856e-2f;
  q = q * y + 1.3331490755081177e-1f;
  q = q * y - 3.333328366279602e-1f;
  f32 large = bits_of<f32>(bits_of<i32>((1.0f - e) / d) | (bits_of<i32>(x) & INT32_MIN));
  return select(absolute(x) < 0.625f, x * y * q + x, large);
}

}  // namespace FL_ISA
}  // namespace fl
