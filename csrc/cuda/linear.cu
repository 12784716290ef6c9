// fastrel_cuda::zplus_ratio, zplus_combine and layer_norm_backward.
#include "fastrel/pointwise.cuh"
#include "launch.h"

namespace fastrel {
namespace {

Tensor zplus_ratio(
    Tensor signed_any, OptionalTensor bias_any, OptionalTensor magnitude_any, Tensor rel_any, double least, bool official) {
  const OptionalTensor operand = rel_any;
  return by_dtype("zplus_ratio", signed_any, {&operand, &magnitude_any, &bias_any}, [&]<class T>(T) {
    const Tensor signed_sum = dense(signed_any), rel = dense(rel_any);
    const auto prepared = [](const OptionalTensor& x) { return x ? OptionalTensor(dense(*x)) : std::nullopt; };
    const OptionalTensor bias = prepared(bias_any), magnitude = prepared(magnitude_any);
    const Tensor shares = empty_like_shape(rel, shape_of(rel));
    const int64_t n = rel.numel(), outs = rel.size(rel.dim() - 1);
    if (n == 0) return shares;
    const Context context(rel);
    FASTREL_LAUNCH(
        context, cuda::ratio_kernel<T>, grid_of(blocks_for(n)), n, signed_sum.numel(), outs, data<T>(signed_sum), data<T>(bias),
        data<T>(magnitude), data<T>(rel), out<T>(shares), T(least), official);
    return shares;
  });
}

Tensor zplus_combine(Tensor x_any, Tensor c_any, Tensor c_abs_any) {
  const OptionalTensor operands[] = {c_any, c_abs_any};
  return by_dtype("zplus_combine", x_any, {&operands[0], &operands[1]}, [&]<class T>(T) {
    const Tensor x = dense(x_any), c = dense(c_any), c_abs = dense(c_abs_any);
    const Tensor result = empty_like_shape(c, shape_of(c));
    if (c.numel() == 0) return result;
    const Context context(c);
    FASTREL_LAUNCH(
        context, cuda::combine_kernel<T>, grid_of(blocks_for(c.numel())), c.numel(), x.numel(), data<T>(x), data<T>(c),
        data<T>(c_abs), out<T>(result));
    return result;
  });
}

Tensor layer_norm_backward(Tensor grad_any, Tensor x_any, OptionalTensor weight_any, int64_t dims, double eps, bool frozen) {
  const OptionalTensor operand = x_any;
  return by_dtype("layer_norm_backward", grad_any, {&operand, &weight_any}, [&]<class T>(T) {
    const Tensor grad = dense(grad_any), x = dense(x_any);
    const OptionalTensor weight = weight_any ? OptionalTensor(dense(*weight_any)) : std::nullopt;
    const Tensor result = empty_like_shape(grad, shape_of(grad));
    int64_t width = 1;
    for (int64_t i = 0; i < dims; ++i) width *= x.size(x.dim() - 1 - i);
    if (grad.numel() == 0) return result;
    const Context context(grad);
    FASTREL_LAUNCH(
        context, cuda::layer_norm_backward_kernel<T>, grid_of(grad.numel() / width), x.numel() / width, width, data<T>(grad),
        data<T>(x), data<T>(weight), T(eps), frozen, out<T>(result));
    return result;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrel_cuda, FASTREL_DEVICE, m) {
  m.impl("zplus_ratio", TORCH_BOX(&zplus_ratio));
  m.impl("zplus_combine", TORCH_BOX(&zplus_combine));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace fastrel
