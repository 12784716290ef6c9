"""What single published architectures do that others do not, each in a model of a few lines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrel
from fastrel.errors import CaptureError, UnsupportedModelError
from tests.small import Attention, Made, ids, made


def verified(model: nn.Module, *inputs: Tensor, target: Any = 0) -> fastrel.Verification:
    """The report of a model in which every check could be made and holds."""
    report = fastrel.Explainer(model, backend="torch").verify(*inputs, target=target)
    assert report.ok, report
    assert not any("not checked" in check.meaning for check in report.checks), report
    assert not report.generic
    return report


def heads(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attention: Attention = m.cross
    return tuple(attention.heads(layer(x)) for layer in (attention.q, attention.k, attention.v))  # type: ignore[return-value]


class OverValues(nn.Module):
    """Nyströmformer's: what attention makes, and a convolution of values [B, h, T, d] over tokens, each head by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.made = made(lambda m, x: None)
        self.over = nn.Conv2d(2, 2, (3, 1), padding=(1, 0), groups=2, bias=False).double()

    def forward(self, tokens: Tensor) -> Tensor:
        m = self.made
        x = m.encoder(tokens)
        q, k, v = heads(m, x)
        x = x + m.cross.o((F.scaled_dot_product_attention(q, k, v) + self.over(v)).transpose(1, 2).flatten(2))
        return m.head(x[:, 0])


def test_a_convolution_of_values_over_tokens() -> None:
    assert verified(OverValues().eval(), ids()).blocks == 3


def test_scores_that_are_kept_above_the_least_number() -> None:
    """XGLM's."""

    def f(m: Made, tokens: Tensor) -> Tensor:
        x = m.encoder(tokens)
        q, k, v = heads(m, x)
        scores = torch.max(q @ k.mT, torch.tensor(torch.finfo(x.dtype).min, dtype=x.dtype))
        return m.head((x + m.cross.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))[:, 0])

    assert verified(made(f), ids()).blocks == 3


def test_factorised_attention_is_refused_by_its_name() -> None:
    """Keys times values first, and something done to them before queries read them."""

    def f(m: Made, tokens: Tensor) -> Tensor:
        x = m.encoder.embed(tokens)
        q, k, v = heads(m, x)
        of_keys = k.softmax(2).mT @ v
        return m.head((q @ (of_keys + of_keys.mT)).transpose(1, 2).flatten(2).mean(1))

    with pytest.raises(
        UnsupportedModelError,
        match=r"matmul.* summed over them: linear attention in a form whose map is not found; write it as",
    ):
        fastrel.Explainer(made(f))(ids())


def test_attention_by_landmarks_is_refused_by_what_it_does() -> None:
    """Nyströmformer's, where a text is longer than its landmarks: a product of maps."""

    def f(m: Made, tokens: Tensor) -> Tensor:
        x = m.encoder(tokens)
        q, k, v = heads(m, x)
        some = k.unflatten(2, (3, 2)).mean(3)
        attn = (q @ some.mT).softmax(-1) @ (some @ some.mT).softmax(-1).inverse()
        return m.head((x + m.cross.o((attn @ ((some @ k.mT).softmax(-1) @ v)).transpose(1, 2).flatten(2)))[:, 0])

    with pytest.raises(UnsupportedModelError, match="by a matrix that is no softmax"):
        fastrel.Explainer(made(f))(ids(3, 6))


def test_a_router_that_converts_itself_where_it_is_so_already() -> None:
    """Switch Transformers'."""

    def f(m: Made, tokens: Tensor) -> Tensor:
        x = m.encoder(tokens)
        m.layer = m.layer.to(torch.float64)
        return m.head((x * m.layer(x).sigmoid())[:, 0])

    verified(made(f), ids())


def test_a_forward_pass_that_converts_weights_is_refused_and_says_what_to_do() -> None:
    def f(m: Made, tokens: Tensor) -> Tensor:
        x = m.encoder(tokens)
        m.layer = m.layer.to(torch.float32)
        return m.head(m.layer(x.float()).double()[:, 0])

    with pytest.raises(CaptureError, match=r"turns weight of its Linear into torch\.float32 on cpu; do that before"):
        fastrel.Explainer(made(f))(ids())


def bridged(m: Made, first: Tensor, second: Tensor, turned: bool) -> Tensor:
    """BridgeTower's: a tower of [T, B, D], of which layers [B, T, D] across read every block."""

    def turn(x: Tensor) -> Tensor:
        return x.transpose(0, 1) if turned else x

    def block(x: Tensor) -> Tensor:
        x = x + turn(m.block.attention(turn(m.block.norm1(x))))
        return x + m.block.mlp(m.block.norm2(x))

    text, tower = m.encoder(first), block(turn(m.second.embed(second)))
    seen = m.layer(turn(tower))
    text, seen = text + m.cross(text, seen), seen + m.cross(seen, text)
    kind = F.embedding(torch.ones(1, dtype=torch.long), m.encoder.embed.weight)  # a constant
    text, seen = m.encoder.blocks(text) + kind, seen + m.layer(turn(block(tower)))
    text, seen = text + m.cross(text, seen), seen + m.cross(seen, text)
    return m.wide(torch.cat([text[:, 0], seen[:, 0]], -1))


def test_towers_with_tokens_before_samples() -> None:
    """Six tokens of three samples: shares of samples are not those of tokens."""
    inputs = ids(3, 5), ids(3, 6, seed=2)
    models = [made(lambda m, *x, turned=turned: bridged(m, *x, turned)) for turned in (False, True)]
    maps = [fastrel.Explainer(model, backend="torch")(*inputs, target=0).maps for model in models]
    for name in maps[0]:
        torch.testing.assert_close(maps[1][name].relevance, maps[0][name].relevance, rtol=1e-8, atol=1e-10)
    verified(models[1], *inputs)


def test_a_value_that_is_overwritten_and_read_again() -> None:
    """transformers' experts: `out.add_(bias)`, and then `out`."""

    def f(m: Made, tokens: Tensor) -> Tensor:
        x = m.layer(m.encoder(tokens))
        x.add_(m.layer.bias)
        x.mul_(2)
        return m.head(m.block(x)[:, 0])

    verified(made(f), ids())


def test_heads_that_are_mixed_need_not_add_up_to_one() -> None:
    def f(m: Made, tokens: Tensor) -> Tensor:
        x = m.encoder(tokens)
        q, k, v = heads(m, x)
        attn = torch.einsum("bhqk,hg->bgqk", (q @ k.mT).softmax(-1), 2 * m.layer.weight[:2, :2])
        return m.head((x + m.cross.o((attn @ v).transpose(1, 2).flatten(2)))[:, 0])

    verified(made(f), ids())


def rotated(x: Tensor, as_complex: bool) -> Tensor:
    """Rotary positions of [B, h, T, d], pairs of neighbours turned by angles."""
    angles = torch.arange(x.shape[2])[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
    pairs = x.unflatten(-1, (-1, 2))
    if as_complex:
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.polar(torch.ones_like(angles), angles)).flatten(3)
    cos, sin = angles.cos(), angles.sin()
    a, b = pairs.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(3)


def test_positions_by_complex_numbers() -> None:
    """Llama's first code."""

    def f(m: Made, tokens: Tensor, as_complex: bool) -> Tensor:
        x = m.encoder(tokens)
        q, k, v = heads(m, x)
        attn = (rotated(q, as_complex) @ rotated(k, as_complex).mT).softmax(-1)
        return m.head(m.block(x + m.cross.o((attn @ v).transpose(1, 2).flatten(2)))[:, 0])

    models = [made(lambda m, x, c=c: f(m, x, c)).float() for c in (False, True)]
    maps = [fastrel.Explainer(model, backend="torch")(ids(), target=0).relevance for model in models]
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-4, atol=1e-6)


def test_other_complex_numbers_are_refused() -> None:
    def f(m: Made, tokens: Tensor) -> Tensor:
        return m.head(torch.fft.fft(m.encoder(tokens), dim=1).real[:, 0])

    with pytest.raises(UnsupportedModelError, match="makes complex numbers of activations"):
        fastrel.Explainer(made(f))(ids())


def test_parameters_are_no_activations_in_the_second_path() -> None:
    """Distances to prototypes, written out: −p of a parameter p requires grad."""

    def f(m: Made, tokens: Tensor) -> Tensor:
        x = m.encoder(tokens).mean(1)
        return -((x[:, None] - m.head.weight) ** 2).sum(-1)

    verified(made(f), ids())


def test_a_batch_norm_has_its_own_epsilon() -> None:
    """Another argument was taken for it, whether cuDNN may be used, which is 1 where torch was built for GPUs."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.made, self.norm = made(lambda m, x: None), nn.BatchNorm1d(16, eps=0.5).double()

        def forward(self, tokens: Tensor) -> Tensor:
            m = self.made
            return m.head(m.block(self.norm(m.encoder(tokens).mT).mT)[:, 0])

    verified(Normed().eval(), ids())


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: m.head(torch.lerp(x, x.tanh(), 0.3)[:, 0]),
        lambda m, x: m.head(torch.lerp(x, x.flip(1), m.layer.bias.sigmoid()).mean(1)),
        lambda m, x: m.head(torch.addcdiv(x, x.tanh(), m.layer.bias.abs() + 1, value=2)[:, 0]),
        lambda m, x: torch.stack([x[:, 0].mv(w) for w in m.head.weight], 1),
        lambda m, x: torch.inner(x[:, 0], m.head.weight),
        lambda m, x: m.head(x.mean(1).ravel().view(-1, 16)),
        lambda m, x: m.head(x[:, 0]).log_softmax(-1),
        lambda m, x: m.head(torch.expm1(x[:, 0].clamp(max=1)).atan()),
        lambda m, x: m.head(F.interpolate(x.mT, scale_factor=2).mean(-1)),
    ],
)
def test_operators_that_are_others_in_one_word(f: Any) -> None:
    verified(made(lambda m, tokens: f(m, m.encoder(tokens))), ids())


def test_tensordot_is_a_layer() -> None:
    forms = [lambda m, x: x @ m.head.weight.T, lambda m, x: torch.tensordot(x, m.head.weight, dims=([1], [1]))]
    maps = [
        fastrel.Explainer(made(lambda m, tokens, f=f: f(m, m.encoder(tokens)[:, 0])), backend="torch")(ids(), target=0)
        for f in forms
    ]
    torch.testing.assert_close(maps[1].relevance, maps[0].relevance, rtol=1e-8, atol=1e-10)


def _maxvit() -> tuple[nn.Module, tuple[int, ...]]:
    """Windows of 7 × 7 pixels on a grid of 8 × 8, then as many windows that hold one pixel of each."""
    from torchvision.models.maxvit import MaxVit

    sizes = {"stem_channels": 8, "partition_size": 7, "block_channels": [16, 32], "block_layers": [1, 1], "head_dim": 8}
    return MaxVit((56, 56), stochastic_depth_prob=0.0, num_classes=5, **sizes), (3, 56, 56)


def _swin3d() -> tuple[nn.Module, tuple[int, ...]]:
    from torchvision.models.video import SwinTransformer3d

    sizes = {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": [4, 4, 4]}
    return SwinTransformer3d([2, 4, 4], stochastic_depth_prob=0.0, num_classes=5, **sizes), (3, 8, 32, 32)


def _mvit() -> tuple[nn.Module, tuple[int, ...]]:
    """Queries, keys and values pooled by convolutions over frames and pixels, residuals by maxima."""
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    def block(stride_q: list[int], stride_kv: list[int]) -> Any:
        return MSBlockConfig(2, 16, 16, kernel_q=[3, 3, 3], kernel_kv=[3, 3, 3], stride_q=stride_q, stride_kv=stride_kv)

    blocks = [block([1, 1, 1], [1, 2, 2]), block([1, 2, 2], [1, 1, 1])]
    pooled = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True}
    return MViT((32, 32), 4, blocks, **pooled, stochastic_depth_prob=0.0, dropout=0.0, num_classes=5), (3, 4, 32, 32)


@pytest.mark.parametrize(("build", "blocks"), [(_maxvit, 4), (_swin3d, 2), (_mvit, 2)])
def test_models_of_torchvision_for_films_and_on_two_grids(build: Any, blocks: int) -> None:
    torch.manual_seed(0)
    model, shape = build()
    assert verified(model.double().eval(), torch.randn(2, *shape, dtype=torch.float64), target=1).blocks == blocks
