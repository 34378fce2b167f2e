// The rows of sparsemax and entmax: the largest score, then the few scores near it that can have p > 0, then Newton's
// method on those, in double. No sort; a row whose scores are all near its largest one costs some more passes over it.
#include "threshold.h"

#include "simd.h"

namespace fl {
namespace FL_ISA {
namespace {

// ---- one type of scores -------------------------------------------------------------------------------------------

FL_INLINE double number(double x) { return x; }
FL_INLINE double number(float x) { return (double)x; }
FL_INLINE double number(bf16 x) { return (double)bits_of<float>((uint32_t)x.bits << 16); }
FL_INLINE double number(f16 x) { return (double)load(&x, 1)[0]; }

// The largest score; NaN where there is one.
FL_INLINE double largest(const double* z, int64_t n) {
  double top = -INFINITY;
  int64_t wrong = 0;
#pragma omp simd reduction(max : top) reduction(+ : wrong)
  for (int64_t j = 0; j < n; ++j) {
    top = z[j] > top ? z[j] : top;
    wrong += z[j] != z[j];
  }
  return wrong ? NAN : top;
}

template <class T>
FL_INLINE double largest(const T* z, int64_t n) {
  constexpr int together = 4;
  f32 part[together];
  i32 wrong{};
  for (int k = 0; k < together; ++k) part[k] = splat<f32>(-INFINITY);
  int64_t j = 0;
  for (; j + together * lanes <= n; j += together * lanes)
#pragma GCC unroll 4
    for (int k = 0; k < together; ++k) {
      const f32 x = load(z + j + k * lanes);
      wrong |= x != x;
      part[k] = larger(x, part[k]);
    }
  bool bad = any(wrong);
  float top = largest_lane(larger(larger(part[0], part[1]), larger(part[2], part[3])));
  for (; j < n; ++j) {
    const float x = (float)number(z[j]);
    bad |= x != x;
    top = x > top ? x : top;
  }
  return bad ? (double)NAN : (double)top;
}

// Places of scores >= bound; returns how many. Room for n + lanes places.
FL_INLINE int64_t collect(const double* z, int64_t n, double bound, int32_t* places) {
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j) {
    places[count] = (int32_t)j;
    count += z[j] >= bound;
  }
  return count;
}

template <class T>
FL_INLINE int64_t collect(const T* z, int64_t n, double exact, int32_t* places) {
  float below = (float)exact;
  if ((double)below > exact) below = nextafterf(below, -INFINITY);
  const f32 bound = splat<f32>(below);
  int64_t count = 0, j = 0;
  for (; j + lanes <= n; j += lanes) {
    const i32 near = load(z + j) >= bound;
#if defined(__AVX512F__)
    const __mmask16 mask = _mm512_movepi32_mask((__m512i)near);
    if (mask == 0) continue;
    const __m512i at = _mm512_add_epi32(_mm512_set1_epi32((int32_t)j),
                                        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    _mm512_storeu_si512(places + count, _mm512_maskz_compress_epi32(mask, at));
    count += __builtin_popcount(mask);
#else
    if (!any(near)) continue;
    for (int k = 0; k < lanes; ++k) {
      places[count] = (int32_t)(j + k);
      count -= near[k];
    }
#endif
  }
  for (; j < n; ++j) {
    places[count] = (int32_t)j;
    count += number(z[j]) >= (double)below;
  }
  return count;
}

FL_INLINE void put(double* out, double x) { *out = x; }
FL_INLINE void put(float* out, double x) { *out = (float)x; }
template <class Half>
FL_INLINE void put(Half* out, double x) { store(out, splat<f32>((float)x), 1); }

template <class T>
FL_INLINE void scatter(T* out, const int32_t* places, const double* x, int64_t count, double factor) {
  for (int64_t k = 0; k < count; ++k) put(out + places[k], factor * x[k]);
}

template <class Half>
FL_INLINE void scatter_half(Half* out, const int32_t* places, const double* x, int64_t count, double factor) {
  for (int64_t k = 0; k < count; k += lanes) {
    const int n = count - k < lanes ? (int)(count - k) : lanes;
    float wide[lanes] = {};
    Half narrow[lanes];
    for (int i = 0; i < n; ++i) wide[i] = (float)(factor * x[k + i]);
    store(narrow, load(wide));
    for (int i = 0; i < n; ++i) out[places[k + i]] = narrow[i];
  }
}
FL_INLINE void scatter(bf16* out, const int32_t* places, const double* x, int64_t count, double factor) {
  scatter_half(out, places, x, count, factor);
}
FL_INLINE void scatter(f16* out, const int32_t* places, const double* x, int64_t count, double factor) {
  scatter_half(out, places, x, count, factor);
}

// ---- the threshold ------------------------------------------------------------------------------------------------

struct Above {
  double count, first, second, least;   // of d = u - t > 0: how many, sum d, sum d^2, min d
};

FL_INLINE Above above(const double* u, int64_t n, double t) {
  double count = 0, first = 0, second = 0, least = INFINITY;
#pragma omp simd reduction(+ : count, first, second) reduction(min : least)
  for (int64_t k = 0; k < n; ++k) {
    const double d = u[k] - t, in = d > 0 ? d : 0, far = d > 0 ? d : INFINITY;
    count += d > 0 ? 1.0 : 0.0;
    first += in;
    second += in * in;
    least = far < least ? far : least;
  }
  return {count, first, second, least};
}

// sum [u - t]_+^e = 1 for t, where the largest u is 0. The left side F falls from at least 1 at t = -1 to 0 at t = 0, and
// F^(1/e) is convex: Newton's steps stay to the left of the solution. With the right support the equation is linear, or
// quadratic, in t, and its solution is taken where no entry would leave the support on the way. Halving the interval
// after some steps bounds their number whatever the scores are.
FL_INLINE double threshold(const double* u, int64_t n, bool square) {
  constexpr int alone = 8, most = 128;
  double t = -1, right = 0;
  for (int step = 0; step < most; ++step) {
    const Above m = above(u, n, t);
    double exact = (m.first - 1) / m.count, newton = exact;
    if (square) {
      const double root = m.first * m.first - m.count * (m.second - 1), norm = sqrt(m.second);
      exact = root >= 0 ? (m.second - 1) / (m.first + sqrt(root)) : INFINITY;
      newton = (norm - 1) * norm / m.first;
    }
    if (exact < m.least) return t + exact;
    const double next = t + newton;
    if (!(next > t)) return t;
    t = next;
    if (step < alone) continue;
    const double middle = t + (right - t) / 2;
    const Above half = above(u, n, middle);
    ((square ? half.second : half.first) >= 1 ? t : right) = middle;
  }
  return t;
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// The loss from r = [u - t]_+ of the candidates, u of the target and its r.
FL_INLINE double loss_of(const double* r, const int32_t* places, int64_t count, int64_t target, double own, double beyond,
                         bool square) {
  double squares = 0, sum = 0;   // sum r^2 and sum r (sparsemax) or r^3, over all but the target
#pragma omp simd reduction(+ : squares, sum)
  for (int64_t k = 0; k < count; ++k) {
    const double x = places[k] == (int32_t)target ? 0.0 : r[k];
    squares += x * x;
    sum += square ? x * x * x : x;
  }
  if (!square) return (sum * sum + squares) / 2 + beyond;   // 1 - p_y is the others' sum
  const double rest = squares / (1 + own);                  // 1 - r_y
  return (rest * rest * (2 + own) + sum) * 2 / 3 + 2 * beyond;
}

template <class T, class Out>
void row(const fl_threshold& t, const ThresholdLoss& l, int64_t i, const T* z, Out* out, int64_t n, char* scratch) {
  const bool square = t.kind == FL_ENTMAX15, lossy = l.target != nullptr;
  const double scale = square ? 0.5 : 1.0, top = largest(z, n), factor = lossy && l.factor ? l.factor[i] : 1.0;
  const int64_t y = lossy ? l.target[i] : -1;
  double* const u = reinterpret_cast<double*>(scratch);
  int32_t* const places = reinterpret_cast<int32_t*>(u + n + 8);
  if (top != top || top == -INFINITY) {
    if (lossy) l.losses[i] = top != top ? NAN : INFINITY;
    const double all = top != top && factor != 0 ? NAN : 0;
    for (int64_t j = 0; out && j < n; ++j) put(out + j, all);
    return;
  }
  const int64_t count = collect(z, n, top - 1 / scale, places);
  for (int64_t k = 0; k < count; ++k) {
    const double x = number(z[places[k]]);
    u[k] = x == top ? 0 : (x - top) * scale;
  }
  const double at = threshold(u, count, square), hit = lossy ? number(z[y]) : 0;
  for (int64_t k = 0; k < count; ++k) u[k] = u[k] > at ? u[k] - at : 0;
  if (lossy) {
    const double own = hit == top ? -at : (hit - top) * scale - at;
    l.losses[i] = loss_of(u, places, count, y, own > 0 ? own : 0, own < 0 ? -own : 0, square);
  }
  if (!out) return;
  double others = 0;   // 1 - p of the target
  for (int64_t k = 0; k < count; ++k) {
    u[k] = square ? u[k] * u[k] : u[k];
    others += places[k] == (int32_t)y ? 0 : u[k];
  }
  __builtin_memset(out, 0, (size_t)n * sizeof(Out));
  if (factor == 0) return;
  scatter(out, places, u, count, factor);
  if (lossy && hit != -INFINITY) put(out + y, -factor * others);
}

template <class T, class Out>
void rows(const fl_threshold& t, const ThresholdLoss& l, int64_t first, int64_t end, char* scratch) {
  const fl_lists& lists = t.lists;
  for (int64_t i = first; i < end; ++i) {
    const int64_t from = lists.offsets ? lists.offsets[i] : i * t.stride;
    const int64_t to = lists.offsets ? lists.offsets[i] : i * t.out_stride;
    const int64_t n = lists.offsets ? lists.offsets[i + 1] - from : lists.width;
    row(t, l, i, static_cast<const T*>(t.scores) + from, t.out ? static_cast<Out*>(t.out) + to : nullptr, n, scratch);
  }
}

template <class T>
void rows_to(const fl_threshold& t, const ThresholdLoss& l, int64_t first, int64_t end, char* scratch) {
  switch (t.out_dtype) {
    case FL_F32: return rows<T, float>(t, l, first, end, scratch);
    case FL_BF16: return rows<T, bf16>(t, l, first, end, scratch);
    case FL_F16: return rows<T, f16>(t, l, first, end, scratch);
    default: return rows<T, double>(t, l, first, end, scratch);
  }
}

void all_rows(const fl_threshold& t, const ThresholdLoss& l, int64_t first, int64_t end, char* scratch) {
  switch (t.dtype) {
    case FL_F32: return rows_to<float>(t, l, first, end, scratch);
    case FL_BF16: return rows_to<bf16>(t, l, first, end, scratch);
    case FL_F16: return rows_to<f16>(t, l, first, end, scratch);
    default: return rows_to<double>(t, l, first, end, scratch);
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Over the support, with weights w = 1 (sparsemax) or sqrt(p): dz = w (g - sum w g / sum w).
FL_INLINE void backward_row(const double* p, const double* g, double* out, int64_t n, bool square) {
  double weights = 0, sum = 0;
#pragma omp simd reduction(+ : weights, sum)
  for (int64_t j = 0; j < n; ++j) {
    const double w = p[j] == 0 ? 0.0 : square ? sqrt(p[j]) : p[j] == p[j] ? 1.0 : p[j];
    weights += w;
    sum += p[j] == 0 ? 0.0 : w * g[j];
  }
  const double mean = weights == 0 ? 0 : sum / weights;
  for (int64_t j = 0; j < n; ++j) {
    const double w = p[j] == 0 ? 0.0 : square ? sqrt(p[j]) : p[j] == p[j] ? 1.0 : p[j];
    out[j] = p[j] == 0 ? 0.0 : w * (g[j] - mean);
  }
}

template <class T>
FL_INLINE void backward_row(const T* p, const T* g, T* out, int64_t n, bool square) {
  double weights = 0, sum = 0;
  auto weight = [square](f32 p) {
    f32 w;
    for (int k = 0; k < lanes; ++k) w[k] = sqrtf(p[k]);
    return square ? w : select(p == p, select(p == 0.0f, 0.0f, splat<f32>(1)), p);
  };
  constexpr int64_t block = 512;   // float sums of so many, then double
  for (int64_t b = 0; b < n; b += block) {
    f32 weights_here{}, sum_here{};
    each_vector((int)(n - b < block ? n - b : block), [&](int j, int count) {
      const f32 x = load(p + b + j, count), w = weight(x);
      weights_here += w;
      sum_here += select(x == 0.0f, 0.0f, w * load(g + b + j, count));
    });
    weights += sum_of_lanes(weights_here);
    sum += sum_of_lanes(sum_here);
  }
  const float mean = weights == 0 ? 0 : (float)(sum / weights);
  for (int64_t b = 0; b < n; b += block)
    each_vector((int)(n - b < block ? n - b : block), [&](int j, int count) {
      const f32 x = load(p + b + j, count);
      store(out + b + j, select(x == 0.0f, 0.0f, weight(x) * (load(g + b + j, count) - mean)), count);
    });
}

template <class T>
void backward_rows(const fl_threshold& t, const void* g, int64_t first, int64_t end) {
  for (int64_t i = first; i < end; ++i) {
    const int64_t from = t.lists.offsets ? t.lists.offsets[i] : i * t.stride;
    const int64_t to = t.lists.offsets ? from : i * t.out_stride;
    const int64_t n = t.lists.offsets ? t.lists.offsets[i + 1] - from : t.lists.width;
    backward_row(static_cast<const T*>(t.scores) + from, static_cast<const T*>(g) + from, static_cast<T*>(t.out) + to, n,
                 t.kind == FL_ENTMAX15);
  }
}

void backward(const fl_threshold& t, const void* g, int64_t first, int64_t end) {
  switch (t.dtype) {
    case FL_F32: return backward_rows<float>(t, g, first, end);
    case FL_BF16: return backward_rows<bf16>(t, g, first, end);
    case FL_F16: return backward_rows<f16>(t, g, first, end);
    default: return backward_rows<double>(t, g, first, end);
  }
}

}  // namespace

extern const ThresholdRows threshold_rows = {all_rows, backward};

}  // namespace FL_ISA
}  // namespace fl
