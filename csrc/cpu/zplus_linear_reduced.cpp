// fastrel::zplus_linear_reduced: relevance by the z+ rule with products in bfloat16 or int8, positive rules only.
//
// As zplus_linear, but with weights that reduced_weight made, once for all explanations. int8 has one scale per row of x, W and S; the scales of W's rows are folded into S,
// so that the same quantised W serves both products. The gradient's product is in bfloat16 where that is asked for, else float32.
#include "../binding.h"

namespace fastrel {
namespace {

Tensor allocate(const Tensor& like, int64_t height, int64_t width, ScalarType dtype) {
  return torch::stable::new_empty(like, {height, width}, dtype);
}

void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out [M, N] = a [M, K] b [K, N]: by kernels of ours where the processor has no products of int8 that torch would use.
void multiply_int8(const Tensor& result, const Tensor& a, const Tensor& b) {
  if (multiplies_int8()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__int_mm_out(result.get(), a.get(), b.get()));
    return;
  }
  const int64_t M = a.size(0), N = b.size(1), K = a.size(1), panels = (N + kInt8Columns - 1) / kInt8Columns;
  const int8_t* p_a = data<int8_t>(a);
  int8_t signs = 0;  // in one pass without branches, which is vectorised
  for (int64_t i = 0; i < M * K; ++i) signs |= p_a[i];
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    reduced_kernels().int8_product(
        begin, end, M, N, K, p_a, signs < 0, data<int8_t>(b), b.stride(0), b.stride(1), out<int32_t>(result));
  });
}

// The product alone, for the measurement that decides about it: a [M, K] contiguous, b [K, N].
Tensor int8_matmul(Tensor a_any, Tensor b) {
  check_rank("int8_matmul", "a", a_any, 2);
  check_shape("int8_matmul", "b", b, {a_any.size(1), b.dim() == 2 ? b.size(1) : 0});
  STD_TORCH_CHECK(
      a_any.scalar_type() == ScalarType::Char && b.scalar_type() == ScalarType::Char, "fastrel_cpu::int8_matmul multiplies int8");
  const Tensor a = dense(a_any), result = allocate(a, a.size(0), b.size(1), ScalarType::Int);
  multiply_int8(result, a, b);
  return result;
}

// f(i) for every row, on all threads.
template <class F>
void each_row(int64_t height, int64_t width, F f) {
  torch::stable::parallel_for(0, height, std::max<int64_t>(kGrain / std::max<int64_t>(width, 1), 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

std::tuple<Tensor, Tensor, Tensor> reduced_weight(Tensor weight_any, std::string purpose) {
  STD_TORCH_CHECK(weight_any.scalar_type() == ScalarType::Float, "fastrel::reduced_weight starts from float32");
  const bool int8 = purpose == "int8", gradient = purpose == "gradient";
  STD_TORCH_CHECK(int8 || gradient || purpose == "bfloat16", "fastrel::reduced_weight: unknown purpose ", purpose);
  check_rank("reduced_weight", "weight", weight_any, 2);
  const Tensor weight = dense(weight_any), none = empty_like_shape(weight, {0});
  const int64_t outs = weight.size(0), ins = weight.size(1);
  const ReducedKernels& k = reduced_kernels();
  const auto element = int8 ? ScalarType::Char : ScalarType::BFloat16;
  const Tensor w = allocate(weight, outs, ins, element), w_abs = gradient ? none : allocate(weight, outs, ins, element);
  const Tensor scales = int8 ? empty_like_shape(weight, {outs}) : none;
  each_row(outs, ins, [&](int64_t i) {
    const float* row = data<float>(weight) + i * ins;
    if (int8)
      out<float>(scales)[i] = k.int8_of(ins, row, out<int8_t>(w) + i * ins, out<int8_t>(w_abs) + i * ins);
    else
      k.bf16_of(ins, row, out<uint16_t>(w) + i * ins, gradient ? nullptr : out<uint16_t>(w_abs) + i * ins);
  });
  return {w, w_abs, scales};
}

std::tuple<Tensor, Tensor> zplus_linear_reduced(
    Tensor x_any, Tensor w, Tensor w_abs, Tensor scales, OptionalTensor w_grad, Tensor y_any, OptionalTensor bias_any, Tensor rel_any,
    OptionalTensor grad_any) {
  const char* op = "zplus_linear_reduced";
  check_linear(op, x_any, w, y_any, bias_any, rel_any, grad_any);
  const OptionalTensor operands[] = {y_any, rel_any};
  STD_TORCH_CHECK(x_any.scalar_type() == ScalarType::Float, "fastrel::zplus_linear_reduced starts from float32");
  by_dtype(op, x_any, {&operands[0], &operands[1], &bias_any, &grad_any}, [](auto) { return 0; });
  const bool int8 = w.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(int8 || w.scalar_type() == ScalarType::BFloat16, "fastrel::zplus_linear_reduced takes bfloat16 or int8 weights");
  STD_TORCH_CHECK(
      w_abs.scalar_type() == w.scalar_type() && w.is_contiguous() && w_abs.is_contiguous() &&
          (!int8 || scales.scalar_type() == ScalarType::Float),
      "fastrel::zplus_linear_reduced takes what fastrel::reduced_weight gives");
  check_shape(op, "w_abs", w_abs, shape_of(w));
  check_shape(op, "scales", int8 ? OptionalTensor(scales) : std::nullopt, {w.size(0)});
  check_shape(op, "w_grad", w_grad, shape_of(w));
  STD_TORCH_CHECK(!grad_any || w_grad, "fastrel::zplus_linear_reduced needs a weight for the gradient");
  STD_TORCH_CHECK(
      !w_grad || w_grad->scalar_type() == ScalarType::Float || w_grad->scalar_type() == ScalarType::BFloat16,
      "fastrel::zplus_linear_reduced multiplies the gradient in float32 or bfloat16");
  const Tensor rel = dense(rel_any);
  const int64_t outs = w.size(0), ins = w.size(1), targets = rel.size(0), n = x_any.numel() / std::max<int64_t>(ins, 1);
  const Tensor x = torch::stable::view(dense(x_any), {n, ins}), y = torch::stable::view(dense(y_any), {n, outs});
  const OptionalTensor bias = bias_any ? OptionalTensor(dense(*bias_any)) : std::nullopt;
  const OptionalTensor grad = grad_any ? OptionalTensor(dense(*grad_any)) : std::nullopt;
  std::vector<int64_t> shape = shape_of(rel_any);
  shape.back() = ins;
  const Tensor rel_in = empty_like_shape(rel, shape), grad_in = empty_like_shape(rel, grad ? shape : Shape{0});
  if (rel.numel() == 0) {  // no targets, tokens or outputs
    for (const Tensor* lane : {&rel_in, &grad_in}) std::fill_n(out<float>(*lane), lane->numel(), 0.0f);
    return {rel_in, grad_in};
  }
  const ReducedKernels& k = reduced_kernels();
  const auto element = int8 ? ScalarType::Char : ScalarType::BFloat16, product = int8 ? ScalarType::Int : ScalarType::BFloat16;
  const float *p_bias = data<float>(bias), *w_scales = int8 ? data<float>(scales) : nullptr;

  const int64_t tile = std::min(n, std::max<int64_t>(kTileRows / targets, 16)), lanes = targets * tile;
  const Tensor x_abs_all = allocate(w, tile, ins, element), magnitude_all = allocate(w, tile, outs, product);
  const Tensor shares_all = allocate(w, lanes, outs, element);
  const Tensor c_all = allocate(w, lanes, ins, product), c_abs_all = allocate(w, lanes, ins, product);
  std::vector<float> x_scales(int8 ? tile : 0), share_scales(int8 ? lanes : 0);
  for (int64_t first = 0; first < n; first += tile) {
    const int64_t height = std::min(tile, n - first), stacked = targets * height;
    const Tensor x_abs = rows(x_abs_all, 0, height), magnitude = rows(magnitude_all, 0, height);
    const Tensor shares = rows(shares_all, 0, stacked), c = rows(c_all, 0, stacked), c_abs = rows(c_abs_all, 0, stacked);
    each_row(height, ins, [&](int64_t i) {
      const float* row = data<float>(x) + (first + i) * ins;
      if (int8)
        x_scales[i] = k.int8_of(ins, row, nullptr, out<int8_t>(x_abs) + i * ins);
      else
        k.bf16_of(ins, row, nullptr, out<uint16_t>(x_abs) + i * ins);
    });
    (int8 ? multiply_int8 : multiply)(magnitude, x_abs, transposed(w_abs));
    each_row(stacked, outs, [&](int64_t i) {
      const int64_t row = i % height, value = (first + row) * outs, lane = (i / height) * n * outs + value;
      const float *p_y = data<float>(y) + value, *p_rel = data<float>(rel) + lane;
      if (int8) {
        thread_local std::vector<float> scratch;
        scratch.resize(outs);
        share_scales[i] = k.int8_ratio(
            outs, p_y, p_bias, data<int32_t>(magnitude) + row * outs, x_scales[row], w_scales, p_rel, scratch.data(),
            out<int8_t>(shares) + i * outs);
      } else {
        k.bf16_ratio(outs, p_y, p_bias, data<uint16_t>(magnitude) + row * outs, p_rel, out<uint16_t>(shares) + i * outs);
      }
    });
    (int8 ? multiply_int8 : multiply)(c, shares, w);
    (int8 ? multiply_int8 : multiply)(c_abs, shares, w_abs);
    each_row(stacked, ins, [&](int64_t i) {
      const int64_t row = i % height, value = (first + row) * ins, lane = (i / height) * n * ins + value;
      if (int8)
        k.int8_combine(
            ins, data<float>(x) + value, data<int32_t>(c) + i * ins, data<int32_t>(c_abs) + i * ins, share_scales[i],
            out<float>(rel_in) + lane);
      else
        k.bf16_combine(
            ins, data<float>(x) + value, data<uint16_t>(c) + i * ins, data<uint16_t>(c_abs) + i * ins, out<float>(rel_in) + lane);
    });
  }

  if (!grad) return {rel_in, grad_in};
  const Tensor flat = torch::stable::view(*grad, {targets * n, outs}), flat_in = torch::stable::view(grad_in, {targets * n, ins});
  if (w_grad->scalar_type() == ScalarType::Float) {
    multiply(flat_in, flat, *w_grad);
    return {rel_in, grad_in};
  }
  const Tensor narrow = allocate(w, targets * n, outs, ScalarType::BFloat16);
  const Tensor result = allocate(w, targets * n, ins, ScalarType::BFloat16);
  each_row(targets * n, outs, [&](int64_t i) { k.bf16_of(outs, data<float>(flat) + i * outs, out<uint16_t>(narrow) + i * outs, nullptr); });
  multiply(result, narrow, *w_grad);
  each_row(targets * n, ins, [&](int64_t i) { k.bf16_widen(ins, data<uint16_t>(result) + i * ins, out<float>(flat_in) + i * ins); });
  return {rel_in, grad_in};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrel_cpu, CPU, m) {
  m.impl("int8_matmul", TORCH_BOX(&int8_matmul));
  m.impl("reduced_weight", TORCH_BOX(&reduced_weight));
  m.impl("zplus_linear_reduced", TORCH_BOX(&zplus_linear_reduced));
}

}  // namespace fastrel
