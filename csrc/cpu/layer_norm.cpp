// fastrel::layer_norm_backward: statistics and gradient of a row while it is in the cache.
#include "../binding.h"

namespace fastrel {
namespace {

Tensor layer_norm_backward(Tensor grad, Tensor x, OptionalTensor weight, int64_t dims, double eps, bool frozen) {
  const char* op = "layer_norm_backward";
  const OptionalTensor operand = x;
  STD_TORCH_CHECK(dims > 0 && dims <= x.dim(), "fastrel::layer_norm_backward: x of shape ", text(shape_of(x)), " has no ", dims, " dimensions");
  check_rank(op, "grad", grad, x.dim() + 1);
  check_shape(op, "grad", grad, lane_of(grad.size(0), shape_of(x)));
  check_shape(op, "weight", weight, Shape(x.sizes().end() - dims, x.sizes().end()));
  return by_dtype(op, grad, {&operand, &weight}, [&]<class T>(T) {
    const Tensor g = dense(grad), value = dense(x);
    const OptionalTensor w = weight ? OptionalTensor(dense(*weight)) : std::nullopt;
    const Tensor result = empty_like_shape(g, shape_of(g));
    int64_t width = 1;
    for (int64_t i = 0; i < dims; ++i) width *= x.size(x.dim() - 1 - i);
    if (g.numel() == 0) return result;
    const int64_t rows = g.numel() / width, value_rows = value.numel() / width;
    torch::stable::parallel_for(0, rows, std::max<int64_t>(kGrain / width, 1), [&](int64_t begin, int64_t end) {
      kernels<T>().layer_norm_backward(
          begin, end, width, value_rows, data<T>(g), data<T>(value), data<T>(w), T(eps), frozen, out<T>(result));
    });
    return result;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrel_cpu, CPU, m) { m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward)); }

}  // namespace fastrel
