"""Contributions of tokens to what an attention block makes of each token, for methods that ask for them."""

from typing import Any

import torch
from torch import Tensor, fx

from fastrel.errors import InputError
from fastrel.graph.nodes import arguments
from fastrel.graph.sublayers import sublayer
from fastrel.reference import contributions as reference
from fastrel.transform.context import Context
from fastrel.transform.method import NEEDS_SAME_TOKENS


def contributions(
    t: Context, node: fx.Node, of_value: fx.Node, attention: fx.Node, value: fx.Node, mixed: fx.Node
) -> fx.Node:
    """[B, T, T] of the block whose A V is `node`; `of_value`: its V; attention, value, mixed: A, V and A V, each [B, h, T, ·].

    Raises:
        UnsupportedModelError: the block does not add an output layer's result to what it reads.
    """
    found = sublayer(node, of_value, t.facts.active)
    norm = None
    if found.norm is not None:
        _, _, gamma, _, eps = arguments(found.norm, None, None, 1e-5, count=5)
        norm = (None if gamma is None else t.value(gamma), eps)
    scales = [t.value(x) if isinstance(x, fx.Node) else x for x in found.scales]
    ends = [t.value(x) for x in (found.stream, found.total, found.norm or found.total)]
    return t.emit.call(of_block, attention, value, mixed, t.value(found.merged), t.value(found.weight), scales, *ends, norm)


def of_block(
    attention: Tensor,
    value: Tensor,
    mixed: Tensor,
    merged: Tensor,
    weight: Tensor,
    scales: list[Any],
    stream: Tensor,
    total: Tensor,
    output: Tensor,
    norm: tuple[Tensor | None, float] | None,
) -> Tensor:
    """`reference.contributions`; `merged` [B, T, h·d] is what the output layer reads of `mixed` [B, h, T, d].

    Raises:
        InputError: queries and keys are different tokens, or the heads are not put side by side.
    """
    queries, keys = attention.shape[-2:]
    if queries != keys:
        raise InputError(f"a map of {queries} queries over {keys} keys: this method {NEEDS_SAME_TOKENS}")
    beside = mixed.transpose(1, 2).flatten(2)
    if beside.shape != merged.shape or not torch.equal(beside, merged):
        raise InputError("this method needs attention heads side by side in what their output layer reads")
    for scale in scales:
        weight = weight * (scale.reshape(-1, 1) if isinstance(scale, Tensor) else scale)
    return reference.contributions(attention, value, weight, stream, total, output, norm)
