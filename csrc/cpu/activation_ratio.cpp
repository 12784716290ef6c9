// fastrel::activation_ratio: the slope y/x of an activation function.
#include "../binding.h"

namespace fastrel {
namespace {

Tensor activation_ratio(Tensor grad, Tensor x, Tensor y, std::string) {
  const char* op = "activation_ratio";
  const OptionalTensor operands[] = {x, y};
  check_rank(op, "grad", grad, x.dim() + 1);
  check_shape(op, "grad", grad, lane_of(grad.size(0), shape_of(x)));
  check_shape(op, "y", y, shape_of(x));
  return by_dtype(op, grad, {&operands[0], &operands[1]}, [&]<class T>(T) {
    const Tensor lane = dense(grad), from = dense(x), to = dense(y), result = empty_like_shape(lane, shape_of(lane));
    torch::stable::parallel_for(0, lane.numel(), kGrain, [&](int64_t begin, int64_t end) {
      kernels<T>().activation_ratio(begin, end, from.numel(), data<T>(lane), data<T>(from), data<T>(to), out<T>(result));
    });
    return result;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrel_cpu, CPU, m) { m.impl("activation_ratio", TORCH_BOX(&activation_ratio)); }

}  // namespace fastrel
