// One sorted list, and SoftSort of power 1 on it: e^(-|t_i - t_j| / tau) is the product of the decays between, so that its
// sums are first-order recurrences along the list and back, exact for any tau. In double, one list a thread.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "permutation.h"

namespace fl {

// One list, its arrays from its first item on.
template <class T>
struct List {
  const fl_permutation& p;
  int64_t first, items, count;   // count: of the items, those that count
  double tau;
  const T* t;
  int threads;

  template <class U> U* of(U* array, int64_t columns = 1) const { return array ? array + first * columns : nullptr; }
  // Its softmax can be taken; else what comes out is NaN.
  bool finite() const { return count == 0 || (std::isfinite(t[0]) && std::isfinite(t[count - 1]) && tau > 0); }
  double middle() const { return count ? (double)t[count / 2] : 0; }

  void fill(T* out, int64_t columns, bool all = false) const {   // NaN where asked for, 0 behind the items that count
    if (!out) return;
    if (all) std::fill(out, out + count * columns, (T)NAN);
    std::fill(out + count * columns, out + items * columns, (T)0);
  }
};

// step(at, next, decay from one to the next, whether they are equal) along the list, and then back.
template <class T, class Step>
void walk(const List<T>& list, Step step) {
  for (int64_t i = 0; i + 1 < list.count; ++i) {
    const double gap = (double)list.t[i] - (double)list.t[i + 1];
    step(i, i + 1, std::exp(-gap / list.tau), gap == 0);
  }
}
template <class T, class Step>
void walk_back(const List<T>& list, Step step) {
  for (int64_t i = list.count - 1; i > 0; --i) {
    const double gap = (double)list.t[i - 1] - (double)list.t[i];
    step(i, i - 1, std::exp(-gap / list.tau), gap == 0);
  }
}

// Over j != i, sums of e^D into mass, and of e^D (v_j - v_i) into sums; both are 0 before.
template <class T>
void scanned_sums(const List<T>& list, const T* v, double* mass, double* sums) {
  const int64_t columns = list.p.columns;
  std::vector<double> state(columns);
  double weight;
  auto step = [&](int64_t at, int64_t next, double decay, bool) {
    for (int64_t c = 0; c < columns; ++c) {
      const double change = (double)v[at * columns + c] - (double)v[next * columns + c];
      sums[next * columns + c] += state[c] = decay * (state[c] + change * (1 + weight));
    }
    mass[next] += weight = decay * (1 + weight);
  };
  auto start = [&] { weight = 0, std::fill(state.begin(), state.end(), 0.0); };
  start(), walk(list, step);
  start(), walk_back(list, step);
}

// Sums of e^D r_i, but for j's own, into sums, which are 0 before.
template <class T>
void scanned_transposed(const List<T>& list, const T* r, double* sums) {
  const int64_t columns = list.p.columns;
  std::vector<double> state(columns);
  auto step = [&](int64_t at, int64_t next, double decay, bool) {
    for (int64_t c = 0; c < columns; ++c)
      sums[next * columns + c] += state[c] = decay * (state[c] + (double)r[at * columns + c]);
  };
  walk(list, step);
  std::fill(state.begin(), state.end(), 0.0), walk_back(list, step);
}

// The derivative in t of place i is sum over j before i of d_ij - sum over j behind i, that of item j the same sums over
// places i; `strict` sums leave out what is equal, whose |t_i - t_j| has derivative 0.
template <class T>
void scanned_slopes(const List<T>& list, const T* r, const T* v, const T* deviation, double* dt, double& dtau, T* x) {
  struct Sums { double v, r, slope; };   // of K (v_o - v_own), K r_o, K r_o (v_own - v_o - deviation_o), K = e^(-|t_o - t_own| / tau)
  const int64_t columns = list.p.columns;
  std::vector<double> sums(list.count * columns);
  std::vector<Sums> state(columns), strict(columns);
  double weight, strict_weight, sign = 1;
  auto step = [&](int64_t at, int64_t next, double decay, bool equal) {
    const double before = weight;
    weight = decay * (1 + weight);
    if (!equal) strict_weight = weight;
    double slope = 0;
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t a = at * columns + c, n = next * columns + c;
      const double change = (double)v[n] - (double)v[a];
      Sums &s = state[c], &k = strict[c];
      s.slope = decay * (s.slope + change * s.r + (double)r[a] * (change - (double)deviation[a]));
      s.v = decay * (s.v - change * (1 + before));
      s.r = decay * (s.r + (double)r[a]);
      if (equal) k.slope += change * k.r, k.v -= change * strict_weight;
      else k = s;
      slope += (double)r[n] * (k.v - (double)deviation[n] * strict_weight) + k.slope;
      sums[n] += s.r;
    }
    dt[next] += sign * slope / list.tau;
  };
  auto start = [&] {
    weight = strict_weight = 0;
    std::fill(state.begin(), state.end(), Sums{}), std::fill(strict.begin(), strict.end(), Sums{});
  };
  std::fill(dt, dt + list.count, 0.0);
  start(), walk(list, step);
  sign = -1, start(), walk_back(list, step);
  for (int64_t i = 0; i < list.count * columns && x; ++i) x[i] = (T)sums[i];
  // P is a function of t / tau, and of differences of t.
  for (int64_t j = 0; j < list.count; ++j) dtau -= dt[j] * ((double)list.t[j] - list.middle()) / list.tau;
}

}  // namespace fl
