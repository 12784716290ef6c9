"""What an attribution method is: which lanes flow, what an attention block adds, and what is read in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import Tensor

#: What an attention block adds to a rollout, from its A, ∇A and R_A.
Update = Literal["gradient_relevance", "gradient_attention", "gradcam", "relevance", "attention"]
UPDATES: tuple[Update, ...] = get_args(Update)

#: What a block hands to a function of all maps.
Kind = Literal["attention", "gradient", "relevance", "scores", "tokens", "received", "contributions"]

#: What is said where maps of several blocks cannot be read together.
NEEDS_SAME_TOKENS = "needs attention maps over one and the same sequence of tokens in every block"

_OF_GRADIENT: tuple[Update, ...] = ("gradient_relevance", "gradient_attention", "gradcam")
_OF_RELEVANCE: tuple[Update, ...] = ("gradient_relevance", "relevance")


@dataclass(frozen=True)
class Chain:
    """The rollout: the map M (`update`) of every block chained, r ← r (I + M); without `residual`, I is left out."""

    update: Update
    residual: bool = True

    @property
    def needs_gradient(self) -> bool:
        """Whether the gradient lane is used."""
        return self.update in _OF_GRADIENT

    @property
    def needs_relevance(self) -> bool:
        """Whether the relevance lane is used."""
        return self.update in _OF_RELEVANCE


@dataclass(frozen=True)
class LaneSum:
    """A lane summed over features: relevance, or the value times its gradient. At the tokens that the first block reads, or at
    the model's `pixels`."""

    lane: Literal["relevance", "gradient"]
    pixels: bool = False

    @property
    def needs_gradient(self) -> bool:
        """Whether the gradient lane is used."""
        return self.lane == "gradient"

    @property
    def needs_relevance(self) -> bool:
        """Whether the relevance lane is used."""
        return self.lane == "relevance"


@dataclass(frozen=True)
class AllMaps:
    """A function of what the head reads [K, B, T], and for each kind in `of` of the list of all blocks', the first block's first.

    "attention": A [B, h, Tq, Tk]; "gradient": ∇A, "relevance": R_A, both [K, B, h, Tq, Tk]; "scores": S [B, h, Tq, Tk] with
    A = softmax(S); "tokens": what a block reads times its gradient, summed over features, [K, B, T]; "received": the attention that
    each token receives, [B, T]; "contributions": the share of each token in what the block makes of every token, by its output layer,
    residual add and norm, [B, T, T]. The function returns the map [K, B, T].
    """

    combine: Callable[..., Tensor]
    of: tuple[Kind, ...] = ("attention",)

    @property
    def needs_gradient(self) -> bool:
        """Whether the gradient lane is used."""
        return "gradient" in self.of or "tokens" in self.of

    @property
    def needs_relevance(self) -> bool:
        """Whether the relevance lane is used."""
        return "relevance" in self.of


@dataclass(frozen=True)
class PathIntegral:
    """Gradients averaged along a path of inputs; the forward graph alone is used."""

    needs_gradient = False
    needs_relevance = False


Reading: TypeAlias = Chain | LaneSum | AllMaps | PathIntegral


@dataclass(frozen=True)
class Method:
    """How an explanation is put together.

    Attributes:
        name: by which it is asked for, and which results carry.
        summary: one line for people.
        source: where it was published.
        cost: the arithmetic in forward passes, all blocks and one target.
        reading: what is read in the end.
        start_layer: the attention block that it starts with, counted from the input; negative from the output.
        normalize: scale the rows of I + M to sum 1.
        attnlrp: the gradient lane follows AttnLRP's rules.
        evidence: where tokens are pooled, each is read by its part of eq. (13) instead of in equal parts, and what a block adds
            counts N² times, N the number of tokens that are read (`fastrel.reference.pooling.tokens_read`), unless rows are normalised.
        per_attention: divide by the attention that each token receives, mean over blocks.
    """

    name: str
    summary: str
    source: str
    cost: str
    reading: Reading
    start_layer: int = 0
    normalize: bool = False
    attnlrp: bool = False
    evidence: bool = False
    per_attention: bool = False

    @property
    def update(self) -> Update:
        """What an attention block adds to the row; rows of other readings follow the attention itself."""
        return self.reading.update if isinstance(self.reading, Chain) else "attention"

    @property
    def residual(self) -> bool:
        """Whether a block adds I."""
        return not isinstance(self.reading, Chain) or self.reading.residual

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What every block hands to the reading."""
        of = self.reading.of if isinstance(self.reading, AllMaps) else ()
        return (*of, "received") if self.per_attention else of

    @property
    def needs_gradient(self) -> bool:
        """Whether the gradient lane is used."""
        return self.reading.needs_gradient

    @property
    def needs_relevance(self) -> bool:
        """Whether the relevance lane is used."""
        return self.reading.needs_relevance

    @property
    def is_class_blind(self) -> bool:
        """Whether the map is the same whatever is explained."""
        return isinstance(self.reading, (Chain, AllMaps)) and not (self.needs_gradient or self.needs_relevance)

    @property
    def to_the_end(self) -> bool:
        """Whether lanes are carried down to where the map is read, not only to the last attention map."""
        return isinstance(self.reading, LaneSum) or "tokens" in self.kinds

    @property
    def at_pixels(self) -> bool:
        """Whether the map is read at the model's floating-point input."""
        return isinstance(self.reading, LaneSum) and self.reading.pixels
