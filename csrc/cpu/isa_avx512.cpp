// The kernels compiled for AVX512; the standard headers come first, so that only ours are.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define FASTREL_ISA avx512
#define FASTREL_ISA_LEVEL 2
#include "fastrel/table.h"
#endif
