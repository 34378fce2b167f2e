// Pooling of adjacent violators: the blocks on which a row's items are projected onto the permutahedron.
//
// R. E. Barlow, D. J. Bartholomew, J. M. Bremner and H. D. Brunk, "Statistical Inference under Order Restrictions", 1972.
// A row may be cut anywhere, pieces pooled and then the pieces' blocks: Anthony J. Kearsley, Richard A. Tapia and Michael
// W. Trosset, "An Approach to Parallelizing Isotonic Regression", 1996. Pieces are cut by the number of items alone, so the
// sums, and with them the bits, are the same for any number of threads.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <vector>

namespace fl {

// Pieces of a row of `count` items.
struct Pieces {
  explicit Pieces(int64_t count) : count(count), size(std::max<int64_t>(int64_t(1) << 15, (count + 63) / 64)) {}
  int64_t pieces() const { return (count + size - 1) / size; }
  int64_t first(int64_t piece) const { return piece * size; }
  int64_t end(int64_t piece) const { return std::min(count, (piece + 1) * size); }
  template <class Work>
  void each(int threads, const Work& work) const {
    const int64_t all = pieces();
    if (threads == 1 || all == 1) {   // a team of one is not free
      for (int64_t piece = 0; piece < all; ++piece) work(piece, first(piece), end(piece));
      return;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t piece = 0; piece < all; ++piece) work(piece, first(piece), end(piece));
  }
  int64_t count, size;
};

// A rule of the pooling, of blocks of items first to first + count of values that fall:
//   Block one(k), of item k alone; bool violates(a, b), whether a, which stands before b, is to be pooled with it;
//   Block pooled(a, b)

// How far two means are from falling as they should. The sum of a block's values is taken relative to its first, so that
// equal values have exactly their own mean; nothing is divided, so that whole numbers are compared exactly.
template <bool sort>
struct Euclidean {
  struct Block {
    int64_t first;
    double count, value, below;   // value: of the first item; below: the sum of what others lie below it
  };
  const double* values;
  double e;
  Block one(int64_t k) const { return {k, 1, values[k], 0}; }
  bool violates(const Block& a, const Block& b) const {
    const double gap = ((a.value - b.value) * a.count - a.below) * b.count + b.below * a.count;
    const double width = 0.5 * a.count * b.count * (a.count + b.count);
    return sort ? width <= e * gap : gap <= e * width;
  }
  Block pooled(const Block& a, const Block& b) const {
    return {a.first, a.count + b.count, a.value, a.below + b.below + (a.value - b.value) * b.count};
  }
};

// Numbers x 2^(256 q) of any size. q is left out (`wide` false) where all of a row's fit in a double.
inline double scaled(double x, double q) {
  if (q == 0) return x;
  return q == -1 ? x * 0x1p-256 : q == -2 ? x * 0x1p-512 : q == -3 ? x * 0x1p-768 : 0;   // q < 0
}

// log(above sum / below sum) of a block is to fall: above and below are exp(s) and w of a rank, exp(w) and exp(s) of a
// sort.
template <bool sort, bool wide>
struct Entropic {
  struct Block {
    int64_t first;
    double count, above, below, above_q, below_q;
  };
  const double *above, *above_q, *below, *below_q;   // rank: below is null, and item k has `items - k`
  double items;
  Block one(int64_t k) const {
    return {k, 1, above[k], sort ? below[k] : items - (double)k, wide ? above_q[k] : 0, wide && sort ? below_q[k] : 0};
  }
  bool violates(const Block& a, const Block& b) const {
    const double left = a.above * b.below, right = b.above * a.below;
    if (!wide) return left <= right;
    const double q = (a.above_q - b.above_q) - (a.below_q - b.below_q);
    return q == 0 ? left <= right : q > 0 ? left <= scaled(right, -q) : scaled(left, q) <= right;
  }
  Block pooled(const Block& a, const Block& b) const {
    if (!wide) return {a.first, a.count + b.count, a.above + b.above, a.below + b.below, 0, 0};
    return {a.first, a.count + b.count, a.above + scaled(b.above, b.above_q - a.above_q),
            a.below + scaled(b.below, b.below_q - a.below_q), a.above_q, a.below_q};
  }
};

// Blocks of several items are kept in slots; an item that no block there has is one by itself.
template <class Rule>
class Pooling {
 public:
  using Block = typename Rule::Block;

  // Blocks of items 0 to count; `slots` has room for one more than these.
  Pooling(const Rule& rule, int64_t count, int threads, Block* slots) : rule_(rule) {
    const Pieces pieces(count);
    runs_.resize(pieces.pieces());   // 64 at most
    pieces.each(threads, [&](int64_t piece, int64_t first, int64_t end) {
      runs_[piece] = pool(rule, first, end, slots);
    });
    for (int64_t piece = 1; piece < (int64_t)runs_.size(); ++piece) join(piece);
  }

  // The one block of all items; null where there are several.
  const Block* only(int64_t count) const {
    const Run& last = runs_.back();
    const Block* const block = last.end - 1;
    return last.first < last.end && (int64_t)block->count == count ? block : nullptr;
  }

  const Rule& rule() const { return rule_; }
  int64_t large() const {   // blocks of several items
    int64_t all = 0;
    for (const Run& run : runs_) all += run.end - run.first;
    return all;
  }

  // Of items first to end, in order: alone(from, to) of those that are blocks by themselves, work(block, from, to) of
  // others.
  template <class Alone, class Work>
  void each(int64_t first, int64_t end, const Alone& alone, const Work& work) const {
    for (const Run& run : runs_) {
      const int64_t stop = std::min(end, run.to);
      int64_t k = std::max(first, run.from);
      if (k >= stop) continue;
      const Block* block =
          std::upper_bound(run.first, run.end, k, [](int64_t k, const Block& b) { return k < b.first; });
      if (block > run.first && after(block[-1]) > k) --block;
      while (k < stop) {
        const int64_t start = block < run.end ? std::min(stop, block->first) : stop;
        if (k < start) alone(k, start);
        k = std::max(k, start);
        if (k == stop) break;
        const int64_t to = std::min(stop, after(*block));
        work(*block++, k, to);
        k = to;
      }
    }
  }

 private:
  struct Run {
    int64_t from, to;     // items
    Block *first, *end;   // slots
  };

  static int64_t after(const Block& block) { return block.first + (int64_t)block.count; }
  static Block front(const Rule& rule, const Run& run) {
    return run.first < run.end && run.first->first == run.from ? *run.first : rule.one(run.from);
  }
  static Block last(const Rule& rule, const Run& run) {
    return run.first < run.end && after(run.end[-1]) == run.to ? run.end[-1] : rule.one(run.to - 1);
  }
  static void drop_front(Run& run, const Block& block) { run.from = after(block), run.first += block.count > 1; }
  static void drop_last(Run& run, const Block& block) { run.to = block.first, run.end -= block.count > 1; }

  static Run pool(const Rule& rule, int64_t first, int64_t end, Block* slots) {
    Block* const bottom = slots + first + 1;   // one is left for `join`
    Run below = {first, first, bottom, bottom};
    Block top = rule.one(first);
    const auto push = [&] { *below.end = top, below.end += top.count > 1; };
    for (int64_t k = first + 1; k < end; ++k) {
      const Block next = rule.one(k);
      if (!rule.violates(top, next)) {
        push();
        top = next;
        continue;
      }
      top = rule.pooled(top, next);
      for (below.to = top.first; below.from < below.to;) {
        const Block before = last(rule, below);
        if (!rule.violates(before, top)) break;
        top = rule.pooled(before, top);
        drop_last(below, before);
      }
    }
    push();
    below.to = end;
    return below;
  }

  // Blocks of one piece are pooled with those before it until one of them stands as it was: so do then all after it.
  void join(int64_t piece) {
    Run& own = runs_[piece];
    Block block = front(rule_, own);
    bool changed = false;
    for (;;) {
      for (int64_t from = piece - 1; from >= 0;) {
        Run& run = runs_[from];
        if (run.from == run.to) {
          --from;
          continue;
        }
        const Block before = last(rule_, run);
        if (!rule_.violates(before, block)) break;
        if (!changed) drop_front(own, block);
        block = rule_.pooled(before, block), changed = true;
        drop_last(run, before);
      }
      if (!changed) return;
      if (own.from == own.to) break;
      const Block next = front(rule_, own);
      if (!rule_.violates(block, next)) break;
      block = rule_.pooled(block, next);
      drop_front(own, next);
    }
    own.from = block.first;
    *--own.first = block;
  }

  Rule rule_;
  std::vector<Run> runs_;
};

}  // namespace fl
