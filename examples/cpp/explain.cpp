// Runs a compiled artefact (explain.compiled.pt2, of `fastrel export --compile`) with libtorch alone: no Python, no fastrel.
//
//   explain explain.compiled.pt2 INPUT_SIZES… [-- CLASS…]      e.g.  explain explain.compiled.pt2 1 3 224 224 -- 281 207
//
// Reads float32 values of that shape from standard input; writes, per sample and class: class, ok, logit, and the map.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <vector>

int main(int count, char** words) {
  if (count < 3) {
    std::cerr << "usage: explain explain.compiled.pt2 SIZE... [-- CLASS...] < float32 values\n";
    return 2;
  }
  std::vector<int64_t> sizes, classes;
  bool after = false;
  for (int i = 2; i < count; ++i) {
    if (!std::strcmp(words[i], "--")) after = true;
    else (after ? classes : sizes).push_back(std::atoll(words[i]));
  }
  if (classes.empty()) classes.push_back(-(1LL << 32));  // RANK: the predicted class

  c10::InferenceMode inference;
  torch::Tensor input = torch::empty(sizes, torch::kFloat32);
  if (std::fread(input.data_ptr<float>(), sizeof(float), input.numel(), stdin) != static_cast<size_t>(input.numel())) {
    std::cerr << "expected " << input.numel() << " float32 values on standard input\n";
    return 2;
  }
  const int64_t targets = static_cast<int64_t>(classes.size());
  torch::Tensor chosen = torch::tensor(classes, torch::kInt64).expand({input.size(0), targets}).contiguous();

  torch::inductor::AOTIModelPackageLoader loader(words[1]);
  const std::vector<torch::Tensor> results = loader.run({chosen, input});
  const torch::Tensor &logits = results[0], &explained = results[1], &ok = results[2], relevance = results[3].contiguous();

  for (int64_t b = 0; b < input.size(0); ++b) {
    for (int64_t k = 0; k < targets; ++k) {
      const int64_t c = explained[b][k].item<int64_t>();
      const bool fine = ok[b][k].item<bool>();
      std::printf("%lld %d %.9g", static_cast<long long>(c), fine, fine ? logits[b][c].item<float>() : 0.0f);
      const torch::Tensor map = relevance[b][k];
      for (int64_t t = 0; t < map.numel(); ++t) std::printf(" %.9g", map.data_ptr<float>()[t]);
      std::printf("\n");
    }
  }
}
