// The passes between the products of attention, attention_update and rollout_row.
#include "fastrel/attention.cuh"
#include "launch.h"

namespace fastrel {
namespace {

// Maps [batch, heads, queries, keys], contiguous.
struct Sizes {
  int64_t batch, heads, queries, keys;
  explicit Sizes(const Tensor& maps) : batch(maps.size(0)), heads(maps.size(1)), queries(maps.size(2)), keys(maps.size(3)) {
    STD_TORCH_CHECK(maps.is_contiguous(), "fastrel_cuda: attention maps must be contiguous");
  }
  dim3 rows() const { return grid_of(batch * heads * queries); }
};

// Of a mask [batch, heads, queries, keys] with any strides.
cuda::MaskStrides strides_of(const OptionalTensor& mask) {
  return mask ? cuda::MaskStrides{mask->stride(0), mask->stride(1), mask->stride(2), mask->stride(3)} : cuda::MaskStrides{};
}

Tensor attention_softmax(Tensor products, OptionalTensor mask, double scale, bool causal, int64_t query_start) {
  const bool keeps = mask && mask->scalar_type() == ScalarType::Bool;
  const OptionalTensor bias = keeps ? std::nullopt : mask;
  return by_lanes("attention_softmax", products, {}, {&bias}, [&]<class T>(T) {
    const Sizes s(products);
    const Context context(products);
    FASTREL_LAUNCH(
        context, cuda::softmax_kernel<T>, s.rows(), s.heads, s.queries, s.keys, T(scale), causal, query_start, values<T>(bias),
        keeps ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr, strides_of(mask), out<T>(products));
    return products;
  });
}

Tensor attention_sums(Tensor attn, OptionalTensor grad_product, OptionalTensor rel_product, std::string update) {
  return by_dtype("attention_sums", attn, {&grad_product, &rel_product}, [&]<class T>(T) {
    const Sizes s(attn);
    const Tensor sums = empty_like_shape(attn, {s.batch, s.heads, s.queries});
    const Context context(attn);
    FASTREL_LAUNCH(
        context, cuda::map_sums_kernel<T>, s.rows(), s.heads, s.queries, s.keys, update_from(update), data<T>(attn),
        data<T>(grad_product), data<T>(rel_product), out<T>(sums));
    return sums;
  });
}

Tensor attention_through(
    Tensor through, Tensor attn, OptionalTensor grad_product, OptionalTensor rel_product, Tensor weights_any, std::string update,
    bool add) {
  const OptionalTensor operands[] = {through, weights_any};
  return by_dtype("attention_through", attn, {&operands[0], &operands[1], &grad_product, &rel_product}, [&]<class T>(T) {
    const Sizes s(attn);
    const Tensor weights = dense(weights_any);
    const Context context(attn);
    FASTREL_LAUNCH(
        context, cuda::through_kernel<T>, grid_of(s.batch * s.heads, blocks_for(s.keys)), s.heads, s.queries, s.keys,
        update_from(update), data<T>(attn), data<T>(grad_product), data<T>(rel_product), data<T>(weights), out<T>(through), add);
    return through;
  });
}

void attention_score_lanes(
    Tensor attn, OptionalTensor products, OptionalTensor mask, OptionalTensor grad_product, OptionalTensor rel_product,
    OptionalTensor sums, double scale) {
  STD_TORCH_CHECK(products || !rel_product, "fastrel_cuda::attention_score_lanes needs the products for their relevance");
  const OptionalTensor bias = mask && mask->scalar_type() == ScalarType::Bool ? std::nullopt : mask;
  by_lanes("attention_score_lanes", attn, {&products, &grad_product, &rel_product, &sums}, {&bias}, [&]<class T>(T) {
    const Sizes s(attn);
    const Context context(attn);
    const auto pointer = [](const OptionalTensor& x) { return x ? out<T>(*x) : nullptr; };
    FASTREL_LAUNCH(
        context, cuda::score_lanes_kernel<T>, s.rows(), s.heads, s.queries, s.keys, T(scale), data<T>(attn), data<T>(products),
        values<T>(bias), strides_of(bias), pointer(grad_product), pointer(rel_product), pointer(sums));
    return 0;
  });
}

Tensor attention_update(OptionalTensor attn, OptionalTensor grad, OptionalTensor rel, std::string name) {
  const Update update = update_from(name);
  const OptionalTensor& given = update == Update::kAttention ? attn : update == Update::kRelevance ? rel : grad;
  STD_TORCH_CHECK(given, "fastrel_cuda::attention_update lacks an operand for ", name);
  return by_dtype("attention_update", *given, {&attn, &grad, &rel}, [&]<class T>(T) {
    const OptionalTensor a = dense(attn), g = dense(grad), r = dense(rel);
    std::vector<int64_t> shape = shape_of(*given);
    const int64_t dims = given->dim(), heads = given->size(dims - 3), size = given->size(dims - 2) * given->size(dims - 1);
    shape.erase(shape.end() - 3);
    const Tensor m = empty_like_shape(*given, shape);
    if (m.numel() == 0) return m;
    const int64_t maps = m.numel() / size;
    const Context context(m);
    FASTREL_LAUNCH(
        context, cuda::attention_update_kernel<T>, grid_of(maps, blocks_for(size)), heads, size,
        a ? a->numel() / (heads * size) : maps, update, data<T>(a), data<T>(g), data<T>(r), out<T>(m));
    return m;
  });
}

std::tuple<Tensor, Tensor> rollout_row(Tensor row_any, Tensor m_any, bool normalize) {
  const OptionalTensor operand = m_any;
  return by_dtype("rollout_row", row_any, {&operand}, [&]<class T>(T) {
    const Tensor row = dense(row_any), m = dense(m_any);
    const int64_t queries = m.size(m.dim() - 2), keys = m.size(m.dim() - 1), rows = row.numel() / queries;
    const int64_t maps = m.numel() / (queries * keys);
    const Tensor kept = empty_like_shape(row, normalize ? shape_of(row) : std::vector<int64_t>{0});
    std::vector<int64_t> shape = shape_of(row);
    shape.back() = keys;
    const Tensor through = empty_like_shape(row, shape);
    const Context context(row);
    if (normalize)
      FASTREL_LAUNCH(
          context, cuda::rollout_kept_kernel<T>, grid_of(rows * queries), queries, keys, maps, data<T>(row), data<T>(m), out<T>(kept));
    FASTREL_LAUNCH(
        context, cuda::rollout_through_kernel<T>, grid_of(rows, blocks_for(keys)), queries, keys, maps,
        normalize ? data<T>(kept) : data<T>(row), data<T>(m), out<T>(through));
    return std::tuple<Tensor, Tensor>{kept, through};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrel_cuda, FASTREL_DEVICE, m) {
  m.impl("attention_softmax_", TORCH_BOX(&attention_softmax));
  m.impl("attention_sums", TORCH_BOX(&attention_sums));
  m.impl("attention_through_", TORCH_BOX(&attention_through));
  m.impl("attention_score_lanes_", TORCH_BOX(&attention_score_lanes));
  m.impl("attention_update", TORCH_BOX(&attention_update));
  m.impl("rollout_row", TORCH_BOX(&rollout_row));
}

}  // namespace fastrel
