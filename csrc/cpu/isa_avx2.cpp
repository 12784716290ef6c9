// The kernels compiled for AVX2; the standard headers come first, so that only ours are.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#pragma GCC target("arch=x86-64-v3")
#define FASTREL_ISA avx2
#define FASTREL_ISA_LEVEL 1
#include "fastrel/table.h"
#endif
