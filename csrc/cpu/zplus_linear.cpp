// fastrel::zplus_linear: the passes around torch's matrix products, a tile of rows and a chunk of output features at a time.
//
// Z = ½(x Wᵀ + |x||W|ᵀ), S = R ⊘ Z, R' = ½(x ⊙ (S W) + |x| ⊙ (S |W|)); S and the gradient share the product with W.
// |W| is formed a chunk at a time and read from the cache by both products that need it: nothing of the weight's size is
// allocated.
#include "../binding.h"

namespace fastrel {
namespace {

// Bytes of |W| to have at a time: small enough for the caches, large enough for the products to run at full speed.
constexpr int64_t kChunkBytes = 4 << 20;

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

// The first numbers of a buffer as a matrix.
Tensor matrix(const Tensor& buffer, int64_t height, int64_t width) {
  return torch::stable::view(rows(buffer, 0, height * width), {height, width});
}

template <class T>
std::tuple<Tensor, Tensor> run(
    const Tensor& x_any, const Tensor& weight_any, const OptionalTensor& y_any, const OptionalTensor& bias_any,
    const Tensor& rel_any, const OptionalTensor& grad_any, bool official) {
  const Tensor weight = dense(weight_any), rel = dense(rel_any);
  const int64_t outs = weight.size(0), ins = weight.size(1), targets = rel.size(0);
  const int64_t n = x_any.numel() / std::max<int64_t>(ins, 1);
  const Tensor x_dense = dense(x_any);
  const Tensor x = torch::stable::view(x_dense, {n, ins});
  const OptionalTensor y = y_any ? OptionalTensor(torch::stable::view(dense(*y_any), {n, outs})) : std::nullopt;
  const OptionalTensor bias = bias_any && y ? OptionalTensor(dense(*bias_any)) : std::nullopt;
  const OptionalTensor grad = grad_any ? OptionalTensor(dense(*grad_any)) : std::nullopt;

  std::vector<int64_t> shape = shape_of(rel_any);
  shape.back() = ins;
  const Tensor rel_in = empty_like_shape(rel, shape), grad_in = empty_like_shape(rel, grad ? shape : std::vector<int64_t>{0});
  if (rel.numel() == 0) {  // no targets, tokens or outputs
    for (const Tensor* lane : {&rel_in, &grad_in}) std::fill_n(out<T>(*lane), lane->numel(), T(0));
    return {rel_in, grad_in};
  }

  // Rows of S for all targets, then as many of the gradient.
  const int64_t tile = std::min(n, std::max<int64_t>(kTileRows / targets, 16)), lanes = targets * tile;
  const int64_t doubled = grad ? 2 * lanes : lanes;
  const int64_t fitting = std::max<int64_t>(kChunkBytes / (std::max<int64_t>(ins, 1) * int64_t(sizeof(T))), 64);
  const int64_t chunks = std::max<int64_t>((outs + fitting - 1) / fitting, 1), width = (outs + chunks - 1) / chunks;
  const auto buffer = [&](int64_t size) { return empty_like_shape(rel, {size}); };
  const Tensor x_abs_memory = buffer(tile * ins), w_abs_memory = buffer(width * ins), y_memory = buffer(y ? 0 : tile * width);
  const Tensor magnitude_memory = buffer(tile * width), shares_memory = buffer(doubled * width);
  const Tensor both_memory = buffer(doubled * ins), magnitude_in_memory = buffer(lanes * ins);

  for (int64_t first = 0; first < n; first += tile) {
    const int64_t height = std::min(tile, n - first), stacked = targets * height;
    const Tensor x_tile = rows(x, first, height), x_abs = matrix(x_abs_memory, height, ins);
    const Tensor both = matrix(both_memory, grad ? 2 * stacked : stacked, ins), magnitude_in = matrix(magnitude_in_memory, stacked, ins);
    absolute<T>(x_tile, x_abs);
    for (int64_t start = 0; start < outs; start += width) {
      const int64_t count = std::min(width, outs - start);
      const Tensor w = rows(weight, start, count), w_abs = matrix(w_abs_memory, count, ins);
      const Tensor magnitude = matrix(magnitude_memory, height, count);
      const Tensor shares = matrix(shares_memory, grad ? 2 * stacked : stacked, count);
      // A weight that is one chunk need not be formed again for the next rows.
      if (first == 0 || chunks > 1) absolute<T>(w, w_abs);
      multiply(magnitude, x_abs, transposed(w_abs), false);
      if (!y) multiply(matrix(y_memory, height, count), x_tile, transposed(w), false);
      const T* signed_sum = y ? data<T>(y) + first * outs + start : data<T>(y_memory);

      T* p_shares = out<T>(shares);
      torch::stable::parallel_for(0, stacked, std::max<int64_t>(kGrain / count, 1), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t row = i % height, lane = ((i / height) * n + first + row) * outs + start;
          kernels<T>().ratio(
              count, signed_sum + row * (y ? outs : count), bias ? data<T>(bias) + start : nullptr,
              data<T>(magnitude) + row * count, data<T>(rel) + lane, p_shares + i * count, official);
          if (grad) std::copy_n(data<T>(grad) + lane, count, p_shares + (stacked + i) * count);
        }
      });
      multiply(both, shares, w, start > 0);
      multiply(magnitude_in, grad ? rows(shares, 0, stacked) : shares, w_abs, start > 0);
    }
    const T *p_x = data<T>(x_tile), *p_both = data<T>(both), *p_magnitude = data<T>(magnitude_in);
    torch::stable::parallel_for(0, stacked, std::max<int64_t>(kGrain / ins, 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i % height, lane = ((i / height) * n + first + row) * ins;
        kernels<T>().combine(ins, p_x + row * ins, p_both + i * ins, p_magnitude + i * ins, out<T>(rel_in) + lane);
        if (grad) std::copy_n(p_both + (stacked + i) * ins, ins, out<T>(grad_in) + lane);
      }
    });
  }
  return {rel_in, grad_in};
}

std::tuple<Tensor, Tensor> zplus_linear(
    Tensor x, Tensor weight, OptionalTensor y, OptionalTensor bias, Tensor rel, OptionalTensor grad, std::string rules) {
  const char* op = "zplus_linear";
  const bool official = is_official(rules, op);
  check_linear(op, x, weight, y, bias, rel, grad);
  const OptionalTensor operands[] = {weight, rel};
  return by_dtype(op, x, {&operands[0], &operands[1], &y, &bias, &grad}, [&]<class T>(T) {
    return run<T>(x, weight, y, bias, rel, grad, official);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrel_cpu, CPU, m) { m.impl("zplus_linear", TORCH_BOX(&zplus_linear)); }

}  // namespace fastrel
