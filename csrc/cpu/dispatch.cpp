// Which instruction set to use, decided once.
#include <cstdlib>
#include <cstring>

#include "fastrel/kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTREL_X86 1
#endif

namespace fastrel {

#define FASTREL_DECLARE(isa)          \
  namespace isa {                     \
  template <class T>                  \
  const Kernels<T>& table();          \
  extern template const Kernels<float>& table<float>();   \
  extern template const Kernels<double>& table<double>(); \
  const ReducedKernels& reduced();                        \
  }
FASTREL_DECLARE(generic)
#ifdef FASTREL_X86
FASTREL_DECLARE(avx2)
FASTREL_DECLARE(avx512)
#endif

namespace {

// 0 generic, 1 AVX2, 2 AVX-512; FASTREL_ISA=generic|avx2|avx512 asks for less than there is.
int level() {
  static const int chosen = [] {
    int best = 0;
#ifdef FASTREL_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = 1;
    if (best && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
      best = 2;
#endif
    const char* asked = std::getenv("FASTREL_ISA");
    if (asked && !std::strcmp(asked, "generic")) best = 0;
    if (asked && !std::strcmp(asked, "avx2") && best > 1) best = 1;
    return best;
  }();
  return chosen;
}

template <class T>
const Kernels<T>& choose() {
#ifdef FASTREL_X86
  if (level() == 2) return avx512::table<T>();
  if (level() == 1) return avx2::table<T>();
#endif
  return generic::table<T>();
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return choose<float>();
}

template <>
const Kernels<double>& kernels<double>() {
  return choose<double>();
}

const ReducedKernels& reduced_kernels() {
#ifdef FASTREL_X86
  if (level() == 2) return avx512::reduced();
  if (level() == 1) return avx2::reduced();
#endif
  return generic::reduced();
}

bool multiplies_int8() {
#ifdef FASTREL_X86
  if (level() == 2 && __builtin_cpu_supports("avx512vnni")) return true;
#endif
  return !reduced_kernels().int8_product;
}

const char* instruction_set() {
  const char* names[] = {"generic", "avx2", "avx512"};
  return names[level()];
}

}  // namespace fastrel
