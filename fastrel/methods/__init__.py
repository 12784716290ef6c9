"""Attribution methods, each a composition of lanes: what flows backwards, what a block adds, and where it is read."""

from __future__ import annotations

from fastrel.errors import InputError
from fastrel.methods.all_maps import alti, attcat, attention_guided_cam, legrad
from fastrel.methods.attention_flow import attention_flow
from fastrel.reference.rules import Rules
from fastrel.transform.method import AllMaps, Chain, LaneSum, Method, PathIntegral

__all__ = ["METHODS", "AllMaps", "Chain", "LaneSum", "Method", "PathIntegral", "default", "get"]

_CHEFER = "Chefer, Gur and Wolf, CVPR 2021"

METHODS = {
    method.name: method
    for method in (
        Method(
            "frozen_attribution",
            "transformer_attribution by AttnLRP's gradient, which takes norms as constants, pooled tokens read by it too; the default",
            "fastrel, docs/numerics.md",
            cost="5",
            reading=Chain("gradient_relevance"),
            attnlrp=True,
            evidence=True,
        ),
        Method(
            "transformer_attribution",
            "gradient times relevance of every attention map, positive part, averaged over heads, chained; the paper's",
            f"{_CHEFER}, eqs. (13) and (14)",
            cost="5",
            reading=Chain("gradient_relevance"),
        ),
        Method(
            "relevance_per_attention",
            "frozen_attribution, each token's divided by the attention that it receives",
            "fastrel, docs/evaluation.md",
            cost="5",
            reading=Chain("gradient_relevance"),
            attnlrp=True,
            evidence=True,
            per_attention=True,
        ),
        Method(
            "gradient_attention",
            "gradient times attention, positive part, averaged over heads, chained",
            "Chefer, Gur and Wolf, ICCV 2021",
            cost="2",
            reading=Chain("gradient_attention"),
        ),
        Method(
            "relevance_rollout",
            "relevance of every attention map, positive part, averaged over heads, chained: no gradient",
            f"ablation of {_CHEFER}",
            cost="4",
            reading=Chain("relevance"),
        ),
        Method(
            "rollout",
            "attention maps averaged over heads, rows normalised with the residual, chained; blind to the class",
            "Abnar and Zuidema, ACL 2020",
            cost="1",
            reading=Chain("attention"),
            normalize=True,
        ),
        Method(
            "attention_flow",
            "maximum flow through the averaged attention maps; blind to the class, slow, for short inputs",
            "Abnar and Zuidema, ACL 2020",
            cost="1, and a maximum flow per token",
            reading=AllMaps(attention_flow),
        ),
        Method(
            "raw_attention",
            "attention of the last block averaged over heads; blind to the class",
            f"baseline of {_CHEFER}",
            cost="1",
            reading=Chain("attention", residual=False),
            start_layer=-1,
        ),
        Method(
            "attention_gradcam",
            "heads of the last block weighted by their mean gradient, positive part",
            f"baseline of {_CHEFER}, after Selvaraju et al., ICCV 2017",
            cost="1.1",
            reading=Chain("gradcam", residual=False),
            start_layer=-1,
        ),
        Method(
            "legrad",
            "gradient of every attention map, positive part, averaged over heads and queries, blocks added up",
            "after Bousselham et al., ICCV 2025, by the gradient of the model's own output in every block",
            cost="2",
            reading=AllMaps(legrad, of=("gradient", "attention")),
        ),
        Method(
            "attention_guided_cam",
            "gradient of every attention map, positive part, weighted by the sigmoid of its scores, heads and blocks added up",
            "Leem and Seo, AAAI 2024",
            cost="2",
            reading=AllMaps(attention_guided_cam, of=("gradient", "scores")),
        ),
        Method(
            "attcat",
            "what each block reads times its gradient, weighted by the attention that the token receives, added up",
            "Qiang et al., NeurIPS 2022",
            cost="2",
            reading=AllMaps(attcat, of=("tokens", "received")),
        ),
        Method(
            "alti",
            "how near what a token gives comes to what each block makes of another, rows scaled to sum 1, chained; blind to the class",
            "Ferrando et al., EMNLP 2022",
            cost="1.3, and a vector per pair of tokens",
            reading=AllMaps(alti, of=("contributions",)),
        ),
        Method(
            "partial_lrp",
            "relevance of the last block's attention map, positive part, averaged over heads",
            "Voita et al., ACL 2019",
            cost="1.3",
            reading=Chain("relevance", residual=False),
            start_layer=-1,
        ),
        Method(
            "lrp",
            "relevance carried to the tokens that the first block reads",
            f"baseline of {_CHEFER}; Bach et al., 2015",
            cost="4",
            reading=LaneSum("relevance"),
        ),
        Method(
            "lrp_pixels",
            "relevance carried to the pixels, by the z^B rule in the first convolution",
            f"baseline of {_CHEFER}; Montavon et al., 2017",
            cost="4",
            reading=LaneSum("relevance", pixels=True),
        ),
        Method(
            "attnlrp",
            "relevance carried to the tokens by rules of which the softmax is part",
            "Achtibat et al., ICML 2024",
            cost="2",
            reading=LaneSum("gradient"),
            attnlrp=True,
        ),
        Method(
            "input_x_gradient",
            "embedding of each token times its gradient",
            "Shrikumar et al., 2016",
            cost="2",
            reading=LaneSum("gradient"),
        ),
        Method(
            "input_x_gradient_pixels",
            "each pixel times its gradient",
            "Shrikumar et al., 2016",
            cost="2",
            reading=LaneSum("gradient", pixels=True),
        ),
        Method(
            "integrated_gradients",
            "gradients averaged on the way from an input of zeros, by captum; pixels",
            "Sundararajan et al., ICML 2017",
            cost="100",
            reading=PathIntegral(),
        ),
    )
}


def default(rules: Rules) -> Method:
    """What explains where nobody says how: `frozen_attribution`, and the paper's method by the rules that the paper's code has."""
    return METHODS["frozen_attribution" if rules == "positive" else "transformer_attribution"]


def get(name: str) -> Method:
    """The method called `name`.

    Raises:
        InputError: there is no such method.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]
