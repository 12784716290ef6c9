// fastrel::row_digest: reads a weight once.
#include "../binding.h"

namespace fastrel {
namespace {

Tensor row_digest(Tensor weight_any, Tensor keys_any) {
  const char* op = "row_digest";
  check_rank(op, "weight", weight_any, 2);
  check_shape(op, "keys", keys_any, {weight_any.size(1)});
  STD_TORCH_CHECK(
      weight_any.scalar_type() == ScalarType::Float && keys_any.scalar_type() == ScalarType::Int,
      "fastrel::row_digest takes a float32 weight and int32 keys");
  const Tensor weight = weight_any.stride(1) == 1 ? weight_any : dense(weight_any), keys = dense(keys_any);
  const int64_t rows = weight.size(0), n = weight.size(1);
  const Tensor result = torch::stable::new_empty(weight, {rows}, ScalarType::Long);
  torch::stable::parallel_for(0, rows, std::max<int64_t>(kGrain / std::max<int64_t>(n, 1), 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      out<uint64_t>(result)[i] = reduced_kernels().digest(n, data<uint32_t>(weight) + i * weight.stride(0), data<uint32_t>(keys));
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrel_cpu, CPU, m) { m.impl("row_digest", TORCH_BOX(&row_digest)); }

}  // namespace fastrel
