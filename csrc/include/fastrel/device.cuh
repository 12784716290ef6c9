// What device code needs: the CUDA runtime, or the tests' host shim that runs the same kernels on a CPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define FASTREL_SHARED(type, name, size) __shared__ type name[size]
#else
#include "cuda_shim.h"
#endif

namespace fastrel {
namespace cuda {

#ifndef FASTREL_THREADS
#define FASTREL_THREADS 256
#endif
constexpr int kThreads = FASTREL_THREADS;
constexpr int kWarp = 32;

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float tiny = 1.1754943508222875e-38f, eps = 1.1920928955078125e-07f, most = 3.4028234663852886e+38f;
};
template <>
struct Limits<double> {
  static constexpr double tiny = 2.2250738585072014e-308, eps = 2.220446049250313e-16, most = 1.7976931348623157e+308;
};

__device__ inline float absolute(float x) { return fabsf(x); }
__device__ inline double absolute(double x) { return fabs(x); }
__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float error_function(float x) { return erff(x); }
__device__ inline double error_function(double x) { return erf(x); }
__device__ inline float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ inline double hyperbolic_tangent(double x) { return tanh(x); }

// NaN stays NaN, here and wherever a value is chosen by a comparison.
template <class T>
__device__ T positive(T x) {
  return x < T(0) ? T(0) : x;
}

// safe_divide of fastrel.reference.rules.
template <class T>
__device__ T safe_divide(T a, T b, bool official) {
  if (official) {
    const T shifted = b + T(1e-9);
    return b == T(0) ? T(0) : a / (shifted == T(0) ? T(1e-9) : shifted);
  }
  return b < Limits<T>::tiny ? T(0) : a / b;
}

// The sum over a block, in every thread; the order of additions does not depend on timing.
template <class T>
__device__ T block_sum(T x) {
  FASTREL_SHARED(T, parts, kThreads / kWarp);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  __syncthreads();  // of an earlier sum, everybody has read
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
  __syncthreads();
  T total = 0;
  for (int i = 0; i < kThreads / kWarp; ++i) total += parts[i];
  return total;
}

template <class T>
__device__ T block_max(T x) {
  FASTREL_SHARED(T, parts, kThreads / kWarp);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, x, offset);
    x = other > x || other != other ? other : x;
  }
  __syncthreads();
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
  __syncthreads();
  T top = parts[0];
  for (int i = 1; i < kThreads / kWarp; ++i) top = parts[i] > top || parts[i] != parts[i] ? parts[i] : top;
  return top;
}

// This thread's numbers among n, in strides of the grid.
#define FASTREL_EACH(i, n) \
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < (n); i += int64_t(gridDim.x) * blockDim.x)

// The same where x counts samples, maps or heads, of which there may be more than y can count.
#define FASTREL_EACH_OF_MANY(i, n) \
  for (int64_t i = blockIdx.y * int64_t(blockDim.x) + threadIdx.x; i < (n); i += int64_t(gridDim.y) * blockDim.x)

}  // namespace cuda
}  // namespace fastrel
