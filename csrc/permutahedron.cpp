// The soft sort and soft rank on the CPU.
#include "permutahedron.h"

#include <omp.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#include "arguments.h"
#include "permutahedron_rows.h"
#include "pooling.h"
#include "sort_core.h"

namespace fl {
namespace {

const PermutahedronLoops& loops() {
#if defined(FL_X86)
  static const PermutahedronLoops& in_use = std::strcmp(fl_isa(), "avx512") == 0 ? avx512::permutahedron_loops
                                            : std::strcmp(fl_isa(), "avx2") == 0 ? avx2::permutahedron_loops
                                                                                 : portable::permutahedron_loops;
  return in_use;
#else
  return portable::permutahedron_loops;
#endif
}

constexpr int32_t kStarts = INT32_MIN, kPosition = INT32_MAX;
inline int64_t started(int32_t entry) { return (int64_t)((uint32_t)entry >> 31); }   // 0 or 1; no branch
constexpr double kLog2e = 1.44269504088896340736, kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kWorthThreads = 4096, kLongRow = int64_t(1) << 16;   // items of a call, of a row

// Memory of one thread's rows, kept from call to call unless it is large.
struct Scratch {
  SortScratch sort;
  Buffer falling, terms, blocks, numbers, values, gradients, weights, out;

  void shrink() {
    Buffer* const all[] = {&sort.pairs, &sort.counts, &sort.positions, &sort.values, &falling, &terms,
                           &blocks,     &numbers,     &values,         &gradients,   &weights, &out};
    size_t bytes = 0;
    for (const Buffer* one : all) bytes += one->bytes();
    for (Buffer* one : all)
      if (bytes > size_t(128) << 20) one->clear();
  }
};

// Rows of values of type V, which is what a call computes on: float, or double for FL_F64.
template <class V>
struct Call {
  const fl_permutahedron& p;
  bool sort;

  bool half() const { return p.dtype == FL_BF16 || p.dtype == FL_F16; }
  bool rising() const { return sort != (p.descending != 0); }   // s is made of -x
  double strength(int64_t row) const { return p.strengths ? p.strengths[row] : p.strength; }
  size_t item_size() const { return half() ? 2 : sizeof(V); }

  const V* values(const void* from, int64_t first, int64_t count, Buffer& memory) const {
    if constexpr (sizeof(V) == sizeof(float))
      if (half()) {
        float* const wide = memory.room<float>(count);
        loops().widen(p.dtype, (const uint16_t*)from + first, wide, count);
        return wide;
      }
    return (const V*)from + first;
  }
};

// work(row, threads, scratch) for every row, threads over rows, or where there are few and long ones, over each.
template <class Work>
int each_row(const char* name, const fl_lists& lists, const Work& work) {
  const int threads = all_items(lists) >= kWorthThreads ? omp_get_max_threads() : 1;
  const bool within = lists.rows < threads && lists.width >= kLongRow;
  std::atomic<bool> failed{false};
  const auto row_of = [&](int64_t row, int inside) {
    thread_local Scratch scratch;
    try {
      work(row, inside, scratch);
      scratch.shrink();
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  if (within || threads == 1 || lists.rows < 2)
    for (int64_t row = 0; row < lists.rows; ++row) row_of(row, within ? threads : 1);
  else {
    const int team = (int)std::min<int64_t>(threads, lists.rows);
    const int64_t some = std::max<int64_t>(1, lists.rows / (8 * team));
#pragma omp parallel for num_threads(team) schedule(dynamic, some)
    for (int64_t row = 0; row < lists.rows; ++row) row_of(row, 1);
  }
  return failed ? fail("%s: no memory", name) : 0;
}

// ---- forward -----------------------------------------------------------------------------------------------------

// A row's items that count, in falling order of +-x: infinite ones, `count` finite ones from `begin` on, infinite ones.
struct Falling {
  int64_t m, begin, count;
  double *values;                 // of the finite ones, times `unit`, a power of two that keeps sums of them finite
  double e, unit;                 // e: of values so scaled
  int32_t* order;                 // of the finite ones
  int threads;
};

double unit_of(const Falling& f) {
  if (f.count == 0) return 1;
  const double most = std::max(std::fabs(f.values[0]), std::fabs(f.values[f.count - 1]));
  return most > 0x1p800 ? 0x1p-220 : 1;
}

// write(k, at(of(block), k)) for every item k. Which block an item has is counted, not asked: where blocks are short, branches
// on their ends cannot be foretold.
template <class Pool, class Of, class At, class Write>
void each_item(const Falling& f, const Pool& pooling, Scratch& scratch, const Of& of, const At& at, const Write& write) {
  using Numbers = decltype(of(typename Pool::Block()));
  Numbers* const all = scratch.numbers.room<Numbers>(f.count);
  Pieces(f.count).each(f.threads, [&](int64_t, int64_t first, int64_t end) {
    Numbers* next = all + first;
    pooling.each(first, end, [&](const typename Pool::Block& block, int64_t from, int64_t) {
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
  Block* const slots = scratch.blocks.room<Block>(f.count);
  const Pooling<Rule> pooling({f.values, f.e}, f.count, f.threads, slots);
  const double by = std::min(1 / f.e, std::numeric_limits<double>::max()), back = 1 / f.unit;
  const double ranks = (double)(f.m - f.begin);
  struct Numbers {
    double value, below, centre, least, most;
  };
  const auto of = [&](const Block& block) {
    const double first = (double)block.first, most = ranks - first;
    return Numbers{block.value, block.below / block.count, first + (block.count - 1) * 0.5, most - (block.count - 1), most};
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
  each_item(f, pooling, scratch, of, [&](const Numbers& b, int64_t k) {
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
  Block* const slots = scratch.blocks.room<Block>(f.count);
  const double by = kLog2e / f.e;
  Pieces(f.count).each(f.threads, [&](int64_t, int64_t first, int64_t end) {
    if (wide) return loops().exp2_wide(f.values + first, by, e + first, q + first, end - first);
    for (int64_t k = first; k < end; ++k) e[k] = (f.values[k] - f.values[0]) * by;
    loops().exp2(e + first, e + first, end - first);
  });
  const Pooling<Rule> pooling({e, q, nullptr, nullptr, (double)(f.m - f.begin)}, f.count, f.threads, slots);
  struct Numbers {
    double by, q;
  };
  each_item(f, pooling, scratch, [](const Block& block) { return Numbers{block.below / block.above, block.above_q}; },
            [=](const Numbers& b, int64_t k) { return (wide ? scaled(e[k], q[k] - b.q) : e[k]) * b.by; }, write);
}

template <class Write>
void entropic_sort(const Falling& f, Scratch& scratch, const Write& write) {
  using Rule = Entropic<true, true>;
  using Block = typename Rule::Block;
  double *const w = scratch.terms.room<double>(4 * f.count), *const wq = w + f.count, *const s = wq + f.count,
               *const sq = s + f.count;
  Block* const slots = scratch.blocks.room<Block>(f.count);
  const Pieces pieces(f.count);
  const double back = 1 / f.unit;
  pieces.each(f.threads, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t k = first; k < end; ++k) w[k] = (double)(f.count - k);
    loops().exp2_wide(w + first, kLog2e * back / f.e, w + first, wq + first, end - first);
    loops().exp2_wide(f.values + first, kLog2e * back, s + first, sq + first, end - first);
  });
  const Pooling<Rule> pooling({w, wq, s, sq, 0}, f.count, f.threads, slots);
  pieces.each(f.threads, [&](int64_t, int64_t first, int64_t end) {
    pooling.each(first, end, [&](const Block& block, int64_t from, int64_t to) {
      const int64_t start = block.first;
      if (from == start) f.order[from] |= kStarts;
      if (block.count == 1) return write(from, f.values[from] * back);
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
    if (far == 0) far += loops().gaps(f.values + first, 1 / f.e, std::min(f.count, end + 1) - first);
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
    Falling f = {m, begin, end - begin, falling + begin, std::min(e, 1e300), 1, order + begin, threads};
    f.unit = unit_of(f);
    if (f.unit != 1)
      for (int64_t k = 0; k < f.count; ++k) f.values[k] *= f.unit;
    f.e = sort ? f.e / f.unit : f.e * f.unit;
    const Ranks<V> ranks = {values, y, f.order, call.rising() ? -1.0 : 1.0, f.count == n};
    if (sort) project<true>(f, call.p.kl, scratch, [=](int64_t k, double value) { y[begin + k] = (V)(sign * value); });
    else project<false>(f, call.p.kl, scratch, ranks);
  }
  if constexpr (sizeof(V) == sizeof(float))
    if (rounded) loops().narrow(call.p.dtype, y, (uint16_t*)out + at, n);
}

// ---- backward ----------------------------------------------------------------------------------------------------

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
};

template <class V, bool sort, bool kl>
struct Backward : Gradient<V> {
  using G = Gradient<V>;
  using G::order, G::values, G::falling, G::weights, G::gradients, G::g, G::dx, G::e, G::sign, G::count, G::begin;

  bool starts(int64_t k) const { return started(order[k]) != 0; }
  int64_t position(int64_t k) const { return order[k] & kPosition; }
  double value(int64_t k) const { return sign * (double)values[position(k)]; }
  double gradient(int64_t k) const { return gradients[k]; }

  Sums sums(int64_t from, int64_t to) const {
    Sums all;
    if constexpr (kl) {
      loops().weighted(weights + from, gradients + from, to - from, &all.p, &all.pg);
      if (sort) all.g = loops().sum(gradients + from, to - from);
    } else {
      all.g = loops().sum(gradients + from, to - from);
    }
    return all;
  }

  // Of items from to `to` of the block of items first to end. Returns their part of the derivative in e.
  double write(int64_t from, int64_t to, int64_t first, int64_t end, const Sums& all) const {
    const double size = (double)(end - first), by = std::min(1 / e, std::numeric_limits<double>::max());
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
      const double ranks = size * ((double)(this->m - begin - first) - 0.5 * (size - 1)), slope = kl ? ranks / all.p * by : by;
      for (int64_t k = from; k < to; ++k) {
        const double change = (gradient(k) - mean) * slope * (kl ? weights[k] : 1);
        dx[position(k)] = (V)(sign * change);
        if (this->by_strength && change != 0) of_strength -= change * ((falling[k] - value(first)) * by);
      }
    }
    return of_strength;
  }

  // All of that for items from to `to`, whole blocks, but the derivative in e. Which block an item has is counted, not asked,
  // as in `each_item`.
  struct Numbers {
    double p, sum, w;
  };
  void write_short(int64_t from, int64_t to, Numbers* blocks) const {
    const double by = std::min(1 / e, std::numeric_limits<double>::max());
    Numbers* const last = blocks + loops().negative(order + from, to - from);
    std::fill(blocks, last, Numbers{0, 0, 0});
    for (int64_t k = from, own = -1; k < to; ++k) {
      Numbers& block = blocks[own += started(order[k])];
      block.p += kl ? weights[k] : 1;
      block.sum += kl && !sort ? weights[k] * gradients[k] : gradients[k];
      if (kl && !sort) block.w += (double)(this->m - begin - k);
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

  // work(from, to, first): items of every block that has some among these; `first` is the block's.
  template <class Work>
  void each_block(int64_t from, int64_t end, int64_t first, const Work& work) const {
    while (from < end) {
      int64_t to = from + 1;
      while (to < end && !starts(to)) ++to;
      work(from, to, starts(from) ? from : first);
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
        const double by = kLog2e * (sort ? 1 : std::min(1 / e, std::numeric_limits<double>::max()));
        double top = value(own.first);
        for (int64_t k = first; k < end; ++k) {
          const double own = value(k);
          top = starts(k) ? own : top;
          falling[k] = own, weights[k] = (own - top) * by;
          gradients[k] = (double)g[sort ? begin + k : position(k)];
        }
        loops().exp2(weights + first, weights + first, end - first);
      }
      if (pieces == 1 && !this->by_strength && 8 * loops().negative(order, count) > count)
        return write_short(0, count, (Numbers*)this->numbers);
      each_block(first, end, own.first, [&](int64_t from, int64_t to, int64_t start) {
        const Sums all = sums(from, to);
        if (start < from) own.head = all;
        else if (to == count || starts(to)) own.of_strength += write(from, to, start, to, all);
        else own.tail = all;
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

// The l2 gradient of a row of one block, in whatever order: by (g - mean g), or that mean where `by` is 0.
template <class V>
void only_block(const V* g, V* dx, int64_t n, double by, int threads) {
  const Pieces cut(n);
  double part[65] = {}, sum = 0;
  cut.each(threads, [&](int64_t i, int64_t first, int64_t end) {
    if constexpr (sizeof(V) == sizeof(float)) part[i] = loops().sum_floats(g + first, end - first);
    else part[i] = loops().sum(g + first, end - first);
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
    const int64_t blocks = loops().negative(order + begin, end - begin);
    if (e == 0 || blocks == end - begin) begin = end = m;   // each item is a block
    hard(0, begin), hard(end, m);
    const bool by_values = kl || (dstrength && !sort);
    const double sign = call.rising() ? -1 : 1;
    double* const falling = by_values ? scratch.falling.room<double>(n) : nullptr;
    double* const weights = kl ? scratch.weights.room<double>(n) : nullptr;
    const Gradient<V> gradient = {m, begin, end - begin, order + begin, values, falling, weights, scratch.terms.room<double>(n),
                                  scratch.blocks.room<double>(3 * n), incoming, out, e, sign,
                                  dstrength != nullptr, threads};
    if (!kl && !dstrength && blocks == 1 && end - begin == n)
      only_block(incoming, out, n, sort ? 0 : sign * std::min(1 / e, std::numeric_limits<double>::max()), threads);
    else if (end > begin)
      of_strength = sort ? (kl ? Backward<V, true, true>{gradient}.run() : Backward<V, true, false>{gradient}.run())
                         : (kl ? Backward<V, false, true>{gradient}.run() : Backward<V, false, false>{gradient}.run());
  }
  if (dstrength) dstrength[row] = of_strength;
  if constexpr (sizeof(V) == sizeof(float))
    if (half) loops().narrow(call.p.dtype, out, (uint16_t*)dx + at, n);
}

template <class Run>
int checked(const char* name, const fl_permutahedron* p, const Run& run) {
  if (!p) return fail("%s: null", name);
  if (p->dtype < FL_F32 || p->dtype > FL_F64) return fail("%s: dtype %d is unknown", name, p->dtype);
  if (p->lists.rows < 0 || p->lists.width < 0 || p->lists.width > INT32_MAX)
    return fail("%s: %lld rows of width %lld, expected 0 to 2^31 - 1", name, (long long)p->lists.rows,
                (long long)p->lists.width);
  if (p->lists.rows == 0) return 0;
  try {
    if (p->dtype == FL_F64) return run(double());
    return run(float());
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory", name);
  }
}

int forward(const char* name, bool sort, const fl_permutahedron* p, const void* x, void* out, int32_t* order) {
  return checked(name, p, [&](auto type) {
    const Call<decltype(type)> call = {*p, sort};
    return each_row(name, p->lists, [&](int64_t row, int threads, Scratch& scratch) {
      forward_row(call, row, x, out, order, threads, scratch);
    });
  });
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

int fl_soft_rank(const fl_permutahedron* p, const void* x, void* ranks, int32_t* order) {
  return fl::forward("soft_rank", false, p, x, ranks, order);
}
int fl_soft_sort(const fl_permutahedron* p, const void* x, void* sorted, int32_t* order) {
  return fl::forward("soft_sort", true, p, x, sorted, order);
}
int fl_soft_rank_backward(const fl_permutahedron* p, const void* x, const int32_t* order, const void* dranks, void* dx,
                          double* dstrength) {
  return fl::backward("soft_rank_backward", false, p, x, order, dranks, dx, dstrength);
}
int fl_soft_sort_backward(const fl_permutahedron* p, const void* x, const int32_t* order, const void* dsorted, void* dx,
                          double* dstrength) {
  return fl::backward("soft_sort_backward", true, p, x, order, dsorted, dx, dstrength);
}

}  // extern "C"
