// fastrel::instruction_set: what `fastrel doctor` tells about the kernels.
#include "../binding.h"

namespace fastrel {
namespace {

std::string report() { return instruction_set(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrel_cpu, CompositeExplicitAutograd, m) { m.impl("instruction_set", TORCH_BOX(&report)); }

}  // namespace fastrel
