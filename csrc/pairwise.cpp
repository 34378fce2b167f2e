// Sums over the pairs of a list, on the CPU: what each list's items are, and who walks which of their pairs.
#include "pairwise.h"

#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "arguments.h"
#include "fusedloss.h"
#include "pairwise_rows.h"
#include "sort_core.h"

namespace fl {
namespace {

constexpr int64_t kStrips = 16;       // parts of a long list that are summed side by side, at most
constexpr int64_t kStrip = 512;       // items that one part has at least
constexpr int64_t kAlone = 1 << 15;   // pairs that one thread walks sooner than it wakes others
constexpr double kLeastGain = 1e-10;  // of a list's best discounted gain

template <class T>
const PairRows<T>& rows_in_use() {
  const auto table = [](const PairRows<float>& single, const PairRows<double>& twice) -> const PairRows<T>& {
    if constexpr (sizeof(T) == sizeof(float)) return (void)twice, single;
    else return (void)single, twice;
  };
#if defined(FL_X86)
  if (std::strcmp(fl_isa(), "avx512") == 0) return table(avx512::pair_float, avx512::pair_double);
  if (std::strcmp(fl_isa(), "avx2") == 0) return table(avx2::pair_float, avx2::pair_double);
#endif
  return table(portable::pair_float, portable::pair_double);
}

// One list's items, and memory that is kept from list to list.
template <class T>
struct Walk {
  std::vector<T> score, relevance, a, b, best;
  std::vector<int32_t> partner, rank, order, by_relevance;
  std::vector<double> sums, part;
  SortScratch scratch;
  int64_t count = 0;

  void room(int64_t n) {
    for (auto* v : {&score, &relevance, &a, &b, &best}) v->assign(n + kPairPad, T(0));
    for (auto* v : {&partner, &rank, &order, &by_relevance}) v->assign(n + kPairPad, 0);
  }
  PairItems<T> items(const T* table, double sigma) const {
    return {count, partner.data(), score.data(), a.data(), b.data(), table, rank.data(), sigma};
  }
};

// Blocks of items go round among the strips of a list; strips depend on the list alone, and so do the sums. body(first,
// end, to) returns a number; their sum is returned, and what it adds to `to` stands in walk.sums.
template <class T, class Body>
double each_block(Walk<T>& walk, bool threads, Body body) {
  const int64_t n = walk.count, blocks = (n + kPairBlock - 1) / kPairBlock;
  const int64_t strips = std::max<int64_t>(1, std::min(kStrips, n / kStrip));
  walk.sums.assign(strips * n, 0.0);
  walk.part.assign(strips, 0.0);
#pragma omp parallel for schedule(dynamic) if (threads && strips > 1)
  for (int64_t strip = 0; strip < strips; ++strip) {
    double* const to = walk.sums.data() + strip * n;
    double sum = 0;
    for (int64_t block = strip; block < blocks; block += strips)
      sum += body(block * kPairBlock, std::min(n, (block + 1) * kPairBlock), to);
    walk.part[strip] = sum;
  }
  double sum = walk.part[0];
  for (int64_t strip = 1; strip < strips; ++strip) {
    sum += walk.part[strip];
    const double* const from = walk.sums.data() + strip * n;
    for (int64_t i = 0; i < n; ++i) walk.sums[i] += from[i];
  }
  return sum;
}

// The threads share out the short lists, and each of the long ones.
template <class Work>
int each_list(const char* name, const fl_lists& lists, const Work& work) {
  bool failed = false;
  int64_t pairs = 0;   // of short lists
  const auto is_long = [&](int64_t row) { return count_items(lists, row) >= 2 * kStrip; };
  const auto one = [&](int64_t row, auto& walk, bool threads) {
    try {
      work(row, walk, threads);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      failed = true;
    }
  };
  {
    typename Work::Scratch walk;
    for (int64_t row = 0; row < lists.rows; ++row) {
      if (is_long(row)) one(row, walk, true);
      else pairs += count_items(lists, row) * count_items(lists, row);
    }
  }
#pragma omp parallel if (pairs > kAlone)
  {
    typename Work::Scratch walk;
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < lists.rows; ++row)
      if (!is_long(row)) one(row, walk, false);
  }
  return failed ? fail("%s: no memory", name) : 0;
}

// ---- losses ------------------------------------------------------------------------------------------------------

// A(p) = 1 / log2(1 + p), p = 1 to n + 1, and the differences of two that follow each other, times mu.
struct Discounts {
  std::vector<double> at;
  template <class T>
  std::vector<T> table(double mu) const {
    std::vector<T> deltas(at.size(), T(0));
    for (size_t p = 1; p + 1 < at.size(); ++p) deltas[p] = (T)(mu * (at[p] - at[p + 1]));
    return deltas;
  }
};

bool looks_at_ranks(int32_t weight) { return weight >= FL_PAIR_NDCG1; }

template <class T>
struct Losses {
  typedef Walk<T> Scratch;
  const fl_pairs& p;
  const T *scores, *relevance;
  T *losses, *gradient;
  int64_t* pairs;
  const std::vector<double>& discount;
  const T* table;

  // The items that take part, by falling relevance, those of equal relevance by falling score where ranks are looked at.
  void choose(const T* s, const T* r, const uint8_t* mask, int64_t n, Walk<T>& w) const {
    w.room(n);
    int32_t* const chosen = w.by_relevance.data();
    if (!looks_at_ranks(p.weight) && p.k == 0) {
      w.count = sort_falling(r, mask, n, chosen, w.scratch);
    } else {
      const int64_t m = sort_falling(s, mask, n, w.order.data(), w.scratch);
      w.count = p.k > 0 ? std::min(m, p.k) : m;
      for (int64_t i = 0; i < w.count; ++i) w.relevance[i] = r[w.order[i]];
      sort_falling(w.relevance.data(), nullptr, w.count, chosen, w.scratch);
      for (int64_t i = 0; i < w.count; ++i) w.rank[i] = chosen[i] + 1, chosen[i] = w.order[chosen[i]];
    }
    for (int64_t i = 0; i < w.count; ++i) w.score[i] = s[chosen[i]], w.relevance[i] = r[chosen[i]];
    for (int64_t i = 0, j = 0; i < w.count; ++i) {
      while (j < w.count && w.relevance[j] >= w.relevance[i]) ++j;
      w.partner[i] = (int32_t)(p.weight == FL_PAIR_NDCG1 ? 0 : j);
    }
  }

  double best(const T* r, const uint8_t* mask, int64_t n, Walk<T>& w) const {
    const T* falling = w.relevance.data();
    int64_t m = w.count;
    if (p.k > 0) {   // the best k of all items, not of those that are ranked first
      m = sort_falling(r, mask, n, w.order.data(), w.scratch);
      m = std::min(m, p.k);
      for (int64_t i = 0; i < m; ++i) w.best[i] = r[w.order[i]];
      falling = w.best.data();
    }
    double sum = 0;
    for (int64_t i = 0; i < m; ++i) sum += std::expm1(M_LN2 * (double)falling[i]) * discount[i + 1];
    return sum > kLeastGain ? sum : kLeastGain;
  }

  PairForm weigh(const T* r, const uint8_t* mask, int64_t n, Walk<T>& w) const {
    if (p.weight == FL_PAIR_ONE) return PairForm::one;
    if (!looks_at_ranks(p.weight)) {
      for (int64_t i = 0; i < w.count; ++i)
        w.a[i] = p.weight == FL_PAIR_SQUARES ? w.relevance[i] * w.relevance[i] : w.relevance[i];
      return PairForm::gap;
    }
    const double most = best(r, mask, n, w);
    for (int64_t i = 0; i < w.count; ++i) {
      const double gain = std::expm1(M_LN2 * (double)w.relevance[i]) / most, a = discount[w.rank[i]];
      w.a[i] = (T)(p.weight == FL_PAIR_NDCG1 ? gain * a : gain);
      w.b[i] = p.weight == FL_PAIR_NDCG2 ? T(0) : (T)a;
    }
    return p.weight == FL_PAIR_NDCG1 ? PairForm::own : PairForm::product;
  }

  void operator()(int64_t row, Walk<T>& w, bool threads) const {
    const int64_t n = count_items(p.lists, row), at = first_item(p.lists, row);
    const uint8_t* const mask = p.lists.mask ? p.lists.mask + at : nullptr;
    bool ordered = true;
    for (int64_t i = 0; i < n; ++i) ordered &= relevance[at + i] == relevance[at + i] || (mask && !mask[i]);
    if (!ordered) {   // by NaN
      losses[row] = T(NAN), pairs[row] = 0;
      for (int64_t i = 0; i < n; ++i) gradient[at + i] = mask && !mask[i] ? T(0) : T(NAN);
      return;
    }
    choose(scores + at, relevance + at, mask, n, w);
    const PairForm form = weigh(relevance + at, mask, n, w);
    const PairItems<T> items = w.items(table, p.sigma);
    const PairRows<T>& rows = rows_in_use<T>();
    const double loss = each_block(w, threads, [&](int64_t first, int64_t end, double* to) {
      return rows.losses(items, p.function, form, first, end, to);
    });
    losses[row] = (T)(p.scale * loss);
    std::fill(gradient + at, gradient + at + n, T(0));
    int64_t number = 0;
    for (int64_t i = 0; i < w.count; ++i) {
      gradient[at + w.by_relevance[i]] = (T)(p.scale * w.sums[i]);
      number += w.count - w.partner[i];
    }
    pairs[row] = number;
  }
};

template <class T>
int pair_losses(const fl_pairs& p, const T* scores, const T* relevance, T* losses, T* gradient, int64_t* pairs) {
  Discounts discounts;
  std::vector<T> table;
  if (looks_at_ranks(p.weight)) {
    int64_t longest = 0;
    for (int64_t row = 0; row < p.lists.rows; ++row) longest = std::max(longest, count_items(p.lists, row));
    discounts.at.resize(longest + 2);
    for (int64_t i = 1; i < longest + 2; ++i) discounts.at[i] = 1 / std::log2(1.0 + (double)i);
    if (p.weight == FL_PAIR_NDCG2) table = discounts.table<T>(1);
    if (p.weight == FL_PAIR_NDCG2PP) table = discounts.table<T>(p.mu);
  }
  const T* const deltas = table.empty() ? nullptr : table.data();
  return each_list("pair_losses", p.lists,
                   Losses<T>{p, scores, relevance, losses, gradient, pairs, discounts.at, deltas});
}

// ---- soft positions ------------------------------------------------------------------------------------------------

template <class T>
struct Positions {
  typedef Walk<T> Scratch;
  const fl_pairs& p;
  const T *scores, *upstream;
  T* out;
  bool backward;

  void operator()(int64_t row, Walk<T>& w, bool threads) const {
    const int64_t n = count_items(p.lists, row), at = first_item(p.lists, row);
    const uint8_t* const mask = p.lists.mask ? p.lists.mask + at : nullptr;
    w.room(n);
    w.count = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (mask && !mask[i]) continue;
      const int64_t to = w.count++;
      w.order[to] = (int32_t)i, w.score[to] = scores[at + i], w.partner[to] = (int32_t)w.count;
      if (backward) w.a[to] = upstream[at + i];
    }
    const PairItems<T> items = w.items(nullptr, p.sigma);
    const PairRows<T>& rows = rows_in_use<T>();
    each_block(w, threads, [&](int64_t first, int64_t end, double* to) {
      (backward ? rows.positions_backward : rows.positions)(items, first, end, to);
      return 0.0;
    });
    std::fill(out + at, out + at + n, T(0));
    for (int64_t i = 0; i < w.count; ++i) out[at + w.order[i]] = (T)(w.sums[i] + (backward ? 0 : 1));
  }
};

int check_pairs(const char* name, const fl_pairs* p) {
  if (!p) return fail("%s: no arguments", name);
  if (p->lists.rows < 0 || p->lists.width < 0)
    return fail("%s: %lld lists of %lld items", name, (long long)p->lists.rows, (long long)p->lists.width);
  if (p->dtype != FL_F32 && p->dtype != FL_F64) return fail("%s: dtype %d is not fp32 or fp64", name, p->dtype);
  for (int64_t row = 0; row < p->lists.rows; ++row) {
    const int64_t n = count_items(p->lists, row);
    if (n < 0 || n > INT32_MAX - 64) return fail("%s: list %lld has %lld items", name, (long long)row, (long long)n);
  }
  return 0;
}

template <class Work>
int guarded(const char* name, Work work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory", name);
  }
}

template <class T>
int positions(const char* name, const fl_pairs& p, const void* scores, const void* upstream, void* out, bool backward) {
  return each_list(name, p.lists, Positions<T>{p, (const T*)scores, (const T*)upstream, (T*)out, backward});
}

int positions(const char* name, const fl_pairs* p, const void* scores, const void* upstream, void* out, bool backward) {
  if (int status = check_pairs(name, p)) return status;
  return guarded(name, [&] {
    return p->dtype == FL_F64 ? positions<double>(name, *p, scores, upstream, out, backward)
                              : positions<float>(name, *p, scores, upstream, out, backward);
  });
}

}  // namespace
}  // namespace fl

extern "C" {

int fl_pair_losses(const fl_pairs* p, const void* scores, const void* relevance, void* losses, void* gradient,
                   int64_t* pairs) {
  if (int status = fl::check_pairs("pair_losses", p)) return status;
  if (p->function < FL_PAIR_SOFTPLUS || p->function > FL_PAIR_LOGISTIC)
    return fl::fail("pair_losses: function %d is unknown", p->function);
  if (p->weight < FL_PAIR_ONE || p->weight > FL_PAIR_NDCG2PP)
    return fl::fail("pair_losses: weight %d is unknown", p->weight);
  if (p->function == FL_PAIR_LOGISTIC && p->weight != FL_PAIR_ONE)
    return fl::fail("pair_losses: the logistic function takes no weights");
  return fl::guarded("pair_losses", [&] {
    if (p->dtype == FL_F64)
      return fl::pair_losses<double>(*p, (const double*)scores, (const double*)relevance, (double*)losses,
                                     (double*)gradient, pairs);
    return fl::pair_losses<float>(*p, (const float*)scores, (const float*)relevance, (float*)losses, (float*)gradient,
                                  pairs);
  });
}

int fl_soft_positions(const fl_pairs* p, const void* scores, void* positions) {
  return fl::positions("soft_positions", p, scores, nullptr, positions, false);
}

int fl_soft_positions_backward(const fl_pairs* p, const void* scores, const void* upstream, void* dscores) {
  return fl::positions("soft_positions_backward", p, scores, upstream, dscores, true);
}

}  // extern "C"
