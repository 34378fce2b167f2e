// The four losses as functions of centred statistics, row by row: fusedloss/losses/centred.py and its four files.
// For spherical_rows.cpp, once per instruction set.
#pragma once
#include <math.h>

#include "spherical.h"

namespace fl {
namespace FL_ISA {

// One row: its statistics, what each of its k targets counts, and where derivatives in `hit` go.
struct Row {
  const double* hit;
  const double* share;
  double* alpha;
  int64_t k;
  double mean, squares, count;
};

struct Derivatives {
  double loss, t, gamma;
};

inline double sigmoid(double x) { return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x)); }
inline double softplus(double x) { return (x > 0 ? x : 0) + log1p(exp(-fabs(x))); }

inline Derivatives squared(const Row& r, double value, double k, bool mean_over_classes) {
  const double over = mean_over_classes ? r.count : 1;
  double all = 0, there = 0, sum = 0;
  Derivatives out{};
  for (int64_t i = 0; i < r.k; ++i) {
    const double at = r.hit[i] + r.mean, share = r.share[i] / over;
    all += r.share[i];
    there += r.share[i] > 0;
    out.loss += share * (k * (at - value) * (at - value) - at * at);
    sum += r.alpha[i] = 2 * share * (k * (at - value) - at);
  }
  out.gamma = all / (there > 1 ? there : 1) / over;
  out.loss += out.gamma * (r.squares + r.count * r.mean * r.mean);
  out.t = sum + 2 * r.count * r.mean * out.gamma;
  return out;
}

// sum_k share_k log(T / f_k): `term` writes f_k and f'_k of a score.
template <class Term>
Derivatives of_quotient(const Row& r, double total, double per_mean, double per_squares, Term term) {
  double all = 0, sum = 0, f, slope;
  Derivatives out{};
  for (int64_t i = 0; i < r.k; ++i) {
    term(r.hit[i] + r.mean, f, slope);
    all += r.share[i];
    out.loss += r.share[i] * log1p((total - f) / f);
    sum += r.alpha[i] = -r.share[i] * slope / f;
  }
  out.t = sum + all / total * per_mean;
  out.gamma = all / total * per_squares;
  return out;
}

inline Derivatives softmax(const Row& r, double eps) {
  return of_quotient(r, r.squares + r.count * (r.mean * r.mean + eps), 2 * r.count * r.mean, 1,
                     [=](double s, double& f, double& slope) { f = s * s + eps, slope = 2 * s; });
}

inline Derivatives taylor(const Row& r) {
  const auto polynomial = [](double s) { return ((1 + s) * (1 + s) + 1) / 2; };
  return of_quotient(r, r.count * polynomial(r.mean) + r.squares / 2, r.count * (1 + r.mean), 0.5,
                     [=](double s, double& f, double& slope) { f = polynomial(s), slope = 1 + s; });
}

inline Derivatives z_loss(const Row& r, double a, double b, double eps) {
  const double variance = r.squares / r.count;
  const bool varied = variance > eps * eps;
  const double deviation = varied ? sqrt(variance) : 1;
  double along = 0;
  Derivatives out{};
  for (int64_t i = 0; i < r.k; ++i) {
    const double zeta = varied ? r.hit[i] / deviation : 0, slope = -r.share[i] * sigmoid(a * (b - zeta));
    r.alpha[i] = varied ? slope / deviation : 0;
    along += slope * zeta;
    out.loss += r.share[i] * softplus(a * (b - zeta));
  }
  out.loss /= a;
  out.gamma = -along / (2 * (varied ? r.squares : 1));
  return out;
}

inline Derivatives derivatives(int32_t loss, const double* p, const Row& row) {
  switch (loss) {
    case FL_SPHERICAL_SQUARED: return squared(row, p[0], p[1], p[2] != 0);
    case FL_SPHERICAL_SOFTMAX: return softmax(row, p[0]);
    case FL_SPHERICAL_TAYLOR: return taylor(row);
    default: return z_loss(row, p[0], p[1], p[2]);
  }
}

}  // namespace FL_ISA
}  // namespace fl
