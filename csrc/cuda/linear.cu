// fastrel_cuda::zplus_ratio, the other passes around a layer's products, and layer_norm_backward.
#include "fastrel/pointwise.cuh"
#include "launch.h"

namespace fastrel {
namespace {

uint16_t* bits(const Tensor& x) { return static_cast<uint16_t*>(x.mutable_data_ptr()); }

// [*, width] -> [rows, parts · width] of bfloat16.
Tensor empty_parts(const Tensor& lane, int64_t parts) {
  STD_TORCH_CHECK(parts == 1 || parts == 2, "fastrel_cuda: products take one part or two, not ", parts);
  const int64_t width = lane.size(lane.dim() - 1);
  return torch::stable::new_empty(lane, {width ? lane.numel() / width : 0, parts * width}, ScalarType::BFloat16);
}

Tensor zplus_ratio(
    Tensor signed_any, OptionalTensor bias_any, OptionalTensor magnitude_any, Tensor rel_any, double least, bool official,
    int64_t parts) {
  const OptionalTensor operand = signed_any;
  return by_lanes("zplus_ratio", rel_any, {&magnitude_any}, {&operand, &bias_any}, [&]<class T>(T) {
    const Tensor signed_sum = dense(signed_any), rel = dense(rel_any);
    const OptionalTensor bias = dense(bias_any), magnitude = dense(magnitude_any);
    const Tensor shares = parts ? empty_parts(rel, parts) : empty_like_shape(rel, shape_of(rel));
    const int64_t n = rel.numel(), outs = rel.size(rel.dim() - 1);
    if (n == 0) return shares;
    const Context context(rel);
    FASTREL_LAUNCH(
        context, cuda::ratio_kernel<T>, grid_of(blocks_for(n)), n, signed_sum.numel(), outs, values<T>(signed_sum), values<T>(bias),
        data<T>(magnitude), data<T>(rel), parts ? nullptr : out<T>(shares), parts ? bits(shares) : nullptr, parts, T(least), official);
    return shares;
  });
}

Tensor zplus_parts(Tensor lane_any, int64_t parts) {
  return by_lanes("zplus_parts", lane_any, {}, {}, [&]<class T>(T) {
    const Tensor lane = dense(lane_any), result = empty_parts(lane, parts);
    if (lane.numel() == 0) return result;
    const Context context(lane);
    FASTREL_LAUNCH(
        context, cuda::parts_kernel<T>, grid_of(blocks_for(lane.numel())), lane.numel(), lane.size(lane.dim() - 1), parts,
        data<T>(lane), bits(result));
    return result;
  });
}

Tensor zplus_sides(Tensor x_any) {
  STD_TORCH_CHECK(format_of(x_any) != cuda::Format::kWide, "fastrel_cuda::zplus_sides takes values of 16 bits");
  const Tensor x = dense(x_any);
  const int64_t n = x.numel(), width = x.size(x.dim() - 1);
  const Tensor result = empty_like_shape(x, {width ? n / width : 0, 2 * width});
  if (n == 0) return result;
  const Context context(x);
  FASTREL_LAUNCH(context, cuda::sides_kernel<float>, grid_of(blocks_for(n)), n, width, values<float>(x), bits(result));
  return result;
}

Tensor zplus_magnitude(Tensor x_any) {
  const auto run = [&]<class T>(T) {
    const Tensor x = dense(x_any), result = empty_parts(x, 1);
    if (x.numel() == 0) return result;
    const Context context(x);
    FASTREL_LAUNCH(context, cuda::magnitude_kernel<T>, grid_of(blocks_for(x.numel())), x.numel(), values<T>(x), bits(result));
    return result;
  };
  return format_of(x_any) == cuda::Format::kWide ? by_dtype("zplus_magnitude", x_any, {}, run) : run(float{});
}

Tensor zplus_combine(Tensor x_any, Tensor c_any, Tensor c_abs_any) {
  const OptionalTensor operands[] = {x_any, c_abs_any};
  return by_lanes("zplus_combine", c_any, {&operands[1]}, {&operands[0]}, [&]<class T>(T) {
    const Tensor x = dense(x_any), c = dense(c_any), c_abs = dense(c_abs_any);
    const Tensor result = empty_like_shape(c, shape_of(c));
    if (c.numel() == 0) return result;
    const Context context(c);
    FASTREL_LAUNCH(
        context, cuda::combine_kernel<T>, grid_of(blocks_for(c.numel())), c.numel(), x.numel(), values<T>(x), data<T>(c),
        data<T>(c_abs), out<T>(result));
    return result;
  });
}

Tensor zplus_combine_sides(Tensor x_any, Tensor c_any) {
  const OptionalTensor operand = x_any;
  const int64_t width = x_any.size(x_any.dim() - 1);
  STD_TORCH_CHECK(c_any.size(c_any.dim() - 1) == 2 * width, "fastrel_cuda::zplus_combine_sides takes both sides of x");
  return by_lanes("zplus_combine_sides", c_any, {}, {&operand}, [&]<class T>(T) {
    const Tensor x = dense(x_any), c = dense(c_any);
    const Tensor result = empty_like_shape(c, with_last(shape_of(c), width));
    if (result.numel() == 0) return result;
    const Context context(c);
    FASTREL_LAUNCH(
        context, cuda::combine_sides_kernel<T>, grid_of(blocks_for(result.numel())), result.numel(), x.numel(), width, values<T>(x),
        data<T>(c), out<T>(result));
    return result;
  });
}

Tensor layer_norm_backward(Tensor grad_any, Tensor x_any, OptionalTensor weight_any, int64_t dims, double eps, bool frozen) {
  const OptionalTensor operand = x_any;
  return by_lanes("layer_norm_backward", grad_any, {}, {&operand, &weight_any}, [&]<class T>(T) {
    const Tensor grad = dense(grad_any), x = dense(x_any);
    const OptionalTensor weight = dense(weight_any);
    const Tensor result = empty_like_shape(grad, shape_of(grad));
    int64_t width = 1;
    for (int64_t i = 0; i < dims; ++i) width *= x.size(x.dim() - 1 - i);
    if (grad.numel() == 0) return result;
    const Context context(grad);
    FASTREL_LAUNCH(
        context, cuda::layer_norm_backward_kernel<T>, grid_of(grad.numel() / width), x.numel() / width, width, data<T>(grad),
        values<T>(x), values<T>(weight), T(eps), frozen, out<T>(result));
    return result;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrel_cuda, FASTREL_DEVICE, m) {
  m.impl("zplus_ratio", TORCH_BOX(&zplus_ratio));
  m.impl("zplus_parts", TORCH_BOX(&zplus_parts));
  m.impl("zplus_sides", TORCH_BOX(&zplus_sides));
  m.impl("zplus_magnitude", TORCH_BOX(&zplus_magnitude));
  m.impl("zplus_combine", TORCH_BOX(&zplus_combine));
  m.impl("zplus_combine_sides", TORCH_BOX(&zplus_combine_sides));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace fastrel
