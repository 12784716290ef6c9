// fastrel_cuda::activation_ratio: AttnLRP's slope of an activation function.
#include "fastrel/pointwise.cuh"
#include "launch.h"

namespace fastrel {
namespace {

cuda::Slope slope_from(const std::string& gelu) {
  if (gelu.empty()) return cuda::Slope::kRatio;
  if (gelu == "none") return cuda::Slope::kGelu;
  STD_TORCH_CHECK(gelu == "tanh", "fastrel_cuda::activation_ratio knows no form ", gelu, " of gelu");
  return cuda::Slope::kGeluTanh;
}

Tensor activation_ratio(Tensor grad_any, Tensor x_any, Tensor y_any, std::string gelu) {
  const char* op = "activation_ratio";
  const OptionalTensor operands[] = {x_any, y_any};
  check_rank(op, "grad", grad_any, x_any.dim() + 1);
  check_shape(op, "grad", grad_any, lane_of(grad_any.size(0), shape_of(x_any)));
  check_shape(op, "y", y_any, shape_of(x_any));
  const cuda::Slope slope = slope_from(gelu);
  return by_lanes(op, grad_any, {}, {&operands[0], &operands[1]}, [&]<class T>(T) {
    const Tensor grad = dense(grad_any), x = dense(x_any), y = dense(y_any);
    const Tensor result = empty_like_shape(grad, shape_of(grad));
    if (grad.numel() == 0) return result;
    const Context context(grad);
    FASTREL_LAUNCH(
        context, cuda::activation_ratio_kernel<T>, grid_of(blocks_for(grad.numel())), grad.numel(), x.numel(), slope,
        data<T>(grad), values<T>(x), values<T>(y), out<T>(result));
    return result;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrel_cuda, FASTREL_DEVICE, m) { m.impl("activation_ratio", TORCH_BOX(&activation_ratio)); }

}  // namespace fastrel
