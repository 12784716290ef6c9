// The passes around the matrix products.
#pragma once

#include <cmath>

#include "divide.h"
#include "kernels.h"

namespace fastrel {
namespace FASTREL_ISA {

template <class T>
void absolute(int64_t n, const T* __restrict x, T* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::fabs(x[i]);
}

// Z = ½(signed + magnitude), 0 where that is no more than the rounding of its terms.
template <class T>
FASTREL_INLINE T denominator(T signed_sum, T magnitude) {
  const T twice = signed_sum + magnitude;
  return twice < magnitude * (8 * std::numeric_limits<T>::epsilon()) ? T(0) : twice * T(0.5);
}

template <class T, bool OFFICIAL>
void ratio_of(
    int64_t n, const T* __restrict y, const T* __restrict bias, const T* __restrict magnitude, const T* __restrict rel,
    T* __restrict out) {
  if (bias)
    for (int64_t j = 0; j < n; ++j) out[j] = safe_divide<T, OFFICIAL>(rel[j], denominator(y[j] - bias[j], magnitude[j]));
  else
    for (int64_t j = 0; j < n; ++j) out[j] = safe_divide<T, OFFICIAL>(rel[j], denominator(y[j], magnitude[j]));
}

template <class T>
void ratio(int64_t n, const T* y, const T* bias, const T* magnitude, const T* rel, T* out, bool official) {
  (official ? ratio_of<T, true> : ratio_of<T, false>)(n, y, bias, magnitude, rel, out);
}

template <class T>
void combine(int64_t n, const T* __restrict x, const T* __restrict c, const T* __restrict c_abs, T* __restrict out) {
  // The sum first: what cancels must cancel exactly.
  for (int64_t i = 0; i < n; ++i) {
    const T total = x[i] < T(0) ? c_abs[i] - c[i] : c_abs[i] + c[i];
    out[i] = std::fabs(x[i]) * total * T(0.5);
  }
}

// f(first, count, value_first) for the runs of numbers begin … end that share a stretch of `period` values.
template <class F>
FASTREL_INLINE void runs(int64_t begin, int64_t end, int64_t period, F f) {
  while (begin < end) {
    const int64_t at = begin % period;
    const int64_t count = end - begin < period - at ? end - begin : period - at;
    f(begin, count, at);
    begin += count;
  }
}

template <class T>
void share(int64_t begin, int64_t end, int64_t period, const T* u, const T* v, const T* rel, T* rel_u, T* rel_v) {
  runs(begin, end, period, [&](int64_t first, int64_t count, int64_t at) {
    const T *__restrict p_u = u + at, *__restrict p_v = v + at, *__restrict p_rel = rel + first;
    T *__restrict p_rel_u = rel_u + first, *__restrict p_rel_v = rel_v + first;
    for (int64_t i = 0; i < count; ++i) {
      const T w = p_u[i] + p_v[i];
      const T sign = w > T(0) ? T(1) : w < T(0) ? T(-1) : T(0);
      const T a = sign * p_u[i], b = sign * p_v[i];
      const T pos_a = positive_part(a), pos_b = positive_part(b);
      const T s = safe_divide<T, false>(p_rel[i], pos_a + pos_b);
      p_rel_u[i] = pos_a * s;
      p_rel_v[i] = pos_b * s;
    }
  });
}

template <class T>
void activation_ratio(int64_t begin, int64_t end, int64_t period, const T* grad, const T* x, const T* y, T* out) {
  runs(begin, end, period, [&](int64_t first, int64_t count, int64_t at) {
    const T *__restrict p_x = x + at, *__restrict p_y = y + at, *__restrict p_grad = grad + first;
    T* __restrict p_out = out + first;
    for (int64_t i = 0; i < count; ++i) {
      const T ratio = p_y[i] / (p_x[i] == T(0) ? T(1) : p_x[i]);
      p_out[i] = p_grad[i] * (p_x[i] == T(0) ? T(0) : ratio);
    }
  });
}

template <class T>
void signed_share(
    int64_t n, const T* __restrict u, const T* __restrict v, const T* __restrict rel, T* __restrict a, T* __restrict b,
    double* sums) {
  for (int64_t i = 0; i < n; ++i) {
    const T s = safe_divide<T, true>(rel[i], u[i] + v[i]);
    a[i] = u[i] * s;
    b[i] = v[i] * s;
  }
  for (int64_t i = 0; i < n; ++i) {
    sums[0] += a[i];
    sums[1] += b[i];
    sums[2] += rel[i];
  }
}

template <class T>
void scale(int64_t n, T factor, T* __restrict x) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

// Sums over a row, in vectors and a tail.
template <class T, class F>
FASTREL_INLINE T sum_row(int64_t width, F f) {
  constexpr int L = kLanes<T>;
  Vec<T> total{};
  int64_t j = 0;
  for (; j + L <= width; j += L) {
    Vec<T> x;
    for (int l = 0; l < L; ++l) x[l] = f(j + l);
    total += x;
  }
  T rest = sum<T>(total);
  for (; j < width; ++j) rest += f(j);
  return rest;
}

template <class T, bool WEIGHTED, bool FROZEN>
void layer_norm_row(int64_t width, const T* __restrict g, const T* __restrict x, const T* __restrict w, T eps, T* __restrict out) {
  const auto scaled = [&](int64_t j) { return WEIGHTED ? g[j] * w[j] : g[j]; };
  const T mean = sum_row<T>(width, [&](int64_t j) { return x[j]; }) / T(width);
  const T variance = sum_row<T>(width, [&](int64_t j) { return (x[j] - mean) * (x[j] - mean); }) / T(width);
  // Squares that overflow would make the gradient 0, which looks like an answer.
  const T rstd = variance > std::numeric_limits<T>::max() ? std::numeric_limits<T>::quiet_NaN() : T(1) / std::sqrt(variance + eps);
  const T mean_g = sum_row<T>(width, scaled) / T(width);
  if (FROZEN) {
    for (int64_t j = 0; j < width; ++j) out[j] = rstd * (scaled(j) - mean_g);
    return;
  }
  const T mean_gx = sum_row<T>(width, [&](int64_t j) { return scaled(j) * (x[j] - mean) * rstd; }) / T(width);
  for (int64_t j = 0; j < width; ++j) out[j] = rstd * (scaled(j) - mean_g - (x[j] - mean) * rstd * mean_gx);
}

template <class T>
void layer_norm_backward(
    int64_t begin, int64_t end, int64_t width, int64_t value_rows, const T* grad, const T* x, const T* weight, T eps, bool frozen,
    T* out) {
  const auto row = weight ? (frozen ? layer_norm_row<T, true, true> : layer_norm_row<T, true, false>)
                          : (frozen ? layer_norm_row<T, false, true> : layer_norm_row<T, false, false>);
  for (int64_t i = begin; i < end; ++i) row(width, grad + i * width, x + (i % value_rows) * width, weight, eps, out + i * width);
}

template <class T>
void attention_update(
    int64_t begin, int64_t end, int64_t heads, int64_t size, Update update, const T* attn, const T* grad, const T* rel, T* out) {
  const T *left = grad, *right = rel;
  if (update == Update::kGradientAttention) right = attn;
  if (update == Update::kRelevance) left = nullptr;
  if (update == Update::kAttention) left = nullptr, right = attn;
  const T share = T(1) / T(heads);
  T* __restrict p_out = out;
  for (int64_t i = begin; i < end; ++i) p_out[i] = 0;
  for (int64_t h = 0; h < heads; ++h) {
    const T *__restrict a = left ? left + h * size : nullptr, *__restrict b = right + h * size;
    if (a)
      for (int64_t i = begin; i < end; ++i) p_out[i] += positive_part(a[i] * b[i]);
    else if (update == Update::kRelevance)
      for (int64_t i = begin; i < end; ++i) p_out[i] += positive_part(b[i]);
    else
      for (int64_t i = begin; i < end; ++i) p_out[i] += b[i];
  }
  for (int64_t i = begin; i < end; ++i) p_out[i] *= share;
}

}  // namespace FASTREL_ISA
}  // namespace fastrel
