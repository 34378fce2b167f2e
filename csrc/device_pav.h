// Pooling adjacent violators on a device: blocks of a row whose values v fall, merged two neighbouring segments at a time.
//
// A segment's blocks are marks, one bit where each starts, with words that say which words hold any: the start before or
// behind a position is a few steps away. Sums of any run of items come out of suffix sums at every few items. The sums of
// l2 carry 106 bits; a log-sum-exp is kept relative to its first item, and as that is the run's largest, a run of c items
// holds c / m or more of what its suffix of m holds: subtracting loses at most log2(m) of 53 bits.
//
// All that pooling asks is whether two neighbouring blocks violate (`pools`). Short segments are merged by one thread,
// outwards from where they meet. For long ones, the merged block is a common tangent of two concave hulls: a warp finds its
// start among 32 at a time and its end, for each of them, by bisection: log32(n) log2(n) questions, whatever the data.
#pragma once
#include "device.h"

namespace fl {
namespace FL_ISA {

// ---- marks -----------------------------------------------------------------------------------------------------------

FL_FUNCTION int64_t words_of_level(int64_t bits) { return bits / 32 + 1; }   // bits 0 to `bits`, the last for the end
FL_FUNCTION int64_t words_of_marks(int64_t bits) {
  int64_t words = 0;
  for (;;) {
    const int64_t mine = words_of_level(bits);
    words += mine;
    if (mine == 1) return words;
    bits = mine - 1;
  }
}

struct Marks {
  uint32_t* words;             // level 0, then the levels above it
  int bits;

  // Bit i of level l + 1 is word i of level l.
  FL_DEVICE volatile uint32_t* level(int wanted) const {
    uint32_t* here = words;
    for (int l = 0, last = bits; l < wanted; ++l) here += last / 32 + 1, last /= 32;
    return here;
  }
  FL_DEVICE bool at(int position) const { return level(0)[position >> 5] >> (position & 31) & 1; }

  // The last mark at or before the position; there is one.
  FL_DEVICE int before(int position) const {
    int l = 0;
    for (;; ++l) {
      const uint32_t word = level(l)[position >> 5] & (~0u >> (31 - (position & 31)));
      if (word) { position = (position & ~31) + 31 - __clz(word); break; }
      position = (position >> 5) - 1;
    }
    while (l > 0) position = position * 32 + 31 - __clz(level(--l)[position]);
    return position;
  }
  // The first mark at or behind the position; there is one.
  FL_DEVICE int behind(int position) const {
    int l = 0;
    for (;; ++l) {
      const uint32_t word = level(l)[position >> 5] & (~0u << (position & 31));
      if (word) { position = (position & ~31) + __ffs(word) - 1; break; }
      position = (position >> 5) + 1;
    }
    while (l > 0) position = position * 32 + __ffs(level(--l)[position]) - 1;
    return position;
  }
  // Takes away the marks between two that stay. Words that other marks share change bit by bit.
  FL_DEVICE void clear_between(int first, int last, int lane, int lanes) const {
    for (int l = 0; first + 1 < last; ++l, first >>= 5, last >>= 5) {
      volatile uint32_t* word = level(l);
      const int from = first + 1, to = last - 1;
      for (int i = (from >> 5) + lane; i <= to >> 5; i += lanes) {
        uint32_t kept = 0;
        if (i == from >> 5) kept |= ~(~0u << (from & 31));
        if (i == to >> 5) kept |= ~(~0u >> (31 - (to & 31)));
        if (kept) atomicAnd(const_cast<uint32_t*>(word + i), kept);
        else word[i] = 0;
      }
    }
  }
  // By all threads of a block: the levels above the first; in place for all when it returns.
  FL_DEVICE void build_levels() const {
    uint32_t* below = words;
    for (int last = bits; last / 32 > 0;) {
      uint32_t* here = below + last / 32 + 1;
      last /= 32;                                              // the last bit here, the last word below
      for (int i = threadIdx.x; i <= last / 32; i += blockDim.x) {
        uint32_t word = 0;
        for (int bit = 0; bit < 32 && i * 32 + bit <= last; ++bit) word |= (uint32_t)(below[i * 32 + bit] != 0) << bit;
        here[i] = word;
      }
      barrier<Barrier::marked>();
      below = here;
    }
  }
};

// ---- suffix sums -----------------------------------------------------------------------------------------------------

// hi + lo; or for a log-sum-exp, its largest item and the log relative to that.
struct Suffix { double hi, lo; };

FL_FUNCTION Suffix two_sum(double a, double b) {
  const double sum = a + b, of_b = sum - a;
  return {sum, (a - (sum - of_b)) + (b - of_b)};
}
FL_FUNCTION Suffix add(Suffix a, Suffix b) {
  const Suffix sum = two_sum(a.hi, b.hi);
  const double lo = sum.lo + (a.lo + b.lo), hi = sum.hi + lo;
  return {hi, lo - (hi - sum.hi)};
}

// Sums of values from a position to the end.
template <class V>
struct Sums {
  static constexpr int stride = 8;
  using Cell = Suffix;
  const V* values;
  Cell* cells;                 // cell c: of [c * stride, end)
  int begin, end;

  FL_DEVICE Suffix none() const { return {0, 0}; }
  // Of the items [k, next) and what is behind them. Only the first of two_sum's additions waits for the item before.
  FL_DEVICE Suffix prepend(int k, int next, Suffix sum) const {
    for (int j = next - 1; j >= k; --j) {
      const Suffix more = two_sum(sum.hi, values[j]);
      sum.hi = more.hi, sum.lo += more.lo;
    }
    return sum;
  }
  FL_DEVICE Suffix join(Suffix a, Suffix b) const { return add(a, b); }
  FL_DEVICE Cell pack(Suffix a) const { return a; }
  FL_DEVICE Suffix unpack(Cell a, int) const { return a; }
  FL_DEVICE Suffix from(int k) const;
  // The sum over [a, b) less that of as many times `level`.
  FL_DEVICE double over(int a, int b, Suffix of_a, Suffix of_b, double level) const {
    const double count = b - a, product = count * level;
    const Suffix sum = add(add(of_a, {-of_b.hi, -of_b.lo}), {-product, -::fma(count, level, -product)});
    return sum.hi + sum.lo;
  }
};

// Log-sum-exps of values / scale, of values that fall.
template <class V>
struct LogSums {
  static constexpr int stride = 4;
  using Cell = double;
  const V* values;
  Cell* cells;
  int begin, end;
  double scale;

  FL_DEVICE Suffix none() const { return {0, -INFINITY}; }
  FL_DEVICE Suffix prepend(int k, int next, Suffix sum) const {
    if (k >= next) return sum;
    const double top = values[k];
    double total = sum.lo == -INFINITY ? 1 : 1 + ::exp(sum.lo - apart(top, sum.hi));
    for (int j = k + 1; j < next; ++j) total += ::exp(-apart(top, values[j]));
    return {top, ::log(total)};
  }
  FL_DEVICE Suffix join(Suffix a, Suffix b) const {
    if (b.lo == -INFINITY) return a;
    if (a.lo == -INFINITY) return b;
    const double more = b.lo - apart(a.hi, b.hi) - a.lo;
    return {a.hi, a.lo + (more > 0 ? more + ::log1p(::exp(-more)) : ::log1p(::exp(more)))};
  }
  FL_DEVICE double apart(double a, double b) const { return a == b ? 0 : (a - b) / scale; }
  FL_DEVICE Cell pack(Suffix a) const { return a.lo; }
  FL_DEVICE Suffix unpack(Cell a, int k) const { return {(double)values[k < begin ? begin : k], a}; }
  FL_DEVICE Suffix from(int k) const;
  // The log-sum-exp over [a, b), relative to item a.
  FL_DEVICE double over(Suffix of_a, Suffix of_b) const {
    if (of_b.lo == -INFINITY) return of_a.lo;
    return of_a.lo + ::log(-::expm1(-(apart(of_a.hi, of_b.hi) + of_a.lo - of_b.lo)));
  }
};

template <class S>
FL_DEVICE Suffix suffix_from(const S& s, int k) {
  Suffix sum = s.none();
  if (k >= s.end) return sum;
  const int cell = (k + S::stride - 1) / S::stride, next = cell * S::stride;
  if (next < s.end) sum = s.unpack(s.cells[cell], next);
  return s.prepend(k, next < s.end ? next : s.end, sum);
}
template <class V> FL_DEVICE Suffix Sums<V>::from(int k) const { return suffix_from(*this, k); }
template <class V> FL_DEVICE Suffix LogSums<V>::from(int k) const { return suffix_from(*this, k); }

FL_DEVICE double shuffle(double x, unsigned apart) { return __shfl_xor_sync(~0u, x, apart); }
FL_DEVICE int shuffle(int x, unsigned apart) { return __shfl_xor_sync(~0u, x, apart); }

struct WarpSuffixes { Suffix of[32]; };

// By all threads of a block: the cells of [0, end), of which [begin, end) is summed. Returns the whole to every thread; the
// cells are in place for all.
template <class S>
FL_DEVICE Suffix block_suffixes(const S& s) {
  WarpSuffixes& warps = shared<WarpSuffixes>();
  const int cells = (s.end + S::stride - 1) / S::stride, each = (cells + blockDim.x - 1) / blockDim.x;
  const int first = threadIdx.x * each, last = first + each < cells ? first + each : cells;
  Suffix mine = s.none();
  for (int c = last - 1; c >= first; --c) {
    const int from = c * S::stride, next = from + S::stride;
    mine = s.prepend(from > s.begin ? from : s.begin, next < s.end ? next : s.end, mine);
    s.cells[c] = s.pack(mine);
  }
  Suffix behind = s.none();
#pragma unroll 1
  for (int apart = 1; apart < warp; apart *= 2) {
    const Suffix other = {shuffle(mine.hi, apart), shuffle(mine.lo, apart)};
    if (threadIdx.x & apart) mine = s.join(other, mine);
    else behind = s.join(behind, other), mine = s.join(mine, other);
  }
  barrier<Barrier::scanned>();                                 // whoever read them before has done so
  if (threadIdx.x % warp == 0) warps.of[threadIdx.x / warp] = mine;
  barrier<Barrier::scanned>();
  Suffix rest = s.none();
  int w = blockDim.x / warp - 1;
  for (; w > (int)threadIdx.x / warp; --w) rest = s.join(warps.of[w], rest);
  behind = s.join(behind, rest);
  for (; w >= 0; --w) rest = s.join(warps.of[w], rest);
  for (int c = first; c < last; ++c) s.cells[c] = s.pack(s.join(s.unpack(s.cells[c], c * S::stride), behind));
  barrier<Barrier::scanned>();
  return rest;
}

// Sums of whole parts of a row, as if they were items.
template <class S>
struct Totals {
  static constexpr int stride = 1;
  using Cell = Suffix;
  const Suffix* totals;
  Suffix* cells;
  int begin, end;
  S s;
  FL_DEVICE Suffix none() const { return s.none(); }
  FL_DEVICE Suffix prepend(int k, int next, Suffix sum) const {
    for (int j = next - 1; j >= k; --j) sum = s.join(totals[j], sum);
    return sum;
  }
  FL_DEVICE Suffix join(Suffix a, Suffix b) const { return s.join(a, b); }
  FL_DEVICE Cell pack(Suffix a) const { return a; }
  FL_DEVICE Suffix unpack(Cell a, int) const { return a; }
};

// ---- the rule --------------------------------------------------------------------------------------------------------

// Of a row, or of a part of it counted from the part's beginning.
struct Extent {
  int begin, end;              // of the finite items
  int counted;                 // items that count, to the row's end
};

// A soft rank (or sort) of items v, which fall: weights are w_k = counted - k (over e).
template <class V, bool kl>
struct Rule {
  using S = std::conditional_t<kl, LogSums<V>, Sums<V>>;
  S sums;
  Extent extent;
  double strength;
  bool sort;

  struct Point { int at; Suffix from; };
  FL_DEVICE Point point(int k) const { return {k, sums.from(k)}; }
  FL_DEVICE double value(int k) const { return sums.values[k]; }

  FL_DEVICE double mean_weight(int a, int b) const { return extent.counted - 0.5 * ((double)a + b - 1); }
  // LSE of the weights of a soft sort over a block of this length, relative to the first.
  FL_DEVICE double log_weights(double length) const {
    return ::log(::expm1(-length / strength) / ::expm1(-1 / strength));
  }

  // Do the blocks [a, b) and [b, c) violate? Neighbours that are equal share a block of a soft rank.
  FL_DEVICE bool pools(const Point& a, const Point& b, const Point& c) const {
    const double level = value(b.at), first = b.at - a.at, second = c.at - b.at;
    if (!sort) {
      if (value(b.at - 1) == level) return true;
      if (strength == 0) return false;
    }
    if constexpr (kl) {
      const double more = sums.apart(value(a.at), level) + sums.over(a.from, b.from) - sums.over(b.from, c.from);
      if (sort) return first / strength + ::log(::expm1(-first / strength) / ::expm1(-second / strength)) <= more;
      return more <= ::log(first * mean_weight(a.at, b.at) / (second * mean_weight(b.at, c.at)));
    } else {
      const double apart = sums.over(a.at, b.at, a.from, b.from, level) / first -
                           sums.over(b.at, c.at, b.from, c.from, level) / second;
      const double half = 0.5 * (first + second);
      return sort ? strength * apart >= half : apart <= strength * half;
    }
  }
};

// ---- merging ---------------------------------------------------------------------------------------------------------

template <class V, bool kl>
struct Pooling {
  using Point = typename Rule<V, kl>::Point;
  Rule<V, kl> rule;
  Marks marks;

  // Segments [low, middle) and [middle, high), by one thread: outwards until nothing violates.
  FL_DEVICE void merge_outwards(int low, int middle, int high) const {
    Point a = rule.point(marks.before(middle - 1)), b = rule.point(middle), c = rule.point(marks.behind(middle + 1));
    if (!rule.pools(a, b, c)) return;
    for (bool left = true;; left = !left) {      // a side at a time; done when neither moves
      bool moved = false;
      for (int side = 0; side < 2 && !moved; ++side) {
        if (left == (side == 0) && a.at > low) {
          b = rule.point(marks.before(a.at - 1));
          if ((moved = rule.pools(b, a, c))) a = b;
        } else if (left != (side == 0) && c.at < high) {
          b = rule.point(marks.behind(c.at + 1));
          if ((moved = rule.pools(a, c, b))) c = b;
        }
      }
      if (!moved) break;
    }
    marks.clear_between(a.at, c.at, 0, 1);
  }

  // Where a block that starts at `a`, before `middle`, would end once it has taken what violates of [middle, high).
  FL_DEVICE int end_of(const Point& a, int middle, int high) const {
    int end = high;
    for (int from = middle, to = high; from < to;) {           // the marks in question
      const int half = from + (to - from) / 2, mark = marks.behind(half);
      if (mark >= to) { to = half; continue; }
      if (rule.pools(a, rule.point(mark), rule.point(marks.behind(mark + 1)))) from = mark + 1;
      else end = mark, to = half;
    }
    return end;
  }

  // The same by a warp, its questions bounded.
  FL_DEVICE void merge_by_warp(int low, int middle, int high) const {
    const int lane = threadIdx.x % warp, next = marks.behind(middle + 1);
    if (!rule.pools(rule.point(marks.before(middle - 1)), rule.point(middle), rule.point(next))) return;
    int start = low, from = low, to = middle;    // the last start known to stay; those in question are in (from, to)
    while (marks.before(to - 1) > start) {
      const int mine = from + (int)((int64_t)(to - 1 - from) * (lane + 1) / warp), mark = marks.before(mine);
      bool goes = false;
      if (mark > start) {
        const Point a = rule.point(mark), c = rule.point(end_of(a, middle, high));
        goes = rule.pools(rule.point(marks.before(mark - 1)), a, c);
      }
      int stays = goes ? start : mark, past = goes ? from : mine, least = goes ? mark : to;
#pragma unroll 1
      for (int apart = 1; apart < warp; apart *= 2) {
        const int a = shuffle(stays, apart), b = shuffle(past, apart), c = shuffle(least, apart);
        stays = a > stays ? a : stays, past = b > past ? b : past, least = c < least ? c : least;
      }
      start = stays, from = past, to = least;
    }
    int end = end_of(rule.point(start), middle, high);
    if (end <= middle) end = next;
#pragma unroll 1
    for (int apart = 1; apart < warp; apart *= 2) {            // the same everywhere; but all have looked before marks go
      const int other = shuffle(end, apart);
      end = other > end ? other : end;
    }
    marks.clear_between(start, end, lane, warp);
  }

  // By all threads of a block: every block of [begin, end), marks from scratch; in place for all.
  FL_DEVICE void pool() const {
    constexpr int leaf = 8, most_outwards = 128;
    const int begin = rule.extent.begin, end = rule.extent.end, lanes = blockDim.x / warp;
    for (int i = threadIdx.x; i <= marks.bits / 32; i += blockDim.x) {
      uint32_t word = 0;
      for (int k = i * 32; k < i * 32 + 32; ++k) word |= (uint32_t)(k >= begin && k <= end) << (k & 31);
      marks.words[i] = word;
    }
    barrier<Barrier::pooled>();
    for (int i = threadIdx.x; i * leaf < end; i += blockDim.x) {
      const int low = i * leaf > begin ? i * leaf : begin, high = i * leaf + leaf < end ? i * leaf + leaf : end;
      for (int k = low + 1; k < high; ++k) merge_outwards(low, k, k + 1);
    }
    barrier<Barrier::pooled>();
    marks.build_levels();
    for (int size = leaf; size < end; size *= 2) {
      const bool outwards = size < most_outwards;
      for (int i = outwards ? threadIdx.x : threadIdx.x / warp;; i += outwards ? (int)blockDim.x : lanes) {
        const int64_t middle = (int64_t)(2 * i + 1) * size;
        if (middle >= end) break;
        const int low = 2 * i * size > begin ? 2 * i * size : begin;
        const int high = middle + size < end ? (int)middle + size : end;
        if (low >= middle) continue;
        if (outwards) merge_outwards(low, (int)middle, high);
        else merge_by_warp(low, (int)middle, high);
      }
      barrier<Barrier::pooled>();
    }
  }
};

}  // namespace FL_ISA
}  // namespace fl
