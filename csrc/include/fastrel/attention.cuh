// The passes between the products of attention, on maps [parts, queries, keys] of a chunk of queries, parts = batch · heads.
#pragma once

#include "narrow.cuh"
#include "update.h"

namespace fastrel {
namespace cuda {

template <class T>
__device__ T update_of(Update update, T attn, T grad, T rel) {
  switch (update) {
    case Update::kGradientRelevance: return positive(grad * rel);
    case Update::kGradientAttention: return positive(grad * attn);
    case Update::kRelevance: return positive(rel);
    default: return attn;
  }
}

struct MaskStrides {
  int64_t batch, head, row, col;
};

// A = softmax(scale · products + mask) in place, a block per row; a row without any key becomes 0.
template <class T>
__global__ void softmax_kernel(
    int64_t heads, int64_t queries, int64_t keys, T scale, bool causal, int64_t query_start, Values<T> bias, const bool* keep,
    MaskStrides mask, T* attn) {
  const int64_t part = blockIdx.x / queries, query = blockIdx.x % queries;
  const int64_t at = (part / heads) * mask.batch + (part % heads) * mask.head + query * mask.row;
  T* row = attn + (part * queries + query) * keys;
  const int64_t seen = causal && query_start + query + 1 < keys ? query_start + query + 1 : keys;
  const T none = -INFINITY;
  T top = none;
  for (int64_t j = threadIdx.x; j < keys; j += blockDim.x) {
    T score = row[j] * scale + (bias ? bias[at + j * mask.col] : T(0));
    if (j >= seen || (keep && !keep[at + j * mask.col])) score = none;
    row[j] = score;
    top = score > top || score != score ? score : top;
  }
  top = block_max(top);
  T sum = 0;
  for (int64_t j = threadIdx.x; j < keys; j += blockDim.x) {
    row[j] = top == none ? T(0) : exponential(row[j] - top);
    sum += row[j];
  }
  sum = block_sum(sum);
  const T share = sum == T(0) ? T(0) : T(1) / sum;
  for (int64_t j = threadIdx.x; j < keys; j += blockDim.x) row[j] *= share;
}

// Σ_k M of each row / heads, a block per row; rel_product is S V'ᵀ, so that R_A = ½ A ⊙ rel_product.
template <class T>
__global__ void map_sums_kernel(
    int64_t heads, int64_t queries, int64_t keys, Update update, const T* attn, const T* grad_product, const T* rel_product,
    T* sums) {
  const int64_t row = blockIdx.x, at = row * keys;
  T sum = 0;
  for (int64_t j = threadIdx.x; j < keys; j += blockDim.x) {
    const T a = attn[at + j], r = rel_product ? T(0.5) * a * rel_product[at + j] : T(0);
    sum += update_of(update, a, grad_product ? grad_product[at + j] : T(0), r);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[row] = sum / T(heads);
}

// through[part, key] (+)= Σ_q weights[batch, q] M_q / heads, a thread per key.
template <class T>
__global__ void through_kernel(
    int64_t heads, int64_t queries, int64_t keys, Update update, const T* attn, const T* grad_product, const T* rel_product,
    const T* weights, T* through, bool add) {
  const int64_t part = blockIdx.x;
  const T* own = weights + (part / heads) * queries;
  FASTREL_EACH_OF_MANY(j, keys) {
    T sum = 0;
    for (int64_t q = 0; q < queries; ++q) {
      const int64_t at = (part * queries + q) * keys + j;
      const T a = attn[at], r = rel_product ? T(0.5) * a * rel_product[at] : T(0);
      sum += own[q] * update_of(update, a, grad_product ? grad_product[at] : T(0), r);
    }
    T* to = through + part * keys + j;
    *to = (add ? *to : T(0)) + sum / T(heads);
  }
}

// In place, a block per row: grad_product becomes D = scale A ⊙ (G − Σ_k A ⊙ G); official rel_product becomes R_A ⊘ products.
// A mask takes its share of R_A first (residual add): what is left to the scores is not yet scaled; `sums` [rows, 3] gets what their
// factor is made of, Σ u S, Σ bias S and Σ R_A, S = R_A ⊘ (u + bias), u = scale · products.
template <class T>
__global__ void score_lanes_kernel(
    int64_t heads, int64_t queries, int64_t keys, T scale, const T* attn, const T* products, Values<T> bias, MaskStrides mask,
    T* grad_product, T* rel_product, T* sums) {
  const int64_t row = blockIdx.x, part = row / queries, query = row % queries, at = row * keys;
  const int64_t masked = (part / heads) * mask.batch + (part % heads) * mask.head + query * mask.row;
  if (grad_product) {
    T sum = 0;
    for (int64_t j = threadIdx.x; j < keys; j += blockDim.x) sum += attn[at + j] * grad_product[at + j];
    sum = block_sum(sum);
    for (int64_t j = threadIdx.x; j < keys; j += blockDim.x)
      grad_product[at + j] = scale * attn[at + j] * (grad_product[at + j] - sum);
  }
  if (!rel_product) return;
  T own = 0, of_mask = 0, all = 0;
  for (int64_t j = threadIdx.x; j < keys; j += blockDim.x) {
    T rel = T(0.5) * attn[at + j] * rel_product[at + j];
    if (sums && rel != T(0)) {
      const T u = scale * products[at + j], b = bias ? bias[masked + j * mask.col] : T(0), s = safe_divide(rel, u + b, true);
      all += rel;
      of_mask += b * s;
      rel = u * s;
      own += rel;
    }
    rel_product[at + j] = safe_divide(rel, products[at + j], true);
  }
  if (!sums) return;
  own = block_sum(own), of_mask = block_sum(of_mask), all = block_sum(all);
  if (threadIdx.x == 0) sums[row * 3] = own, sums[row * 3 + 1] = of_mask, sums[row * 3 + 2] = all;
}

// M of whole maps [maps, heads, size]: the mean over heads; attn has `attn_maps` of them.
template <class T>
__global__ void attention_update_kernel(
    int64_t heads, int64_t size, int64_t attn_maps, Update update, const T* attn, const T* grad, const T* rel, T* out) {
  const int64_t map = blockIdx.x;
  FASTREL_EACH_OF_MANY(i, size) {
    T sum = 0;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = (map * heads + h) * size + i;
      const T a = attn ? attn[((map % attn_maps) * heads + h) * size + i] : T(0);
      sum += update_of(update, a, grad ? grad[at] : T(0), rel ? rel[at] : T(0));
    }
    out[map * size + i] = sum / T(heads);
  }
}

// row / (1 + Σ_k M), a block per query; m repeats every `maps` rows.
template <class T>
__global__ void rollout_kept_kernel(int64_t queries, int64_t keys, int64_t maps, const T* row, const T* m, T* kept) {
  const int64_t own = blockIdx.x / queries, query = blockIdx.x % queries;
  const T* weights = m + ((own % maps) * queries + query) * keys;
  T sum = 0;
  for (int64_t j = threadIdx.x; j < keys; j += blockDim.x) sum += weights[j];
  sum = block_sum(sum);
  if (threadIdx.x == 0) kept[own * queries + query] = row[own * queries + query] / (T(1) + sum);
}

// Σ_q kept_q M_q, a thread per key.
template <class T>
__global__ void rollout_through_kernel(int64_t queries, int64_t keys, int64_t maps, const T* kept, const T* m, T* through) {
  const int64_t own = blockIdx.x;
  FASTREL_EACH_OF_MANY(j, keys) {
    T sum = 0;
    for (int64_t q = 0; q < queries; ++q) sum += kept[own * queries + q] * m[((own % maps) * queries + q) * keys + j];
    through[own * keys + j] = sum;
  }
}

}  // namespace cuda
}  // namespace fastrel
