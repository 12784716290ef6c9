// Small matrix products on raw pointers: C [M, N] (+)= A [M, K] B [K, N], the size of attention heads.
//
// A may have any strides. B is packed in panels of kPanel columns, each stored row after row; the last panel is as wide as its
// columns need, rounded up to whole vectors, padded with zeros. C is row-major; `ldc` must leave room for the padding.
#pragma once

#include "vector.h"

namespace fastrel {
namespace FASTREL_ISA {

template <class T, int ROWS, int VECTORS>
FASTREL_INLINE void gemm_block(int64_t K, const T* a, int64_t a_row, int64_t a_col, const T* b, T* c, int64_t ldc, bool add) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) acc[i][j] = add ? load(c + i * ldc + j * L) : Vec<T>{};
  for (int64_t k = 0; k < K; ++k, b += VECTORS * L) {
    Vec<T> row[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) row[j] = load(b + j * L);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Vec<T> x = splat(a[i * a_row + k * a_col]);
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) acc[i][j] += x * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) store(c + i * ldc + j * L, acc[i][j]);
}

template <class T, int VECTORS>
void gemm_panel(int64_t M, int64_t K, const T* a, int64_t a_row, int64_t a_col, const T* b, T* c, int64_t ldc, bool add) {
  int64_t i = 0;
  for (; i + kRows <= M; i += kRows) gemm_block<T, kRows, VECTORS>(K, a + i * a_row, a_row, a_col, b, c + i * ldc, ldc, add);
  for (; i + 2 <= M; i += 2) gemm_block<T, 2, VECTORS>(K, a + i * a_row, a_row, a_col, b, c + i * ldc, ldc, add);
  for (; i < M; ++i) gemm_block<T, 1, VECTORS>(K, a + i * a_row, a_row, a_col, b, c + i * ldc, ldc, add);
}

// N counts the columns before padding.
template <class T>
void gemm(
    int64_t M, int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_col, const T* b, T* c, int64_t ldc, bool add) {
  for (int64_t n = 0; n < N; n += kPanel<T>) {
    const int64_t vectors = N - n >= kPanel<T> ? kVectors : (N - n + kLanes<T> - 1) / kLanes<T>;
    if (vectors == 1) gemm_panel<T, 1>(M, K, a, a_row, a_col, b, c + n, ldc, add);
    if (vectors == 2) gemm_panel<T, 2>(M, K, a, a_row, a_col, b, c + n, ldc, add);
    if constexpr (kVectors == 4) {
      if (vectors == 3) gemm_panel<T, 3>(M, K, a, a_row, a_col, b, c + n, ldc, add);
      if (vectors == 4) gemm_panel<T, 4>(M, K, a, a_row, a_col, b, c + n, ldc, add);
    }
    b += K * vectors * kLanes<T>;
  }
}

// Elements that B [K, N] takes as panels.
template <class T>
FASTREL_INLINE int64_t packed_size(int64_t K, int64_t N) {
  return K * round_up<T>(N);
}

// B [K, N] with any strides into panels, every element through f.
template <class T, class F>
FASTREL_INLINE void pack(int64_t K, int64_t N, const T* src, int64_t row, int64_t col, T* dst, F f) {
  for (int64_t n = 0; n < N; n += kPanel<T>) {
    const int64_t width = N - n < kPanel<T> ? N - n : kPanel<T>;
    const int64_t padded = round_up<T>(width);
    if (row == 1) {  // a transpose: read along the source's contiguous dimension
      for (int64_t j = 0; j < width; ++j)
        for (int64_t k = 0; k < K; ++k) dst[k * padded + j] = f(src[k + (n + j) * col]);
      for (int64_t k = 0; k < K && width < padded; ++k)
        for (int64_t j = width; j < padded; ++j) dst[k * padded + j] = 0;
    } else {
      for (int64_t k = 0; k < K; ++k) {
        for (int64_t j = 0; j < width; ++j) dst[k * padded + j] = f(src[k * row + (n + j) * col]);
        for (int64_t j = width; j < padded; ++j) dst[k * padded + j] = 0;
      }
    }
    dst += K * padded;
  }
}

}  // namespace FASTREL_ISA
}  // namespace fastrel
