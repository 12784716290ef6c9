// fastrel::residual_add: one pass for the shares (and, under official, their sums), one for scaling.
#include <cmath>

#include "../binding.h"

namespace fastrel {
namespace {

template <class T>
std::tuple<Tensor, Tensor> run(const Tensor& u_any, const Tensor& v_any, const Tensor& rel_any, int64_t batch_dim, bool official) {
  const Tensor u = dense(u_any), v = dense(v_any), rel = dense(rel_any);
  const Tensor rel_u = empty_like_shape(rel, shape_of(rel)), rel_v = empty_like_shape(rel, shape_of(rel));
  const int64_t period = u.numel();
  if (!official) {
    torch::stable::parallel_for(0, rel.numel(), kGrain, [&](int64_t begin, int64_t end) {
      kernels<T>().share(begin, end, period, data<T>(u), data<T>(v), data<T>(rel), out<T>(rel_u), out<T>(rel_v));
    });
    return {rel_u, rel_v};
  }
  // Values are [before, batch, after]; a sample of a target is `before` runs of `after` numbers.
  int64_t before = 1, after = 1;
  for (int64_t i = 0; i < batch_dim; ++i) before *= u.size(i);
  for (int64_t i = batch_dim + 1; i < u.dim(); ++i) after *= u.size(i);
  const int64_t batch = u.size(batch_dim), targets = period ? rel.numel() / period : 0;
  torch::stable::parallel_for(0, targets * batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t target = i / batch, sample = i % batch;
      double sums[3] = {0, 0, 0};
      const auto at = [&](int64_t b) { return (b * batch + sample) * after; };
      for (int64_t b = 0; b < before; ++b) {
        const int64_t value = at(b), lane = target * period + value;
        kernels<T>().signed_share(
            after, data<T>(u) + value, data<T>(v) + value, data<T>(rel) + lane, out<T>(rel_u) + lane, out<T>(rel_v) + lane, sums);
      }
      const double size = std::abs(sums[0]) + std::abs(sums[1]);
      const T factor_u = T(official_divide(official_divide(std::abs(sums[0]), size) * sums[2], sums[0]));
      const T factor_v = T(official_divide(official_divide(std::abs(sums[1]), size) * sums[2], sums[1]));
      for (int64_t b = 0; b < before; ++b) {
        const int64_t lane = target * period + at(b);
        kernels<T>().scale(after, factor_u, out<T>(rel_u) + lane);
        kernels<T>().scale(after, factor_v, out<T>(rel_v) + lane);
      }
    }
  });
  return {rel_u, rel_v};
}

std::tuple<Tensor, Tensor> residual_add(Tensor u, Tensor v, Tensor rel, int64_t batch_dim, std::string rules) {
  const char* op = "residual_add";
  const bool official = is_official(rules, op);
  check_rank(op, "rel", rel, u.dim() + 1);
  check_shape(op, "v", v, shape_of(u));
  check_shape(op, "rel", rel, lane_of(rel.size(0), shape_of(u)));
  STD_TORCH_CHECK(
      !official || (batch_dim >= 0 && batch_dim < u.dim()), "fastrel::residual_add: u of shape ", text(shape_of(u)),
      " has no dimension ", batch_dim);
  const OptionalTensor operands[] = {v, rel};
  return by_dtype(op, u, {&operands[0], &operands[1]}, [&]<class T>(T) {
    return run<T>(u, v, rel, batch_dim, official);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrel_cpu, CPU, m) { m.impl("residual_add", TORCH_BOX(&residual_add)); }

}  // namespace fastrel
