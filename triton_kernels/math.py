"""What the kernels compute, apart from loads and stores. NaN in, NaN out: nothing here may hide one."""

import triton
import triton.language as tl

#: The smallest normal float32: below it a denominator is 0.
TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)
#: The largest float32.
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
#: What the published code adds to denominators.
OFFICIAL_EPSILON: tl.constexpr = tl.constexpr(1e-9)
#: A denominator that is a difference is rounding below this share of its terms: 8 eps.
ROUNDING: tl.constexpr = tl.constexpr(9.5367431640625e-07)

#: Triton's interpreter multiplies bfloat16 and float8 on bit patterns: operands are rounded, then widened again there.
WIDEN: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)

#: M of eq. (13) and its relatives, by the names that `fastrel.ops.UPDATES` has for them.
UPDATES = {"gradient_relevance": 0, "gradient_attention": 1, "relevance": 2, "attention": 3}


@triton.jit
def safe_divide(a, b, OFFICIAL: tl.constexpr):
    """`safe_divide` of fastrel.reference.rules."""
    if OFFICIAL:
        shifted = b + OFFICIAL_EPSILON
        return tl.where(b == 0.0, 0.0, a / tl.where(shifted == 0.0, OFFICIAL_EPSILON, shifted))
    else:
        return tl.where(b < TINY, 0.0, a / tl.maximum(b, TINY, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def positive(x):
    """x⁺."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def negative(x):
    """x⁻ = min(x, 0)."""
    return tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def without_low_bits(x, BITS: tl.constexpr):
    """float32 rounded to 23 − BITS bits of mantissa, to nearest, ties to even. What exceeds the largest number becomes infinite."""
    bits = x.to(tl.uint32, bitcast=True)
    half: tl.constexpr = (1 << (BITS - 1)) - 1
    kept: tl.constexpr = 0xFFFFFFFF - ((1 << BITS) - 1)
    rounded = (bits + half + ((bits >> BITS) & 1)) & kept
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def narrow(x, TO: tl.constexpr):
    """float32 rounded to a narrower dtype, to nearest; the interpreter cuts bfloat16 off, and loses float8's carries."""
    if WIDEN and tl.bfloat16 == TO:
        return without_low_bits(x, 16).to(TO)
    if WIDEN and tl.float8e4nv == TO:
        return without_low_bits(x, 20).to(TO)
    return x.to(TO)


@triton.jit
def operand(x, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """A float32 tile as a product takes it: rounded to DOT, or to TF32, of which the tensor core would drop the low 13 bits."""
    if tl.float32 == DOT:
        return without_low_bits(x, 13) if PRECISION == "tf32" else x
    return narrow(x, DOT).to(tl.float32) if WIDEN else narrow(x, DOT)


@triton.jit
def dot(a, b, acc, SPLIT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b with b as it is in DOT already. SPLIT: a in two parts of DOT, which together hold 16 bits and more."""
    high = operand(a, DOT, PRECISION)
    acc = tl.dot(high, b, acc, input_precision=PRECISION)
    if SPLIT:
        low = a - high.to(tl.float32)
        acc = tl.dot(operand(low, DOT, PRECISION), b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def sum_of_products(x, AXIS: tl.constexpr):
    """Σ x along an axis, where x is a product. Without + 0 the compiler fuses it with the sum: of two lanes that exchange theirs,
    each adds its own unrounded to the other's, and which of the two sums is stored is anybody's guess."""
    return tl.sum(x + 0.0, AXIS)


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


#: What a gradient is multiplied by on its way through gelu, as numbers for kernels: by gelu's own name for its form, and whether
#: AttnLRP's rule is taken.
GELU_SLOPES = {("none", False): 1, ("tanh", False): 2, ("none", True): 3, ("tanh", True): 4}


@triton.jit
def gelu_slope(x, SLOPE: tl.constexpr):
    """gelu'(x), or gelu(x) / x, 0 where x is 0, numbered as in `GELU_SLOPES`."""
    if SLOPE == 2 or SLOPE == 4:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        tanh = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * inner))
        ratio = 0.5 * (1.0 + tanh)
        if SLOPE == 4:
            return tl.where(x == 0.0, 0.0, ratio)
        return ratio + 0.5 * x * (1.0 - tanh * tanh) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    else:
        ratio = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        if SLOPE == 3:
            return tl.where(x == 0.0, 0.0, ratio)
        return ratio + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def share(u, v, rel):
    """Residual add, positive rules: σ = sign(u+v), R_u = R (σu)⁺ ⊘ ((σu)⁺ + (σv)⁺), R_v alike."""
    total = u + v
    sign = tl.where(total > 0.0, 1.0, tl.where(total < 0.0, -1.0, 0.0))
    part_u, part_v = positive(sign * u), positive(sign * v)
    s = safe_divide(rel, part_u + part_v, False)
    return part_u * s, part_v * s


@triton.jit
def tile_of(program, rows, columns, GROUP: tl.constexpr):
    """A program's block of rows and of columns: GROUP blocks of rows take turns, so that their columns stay in the cache."""
    in_group = GROUP * columns
    first = program // in_group * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = program % in_group
    return first + within % height, within // height
