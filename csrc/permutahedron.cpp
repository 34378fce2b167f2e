// The soft sort and soft rank on the CPU.
#include "permutahedron_call.h"
#include "pooling.h"

namespace fl {
namespace {

// A row's items that count, in falling order of +-x: infinite ones, `count` finite ones from `begin` on, infinite ones.
struct Falling {
  int64_t m, begin, count;
  double *values;                 // of the finite ones, times `unit`, a power of two that keeps sums of them finite
  double e, unit;                 // e: of values so scaled
  int32_t* order;                 // of the finite ones
  int threads;
  const PermutahedronLoops& loops;
};

double unit_of(const Falling& f) {
  if (f.count == 0) return 1;
  const double most = std::max(std::fabs(f.values[0]), std::fabs(f.values[f.count - 1]));
  return most > 0x1p800 ? 0x1p-220 : 1;
}

// write(k, y) for every item k: y is alone(k) of items that are blocks by themselves, at(of(block), k) of others. Where
// blocks are many and short, which one an item has is counted, not asked: branches on their ends cannot be foretold.
template <class Pool, class Alone, class Of, class At, class Write>
void each_item(const Falling& f, const Pool& pooling, Scratch& scratch, const Alone& alone, const Of& of, const At& at,
               const Write& write) {
  using Block = typename Pool::Block;
  using Numbers = decltype(of(Block()));
  const auto start_all = [&](int64_t first, int64_t end) {
    for (int64_t k = first; k < end; ++k) f.order[k] |= kStarts;
  };
  const auto write_alone = [&](int64_t first, int64_t end) {
    start_all(first, end);
    for (int64_t k = first; k < end; ++k) write(k, alone(k));
  };
  const bool few = 16 * pooling.large() < f.count;
  Numbers* const all = few ? nullptr : scratch.numbers.template room<Numbers>(f.count);
  Pieces(f.count).each(f.threads, [&](int64_t, int64_t first, int64_t end) {
    if (few)
      return pooling.each(first, end, write_alone, [&](const Block& block, int64_t from, int64_t to) {
        if (from == block.first) f.order[from] |= kStarts;
        const Numbers own = of(block);
        for (int64_t k = from; k < to; ++k) write(k, at(own, k));
      });
    Numbers* next = all + first;
    pooling.each(first, end, [&](int64_t from, int64_t to) {
      start_all(from, to);
      for (int64_t k = from; k < to; ++k) *next++ = of(pooling.rule().one(k));
    }, [&](const Block& block, int64_t from, int64_t) {
      if (from == block.first) f.order[from] |= kStarts;
      *next++ = of(block);
    });
    int64_t own = first - started(f.order[first]);
    for (int64_t k = first; k < end; ++k) {
      own += started(f.order[k]);
      write(k, at(all[own], k));
    }
  });
}

// write(k, y) takes the k-th finite item's output.
template <bool sort, class Write>
void euclidean(const Falling& f, Scratch& scratch, const Write& write) {
  using Rule = Euclidean<sort>;
  using Block = typename Rule::Block;
  Block* const slots = scratch.blocks.room<Block>(f.count + 1);
  const Pooling<Rule> pooling({f.values, f.e}, f.count, f.threads, slots);
  const double by = std::min(1 / f.e, std::numeric_limits<double>::max()), back = 1 / f.unit;
  const double ranks = (double)(f.m - f.begin);
  struct Numbers {
    double value, below, centre, least, most;
  };
  const auto of = [&](const Block& block) {
    const double first = (double)block.first, most = ranks - first;
    const double centre = first + (block.count - 1) * 0.5;
    return Numbers{block.value, block.below / block.count, centre, most - (block.count - 1), most};
  };
  if constexpr (!sort)
    if (const Block* const block = write.whole ? pooling.only(f.count) : nullptr) {   // no matter what order
      const Numbers b = of(*block);
      f.order[0] |= kStarts;
      Pieces(f.count).each(f.threads, [&](int64_t, int64_t first, int64_t end) {
        for (int64_t i = first; i < end; ++i) {
          const double y = (ranks - b.centre) + ((write.value(i) * f.unit - b.value) + b.below) * by;
          write.at(i, std::min(b.most, std::max(b.least, y)));
        }
      });
      return;
    }
  const auto alone = [=](int64_t k) { return sort ? f.values[k] * back : ranks - (double)k; };
  each_item(f, pooling, scratch, alone, of, [&](const Numbers& b, int64_t k) {
    if (sort) return (b.value + ((b.centre - (double)k) * by - b.below)) * back;
    const double y = (ranks - b.centre) + ((f.values[k] - b.value) + b.below) * by;
    return std::min(b.most, std::max(b.least, y));
  }, write);
}

template <bool wide, class Write>
void entropic_rank(const Falling& f, Scratch& scratch, const Write& write) {
  using Rule = Entropic<false, wide>;
  using Block = typename Rule::Block;
  double* const e = scratch.terms.room<double>((wide ? 2 : 1) * f.count);
  double* const q = wide ? e + f.count : nullptr;
  Block* const slots = scratch.blocks.room<Block>(f.count + 1);
  const double by = kLog2e / f.e;
  Pieces(f.count).each(f.threads, [&](int64_t, int64_t first, int64_t end) {
    if (wide) return f.loops.exp2_wide(f.values + first, by, e + first, q + first, end - first);
    for (int64_t k = first; k < end; ++k) e[k] = (f.values[k] - f.values[0]) * by;
    f.loops.exp2(e + first, e + first, end - first);
  });
  const Pooling<Rule> pooling({e, q, nullptr, nullptr, (double)(f.m - f.begin)}, f.count, f.threads, slots);
  struct Numbers {
    double by, q;
  };
  const double ranks = (double)(f.m - f.begin);
  each_item(f, pooling, scratch, [=](int64_t k) { return ranks - (double)k; },
            [](const Block& block) { return Numbers{block.below / block.above, block.above_q}; },
            [=](const Numbers& b, int64_t k) { return (wide ? scaled(e[k], q[k] - b.q) : e[k]) * b.by; }, write);
}

template <class Write>
void entropic_sort(const Falling& f, Scratch& scratch, const Write& write) {
  using Rule = Entropic<true, true>;
  using Block = typename Rule::Block;
  double *const w = scratch.terms.room<double>(4 * f.count), *const wq = w + f.count, *const s = wq + f.count,
               *const sq = s + f.count;
  Block* const slots = scratch.blocks.room<Block>(f.count + 1);
  const Pieces pieces(f.count);
  const double back = 1 / f.unit;
  pieces.each(f.threads, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t k = first; k < end; ++k) w[k] = (double)(f.count - k);
    f.loops.exp2_wide(w + first, kLog2e * back / f.e, w + first, wq + first, end - first);
    f.loops.exp2_wide(f.values + first, kLog2e * back, s + first, sq + first, end - first);
  });
  const Pooling<Rule> pooling({w, wq, s, sq, 0}, f.count, f.threads, slots);
  pieces.each(f.threads, [&](int64_t, int64_t first, int64_t end) {
    pooling.each(first, end, [&](int64_t from, int64_t to) {
      for (int64_t k = from; k < to; ++k) f.order[k] |= kStarts, write(k, f.values[k] * back);
    }, [&](const Block& block, int64_t from, int64_t to) {
      const int64_t start = block.first;
      if (from == start) f.order[from] |= kStarts;
      const double rest = std::log(block.below / s[start]) - std::log(block.above / w[start]);
      const double top = f.values[start] + rest * f.unit;
      for (int64_t k = from; k < to; ++k) write(k, (top - (double)(k - start) / f.e) * back);
    });
  });
}

// No two neighbours are far enough apart for soft sorting to pool them: its answer is the hard one.
bool stands(const Falling& f) {
  std::atomic<int64_t> far{0};
  Pieces(f.count).each(f.threads, [&](int64_t, int64_t first, int64_t end) {
    if (far == 0) far += f.loops.gaps(f.values + first, 1 / f.e, std::min(f.count, end + 1) - first);
  });
  return far == 0;
}

template <class Write>
void hard_sort(const Falling& f, const Write& write) {
  const double back = 1 / f.unit;
  Pieces(f.count).each(f.threads, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t k = first; k < end; ++k) f.order[k] |= kStarts;
    for (int64_t k = first; k < end; ++k) write(k, f.values[k] * back);
  });
}

template <bool sort, class Write>
void project(const Falling& f, bool kl, Scratch& scratch, const Write& write) {
  if (f.count == 0) return;
  if constexpr (sort) {
    if (stands(f)) hard_sort(f, write);
    else if (kl) entropic_sort(f, scratch, write);
    else euclidean<true>(f, scratch, write);
  } else {
    const double most = std::max(std::fabs(f.values[0]), std::fabs(f.values[f.count - 1]));
    if (!kl || f.e == 0 || !(most * (kLog2e / f.e) < 0x1p1000)) euclidean<false>(f, scratch, write);
    else if ((f.values[0] - f.values[f.count - 1]) * (kLog2e / f.e) < 500) entropic_rank<false>(f, scratch, write);
    else entropic_rank<true>(f, scratch, write);
  }
}

// Takes ranks: of the k-th finite item in order, or of item i where the row has no others.
template <class V>
struct Ranks {
  const V* values;
  V* y;
  const int32_t* order;
  double sign;
  bool whole;
  double value(int64_t i) const { return sign * (double)values[i]; }
  void at(int64_t i, double rank) const { y[i] = (V)rank; }
  void operator()(int64_t k, double rank) const { y[order[k] & kPosition] = (V)rank; }
};

template <class V>
void forward_row(const Call<V>& call, int64_t row, const void* x, void* out, int32_t* order, int threads,
                 Scratch& scratch) {
  const fl_lists& lists = call.p.lists;
  const int64_t at = first_item(lists, row), n = count_items(lists, row);
  const uint8_t* const mask = lists.mask ? lists.mask + at : nullptr;
  const bool sort = call.sort, rounded = sort && call.half();
  const V* const values = call.values(x, at, n, scratch.values);
  order += at;
  double* const falling = scratch.falling.room<double>(n);
  const int64_t m = sort_row(values, mask, n, call.rising(), threads, order, falling, scratch.sort);
  V* const y = rounded ? const_cast<V*>(values) : (V*)out + at;   // nobody looks at the values any more
  for (int64_t k = m; k < n; ++k) y[sort ? k : order[k]] = 0, order[k] |= kStarts;
  const double e = call.strength(row), sign = sort && !call.p.descending ? -1 : 1;
  if (m > 0 && (falling[0] != falling[0] || !(e >= 0))) {
    for (int64_t k = 0; k < m; ++k) y[sort ? k : order[k]] = (V)kNaN, order[k] |= kStarts;
  } else {
    int64_t begin = 0, end = m;
    while (begin < m && falling[begin] == INFINITY) ++begin;
    while (end > begin && falling[end - 1] == -INFINITY) --end;
    const auto infinite = [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        y[sort ? k : order[k]] = (V)(sort ? sign * falling[k] : (double)m - 0.5 * (double)(first + last - 1));
        if (sort || k == first) order[k] |= kStarts;
      }
    };
    infinite(0, begin), infinite(end, m);
    Falling f = {m, begin, end - begin, falling + begin, std::min(e, 1e300), 1, order + begin, threads,
                 call.loops};
    f.unit = unit_of(f);
    if (f.unit != 1)
      for (int64_t k = 0; k < f.count; ++k) f.values[k] *= f.unit;
    f.e = sort ? f.e / f.unit : f.e * f.unit;
    const Ranks<V> ranks = {values, y, f.order, call.rising() ? -1.0 : 1.0, f.count == n};
    if (sort) project<true>(f, call.p.kl, scratch, [=](int64_t k, double value) { y[begin + k] = (V)(sign * value); });
    else project<false>(f, call.p.kl, scratch, ranks);
  }
  if constexpr (sizeof(V) == sizeof(float))
    if (rounded) call.loops.narrow(call.p.dtype, y, (uint16_t*)out + at, n);
}

int forward(const char* name, bool sort, const fl_permutahedron* p, const void* x, void* out, int32_t* order) {
  return checked(name, p, [&](auto type) {
    const Call<decltype(type)> call = {*p, sort};
    return each_row(name, p->lists, [&](int64_t row, int threads, Scratch& scratch) {
      forward_row(call, row, x, out, order, threads, scratch);
    });
  });
}

}  // namespace
}  // namespace fl

extern "C" {

int fl_soft_rank(const fl_permutahedron* p, const void* x, void* ranks, int32_t* order) {
  return fl::forward("soft_rank", false, p, x, ranks, order);
}
int fl_soft_sort(const fl_permutahedron* p, const void* x, void* sorted, int32_t* order) {
  return fl::forward("soft_sort", true, p, x, sorted, order);
}

}  // extern "C"
