"""Attention flow: attention maps as pipes, the map of a token as the most that can flow from the prediction to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastrel.errors import InputError, needed
from fastrel.methods.all_maps import check_same_tokens

#: One flow is computed per token and sample on a graph of this many edges; more would take minutes.
MAX_EDGES = 400_000
_SCALE = 1 << 20


def attention_flow(row: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """Maximum flow from the tokens that the head reads to each token of the first block (Abnar and Zuidema, ACL 2020).

    Capacities are ½ (mean over heads of A + I). row [K, B, T]: the share of each token in what the head reads; maps: A
    [B, h, T, T] per block, from the input. Returns [K, B, T], exact to 2⁻²⁰ of a row.

    Raises:
        InputError: the maps change the number of tokens, or hold too many edges.
    """
    check_same_tokens("attention_flow", row, maps)
    layers = [m.mean(1) for m in maps]
    tokens = row.shape[-1]
    if len(layers) * tokens**2 > MAX_EDGES:
        raise InputError(
            f"attention_flow over {len(layers)} blocks of {tokens} tokens has {len(layers) * tokens**2} edges, more than "
            f"{MAX_EDGES}; choose a later start_layer or a shorter input, or use rollout"
        )
    result = torch.empty(row.shape, dtype=row.dtype)
    eye = torch.eye(tokens, dtype=torch.float64)
    for sample in range(row.shape[1]):
        steps = [((m[sample].double().cpu() + eye) / 2 * _SCALE).round().numpy().astype(np.int32) for m in layers]
        for k in range(row.shape[0]):
            result[k, sample] = _flows(row[k, sample].double().cpu().numpy(), steps)
    return result.to(row.device)


def _flows(row: np.ndarray, steps: list[np.ndarray]) -> Tensor:
    """Flow from a source, joined to the top tokens by `row`, to each bottom token on its own."""
    with needed("attention_flow", "flow"):
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import maximum_flow

    tokens, top = len(row), len(steps)
    heads, tails, capacities = [], [], []
    for depth, step in enumerate(steps):
        query, key = np.nonzero(step)
        heads.append((depth + 1) * tokens + query)
        tails.append(depth * tokens + key)
        capacities.append(step[query, key])
    source = (top + 1) * tokens
    read = np.flatnonzero(row)
    heads.append(np.full(len(read), source))
    tails.append(top * tokens + read)
    capacities.append((row[read] * _SCALE).round().astype(np.int32))
    edges = (np.concatenate(capacities).astype(np.int32), (np.concatenate(heads), np.concatenate(tails)))
    graph = coo_array(edges, shape=(source + 1, source + 1)).tocsr()
    flows = [maximum_flow(graph, source, token).flow_value / _SCALE for token in range(tokens)]
    return torch.tensor(flows, dtype=torch.float64)
