// The kernels compiled for whatever the compiler's own target is (SSE2, NEON, …).
#define FASTREL_ISA generic
#define FASTREL_ISA_LEVEL 0
#include "fastrel/table.h"
