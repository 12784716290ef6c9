// What the bindings share: LibTorch's stable ABI, no ATen.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "fastrel/kernels.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.10 has only the one that does not quote torch's message
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace fastrel {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Numbers that one thread should at least have.
constexpr int64_t kGrain = 16384;

// Rows of lanes at a time, so that what lies between the products stays in the caches too.
constexpr int64_t kTileRows = 512;

inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline Tensor empty_like_shape(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape);
}

inline Tensor transposed(const Tensor& x) { return torch::stable::transpose(x, 0, 1); }

inline Tensor rows(const Tensor& x, int64_t start, int64_t count) {
  Tensor view = x;
  return torch::stable::narrow(view, 0, start, count);
}

inline std::vector<int64_t> shape_of(const Tensor& x) {
  return {x.sizes().begin(), x.sizes().end()};
}

using Shape = std::vector<int64_t>;

// A lane of a value: its shape behind the number of targets.
inline Shape lane_of(int64_t targets, Shape value) {
  value.insert(value.begin(), targets);
  return value;
}

inline Shape with_last(Shape shape, int64_t size) {
  shape.back() = size;
  return shape;
}

inline std::string text(const Shape& shape) {
  std::string all;
  for (const int64_t size : shape) all += (all.empty() ? "" : ", ") + std::to_string(size);
  return "[" + all + "]";
}

// Kernels read as far as shapes say: an operand that has another one is refused.
inline void check_shape(const char* op, const char* name, const OptionalTensor& x, const Shape& shape) {
  STD_TORCH_CHECK(!x || shape_of(*x) == shape, "fastrel::", op, ": ", name, " must have shape ", text(shape), ", not ", text(shape_of(*x)));
}

inline void check_rank(const char* op, const char* name, const Tensor& x, int64_t rank) {
  STD_TORCH_CHECK(x.dim() == rank, "fastrel::", op, ": ", name, " must have ", rank, " dimensions, not shape ", text(shape_of(x)));
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
const T* data(const OptionalTensor& x) {
  return x ? data<T>(*x) : nullptr;
}

template <class T>
T* out(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// x [*, in], weight [out, in], y [*, out], bias [out], rel and grad [K, *, out].
inline void check_linear(
    const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& y, const OptionalTensor& bias, const Tensor& rel,
    const OptionalTensor& grad) {
  check_rank(op, "weight", weight, 2);
  check_rank(op, "rel", rel, x.dim() + 1);
  STD_TORCH_CHECK(x.dim() > 0, "fastrel::", op, ": x has no dimension of features");
  const Shape result = with_last(shape_of(x), weight.size(0));
  check_shape(op, "x", x, with_last(shape_of(x), weight.size(1)));
  check_shape(op, "y", y, result);
  check_shape(op, "bias", bias, {weight.size(0)});
  check_shape(op, "rel", rel, lane_of(rel.size(0), result));
  check_shape(op, "grad", grad, lane_of(rel.size(0), result));
}

// f<float>() or f<double>(), by the dtype that x and all others must have.
template <class F>
auto by_dtype(const char* op, const Tensor& x, std::initializer_list<const OptionalTensor*> others, F f) {
  const ScalarType dtype = x.scalar_type();
  for (const OptionalTensor* other : others)
    STD_TORCH_CHECK(!*other || (*other)->scalar_type() == dtype, "fastrel::", op, ": operands of different dtypes");
  if (dtype == ScalarType::Double) return f(double{});
  STD_TORCH_CHECK(dtype == ScalarType::Float, "fastrel::", op, " computes in float32 or float64");
  return f(float{});
}

// safe_divide of the official rules, for sums over a sample.
inline double official_divide(double a, double b) {
  const double shifted = b + 1e-9;
  return b == 0 ? 0.0 : a / (shifted == 0 ? 1e-9 : shifted);
}

inline bool is_official(const std::string& rules, const char* op) {
  STD_TORCH_CHECK(rules == "positive" || rules == "official", "fastrel::", op, " has no kernel for rules ", rules);
  return rules == "official";
}

inline Update update_from(const std::string& name) {
  if (name == "gradient_relevance") return Update::kGradientRelevance;
  if (name == "gradient_attention") return Update::kGradientAttention;
  if (name == "relevance") return Update::kRelevance;
  STD_TORCH_CHECK(name == "attention", "fastrel: no kernel for update ", name);
  return Update::kAttention;
}

}  // namespace fastrel
