// A device for tests: CUDA kernels compiled by the host's compiler, every thread of a block a fiber of its own.
//
// Blocks run one after the other. Within one, a fiber runs until it waits: at a barrier for the whole block, in a shuffle
// for the lanes that the mask names. Which goes next is drawn at random, and warps run ahead of one another, so what one
// thread needs of another and no barrier orders is soon missing or overwritten; shared memory holds NaN until it is written. A barrier that not all threads
// reach, two barriers that are taken for one, a shuffle of other lanes than its mask says: each is an error with a text.
#pragma once
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include "simd.h"   // for its half precision
#undef FL_ISA

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

struct HostDim { unsigned x = 0, y = 0, z = 0; };
inline HostDim threadIdx, blockIdx, blockDim, gridDim;

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }

// Threads change over at waits only: what they do to memory is atomic as it stands.
template <class T> T atomicAdd(T* at, T x) { const T was = *at; *at += x; return was; }
inline unsigned atomicAnd(unsigned* at, unsigned x) { const unsigned was = *at; *at &= x; return was; }
inline unsigned atomicOr(unsigned* at, unsigned x) { const unsigned was = *at; *at |= x; return was; }

#if !defined(FL_HOST_DYNAMIC_SHARED)
#define FL_HOST_DYNAMIC_SHARED (227 << 10)
#endif

namespace host {

constexpr int most_fibers = 1024, warp = 32;
constexpr size_t stack_bytes = 128 << 10, shared_bytes = 48 << 10, dynamic_bytes = FL_HOST_DYNAMIC_SHARED, guard = 64;

enum class State { ready, barrier, shuffle, done };

struct Fiber {
  jmp_buf here;
  State state;
  bool started;
  int place;                    // the barrier's number, or the shuffle's line
  unsigned mask, apart;
  uint64_t given, taken;
};

struct Device {
  Fiber fibers[most_fibers];
  char* stacks = static_cast<char*>(malloc(stack_bytes * most_fibers));
  alignas(16) char shared[shared_bytes];
  size_t shared_used = 0;
  alignas(16) char dynamic[dynamic_bytes + guard];
  size_t dynamic_used = 0;
  jmp_buf scheduler;
  unsigned now = 0;
  void (*body)(const void*) = nullptr;
  const void* closure = nullptr;
  uint64_t random = 1;
  char text[200];

  unsigned draw(unsigned n) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)((random >> 33) % n);
  }
};
inline Device device;

inline void wait(State state) {
  Fiber& f = device.fibers[device.now];
  f.state = state;
  if (!_setjmp(f.here)) _longjmp(device.scheduler, 1);
}

inline void synchronize(int place) {
  device.fibers[device.now].place = place;
  wait(State::barrier);
}

inline void enter() {
  device.body(device.closure);
  device.fibers[device.now].state = State::done;
  _longjmp(device.scheduler, 1);
}

inline void resume(unsigned index) {
  Fiber& f = device.fibers[index];
  device.now = threadIdx.x = index;
  if (_setjmp(device.scheduler)) return;
  if (f.started) _longjmp(f.here, 1);
  f.started = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = device.stacks + stack_bytes * index;
  start.uc_stack.ss_size = stack_bytes;
  start.uc_link = nullptr;
  makecontext(&start, enter, 0);
  setcontext(&start);
}

// Lets the shuffles of the warp happen whose lanes are all there. Returns whether any did.
inline bool exchange(unsigned first, unsigned threads) {
  bool any = false;
  for (unsigned i = first; i < first + warp && i < threads; ++i) {
    const Fiber& f = device.fibers[i];
    if (f.state != State::shuffle) continue;
    bool whole = f.mask >> (i - first) & 1;            // who shuffles names itself
    for (unsigned lane = 0; lane < warp && whole; ++lane) {
      if (!(f.mask >> lane & 1)) continue;
      const Fiber& other = device.fibers[first + lane];
      whole = first + lane < threads && other.state == State::shuffle && other.place == f.place &&
              other.mask == f.mask && (f.mask >> (lane ^ f.apart) & 1);
    }
    if (!whole) continue;
    const unsigned mask = f.mask;
    for (unsigned lane = 0; lane < warp; ++lane)
      if (mask >> lane & 1) {
        Fiber& other = device.fibers[first + lane];
        other.taken = device.fibers[first + (lane ^ other.apart)].given;
        other.state = State::ready;
      }
    any = true;
  }
  return any;
}

// Runs the threads of a warp that can run, in any order. Returns whether there were any.
inline bool run_warp(unsigned first, unsigned threads) {
  unsigned ready[warp], count = 0;
  for (unsigned i = first; i < first + warp && i < threads; ++i)
    if (device.fibers[i].state == State::ready) ready[count++] = i;
  const bool any = count > 0;
  for (; count > 0; --count) {
    const unsigned drawn = device.draw(count), index = ready[drawn];
    ready[drawn] = ready[count - 1];
    resume(index);
  }
  return exchange(first, threads) || any;
}

inline const char* run_block(unsigned threads) {
  memset(device.shared, 0xff, sizeof device.shared);
  memset(device.dynamic, 0xff, device.dynamic_used + guard);
  for (unsigned i = 0; i < threads; ++i) device.fibers[i].state = State::ready, device.fibers[i].started = false;
  const unsigned warps = (threads + warp - 1) / warp;
  for (;;) {
    // One warp runs ahead as far as it can, mostly: to the next barrier, and past it no sooner than the others are there.
    bool any = false;
    for (unsigned left = warps, turn = device.draw(warps); left > 0; --left, ++turn)
      while (run_warp(turn % warps * warp, threads)) {
        any = true;
        if (device.draw(8) == 0) break;
      }
    if (any) continue;
    unsigned at[4] = {}, same = 0;
    for (unsigned i = 0; i < threads; ++i) {
      ++at[(int)device.fibers[i].state];
      same += device.fibers[i].place == device.fibers[0].place;
    }
    if (at[(int)State::done] == threads) {
      for (size_t i = 0; i < guard; ++i)
        if (device.dynamic[device.dynamic_used + i] != '\xff') return "written past the dynamic shared memory";
      return nullptr;
    }
    if (at[(int)State::barrier] == threads && same == threads) {
      for (unsigned i = 0; i < threads; ++i) device.fibers[i].state = State::ready;
      continue;
    }
    snprintf(device.text, sizeof device.text,
             "block (%u, %u) is stuck: of %u threads %u wait at barriers (%s), %u in shuffles, %u have left", blockIdx.x,
             blockIdx.y, threads, at[1], same == threads ? "the same" : "different ones", at[2], at[3]);
    return device.text;
  }
}

template <class Body>
const char* run(const Body& body, unsigned grid_x, unsigned grid_y, unsigned threads, size_t dynamic_shared = 0) {
  if (threads > most_fibers || threads % warp) return "an odd number of threads";
  if (dynamic_shared > dynamic_bytes) return "more shared memory than there is";
  device.dynamic_used = dynamic_shared;
  device.body = [](const void* closure) { (*static_cast<const Body*>(closure))(); };
  device.closure = &body;
  gridDim = {grid_x, grid_y, 1};
  blockDim = {threads, 1, 1};
  const unsigned blocks = grid_x * grid_y, turn = device.draw(blocks);
  const bool backwards = device.draw(2);
  for (unsigned i = 0; i < blocks; ++i) {       // no order of blocks is promised
    const unsigned block = ((backwards ? blocks - 1 - i : i) + turn) % blocks;
    blockIdx = {block % grid_x, block / grid_x, 0};
    if (const char* wrong = run_block(threads)) return wrong;
  }
  return nullptr;
}

template <class T>
T& shared() {
  static_assert(sizeof(T) <= shared_bytes / 4, "too much shared memory");
  static const size_t offset = (device.shared_used += (sizeof(T) + 15) / 16 * 16) - (sizeof(T) + 15) / 16 * 16;
  return *reinterpret_cast<T*>(device.shared + offset);
}

template <class T>
T shuffle_xor(unsigned mask, T x, unsigned apart, int line) {
  static_assert(sizeof(T) <= 8, "as the device has it");
  Fiber& f = device.fibers[device.now];
  f.place = line;
  f.mask = mask;
  f.apart = apart;
  memcpy(&f.given, &x, sizeof x);
  wait(State::shuffle);
  memcpy(&x, &f.taken, sizeof x);
  return x;
}

inline float widen(uint16_t bits, bool bf16) {
  using namespace fl::portable;
  const u16 all = u16{} + bits;
  return (bf16 ? fl::portable::widen(all, fl::portable::bf16{}) : fl::portable::widen(all, f16{}))[0];
}

inline uint16_t narrow(float x, bool bf16) {
  using namespace fl::portable;
  const f32 all = splat<f32>(x);
  return (bf16 ? fl::portable::narrow(all, fl::portable::bf16{}) : fl::portable::narrow(all, f16{}))[0];
}

}  // namespace host

#define __shfl_xor_sync(mask, x, apart) host::shuffle_xor(mask, x, apart, __LINE__)
