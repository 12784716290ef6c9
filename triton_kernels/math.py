"""What the kernels compute, apart from loads and stores."""

import triton
import triton.language as tl

#: The smallest normal float32: below it a denominator is 0.
TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)
#: What the published code adds to denominators.
OFFICIAL_EPSILON: tl.constexpr = tl.constexpr(1e-9)
#: A denominator that is a difference is rounding below this share of its terms: 8 eps.
ROUNDING: tl.constexpr = tl.constexpr(9.5367431640625e-07)

#: M of eq. (13) and its relatives, by the names that `fastrel.ops.UPDATES` has for them.
UPDATES = {"gradient_relevance": 0, "gradient_attention": 1, "relevance": 2, "attention": 3}


@triton.jit
def safe_divide(a, b, OFFICIAL: tl.constexpr):
    """`safe_divide` of fastrel.reference.rules."""
    if OFFICIAL:
        shifted = b + OFFICIAL_EPSILON
        return tl.where(b == 0.0, 0.0, a / tl.where(shifted == 0.0, OFFICIAL_EPSILON, shifted))
    else:
        return tl.where(b < TINY, 0.0, a / tl.maximum(b, TINY))


@triton.jit
def positive(x):
    """x⁺."""
    return tl.maximum(x, 0.0)


@triton.jit
def negative(x):
    """x⁻ = min(x, 0)."""
    return tl.minimum(x, 0.0)


@triton.jit
def update_of(attn, grad, rel, UPDATE: tl.constexpr):
    """One head's clamped product, numbered as in `UPDATES`."""
    if UPDATE == 0:
        return positive(grad * rel)
    elif UPDATE == 1:
        return positive(grad * attn)
    elif UPDATE == 2:
        return positive(rel)
    else:
        return attn


@triton.jit
def share(u, v, rel):
    """Residual add, positive rules: σ = sign(u+v), R_u = R (σu)⁺ ⊘ ((σu)⁺ + (σv)⁺), R_v alike."""
    total = u + v
    sign = tl.where(total > 0.0, 1.0, tl.where(total < 0.0, -1.0, 0.0))
    part_u, part_v = positive(sign * u), positive(sign * v)
    s = safe_divide(rel, part_u + part_v, False)
    return part_u * s, part_v * s
