// The kernels that every instruction set provides, and the one to use on this machine.
#pragma once

#include <cstdint>
#include <vector>

#include "update.h"

namespace fastrel {

// One head of attention: [queries, d] and [keys, d] operands with any strides; lanes have `targets` of them, `*_target` apart.
// What is null is absent, or not wanted. Outputs have contiguous rows, `out_row` apart.
template <class T>
struct AttentionHead {
  int64_t queries, keys, d, targets;
  const T *q, *k, *v;
  int64_t q_row, q_col, k_row, k_col, v_row, v_col;
  const T* mask_bias;     // added to the scores
  const bool* mask_keep;  // false: not attended to
  int64_t mask_row, mask_col;
  T scale;
  T share;  // of the gradient, to each operand of A V and Q Kᵀ
  bool causal, official;
  int64_t query_start;  // position of the first query, for the causal mask
  Update update;
  T head_share;  // 1 / heads
  const T *rel, *grad;
  int64_t rel_target, rel_row, rel_col, grad_target, grad_row, grad_col;
  const T* row;  // [queries]
  int64_t row_target;
  T *rel_q, *rel_k, *rel_v, *grad_q, *grad_k, *grad_v;
  int64_t q_target, k_target, out_row;
  T* through;  // [keys], this head's part
  int64_t through_target;
  T* row_sum;  // [queries], this head's part of Σ_k M
  int64_t row_sum_target;
  T* mask_sums;  // [3]: Σ u S, Σ bias S, Σ R_A of the official rules with a mask, whose share is taken off before Q and K
  int64_t mask_sums_target;
};

template <class T>
struct Kernels {
  // |x| of n numbers.
  void (*absolute)(int64_t n, const T* x, T* out);
  // S = R ⊘ ½(signed_sum − bias + magnitude) for n numbers.
  void (*ratio)(
      int64_t n, const T* signed_sum, const T* bias, const T* magnitude, const T* rel, T* out, bool official);
  // ½(x ⊙ c + |x| ⊙ c_abs) for n numbers.
  void (*combine)(int64_t n, const T* x, const T* c, const T* c_abs, T* out);
  // Residual add, positive rules; u and v repeat every `period` numbers.
  void (*share)(int64_t begin, int64_t end, int64_t period, const T* u, const T* v, const T* rel, T* rel_u, T* rel_v);
  // g ⊙ y/x, 0 where x is 0; x and y repeat every `period` numbers.
  void (*activation_ratio)(int64_t begin, int64_t end, int64_t period, const T* grad, const T* x, const T* y, T* out);
  // Residual add, official rules: a = u R ⊘ (u+v), b = v R ⊘ (u+v), and [Σa, Σb, ΣR] in double.
  void (*signed_share)(int64_t n, const T* u, const T* v, const T* rel, T* a, T* b, double* sums);
  void (*scale)(int64_t n, T factor, T* x);
  // g through y = normalised(x) ⊙ weight, rows begin … end of `width`; x repeats every `value_rows` rows. frozen: by a constant deviation.
  void (*layer_norm_backward)(
      int64_t begin, int64_t end, int64_t width, int64_t value_rows, const T* grad, const T* x, const T* weight, T eps, bool frozen,
      T* out);
  // mean over heads of the clamped product that `update` names, numbers begin … end of a map.
  void (*attention_update)(
      int64_t begin, int64_t end, int64_t heads, int64_t size, Update update, const T* attn, const T* grad, const T* rel,
      T* out);
  void (*attention_head)(const AttentionHead<T>& head, std::vector<T>& scratch);
};

// Rows of n numbers; bfloat16 as its bits. See reduced.h.
struct ReducedKernels {
  void (*bf16_of)(int64_t n, const float* x, uint16_t* out, uint16_t* magnitude);
  void (*bf16_ratio)(
      int64_t n, const float* signed_sum, const float* bias, const uint16_t* magnitude, const float* rel, uint16_t* out);
  void (*bf16_combine)(int64_t n, const float* x, const uint16_t* c, const uint16_t* c_abs, float* out);
  void (*bf16_widen)(int64_t n, const uint16_t* x, float* out);
  float (*int8_of)(int64_t n, const float* x, int8_t* out, int8_t* magnitude);
  float (*int8_ratio)(
      int64_t n, const float* signed_sum, const float* bias, const int32_t* magnitude, float x_scale, const float* w_scales,
      const float* rel, float* scratch, int8_t* out);
  void (*int8_combine)(int64_t n, const float* x, const int32_t* c, const int32_t* c_abs, float scale, float* out);
  // Panels begin … end of A [M, K] B [K, N] in int32, A's signs asked for; null where there is no such kernel.
  void (*int8_product)(
      int64_t begin, int64_t end, int64_t M, int64_t N, int64_t K, const int8_t* a, bool is_signed, const int8_t* b, int64_t row,
      int64_t col, int32_t* c);
  uint64_t (*digest)(int64_t n, const uint32_t* bits, const uint32_t* keys);
};

// The tables of the best instruction set that this processor has.
template <class T>
const Kernels<T>& kernels();
const ReducedKernels& reduced_kernels();
const char* instruction_set();

// Whether products of int8 are left to torch: where the processor has them (VNNI), and where there are none of ours.
bool multiplies_int8();

// Columns of a panel of `int8_product`.
constexpr int64_t kInt8Columns = 16;

}  // namespace fastrel
