"""Candidate rules for the layers where the published code divides by signed sums: residual adds, A·V and Q·Kᵀ.

Everywhere else (linear layers, index maps) all forms share eq. (5). A form that only restates another one's residual or
attention part is composed from it, which tells the parts' effects apart.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrel.reference import rules as R
from fastrel.reference.tape import Tape

Pair = tuple[Tensor, Tensor]


class Form(NamedTuple):
    add: Callable[[Tensor, Tensor, Tensor], Pair]
    attention_value: Callable[[Tensor, Tensor, Tensor], Pair]
    query_key: Callable[[Tensor, Tensor, Tensor], Pair]


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b for b >= 0, and 0 where b = 0."""
    return R.safe_divide(a, b)


def scale(z: Tensor, dims: tuple[int, ...]) -> Tensor:
    return z.square().mean(dims, keepdim=True).sqrt()


#: Over what a smoothed rule takes the root mean square of z: a row of features, or all rows of a head (sample, for adds).
ROW, HEAD = (-1,), (-2, -1)


def products(share: Callable[[Tensor, Tensor], Tensor]) -> tuple[Callable[..., Pair], Callable[..., Pair]]:
    """A·V and Q·Kᵀ by S = share(R, product), each operand times the vjp of S, halved."""

    def attention_value(attn: Tensor, v: Tensor, rel: Tensor) -> Pair:
        s = share(rel, attn @ v)
        return attn * (s @ v.mT) / 2, v * (attn.mT @ s) / 2

    def query_key(q: Tensor, k: Tensor, rel: Tensor) -> Pair:
        s = share(rel, q @ k.mT)
        return q * (s @ k) / 2, k * (s.mT @ q) / 2

    return attention_value, query_key


def smoothed(epsilon: float, dims: tuple[int, ...] = ROW) -> Form:
    """R·z/(z² + (εs)²): the signed shares, faded out where z is small against its root mean square s."""

    def share(rel: Tensor, z: Tensor) -> Tensor:
        return divide(rel * z, z.square() + (epsilon * scale(z, dims)).square())

    def add(u: Tensor, v: Tensor, rel: Tensor) -> Pair:
        s = share(rel, u + v)
        return u * s, v * s

    return Form(add, *products(share))


def sign_epsilon(epsilon: float) -> Form:
    """R/(z + ε·s·sign z): LRP-ε, with ε relative to the root mean square s of the row."""

    def share(rel: Tensor, z: Tensor) -> Tensor:
        return torch.sign(z) * divide(rel, z.abs() + epsilon * scale(z, ROW))

    def add(u: Tensor, v: Tensor, rel: Tensor) -> Pair:
        s = share(rel, u + v)
        return u * s, v * s

    return Form(add, *products(share))


def magnitude_add(u: Tensor, v: Tensor, rel: Tensor) -> Pair:
    s = divide(rel, u.abs() + v.abs())
    return u.abs() * s, v.abs() * s


def magnitude_value(attn: Tensor, v: Tensor, rel: Tensor) -> Pair:
    v = v.abs()
    s = divide(rel, attn @ v)
    return attn * (s @ v.mT) / 2, v * (attn.mT @ s) / 2


def magnitude_query_key(q: Tensor, k: Tensor, rel: Tensor) -> Pair:
    q, k = q.abs(), k.abs()
    s = divide(rel, q @ k.mT)
    return q * (s @ k) / 2, k * (s.mT @ q) / 2


def square_add(u: Tensor, v: Tensor, rel: Tensor) -> Pair:
    s = divide(rel, u.square() + v.square())
    return u.square() * s, v.square() * s


def signed_value(attn: Tensor, v: Tensor, rel: Tensor) -> Pair:
    """Contributions of the sign of the output, so that no relevance is lost: σ = sign(A V), p = (σ v)⁺."""
    out, v_pos, v_neg = attn @ v, v.clamp(min=0), (-v).clamp(min=0)
    s_pos = divide(rel, attn @ v_pos).where(out > 0, 0)
    s_neg = divide(rel, attn @ v_neg).where(out < 0, 0)
    rel_attn = attn * (s_pos @ v_pos.mT + s_neg @ v_neg.mT) / 2
    return rel_attn, (v_pos * (attn.mT @ s_pos) + v_neg * (attn.mT @ s_neg)) / 2


def signed_query_key(q: Tensor, k: Tensor, rel: Tensor) -> Pair:
    """Contributions of the sign of the score."""
    q_pos, q_neg, k_pos, k_neg = q.clamp(min=0), (-q).clamp(min=0), k.clamp(min=0), (-k).clamp(min=0)
    out = q @ k.mT
    s_pos = divide(rel, q_pos @ k_pos.mT + q_neg @ k_neg.mT).where(out > 0, 0)
    s_neg = divide(rel, q_pos @ k_neg.mT + q_neg @ k_pos.mT).where(out < 0, 0)
    rel_q = q_pos * (s_pos @ k_pos + s_neg @ k_neg) + q_neg * (s_pos @ k_neg + s_neg @ k_pos)
    rel_k = k_pos * (s_pos.mT @ q_pos + s_neg.mT @ q_neg) + k_neg * (s_pos.mT @ q_neg + s_neg.mT @ q_pos)
    return rel_q / 2, rel_k / 2


def no_query_key(q: Tensor, k: Tensor, rel: Tensor) -> Pair:
    return torch.zeros_like(q), torch.zeros_like(k)


def both_halved(attn: Tensor, v: Tensor, rel: Tensor) -> Pair:
    """The default's A·V, but V is given half: the other half is A's, to be carried on to Q and K."""
    rel_attn, rel_v = R.attention_value(attn, v, rel)
    return rel_attn, rel_v / 2


def signed_values_only(attn: Tensor, v: Tensor, rel: Tensor) -> Pair:
    rel_attn, rel_v = signed_value(attn, v, rel)
    return rel_attn, 2 * rel_v


_OFFICIAL = Form(
    lambda u, v, rel: R.add(u, v, rel, "official"),
    lambda a, v, rel: R.attention_value(a, v, rel, "official"),
    lambda q, k, rel: R.query_key(q, k, rel, "official"),
)
_DEFAULT = Form(R.add, R.attention_value, no_query_key)
_WITH_SCORES = Form(R.add, both_halved, R.query_key)
_SMOOTH = smoothed(0.2)

FORMS: dict[str, Form] = {
    "default": _DEFAULT,
    "official": _OFFICIAL,
    "with Q·K": _WITH_SCORES,
    "without Q·K, its half dropped": _WITH_SCORES._replace(query_key=no_query_key),
    "with Q·K, add by magnitude": _WITH_SCORES._replace(add=magnitude_add),
    "with Q·K, add by square": _WITH_SCORES._replace(add=square_add),
    "with Q·K, add smoothed 0.2": _WITH_SCORES._replace(add=_SMOOTH.add),
    "magnitude": Form(magnitude_add, magnitude_value, magnitude_query_key),
    "sign-aware": Form(R.add, signed_value, signed_query_key),
    "sign-aware, add by magnitude": Form(magnitude_add, signed_value, signed_query_key),
    "sign-aware without Q·K": Form(R.add, signed_values_only, no_query_key),
    "smoothed 0.01": smoothed(0.01),
    "smoothed 0.2": _SMOOTH,
    "smoothed 1": smoothed(1.0),
    "smoothed 0.2 per head": smoothed(0.2, HEAD),
    "smoothed 0.2, add as default": _SMOOTH._replace(add=R.add),
    "ε 0.2": sign_epsilon(0.2),
}


class FormTape(Tape):
    """A tape whose `form` may be exchanged between one `relprop` and the next."""

    def __init__(self) -> None:
        super().__init__("positive")
        self.form = _DEFAULT

    def add(self, u: Tensor, v: Tensor) -> Tensor:
        y = u + v
        self.record([y], [u, v], lambda rel: self.form.add(u, v, rel))
        return y

    def query_key(self, q: Tensor, k: Tensor) -> Tensor:
        y = q @ k.mT
        self.record([y], [q, k], lambda rel: self.form.query_key(q, k, rel))
        return y

    def attention_value(self, attn: Tensor, v: Tensor) -> Tensor:
        y = attn @ v
        self.record([y], [attn, v], lambda rel: self.form.attention_value(attn, v, rel))
        return y

    def softmax(self, scores: Tensor) -> Tensor:
        """A form that ends relevance at A says so in its `query_key`."""
        return self.identity(lambda t: t.softmax(-1), scores)
