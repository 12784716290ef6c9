"""Weights of which there are several: one for each head, one for each expert of a mixture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.integrations import moe  # noqa: F401  (which defines the operator grouped_mm_fallback)

import fastrel
from fastrel.rules.generic import divided_row
from tests.small import WIDTH, Encoder

HEADS, EXPERTS = 2, 3
SIZE = WIDTH // HEADS


class PerHead(nn.Module):
    """Attention whose heads have weights [h, in, out] of their own; `say` spells the products."""

    def __init__(self, say: dict[str, Callable[[Tensor, Tensor], Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.say = Encoder(), nn.Linear(WIDTH, 3), say
        self.q, self.k, self.v = (nn.Parameter(torch.randn(HEADS, WIDTH, SIZE) / 4) for _ in range(3))
        self.own, self.o = nn.Parameter(torch.randn(HEADS, SIZE, SIZE)), nn.Parameter(torch.randn(HEADS, SIZE, WIDTH) / 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.body(ids)
        q, k, v = (self.say["apart"](x, w) for w in (self.q, self.k, self.v))
        v = self.say["each"](v, self.own)
        x = x + self.say["joined"]((q @ k.mT / SIZE**0.5).softmax(-1) @ v, self.o)
        return self.head(x[:, 0])


SPELLINGS: dict[str, dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "one layer": {
        "apart": lambda x, w: F.linear(x, w.mT.flatten(0, 1)).unflatten(-1, (HEADS, -1)).transpose(1, 2),
        "each": lambda x, w: torch.stack([x[:, i] @ w[i] for i in range(HEADS)], 1),
        "joined": lambda x, w: F.linear(x.transpose(1, 2).flatten(2), w.flatten(0, 1).T),
    },
    "products": {
        "apart": lambda x, w: x.unsqueeze(1) @ w,
        "each": torch.matmul,
        "joined": lambda x, w: F.linear(x.transpose(1, 2).flatten(2), w.flatten(0, 1).T),
    },
    "products of as many dimensions": {
        "apart": lambda x, w: x[:, None] @ w[None],
        "each": lambda x, w: x @ w[None],
        "joined": lambda x, w: F.linear(x.transpose(1, 2).flatten(2), w.flatten(0, 1).T),
    },
    "einsum": {
        "apart": lambda x, w: torch.einsum("btd,hde->bhte", x, w),
        "each": lambda x, w: torch.einsum("bhtd,hde->bhte", x, w),
        "joined": lambda x, w: torch.einsum("bhtd,hde->bte", x, w),
    },
    "einsum, heads after tokens": {
        "apart": lambda x, w: torch.einsum("btd,hde->bthe", x, w).transpose(1, 2),
        "each": lambda x, w: torch.einsum("bthd,hde->bthe", x.transpose(1, 2), w).transpose(1, 2),
        "joined": lambda x, w: torch.einsum("hde,bhtd->bte", w, x),
    },
}


def ids() -> Tensor:
    return torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [name for name in SPELLINGS if name != "one layer"])
def test_a_weight_for_each_head_is_a_layer(name: str) -> None:
    plain, found = (PerHead(SPELLINGS[one]).double().eval() for one in ("one layer", name))
    maps = [fastrel.Explainer(m, backend="torch")(ids(), target=1) for m in (plain, found)]
    torch.testing.assert_close(maps[1].relevance, maps[0].relevance, rtol=1e-8, atol=1e-10)
    assert not maps[1].report
    report = fastrel.Explainer(found, backend="torch").verify(ids(), target=1)
    assert report.ok, report
    assert not any("not checked" in check.meaning for check in report.checks), report


class Mixture(nn.Module):
    """An encoder, and a mixture of experts that `mix` computes, of which every token takes the best."""

    def __init__(self, mix: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.router, self.head, self.mix = Encoder(), nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 3), mix
        self.up, self.down = (nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 4) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(EXPERTS, WIDTH) / 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.body(ids)
        return self.head((x + self.mix(self, x)).mean(1))


def every(m: Any, x: Tensor) -> Tensor:
    """All experts, of which the others count nothing."""
    chosen = F.one_hot(m.router(x).argmax(-1), EXPERTS).to(x.dtype)
    found = torch.stack([(x @ m.up[e] + m.bias[e]).relu() @ m.down[e] for e in range(EXPERTS)], 2)
    return (found * chosen[..., None]).sum(2)


def grouped(m: Any, x: Tensor) -> Tensor:
    """Tokens in the order of their experts, as transformers has them."""
    product = torch.ops.transformers.grouped_mm_fallback
    rows = x.flatten(0, 1)
    ordered, order = m.router(rows).argmax(-1).sort()
    ends = torch.histc(ordered.float(), bins=EXPERTS, min=0, max=EXPERTS - 1).cumsum(0, dtype=torch.int32)
    h = (product(rows[order], m.up, ends) + m.bias[ordered]).relu()
    return product(h, m.down, ends)[order.argsort()].view(x.shape)


def test_tokens_grouped_by_their_experts_have_the_map_of_experts_one_by_one() -> None:
    maps = [fastrel.Explainer(Mixture(one).double().eval(), backend="torch")(ids(), target=1) for one in (every, grouped)]
    torch.testing.assert_close(maps[1].logits, maps[0].logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(maps[1].relevance, maps[0].relevance, rtol=1e-8, atol=1e-10)
    assert not maps[1].report


_SMALL = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "num_labels": 3,
    "max_position_embeddings": 64, "pad_token_id": 0, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("Mixtral", torch.float32),
        ("GptOss", torch.float32),
        ("GptOss", torch.bfloat16),
    ],
)
def test_mixtures_of_experts_are_verified(kind: str, dtype: torch.dtype) -> None:
    """GPT-OSS also has sinks in its attention, and experts with a bias."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**_SMALL)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).to(dtype).eval()
    found = torch.randint(5, 100, (2, 9))
    report = fastrel.Explainer(model).verify(input_ids=found, attention_mask=torch.ones_like(found))
    assert report.ok, report
    assert report.blocks == 2
    assert not report.generic
    (relevance,) = (check for check in report.checks if check.name == "relevance")
    assert relevance.value < (1e-5 if dtype == torch.float32 else 2e-2)


def test_the_next_token_of_gpt_oss_is_explained() -> None:
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**_SMALL)).eval()
    found = torch.randint(5, 100, (2, 9))
    explanation = fastrel.Explainer(model).next_token(found)
    assert explanation.relevance.shape == (2, 9)
    assert bool((explanation.relevance.sum(1) > 0).all())


def test_an_expert_that_no_token_chooses_has_no_row() -> None:
    assert divided_row(torch.zeros(1, 0, 1), 0, 4).shape == (1, 0, 4)


class _LastPlace(nn.Module):
    """As nanoGPT's forward returns without targets."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> tuple[Tensor, None]:
        return self.model(input_ids=ids).logits[:, [-1]], None


def test_the_next_token_is_explained_of_logits_of_the_last_place_alone() -> None:
    config = transformers.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=20, n_positions=16, bos_token_id=0, eos_token_id=1
    )
    model, ids = transformers.GPT2LMHeadModel(config).double().eval(), torch.randint(0, 20, (2, 6))
    ours, expected = (fastrel.Explainer(m).next_token(ids, token=3).relevance for m in (_LastPlace(model).eval(), model))
    torch.testing.assert_close(ours, expected)
    explainer = fastrel.Explainer(_LastPlace(model).eval())
    with pytest.raises(fastrel.InputError, match=r"\[2, 1, 20\] for texts of 8 tokens, which lack place 5; let it return"):
        explainer.continuation(ids, ids[:, :2])
