// Products of int8 on AVX2, which has none of its own: C [M, N] = A [M, K] B [K, N] in int32, exactly.
//
// vpmaddubsw multiplies unsigned by signed bytes and adds two neighbours in 16 bits: of numbers within ±127 that is at most 32258, so that
// nothing saturates. A is non-negative nearly always (|x|, S); else its signs are moved to B. B is packed in panels of 16 columns, four
// rows of a column side by side.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "vector.h"

namespace fastrel {
namespace FASTREL_ISA {

#if FASTREL_ISA_LEVEL >= 1

typedef char Bytes __attribute__((vector_size(32)));
typedef short Shorts __attribute__((vector_size(32)));
typedef int Ints __attribute__((vector_size(32)));
typedef int8_t Row __attribute__((vector_size(16)));

template <bool SIGNED>
FASTREL_INLINE Ints int8_dot(Bytes a, Bytes b, Ints sum) {
  const Bytes size = SIGNED ? (Bytes)__builtin_ia32_pabsb256(a) : a, turned = SIGNED ? (Bytes)__builtin_ia32_psignb256(b, a) : b;
  const Shorts pairs = (Shorts)__builtin_ia32_pmaddubsw256(size, turned), ones = Shorts{} + short(1);
  return sum + (Ints)__builtin_ia32_pmaddwd256(pairs, ones);
}

FASTREL_INLINE Bytes bytes_at(const int8_t* p) {
  Bytes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

FASTREL_INLINE Bytes four_of(const int8_t* a, int64_t count) {
  int32_t four = 0;
  std::memcpy(&four, a, count);
  return (Bytes)(Ints{} + four);
}

// ROWS rows of A times a panel.
template <int ROWS, bool SIGNED>
FASTREL_INLINE void int8_block(int64_t K, const int8_t* a, const int8_t* panel, int32_t (*sums)[kInt8Columns]) {
  Ints acc[ROWS][2] = {};
  const auto step = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    const Bytes left = bytes_at(panel + k * kInt8Columns), right = bytes_at(panel + k * kInt8Columns + 32);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Bytes x = four_of(a + i * K + k, count);
      acc[i][0] = int8_dot<SIGNED>(x, left, acc[i][0]);
      acc[i][1] = int8_dot<SIGNED>(x, right, acc[i][1]);
    }
  };
  int64_t k = 0;
  for (; k + 4 <= K; k += 4) step(k, 4);
  if (k < K) step(k, K - k);
  std::memcpy(sums, acc, sizeof acc);
}

// Columns n … n + width of B into a panel [K / 4, 16, 4], zeros behind them.
inline void int8_pack(int64_t K, int64_t width, const int8_t* b, int64_t row, int64_t col, int8_t* panel) {
  int64_t k = 0;
  if (col == 1 && width == kInt8Columns) {
    for (; k + 4 <= K; k += 4, b += 4 * row, panel += 4 * kInt8Columns) {
      Row r[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&r[i], b + i * row, sizeof r[i]);
      const Row low01 = __builtin_shuffle(r[0], r[1], Row{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
      const Row high01 = __builtin_shuffle(r[0], r[1], Row{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
      const Row low23 = __builtin_shuffle(r[2], r[3], Row{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
      const Row high23 = __builtin_shuffle(r[2], r[3], Row{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
      const Row first{0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23}, second{8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31};
      const Row packed[4] = {
          __builtin_shuffle(low01, low23, first), __builtin_shuffle(low01, low23, second), __builtin_shuffle(high01, high23, first),
          __builtin_shuffle(high01, high23, second)};
      std::memcpy(panel, packed, sizeof packed);
    }
  } else if (row == 1) {
    for (; k + 4 <= K; k += 4, b += 4, panel += 4 * kInt8Columns)
      for (int64_t j = 0; j < kInt8Columns; ++j) {
        int32_t four = 0;
        if (j < width) std::memcpy(&four, b + j * col, sizeof four);
        std::memcpy(panel + 4 * j, &four, sizeof four);
      }
  }
  for (; k < K; k += 4, b += 4 * row, panel += 4 * kInt8Columns)
    for (int64_t j = 0; j < kInt8Columns; ++j)
      for (int64_t i = 0; i < 4; ++i) panel[4 * j + i] = j < width && k + i < K ? b[i * row + j * col] : int8_t(0);
}

template <bool SIGNED>
void int8_panel(int64_t M, int64_t width, int64_t K, const int8_t* a, const int8_t* panel, int32_t* c, int64_t ldc) {
  int32_t sums[4][kInt8Columns];
  int64_t i = 0;
  const auto give = [&](int64_t count) {
    for (int64_t r = 0; r < count; ++r) std::memcpy(c + (i + r) * ldc, sums[r], width * sizeof(int32_t));
    i += count;
  };
  while (i + 4 <= M) int8_block<4, SIGNED>(K, a + i * K, panel, sums), give(4);
  while (i < M) int8_block<1, SIGNED>(K, a + i * K, panel, sums), give(1);
}

// Panels begin … end of C. A and C are contiguous, B has any strides.
inline void int8_product(
    int64_t begin, int64_t end, int64_t M, int64_t N, int64_t K, const int8_t* a, bool is_signed, const int8_t* b, int64_t row,
    int64_t col, int32_t* c) {
  std::vector<int8_t> panel((K + 3) / 4 * 4 * kInt8Columns);
  for (int64_t n = begin * kInt8Columns; n < std::min(N, end * kInt8Columns); n += kInt8Columns) {
    const int64_t width = std::min(kInt8Columns, N - n);
    int8_pack(K, width, b + n * col, row, col, panel.data());
    (is_signed ? int8_panel<true> : int8_panel<false>)(M, width, K, a, panel.data(), c + n, N);
  }
}

#endif

}  // namespace FASTREL_ISA
}  // namespace fastrel
