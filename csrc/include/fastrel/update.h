// What an attention block adds to the rollout.
#pragma once

namespace fastrel {

enum class Update { kGradientRelevance, kGradientAttention, kRelevance, kAttention };

}  // namespace fastrel
