// Values as the model has them: of the lanes' dtype or of 16 bits, widened where they are read.
#pragma once

#include "device.cuh"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastrel {
namespace cuda {

enum class Format { kWide, kBFloat16, kHalf };

__device__ inline float from_bits(Format format, uint16_t bits) {
#if defined(__CUDACC__)
  return format == Format::kHalf ? __half2float(__ushort_as_half(bits)) : __bfloat162float(__ushort_as_bfloat16(bits));
#else
  return format == Format::kHalf ? cuda_shim::from_half(bits) : cuda_shim::from_bfloat16(bits);
#endif
}

// To nearest, ties to even; NaN stays NaN.
__device__ inline uint16_t bfloat16_bits(float x) {
#if defined(__CUDACC__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  return cuda_shim::to_bfloat16(x);
#endif
}

// Numbers of one format behind lanes of type T. No template on the format: a pass is bound by memory, and all threads branch alike.
template <class T>
struct Values {
  const void* data = nullptr;
  Format format = Format::kWide;

  __device__ explicit operator bool() const { return data != nullptr; }
  __device__ T operator[](int64_t i) const {
    if (format == Format::kWide) return static_cast<const T*>(data)[i];
    return T(from_bits(format, static_cast<const uint16_t*>(data)[i]));
  }
  __device__ Values from(int64_t i) const {
    return {static_cast<const char*>(data) + i * (format == Format::kWide ? sizeof(T) : sizeof(uint16_t)), format};
  }
};

}  // namespace cuda
}  // namespace fastrel
