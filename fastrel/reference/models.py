"""A plain ViT (timm's parameter names) and a BERT classifier (Hugging Face's) on the tape."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrel.reference.rules import Rules
from fastrel.reference.tape import Tape

Params = Mapping[str, Tensor]
Activation = Callable[[Tensor], Tensor]


@dataclass
class Forward:
    """What a forward pass leaves for the explanation."""

    logits: Tensor
    embedding: Tensor  # [B, T, D], what the first block reads
    inputs: Tensor  # pixels [B, 3, H, W], or the embedding again
    blocks: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # (block input, A, V)


@dataclass(frozen=True)
class Block:
    """One attention block. All float, batch first."""

    attention: Tensor  # A [B, h, T, T]
    gradient: Tensor  # ∂y_c/∂A [B, h, T, T]
    relevance: Tensor  # relevance of A [B, h, T, T]
    value_relevance: Tensor  # [B, h, T, d]
    input_relevance: Tensor  # relevance of what the block reads [B, T, D]


@dataclass(frozen=True)
class Trace:
    """Everything the method computes for one target per sample."""

    logits: Tensor  # [B, C]
    blocks: list[Block]
    embedding_relevance: Tensor  # [B, T, D]
    input_relevance: Tensor  # pixels [B, 3, H, W] (ViT) or [B, T, D] (BERT)


def _norm(tape: Tape, params: Params, name: str, eps: float, x: Tensor) -> Tensor:
    return tape.norm(x, params[f"{name}.weight"], params[f"{name}.bias"], eps)


def _linear(tape: Tape, params: Params, name: str, x: Tensor) -> Tensor:
    return tape.linear(x, params[f"{name}.weight"], params.get(f"{name}.bias"))


def _split_heads(tape: Tape, x: Tensor, heads: int) -> Tensor:
    return tape.rearrange(lambda t: t.unflatten(-1, (heads, -1)).transpose(1, 2), x)


def _merge_heads(tape: Tape, x: Tensor) -> Tensor:
    return tape.rearrange(lambda t: t.transpose(1, 2).flatten(2), x)


def _attend(tape: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention of q, k, v [B, h, T, d]; returns its output and A."""
    scores = tape.identity(lambda t: t / math.sqrt(q.shape[-1]), tape.query_key(q, k))
    if mask is not None:
        # The published BERT code treats the mask as the other operand of a residual add.
        scores = tape.add(scores, mask) if tape.rules == "official" else tape.identity(lambda t: t + mask, scores)
    attn = tape.softmax(scores)
    return tape.attention_value(attn, v), attn


def vit(
    tape: Tape, params: Params, image: Tensor, *, heads: int, eps: float = 1e-6, activation: Activation = F.gelu
) -> Forward:
    """Pre-norm ViT with a CLS token. image [B, 3, H, W]; `norm_pre.*` is used where `params` has it (CLIP)."""
    weight = params["patch_embed.proj.weight"]
    stride = (weight.shape[2], weight.shape[3])
    patches = tape.pixel_conv(image, weight, params.get("patch_embed.proj.bias", weight.new_zeros(len(weight))), stride)
    cls = params["cls_token"].expand(len(image), -1, -1)
    x = tape.rearrange(lambda t: torch.cat((cls, t.flatten(2).mT), 1), patches)
    x = tape.add(x, params["pos_embed"].expand_as(x))
    if "norm_pre.weight" in params:
        x = _norm(tape, params, "norm_pre", eps, x)
    run = Forward(logits=x, embedding=x, inputs=image)
    for i in range(sum(name.endswith("attn.qkv.weight") for name in params)):
        name, entry = f"blocks.{i}", x
        x, branch = tape.clone(x, 2)
        qkv = _linear(tape, params, f"{name}.attn.qkv", _norm(tape, params, f"{name}.norm1", eps, branch))
        parts = tape.rearrange(lambda t: t.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4), qkv)
        q, k, v = _unbind(tape, parts)
        out, attn = _attend(tape, q, k, v)
        run.blocks.append((entry, attn, v))
        x = tape.add(x, _linear(tape, params, f"{name}.attn.proj", _merge_heads(tape, out)))
        x, branch = tape.clone(x, 2)
        hidden = _linear(tape, params, f"{name}.mlp.fc1", _norm(tape, params, f"{name}.norm2", eps, branch))
        x = tape.add(x, _linear(tape, params, f"{name}.mlp.fc2", tape.activation(activation, hidden)))
    x = tape.select_token(_norm(tape, params, "norm", eps, x), 0)
    run.logits = _linear(tape, params, "head", x)
    return run


def _unbind(tape: Tape, parts: Tensor) -> list[Tensor]:
    outputs = list(parts.unbind(0))
    tape.record(outputs, [parts], lambda *rels: [torch.stack(rels)])
    return outputs


def bert(tape: Tape, params: Params, embedding: Tensor, attention_mask: Tensor, *, heads: int, eps: float) -> Forward:
    """Post-norm BERT with pooler. embedding [B, T, D] (after its LayerNorm), attention_mask [B, T] of 0 and 1."""
    mask = (1 - attention_mask[:, None, None].to(embedding.dtype)) * -10000.0
    x = embedding
    run = Forward(logits=x, embedding=x, inputs=x)
    layers = sum(name.endswith("attention.self.query.weight") for name in params)
    for i in range(layers):
        name, entry = f"bert.encoder.layer.{i}", x
        branch, x = tape.clone(x, 2)
        copies = tape.clone(branch, 3)
        projected = [
            _linear(tape, params, f"{name}.attention.self.{kind}", copy)
            for kind, copy in zip(("query", "key", "value"), copies, strict=True)
        ]
        q, k, v = (_split_heads(tape, p, heads) for p in projected)
        out, attn = _attend(tape, q, k, v, mask)
        run.blocks.append((entry, attn, v))
        x = tape.add(_linear(tape, params, f"{name}.attention.output.dense", _merge_heads(tape, out)), x)
        x = _norm(tape, params, f"{name}.attention.output.LayerNorm", eps, x)
        branch, x = tape.clone(x, 2)
        hidden = tape.activation(F.gelu, _linear(tape, params, f"{name}.intermediate.dense", branch))
        x = tape.add(_linear(tape, params, f"{name}.output.dense", hidden), x)
        x = _norm(tape, params, f"{name}.output.LayerNorm", eps, x)
    pooled = tape.activation(torch.tanh, _linear(tape, params, "bert.pooler.dense", tape.select_token(x, 0)))
    run.logits = _linear(tape, params, "classifier", pooled)
    return run


def trace(forward: Callable[[Tape], Forward], target: Tensor, rules: Rules = "positive", frozen: bool = False) -> Trace:
    """Run `forward` on a fresh tape and explain `target` [B] (class per sample): every block's A, gradient, relevance; the gradient
    by AttnLRP's rules if `frozen`.

    At least one input or parameter of `forward` must require grad, so that autograd reaches the attention maps.
    """
    tape = Tape(rules, frozen)
    with torch.enable_grad():
        run = forward(tape)
        one_hot = F.one_hot(target, run.logits.shape[-1]).to(run.logits.dtype)
        gradients = torch.autograd.grad((run.logits * one_hot).sum(), [attn for _, attn, _ in run.blocks])
    rel = tape.relprop(run.logits, one_hot)
    blocks = [
        Block(attn.detach(), gradient, rel[id(attn)], rel[id(v)], rel[id(entry)])
        for (entry, attn, v), gradient in zip(run.blocks, gradients, strict=True)
    ]
    return Trace(run.logits.detach(), blocks, rel[id(run.embedding)], rel[id(run.inputs)])
