// fastrel_cuda::residual_add: one pass, or sums of chunks and a pass that scales by them.
#include "fastrel/pointwise.cuh"
#include "launch.h"

namespace fastrel {
namespace {

// Numbers that a block of the summing pass adds up.
constexpr int64_t kChunk = 16384;

template <class T>
std::tuple<Tensor, Tensor> run(const Tensor& u_any, const Tensor& v_any, const Tensor& rel_any, bool official) {
  const Tensor u = dense(u_any), v = dense(v_any), rel = dense(rel_any);
  const Tensor rel_u = empty_like_shape(rel, shape_of(rel)), rel_v = empty_like_shape(rel, shape_of(rel));
  if (rel.numel() == 0) return {rel_u, rel_v};
  const Context context(rel);
  if (!official) {
    FASTREL_LAUNCH(
        context, cuda::share_kernel<T>, grid_of(blocks_for(rel.numel())), rel.numel(), u.numel(), values<T>(u), values<T>(v),
        data<T>(rel), out<T>(rel_u), out<T>(rel_v));
    return {rel_u, rel_v};
  }
  const int64_t batch = u.size(0), size = u.numel() / batch, samples = rel.numel() / size, chunks = (size + kChunk - 1) / kChunk;
  const Tensor sums = torch::stable::new_empty(rel, {samples, 3, chunks}, ScalarType::Double);
  FASTREL_LAUNCH(
      context, cuda::sums_kernel<T>, grid_of(samples, chunks), size, kChunk, batch, values<T>(u), values<T>(v), data<T>(rel),
      out<double>(sums));
  FASTREL_LAUNCH(
      context, cuda::scale_kernel<T>, grid_of(samples, blocks_for(size)), size, chunks, batch, values<T>(u), values<T>(v),
      data<T>(rel), data<double>(sums), out<T>(rel_u), out<T>(rel_v));
  return {rel_u, rel_v};
}

std::tuple<Tensor, Tensor> residual_add(Tensor u, Tensor v, Tensor rel, int64_t batch_dim, std::string rules) {
  const bool official = is_official(rules, "residual_add");
  const OptionalTensor operands[] = {u, v};
  STD_TORCH_CHECK(!official || batch_dim == 0, "fastrel_cuda::residual_add takes the batch first under the official rules");
  return by_lanes("residual_add", rel, {}, {&operands[0], &operands[1]}, [&]<class T>(T) { return run<T>(u, v, rel, official); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrel_cuda, FASTREL_DEVICE, m) { m.impl("residual_add", TORCH_BOX(&residual_add)); }

}  // namespace fastrel
