// The statistics, each one struct: phi (the terms that a score adds), merge (of two states) and psi (its derivative in
// a score). Written over the value type V: a vector of floats on the host, one float on a device.
//
// A statistic may take a pivot, a number of the block (its maximum, its mean, the largest of the statistic's own
// exponents) to which its terms are relative; the walk that includes this finds it first. Sums run in V over a block of columns and become doubles after it. Scores
// of -inf, and a row's `rest` column, are left out by the walk: no struct here knows of them.
#pragma once
#include "fusedloss.h"

#if defined(__CUDACC__) || defined(FL_CUDA_ON_HOST)
#include "device.h"
#else
#include "simd.h"
#define FL_FUNCTION FL_INLINE
#endif

namespace fl {
namespace FL_ISA {

enum class Pivot { none, maximum, mean, exponent };

// All that psi needs of a row, in floats: what the rounding of `center` lost is made good in `weight` or `offset`. Where
// the rows differ from lane to lane, psi takes a struct of vectors with these names.
struct Derivative { float weight, center, offset, level; };

// ---- how states merge ----------------------------------------------------------------------------------------------

template <int n>
struct Added {                                  // state: the sums
  static constexpr int width = n, sums = n, coefficients = 1;
  static constexpr bool has_offset = false;
  static constexpr Pivot pivot = Pivot::none;
  FL_FUNCTION static void state(double, const double* sum, double* state) {
    for (int k = 0; k < n; ++k) state[k] = sum[k];
  }
  FL_FUNCTION static void merge(double* into, const double* from) {
    for (int k = 0; k < n; ++k) into[k] += from[k];
  }
};

template <int n>
struct Exponential {                            // state: m, sums with the common factor e^-m
  static constexpr int width = n + 1, sums = n, coefficients = 1;
  static constexpr bool has_offset = false;
  static constexpr Pivot pivot = Pivot::maximum;
  FL_FUNCTION static void state(double pivot, const double* sum, double* state) {
    state[0] = pivot;
    for (int k = 0; k < n; ++k) state[k + 1] = sum[k];
  }
  FL_FUNCTION static void merge(double* into, const double* from) {
    double keep = 1, take = 1;                  // equal maxima, the common case by far, cost no exponential
    if (from[0] > into[0]) {
      keep = ::exp(into[0] - from[0]);
      into[0] = from[0];
    } else if (from[0] != into[0]) {
      take = ::exp(from[0] - into[0]);
    }
    for (int k = 1; k <= n; ++k) into[k] = into[k] * keep + from[k] * take;
  }
  // e^{factor z - S} as e^{factor z - center} correction, S rounded to center. Where no score counts, S = -inf: 0.
  FL_FUNCTION static double normalise(const double* state, Derivative& d) {
    double s = state[0] + ::log(state[1]);
    d.center = s == -INFINITY ? 0 : (float)s;
    return s == -INFINITY ? 0 : ::exp(d.center - s);
  }
};

// ---- the statistics ------------------------------------------------------------------------------------------------

template <class V>
struct LogSumExp : Exponential<1> {
  V factor;
  FL_FUNCTION LogSumExp(const fl_statistic& s, float) : factor(splat<V>(s.factor)) {}
  FL_FUNCTION void phi(V z, V, V pivot, V* term) const { term[0] = exp(factor * z - pivot); }
  FL_FUNCTION static Derivative derivative(const fl_statistic& s, const double* state, const float* c) {
    Derivative d{};
    d.weight = (float)(c[0] * s.factor * normalise(state, d));
    return d;
  }
  template <class D> FL_FUNCTION V psi(V z, V, const D& d) const { return d.weight * exp(factor * z - d.center); }
};

template <class V>
struct Sum : Added<1> {
  FL_FUNCTION Sum(const fl_statistic&, float) {}
  FL_FUNCTION void phi(V z, V v, V, V* term) const { term[0] = v * z; }
  FL_FUNCTION static Derivative derivative(const fl_statistic&, const double*, const float* c) {
    return {c[0], 0, 0, 0};
  }
  template <class D> FL_FUNCTION V psi(V, V v, const D& d) const { return d.weight * v; }
};

template <class V>
struct Count : Added<1> {
  FL_FUNCTION Count(const fl_statistic&, float) {}
  FL_FUNCTION void phi(V, V v, V, V* term) const { term[0] = select(v == 0.0f, 0.0f, splat<V>(1)); }
  FL_FUNCTION static Derivative derivative(const fl_statistic&, const double*, const float*) { return {}; }
  template <class D> FL_FUNCTION V psi(V, V, const D&) const { return splat<V>(0); }
};

template <class V>
struct SumOfSquares : Added<1> {
  FL_FUNCTION SumOfSquares(const fl_statistic&, float) {}
  FL_FUNCTION void phi(V z, V, V, V* term) const { term[0] = z * z; }
  FL_FUNCTION static Derivative derivative(const fl_statistic&, const double*, const float* c) {
    return {2 * c[0], 0, 0, 0};
  }
  template <class D> FL_FUNCTION V psi(V z, V, const D& d) const { return d.weight * z; }
};

// Chan, Golub, LeVeque (1983): the pivot is the block's mean but for rounding, which the second term makes good.
template <class V>
struct Moments {
  static constexpr int width = 3, sums = 3, coefficients = 2;
  static constexpr bool has_offset = true;
  static constexpr Pivot pivot = Pivot::mean;
  FL_FUNCTION Moments(const fl_statistic&, float) {}
  FL_FUNCTION void phi(V z, V, V pivot, V* term) const {
    V d = z - pivot;
    term[0] = splat<V>(1);
    term[1] = d;
    term[2] = d * d;
  }
  FL_FUNCTION static void state(double pivot, const double* sum, double* state) {
    double shift = sum[0] > 0 ? sum[1] / sum[0] : 0;
    state[0] = sum[0];
    state[1] = pivot + shift;
    state[2] = sum[2] - sum[1] * shift;
  }
  FL_FUNCTION static void merge(double* into, const double* from) {
    double count = into[0] + from[0];
    if (count == 0) return;
    double apart = from[1] - into[1], share = from[0] / count;
    into[2] += from[2] + apart * apart * into[0] * share;
    into[1] += apart * share;
    into[0] = count;
  }
  FL_FUNCTION static Derivative derivative(const fl_statistic&, const double* state, const float* c) {
    Derivative d{2 * c[1], (float)state[1], 0, 0};
    d.offset = state[0] > 0 ? (float)(c[0] / state[0] + d.weight * (d.center - state[1])) : 0;
    return d;
  }
  template <class D> FL_FUNCTION V psi(V z, V, const D& d) const { return d.weight * (z - d.center) + d.offset; }
};

// sum_j p_j v_j with p = softmax(factor z): derivative factor p_j (v_j - E) + p_j dv_j/dz_j.
template <class V, class Value>
struct Expectation : Exponential<2> {
  static constexpr bool has_offset = true;
  V factor, row;
  FL_FUNCTION Expectation(const fl_statistic& s, float r) : factor(splat<V>(s.factor)), row(splat<V>(r)) {}
  FL_FUNCTION void phi(V z, V v, V pivot, V* term) const {
    term[0] = exp(factor * z - pivot);
    term[1] = term[0] * Value::of(z, v, row);
  }
  FL_FUNCTION static Derivative derivative(const fl_statistic& s, const double* state, const float* c) {
    Derivative d{};
    double scale = c[0] * normalise(state, d);
    d.weight = (float)(scale * s.factor);
    d.level = (float)(state[2] / state[1]);
    d.offset = (float)(scale * Value::slope + d.weight * (d.level - state[2] / state[1]));
    return d;
  }
  template <class D> FL_FUNCTION V psi(V z, V v, const D& d) const {
    return exp(factor * z - d.center) * (d.weight * (Value::of(z, v, row) - d.level) + d.offset);
  }
};

struct OperandValue {
  static constexpr int slope = 0;               // dv/dz
  template <class V> FL_FUNCTION static V of(V, V v, V) { return v; }
};
struct ScoreValue {
  static constexpr int slope = 1;
  template <class V> FL_FUNCTION static V of(V z, V, V) { return z; }
};
struct AbsoluteValue {
  static constexpr int slope = 0;
  template <class V> FL_FUNCTION static V of(V, V v, V row) { return absolute(v - row); }
};
struct SquareValue {
  static constexpr int slope = 0;
  template <class V> FL_FUNCTION static V of(V, V v, V row) { return (v - row) * (v - row); }
};

// sum_j f(u_j) and, for the row parameter's own gradient, sum_j f'(u_j).
template <class V, class Function>
struct SumOf : Added<2> {
  V factor, row, parameter;
  FL_FUNCTION SumOf(const fl_statistic& s, float r)
      : factor(splat<V>(s.factor)), row(splat<V>(r)), parameter(splat<V>(s.parameter)) {}
  FL_FUNCTION void phi(V z, V, V, V* term) const { Function::of(factor * (z - row), parameter, term[0], term[1]); }
  FL_FUNCTION static Derivative derivative(const fl_statistic& s, const double*, const float* c) {
    return {(float)(c[0] * s.factor), 0, 0, 0};
  }
  template <class D> FL_FUNCTION V psi(V z, V, const D& d) const {
    V value, slope;
    Function::of(factor * (z - row), parameter, value, slope);
    return d.weight * slope;
  }
};

template <class V> FL_FUNCTION V softplus(V u) { return select(u > 0.0f, u, 0.0f) + log1p(exp(-absolute(u))); }
template <class V> FL_FUNCTION V sigmoid(V u) {
  V e = exp(-absolute(u));
  return select(u < 0.0f, e, splat<V>(1)) / (e + 1.0f);
}

struct Softplus {
  template <class V> FL_FUNCTION static void of(V u, V, V& value, V& slope) {
    value = softplus(u);
    slope = sigmoid(u);
  }
};
struct Sigmoid {
  template <class V> FL_FUNCTION static void of(V u, V, V& value, V& slope) {
    V e = exp(-absolute(u)), d = e + 1.0f;
    value = sigmoid(u);
    slope = e / (d * d);
  }
};
struct Hinge {
  template <class V> FL_FUNCTION static void of(V u, V, V& value, V& slope) {
    value = select(u <= 0.0f, 0.0f, u);         // so written, NaN passes
    slope = select(u <= 0.0f, 0.0f, splat<V>(1));
  }
};
struct SquaredHinge {
  template <class V> FL_FUNCTION static void of(V u, V, V& value, V& slope) {
    V above = select(u <= 0.0f, 0.0f, u);
    value = above * above;
    slope = 2.0f * above;
  }
};
struct Focal {
  template <class V> FL_FUNCTION static void of(V u, V gamma, V& value, V& slope) {
    // sigmoid^gamma = e^{gamma min(u, 0)} e^{-gamma log1p(e^-|u|)}. A large exponent rounded once would cost the power
    // its last digits: the part of u that few bits hold goes first, its product is exact for the usual gammas.
    // Below -128 softplus is 0 anyway, and the power must not become 0 * inf.
    V low = select(u < -128.0f, -128.0f, select(u > 0.0f, 0.0f, u));
    V head = leading_bits(low);
    V power = exp(gamma * head) * exp(gamma * (low - head - log1p(exp(-absolute(u)))));
    V s = sigmoid(u), p = softplus(u);
    value = p * power;
    slope = power * (s + gamma * p * sigmoid(-u));
  }
};

// log sum_j e^{weight g(u_j)} and, for the row parameter's own gradient, the sum with g'(u_j).
template <class V, class Function>
struct LogSumExpOf : Exponential<2> {
  static constexpr Pivot pivot = Pivot::exponent;
  V factor, row, parameter, weight;
  FL_FUNCTION LogSumExpOf(const fl_statistic& s, float r)
      : factor(splat<V>(s.factor)), row(splat<V>(r)), parameter(splat<V>(s.parameter)), weight(splat<V>(s.weight)) {}
  // weight g(u), -inf where the column is skipped.
  FL_FUNCTION V exponent(V z, V& slope) const {
    V g;
    Function::of(factor * (z - row), parameter, g, slope);
    return select(g == -INFINITY, -INFINITY, weight * g);
  }
  FL_FUNCTION void phi(V z, V, V pivot, V* term) const {
    V slope, x = exponent(z, slope);
    term[0] = exp(x - pivot);
    term[1] = term[0] * slope;
  }
  FL_FUNCTION static Derivative derivative(const fl_statistic& s, const double* state, const float* c) {
    Derivative d{};
    d.weight = (float)(c[0] * s.factor * s.weight * normalise(state, d));
    return d;
  }
  template <class D> FL_FUNCTION V psi(V z, V, const D& d) const {
    V slope, x = exponent(z, slope);
    return d.weight * slope * exp(x - d.center);
  }
};

struct LogTanh {
  template <class V> FL_FUNCTION static void of(V u, V, V& value, V& slope) {
    V e = exp(absolute(u) * -2.0f);             // 1 + tanh u = 2 / (1 + e^-2u)
    value = 0.693147181f + select(u > 0.0f, 0.0f, u + u) - log1p(e);
    slope = select(u > 0.0f, e + e, splat<V>(2)) / (e + 1.0f);
  }
};
struct LogAtan {
  template <class V> FL_FUNCTION static void of(V u, V, V& value, V& slope) {
    V y = atan(u) + 1.0f;
    value = select(y <= 0.0f, -INFINITY, log(select(y <= 0.0f, 1.0f, y)));
    slope = select(y <= 0.0f, 0.0f, 1.0f / (y * (u * u + 1.0f)));
  }
};
struct LogRelu {
  template <class V> FL_FUNCTION static void of(V u, V, V& value, V& slope) {
    V y = u + 1.0f;
    value = select(y <= 0.0f, -INFINITY, log(select(y <= 0.0f, 1.0f, y)));
    slope = select(y <= 0.0f, 0.0f, 1.0f / y);
  }
};
struct Circle {
  template <class V> FL_FUNCTION static void of(V u, V m, V& value, V& slope) {
    slope = select(u + m <= 0.0f, 0.0f, u + m);
    value = slope * (u - m);
  }
};

// act(the statistic's struct) for every kind that is a sum over columns; FL_SCORE and FL_EXTREME are none.
template <class V, class Act>
FL_FUNCTION void with_statistic(const fl_statistic& s, float row, Act act) {
  switch (s.kind) {
    case FL_LOGSUMEXP: return act(LogSumExp<V>(s, row));
    case FL_SUM: return act(Sum<V>(s, row));
    case FL_COUNT: return act(Count<V>(s, row));
    case FL_SUM_OF_SQUARES: return act(SumOfSquares<V>(s, row));
    case FL_MOMENTS: return act(Moments<V>(s, row));
    case FL_EXPECTATION:
      switch (s.function) {
        case FL_V_OPERAND: return act(Expectation<V, OperandValue>(s, row));
        case FL_V_SCORE: return act(Expectation<V, ScoreValue>(s, row));
        case FL_V_ABSOLUTE: return act(Expectation<V, AbsoluteValue>(s, row));
        case FL_V_SQUARE: return act(Expectation<V, SquareValue>(s, row));
      }
      return;
    case FL_SUM_OF:
      switch (s.function) {
        case FL_F_SOFTPLUS: return act(SumOf<V, Softplus>(s, row));
        case FL_F_SIGMOID: return act(SumOf<V, Sigmoid>(s, row));
        case FL_F_HINGE: return act(SumOf<V, Hinge>(s, row));
        case FL_F_SQUARED_HINGE: return act(SumOf<V, SquaredHinge>(s, row));
        case FL_F_FOCAL: return act(SumOf<V, Focal>(s, row));
      }
      return;
    case FL_LOGSUMEXP_OF:
      switch (s.function) {
        case FL_G_LOG_TANH: return act(LogSumExpOf<V, LogTanh>(s, row));
        case FL_G_LOG_ATAN: return act(LogSumExpOf<V, LogAtan>(s, row));
        case FL_G_LOG_RELU: return act(LogSumExpOf<V, LogRelu>(s, row));
        case FL_G_CIRCLE: return act(LogSumExpOf<V, Circle>(s, row));
      }
  }
}

// Doubles of state in a row.
template <class V>
FL_FUNCTION int32_t width_of(const fl_statistic& k) {
  if (k.kind == FL_SCORE) return k.count;
  if (k.kind == FL_EXTREME) return 2 * k.count;
  int32_t width = 0;
  with_statistic<V>(k, 0, [&](const auto& f) { width = f.width; });
  return width;
}

// ---- FL_EXTREME: an ordered list, not a sum ------------------------------------------------------------------------

// Puts (z, column) in its place among the `count` first by factor*z, ties to the lower column, NaN before all (as
// torch's topk has it), empty places (column -1) last.
FL_FUNCTION void insert_extreme(double* state, int32_t count, double factor, double z, double column) {
  double* columns = state + count;
  int32_t place = count;
  for (; place > 0; --place) {
    double other = state[place - 1], key = factor * z, against = factor * other;
    bool before = columns[place - 1] < 0 || (key != key && against == against) || key > against ||
                  ((key == against || (key != key && against != against)) && column < columns[place - 1]);
    if (!before) break;
    if (place < count) state[place] = other, columns[place] = columns[place - 1];
  }
  if (place < count) state[place] = z, columns[place] = column;
}

}  // namespace FL_ISA
}  // namespace fl
