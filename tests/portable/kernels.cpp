// Every kernel of one table, on numbers that are the same everywhere; a line of results each. Needs no torch.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "fastrel/kernels.h"

using namespace fastrel;

namespace {

uint32_t state = 1;

// Of [-1, 1), exact in every type; one in eight is 0.
template <class T>
std::vector<T> numbers(int64_t n) {
  std::vector<T> values(n);
  for (T& x : values) {
    state = state * 1664525u + 1013904223u;
    x = state >> 29 ? T(int32_t(state >> 12 & 0xffff) - 0x8000) / T(0x8000) : T(0);
  }
  return values;
}

template <class X>
void show(const std::string& name, const std::vector<X>& values) {
  std::printf("%s", name.c_str());
  for (X x : values) std::printf(" %.17g", double(x));
  std::printf("\n");
}

template <class T>
void attention(const std::string& type, bool causal, bool official, int masked, Update update) {
  const int64_t queries = 7, keys = causal ? 7 : 11, d = 13, targets = 2;
  const auto q = numbers<T>(queries * d), k = numbers<T>(keys * d), v = numbers<T>(keys * d), bias = numbers<T>(queries * keys);
  const auto rel = numbers<T>(targets * queries * d), grad = numbers<T>(targets * queries * d), row = numbers<T>(targets * queries);
  bool keep[7 * 11];
  for (int64_t i = 0; i < queries * keys; ++i) keep[i] = i % 5 != 3;
  std::vector<T> out[6], through(targets * keys), sums(targets * queries), mask_sums(targets * 3), scratch;
  for (int i = 0; i < 6; ++i) out[i].resize(targets * (i % 3 ? keys : queries) * d);
  AttentionHead<T> head{};
  head.queries = queries, head.keys = keys, head.d = d, head.targets = targets;
  head.q = q.data(), head.k = k.data(), head.v = v.data();
  head.q_row = head.k_row = head.v_row = d, head.q_col = head.k_col = head.v_col = 1;
  if (masked == 1) head.mask_bias = bias.data();
  if (masked == 2) head.mask_keep = keep;
  head.mask_row = keys, head.mask_col = 1;
  head.scale = T(0.25), head.share = T(0.5), head.causal = causal, head.official = official;
  head.update = update, head.head_share = T(0.5);
  head.rel = rel.data(), head.grad = grad.data();
  head.rel_target = head.grad_target = queries * d, head.rel_row = head.grad_row = d, head.rel_col = head.grad_col = 1;
  head.row = row.data(), head.row_target = queries;
  if (official) head.rel_q = out[0].data(), head.rel_k = out[1].data();
  head.rel_v = out[2].data(), head.grad_q = out[3].data(), head.grad_k = out[4].data(), head.grad_v = out[5].data();
  head.q_target = queries * d, head.k_target = keys * d, head.out_row = d;
  head.through = through.data(), head.through_target = keys, head.row_sum = sums.data(), head.row_sum_target = queries;
  if (official && masked == 1) head.mask_sums = mask_sums.data(), head.mask_sums_target = 3;
  kernels<T>().attention_head(head, scratch);
  std::string name = type + " attention";
  for (int option : {int(causal), int(official), masked, int(update)}) name += "," + std::to_string(option);
  const char* lanes[] = {"rel_q", "rel_k", "rel_v", "grad_q", "grad_k", "grad_v"};
  for (int i = 0; i < 6; ++i) show(name + "," + lanes[i] + ":", out[i]);
  show(name + ",through:", through), show(name + ",row_sum:", sums), show(name + ",mask_sums:", mask_sums);
}

template <class T>
void pointwise(const std::string& type) {
  const int64_t n = 101, width = 25, rows = 4;
  const Kernels<T>& k = kernels<T>();
  const auto x = numbers<T>(n), y = numbers<T>(n), z = numbers<T>(n), rel = numbers<T>(2 * n), bias = numbers<T>(n);
  std::vector<T> a(n), b(2 * n), c(2 * n);
  std::vector<double> sums(3);
  k.absolute(n, x.data(), a.data()), show(type + " absolute:", a);
  for (bool official : {false, true}) {
    k.ratio(n, x.data(), bias.data(), y.data(), rel.data(), a.data(), official), show(type + " ratio:", a);
  }
  k.combine(n, x.data(), y.data(), z.data(), a.data()), show(type + " combine:", a);
  k.share(0, 2 * n, n, x.data(), y.data(), rel.data(), b.data(), c.data()), show(type + " share:", b), show(type + " share:", c);
  k.activation_ratio(0, 2 * n, n, rel.data(), x.data(), y.data(), b.data()), show(type + " activation_ratio:", b);
  k.signed_share(n, x.data(), y.data(), rel.data(), b.data(), c.data(), sums.data());
  b.resize(n), c.resize(n);
  show(type + " signed_share:", b), show(type + " signed_share:", c), show(type + " signed_share:", sums);
  k.scale(n, T(0.375), b.data()), show(type + " scale:", b);
  for (bool frozen : {false, true}) {
    std::vector<T> through(2 * rows * width);
    k.layer_norm_backward(0, 2 * rows, width, rows, rel.data(), x.data(), y.data(), T(1e-5), frozen, through.data());
    show(type + " layer_norm_backward:", through);
  }
  for (int update = 0; update < 4; ++update) {
    std::vector<T> map(33);
    k.attention_update(0, 33, 3, 33, Update(update), x.data(), y.data(), z.data(), map.data());
    show(type + " attention_update:", map);
  }
  for (bool causal : {false, true})
    for (bool official : {false, true})
      for (int masked = 0; masked < 3; ++masked)
        for (int update = 0; update < 4; ++update) attention<T>(type, causal, official, masked, Update(update));
}

void reduced() {
  const int64_t n = 77;
  const ReducedKernels& k = reduced_kernels();
  const auto x = numbers<float>(n), y = numbers<float>(n), bias = numbers<float>(n), rel = numbers<float>(n), scales = numbers<float>(n);
  std::vector<uint16_t> narrow(n), magnitude(n), s(n);
  std::vector<float> out(n), scratch(n);
  std::vector<int8_t> whole(n), size(n), ratio(n);
  std::vector<int32_t> c(n), c_abs(n);
  for (int64_t i = 0; i < n; ++i) c[i] = int32_t(i * 37 % 50) - 25, c_abs[i] = int32_t(i * 53 % 60) + 25;
  k.bf16_of(n, x.data(), narrow.data(), magnitude.data()), show("float bf16_of:", narrow), show("float bf16_of:", magnitude);
  k.bf16_widen(n, narrow.data(), out.data()), show("float bf16_widen:", out);
  k.bf16_ratio(n, y.data(), bias.data(), magnitude.data(), rel.data(), s.data());
  k.bf16_widen(n, s.data(), out.data()), show("narrow bf16_ratio:", out);
  k.bf16_combine(n, x.data(), narrow.data(), magnitude.data(), out.data()), show("float bf16_combine:", out);
  show("float int8_of:", std::vector<float>{k.int8_of(n, x.data(), whole.data(), size.data())});
  show("float int8_of:", whole), show("float int8_of:", size);
  const float scale = k.int8_ratio(n, y.data(), bias.data(), c_abs.data(), 0.01f, scales.data(), rel.data(), scratch.data(), ratio.data());
  show("narrow int8_ratio:", std::vector<float>{scale}), show("int8 int8_ratio:", ratio);
  k.int8_combine(n, x.data(), c.data(), c_abs.data(), 0.5f, out.data()), show("float int8_combine:", out);
  std::vector<uint32_t> bits(n), keys(n);
  for (int64_t i = 0; i < n; ++i) bits[i] = uint32_t(i * 2654435761u), keys[i] = uint32_t(i * 40503u + 1);
  const uint64_t digest = k.digest(n, bits.data(), keys.data());
  show("float digest:", std::vector<uint32_t>{uint32_t(digest), uint32_t(digest >> 32)});
}

}  // namespace

int main() {
  std::printf("%s\n", instruction_set());
  pointwise<float>("float");
  pointwise<double>("double");
  reduced();
}
