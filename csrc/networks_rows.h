// What the vector loops of the sorting networks, compiled once per instruction set, offer to networks.cpp.
#pragma once
#include "networks.h"

namespace fl {

// A row's channels [first, end) on their way through the network.
template <class T>
struct Channels {
  const T* share;         // of each comparator
  int64_t count, first, end;
  bool transposed;        // backwards through the comparators
};

template <class T>
struct NetworkRows {
  // Of `count` gaps: share = 1 - F; slope = -d share / d gap; by_steepness = -d share / d steepness. Null: not wanted.
  void (*shares)(const fl_network&, const T* gaps, int64_t count, T* share, T* slope, T* by_steepness);
  // out = the row's channels, pushed; buffer: wires * most_channels
  void (*push)(const fl_network&, const Channels<T>&, const T* v, T* out, T* buffer);
  // dv = the channels of dout pulled back; dshare += what they say of each comparator's share. buffer: wires *
  // most_channels * (2 + segments) + segment * most_channels, for segments of `segment` comparators
  void (*push_backward)(const fl_network&, const Channels<T>&, const T* v, const T* dout, T* dv, double* dshare,
                        int64_t segment, T* buffer);
};

constexpr int64_t most_channels = 32;   // that go through together

template <class T> const NetworkRows<T>& network_rows();   // of the instruction set in use

#define FL_NETWORK_ROWS(isa)                      \
  namespace isa {                                 \
  extern const NetworkRows<float> network_float;  \
  extern const NetworkRows<double> network_double; \
  }
FL_NETWORK_ROWS(portable)
#if defined(FL_X86)
FL_NETWORK_ROWS(avx2)
FL_NETWORK_ROWS(avx512)
#endif
#undef FL_NETWORK_ROWS

}  // namespace fl
