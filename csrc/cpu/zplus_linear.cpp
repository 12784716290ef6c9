// fastrel::zplus_linear: the passes around torch's matrix products, a chunk of output features at a time.
//
// |W| is formed a chunk at a time, and read again from the cache by both products that need it: nothing of the weight's size
// is allocated. S and the gradient share the product with W.
#include "binding.h"

namespace fastrel {
namespace {

// Bytes of |W| to have at a time: small enough for the caches, large enough for the products to run at full speed.
constexpr int64_t kChunkBytes = 4 << 20;

Tensor transposed(const Tensor& x) { return torch::stable::transpose(x, 0, 1); }

Tensor rows(const Tensor& x, int64_t start, int64_t count) {
  Tensor view = x;
  return torch::stable::narrow(view, 0, start, count);
}

// out = a b, or out += a b.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  if (add) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

template <class T>
void absolute(const Tensor& x, const Tensor& result) {
  const T* from = data<T>(x);
  T* to = out<T>(result);
  torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    kernels<T>().absolute(end - begin, from + begin, to + begin);
  });
}

template <class T>
std::tuple<Tensor, Tensor> run(
    const Tensor& x_any, const Tensor& weight_any, const OptionalTensor& y_any, const OptionalTensor& bias_any,
    const Tensor& rel_any, const OptionalTensor& grad_any, bool official) {
  const Tensor weight = dense(weight_any), rel = dense(rel_any);
  const int64_t outs = weight.size(0), ins = weight.size(1), lanes = rel.numel() / std::max<int64_t>(outs, 1);
  const Tensor x = torch::stable::view(dense(x_any), {x_any.numel() / std::max<int64_t>(ins, 1), ins});
  const int64_t n = x.size(0), doubled = grad_any ? 2 * lanes : lanes;
  std::vector<int64_t> shape = shape_of(rel_any);
  shape.back() = ins;

  Tensor both = empty_like_shape(rel, {doubled, ins}), magnitude_out = empty_like_shape(rel, {lanes, ins});
  Tensor rel_in = empty_like_shape(rel, shape);
  const Tensor x_abs = empty_like_shape(rel, {n, ins});
  absolute<T>(x, x_abs);
  const OptionalTensor y = y_any ? OptionalTensor(dense(*y_any)) : std::nullopt;
  const OptionalTensor bias = bias_any && y ? OptionalTensor(dense(*bias_any)) : std::nullopt;
  const OptionalTensor grad = grad_any ? OptionalTensor(dense(*grad_any)) : std::nullopt;

  const int64_t fitting = std::max<int64_t>(kChunkBytes / (std::max<int64_t>(ins, 1) * int64_t(sizeof(T))), 64);
  const int64_t chunks = std::max<int64_t>((outs + fitting - 1) / fitting, 1), width = (outs + chunks - 1) / chunks;
  const Tensor w_abs_all = empty_like_shape(rel, {width, ins});
  const Tensor z_all = empty_like_shape(rel, {n, width}), lanes_all = empty_like_shape(rel, {doubled, width});
  for (int64_t start = 0; start < outs; start += width) {
    const int64_t count = std::min(width, outs - start);
    const bool whole = count == width;
    const Tensor w = rows(weight, start, count), w_abs = whole ? w_abs_all : rows(w_abs_all, 0, count);
    const Tensor magnitude = whole ? z_all : torch::stable::view(rows(torch::stable::view(z_all, {n * width}), 0, n * count), {n, count});
    const Tensor shares = whole ? lanes_all : torch::stable::view(
        rows(torch::stable::view(lanes_all, {doubled * width}), 0, doubled * count), {doubled, count});
    absolute<T>(w, w_abs);
    multiply(magnitude, x_abs, transposed(w_abs), false);
    Tensor signed_sum = y ? *y : empty_like_shape(rel, {n, count});
    if (!y) multiply(signed_sum, x, transposed(w), false);

    const T* p_y = data<T>(signed_sum) + (y ? start : 0);
    const int64_t y_row = y ? outs : count;
    T* p_shares = out<T>(shares);
    const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(count, 1), 1);
    torch::stable::parallel_for(0, lanes, grain, [&](int64_t begin, int64_t end) {
      kernels<T>().ratio(
          begin, end, count, n, p_y, y_row, bias ? data<T>(bias) + start : nullptr, data<T>(magnitude), count,
          data<T>(rel) + start, outs, p_shares, count, official);
      if (grad)
        for (int64_t i = begin; i < end; ++i)
          std::copy_n(data<T>(grad) + i * outs + start, count, p_shares + (lanes + i) * count);
    });
    multiply(both, shares, w, start > 0);
    multiply(magnitude_out, grad ? rows(shares, 0, lanes) : shares, w_abs, start > 0);
  }
  torch::stable::parallel_for(0, lanes * ins, kGrain, [&](int64_t begin, int64_t end) {
    kernels<T>().combine(begin, end, n * ins, data<T>(x), data<T>(both), data<T>(magnitude_out), out<T>(rel_in));
  });
  if (!grad) return {rel_in, empty_like_shape(rel, {0})};
  return {rel_in, torch::stable::view(rows(both, lanes, lanes), shape)};
}

std::tuple<Tensor, Tensor> zplus_linear(
    Tensor x, Tensor weight, OptionalTensor y, OptionalTensor bias, Tensor rel, OptionalTensor grad, std::string rules) {
  const bool official = is_official(rules, "zplus_linear");
  const OptionalTensor operands[] = {weight, rel};
  return by_dtype("zplus_linear", x, {&operands[0], &operands[1], &y, &bias, &grad}, [&]<class T>(T) {
    return run<T>(x, weight, y, bias, rel, grad, official);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrel, CPU, m) { m.impl("zplus_linear", TORCH_BOX(&zplus_linear)); }

}  // namespace fastrel
