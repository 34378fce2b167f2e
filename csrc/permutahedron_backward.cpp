// The gradients of soft sort and soft rank on the CPU.
#include "permutahedron_call.h"
#include "pooling.h"

namespace fl {
namespace {

// Over items of a block: of softmax weights p (l2: all 1), of them times the incoming gradient g, of g.
struct Sums {
  double p = 0, pg = 0, g = 0;
  void operator+=(const Sums& other) { p += other.p, pg += other.pg, g += other.g; }
};

// The finite items of a row in the blocks' order, on which the gradient is a mean over blocks.
template <class V>
struct Gradient {
  int64_t m, begin, count;
  const int32_t* order;       // of the finite items
  const int32_t* ranks;       // null, or of which item in `order` each item is: there may be others between them
  const V* values;            // of the row
  double* falling;            // room for their +-x, null where nobody asks
  double* weights;            // kl: exp(s - s of the block's first)
  double* gradients;          // g, in the blocks' order
  double* numbers;            // room for three per item
  const V* g;                 // of the row
  V* dx;
  double e, sign;
  bool by_strength;           // whether the derivative in e is asked for
  int threads;
  const PermutahedronLoops& loops;
};

template <class V, bool sort, bool kl>
struct Backward : Gradient<V> {
  using G = Gradient<V>;
  using G::order, G::values, G::falling, G::weights, G::gradients, G::g, G::dx, G::e, G::sign, G::count, G::begin;

  bool starts(int64_t k) const { return started(order[k]) != 0; }
  int64_t position(int64_t k) const { return order[k] & kPosition; }
  double value(int64_t k) const { return sign * (double)values[position(k)]; }
  double gradient(int64_t k) const { return gradients[k]; }
  double rank(int64_t k) const { return (double)(this->m - begin - (this->ranks ? this->ranks[k] : k)); }

  Sums sums(int64_t from, int64_t to) const {
    Sums all;
    if constexpr (kl) {
      this->loops.weighted(weights + from, gradients + from, to - from, &all.p, &all.pg);
      if (sort) all.g = this->loops.sum(gradients + from, to - from);
    } else {
      all.g = this->loops.sum(gradients + from, to - from);
    }
    return all;
  }

  // Of items from to `to` of the block of items first to end. Returns their part of the derivative in e.
  double write(int64_t from, int64_t to, int64_t first, int64_t end, const Sums& all) const {
    const double size = (double)(end - first), by = 1 / e;
    double of_strength = 0;
    if constexpr (sort) {
      const double mean = kl ? all.g / all.p : all.g / size;
      for (int64_t k = from; k < to; ++k) dx[position(k)] = (V)(kl ? weights[k] * mean : mean);
      if (this->by_strength && end - first > 1) {
        const double sum = kl ? std::expm1(-size * by) / std::expm1(-by) : size;
        for (int64_t k = from; k < to; ++k) {
          const double behind = (double)(k - first), share = kl ? std::exp(-behind * by) / sum : 1 / size;
          of_strength += sign * (gradient(k) - share * all.g) * behind * by * by;
        }
      }
    } else {
      const double mean = kl ? all.pg / all.p : all.g / size;
      const double sum = size * (rank(first) - 0.5 * (size - 1)), slope = kl ? sum / all.p * by : by;
      for (int64_t k = from; k < to; ++k) {
        const double change = (gradient(k) - mean) * slope * (kl ? weights[k] : 1);
        dx[position(k)] = (V)(sign * change);
        if (this->by_strength && change != 0) of_strength -= change * ((falling[k] - value(first)) * by);
      }
    }
    return of_strength;
  }

  // All of that for items from to `to`, whole blocks, but the derivative in e. Which block an item has is counted, not
  // asked, as in the forward's `each_item`.
  struct Numbers {
    double p, sum, w;
  };
  void write_short(int64_t from, int64_t to, Numbers* blocks) const {
    const double by = 1 / e;
    Numbers* const last = blocks + this->loops.negative(order + from, to - from);
    std::fill(blocks, last, Numbers{0, 0, 0});
    for (int64_t k = from, own = -1; k < to; ++k) {
      Numbers& block = blocks[own += started(order[k])];
      block.p += kl ? weights[k] : 1;
      block.sum += kl && !sort ? weights[k] * gradients[k] : gradients[k];
      if (kl && !sort) block.w += rank(k);
    }
    for (Numbers* block = blocks; block < last; ++block) block->sum /= block->p, block->w *= by / block->p;
    for (int64_t k = from, own = -1; k < to; ++k) {
      const Numbers& block = blocks[own += started(order[k])];
      if (sort) dx[position(k)] = (V)(kl ? weights[k] * block.sum : block.sum);
      else dx[position(k)] = (V)(sign * (gradients[k] - block.sum) * (kl ? weights[k] * block.w : by));
    }
  }

  struct Piece {
    int64_t first = 0, end = 0;        // of the block that the piece's first item belongs to
    int64_t last = -1, last_end = 0;   // of the last block that starts here: its first item, and its end
    Sums head, tail;                   // of blocks that other pieces have items of, too
    double of_strength = 0;
  };

  // work(from, to): items of every block; those from `from` to `end` are whole blocks.
  template <class Work>
  void each_block(int64_t from, int64_t end, const Work& work) const {
    while (from < end) {
      int64_t to = from + 1;
      while (to < end && !starts(to)) ++to;
      work(from, to);
      from = to;
    }
  }

  double run() const {
    const Pieces cut(count);
    const int64_t pieces = cut.pieces();
    std::vector<Piece> piece(pieces);
    if (pieces > 1)
      cut.each(this->threads, [&](int64_t i, int64_t first, int64_t end) {
        Piece& own = piece[i];
        while (end > first && !starts(end - 1)) --end;
        own.last = end - 1;
        while (first < end && !starts(first)) ++first;
        own.end = first;
        if (first == end) own.last = own.end = -1;
      });
    int64_t open = 0;
    for (int64_t i = 0; i < pieces; ++i) {
      piece[i].first = starts(cut.first(i)) ? cut.first(i) : open;
      if (piece[i].last >= 0) open = piece[i].last;
    }
    cut.each(this->threads, [&](int64_t i, int64_t first, int64_t end) {
      Piece& own = piece[i];
      if constexpr (!kl) {
        for (int64_t k = first; k < end; ++k) gradients[k] = (double)g[sort ? begin + k : position(k)];
        for (int64_t k = first; k < end && falling; ++k) falling[k] = value(k);
      } else {
        const double by = kLog2e * (sort ? 1 : 1 / e);
        double top = value(own.first);
        for (int64_t k = first; k < end; ++k) {
          const double own = value(k);
          top = starts(k) ? own : top;
          weights[k] = (own - top) * by;
          if (falling) falling[k] = own;
          gradients[k] = (double)g[sort ? begin + k : position(k)];
        }
        this->loops.exp2(weights + first, weights + first, end - first);
      }
      const int64_t whole = std::max(first, own.end < 0 ? end : own.end);
      const int64_t stop = own.last < 0 || end == count || starts(end) ? end : own.last;
      if (first < whole) own.head = sums(first, whole);
      if (stop < end) own.tail = sums(stop, end);
      if (whole >= stop) return;
      if (!this->by_strength && 8 * this->loops.negative(order + whole, stop - whole) > stop - whole)
        return write_short(whole, stop, (Numbers*)(this->numbers + 3 * whole));
      each_block(whole, stop, [&](int64_t from, int64_t to) {
        own.of_strength += write(from, to, from, to, sums(from, to));
      });
    });
    for (int64_t i = pieces - 1, stop = count; i >= 0; --i) {
      piece[i].last_end = stop;
      if (piece[i].end < 0) piece[i].end = stop;
      stop = piece[i].end;
    }
    Sums all;
    for (int64_t i = 0, from = -1; i < pieces; ++i) {
      if (from >= 0) all += piece[i].head;
      const bool over = piece[i].last >= 0 || i + 1 == pieces;
      if (from >= 0 && over) {
        piece[from].tail = all;
        for (int64_t j = from + 1; j <= i; ++j) piece[j].head = all;
        from = -1;
      }
      if (piece[i].last >= 0 && piece[i].last_end > cut.end(i)) from = i, all = piece[i].tail;
    }
    if (pieces > 1)
      cut.each(this->threads, [&](int64_t i, int64_t first, int64_t end) {
        Piece& own = piece[i];
        if (own.first < first)
          own.of_strength += write(first, std::min(end, own.end), own.first, own.end, own.head);
        if (own.last >= 0 && own.last_end > end)
          own.of_strength += write(own.last, end, own.last, own.last_end, own.tail);
      });
    double of_strength = 0;
    for (const Piece& own : piece) of_strength += own.of_strength;
    return of_strength;
  }
};

// Of `order` the items that are not alone in their block, to `entries`, and which items of it these are, to `ranks`.
int64_t together(const int32_t* order, int64_t count, int threads, int32_t* entries, int32_t* ranks) {
  const Pieces cut(count);
  int64_t found[65] = {};
  cut.each(threads, [&](int64_t i, int64_t first, int64_t end) {
    int64_t next = first;
    const auto add = [&](int64_t k, int64_t alone) {   // no branch
      entries[next] = order[k], ranks[next] = (int32_t)k, next += !alone;
    };
    for (int64_t k = first; k < std::min(end, count - 1); ++k) add(k, started(order[k] & order[k + 1]));
    if (end == count) add(count - 1, started(order[count - 1]));
    found[i] = next - first;
  });
  int64_t all = found[0];
  for (int64_t i = 1; i < cut.pieces(); all += found[i++]) {
    std::memmove(entries + all, entries + cut.first(i), found[i] * sizeof(int32_t));
    std::memmove(ranks + all, ranks + cut.first(i), found[i] * sizeof(int32_t));
  }
  return all;
}

// The l2 gradient of a row of one block, in whatever order: by (g - mean g), or that mean where `by` is 0.
template <class V>
void only_block(const PermutahedronLoops& loops, const V* g, V* dx, int64_t n, double by, int threads) {
  const Pieces cut(n);
  double part[65] = {}, sum = 0;
  cut.each(threads, [&](int64_t i, int64_t first, int64_t end) {
    if constexpr (sizeof(V) == sizeof(float)) part[i] = loops.sum_floats(g + first, end - first);
    else part[i] = loops.sum(g + first, end - first);
  });
  for (int64_t i = 0; i < cut.pieces(); ++i) sum += part[i];
  const double mean = sum / (double)n;
  cut.each(threads, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) dx[i] = (V)(by == 0 ? mean : ((double)g[i] - mean) * by);
  });
}

template <class V>
void backward_row(const Call<V>& call, int64_t row, const void* x, const int32_t* order, const void* g, void* dx,
                  double* dstrength, int threads, Scratch& scratch) {
  const fl_lists& lists = call.p.lists;
  const int64_t at = first_item(lists, row), n = count_items(lists, row);
  const uint8_t* const mask = lists.mask ? lists.mask + at : nullptr;
  const bool sort = call.sort, kl = call.p.kl && call.strength(row) != 0, half = call.half();
  order += at;
  int64_t m = n;
  for (int64_t i = 0; i < n && mask; ++i) m -= mask[i] == 0;
  const V* const values = call.values(x, at, n, scratch.values);
  const V* const incoming = sort ? call.values(g, at, n, scratch.gradients) : (const V*)g + at;
  V* const out = half ? scratch.out.room<V>(n) : (V*)dx + at;
  const auto value = [=](int64_t k) { return (double)values[order[k] & kPosition]; };
  const double e = std::min(call.strength(row), 1e300);
  double of_strength = 0;
  for (int64_t k = m; k < n; ++k) out[order[k] & kPosition] = 0;
  if (m > 0 && (value(0) != value(0) || !(e >= 0))) {
    for (int64_t k = 0; k < m; ++k) out[order[k] & kPosition] = (V)kNaN;
    of_strength = kNaN;
  } else {
    int64_t begin = 0, end = m;
    while (begin < m && std::isinf(value(begin))) ++begin;
    while (end > begin && std::isinf(value(end - 1))) --end;
    const auto hard = [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) out[order[k] & kPosition] = sort ? incoming[k] : 0;
    };
    const int64_t blocks = call.loops.negative(order + begin, end - begin);
    if (e == 0 || blocks == end - begin) begin = end = m;   // each item is a block
    hard(0, begin), hard(end, m);
    int64_t count = end - begin;
    const int32_t *entries = order + begin, *ranks = nullptr;
    if (!sort && 2 * blocks > count && count > 0) {   // ranks of items alone in their block do not move
      int32_t* const some = scratch.together.room<int32_t>(2 * count);
      std::fill(out, out + n, V(0));
      count = together(entries, count, threads, some, some + count);
      entries = some, ranks = some + end - begin;
    }
    const double sign = call.rising() ? -1 : 1;
    double* const falling = dstrength && !sort ? scratch.falling.room<double>(count) : nullptr;
    double* const weights = kl ? scratch.weights.room<double>(count) : nullptr;
    const Gradient<V> gradient = {m, begin, count, entries, ranks, values, falling, weights,
                                  scratch.terms.room<double>(count), scratch.blocks.room<double>(3 * count), incoming,
                                  out, e, sign, dstrength != nullptr, threads, call.loops};
    if (!kl && !dstrength && blocks == 1 && end - begin == n)
      only_block(call.loops, incoming, out, n, sort ? 0 : sign / e, threads);
    else if (count > 0)
      of_strength = sort ? (kl ? Backward<V, true, true>{gradient}.run() : Backward<V, true, false>{gradient}.run())
                         : (kl ? Backward<V, false, true>{gradient}.run() : Backward<V, false, false>{gradient}.run());
  }
  if (dstrength) dstrength[row] = of_strength;
  if constexpr (sizeof(V) == sizeof(float))
    if (half) call.loops.narrow(call.p.dtype, out, (uint16_t*)dx + at, n);
}

int backward(const char* name, bool sort, const fl_permutahedron* p, const void* x, const int32_t* order, const void* g,
             void* dx, double* dstrength) {
  return checked(name, p, [&](auto type) {
    const Call<decltype(type)> call = {*p, sort};
    return each_row(name, p->lists, [&](int64_t row, int threads, Scratch& scratch) {
      backward_row(call, row, x, order, g, dx, dstrength, threads, scratch);
    });
  });
}

}  // namespace
}  // namespace fl

extern "C" {

int fl_soft_rank_backward(const fl_permutahedron* p, const void* x, const int32_t* order, const void* dranks, void* dx,
                          double* dstrength) {
  return fl::backward("soft_rank_backward", false, p, x, order, dranks, dx, dstrength);
}
int fl_soft_sort_backward(const fl_permutahedron* p, const void* x, const int32_t* order, const void* dsorted, void* dx,
                          double* dstrength) {
  return fl::backward("soft_sort_backward", true, p, x, order, dsorted, dx, dstrength);
}


}  // extern "C"
