"""Attribution methods. Each is a composition of lanes: what flows backwards and what an attention block adds to the map."""

from dataclasses import dataclass, replace
from typing import Literal

from fastrel.errors import InputError

Update = Literal["gradient_relevance", "gradient_attention", "relevance", "attention"]


@dataclass(frozen=True)
class Method:
    """How an explanation is put together from the blocks of a model.

    `update` is the map M of one block. Blocks from `start_layer` on are chained, r ← r (I + M), with rows of I + M scaled
    to sum 1 if `normalize`; without `residual`, I is left out.
    """

    name: str
    summary: str
    source: str
    update: Update
    start_layer: int = 0
    normalize: bool = False
    residual: bool = True

    @property
    def needs_gradient(self) -> bool:
        """Whether the gradient lane is used."""
        return self.update.startswith("gradient")

    @property
    def needs_relevance(self) -> bool:
        """Whether the relevance lane is used."""
        return self.update.endswith("relevance")

    @property
    def class_specific(self) -> bool:
        """Whether the map depends on the target."""
        return self.needs_gradient or self.needs_relevance


_CHEFER = "Chefer, Gur and Wolf, CVPR 2021"

METHODS = {
    method.name: method
    for method in (
        Method(
            "transformer_attribution",
            "positive part of gradient times relevance of every attention map, averaged over heads and chained",
            f"{_CHEFER}, eqs. (13) and (14)",
            update="gradient_relevance",
        ),
        Method(
            "rollout",
            "attention maps averaged over heads, rows normalised with the residual, chained; blind to the class",
            "Abnar and Zuidema, ACL 2020",
            update="attention",
            normalize=True,
        ),
        Method(
            "raw_attention",
            "attention of the last block averaged over heads; blind to the class",
            f"baseline of {_CHEFER}",
            update="attention",
            start_layer=-1,
            residual=False,
        ),
    )
}


def get(name: str, *, start_layer: int | None = None, normalize: bool | None = None) -> Method:
    """The method called `name`, with its `start_layer` and `normalize` replaced where given.

    Raises:
        InputError: there is no such method.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")
    method = METHODS[name]
    return replace(
        method,
        start_layer=method.start_layer if start_layer is None else start_layer,
        normalize=method.normalize if normalize is None else normalize,
    )
