// What the CUDA kernels ask of the language around them: float as row_statistics.h's value type, half precision,
// barriers, and launches.
//
// The tests compile the same kernels with the host's compiler (FL_CUDA_ON_HOST), where cuda_on_host.h plays the device:
// every thread runs, and what they exchange is checked. So that a test can show that it would notice, a build with
// FL_WITHOUT_BARRIER=<name> leaves one of the barriers out.
#pragma once
#include <math.h>
#include <stdint.h>

#include "arguments.h"
#if defined(FL_CUDA_ON_HOST)
#include "cuda_on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#define FL_ISA cuda
#define FL_FUNCTION __host__ __device__ __forceinline__
#define FL_DEVICE __device__ __forceinline__

#if !defined(FL_MOST_THREADS)
#define FL_MOST_THREADS 256
#endif
#if !defined(FL_WITHOUT_BARRIER)
#define FL_WITHOUT_BARRIER none
#endif

namespace fl {
namespace FL_ISA {

constexpr int most_threads = FL_MOST_THREADS;   // in a block of threads
constexpr int warp = 32;

// ---- float as a vector of one --------------------------------------------------------------------------------------

template <class V> FL_FUNCTION V splat(float x) { return x; }
FL_FUNCTION float select(bool mask, float a, float b) { return mask ? a : b; }
FL_FUNCTION float absolute(float x) { return ::fabsf(x); }
FL_FUNCTION float larger(float a, float b) { return a > b ? a : b; }   // b where either is NaN
FL_FUNCTION float exp(float x) { return ::expf(x); }
FL_FUNCTION float log1p(float x) { return ::log1pf(x); }
FL_FUNCTION float log(float x) { return ::logf(x); }
FL_FUNCTION float atan(float x) { return ::atanf(x); }
FL_FUNCTION float leading_bits(float x) {                              // 12 of the 24
  union { float number; uint32_t bits; } both = {x};
  both.bits &= ~0xfffu;
  return both.number;
}
// tanh(x), and its derivative 1 - tanh^2 without the cancellation that the formula suffers near +-1.
FL_FUNCTION float tanh(float x, float& slope) {
  float e = exp(absolute(x) * -2.0f), d = e + 1.0f;
  slope = 4.0f * e / (d * d);
  return ::tanhf(x);
}

// ---- half precision ------------------------------------------------------------------------------------------------

#if defined(FL_CUDA_ON_HOST)
inline float widen_half(uint32_t bits, int32_t dtype) { return host::widen((uint16_t)bits, dtype == FL_BF16); }
inline uint32_t narrow_half(float x, int32_t dtype) { return host::narrow(x, dtype == FL_BF16); }
#else
FL_DEVICE float widen_half(uint32_t bits, int32_t dtype) {
  return dtype == FL_BF16 ? __uint_as_float(bits << 16) : __half2float(__ushort_as_half((unsigned short)bits));
}
FL_DEVICE uint32_t narrow_half(float x, int32_t dtype) {
  return dtype == FL_BF16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x));
}
#endif

// ---- threads -------------------------------------------------------------------------------------------------------

enum class Barrier { none, reduction, list, loaded, sorted, scanned, marked, pooled };

template <Barrier which>
FL_DEVICE void barrier() {
  if (which == Barrier::FL_WITHOUT_BARRIER) return;
#if defined(FL_CUDA_ON_HOST)
  host::synchronize((int)which);
#else
  __syncthreads();
#endif
}

// A block's shared memory, one object of each type.
template <class T>
FL_DEVICE T& shared() {
#if defined(FL_CUDA_ON_HOST)
  return host::shared<T>();
#else
  __shared__ T memory;
  return memory;
#endif
}

// A block's shared memory beside that, as much as the launch asks for.
FL_DEVICE char* dynamic_shared() {
#if defined(FL_CUDA_ON_HOST)
  return host::device.dynamic;
#else
  extern __shared__ __align__(16) char memory[];
  return memory;
#endif
}

// The most that a launch may ask for on the current device.
inline int64_t most_dynamic_shared() {
#if defined(FL_CUDA_ON_HOST)
  return host::dynamic_bytes;
#else
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess)
    return bytes;
  cudaGetLastError();
  return 48 << 10;
#endif
}

template <class Parameters>
int launch(const char* name, void (*kernel)(Parameters), int64_t grid_x, int64_t grid_y, int threads, void* stream,
           Parameters parameters, int64_t shared_bytes = 0) {
  static_assert(sizeof(Parameters) <= 4096, "what every device takes as kernel parameters");
  if (grid_x > INT32_MAX || grid_y > 65535) return fail("%s: a tile of this size needs too many blocks", name);
#if defined(FL_CUDA_ON_HOST)
  (void)stream;
  const char* wrong = host::run([&] { kernel(parameters); }, (unsigned)grid_x, (unsigned)grid_y, (unsigned)threads,
                                (size_t)shared_bytes);
  return wrong ? fail("%s: %s", name, wrong) : 0;
#else
  void* arguments[] = {&parameters};
  cudaError_t status = cudaSuccess;
  if (shared_bytes > (32 << 10))   // what every device gives unasked, less the kernels' own
    status = cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
  if (status == cudaSuccess)
    status = cudaLaunchKernel((const void*)kernel, dim3((unsigned)grid_x, (unsigned)grid_y), dim3(threads), arguments,
                              (size_t)shared_bytes, (cudaStream_t)stream);
  if (status == cudaSuccess) return 0;
  cudaGetLastError();   // said here; not left for whoever asks next
  return fail("%s: %s", name, cudaGetErrorString(status));
#endif
}

inline int64_t divided_up(int64_t total, int64_t part) { return (total + part - 1) / part; }

// Whole warps, of which each thread takes `each` of the columns, as few as do, and one vector more for alignment.
inline int threads_for(int64_t columns, int each) {
  int threads = warp;
  while (threads < most_threads && (int64_t)threads * each < columns + 7) threads *= 2;
  return threads;
}

// Cuts a workspace into arrays, or only counts its bytes when there is none yet.
class Workspace {
 public:
  explicit Workspace(void* memory) : start_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    char* here = start_ ? start_ + used_ : nullptr;
    used_ += divided_up(count * (int64_t)sizeof(T), 16) * 16;
    return reinterpret_cast<T*>(count ? here : nullptr);
  }
  int64_t used() const { return used_; }

 private:
  char* start_;
  int64_t used_ = 0;
};

inline int check_workspace(const void* memory, int64_t bytes, int64_t needed) {
  if (needed == 0) return 0;
  if (!memory) return fail("workspace is null, %lld bytes are needed", (long long)needed);
  if (reinterpret_cast<uintptr_t>(memory) % 16) return fail("workspace is not aligned to 16 bytes");
  if (bytes < needed) return fail("workspace has %lld bytes, %lld are needed", (long long)bytes, (long long)needed);
  return 0;
}

}  // namespace FL_ISA
}  // namespace fl
