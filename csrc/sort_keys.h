// What the sort makes of values: bits that rise as the value falls, in pairs with the positions of their items.
#pragma once
#include <type_traits>

#include "simd.h"

namespace fl {
namespace FL_ISA {

template <class T> struct Radix;

template <>
struct Radix<float> {
  using Key = uint32_t;
  using Pair = uint64_t;
  static FL_INLINE Pair pair(Key key, int64_t i) { return (Pair)key << 32 | (Pair)i; }
  static FL_INLINE Key key(Pair p) { return (Key)(p >> 32); }
  static FL_INLINE int32_t position(Pair p) { return (int32_t)p; }
};

template <>
struct Radix<double> {
  using Key = uint64_t;
  struct Pair {
    uint64_t key;
    int64_t position;
  };
  static FL_INLINE Pair pair(Key key, int64_t i) { return {key, i}; }
  static FL_INLINE Key key(const Pair& p) { return p.key; }
  static FL_INLINE int32_t position(const Pair& p) { return (int32_t)p.position; }
};

template <class Key> constexpr Key sign_bit = Key(1) << (8 * sizeof(Key) - 1);

// Its own inverse. No branch: signs cannot be foretold.
template <class Key>
FL_INLINE Key turned(Key bits) {
  const Key negative = (Key)((std::make_signed_t<Key>)bits >> (8 * sizeof(Key) - 1));
  return bits ^ (~negative & (sign_bit<Key> - 1));
}

// 0 for NaN.
template <class T>
FL_INLINE typename Radix<T>::Key key_of(T x, bool rising) {
  using Key = typename Radix<T>::Key;
  const T falling = (rising ? -x : x) + T(0);   // -0 becomes 0
  const Key key = turned(bits_of<Key>(falling));
  return x == x ? key : 0;
}

template <class T>
FL_INLINE double value_of(typename Radix<T>::Key key) { return bits_of<T>(turned(key)); }

}  // namespace FL_ISA
}  // namespace fl
