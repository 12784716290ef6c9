// Launching kernels on torch's current stream, or through the tests' host shim.
#pragma once

#include "../binding.h"
#include "fastrel/device.cuh"

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
