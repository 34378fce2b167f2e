// The differentiable sorting networks on the CPU: threads over rows, and over channels where rows are few.
#include "networks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "arguments.h"
#include "networks_rows.h"

namespace fl {
namespace {

constexpr int64_t kSegmentBytes = 2 << 20;   // of what a block of channels leaves for its way back
constexpr int64_t kFewRows = 16, kGroup = 128;   // fewer rows than that: channels are shared out in groups of this

int check(const char* name, const fl_network* net) {
  if (!net) return fail("%s: no network", name);
  if (net->rows < 0 || net->wires < 0 || net->comparators < 0 || net->layers < 0)
    return fail("%s: a negative size", name);
  if (net->comparators && !(net->low && net->high && net->first)) return fail("%s: no comparators", name);
  if (net->dtype != FL_F32 && net->dtype != FL_F64) return fail("%s: dtype %d is unknown", name, net->dtype);
  if (net->distribution < FL_CAUCHY || net->distribution > FL_OPTIMAL)
    return fail("%s: distribution %d is unknown", name, net->distribution);
  return 0;
}

template <class T> T infinity() { return std::numeric_limits<T>::infinity(); }

template <class T>
void sort_row(const fl_network& net, int64_t layers, T* x, T* gaps, T* share) {
  for (int64_t layer = 0; layer < net.layers; ++layer) {
    const int64_t first = net.first[layer], end = net.first[layer + 1];
    if (layer >= layers) {
      std::fill(gaps + first, gaps + end, infinity<T>());
      continue;
    }
    for (int64_t t = first; t < end; ++t) {
      const T a = x[net.low[t]], b = x[net.high[t]];
      gaps[t] = a == b ? T(0) : b - a;
    }
    network_rows<T>().shares(net, gaps + first, end - first, share, nullptr, nullptr);
    for (int64_t t = first; t < end; ++t) {
      T &a = x[net.low[t]], &b = x[net.high[t]];
      if (std::isinf(gaps[t])) {
        if (gaps[t] < 0) std::swap(a, b);
      } else {
        const T mixed = share[t - first] * gaps[t];
        a += mixed;
        b -= mixed;
      }
    }
  }
}

template <class T>
double sort_row_backward(const fl_network& net, const T* gaps, const T* dgaps, T* g, T* share) {
  T *const slope = share + net.wires, *const by_steepness = slope + net.wires;
  double sum = 0;
  for (int64_t layer = net.layers - 1; layer >= 0; --layer) {
    const int64_t first = net.first[layer], end = net.first[layer + 1];
    network_rows<T>().shares(net, gaps + first, end - first, share, slope, by_steepness);
    for (int64_t t = first; t < end; ++t) {
      T &low = g[net.low[t]], &high = g[net.high[t]];
      const T d = gaps[t], apart = low - high;
      if (std::isinf(d)) {
        if (d < 0) std::swap(low, high);
        continue;
      }
      const T by_gap = apart * (share[t - first] - slope[t - first] * d) + dgaps[t];
      sum -= (double)apart * d * by_steepness[t - first];
      low -= by_gap;
      high += by_gap;
    }
  }
  return sum;
}

template <class T>
int sort(const fl_network& net, const T* x, const int64_t* active, T* sorted, T* gaps) {
#pragma omp parallel if (net.rows > 1)
  {
    std::vector<T> share((size_t)net.wires);
#pragma omp for schedule(dynamic)
    for (int64_t r = 0; r < net.rows; ++r) {
      T* const row = sorted + r * net.wires;
      std::copy(x + r * net.wires, x + (r + 1) * net.wires, row);
      sort_row(net, active ? active[r] : net.layers, row, gaps + r * net.comparators, share.data());
    }
  }
  return 0;
}

template <class T>
int sort_backward(const fl_network& net, const T* gaps, const T* dsorted, const T* dgaps, T* dx, double* dsteepness) {
#pragma omp parallel if (net.rows > 1)
  {
    std::vector<T> share(3 * (size_t)net.wires);
#pragma omp for schedule(dynamic)
    for (int64_t r = 0; r < net.rows; ++r) {
      T* const row = dx + r * net.wires;
      std::copy(dsorted + r * net.wires, dsorted + (r + 1) * net.wires, row);
      const int64_t at = r * net.comparators;
      dsteepness[r] = sort_row_backward(net, gaps + at, dgaps + at, row, share.data());
    }
  }
  return 0;
}

// Channels in groups, as many as the shapes say: no result depends on the number of threads.
int64_t groups_of(const fl_network& net, int64_t channels) {
  return net.rows >= kFewRows ? 1 : std::max<int64_t>(1, (channels + kGroup - 1) / kGroup);
}

template <class T>
struct Work {
  const fl_network& net;
  const T *gaps, *v;
  int64_t stride, channels;
  bool transposed;
};

template <class T>
int push(const Work<T>& w, T* out) {
  const fl_network& net = w.net;
  const int64_t groups = groups_of(net, w.channels), per = (w.channels + groups - 1) / groups;
#pragma omp parallel if (net.rows * groups > 1)
  {
    std::vector<T> share((size_t)net.comparators), buffer((size_t)(net.wires * most_channels));
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < net.rows * groups; ++task) {
      const int64_t r = task / groups, g = task % groups;
      network_rows<T>().shares(net, w.gaps + r * net.comparators, net.comparators, share.data(), nullptr, nullptr);
      const Channels<T> c = {share.data(), w.channels, g * per, std::min(w.channels, (g + 1) * per), w.transposed};
      network_rows<T>().push(net, c, w.v + r * w.stride, out + r * net.wires * w.channels, buffer.data());
    }
  }
  return 0;
}

template <class T>
int push_backward(const Work<T>& w, const T* dout, T* dv, T* dgaps, double* dsteepness) {
  const fl_network& net = w.net;
  const int64_t groups = groups_of(net, w.channels), per = (w.channels + groups - 1) / groups, n = net.comparators;
  const int64_t block = std::min(most_channels, std::max<int64_t>(1, w.channels));
  const int64_t segment = std::max<int64_t>(1, std::min(n, kSegmentBytes / (block * (int64_t)sizeof(T))));
  const int64_t room = block * (net.wires * (2 + (n + segment - 1) / segment) + segment);
  std::vector<double> dshare((size_t)(net.rows < kFewRows ? net.rows * groups * n : 0));
#pragma omp parallel if (net.rows * groups > 1)
  {
    std::vector<T> share(3 * (size_t)n), buffer((size_t)room);
    std::vector<double> own((size_t)n);
    T *const slope = share.data() + n, *const by_steepness = slope + n;
    const auto finish = [&](int64_t r, const double* sums) {
      network_rows<T>().shares(net, w.gaps + r * n, n, nullptr, slope, by_steepness);
      double total = 0;
      for (int64_t t = 0; t < n; ++t) {
        dgaps[r * n + t] = (T)(-sums[t] * slope[t]);
        total -= sums[t] * by_steepness[t];
      }
      dsteepness[r] = total;
    };
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < net.rows * groups; ++task) {
      const int64_t r = task / groups, g = task % groups, at = r * net.wires * w.channels;
      double* const sums = dshare.empty() ? own.data() : dshare.data() + task * n;
      std::fill(sums, sums + n, 0.0);
      network_rows<T>().shares(net, w.gaps + r * n, n, share.data(), nullptr, nullptr);
      const Channels<T> c = {share.data(), w.channels, g * per, std::min(w.channels, (g + 1) * per), w.transposed};
      network_rows<T>().push_backward(net, c, w.v + r * w.stride, dout + at, dv ? dv + at : nullptr, sums, segment,
                                      buffer.data());
      if (dshare.empty()) finish(r, sums);
    }
    if (!dshare.empty()) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < net.rows; ++r) {
        std::fill(own.begin(), own.end(), 0.0);
        for (int64_t g = 0; g < groups; ++g)
          for (int64_t t = 0; t < n; ++t) own[t] += dshare[(r * groups + g) * n + t];
        finish(r, own.data());
      }
    }
  }
  return 0;
}

template <class T>
const NetworkRows<T>& table(const NetworkRows<float>& single, const NetworkRows<double>& twice) {
  if constexpr (sizeof(T) == sizeof(float)) return single;
  else return twice;
}

// act(a number of the network's type); scratch that cannot be had is an error, not an exception.
template <class Act>
int with_type(const char* name, const fl_network* net, Act act) {
  if (int status = check(name, net)) return status;
  try {
    return net->dtype == FL_F32 ? act(0.0f) : act(0.0);
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory", name);
  }
}

}  // namespace

template <class T>
const NetworkRows<T>& network_rows() {
#if defined(FL_X86)
  if (std::strcmp(fl_isa(), "avx512") == 0) return table<T>(avx512::network_float, avx512::network_double);
  if (std::strcmp(fl_isa(), "avx2") == 0) return table<T>(avx2::network_float, avx2::network_double);
#endif
  return table<T>(portable::network_float, portable::network_double);
}
template const NetworkRows<float>& network_rows<float>();
template const NetworkRows<double>& network_rows<double>();

}  // namespace fl

extern "C" {

int fl_network_sort(const fl_network* net, const void* x, const int64_t* active, void* sorted, void* gaps) {
  return fl::with_type("network_sort", net, [&](auto number) {
    using T = decltype(number);
    return fl::sort<T>(*net, (const T*)x, active, (T*)sorted, (T*)gaps);
  });
}

int fl_network_sort_backward(const fl_network* net, const void* gaps, const void* dsorted, const void* dgaps, void* dx,
                             double* dsteepness) {
  return fl::with_type("network_sort_backward", net, [&](auto number) {
    using T = decltype(number);
    return fl::sort_backward<T>(*net, (const T*)gaps, (const T*)dsorted, (const T*)dgaps, (T*)dx, dsteepness);
  });
}

int fl_network_push(const fl_network* net, const void* gaps, const void* v, int64_t row_stride, int64_t channels,
                    int32_t transposed, void* out) {
  return fl::with_type("network_push", net, [&](auto number) {
    using T = decltype(number);
    return fl::push<T>({*net, (const T*)gaps, (const T*)v, row_stride, channels, transposed != 0}, (T*)out);
  });
}

int fl_network_push_backward(const fl_network* net, const void* gaps, const void* v, int64_t row_stride,
                             int64_t channels, int32_t transposed, const void* dout, void* dv, void* dgaps,
                             double* dsteepness) {
  return fl::with_type("network_push_backward", net, [&](auto number) {
    using T = decltype(number);
    return fl::push_backward<T>({*net, (const T*)gaps, (const T*)v, row_stride, channels, transposed != 0},
                                (const T*)dout, (T*)dv, (T*)dgaps, dsteepness);
  });
}
}
