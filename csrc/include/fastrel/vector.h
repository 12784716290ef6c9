// SIMD vectors of the instruction set this file is compiled for (see cpu/isa_*.cpp): plain loops over `Vec`.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__clang__) || defined(__GNUC__)
#define FASTREL_INLINE __attribute__((always_inline)) inline
#else
#error "fastrel needs GCC or clang: its kernels are written with their vector types"
#endif

namespace fastrel {
namespace FASTREL_ISA {

#if FASTREL_ISA_LEVEL == 2  // AVX-512
constexpr int kVectorBytes = 64, kRows = 6, kVectors = 4;
#elif FASTREL_ISA_LEVEL == 1  // AVX2
constexpr int kVectorBytes = 32, kRows = 6, kVectors = 2;
#else
constexpr int kVectorBytes = 16, kRows = 6, kVectors = 2;
#endif

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// Columns of a panel (see gemm.h).
template <class T>
constexpr int64_t kPanel = kLanes<T> * kVectors;

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t integers __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t integers __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
FASTREL_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
FASTREL_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
FASTREL_INLINE Vec<T> splat(T x) {
  return Vec<T>{} + x;
}

template <class T>
FASTREL_INLINE T sum(Vec<T> v) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

template <class T>
FASTREL_INLINE int64_t round_up(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// exp(x) for x <= 0, exactly 0 below the smallest normal number. Error below 2 ulp in float, of the library's in double.
FASTREL_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  using Ints = VectorOf<float>::integers;
  const Ints tiny = x < splat(-87.0f);
  x = tiny ? splat(-87.0f) : x;
  const Ints n = __builtin_convertvector(x * 1.44269504088896341f - 0.5f, Ints);
  const Vec<float> whole = __builtin_convertvector(n, Vec<float>);
  const Vec<float> r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  Vec<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints scale = (n + 127) << 23;
  Vec<float> power;
  std::memcpy(&power, &scale, sizeof power);
  return tiny ? Vec<float>{} : p * power;
}

FASTREL_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = __builtin_exp(x[i]);
  return y;
}

}  // namespace FASTREL_ISA
}  // namespace fastrel
