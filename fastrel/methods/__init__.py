"""Attribution methods. Each is a composition of lanes: what flows backwards, what a block adds, and where it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from fastrel.errors import InputError
from fastrel.methods.attention_flow import attention_flow

#: What an attention block adds to a rollout, from its A, ∇A and R_A.
Update = Literal["gradient_relevance", "gradient_attention", "gradcam", "relevance", "attention"]
#: rollout: the chained row. tokens, pixels: a lane where the first block reads, or at the model's input. maps: a function
#: of all attention maps. steps: gradients along a path of inputs.
Reading = Literal["rollout", "tokens", "pixels", "maps", "steps"]


@dataclass(frozen=True)
class Method:
    """How an explanation is put together.

    A rollout chains the map M (`update`) of every block from `start_layer` on, r ← r (I + M), with the rows of I + M scaled
    to sum 1 if `normalize`; without `residual`, I is left out. Readings of tokens and pixels sum a `lane` over features:
    relevance, or the value times its gradient. `attnlrp` turns the gradient into the one of AttnLRP's rules.

    `cost` is the arithmetic in forward passes, all blocks and one target.
    """

    name: str
    summary: str
    source: str
    cost: str
    reading: Reading = "rollout"
    update: Update = "attention"
    lane: Literal["relevance", "gradient"] | None = None
    start_layer: int = 0
    normalize: bool = False
    residual: bool = True
    attnlrp: bool = False
    combine: Callable[..., Tensor] | None = None

    @property
    def needs_gradient(self) -> bool:
        """Whether the gradient lane is used."""
        return self.lane == "gradient" or (self.reading == "rollout" and self.update.startswith("grad"))

    @property
    def needs_relevance(self) -> bool:
        """Whether the relevance lane is used."""
        return self.lane == "relevance" or (self.reading == "rollout" and self.update.endswith("relevance"))


_CHEFER = "Chefer, Gur and Wolf, CVPR 2021"

METHODS = {
    method.name: method
    for method in (
        Method(
            "transformer_attribution",
            "gradient times relevance of every attention map, positive part, averaged over heads, chained",
            f"{_CHEFER}, eqs. (13) and (14)",
            cost="5",
            update="gradient_relevance",
        ),
        Method(
            "gradient_attention",
            "gradient times attention, positive part, averaged over heads, chained",
            "Chefer, Gur and Wolf, ICCV 2021",
            cost="2",
            update="gradient_attention",
        ),
        Method(
            "relevance_rollout",
            "relevance of every attention map, positive part, averaged over heads, chained: no gradient",
            f"ablation of {_CHEFER}",
            cost="4",
            update="relevance",
        ),
        Method(
            "rollout",
            "attention maps averaged over heads, rows normalised with the residual, chained; blind to the class",
            "Abnar and Zuidema, ACL 2020",
            cost="1",
            normalize=True,
        ),
        Method(
            "attention_flow",
            "maximum flow through the averaged attention maps; blind to the class, slow, for short inputs",
            "Abnar and Zuidema, ACL 2020",
            cost="1, and a maximum flow per token",
            reading="maps",
            combine=attention_flow,
        ),
        Method(
            "raw_attention",
            "attention of the last block averaged over heads; blind to the class",
            f"baseline of {_CHEFER}",
            cost="1",
            start_layer=-1,
            residual=False,
        ),
        Method(
            "attention_gradcam",
            "heads of the last block weighted by their mean gradient, positive part",
            f"baseline of {_CHEFER}, after Selvaraju et al., ICCV 2017",
            cost="1.1",
            update="gradcam",
            start_layer=-1,
            residual=False,
        ),
        Method(
            "partial_lrp",
            "relevance of the last block's attention map, positive part, averaged over heads",
            "Voita et al., ACL 2019",
            cost="1.3",
            update="relevance",
            start_layer=-1,
            residual=False,
        ),
        Method(
            "lrp",
            "relevance carried to the tokens that the first block reads",
            f"baseline of {_CHEFER}; Bach et al., 2015",
            cost="4",
            reading="tokens",
            lane="relevance",
        ),
        Method(
            "lrp_pixels",
            "relevance carried to the pixels, by the z^B rule in the first convolution",
            f"baseline of {_CHEFER}; Montavon et al., 2017",
            cost="4",
            reading="pixels",
            lane="relevance",
        ),
        Method(
            "attnlrp",
            "relevance carried to the tokens by rules of which the softmax is part",
            "Achtibat et al., ICML 2024",
            cost="2",
            reading="tokens",
            lane="gradient",
            attnlrp=True,
        ),
        Method(
            "input_x_gradient",
            "embedding of each token times its gradient",
            "Shrikumar et al., 2016",
            cost="2",
            reading="tokens",
            lane="gradient",
        ),
        Method(
            "input_x_gradient_pixels",
            "each pixel times its gradient",
            "Shrikumar et al., 2016",
            cost="2",
            reading="pixels",
            lane="gradient",
        ),
        Method(
            "integrated_gradients",
            "gradients averaged on the way from a black image, by captum; pixels",
            "Sundararajan et al., ICML 2017",
            cost="100",
            reading="steps",
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
