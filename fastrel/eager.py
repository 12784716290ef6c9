"""Relevance through an eager model, without export and without touching it: the second path, independent of the first.

    with fastrel.propagation() as tape:
        logits = model(images.requires_grad_())
    relevance = torch.autograd.grad(logits, tape.attention, one_hot)   # of every attention map, from the input to the output

Inside, torch's functions are replaced by those of `fastrel.functional`, and whatever only moves numbers is left to autograd. An
activation is a tensor that requires grad and is no parameter: images must require it, embeddings of token ids do of themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastrel import functional
from fastrel.errors import UnsupportedModelError
from fastrel.reference import rules as R
from fastrel.rules.convolution import conv_relevance, pool_relevance

#: Functions of one activation that pass relevance unchanged, by name.
_UNCHANGED = {
    "gelu", "relu", "relu_", "relu6", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu",
    "elu", "mish", "softplus", "softmax", "log_softmax", "layer_norm", "group_norm", "rms_norm", "batch_norm", "exp",
    "sqrt", "rsqrt", "square", "pow", "neg", "__neg__", "abs", "log", "erf", "clamp", "normalize", "dropout", "to",
    "float", "double", "type_as", "__pow__", "reciprocal",
}  # fmt: skip
#: Functions that only move numbers: autograd's own backward sends relevance back to where they came from.
_MOVES = {
    "view", "reshape", "permute", "transpose", "transpose_", "flatten", "unflatten", "squeeze", "unsqueeze",
    "__getitem__", "select", "narrow", "chunk", "split", "tensor_split", "unbind", "cat", "concat", "stack", "expand",
    "expand_as", "contiguous", "clone", "roll", "pad", "movedim", "t", "view_as", "swapaxes", "swapdims", "repeat",
    "repeat_interleave", "flip", "gather", "index_select", "_pad", "__get__", "masked_fill", "where", "pixel_shuffle",
    "unfold", "tile", "broadcast_to",
}  # fmt: skip
#: What Tensor.__get__ may be asked for of an activation's entries; other attributes describe it.
_VIEWS = {"mT", "T", "mH", "H"}


class propagation(TorchFunctionMode):
    """The context in which an eager model propagates relevance backwards.

    Attributes:
        attention: the attention maps [B, h, Tq, Tk] that the forward pass made, as tensors of its graph; maps over channels too.
        generic: functions without a rule of their own, which took the generic one, x ⊙ vjp(R ⊘ f(x)).

    Raises:
        UnsupportedModelError: inside, at a function of activations that has no rule here.
    """

    def __init__(self, rules: R.Rules = "positive") -> None:
        super().__init__()
        self.rules: R.Rules = rules
        self.attention: list[Tensor] = []
        self.generic: list[str] = []
        self._maps: dict[int, Tensor] = {}  # softmax outputs, which a product with values may follow
        self._roots: dict[int, tuple[Tensor, Tensor]] = {}  # pointwise functions of one activation, and it
        self._scales: dict[int, Tensor] = {}  # statistics of an activation, as norms spelled out divide by

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call of torch's."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        found = [x for x in pytree.tree_leaves((args, kwargs)) if self._is_activation(x)]
        if name == "embedding":
            return self._embedding(func, args, kwargs)
        if not found:
            # What depends on parameters alone is a constant.
            with torch.no_grad() if not _inplace_flag(name) else torch.enable_grad():
                return func(*args, **kwargs)
        handler = getattr(self, f"_on_{name.strip('_')}", None)
        if handler is not None:
            return handler(func, *args, **kwargs)
        if name == "__get__" and getattr(func.__self__, "__name__", "") not in _VIEWS:
            return func(*args, **kwargs)
        if name in _UNCHANGED:
            return self._unchanged(func, found[0], args, kwargs)
        result = func(*args, **kwargs) if name in _MOVES else None
        if result is not None:
            if isinstance(result, Tensor) and result.dim() and args and isinstance(args[0], Tensor):
                self._follow(result, args[0], self._maps, self._scales)
            return result
        with torch.no_grad():
            plain = func(*args, **kwargs)
        if isinstance(plain, Tensor) and plain.is_floating_point():
            self.generic.append(name)
            return _Generic.apply(plain, func, args, kwargs, *found)
        if any(isinstance(x, Tensor) and x.is_floating_point() for x in pytree.tree_leaves(plain)):
            raise UnsupportedModelError(f"no relevance function for {name}; fastrel.Explainer knows more operators")
        return plain

    @staticmethod
    def _is_activation(x: Any) -> bool:
        return isinstance(x, Tensor) and x.requires_grad and not isinstance(x, nn.Parameter)

    def _embedding(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        with torch.no_grad():
            out = func(*args, **kwargs)
        return out.requires_grad_()

    def _unchanged(self, func: Callable[..., Tensor], x: Tensor, args: Any, kwargs: Any) -> Tensor:
        with torch.no_grad():
            value = func(*args, **kwargs)
        if value is x:
            return x
        out = functional.identity(value, x)
        if value.shape == x.shape:
            self._roots[id(out)] = (self._root(x), out)
        if getattr(func, "__name__", "") == "softmax":
            self._maps[id(out)] = out
        return self._follow(out, x, self._maps, self._scales)

    def _root(self, x: Tensor) -> Tensor:
        return self._roots.get(id(x), (x, x))[0]

    def _follow(self, out: Tensor, x: Tensor, *kept: dict[int, Tensor]) -> Tensor:
        """`out`, which is still an attention map or a statistic where x is one."""
        for known in kept:
            if id(x) in known:
                known[id(out)] = out
        return out

    # One method per function, by its name without underscores.

    def _on_linear(self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(x) in self._maps:
            raise UnsupportedModelError(
                "no relevance function for attention maps mixed over heads; fastrel.Explainer has a rule"
            )
        return functional.linear(x, weight, bias, self.rules)

    def _on_addmm(self, func: Any, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(x, weight.t(), bias, self.rules)

    def _on_add(self, func: Any, u: Any, v: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("alpha", 1) != 1:
            raise UnsupportedModelError(f"no relevance function for add with alpha={kwargs['alpha']}")
        if self._is_activation(u) and self._is_activation(v):
            if self._root(u) is self._root(v):
                return self._of_root(u.detach() + v.detach(), u)
            return functional.add(u, v, self.rules)
        x, other = (u, v) if self._is_activation(u) else (v, u)
        if isinstance(other, Tensor) and self.rules != "positive":
            # The published code's constants take their share, which is dropped.
            return functional.add(x, other.detach().expand(torch.broadcast_shapes(x.shape, other.shape)), self.rules)
        return self._follow(functional.identity(x.detach() + other, x), x, self._scales)

    _on_iadd = _on_radd = _on_add

    def _on_sub(self, func: Any, u: Any, v: Any) -> Tensor:
        if self._is_activation(u) and self._is_activation(v):
            return functional.add(u, functional.identity(-v.detach(), v), self.rules)
        x = u if self._is_activation(u) else v
        with torch.no_grad():
            value = u - v
        return functional.identity(value, x)

    _on_rsub = _on_sub

    def _on_mul(self, func: Any, u: Any, v: Any) -> Tensor:
        if not (self._is_activation(u) and self._is_activation(v)):
            x, factor = (u, v) if self._is_activation(u) else (v, u)
            out = functional.multiply_constant(x, factor)
            if out.shape == x.shape:
                self._roots[id(out)] = (self._root(x), out)
            return self._follow(out, x, self._maps, self._scales)
        if self._root(u) is self._root(v):
            return self._of_root(u.detach() * v.detach(), u)
        for x, scale in ((u, v), (v, u)):
            if id(scale) in self._scales and id(x) not in self._scales:
                return functional.identity(x.detach() * scale.detach(), x)
        return functional.mul(u, v)

    _on_imul = _on_rmul = _on_mul

    def _on_truediv(self, func: Any, u: Any, v: Any) -> Tensor:
        if not self._is_activation(u) or (self._is_activation(v) and id(v) not in self._scales):
            raise UnsupportedModelError("no relevance function for a division by an activation")
        value = u.detach() / (v.detach() if isinstance(v, Tensor) else v)
        return self._follow(functional.identity(value, u), u, self._scales)

    _on_div = _on_idiv = _on_itruediv = _on_truediv

    def _of_root(self, value: Tensor, x: Tensor) -> Tensor:
        root = self._root(x)
        out = functional.identity(value, root)
        self._roots[id(out)] = (root, out)
        return out

    def _on_matmul(self, func: Any, a: Tensor, b: Tensor) -> Tensor:
        if not self._is_activation(b):
            return functional.linear(a, b.detach().mT, None, self.rules)
        if id(a) in self._maps:
            attn = functional.end(a, self.rules)
            self.attention.append(attn)
            return functional.matmul(attn, b, self.rules, attention=True)
        a = a if self._is_activation(a) else a.detach()
        return functional.matmul(a, b, self.rules)

    _on_bmm = _on_rmatmul = _on_matmul

    def _on_scaled_dot_product_attention(
        self, func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, rules=self.rules, maps=self.attention
        )

    def _on_multi_head_attention_forward(
        self, func: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        _, heads, in_weight, in_bias, _, _, _, _, out_weight, out_bias, *_ = args
        if (
            query is not key
            or key is not value
            or kwargs.get("attn_mask") is not None
            or kwargs.get("key_padding_mask") is not None
        ):
            raise UnsupportedModelError("no relevance function for nn.MultiheadAttention but self-attention without a mask")
        projected = functional.linear(query, in_weight, in_bias, self.rules)
        q, k, v = projected.unflatten(-1, (3, heads, -1)).permute(2, 1, 3, 0, 4)
        out = functional.scaled_dot_product_attention(q, k, v, rules=self.rules, maps=self.attention)
        merged = out.permute(2, 0, 1, 3).flatten(2)
        return functional.linear(merged, out_weight, out_bias, self.rules), None

    def _on_mean(self, func: Any, x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
        dims = [dim] if isinstance(dim, int) else list(range(x.dim())) if dim is None else list(dim)
        if keepdim and [d % x.dim() for d in dims] == [x.dim() - 1]:
            # The statistic of a norm that is spelled out: relevance ends here, what it scales takes all.
            out = x.detach().mean(dims, keepdim).requires_grad_()
            self._scales[id(out)] = out
            return out
        return functional.mean(x, dims, keepdim, self.rules)

    def _on_adaptive_avg_pool1d(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            value = func(x, *args, **kwargs)
        return _Pooling.apply(x, value, func, args, kwargs)

    _on_adaptive_avg_pool2d = _on_avg_pool2d = _on_avg_pool1d = _on_adaptive_avg_pool1d

    def _on_conv2d(
        self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:  # fmt: skip
        return _Convolution.apply(x, weight.detach(), bias, func, (stride, padding, dilation, groups), self.rules)

    _on_conv1d = _on_conv2d


class _Pooling(torch.autograd.Function):
    """Averages over windows: by share among what has the average's sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, func: Any, args: Any, kwargs: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.call = func, args, tuple(kwargs.items())
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, rel: Tensor) -> tuple[Tensor | None, ...]:
        func, args, kwargs = ctx.call
        return pool_relevance(func, rel[None], ctx.saved_tensors[0], kwargs, *args)[0], None, None, None, None


class _Generic(torch.autograd.Function):
    """Any differentiable function: R' = x ⊙ vjp(R ⊘ f(x)), in equal parts to several activations."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, func: Any, args: Any, kwargs: Any, *xs: Tensor) -> Tensor:
        ctx.call = func, args, kwargs, xs
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, rel: Tensor) -> tuple[Tensor | None, ...]:
        func, args, kwargs, xs = ctx.call
        leaves = {id(x): x.detach().requires_grad_() for x in xs}
        with torch.enable_grad():
            call = pytree.tree_map(lambda x: leaves.get(id(x), x), (args, kwargs))
            y = func(*call[0], **call[1])
            parts = torch.autograd.grad(
                y, list(leaves.values()), R.safe_divide(rel, y.detach(), "official"), allow_unused=True
            )
        shares = {
            key: 0.0 if part is None else leaf.detach() * part / len(leaves)
            for (key, leaf), part in zip(leaves.items(), parts, strict=True)
        }
        return None, None, None, None, *(shares.pop(id(x), None) for x in xs)


class _Convolution(torch.autograd.Function):
    """A convolution by eq. (5), also the one that reads the image."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, func: Any, options: Any, rules: R.Rules
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.call = func, options, rules
        return func(x, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, rel: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        func, options, rules = ctx.call
        return conv_relevance(func, rel[None], x, weight, rules, *options)[0], None, None, None, None, None


def _inplace_flag(name: str) -> bool:
    """Calls that set whether gradients are recorded must not be made where they are not."""
    return name in ("requires_grad_", "retain_grad", "__set__", "_set_grad_enabled", "set_grad_enabled")


__all__ = ["propagation"]
