"""Fused operators: one file each, with schema, implementation in plain PyTorch and fake (shape) implementation.

Lanes (`rel`, `grad`, `row`) carry a leading dimension K, the number of targets explained at once; values do not.
An absent lane goes in as None and comes out as an empty tensor, because operators return a fixed number of tensors.
"""

from fastrel.ops.activation_ratio import activation_ratio
from fastrel.ops.attention import UPDATES, attention_relevance, attention_update, rollout_row
from fastrel.ops.layer_norm import layer_norm_backward
from fastrel.ops.residual_add import residual_add
from fastrel.ops.row_digest import row_digest
from fastrel.ops.zplus_linear import zplus_linear
from fastrel.ops.zplus_linear_reduced import reduced_matmul, reduced_weight, zplus_linear_reduced

__all__ = [
    "UPDATES",
    "activation_ratio",
    "attention_relevance",
    "attention_update",
    "layer_norm_backward",
    "reduced_matmul",
    "reduced_weight",
    "residual_add",
    "rollout_row",
    "row_digest",
    "zplus_linear",
    "zplus_linear_reduced",
]
