"""Models of 16 bit, of several dtypes, and with norms in another one: their maps are those of float32."""

import copy
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import fastrel
from tests import golden_files as golden
from tests import models

IDS = torch.randint(3, 60, (2, 14), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def decoder(kind: str) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=60, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=12, num_labels=4, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


class Norm(nn.LayerNorm):
    """Computed in another dtype and cast back."""

    inside = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p.to(self.inside) for p in (self.weight, self.bias))
        return nn.functional.layer_norm(x.to(self.inside), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class InFloat64(Norm):
    inside = torch.float64


def vit(norm: Any = nn.LayerNorm, width: int = 48) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=width,
        depth=2,
        num_heads=3 if width == 48 else 4,
        num_classes=6,
        norm_layer=norm,
    )


class WiderHead(nn.Module):
    """A body, and a head in its own dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.head, self.dtype = vit(), nn.Linear(6, 4), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).to(self.dtype))


class Promoting(nn.Module):
    """float64 positions make the stream of a float32 model float64, and each block goes back to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(60, 32), nn.Linear(32, 4)
        self.register_buffer("position", torch.randn(14, 32, dtype=torch.float64))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True) for _ in range(2)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position
        for block in self.blocks:
            x = x + block(x.float())
        return self.head(x.mean(1).float())


def uneven(model: nn.Module) -> nn.Module:
    """Weights large enough for attention to be uneven, and small enough for 16 bit to carry the prediction."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.15) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def close(
    model: nn.Module, given: Tensor, in_float32: nn.Module, method: str = "transformer_attribution", **options: Any
) -> None:
    """On both backends, the map of a model is that of the same weights in float32."""
    first = fastrel.Explainer(model, method, **options)
    maps = {"auto": first(given)}
    maps["torch"] = first.using(backend="torch")(given, target=maps["auto"].target)
    wide = given.float() if given.is_floating_point() else given
    exact = fastrel.Explainer(in_float32, method)(wide, target=maps["auto"].target).relevance
    for explanation in maps.values():
        for a, b in zip(explanation.relevance, exact, strict=True):
            assert spearmanr(a.double(), b.double()).statistic > 0.99


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("Llama", torch.bfloat16), ("Llama", torch.float16), ("Gemma2", torch.bfloat16), ("Phi3", torch.float16)],
)
def test_decoders_whose_norms_compute_in_float32(kind: str, dtype: torch.dtype) -> None:
    model = uneven(decoder(kind)).to(dtype)
    close(model, IDS, copy.deepcopy(model).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layer_norm_in_float32_and_cast_back(dtype: torch.dtype) -> None:
    model = uneven(vit(Norm)).to(dtype)
    close(model, IMAGES.to(dtype), copy.deepcopy(model).float())


def test_backends_agree_on_mixed_dtypes_under_the_official_rules_too() -> None:
    model = uneven(vit(Norm)).bfloat16()
    ours, plain = (
        fastrel.Explainer(model, rules="official", backend=backend)(IMAGES.bfloat16(), target=1).relevance
        for backend in ("auto", "torch")
    )
    assert golden.relative_error(ours, plain) < 1e-3


@pytest.mark.parametrize(
    ("body", "head"),
    [(torch.bfloat16, torch.float32), (torch.float64, torch.float32), (torch.float32, torch.float64)],
    ids=str,
)
def test_a_head_in_another_dtype_than_its_body(body: torch.dtype, head: torch.dtype) -> None:
    model = uneven(WiderHead(head))
    model.body.to(body)
    model.head.to(head)
    in_float32 = copy.deepcopy(model).float()
    in_float32.dtype = torch.float32
    close(model, IMAGES.to(body), in_float32)


@pytest.mark.parametrize(
    ("method", "memory"), [("transformer_attribution", "low"), ("lrp", "normal"), ("attnlrp", "normal")]
)
def test_float32_and_float64_in_one_model(method: str, memory: str) -> None:
    model = uneven(Promoting())
    close(model, IDS, copy.deepcopy(model).float(), method, memory=memory)


def test_norms_in_float64_in_reduced_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes are float64 there, which no reduced product takes."""
    monkeypatch.setenv("FASTREL_BF16", "1")
    model, plain = uneven(vit(InFloat64, 256)), vit(width=256).eval()
    plain.load_state_dict(model.state_dict())
    close(model, IMAGES, plain, precision="mixed")


@pytest.mark.parametrize("norm", [nn.LayerNorm, Norm])
def test_lanes_of_16_bit_models_are_never_rounded_to_16_bit(norm: Any) -> None:
    explainer = fastrel.Explainer(uneven(vit(norm)).bfloat16())
    explainer(IMAGES.bfloat16())
    (program,) = models.programs(explainer)
    lanes = set()
    for node in program.reverse.graph.nodes:
        seed = node.op == "placeholder" and node.name in ("grad_0", "rel_0", "row_0")
        if seed or lanes & set(node.all_input_nodes):
            lanes.add(node)
            assert torch.bfloat16 not in node.args
    assert len(lanes) > 50


def test_an_input_in_float64_does_not_make_a_float32_model_slow() -> None:
    """Nothing of the explanation depends on what is cast before the first block."""

    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = vit()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.float())

    explainer = fastrel.Explainer(uneven(Casting()))
    explainer(IMAGES.double())
    (program,) = models.programs(explainer)
    assert program.dtype == torch.float32


def test_eager_models_of_two_dtypes_take_a_backend_that_adds_them() -> None:
    u, v = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.grad(fastrel.functional.add(u, v), (u, v), torch.ones(2, 3, dtype=torch.float64))
    half = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    torch.autograd.grad(fastrel.functional.add(half, half.detach().requires_grad_()), half, torch.ones_like(half))
