// safe_divide and clamp of fastrel.reference.rules: NaN stays NaN.
#pragma once

#include "vector.h"

namespace fastrel {
namespace FASTREL_ISA {

// positive: a / b, 0 where b < the smallest normal number. official: a / (b + 1e-9), 0 where b = 0.
template <class T, bool OFFICIAL>
FASTREL_INLINE T safe_divide(T a, T b) {
  if constexpr (OFFICIAL) {
    const T shifted = b + T(1e-9);
    const T safe = shifted == T(0) ? T(1e-9) : shifted;
    return b == T(0) ? T(0) : a / safe;
  }
  const T tiny = std::numeric_limits<T>::min();
  const T safe = b < tiny ? tiny : b;
  return b < tiny ? T(0) : a / safe;
}

// max(x, 0), written so that NaN is not below 0.
template <class T>
FASTREL_INLINE T positive_part(T x) {
  return x < T(0) ? T(0) : x;
}

}  // namespace FASTREL_ISA
}  // namespace fastrel
