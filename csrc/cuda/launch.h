// Launching kernels on torch's current stream, or through the tests' host shim.
#pragma once

#include "../binding.h"
#include "fastrel/narrow.cuh"

#if defined(__CUDACC__)
#include <torch/csrc/stable/accelerator.h>
#define FASTREL_LAUNCH(context, kernel, grid, ...)                                     \
  do {                                                                                 \
    kernel<<<grid, ::fastrel::cuda::kThreads, 0, (context).stream()>>>(__VA_ARGS__);   \
    const cudaError_t error = cudaGetLastError();                                      \
    STD_TORCH_CHECK(error == cudaSuccess, "fastrel: a launch failed: ", cudaGetErrorString(error)); \
  } while (false)
#define FASTREL_DEVICE CUDA
#else
#define FASTREL_LAUNCH(context, kernel, grid, ...) \
  cuda_shim::launch(grid, ::fastrel::cuda::kThreads, [&] { kernel(__VA_ARGS__); })
#define FASTREL_DEVICE CPU
#endif

namespace fastrel {

// The device of a tensor made current, and its current stream.
class Context {
 public:
#if defined(__CUDACC__)
  explicit Context(const Tensor& x) : guard_(x.get_device_index()), device_(x.get_device_index()) {}
  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t device_;
#else
  explicit Context(const Tensor&) {}
#endif
};

// f<float>() or f<double>(), by the dtype of a lane and of all `lanes`; `values` have that one or 16 bits.
template <class F>
auto by_lanes(
    const char* op, const Tensor& lane, std::initializer_list<const OptionalTensor*> lanes,
    std::initializer_list<const OptionalTensor*> values, F f) {
  for (const OptionalTensor* x : values) {
    const ScalarType dtype = *x ? (*x)->scalar_type() : lane.scalar_type();
    STD_TORCH_CHECK(
        dtype == lane.scalar_type() || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "fastrel_cuda::", op,
        ": values of another dtype than lanes");
  }
  return by_dtype(op, lane, lanes, f);
}

inline cuda::Format format_of(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  return dtype == ScalarType::BFloat16 ? cuda::Format::kBFloat16 : dtype == ScalarType::Half ? cuda::Format::kHalf : cuda::Format::kWide;
}

// Where there is a tensor: its numbers, which must be checked by `by_lanes`.
template <class T>
cuda::Values<T> values(const OptionalTensor& x) {
  return x ? cuda::Values<T>{x->const_data_ptr(), format_of(*x)} : cuda::Values<T>{};
}

inline OptionalTensor dense(const OptionalTensor& x) { return x ? OptionalTensor(dense(*x)) : std::nullopt; }

// Blocks for n numbers, each thread taking several where there are many.
inline unsigned blocks_for(int64_t n) {
  return static_cast<unsigned>(std::clamp<int64_t>((n + cuda::kThreads - 1) / cuda::kThreads, 1, 65535));
}

inline dim3 grid_of(int64_t x, int64_t y = 1) {
  STD_TORCH_CHECK(
      x < (int64_t(1) << 31) && y <= 65535, "fastrel_cuda: a grid of ", x, " x ", y, " blocks is more than a device takes; ",
      "explain fewer samples or targets at a time");
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

}  // namespace fastrel
