// The vector loops of differentiable sorting networks, compiled once per instruction set.
#include "networks_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "simd.h"

namespace fl {
namespace FL_ISA {
// ---- the share of a comparator, on vectors of floats and on single doubles ------------------------------------------

FL_INLINE double absolute(double x) { return std::fabs(x); }
FL_INLINE double exp(double x) { return std::exp(x); }
FL_INLINE double log(double x) { return std::log(x); }
FL_INLINE double atan(double x) { return std::atan(x); }
FL_INLINE double upper_tail(double v) { return 0.5 * std::erfc(v * M_SQRT1_2); }
FL_INLINE f32 upper_tail(f32 v) {
  for (int i = 0; i < lanes; ++i) v[i] = 0.5f * std::erfc(v[i] * (float)M_SQRT1_2);
  return v;
}

namespace {

template <class V>
struct Curve {
  V rest, density;   // 1 - F(v), F'(v)
};

template <class V, class T>
FL_INLINE Curve<V> curve(int32_t distribution, V v) {
  const V one = V{} + T(1), size = absolute(v);
  const auto positive = v > T(0);
  switch (distribution) {
    case FL_CAUCHY:
      return {T(0.5) - atan(v) * T(M_1_PI), T(M_1_PI) / (one + v * v)};
    case FL_LOGISTIC:
    case FL_LOGISTIC_PHI: {
      const V e = exp(-size), s = one / (one + e);
      return {positive ? e * s : s, e * s * s};
    }
    case FL_GAUSSIAN:
      return {upper_tail(v), exp(v * v * T(-0.5)) * T(0.3989422804014327)};
    case FL_RECIPROCAL: {
      const V s = one / (T(2) + size);
      return {positive ? s : one - s, s * s};
    }
    default: {   // FL_OPTIMAL
      const V tail = T(0.0625) / (size < T(0.25) ? V{} + T(0.25) : size);
      const auto near = size <= T(0.25);
      return {near ? T(0.5) - v : (positive ? tail : one - tail), near ? one : tail * tail * T(16)};
    }
  }
}

template <class V>
struct Share {
  V share, slope, by_steepness;
};

template <class V, class T>
FL_INLINE Share<V> share_of(const fl_network& net, V gap) {
  constexpr T infinite = std::numeric_limits<T>::infinity(), most = std::numeric_limits<T>::max();
  const V steepness = V{} + (T)net.steepness, zero{};
  V u = gap, du = V{} + T(1);
  if (net.distribution == FL_LOGISTIC_PHI) {
    const V size = absolute(gap) + T(1e-10);
    du = exp(log(size) * T(-net.art_lambda));
    u = gap * du;
    du = du * (T(1) - T(net.art_lambda) * absolute(gap) / size);
  }
  V v = steepness * u;
  v = v > most ? zero + most : v;
  v = v < -most ? zero - most : v;
  const Curve<V> at = curve<V, T>(net.distribution, v);
  const auto same = gap == infinite, other = gap == -infinite;
  return {same ? zero : (other ? zero + T(1) : at.rest), same ? zero : (other ? zero : at.density * steepness * du),
          same ? zero : (other ? zero : at.density * u)};
}

void shares(const fl_network& net, const float* gaps, int64_t count, float* share, float* slope, float* by_steepness) {
  for (int64_t i = 0; i < count; i += lanes) {
    const int n = (int)std::min<int64_t>(lanes, count - i);
    const Share<f32> s = share_of<f32, float>(net, load(gaps + i, n));
    if (share) store(share + i, s.share, n);
    if (slope) store(slope + i, s.slope, n);
    if (by_steepness) store(by_steepness + i, s.by_steepness, n);
  }
}

void shares(const fl_network& net, const double* gaps, int64_t count, double* share, double* slope,
            double* by_steepness) {
  for (int64_t i = 0; i < count; ++i) {
    const Share<double> s = share_of<double, double>(net, gaps[i]);
    if (share) share[i] = s.share;
    if (slope) slope[i] = s.slope;
    if (by_steepness) by_steepness[i] = s.by_steepness;
  }
}

// ---- channels: `width` of them, side by side on each wire -------------------------------------------------------------

template <int width, class T>
FL_INLINE void gather(const T* from, int64_t channels, int64_t first, int64_t wires, T* buffer) {
  for (int64_t i = 0; i < wires; ++i)
    for (int k = 0; k < width; ++k) buffer[i * width + k] = from[i * channels + first + k];
}

template <int width, class T>
FL_INLINE void scatter(const T* buffer, int64_t channels, int64_t first, int64_t wires, T* to) {
  for (int64_t i = 0; i < wires; ++i)
    for (int k = 0; k < width; ++k) to[i * channels + first + k] = buffer[i * width + k];
}

FL_INLINE int64_t comparator(const fl_network& net, bool transposed, int64_t step) {
  return transposed ? net.comparators - 1 - step : step;
}

// buffer through steps [step, end); where `kept` is not null, D of each is kept.
template <int width, class T>
FL_INLINE void walk(const fl_network& net, const T* share, bool transposed, int64_t step, int64_t end, T* buffer, T* kept) {
  for (; step < end; ++step) {
    const int64_t t = comparator(net, transposed, step);
    T* const low = buffer + (int64_t)net.low[t] * width;
    T* const high = buffer + (int64_t)net.high[t] * width;
    // More than half is an exchange of both, and of the rest: a small number keeps its digits.
    const bool exchange = share[t] > T(0.5);
    const T c = exchange ? T(1) - share[t] : share[t];
    T *const to_low = exchange ? high : low, *const to_high = exchange ? low : high;
    T gap[width], mixed_low[width], mixed_high[width];
    for (int k = 0; k < width; ++k) {
      gap[k] = high[k] - low[k];
      const T mixed = c * gap[k];
      mixed_low[k] = low[k] + mixed;
      mixed_high[k] = high[k] - mixed;
    }
    std::memcpy(to_low, mixed_low, sizeof mixed_low);
    std::memcpy(to_high, mixed_high, sizeof mixed_high);
    if (kept) {
      std::memcpy(kept, gap, sizeof gap);
      kept += width;
    }
  }
}

template <int width, class T>
void push_block(const fl_network& net, const Channels<T>& c, int64_t first, const T* v, T* out, T* buffer) {
  gather<width>(v, c.count, first, net.wires, buffer);
  walk<width, T>(net, c.share, c.transposed, 0, net.comparators, buffer, nullptr);
  scatter<width>(buffer, c.count, first, net.wires, out);
}

template <int width, class T>
void push_backward_block(const fl_network& net, const Channels<T>& c, int64_t first, const T* v, const T* dout, T* dv,
                         double* dshare, int64_t segment, T* buffer) {
  const int64_t size = net.wires * width, segments = (net.comparators + segment - 1) / segment;
  T *const now = buffer, *const gradient = now + size, *const starts = gradient + size,
    *const kept = starts + segments * size;
  gather<width>(v, c.count, first, net.wires, now);
  gather<width>(dout, c.count, first, net.wires, gradient);
  for (int64_t s = 0; s < segments; ++s) {
    std::memcpy(starts + s * size, now, (size_t)size * sizeof(T));
    if (s + 1 < segments) walk<width, T>(net, c.share, c.transposed, s * segment, (s + 1) * segment, now, nullptr);
  }
  for (int64_t s = segments - 1; s >= 0; --s) {
    const int64_t end = std::min(net.comparators, (s + 1) * segment);
    walk<width, T>(net, c.share, c.transposed, s * segment, end, starts + s * size, kept);
    for (int64_t step = end - 1; step >= s * segment; --step) {
      const int64_t t = comparator(net, c.transposed, step);
      T* const low = gradient + (int64_t)net.low[t] * width;
      T* const high = gradient + (int64_t)net.high[t] * width;
      const T* const gap = kept + (step - s * segment) * width;
      const T by = c.share[t];
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int k = 0; k < width; ++k) {
        const T apart = low[k] - high[k], mixed = by * apart;
        sum += apart * gap[k];
        low[k] -= mixed;
        high[k] += mixed;
      }
      dshare[t] += sum;
    }
  }
  if (dv) scatter<width>(gradient, c.count, first, net.wires, dv);
}

// act(width, first) for blocks of channels, wide ones first.
template <class Act>
FL_INLINE void each_block(int64_t first, int64_t end, Act act) {
  for (; end - first >= 32; first += 32) act(std::integral_constant<int, 32>(), first);
  for (; end - first >= 8; first += 8) act(std::integral_constant<int, 8>(), first);
  for (; first < end; ++first) act(std::integral_constant<int, 1>(), first);
}

template <class T>
void push(const fl_network& net, const Channels<T>& c, const T* v, T* out, T* buffer) {
  each_block(c.first, c.end, [&](auto width, int64_t first) { push_block<width.value>(net, c, first, v, out, buffer); });
}

template <class T>
void push_backward(const fl_network& net, const Channels<T>& c, const T* v, const T* dout, T* dv, double* dshare,
                   int64_t segment, T* buffer) {
  each_block(c.first, c.end, [&](auto width, int64_t first) {
    push_backward_block<width.value>(net, c, first, v, dout, dv, dshare, segment, buffer);
  });
}

}  // namespace

extern const NetworkRows<float> network_float = {shares, push<float>, push_backward<float>};
extern const NetworkRows<double> network_double = {shares, push<double>, push_backward<double>};

}  // namespace FL_ISA
}  // namespace fl
