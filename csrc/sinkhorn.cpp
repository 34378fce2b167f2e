// NeuralNDCG on the CPU: threads over lists, or over the rows of P of few long ones. Sums over rows are cut in the same
// way either way, so that no result depends on the number of threads.
//
// Why a band is enough: below its peak at j = i, row i of the logits falls at least as fast as gaps times distances do,
// and the scalings that Sinkhorn finds stay between 1/n and n of one another (measured: 1/50 to 300 of n = 1000 normal,
// exponential, Cauchy and clustered scores, tau from 0.01 to 100). What is cut away at e^-24 was 4e-12 of all of P, far
// below what fp32 can see; at e^-48, for fp64, 1e-22. That P_ii is its row's largest entry, at least 1/n, keeps all sums
// of rows and columns within 1/n and n: the published code's clamp of denominators at 1e-10 never acts.
#include "sinkhorn.h"

#include <omp.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "arguments.h"
#include "room.h"
#include "sinkhorn_rows.h"
#include "sort_core.h"

namespace fl {
namespace {

constexpr int64_t kPiece = 16;                      // blocks whose sums over rows are taken together
constexpr int64_t kStored = int64_t(8) << 20;       // bytes of P to keep; of more, reading costs what computing does
constexpr int64_t kLong = 2048;                     // lists that are worth several threads
constexpr int64_t kMany = int64_t(1) << 14;         // entries of all P that are

template <class T> double cutoff_of() { return sizeof(T) == 4 ? 24 : 48; }
inline int64_t round_up(int64_t x, int64_t to) { return divide_up(x, to) * to; }

// One list: what the steps share.
template <class T>
class Relaxed {
 public:
  Relaxed(Room& room, const double* scores, int64_t n, double tau, bool threads)
      : rows_(sinkhorn_rows<T>()), room_(room), threads_(threads) {
    band_.n = n, band_.padded = round_up(n, kAlign), band_.blocks = divide_up(n, kBlock);
    band_.inverse_tau = 1 / tau, band_.cutoff = cutoff_of<T>();
    lay_scores(scores);
    lay_band();
    pieces_ = divide_up(band_.blocks, kPiece);
    int64_t all = 0;
    start_ = room.take<int64_t>(pieces_);
    for (int64_t piece = 0; piece < pieces_; ++piece) {
      start_[piece] = band_.padded + all - band_.low[first(piece)];
      all += band_.high[last(piece)] - band_.low[first(piece)];
    }
    sums_ = room.take<T>(band_.padded + all), moments_ = room.take<T>(band_.padded + all);
    own_ = room.take<T>((threads ? omp_get_max_threads() : 1) * 2 * kBlock * band_.widest);
    each_piece([&](int64_t piece) {
      if (band_.p) rows_.fill(band_, first(piece), last(piece) + 1);
    });
  }

  int64_t n() const { return band_.n; }
  int64_t padded() const { return band_.padded; }

  // A vector of columns or rows, `value` up to n and 0 behind.
  T* vector(T value = 0) {
    T* const x = room_.take<T>(band_.padded);
    std::fill_n(x, band_.n, value);
    std::fill(x + band_.n, x + band_.padded, (T)0);
    return x;
  }

  void sweep(Sweep kind, const T* x, const T* weight, T* y, double* sums) {
    each_piece([&](int64_t piece) {
      clear(sums_, piece);
      rows_.sweep(band_, kind, first(piece), last(piece) + 1, x, weight, y, sums_ + start_[piece],
                  own());
    });
    join(sums_, sums);
  }

  void gradient(int64_t terms, const T* left, const T* right, const T* middle, double* sums, double* moments) {
    each_piece([&](int64_t piece) {
      clear(sums_, piece), clear(moments_, piece);
      rows_.gradient(band_, first(piece), last(piece) + 1, terms, left, right, middle, sums_ + start_[piece],
                     moments_ + start_[piece], own());
    });
    join(sums_, sums), join(moments_, moments);
  }

 private:
  void lay_scores(const double* scores) {
    const int64_t n = band_.n, padded = band_.padded;
    double *const t = room_.take<double>(padded), *const w = room_.take<double>(padded);
    for (int64_t j = 0; j < padded; ++j) t[j] = scores[j < n ? j : n - 1];
    w[0] = 0;
    for (int64_t j = 1; j < n; ++j) w[j] = w[j - 1] + (t[j - 1] - t[j]) * (double)(2 * j - 1);
    for (int64_t j = n; j < padded; ++j) w[j] = std::numeric_limits<double>::infinity();
    band_.t = t, band_.w = w;
  }

  void lay_band() {
    int64_t *const low = room_.take<int64_t>(band_.blocks), *const high = room_.take<int64_t>(band_.blocks);
    int64_t* const at = room_.take<int64_t>(band_.blocks);
    const auto inside = [&](int64_t i, int64_t j) {
      return below_peak(band_.t, band_.w, band_.inverse_tau, i, j) >= -band_.cutoff;
    };
    int64_t all = 0, from = 0, to = 0;                        // both rise with i
    band_.widest = 0;
    for (int64_t block = 0; block < band_.blocks; ++block) {
      const int64_t end = std::min(band_.n, (block + 1) * kBlock);
      for (int64_t i = block * kBlock; i < end; ++i) {
        while (from < i && !inside(i, from)) ++from;
        if (i == block * kBlock) low[block] = from / kAlign * kAlign;
        for (to = std::max(to, i + 1); to < band_.n && inside(i, to);) ++to;
      }
      high[block] = round_up(to, kAlign), at[block] = all;
      all += kBlock * (high[block] - low[block]);
      band_.widest = std::max(band_.widest, high[block] - low[block]);
    }
    band_.low = low, band_.high = high, band_.at = at;
    band_.p = all * (int64_t)sizeof(T) <= kStored ? room_.take<T>(all) : nullptr;
  }

  int64_t first(int64_t piece) const { return piece * kPiece; }
  int64_t last(int64_t piece) const { return std::min(band_.blocks, (piece + 1) * kPiece) - 1; }

  template <class Work>
  void each_piece(Work work) {
#pragma omp parallel for schedule(dynamic) if (threads_ && pieces_ > 1)
    for (int64_t piece = 0; piece < pieces_; ++piece) work(piece);
  }
  T* own() const { return own_ + (threads_ ? omp_get_thread_num() : 0) * 2 * kBlock * band_.widest; }
  void clear(T* sums, int64_t piece) {
    std::fill(sums + start_[piece] + band_.low[first(piece)], sums + start_[piece] + band_.high[last(piece)], (T)0);
  }
  void join(const T* sums, double* out) {
    std::fill_n(out, band_.padded, 0.0);
    for (int64_t piece = 0; piece < pieces_; ++piece)
      for (int64_t j = band_.low[first(piece)]; j < band_.high[last(piece)]; ++j) out[j] += sums[start_[piece] + j];
  }

  const SinkhornRows<T>& rows_;
  Room& room_;
  const bool threads_;
  Band<T> band_{};
  int64_t pieces_, *start_;
  T *sums_, *moments_, *own_;
};

// Sinkhorn's steps, kept, and the way back through them. With u_0 = 1 and t from 1 to T,
//   v_t = 1 / (P^T u_t-1),  u_t = 1 / (P v_t):    dP = sum_t w_t v_t^T + u_t-1 z_t^T  of  w = -du u^2, z = -dv v^2
// which `left` and `right` hold in turns, and behind them the derivative of the result itself.
template <class T>
struct Steps {
  Relaxed<T>& p;
  const int64_t padded;
  T *const left, *const right, *const ones;
  double* const sums;
  int64_t count = 0;

  Steps(Relaxed<T>& p, Room& room, int64_t kept)
      : p(p), padded(p.padded()), left(room.take<T>((2 * kept + 2) * padded)), right(room.take<T>((2 * kept + 1) * padded)),
        ones(p.vector(1)), sums(room.take<double>(padded)), kept_(kept) {
    std::fill_n(left, (2 * kept + 2) * padded, (T)0), std::fill_n(right, (2 * kept + 1) * padded, (T)0);
    std::copy_n(ones, padded, u(0));
  }

  T* u(int64_t t) const { return left + (2 * (kept_ ? std::min(t, kept_) : 0) + 1) * padded; }
  T* w(int64_t t) const { return left + 2 * (t - 1) * padded; }
  T* v(int64_t t) const { return t == 0 ? ones : right + (kept_ ? 2 * (t - 1) : 0) * padded; }
  T* z(int64_t t) const { return right + (2 * (t - 1) + 1) * padded; }

  // `scratch` takes what nobody reads.
  void scale(int64_t most, double tolerance, T* scratch) {
    if (most == 0) return;
    p.sweep(Sweep::given, ones, ones, scratch, sums);
    while (count < most) {
      T* const by = v(++count);
      for (int64_t j = 0; j < p.n(); ++j) by[j] = (T)(1 / sums[j]);
      p.sweep(Sweep::inverse, by, nullptr, u(count), sums);
      double off = 0;
      for (int64_t j = 0; j < p.n(); ++j) off = std::max(off, std::abs(by[j] * sums[j] - 1));
      if (off < tolerance) break;
    }
  }

  // From du_T and dv_T; dv is overwritten.
  void back(const double* du, double* dv, T* scratch) {
    if (count == 0) return;
    const T* const last = u(count);
    for (int64_t i = 0; i < p.n(); ++i) w(count)[i] = (T)(-du[i] * last[i] * last[i]);
    p.sweep(Sweep::given, ones, w(count), scratch, sums);
    for (int64_t j = 0; j < p.n(); ++j) dv[j] += sums[j];
    for (int64_t t = count;; --t) {
      for (int64_t j = 0; j < p.n(); ++j) z(t)[j] = (T)(-dv[j] * v(t)[j] * v(t)[j]);
      if (t == 1) return;
      p.sweep(Sweep::adjoint, z(t), u(t - 1), w(t - 1), dv);
    }
  }

 private:
  const int64_t kept_;   // steps to keep; 0: only the last
};

// The derivative in the scores, falling, from the columns' sums and moments of the one in the logits times tau. Where
// scores are equal, |t_j - t_k| has the derivative 0.
inline void to_scores(const double* t, int64_t n, const double* sums, const double* moments, double scale, double* out) {
  double before = 0, all = 0;
  for (int64_t j = 0; j < n; ++j) all += sums[j];
  for (int64_t a = 0, b; a < n; a = b) {
    double tied = 0;
    for (b = a; b < n && (b == a || t[b] == t[a]); ++b) tied += sums[b];
    const double after = all - before - tied;
    for (int64_t j = a; j < b; ++j) out[j] = scale * (2 * moments[j] + before - after);
    before += tied;
  }
}

template <class T>
class Lists {
 public:
  Lists(const fl_neural_ndcg_options& o, const T* scores, const T* gains, T* ndcg, T* ideal, T* dscores)
      : o_(o), scores_(scores), gains_(gains), ndcg_(ndcg), ideal_(ideal), dscores_(dscores), longest_(o.lists.width) {
    for (int64_t row = 0; o.lists.offsets && row < o.lists.rows; ++row)
      longest_ = std::max(row ? longest_ : 0, count_items(o.lists, row));
    discount_.resize(longest_);
    const int64_t ranks = o.k > 0 ? std::min(o.k, longest_) : longest_;
    for (int64_t i = 0; i < ranks; ++i) discount_[i] = 1 / std::log2((double)(i + 2));
  }

  int run() {
    const bool across = o_.lists.rows >= omp_get_max_threads() || longest_ < kLong;
    const bool many = o_.lists.rows > 1 && all_items(o_.lists) * longest_ >= kMany;
    int bad = 0;
#pragma omp parallel for schedule(dynamic) if (across && many) reduction(| : bad)
    for (int64_t row = 0; row < o_.lists.rows; ++row) {
      try {
        one(row, !across);
      } catch (const std::bad_alloc&) {
        bad = 1;
      }
    }
    return bad ? fail("neural_ndcg: no memory") : 0;
  }

 private:
  void one(int64_t row, bool threads) {
    Room room;
    static thread_local SortScratch scratch;
    const int64_t items = count_items(o_.lists, row), at = first_item(o_.lists, row);
    const uint8_t* const mask = o_.lists.mask ? o_.lists.mask + at : nullptr;
    const T *const s = scores_ + at, *const g = gains_ + at;
    T* const ds = dscores_ ? dscores_ + at : nullptr;
    if (ds) std::fill_n(ds, items, (T)0);
    int32_t* const order = room.take<int32_t>(items + 1);
    const int64_t n = sort_falling(g, mask, items, order, scratch);
    double ideal = 0;
    for (int64_t i = 0; i < n; ++i) ideal += discount_[i] * g[order[i]];
    ideal_[row] = (T)ideal, ndcg_[row] = 0;
    if (ideal <= 0) return;

    sort_falling(s, mask, items, order, scratch);
    double* const t = room.take<double>(n);
    for (int64_t j = 0; j < n; ++j) t[j] = s[order[j]];
    Relaxed<T> p(room, t, n, o_.tau, threads);
    T *const gain = p.vector(), *const a = p.vector();
    for (int64_t j = 0; j < n; ++j) gain[j] = g[order[j]];
    Steps<T> steps(p, room, ds ? o_.max_iterations : 0);
    steps.scale(o_.max_iterations, o_.tolerance, a);

    // The result is sum_i d_i u_i a_i, a = P (v gain).
    const T *const u = steps.u(steps.count), *const v = steps.v(steps.count);
    T *const direct = ds ? steps.w(steps.count + 1) : p.vector(), *const gained = ds ? steps.v(steps.count + 1) : p.vector();
    double* const dv = room.take<double>(p.padded());
    for (int64_t j = 0; j < n; ++j) direct[j] = (T)(discount_[j] * u[j]), gained[j] = v[j] * gain[j];
    p.sweep(Sweep::given, gained, direct, a, dv);
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += discount_[i] * u[i] * a[i];
    ndcg_[row] = (T)(sum / ideal);
    if (!ds) return;

    double* const du = room.take<double>(n);
    for (int64_t i = 0; i < n; ++i) du[i] = discount_[i] * a[i], dv[i] *= gain[i];
    steps.back(du, dv, a);
    T* const middle = p.vector();
    for (int64_t i = 0, end; i < n; i = end) {
      for (end = i + 1; end < n && t[end] == t[i];) ++end;
      for (int64_t j = i; j < end; ++j) middle[j] = (T)(0.5 * (double)(i + end - 1));
    }
    double *const sums = room.take<double>(p.padded()), *const moments = room.take<double>(p.padded());
    p.gradient(2 * steps.count + 1, steps.left, steps.right, middle, sums, moments);
    to_scores(t, n, sums, moments, 1 / (o_.tau * ideal), du);
    for (int64_t j = 0; j < n; ++j) ds[order[j]] = (T)du[j];
  }

  const fl_neural_ndcg_options& o_;
  const T *const scores_, *const gains_;
  T *const ndcg_, *const ideal_, *const dscores_;
  int64_t longest_;
  std::vector<double> discount_;
};

template <class T>
const SinkhornRows<T>& table(const SinkhornRows<float>& f, const SinkhornRows<double>& d) {
  if constexpr (sizeof(T) == 4) return (void)d, f;
  else return (void)f, d;
}

}  // namespace

template <class T>
const SinkhornRows<T>& sinkhorn_rows() {
#if defined(FL_X86)
  if (std::strcmp(fl_isa(), "avx512") == 0) return table<T>(avx512::sinkhorn_float, avx512::sinkhorn_double);
  if (std::strcmp(fl_isa(), "avx2") == 0) return table<T>(avx2::sinkhorn_float, avx2::sinkhorn_double);
#endif
  return table<T>(portable::sinkhorn_float, portable::sinkhorn_double);
}

}  // namespace fl

extern "C" int fl_neural_ndcg(const fl_neural_ndcg_options* o, const void* scores, const void* gains, void* ndcg,
                              void* ideal, void* dscores) {
  if (!o) return fl::fail("neural_ndcg: options is null");
  if (o->dtype != FL_F32 && o->dtype != FL_F64) return fl::fail("neural_ndcg: dtype %d is unknown", o->dtype);
  if (!(o->tau > 0) || !(o->tolerance >= 0) || o->max_iterations < 0 || o->k < 0)
    return fl::fail("neural_ndcg: tau %g, tolerance %g, max_iterations %lld, k %lld", o->tau, o->tolerance,
                    (long long)o->max_iterations, (long long)o->k);
  if (o->lists.rows < 0 || o->lists.width < 0)
    return fl::fail("neural_ndcg: %lld lists of %lld", (long long)o->lists.rows, (long long)o->lists.width);
  if (o->lists.rows == 0) return 0;
  if (!ndcg || !ideal || (fl::all_items(o->lists) > 0 && (!scores || !gains)))
    return fl::fail("neural_ndcg: a pointer is null");
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return fl::Lists<T>(*o, static_cast<const T*>(scores), static_cast<const T*>(gains), static_cast<T*>(ndcg),
                        static_cast<T*>(ideal), static_cast<T*>(dscores)).run();
  };
  return o->dtype == FL_F32 ? run(0.0f) : run(0.0);
}
