// A number that tells whether a row of a weight has changed; see fastrel.ops.row_digest.
#pragma once

#include "kernels.h"

namespace fastrel {
namespace FASTREL_ISA {

inline uint64_t digest(int64_t n, const uint32_t* __restrict bits, const uint32_t* __restrict keys) {
  uint64_t total = 0;
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t x = (bits[j] ^ (bits[j] >> 15)) + keys[j];
    total += static_cast<uint64_t>(x) * x;
  }
  return total;
}

}  // namespace FASTREL_ISA
}  // namespace fastrel
