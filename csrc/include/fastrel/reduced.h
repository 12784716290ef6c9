// The passes around matrix products in bfloat16 and int8. Sums of non-negative terms forgive their rounding.
#pragma once

#include <cmath>

#include "digest.h"
#include "divide.h"
#include "int8.h"
#include "kernels.h"

namespace fastrel {
namespace FASTREL_ISA {

// A denominator below this share of Σ|x||w| is rounding: it must not blow S up.
constexpr float kFloor = 1.0f / 256;

FASTREL_INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);  // which may carry a NaN's bits over into a number
  return static_cast<uint16_t>((x == x ? rounded : bits | 0x00400000) >> 16);
}

FASTREL_INLINE float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FASTREL_INLINE float reduced_ratio(float rel, float signed_sum, float magnitude) {
  const float z = (signed_sum + magnitude) * 0.5f, least = magnitude * kFloor;
  return safe_divide<float, false>(rel, z < least ? least : z);  // NaN is not below
}

inline void bf16_of(int64_t n, const float* __restrict x, uint16_t* __restrict out, uint16_t* __restrict magnitude) {
  if (out)
    for (int64_t i = 0; i < n; ++i) out[i] = to_bf16(x[i]);
  if (magnitude)
    for (int64_t i = 0; i < n; ++i) magnitude[i] = to_bf16(std::fabs(x[i]));
}

inline void bf16_ratio(
    int64_t n, const float* __restrict y, const float* __restrict bias, const uint16_t* __restrict magnitude,
    const float* __restrict rel, uint16_t* __restrict out) {
  if (bias)
    for (int64_t j = 0; j < n; ++j) out[j] = to_bf16(reduced_ratio(rel[j], y[j] - bias[j], from_bf16(magnitude[j])));
  else
    for (int64_t j = 0; j < n; ++j) out[j] = to_bf16(reduced_ratio(rel[j], y[j], from_bf16(magnitude[j])));
}

inline void bf16_combine(
    int64_t n, const float* __restrict x, const uint16_t* __restrict c, const uint16_t* __restrict c_abs, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    const float signed_part = x[i] < 0 ? -from_bf16(c[i]) : from_bf16(c[i]);
    out[i] = std::fabs(x[i]) * (from_bf16(c_abs[i]) + signed_part) * 0.5f;
  }
}

inline void bf16_widen(int64_t n, const uint16_t* __restrict x, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(x[i]);
}

// max |x|, NaN where x holds NaN or infinity.
FASTREL_INLINE float largest(int64_t n, const float* __restrict x) {
  Vec<float> top{}, nothing{};
  int64_t i = 0;
  for (; i + kLanes<float> <= n; i += kLanes<float>) {
    const Vec<float> v = load(x + i), flipped = -v, m = v > flipped ? v : flipped;
    top = m > top ? m : top;
    nothing += v - v;  // NaN from then on
  }
  float result = 0, rest = sum<float>(nothing);
  for (int l = 0; l < kLanes<float>; ++l) result = top[l] > result ? top[l] : result;
  for (; i < n; ++i) {
    result = std::fabs(x[i]) > result ? std::fabs(x[i]) : result;
    rest += x[i] - x[i];
  }
  return result + rest;
}

// A row as scale · int8; |row| too where wanted. Returns the scale: NaN, which int8 has not, where the row is not finite.
inline float int8_of(int64_t n, const float* __restrict x, int8_t* __restrict out, int8_t* __restrict magnitude) {
  const float top = largest(n, x), scale = top / 127.0f, inverse = top > 0 ? 127.0f / top : 0.0f;
  if (top != top) {
    if (out) std::memset(out, 0, n);
    if (magnitude) std::memset(magnitude, 0, n);
    return top;
  }
  if (out)
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int8_t>(static_cast<int32_t>(x[i] * inverse + (x[i] < 0 ? -0.5f : 0.5f)));
  if (magnitude)
    for (int64_t i = 0; i < n; ++i) magnitude[i] = static_cast<int8_t>(static_cast<int32_t>(std::fabs(x[i]) * inverse + 0.5f));
  return scale;
}

// S with the weights' row scales folded in, as scale · int8. Returns the scale.
inline float int8_ratio(
    int64_t n, const float* __restrict y, const float* __restrict bias, const int32_t* __restrict magnitude, float x_scale,
    const float* __restrict w_scales, const float* __restrict rel, float* __restrict scratch, int8_t* __restrict out) {
  for (int64_t j = 0; j < n; ++j) {
    const float size = static_cast<float>(magnitude[j]) * (x_scale * w_scales[j]);
    scratch[j] = reduced_ratio(rel[j], bias ? y[j] - bias[j] : y[j], size) * w_scales[j];
  }
  return int8_of(n, scratch, out, nullptr);
}

inline void int8_combine(
    int64_t n, const float* __restrict x, const int32_t* __restrict c, const int32_t* __restrict c_abs, float scale,
    float* __restrict out) {
  const float half = scale * 0.5f;
  for (int64_t i = 0; i < n; ++i)
    out[i] = std::fabs(x[i]) * static_cast<float>(x[i] < 0 ? c_abs[i] - c[i] : c_abs[i] + c[i]) * half;
}

inline const ReducedKernels& reduced_table() {
  static const ReducedKernels kernels{bf16_of, bf16_ratio, bf16_combine, bf16_widen, int8_of, int8_ratio, int8_combine,
#if FASTREL_ISA_LEVEL >= 1
                                      int8_product,
#else
                                      nullptr,
#endif
                                      digest};
  return kernels;
}

}  // namespace FASTREL_ISA
}  // namespace fastrel
