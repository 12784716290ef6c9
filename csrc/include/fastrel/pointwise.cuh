// The passes around the products of a linear layer, the residual add and layer normalisation.
#pragma once

#include "narrow.cuh"

namespace fastrel {
namespace cuda {

// x in bfloat16 at p; of two parts the second, what the first leaves of x, `width` further on.
template <class T>
__device__ void store_parts(uint16_t* p, int64_t width, int64_t parts, T x) {
  *p = bfloat16_bits(float(x));
  // What is infinite leaves nothing, not the NaN of ∞ − ∞.
  if (parts == 2) p[width] = bfloat16_bits(x - x == T(0) ? float(x) - from_bits(Format::kBFloat16, *p) : 0.0f);
}

// Lanes [n / width, width] as operands of products in bfloat16, [n / width, parts · width].
template <class T>
__global__ void parts_kernel(int64_t n, int64_t width, int64_t parts, const T* lane, uint16_t* out) {
  FASTREL_EACH(i, n) store_parts(out + (i / width) * parts * width + i % width, width, parts, lane[i]);
}

// x [n / width, width] of 16 bits -> [x⁺ x⁻] [n / width, 2 · width] of the same.
template <class T>
__global__ void sides_kernel(int64_t n, int64_t width, Values<T> x, uint16_t* out) {
  const auto* bits = static_cast<const uint16_t*>(x.data);
  FASTREL_EACH(i, n) {
    const T value = x[i];
    uint16_t* to = out + (i / width) * 2 * width + i % width;
    to[0] = value < T(0) ? 0 : bits[i];
    to[width] = value > T(0) ? 0 : bits[i];
  }
}

// |x| in bfloat16.
template <class T>
__global__ void magnitude_kernel(int64_t n, Values<T> x, uint16_t* out) {
  FASTREL_EACH(i, n) out[i] = bfloat16_bits(float(absolute(x[i])));
}

// S = R ⊘ Z, Z = ½(signed_sum − bias + magnitude), or signed_sum itself without a magnitude. `least`: the share of the magnitude
// below which Z is raised to it (reduced products); 0: Z is 0 where it is no more than the rounding of its terms. Values repeat
// every `period` numbers. S as it is to `out`, or in parts of bfloat16 to `narrow`.
template <class T>
__global__ void ratio_kernel(
    int64_t n, int64_t period, int64_t outs, Values<T> signed_sum, Values<T> bias, const T* magnitude, const T* rel, T* out,
    uint16_t* narrow, int64_t parts, T least, bool official) {
  FASTREL_EACH(i, n) {
    const int64_t at = i % period;
    T z = signed_sum[at] - (bias ? bias[at % outs] : T(0));
    if (magnitude) {
      const T size = magnitude[at], half = (z + size) * T(0.5), floor = size * least;
      z = least > T(0) ? (half < floor ? floor : half) : half < size * (4 * Limits<T>::eps) ? T(0) : half;
    }
    const T share = safe_divide(rel[i], z, official);
    if (narrow) store_parts(narrow + (i / outs) * parts * outs + i % outs, outs, parts, share);
    else out[i] = share;
  }
}

// R' = ½(x ⊙ c + |x| ⊙ c_abs); x repeats every `period` numbers.
template <class T>
__global__ void combine_kernel(int64_t n, int64_t period, Values<T> x, const T* c, const T* c_abs, T* out) {
  FASTREL_EACH(i, n) {
    const T value = x[i % period];
    // The sum first: what cancels must cancel exactly.
    out[i] = absolute(value) * (value < T(0) ? c_abs[i] - c[i] : c_abs[i] + c[i]) * T(0.5);
  }
}

// R' = x⁺ ⊙ C⁺ + x⁻ ⊙ C⁻, [C⁺ C⁻] [n / width, 2 · width].
template <class T>
__global__ void combine_sides_kernel(int64_t n, int64_t period, int64_t width, Values<T> x, const T* c, T* out) {
  FASTREL_EACH(i, n) {
    const T value = x[i % period];
    const T* own = c + (i / width) * 2 * width + i % width;
    out[i] = value * (value < T(0) ? own[width] : own[0]);
  }
}

// What AttnLRP's rule multiplies a gradient by on its way through y = f(x): y/x, which gelu's forms give from x alone.
enum class Slope { kRatio, kGelu, kGeluTanh };

template <class T>
__device__ T slope_of(Slope slope, T x, T y) {
  if (x == T(0)) return T(0);
  if (slope == Slope::kRatio) return y / x;
  const T inner = slope == Slope::kGelu ? error_function(x * T(0.70710678118654752))
                                        : hyperbolic_tangent(T(0.79788456080286536) * (x + T(0.044715) * x * x * x));
  return T(0.5) * (T(1) + inner) + (x - x);  // ∞/∞ is not a number
}

// grad ⊙ y/x, 0 where x is 0; x and y repeat every `period` numbers.
template <class T>
__global__ void activation_ratio_kernel(
    int64_t n, int64_t period, Slope slope, const T* grad, Values<T> x, Values<T> y, T* out) {
  FASTREL_EACH(i, n) out[i] = grad[i] * slope_of(slope, x[i % period], y[i % period]);
}

// Residual add, positive rules.
template <class T>
__global__ void share_kernel(int64_t n, int64_t period, Values<T> u, Values<T> v, const T* rel, T* rel_u, T* rel_v) {
  FASTREL_EACH(i, n) {
    const T a = u[i % period], b = v[i % period], total = a + b;
    const T sign = total > T(0) ? T(1) : total < T(0) ? T(-1) : T(0);
    const T part_a = positive(sign * a), part_b = positive(sign * b), s = safe_divide(rel[i], part_a + part_b, false);
    rel_u[i] = part_a * s;
    rel_v[i] = part_b * s;
  }
}

// Residual add, official rules, first phase: block (chunk, sample) sums u S, v S and R over its chunk, S = R ⊘ (u+v).
// Values are [batch, size], lanes [samples, size], sums [samples, 3, chunks].
template <class T>
__global__ void sums_kernel(int64_t size, int64_t chunk, int64_t batch, Values<T> u, Values<T> v, const T* rel, double* sums) {
  const int64_t sample = blockIdx.x, first = blockIdx.y * chunk, value = (sample % batch) * size, lane = sample * size;
  const int64_t last = first + chunk < size ? first + chunk : size;
  double a = 0, b = 0, r = 0;
  for (int64_t i = first + threadIdx.x; i < last; i += blockDim.x) {
    const T s = safe_divide(rel[lane + i], u[value + i] + v[value + i], true);
    a += u[value + i] * s;
    b += v[value + i] * s;
    r += rel[lane + i];
  }
  a = block_sum(a), b = block_sum(b), r = block_sum(r);
  if (threadIdx.x == 0) {
    double* own = sums + sample * 3 * gridDim.y + blockIdx.y;
    own[0] = a, own[gridDim.y] = b, own[2 * gridDim.y] = r;
  }
}

// Second phase: the chunks' sums added up in order, and the shares scaled.
template <class T>
__global__ void scale_kernel(
    int64_t size, int64_t chunks, int64_t batch, Values<T> u, Values<T> v, const T* rel, const double* sums, T* rel_u, T* rel_v) {
  const int64_t sample = blockIdx.x, value = (sample % batch) * size, lane = sample * size;
  double total[3] = {0, 0, 0};
  for (int k = 0; k < 3; ++k)
    for (int64_t c = 0; c < chunks; ++c) total[k] += sums[(sample * 3 + k) * chunks + c];
  const double both = absolute(total[0]) + absolute(total[1]);
  const T factor_u = T(safe_divide(safe_divide(absolute(total[0]), both, true) * total[2], total[0], true));
  const T factor_v = T(safe_divide(safe_divide(absolute(total[1]), both, true) * total[2], total[1], true));
  FASTREL_EACH_OF_MANY(i, size) {
    const T s = safe_divide(rel[lane + i], u[value + i] + v[value + i], true);
    rel_u[lane + i] = u[value + i] * s * factor_u;
    rel_v[lane + i] = v[value + i] * s * factor_v;
  }
}

// g through y = normalised(x) ⊙ weight, a block per lane row; x repeats every `rows` rows.
template <class T>
__global__ void layer_norm_backward_kernel(
    int64_t rows, int64_t width, const T* grad, Values<T> x, Values<T> weight, T eps, bool frozen, T* out) {
  const T* g = grad + blockIdx.x * width;
  const auto own = x.from((blockIdx.x % rows) * width);
  T sum = 0;
  for (int64_t c = threadIdx.x; c < width; c += blockDim.x) sum += own[c];
  const T mean = block_sum(sum) / T(width);
  sum = 0;
  for (int64_t c = threadIdx.x; c < width; c += blockDim.x) sum += (own[c] - mean) * (own[c] - mean);
  const T variance = block_sum(sum) / T(width);
  // Squares that overflow would make the gradient 0, which looks like an answer.
  const T rstd = variance <= Limits<T>::most ? T(1) / sqrt(variance + eps) : T(NAN);
  T sum_g = 0, sum_gx = 0;
  for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
    const T scaled = weight ? g[c] * weight[c] : g[c];
    sum_g += scaled;
    sum_gx += scaled * (own[c] - mean) * rstd;
  }
  const T mean_g = block_sum(sum_g) / T(width), mean_gx = frozen ? T(0) : block_sum(sum_gx) / T(width);
  for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
    const T scaled = weight ? g[c] * weight[c] : g[c];
    out[blockIdx.x * width + c] = rstd * (scaled - mean_g - (own[c] - mean) * rstd * mean_gx);
  }
}

}  // namespace cuda
}  // namespace fastrel
