// What the vector loops of the factored layer, compiled once per instruction set, offer to spherical.cpp. Every
// function works on a range of rows or of numbers, so that threads can share it out.
#pragma once
#include "spherical.h"

namespace fl {

// Examples of one class: entries[start[g]] to entries[start[g + 1]] of group g, in rising order of examples.
struct Entry {
  int64_t example;
  double weight;   // sum of alpha over the example's targets of this class
};
struct Groups {
  int64_t count;
  const int64_t *of, *start;   // class and first entry of each group
  const Entry* entries;
};

template <class T>
struct SphericalRows {
  // to = by * from
  void (*narrow)(const double* from, T* to, int64_t count);
  void (*scaled)(const T* from, T* to, T by, int64_t count);
  // x = keep x + by change
  void (*change)(double* x, const T* change, double keep, double by, int64_t count);
  double (*changed)(const double* x, const T* change, double keep, double by, int64_t count);   // its sum of squares
  // Losses and derivatives of examples whose hq and hu are there.
  void (*visit)(const fl_factors&, const fl_visit&, int32_t loss, const double* parameters, int64_t first, int64_t end);
  // batch.yw holds picked U of the visit
  void (*backward)(const fl_factors&, const fl_visit&, const double* upstream, const fl_batch&, T* dh, int64_t first,
                   int64_t end);
  // hg = 2 gamma h, both = gh + yw, along = h . offset
  void (*weigh)(const fl_factors&, const fl_batch&, T* hg, T* both, double* along, int64_t first, int64_t end);
  // out_j = sum_i weight_i h_ij of columns first to end
  void (*weighted)(const fl_batch&, int64_t d, const double* weight, double* out, int64_t first, int64_t end);
  // Rows first to end of a size x size matrix:
  //   out_ij = by_column_j symmetric_ij, of which only blocks (block x block) on and left of the diagonal are known, and
  //   first is a multiple of block; returns the sum of out's squares
  double (*mirrored)(const T* symmetric, T* out, int64_t size, int64_t block, const T* by_column, int64_t first,
                     int64_t end);
  //   out = r + r^T - ones ones^T / n
  void (*joined)(const T* r, T* out, int64_t size, const double* ones, double n, int64_t first, int64_t end);
  //   gram = keep gram - z - z^T
  void (*less)(double* gram, const T* z, int64_t size, double keep, int64_t first, int64_t end);
  // Sums of weight * rows over the entries of groups first to end: those of `rows` themselves into out, group by group;
  // -lr times those, into P.
  void (*gather)(const Groups&, const T* rows, int64_t d, T* out, int64_t first, int64_t end);
  void (*scatter)(const Groups&, const T* rows, const fl_factors&, double lr, int64_t first, int64_t end);
};

template <class T> const SphericalRows<T>& spherical_rows();   // of the instruction set in use

#define FL_SPHERICAL_ROWS(isa)                        \
  namespace isa {                                     \
  extern const SphericalRows<float> spherical_float;  \
  extern const SphericalRows<double> spherical_double; \
  }
FL_SPHERICAL_ROWS(portable)
#if defined(FL_X86)
FL_SPHERICAL_ROWS(avx2)
FL_SPHERICAL_ROWS(avx512)
#endif
#undef FL_SPHERICAL_ROWS

}  // namespace fl
