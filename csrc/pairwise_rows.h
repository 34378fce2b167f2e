// What the vector loops over pairs, compiled once per instruction set, offer to pairwise.cpp.
#pragma once
#include "pairwise.h"

namespace fl {

constexpr int64_t kPairBlock = 32;   // items whose pairs are walked together
constexpr int64_t kPairPad = 16;     // numbers behind the last item that may be read, of whatever value

enum class PairForm {                // of a pair's weight
  one,
  gap,                               // |a_i - a_j|
  product,                           // |a_i - a_j| (table[|rank_i - rank_j|] + |b_i - b_j|)
  own,                               // a_i
};

// The items of one list in the order of the walk: item i has the pairs (i, j), j = partner[i] to count - 1.
template <class T>
struct PairItems {
  int64_t count;
  const int32_t* partner;            // rising
  const T *score, *a, *b, *table;
  const int32_t* rank;
  double sigma;
};

// Items first to end, at most kPairBlock of them: `to`, one double per item, is added to.
template <class T>
struct PairRows {
  // Returns the sum of w f; to += its gradient.
  double (*losses)(const PairItems<T>&, int32_t function, PairForm form, int64_t first, int64_t end, double* to);
  void (*positions)(const PairItems<T>&, int64_t first, int64_t end, double* to);
  void (*positions_backward)(const PairItems<T>&, int64_t first, int64_t end, double* to);   // a: upstream
};

#define FL_PAIR_ROWS(isa)                    \
  namespace isa {                            \
  extern const PairRows<float> pair_float;   \
  extern const PairRows<double> pair_double; \
  }
FL_PAIR_ROWS(portable)
#if defined(FL_X86)
FL_PAIR_ROWS(avx2)
FL_PAIR_ROWS(avx512)
#endif
#undef FL_PAIR_ROWS

}  // namespace fl
