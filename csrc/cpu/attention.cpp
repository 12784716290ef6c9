// fastrel::attention_relevance (a head at a time), attention_update and rollout_row.
#include <cmath>
#include <cstring>

#include "../binding.h"

namespace fastrel {
namespace {

constexpr int64_t kMapGrain = 4096;

// A mask that broadcasts to [batch, heads, queries, keys]: its stride in each of them.
struct Mask {
  int64_t strides[4] = {0, 0, 0, 0};
  explicit Mask(const OptionalTensor& mask) {
    if (!mask) return;
    const int64_t missing = 4 - mask->dim();
    for (int64_t i = 0; i < mask->dim(); ++i) strides[missing + i] = mask->size(i) == 1 ? 0 : mask->stride(i);
  }
};

// Lanes of q, k or v: [targets, batch, heads, tokens, d], laid out so that heads and d of one token are adjacent.
Tensor lane_like(const Tensor& value, int64_t targets) {
  const Tensor memory = empty_like_shape(value, {targets, value.size(0), value.size(2), value.size(1), value.size(3)});
  return torch::stable::transpose(memory, 2, 3);
}

// The relevance of Q and K, linear in that of the scores, scaled as `mask_factor` of fastrel.ops.attention says.
template <class T>
void scale_scores_lanes(const Tensor& mask_sums, const Tensor& rel_q, const Tensor& rel_k) {
  const int64_t samples = mask_sums.size(0) * mask_sums.size(1), heads = mask_sums.size(2);
  for (int64_t i = 0; i < samples; ++i) {
    double sums[3] = {0, 0, 0};
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t k = 0; k < 3; ++k) sums[k] += data<T>(mask_sums)[(i * heads + h) * 3 + k];
    const double share = official_divide(std::abs(sums[0]), std::abs(sums[0]) + std::abs(sums[1]));
    const double factor = official_divide(share * sums[2], sums[0]);
    for (const Tensor* lane : {&rel_q, &rel_k}) {
      const int64_t size = lane->numel() / samples;
      kernels<T>().scale(size, T(factor), out<T>(*lane) + i * size);
    }
  }
}

template <class T>
std::vector<Tensor> run(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, const OptionalTensor& rel,
    const OptionalTensor& grad, const OptionalTensor& row_any, double scale, bool is_causal, int64_t query_start, bool official,
    Update update, bool normalize, bool inputs, bool halves) {
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2), d = q.size(3);
  const int64_t targets = rel ? rel->size(0) : grad ? grad->size(0) : row_any ? row_any->size(0) : 1;
  const Tensor none = empty_like_shape(q, {0});
  std::vector<Tensor> lanes(6, none);  // rel q, k, v, grad q, k, v
  if (inputs && rel) {
    if (official) lanes[0] = lane_like(q, targets), lanes[1] = lane_like(k, targets);
    lanes[2] = lane_like(v, targets);
  }
  if (inputs && grad) lanes[3] = lane_like(q, targets), lanes[4] = lane_like(k, targets), lanes[5] = lane_like(v, targets);

  const Mask mask_strides(mask);
  const bool keeps = mask && mask->scalar_type() == ScalarType::Bool;
  const OptionalTensor row = row_any ? OptionalTensor(dense(*row_any)) : std::nullopt;
  // Every head's own part, summed afterwards in order: the result does not depend on the number of threads.
  const int64_t parts = batch * heads;
  Tensor through_parts = row ? empty_like_shape(q, {targets, parts, keys}) : none;

  // A mask under the official rules takes a share of relevance by sums over the sample: every head leaves its part of them.
  const bool shares_with_mask = mask && official && inputs && rel;
  const Tensor mask_sums = shares_with_mask ? empty_like_shape(q, {targets, batch, heads, 3}) : none;

  const auto head_of = [&](int64_t part) {
    const int64_t b = part / heads, h = part % heads;
    const auto at = [&](const Tensor& x) { return data<T>(x) + b * x.stride(0) + h * x.stride(1); };
    const auto lane_at = [&](const OptionalTensor& x) {
      return x ? data<T>(x) + b * x->stride(1) + h * x->stride(2) : nullptr;
    };
    const auto out_at = [&](const Tensor& x) {
      return x.numel() ? out<T>(x) + b * x.stride(1) + h * x.stride(2) : nullptr;
    };
    AttentionHead<T> head{};
    head.queries = queries, head.keys = keys, head.d = d, head.targets = targets;
    head.q = at(q), head.k = at(k), head.v = at(v);
    head.q_row = q.stride(2), head.q_col = q.stride(3);
    head.k_row = k.stride(2), head.k_col = k.stride(3);
    head.v_row = v.stride(2), head.v_col = v.stride(3);
    if (mask) {
      const int64_t offset = b * mask_strides.strides[0] + h * mask_strides.strides[1];
      if (keeps)
        head.mask_keep = static_cast<const bool*>(mask->const_data_ptr()) + offset;
      else
        head.mask_bias = data<T>(mask) + offset;
      head.mask_row = mask_strides.strides[2], head.mask_col = mask_strides.strides[3];
    }
    head.scale = T(scale), head.share = halves ? T(0.5) : T(1), head.causal = is_causal, head.official = official, head.query_start = query_start;
    head.update = update, head.head_share = T(1) / T(heads);
    head.rel = lane_at(rel), head.grad = lane_at(grad);
    if (rel) head.rel_target = rel->stride(0), head.rel_row = rel->stride(3), head.rel_col = rel->stride(4);
    if (grad) head.grad_target = grad->stride(0), head.grad_row = grad->stride(3), head.grad_col = grad->stride(4);
    head.rel_q = out_at(lanes[0]), head.rel_k = out_at(lanes[1]), head.rel_v = out_at(lanes[2]);
    head.grad_q = out_at(lanes[3]), head.grad_k = out_at(lanes[4]), head.grad_v = out_at(lanes[5]);
    head.q_target = batch * heads * queries * d, head.k_target = batch * heads * keys * d, head.out_row = heads * d;
    return head;
  };

  Tensor kept = none;
  const Tensor* weights = row ? &*row : nullptr;
  if (row && normalize) {
    // r / (1 + Σ_k M): the sums first.
    const Tensor sums = empty_like_shape(q, {targets, parts, queries});
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch;
      for (int64_t part = begin; part < end; ++part) {
        AttentionHead<T> head = head_of(part);
        head.rel_q = head.rel_k = head.rel_v = head.grad_q = head.grad_k = head.grad_v = nullptr;
        head.row = data<T>(row) + (part / heads) * queries, head.row_target = batch * queries;
        head.row_sum = out<T>(sums) + part * queries, head.row_sum_target = parts * queries;
        kernels<T>().attention_head(head, scratch);
      }
    });
    kept = empty_like_shape(*row, shape_of(*row));
    const T *p_row = data<T>(row), *p_sums = data<T>(sums);
    T* p_kept = out<T>(kept);
    for (int64_t i = 0; i < targets * batch; ++i)
      for (int64_t j = 0; j < queries; ++j) {
        T total = 1;
        for (int64_t h = 0; h < heads; ++h) total += p_sums[(i * heads + h) * queries + j];
        p_kept[i * queries + j] = p_row[i * queries + j] / total;
      }
    weights = &kept;
  }
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch;
    for (int64_t part = begin; part < end; ++part) {
      AttentionHead<T> head = head_of(part);
      if (weights) {
        head.row = data<T>(*weights) + (part / heads) * queries, head.row_target = batch * queries;
        head.through = out<T>(through_parts) + part * keys, head.through_target = parts * keys;
      }
      if (shares_with_mask) head.mask_sums = out<T>(mask_sums) + part * 3, head.mask_sums_target = parts * 3;
      kernels<T>().attention_head(head, scratch);
    }
  });

  if (shares_with_mask) scale_scores_lanes<T>(mask_sums, lanes[0], lanes[1]);

  Tensor through = none;
  if (row) {
    through = empty_like_shape(*row, {targets, batch, keys});
    const T* p_parts = data<T>(through_parts);
    T* p_through = out<T>(through);
    for (int64_t i = 0; i < targets * batch; ++i)
      for (int64_t j = 0; j < keys; ++j) {
        T total = 0;
        for (int64_t h = 0; h < heads; ++h) total += p_parts[(i * heads + h) * keys + j];
        p_through[i * keys + j] = total;
      }
  }
  lanes.push_back(kept);
  lanes.push_back(through);
  return lanes;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_relevance(
    Tensor q, Tensor k, Tensor v, OptionalTensor mask, OptionalTensor rel, OptionalTensor grad, OptionalTensor row, double scale,
    bool is_causal, int64_t query_start, std::string rules, std::string update, bool normalize, bool inputs, bool halves) {
  const char* op = "attention_relevance";
  const bool official = is_official(rules, op);
  const Update chosen = update_from(update);
  check_rank(op, "q", q, 4);
  check_rank(op, "k", k, 4);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2), d = q.size(3);
  const OptionalTensor& lane = rel ? rel : grad ? grad : row;
  STD_TORCH_CHECK(!lane || lane->dim() > 0, "fastrel::attention_relevance: a lane has no dimension of targets");
  const int64_t targets = lane ? lane->size(0) : 1;
  check_shape(op, "k", k, {batch, heads, keys, d});
  check_shape(op, "v", v, {batch, heads, keys, d});
  check_shape(op, "rel", rel, lane_of(targets, shape_of(q)));
  check_shape(op, "grad", grad, lane_of(targets, shape_of(q)));
  check_shape(op, "row", row, {targets, batch, queries});
  if (mask) {
    const Shape maps = {batch, heads, queries, keys};
    bool fits = mask->dim() <= 4;
    for (int64_t i = 0; fits && i < mask->dim(); ++i) fits = mask->size(i) == 1 || mask->size(i) == maps[4 - mask->dim() + i];
    STD_TORCH_CHECK(fits, "fastrel::attention_relevance: a mask of shape ", text(shape_of(*mask)), " does not fit maps of ", text(maps));
  }
  const bool needs_grad = chosen == Update::kGradientRelevance || chosen == Update::kGradientAttention;
  const bool needs_rel = chosen == Update::kGradientRelevance || chosen == Update::kRelevance;
  STD_TORCH_CHECK(!row || ((grad || !needs_grad) && (rel || !needs_rel)), "fastrel::attention_relevance lacks a lane for ", update);
  const OptionalTensor operands[] = {k, v, mask && mask->scalar_type() != ScalarType::Bool ? mask : std::nullopt};
  auto t = by_dtype(op, q, {&operands[0], &operands[1], &operands[2], &rel, &grad, &row}, [&]<class T>(T) {
    return run<T>(q, k, v, mask, rel, grad, row, scale, is_causal, query_start, official, chosen, normalize, inputs, halves);
  });
  return {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]};
}

Tensor attention_update(OptionalTensor attn, OptionalTensor grad, OptionalTensor rel, std::string update_name) {
  const Update update = update_from(update_name);
  const OptionalTensor& given = update == Update::kAttention ? attn : update == Update::kRelevance ? rel : grad;
  const OptionalTensor& other = update == Update::kGradientAttention ? attn : update == Update::kGradientRelevance ? rel : given;
  STD_TORCH_CHECK(given && other, "fastrel::attention_update lacks an operand for ", update_name);
  STD_TORCH_CHECK(
      given->dim() >= 3 && given->size(given->dim() - 3) > 0, "fastrel::attention_update takes maps [*, h, Tq, Tk], not ",
      text(shape_of(*given)));
  if (update == Update::kGradientRelevance) check_shape("attention_update", "rel", rel, shape_of(*given));
  if (update == Update::kGradientAttention) {  // which may have no targets
    Shape maps = shape_of(*given);
    if (attn->dim() < given->dim()) maps.erase(maps.begin());
    check_shape("attention_update", "attn", attn, maps);
  }
  return by_dtype("attention_update", *given, {&attn, &grad, &rel}, [&]<class T>(T) {
    const auto prepared = [](const OptionalTensor& x) { return x ? OptionalTensor(dense(*x)) : std::nullopt; };
    const bool reads_attn = update == Update::kGradientAttention || update == Update::kAttention;
    const OptionalTensor a = reads_attn ? prepared(attn) : std::nullopt, g = prepared(grad), r = prepared(rel);
    std::vector<int64_t> shape = shape_of(*given);
    const int64_t dims = given->dim(), heads = given->size(dims - 3), size = given->size(dims - 2) * given->size(dims - 1);
    shape.erase(shape.end() - 3);
    const Tensor m = empty_like_shape(*given, shape);
    if (m.numel() == 0) return m;
    const int64_t maps = m.numel() / size, attn_maps = a ? a->numel() / (heads * size) : maps;
    torch::stable::parallel_for(0, m.numel(), kMapGrain, [&](int64_t begin, int64_t end) {
      for (int64_t map = begin / size; map < maps && map * size < end; ++map) {
        const int64_t first = std::max<int64_t>(begin - map * size, 0), last = std::min(end - map * size, size);
        const auto at = [&](const OptionalTensor& x, int64_t i) { return x ? data<T>(x) + i * heads * size : nullptr; };
        kernels<T>().attention_update(
            first, last, heads, size, update, at(a, map % attn_maps), at(g, map), at(r, map), out<T>(m) + map * size);
      }
    });
    return m;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrel_cpu, CPU, m) {
  m.impl("attention_relevance", TORCH_BOX(&attention_relevance));
  m.impl("attention_update", TORCH_BOX(&attention_update));
}

}  // namespace fastrel
