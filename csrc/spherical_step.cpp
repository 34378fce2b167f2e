// The factored layer's step: E = keep I - lr S, S = 2 H^T Gamma H, and
//   U <- U E,   U^-1 <- E^-1 U^-1,   Q <- keep^2 Q - Z - Z^T,   P[class] -= lr sum alpha (H U^-1 E^-1)
// for few examples in m x m (Woodbury), for many in d x d. All of the state changes by increments.
#include "spherical.h"

#include <cmath>
#include <limits>

#include "spherical_tools.h"

namespace fl {
namespace {

constexpr double kSingular = 1e-4;   // a smaller pivot of E, as a share of 1: see steps.py

// The targets by class, without those of alpha 0.
struct Sorted {
  std::vector<int64_t> of, start;
  std::vector<Entry> entries;

  explicit Sorted(const fl_batch& b) {
    struct Target {
      int64_t of, at;
    };
    std::vector<Target> targets;
    targets.reserve(b.m * b.k);
    for (int64_t at = 0; at < b.m * b.k; ++at)
      if (b.alpha[at] != 0) targets.push_back({b.target[at], at});
    std::sort(targets.begin(), targets.end(),
              [](const Target& x, const Target& y) { return x.of != y.of ? x.of < y.of : x.at < y.at; });
    entries.reserve(targets.size());
    for (const Target& t : targets) {
      const int64_t example = t.at / b.k;
      if (of.empty() || of.back() != t.of) {
        of.push_back(t.of);
        start.push_back((int64_t)entries.size());
      } else if (entries.back().example == example) {
        entries.back().weight += b.alpha[t.at];
        continue;
      }
      entries.push_back({example, b.alpha[t.at]});
    }
    start.push_back((int64_t)entries.size());
  }
  Groups groups() const { return {(int64_t)of.size(), of.data(), start.data(), entries.data()}; }
};

// How many terms of sum_j (A / keep)^j, beside the first, are as good as the inverse of I - A / keep; 0 for too many.
template <class T>
int terms(double size) {
  double rest = size;
  for (int count = 1; count <= 5; ++count)
    if ((rest *= size) < std::numeric_limits<T>::epsilon() / 4) return count;
  return 0;
}

template <class T>
class Step {
 public:
  Step(const fl_factors& f, const fl_blas& blas, const fl_batch& b, double lr, double keep, double limit)
      : f(f), b(b), lr(lr), keep(keep), limit(limit), m(b.m), d(f.d), rows(spherical_rows<T>()), by(blas), sorted(b),
        groups(sorted.groups()), tasks(blas, (double)m * d * std::min(m, d)), h((const T*)b.h) {
    hg = room.take<T>(m * d), both = room.take<T>(m * d), small = room.take<T>(m * d);
    along = room.take<double>(m), ones = room.take<double>(m);
    of_offset = room.take<double>(d), of_mean = room.take<double>(d), of_ones = room.take<double>(d);
    of_u = room.take<double>(d), of_inverse = room.take<double>(d);
  }

  int run() { return m < d ? few() : many(); }

 private:
  // Rows of examples, and the sums over them that the vectors need.
  void weigh() {
    tasks.slice(m, [this](int64_t i, int64_t end) {
      rows.weigh(f, b, hg, both, along, i, end);
      for (int64_t e = i; e < end; ++e) {
        ones[e] = 0;
        for (int64_t j = 0; j < b.k; ++j) ones[e] += b.alpha[e * b.k + j];
        along[e] = 2 * b.gamma[e] * along[e] - ones[e] / f.n;
      }
    });
  }
  void sum() {
    tasks.slice(d, [this](int64_t c, int64_t end) {
      rows.weighted(b, d, along, of_offset, c, end);
      rows.weighted(b, d, b.t, of_mean, c, end);
      rows.weighted(b, d, ones, of_ones, c, end);
    });
  }
  void change_vectors() {
    tasks.add([this] {
      for (int64_t c = 0; c < d; ++c) {
        f.offset[c] = keep * f.offset[c] - lr * of_offset[c];
        f.mean[c] = keep * f.mean[c] - lr / f.n * of_mean[c];
      }
    });
  }

  void narrow(const double* from, T* to) {
    tasks.slice(d, [=](int64_t i, int64_t end) { rows.narrow(from + i * d, to + i * d, (end - i) * d); });
  }

  // a = A, of which `half` has the lower blocks; its slices' sums of squares.
  void mirror(const T* half, T* a, int64_t size, const T* by_column, double* squares, int64_t i, int64_t end) {
    squares[i / Tasks::height(size)] = rows.mirrored(half, a, size, Tasks::height(size), by_column, i, end);
  }

  // Is (keep I - A)^-1 a short series? If not, it is factorised, in a task.
  void prepare(T* a, int64_t size, const double* squares) {
    count = terms<T>(std::sqrt(total(squares, size)) / std::abs(keep));
    if (count > 0) return;
    factors = room.take<T>(size * size);
    pivots = room.take<int32_t>(size);
    tasks.add([=] {
      rows.scaled(a, factors, -1, size * size);
      for (int64_t i = 0; i < size; ++i) factors[i * size + i] += (T)keep;
      least = by.factorise(factors, size, pivots);
    });
  }

  // x <- (keep I - A)^-1 x, (size x d); next: as much room. Returns where it is.
  T* solve(const T* a, int64_t size, T* x, T* next) {
    if (count == 0) {
      tasks.slice(d, [=](int64_t c, int64_t end) { by.solve(factors, pivots, size, x, d, c, end); });
      tasks.run();
      return x;
    }
    const T over = (T)(1 / keep);
    T* other = count > 1 ? room.take<T>(size * d) : nullptr;
    const T* last = x;
    for (int j = 0; j < count; ++j, std::swap(next, other)) {
      // The first one makes x / keep of (x + A x / keep), the others take x from where it was.
      tasks.slice(size, [=](int64_t i, int64_t end) {
        rows.scaled(x + i * d, next + i * d, over, (end - i) * d);
        by.product('n', 'n', end - i, d, size, j == 0 ? over * over : over, a + i * size, size, last, d, 1, next + i * d,
                   d);
      });
      tasks.run();
      last = next;
    }
    return const_cast<T*>(last);
  }

  void change_gram(const T* z) {
    tasks.slice(d, [=](int64_t i, int64_t end) { rows.less(f.gram, z, d, keep * keep, i, end); });
  }

  // change = A B (d x d) of A (d x depth; where transposed, depth x d), and the sums of squares, by slices, that
  // kept x + times change will have.
  void propose(const double* x, double kept, double times, char a_is, const T* a, const T* right, int64_t depth,
               T* change, double* squares) {
    tasks.slice(d, [=](int64_t i, int64_t end) {
      by.product(a_is, 'n', end - i, d, depth, 1, a_is == 'n' ? a + i * d : a + i, d, right, d, 0, change + i * d, d);
      squares[i / Tasks::height(d)] = rows.changed(x + i * d, change + i * d, kept, times, (end - i) * d);
    });
  }
  void accept(double* x, double kept, double times, const T* change) {
    tasks.slice(d, [=](int64_t i, int64_t end) {
      rows.change(x + i * d, change + i * d, kept, times, (end - i) * d);
    });
  }

  static double total(const double* squares, int64_t size) {
    double sum = 0;
    for (int64_t i = 0; i < divide_up(size, Tasks::height(size)); ++i) sum += squares[i];
    return sum;
  }
  // Of U and its inverse as proposed.
  bool ill() const {
    const double u = std::sqrt(total(of_u, d)), inverse = std::sqrt(total(of_inverse, d)), size = u / std::sqrt(d);
    return !(u * inverse <= limit * d && size >= FL_SPHERICAL_SMALLEST && size <= FL_SPHERICAL_LARGEST);
  }

  void scatter(const T* from) {
    constexpr int64_t some = 32;
    for (int64_t g = 0; g < groups.count; g += some)
      tasks.add([=] { rows.scatter(groups, from, f, lr, g, std::min(groups.count, g + some)); });
  }

  // M (m x m) of rows first to end: the centred part of dL/dO dL/dO^T.
  void gradient_gram(const T* r, T* out, int64_t first, int64_t end) {
    rows.joined(r, out, m, ones, (double)f.n, first, end);
    for (int64_t g = 0; g < groups.count; ++g)
      for (int64_t x = groups.start[g]; x < groups.start[g + 1]; ++x) {
        const Entry& left = groups.entries[x];
        if (left.example < first || left.example >= end) continue;
        for (int64_t y = groups.start[g]; y < groups.start[g + 1]; ++y)
          out[left.example * m + groups.entries[y].example] += (T)(left.weight * groups.entries[y].weight);
      }
  }

  int few();
  int many();

  const fl_factors& f;
  const fl_batch& b;
  const double lr, keep, limit;
  const int64_t m, d;
  const SphericalRows<T>& rows;
  const Blas<T> by;
  const Sorted sorted;
  const Groups groups;
  Room room;
  Tasks tasks;
  const T* const h;
  T *hg, *both, *small;                                     // m x d: 2 gamma h, gh + yw, and room
  double *along, *ones, *of_offset, *of_mean, *of_ones;     // 2 gamma (h . offset) - ones / n, sum_k alpha; sums of h
  double *of_u, *of_inverse;                                // sums of squares, by slices
  int count = 0;                                            // terms of the series; 0: factors of keep I - A
  T* factors = nullptr;
  int32_t* pivots = nullptr;
  double least = 1;
};

template <class T>
int Step<T>::few() {
  T *const inverse = room.take<T>(d * d), *const change = room.take<T>(d * d), *const z = room.take<T>(d * d);
  T *const x = room.take<T>(m * d), *const half = room.take<T>(m * m), *const r = room.take<T>(m * m),
    *const gram = room.take<T>(m * m), *const a = room.take<T>(m * m), *const by_column = room.take<T>(m);
  double* const squares = room.take<double>(m);
  narrow(f.inverse, inverse);
  weigh();
  tasks.run();

  for (int64_t i = 0; i < m; ++i) by_column[i] = (T)(lr * 2 * b.gamma[i]);
  sum();
  tasks.slice(m, [=](int64_t i, int64_t end) {
    by.product('n', 't', end - i, end, d, 1, h + i * d, d, h, d, 0, half + i * m, m);
    by.product('n', 'n', end - i, d, d, 1, h + i * d, d, inverse, d, 0, x + i * d, d);
    by.product('n', 't', end - i, m, d, (T)0.5, both + i * d, d, hg, d, 0, r + i * m, m);
  });
  tasks.run();

  tasks.slice(m, [=](int64_t i, int64_t end) { mirror(half, a, m, by_column, squares, i, end); });
  tasks.slice(m, [=](int64_t i, int64_t end) {   // small = lr keep gh - lr^2 / 2 M h
    gradient_gram(r, gram, i, end);
    rows.scaled((const T*)b.gh + i * d, small + i * d, (T)(lr * keep), (end - i) * d);
    by.product('n', 'n', end - i, d, m, (T)(-lr * lr / 2), gram + i * m, m, h, d, 1, small + i * d, d);
  });
  tasks.run();

  prepare(a, m, squares);
  tasks.slice(d, [=](int64_t i, int64_t end) {
    by.product('t', 'n', end - i, d, m, 1, h + i, d, small, d, 0, z + i * d, d);
  });
  tasks.run();
  if (least < kSingular) return FL_SPHERICAL_ILL;

  const T* const n = solve(a, m, x, both);
  T* const of_u_change = inverse;   // the old inverse has been looked at
  propose(f.u, keep, -lr, 't', (const T*)b.hu, hg, m, of_u_change, of_u);
  propose(f.inverse, 1 / keep, lr / keep, 't', hg, n, m, change, of_inverse);
  tasks.run();
  if (ill()) return FL_SPHERICAL_ILL;

  accept(f.u, keep, -lr, of_u_change);
  accept(f.inverse, 1 / keep, lr / keep, change);
  change_gram(z);
  change_vectors();
  scatter(n);
  tasks.run();
  return 0;
}

template <class T>
int Step<T>::many() {
  T *const inverse = room.take<T>(d * d), *const u = room.take<T>(d * d), *const half = room.take<T>(d * d),
    *const a = room.take<T>(d * d), *const z = room.take<T>(d * d), *const y = room.take<T>(d * d),
    *const change = room.take<T>(d * d), *const by_column = room.take<T>(d),
    *const j = room.take<T>(groups.count * d);
  double* const squares = room.take<double>(d);
  narrow(f.inverse, inverse);
  narrow(f.u, u);
  weigh();
  constexpr int64_t some = 32;
  for (int64_t g = 0; g < groups.count; g += some)
    tasks.add([=] { rows.gather(groups, h, d, j, g, std::min(groups.count, g + some)); });
  tasks.run();

  for (int64_t i = 0; i < d; ++i) by_column[i] = (T)lr;
  sum();
  tasks.slice(d, [=](int64_t i, int64_t end) {
    by.product('t', 'n', end - i, end, m, 1, hg + i, d, h, d, 0, half + i * d, d);
    by.product('t', 'n', end - i, d, m, 1, both + i, d, h, d, 0, y + i * d, d);
    by.product('t', 'n', end - i, d, m, (T)(lr * keep), (const T*)b.gh + i, d, h, d, 0, z + i * d, d);
  });
  tasks.run();

  tasks.slice(d, [=](int64_t i, int64_t end) { mirror(half, a, d, by_column, squares, i, end); });   // A = lr S
  tasks.slice(d, [=](int64_t i, int64_t end) {   // of J^T J the blocks left of the diagonal stand for both
    const T *const ji = j + i, weight = (T)(-lr * lr / 2);
    by.product('t', 'n', end - i, i, groups.count, 2 * weight, ji, d, j, d, 1, z + i * d, d);
    by.product('t', 'n', end - i, end - i, groups.count, weight, ji, d, ji, d, 1, z + i * d + i, d);
    for (int64_t row = i; row < end; ++row)
      for (int64_t c = 0; c < d; ++c) z[row * d + c] += (T)(lr * lr / 2 / f.n * of_ones[row] * of_ones[c]);
  });
  tasks.run();

  prepare(a, d, squares);
  tasks.slice(d, [=](int64_t i, int64_t end) {
    by.product('n', 'n', end - i, d, d, (T)(-lr / 2), a + i * d, d, y, d, 1, z + i * d, d);
  });
  tasks.run();
  if (least < kSingular) return FL_SPHERICAL_ILL;

  // The new inverse, in T, is what the examples are multiplied by; the state takes its change.
  propose(f.u, keep, -1, 'n', u, a, d, change, of_u);
  const T* const n = solve(a, d, inverse, half);
  propose(f.inverse, 1 / keep, 1 / keep, 'n', a, n, d, y, of_inverse);
  tasks.slice(m, [=](int64_t i, int64_t end) {
    by.product('n', 'n', end - i, d, d, 1, h + i * d, d, n, d, 0, small + i * d, d);
  });
  tasks.run();
  if (ill()) return FL_SPHERICAL_ILL;

  accept(f.u, keep, -1, change);
  accept(f.inverse, 1 / keep, 1 / keep, y);
  change_gram(z);
  change_vectors();
  tasks.run();
  scatter(small);
  tasks.run();
  return 0;
}

template <class T>
int step(const fl_factors& f, const fl_blas& blas, const fl_batch& b, double lr, double keep, double limit) {
  return Step<T>(f, blas, b, lr, keep, limit).run();
}

}  // namespace
}  // namespace fl

extern "C" int fl_spherical_step(const fl_factors* f, const fl_blas* blas, const fl_batch* b, double lr, double keep,
                                 double limit) {
  if (int status = fl::check("step", f, blas)) return status;
  if (int status = fl::check_examples("step", f, b->m, b->k, b->target)) return status;
  if (b->m == 0) return 0;
  if (std::abs(keep) < fl::kSingular) return FL_SPHERICAL_ILL;
  try {
    return f->type == FL_SPHERICAL_FLOAT ? fl::step<float>(*f, *blas, *b, lr, keep, limit)
                                         : fl::step<double>(*f, *blas, *b, lr, keep, limit);
  } catch (const std::bad_alloc&) {
    return fl::fail("step: no memory");
  }
}
