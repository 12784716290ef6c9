// What the bindings share: LibTorch's stable ABI, no ATen.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "fastrel/kernels.h"

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
