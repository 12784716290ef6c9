// One head of softmax attention: gradient and relevance through it, and its step of the rollout, a tile of queries at a time.
//
// Per tile, with A = softmax(scale Q Kᵀ + mask) recomputed and V' = V⁺ (positive) or V (official):
//   S = R ⊘ (A V')      R_A = ½ A ⊙ (S V'ᵀ)       R_V += V' ⊙ (Aᵀ S), halved under official
//   G = g Vᵀ            g_V += Aᵀ g               D = scale A ⊙ (G − Σ_k A ⊙ G),  g_Q = D K,  g_K += Dᵀ Q; times `share` for each product
//   official:           (R_A less a mask's share,) S₂ = R_A ⊘ (Q Kᵀ),        R_Q = ½ Q ⊙ (S₂ K),  R_K += ½ K ⊙ (S₂ᵀ Q)
//   through += Σ_q row_q M_q,  M = (G ⊙ R_A)⁺ / heads, or what `Update` names.
// Memory: O((tile + d) keys), never queries × keys.
#pragma once

#include <algorithm>
#include <vector>

#include "divide.h"
#include "gemm.h"
#include "kernels.h"

namespace fastrel {
namespace FASTREL_ISA {

constexpr int64_t kTile = 48;

// The buffers of one head, cut out of one allocation.
template <class T>
class Scratch {
 public:
  explicit Scratch(std::vector<T>& memory) : memory_(memory) {}
  // First pass (data() == nullptr): measure. Second: hand out.
  T* take(int64_t count) {
    const int64_t start = used_;
    used_ += (count + 15) / 16 * 16;
    return measuring_ ? nullptr : memory_.data() + start;
  }
  void allocate() {
    if (static_cast<int64_t>(memory_.size()) < used_) memory_.resize(used_);
    used_ = 0;
    measuring_ = false;
  }

 private:
  std::vector<T>& memory_;
  int64_t used_ = 0;
  bool measuring_ = true;
};

template <class T>
struct Buffers {
  T *keys_t, *keys, *values_t, *relevant_t, *relevant;                   // packed operands
  T *attn, *scores, *rel_attn, *grad_attn;                               // [tile, keys]
  T *out, *share, *packed_q, *packed_share, *packed_grad;                // [tile, d]
  T *sum_rel_v, *sum_grad_v, *sum_grad_k, *sum_rel_k;                    // [targets, keys, d]
  T* through;                                                            // [targets, keys]
};

template <class T>
Buffers<T> carve(const AttentionHead<T>& h, Scratch<T>& s) {
  const int64_t keys = round_up<T>(h.keys), d = round_up<T>(h.d), m = std::min(kTile, h.queries);
  const bool rel = h.rel != nullptr, grad = h.grad != nullptr, scores = h.official && h.rel_q != nullptr;
  const int64_t sums = h.targets * h.keys * d;
  Buffers<T> b{};
  b.keys_t = s.take(packed_size<T>(h.d, h.keys));
  if (h.grad_q || scores) b.keys = s.take(packed_size<T>(h.keys, h.d));
  if (grad) b.values_t = s.take(packed_size<T>(h.d, h.keys));
  if (rel) b.relevant_t = s.take(packed_size<T>(h.d, h.keys));
  if (rel) b.relevant = s.take(packed_size<T>(h.keys, h.d));
  b.attn = s.take(m * keys);
  if (scores) b.scores = s.take(m * keys);
  if (rel) b.rel_attn = s.take(m * keys);
  if (grad) b.grad_attn = s.take(m * keys);
  b.out = s.take(m * d);
  b.share = s.take(m * d);
  b.packed_q = s.take(packed_size<T>(m, h.d));
  b.packed_share = s.take(packed_size<T>(m, h.d));
  b.packed_grad = s.take(packed_size<T>(m, h.d));
  if (h.rel_v) b.sum_rel_v = s.take(sums);
  if (h.grad_v) b.sum_grad_v = s.take(sums);
  if (h.grad_k) b.sum_grad_k = s.take(sums);
  if (h.rel_k) b.sum_rel_k = s.take(sums);
  if (h.through) b.through = s.take(h.targets * keys);
  return b;
}

// Rows of scores [m, keys] into rows of A, in place; padding becomes 0, and so does a row without any key.
template <class T>
void softmax(const AttentionHead<T>& h, int64_t q0, int64_t m, T* tile) {
  const int64_t keys = h.keys, padded = round_up<T>(keys);
  const T none = -std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < m; ++i) {
    T* row = tile + i * padded;
    const int64_t seen = h.causal ? std::min(keys, h.query_start + q0 + i + 1) : keys;
    for (int64_t j = 0; j < padded; j += kLanes<T>) store(row + j, load(row + j) * h.scale);
    if (h.mask_bias) {
      const T* bias = h.mask_bias + (q0 + i) * h.mask_row;
      for (int64_t j = 0; j < keys; ++j) row[j] += bias[j * h.mask_col];
    }
    if (h.mask_keep) {
      const bool* keep = h.mask_keep + (q0 + i) * h.mask_row;
      for (int64_t j = 0; j < keys; ++j) row[j] = keep[j * h.mask_col] ? row[j] : none;
    }
    for (int64_t j = std::max<int64_t>(seen, 0); j < padded; ++j) row[j] = none;
    Vec<T> top = splat(none);
    for (int64_t j = 0; j < padded; j += kLanes<T>) {
      const Vec<T> x = load(row + j);
      top = x > top ? x : top;
    }
    T highest = none;
    for (int l = 0; l < kLanes<T>; ++l) highest = std::max(highest, top[l]);
    if (highest == none) {  // all are excluded, or NaN, which is above nothing
      const bool excluded = std::all_of(row, row + keys, [&](T x) { return x == none; });
      std::fill(row, row + padded, excluded ? T(0) : std::numeric_limits<T>::quiet_NaN());
      continue;
    }
    Vec<T> total{};
    for (int64_t j = 0; j < padded; j += kLanes<T>) {
      const Vec<T> e = exp_nonpositive(load(row + j) - highest);
      total += e;
      store(row + j, e);
    }
    const Vec<T> scale = splat(T(1) / sum<T>(total));
    for (int64_t j = 0; j < padded; j += kLanes<T>) store(row + j, load(row + j) * scale);
  }
}

// The mask's share taken off R_A: u ⊙ S is left, S = R_A ⊘ (u + bias), u = scale · products; not scaled, `sums` says how.
template <class T>
void share_with_mask(const AttentionHead<T>& h, int64_t q0, int64_t m, const T* products, T* rel_attn, T* sums) {
  const int64_t padded = round_up<T>(h.keys);
  if (q0 == 0) sums[0] = sums[1] = sums[2] = 0;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < h.keys; ++j) {
      T& rel = rel_attn[i * padded + j];
      const T given = h.mask_bias ? h.mask_bias[(q0 + i) * h.mask_row + j * h.mask_col] : T(0);
      const T bias = given == -std::numeric_limits<T>::infinity() ? T(0) : given;  // what is excluded takes no part
      const T u = h.scale * products[i * padded + j], s = safe_divide<T, true>(rel, u + bias);
      sums[1] += bias * s;
      sums[2] += rel;
      rel = u * s;
      sums[0] += rel;
    }
}

// Zeros behind the `keys` columns of a product whose rows may hold infinity, of which padding makes NaN.
template <class T>
void clear_padding(int64_t m, int64_t keys, T* tile) {
  const int64_t padded = round_up<T>(keys);
  for (int64_t i = 0; i < m; ++i) std::fill(tile + i * padded + keys, tile + (i + 1) * padded, T(0));
}

// M of one row into `through`, weighted; returns its sum over keys.
template <class T>
T update_row(Update update, int64_t padded, const T* attn, const T* grad, const T* rel, T weight, T* through) {
  const Vec<T> zero{}, w = splat(weight);
  Vec<T> total{};
  for (int64_t j = 0; j < padded; j += kLanes<T>) {
    Vec<T> m;
    switch (update) {
      case Update::kGradientRelevance: m = load(grad + j) * load(rel + j); break;
      case Update::kGradientAttention: m = load(grad + j) * load(attn + j); break;
      case Update::kRelevance: m = load(rel + j); break;
      default: m = load(attn + j);
    }
    m = m < zero ? zero : m;  // NaN stays
    total += m;
    if (through) store(through + j, load(through + j) + w * m);
  }
  return sum<T>(total);
}

// dst[i, c] (any strides) = f(i, c, sum[i, c])
template <class T, class F>
FASTREL_INLINE void write(int64_t rows, int64_t d, const T* sum, T* dst, int64_t dst_row, F f) {
  const int64_t padded = round_up<T>(d);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < d; ++c) dst[i * dst_row + c] = f(i, c, sum[i * padded + c]);
}

template <class T>
void attention_head(const AttentionHead<T>& h, std::vector<T>& memory) {
  Scratch<T> scratch(memory);
  carve(h, scratch);
  scratch.allocate();
  const Buffers<T> b = carve(h, scratch);

  const int64_t keys = h.keys, d = h.d, padded = round_up<T>(keys), width = round_up<T>(d);
  const auto same = [](T x) { return x; };
  const auto relevant = [&](T x) { return h.official ? x : positive_part(x); };
  pack(d, keys, h.k, h.k_col, h.k_row, b.keys_t, same);
  if (b.keys) pack(keys, d, h.k, h.k_row, h.k_col, b.keys, same);
  if (b.values_t) pack(d, keys, h.v, h.v_col, h.v_row, b.values_t, same);
  if (b.relevant_t) pack(d, keys, h.v, h.v_col, h.v_row, b.relevant_t, relevant);
  if (b.relevant) pack(keys, d, h.v, h.v_row, h.v_col, b.relevant, relevant);
  if (b.through) std::fill(b.through, b.through + h.targets * padded, T(0));

  for (int64_t q0 = 0; q0 < h.queries; q0 += kTile) {
    const int64_t m = std::min(kTile, h.queries - q0);
    const bool more = q0 > 0;  // add to the sums
    const T* q = h.q + q0 * h.q_row;
    gemm(m, keys, d, q, h.q_row, h.q_col, b.keys_t, b.attn, padded, false);
    if (b.scores) std::copy(b.attn, b.attn + m * padded, b.scores);
    softmax(h, q0, m, b.attn);
    if (h.grad_k || h.rel_k) pack(m, d, q, h.q_row, h.q_col, b.packed_q, same);
    if (h.rel) gemm(m, d, keys, b.attn, padded, int64_t(1), b.relevant, b.out, width, false);

    for (int64_t t = 0; t < h.targets; ++t) {
      const int64_t sums = t * keys * width;
      if (h.rel) {
        const T* rel = h.rel + t * h.rel_target + q0 * h.rel_row;
        for (int64_t i = 0; i < m; ++i)
          for (int64_t c = 0; c < d; ++c) {
            const T r = rel[i * h.rel_row + c * h.rel_col], z = b.out[i * width + c];
            b.share[i * width + c] = h.official ? safe_divide<T, true>(r, z) : safe_divide<T, false>(r, z);
          }
        gemm(m, keys, d, b.share, width, int64_t(1), b.relevant_t, b.rel_attn, padded, false);
        for (int64_t j = 0; j < m * padded; j += kLanes<T>)
          store(b.rel_attn + j, load(b.rel_attn + j) * load(b.attn + j) * T(0.5));
        clear_padding(m, keys, b.rel_attn);
        if (h.rel_v) {
          pack(m, d, b.share, width, int64_t(1), b.packed_share, same);
          gemm(keys, d, m, b.attn, int64_t(1), padded, b.packed_share, b.sum_rel_v + sums, width, more);
        }
      }
      const T* grad = h.grad + t * h.grad_target + q0 * h.grad_row;
      if (h.grad) {
        gemm(m, keys, d, grad, h.grad_row, h.grad_col, b.values_t, b.grad_attn, padded, false);
        clear_padding(m, keys, b.grad_attn);
      }
      if (h.row) {
        for (int64_t i = 0; i < m; ++i) {
          const int64_t at = i * padded;
          const T total = update_row(
              h.update, padded, b.attn + at, b.grad_attn + at, b.rel_attn + at, h.row[t * h.row_target + q0 + i] * h.head_share,
              b.through ? b.through + t * padded : nullptr);
          if (h.row_sum) h.row_sum[t * h.row_sum_target + q0 + i] = total * h.head_share;
        }
      }
      if (h.grad_v) {
        pack(m, d, grad, h.grad_row, h.grad_col, b.packed_grad, same);
        gemm(keys, d, m, b.attn, int64_t(1), padded, b.packed_grad, b.sum_grad_v + sums, width, more);
      }
      if (h.grad_q) {
        const T scale = h.scale * h.share * h.share;
        for (int64_t i = 0; i < m; ++i) {
          T* g = b.grad_attn + i * padded;
          const T* a = b.attn + i * padded;
          Vec<T> total{};
          for (int64_t j = 0; j < padded; j += kLanes<T>) total += load(a + j) * load(g + j);
          const Vec<T> mean = splat(sum<T>(total));
          for (int64_t j = 0; j < padded; j += kLanes<T>) store(g + j, load(a + j) * (load(g + j) - mean) * scale);
        }
        gemm(m, d, keys, b.grad_attn, padded, int64_t(1), b.keys, b.share, width, false);
        write(m, d, b.share, h.grad_q + t * h.q_target + q0 * h.out_row, h.out_row, [](int64_t, int64_t, T x) { return x; });
        gemm(keys, d, m, b.grad_attn, int64_t(1), padded, b.packed_q, b.sum_grad_k + sums, width, more);
      }
      if (h.rel_q) {
        if (h.mask_sums) share_with_mask(h, q0, m, b.scores, b.rel_attn, h.mask_sums + t * h.mask_sums_target);
        for (int64_t j = 0; j < m * padded; ++j) b.rel_attn[j] = safe_divide<T, true>(b.rel_attn[j], b.scores[j]);
        gemm(m, d, keys, b.rel_attn, padded, int64_t(1), b.keys, b.share, width, false);
        write(m, d, b.share, h.rel_q + t * h.q_target + q0 * h.out_row, h.out_row, [&](int64_t i, int64_t c, T x) {
          return x * q[i * h.q_row + c * h.q_col] * T(0.5);
        });
        gemm(keys, d, m, b.rel_attn, int64_t(1), padded, b.packed_q, b.sum_rel_k + sums, width, more);
      }
    }
  }

  for (int64_t t = 0; t < h.targets; ++t) {
    const int64_t sums = t * keys * width, at = t * h.k_target;
    const auto value = [&](int64_t j, int64_t c) { return h.v[j * h.v_row + c * h.v_col]; };
    const T half = h.official ? T(0.5) : T(1);
    if (h.rel_v)
      write(keys, d, b.sum_rel_v + sums, h.rel_v + at, h.out_row, [&](int64_t j, int64_t c, T x) {
        return x * relevant(value(j, c)) * half;
      });
    if (h.grad_v) write(keys, d, b.sum_grad_v + sums, h.grad_v + at, h.out_row, [&](int64_t, int64_t, T x) { return x * h.share; });
    if (h.grad_k) write(keys, d, b.sum_grad_k + sums, h.grad_k + at, h.out_row, [](int64_t, int64_t, T x) { return x; });
    if (h.rel_k)
      write(keys, d, b.sum_rel_k + sums, h.rel_k + at, h.out_row, [&](int64_t j, int64_t c, T x) {
        return x * h.k[j * h.k_row + c * h.k_col] * T(0.5);
      });
    if (h.through) std::copy(b.through + t * padded, b.through + t * padded + keys, h.through + t * h.through_target);
  }
}

}  // namespace FASTREL_ISA
}  // namespace fastrel
