// The sort of soft sort and soft rank on a device: bitonic, by one block of threads in its shared memory.
//
// Keys rise as the row's items are to stand; equal keys stand by rising index, so the order is that of a stable sort. Any
// count will do: what a power of two would have behind the end is taken for the largest there is, and never moves. Up to
// three strides at a time are done in registers, a third of the shared memory's traffic and of the barriers.
#pragma once
#include "device.h"

namespace fl {
namespace FL_ISA {

// ---- keys: falling order of values as rising order of integers; NaN first, what does not count last -------------------

template <class V> struct KeyOf { using type = uint32_t; };
template <> struct KeyOf<double> { using type = uint64_t; };
template <class V> using Key = typename KeyOf<V>::type;

template <class V>
FL_FUNCTION Key<V> key_of(V value) {
  if (value != value) return 0;
  union { V number; Key<V> bits; } both = {value + 0};       // -0 is 0
  const Key<V> top = (Key<V>)1 << (8 * sizeof(V) - 1);
  return both.bits & top ? both.bits : ~(both.bits | top);
}

template <class V>
FL_FUNCTION V value_of(Key<V> key) {
  const Key<V> top = (Key<V>)1 << (8 * sizeof(V) - 1);
  union { Key<V> bits; V number; } both = {key & top ? key : ~(key | top)};
  return key == 0 ? (V)NAN : both.number;
}

template <class V> FL_FUNCTION constexpr Key<V> last_key() { return ~(Key<V>)0; }

// ---- the sort --------------------------------------------------------------------------------------------------------

template <class K>
FL_DEVICE void exchange(K& key, int32_t& index, K& other, int32_t& its) {
  if (key < other || (key == other && index <= its)) return;
  const K k = key;
  const int32_t i = index;
  key = other, index = its, other = k, its = i;
}

// Of `count` pairs that stand `apart` from one another, from `first` on: the strides count / 2, ..., 1 of a bitonic merge;
// or with `merges`, all merges of 2, 4, ..., count, each of which compares mirrored pairs first.
template <class K, int count>
FL_DEVICE void exchange_in_registers(K* keys, int32_t* indices, int first, int apart, int n, bool merges) {
  K key[count];
  int32_t index[count];
#pragma unroll
  for (int q = 0; q < count; ++q) {
    const int at = first + q * apart;
    key[q] = at < n ? keys[at] : ~(K)0, index[q] = at < n ? indices[at] : INT32_MAX;
  }
  if (merges) {
#pragma unroll
    for (int size = 2; size < count; size *= 2) {
#pragma unroll
      for (int q = 0; q < count; ++q)
        if (q % size < size / 2) {
          const int mirrored = q - q % size + size - 1 - q % size;
          exchange(key[q], index[q], key[mirrored], index[mirrored]);
        }
#pragma unroll
      for (int stride = size / 4; stride > 0; stride /= 2)
#pragma unroll
        for (int q = 0; q < count; ++q)
          if (!(q & stride)) exchange(key[q], index[q], key[q + stride], index[q + stride]);
    }
#pragma unroll
    for (int q = 0; q < count / 2; ++q) exchange(key[q], index[q], key[count - 1 - q], index[count - 1 - q]);
  }
#pragma unroll
  for (int stride = count / 2; stride > 0; stride /= 2)
    if (!merges || stride < count / 2) {
#pragma unroll
      for (int q = 0; q < count; ++q)
        if (!(q & stride)) exchange(key[q], index[q], key[q + stride], index[q + stride]);
    }
#pragma unroll
  for (int q = 0; q < count; ++q) {
    const int at = first + q * apart;
    if (at < n) keys[at] = key[q], indices[at] = index[q];
  }
}

template <class K, int count>
FL_DEVICE void exchange_strides(K* keys, int32_t* indices, int apart, int n) {
  for (int t = threadIdx.x;; t += blockDim.x) {
    const int first = t / apart * (apart * count) + t % apart;
    if (t / apart * (apart * count) >= n) break;
    if (first < n) exchange_in_registers<K, count>(keys, indices, first, apart, n, false);
  }
  barrier<Barrier::sorted>();
}

// By all threads of the block, which have passed a barrier since the pairs were written; the pairs are in place for all.
template <class K>
FL_DEVICE void block_sort(K* keys, int32_t* indices, int n) {
  for (int first = 8 * threadIdx.x; first < n; first += 8 * blockDim.x)
    exchange_in_registers<K, 8>(keys, indices, first, 1, n, true);
  barrier<Barrier::sorted>();
  for (int half = 8; half < n; half *= 2) {                    // merges of two sorted runs of `half`
    for (int t = threadIdx.x;; t += blockDim.x) {
      const int start = t / half * 2 * half, i = start + t % half, j = start + 2 * half - 1 - t % half;
      if (start + half >= n) break;
      if (j < n) exchange(keys[i], indices[i], keys[j], indices[j]);
    }
    barrier<Barrier::sorted>();
    int stride = half / 2;
    for (; stride >= 4; stride /= 8) exchange_strides<K, 8>(keys, indices, stride / 4, n);
    if (stride == 2) exchange_strides<K, 4>(keys, indices, 1, n);
    if (stride == 1) exchange_strides<K, 2>(keys, indices, 1, n);
  }
}

}  // namespace FL_ISA
}  // namespace fl
