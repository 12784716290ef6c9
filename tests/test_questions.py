"""Which output, which token, on which grid: what a user may ask of a model, and what is asked back."""

import pickle
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import fastrel
from fastrel import InputError


class Classifier(nn.Module):
    """Token ids [B, T] -> whatever `answer` makes of the features [B, D] and two heads."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(30, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.cls, self.attr, self.value = nn.Linear(16, 3), nn.Linear(16, 4), nn.Linear(16, 1)
        self.answer = answer

    def forward(self, ids: Tensor) -> Any:
        return self.answer(self, self.layer(self.embed(ids)).mean(1))


def classifier(answer: Any) -> nn.Module:
    torch.manual_seed(0)
    return Classifier(answer).double().eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(1))


PLAIN = classifier(lambda m, x: m.cls(x))


@pytest.mark.parametrize(
    "answer",
    [
        lambda m, x: (m.cls(x).logsumexp(1).mean(), m.cls(x)),
        lambda m, x: {"loss": x.mean(), "n": 3, "name": "x", "none": None, "scores": m.cls(x)},
        lambda m, x: (x[:, 0], m.cls(x)),
        lambda m, x: {"features": x, "scores": m.cls(x)},
    ],
    ids=["loss first", "numbers, strings, None", "a number per sample first", "features"],
)
def test_logits_are_found_where_there_is_one_candidate(answer: Any, ids: Tensor) -> None:
    expected = fastrel.Explainer(PLAIN)(ids, target=1).relevance
    torch.testing.assert_close(fastrel.Explainer(classifier(answer))(ids, target=1).relevance, expected)


def test_of_several_candidates_it_asks(ids: Tensor) -> None:
    model = classifier(lambda m, x: {"cls": m.cls(x), "attr": m.attr(x)})
    explainer = fastrel.Explainer(model)
    for target in (None, 1):
        with pytest.raises(
            InputError, match=r"cls \[B, 3\], attr \[B, 4\]; say which with Explainer\(model, output=NAME\)"
        ):
            explainer(ids, target=target)
    by_name = explainer.using(output="attr")
    assert by_name(ids).logits.shape == (2, 4)
    by_function = explainer(ids, target=lambda out: out["attr"][:, 3]).relevance
    torch.testing.assert_close(by_name(ids, target=3).relevance, by_function)
    assert by_name.verify(ids, target=3).ok
    with pytest.raises(InputError, match="no output 'clss' to explain; it returns cls"):
        explainer.using(output="clss")(ids)
    pair = fastrel.Explainer(classifier(lambda m, x: (m.cls(x), m.attr(x))), output=1)
    torch.testing.assert_close(pair(ids, target=3).relevance, by_function)


def test_one_number_per_sample_is_explained_as_such(ids: Tensor) -> None:
    column = fastrel.Explainer(classifier(lambda m, x: m.value(x)))(ids, target=0).relevance
    explainer = fastrel.Explainer(classifier(lambda m, x: m.value(x)[:, 0]))
    torch.testing.assert_close(explainer(ids).relevance, column)
    torch.testing.assert_close(explainer(ids, target=lambda out: out).relevance, column)
    assert explainer.verify(ids).ok
    with pytest.raises(InputError, match="target 2 is out of range: the model has 1 classes"):
        explainer(ids, target=2)


def test_features_are_no_logits_but_methods_without_a_class_take_them() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0, global_pool="").eval()
    image = torch.randn(2, 3, 32, 32)
    with pytest.raises(InputError, match="pass target as a function"):
        fastrel.Explainer(model)(image)
    blind = fastrel.Explainer(model, "rollout")(image).relevance
    expected = fastrel.Explainer(model, "rollout")(image, target=lambda out: out.sum((1, 2))).relevance
    torch.testing.assert_close(blind, expected)


def test_a_grid_that_cannot_be_read_off_the_model_is_given() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Linear(5, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.cls, self.head = nn.Parameter(torch.randn(1, 1, 16)), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = torch.cat([self.cls.expand(len(x), -1, -1), self.embed(x)], 1)
            return self.head(self.layer(tokens)[:, 0])

    torch.manual_seed(0)
    model, x = Patches().eval(), torch.randn(2, 12, 5)
    explainer = fastrel.Explainer(model)
    assert explainer(x).grid is None
    found = explainer.using(grid=(3, 4))(x, target=[[0, 1], [1, 2]])
    torch.testing.assert_close(found.patches.flatten(2), found.relevance[..., 1:])
    assert found.heatmap((6, 8)).shape == (2, 2, 6, 8)
    assert explainer.using(grid=(2, 2, 3))(x).heatmap((4, 6)).shape == (2, 2, 4, 6)
    for wrong in ((3,), (3, 0), "3x4", (3.0, 4)):
        with pytest.raises(InputError, match="grid must be"):
            fastrel.Explainer(model, grid=wrong)


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config).double().eval()


class HomeMade(nn.Module):
    """A language model as tutorials write it: its ids are not called input_ids, and it returns (logits, loss)."""

    def __init__(self, gpt2: nn.Module) -> None:
        super().__init__()
        self.gpt2 = gpt2

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self.gpt2(idx, use_cache=False).logits, None


def test_home_made_language_models_are_asked_like_others(gpt2: nn.Module) -> None:
    ids = torch.randint(0, 50, (2, 6))
    ours, theirs = fastrel.Explainer(HomeMade(gpt2)), fastrel.Explainer(gpt2)
    torch.testing.assert_close(ours.next_token(ids, token=4).relevance, theirs.next_token(ids, token=4).relevance)
    found = ours.continuation(ids, torch.tensor([[4, 5], [6, 7]]))
    torch.testing.assert_close(found.relevance, theirs.continuation(ids, torch.tensor([[4, 5], [6, 7]])).relevance)


def test_the_default_is_frozen_attribution_and_the_papers_method_by_other_rules(gpt2: nn.Module) -> None:
    ids = torch.randint(3, 50, (2, 6))
    plain, frozen, chosen = (
        fastrel.Explainer(gpt2, method) for method in (None, "frozen_attribution", "transformer_attribution")
    )
    found = {one: one.next_token(ids, token=4).relevance for one in (plain, frozen, chosen)}
    assert torch.equal(found[plain], found[frozen])
    assert not torch.allclose(found[plain], found[chosen])
    again = pickle.loads(pickle.dumps(plain))
    assert torch.equal(again.next_token(ids, token=4).relevance, found[plain])
    by_target = chosen(input_ids=ids, target=lambda out: out.logits[:, -1, 4]).relevance
    torch.testing.assert_close(plain.using("transformer_attribution").next_token(ids, token=4).relevance, by_target)
    assert torch.equal(plain(input_ids=ids, target=lambda out: out.logits[:, -1, 4]).relevance, found[plain])
    assert plain.using(rules="official").method == chosen.method
    assert frozen.using(rules="official").method == frozen.method


def test_the_next_token_is_explained(gpt2: nn.Module) -> None:
    explainer, prompt = fastrel.Explainer(gpt2, "frozen_attribution"), torch.randint(3, 50, (2, 6))
    likely = gpt2(prompt).logits[:, -1].argmax(1)
    found = explainer.next_token(prompt)
    assert found.target is not None
    assert found.target.tolist() == likely.tolist()
    by_function = explainer(input_ids=prompt, target=lambda out: out.logits[:, -1].gather(1, likely[:, None])[:, 0])
    torch.testing.assert_close(found.relevance, by_function.relevance)
    two = explainer.next_token(prompt, token=[[4, 5], [6, 7]])
    torch.testing.assert_close(two.relevance[1, 1], explainer.next_token(prompt, token=7).relevance[1])
    rather = explainer.next_token(prompt, token=4, against=5).relevance
    contrast = explainer(input_ids=prompt, target=lambda out: out.logits[:, -1, 4] - out.logits[:, -1, 5]).relevance
    torch.testing.assert_close(rather, contrast)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_map(gpt2: nn.Module, side: str) -> None:
    explainer, prompt = fastrel.Explainer(gpt2), torch.randint(3, 50, (2, 6))
    pad = (2, 0) if side == "left" else (0, 2)
    ids, mask = F.pad(prompt, pad), F.pad(torch.ones_like(prompt), pad)
    found, alone = explainer.next_token(ids, attention_mask=mask), explainer.next_token(prompt)
    torch.testing.assert_close(found.relevance[:, mask[0].bool()], alone.relevance)
    assert found.target is not None
    generated = gpt2.generate(prompt, max_new_tokens=1, do_sample=False, pad_token_id=0)[:, -1]
    assert found.target.tolist() == generated.tolist()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = explainer.next_token(ids, attention_mask=mask, position_ids=positions)
    assert torch.equal(given.relevance, found.relevance) or side == "right"


def test_positions_that_a_model_finds_in_its_ids_are_left_to_it() -> None:
    """RoBERTa counts from its padding's id on."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50, is_decoder=True
    )
    explainer = fastrel.Explainer(transformers.RobertaForCausalLM(config).double().eval())
    prompt = torch.randint(3, 50, (2, 5))
    ids, mask = F.pad(prompt, (2, 0), value=config.pad_token_id), F.pad(torch.ones_like(prompt), (2, 0))
    found = explainer.next_token(ids, attention_mask=mask, token=7).relevance
    torch.testing.assert_close(found[:, 2:], explainer.next_token(prompt, token=7).relevance)


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_the_answer_of_an_encoder_decoder_is_explained_token_by_token(kind: str) -> None:
    torch.manual_seed(0)
    sizes = {
        "T5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
        "Bart": {
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
        },
    }
    config = getattr(transformers, f"{kind}Config")(
        **sizes[kind],
        vocab_size=50,
        decoder_start_token_id=0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        forced_eos_token_id=None,
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).double().eval()
    explainer, ids = fastrel.Explainer(model), torch.randint(3, 50, (2, 6))
    after = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)[:, 1:]
    found = explainer.continuation(ids, after)
    assert {name: tuple(one.relevance.shape) for name, one in found.maps.items()} == {
        "input_ids": (2, 3, 6),
        "decoder_input_ids": (2, 3, 3),
    }
    for n in range(3):
        read = F.pad(after[:, :n], (1, 0))
        alone = explainer.next_token(ids, decoder_input_ids=read)
        assert alone.target is not None
        assert torch.equal(alone.target, after[:, n])
        assert not found.maps["decoder_input_ids"].relevance[:, n, n + 1 :].any()
        for name, length in (("input_ids", 6), ("decoder_input_ids", n + 1)):
            torch.testing.assert_close(found.maps[name].relevance[:, n, :length], alone.maps[name].relevance)
    assert explainer.next_token(ids).target.tolist() == after[:, 0].tolist()  # type: ignore[union-attr]


def test_a_continuation_takes_one_forward_pass_for_all_its_tokens(gpt2: nn.Module) -> None:
    explainer, prompt, after = fastrel.Explainer(gpt2), torch.randint(3, 50, (2, 5)), torch.tensor([[8, 9], [10, 11]])
    found = explainer.continuation(prompt, after)
    assert found.relevance.shape == (2, 2, 7)
    assert found.target is not None
    assert found.target.tolist() == after.tolist()
    first, second = (
        explainer.next_token(torch.cat([prompt, after[:, :n]], 1), token=after[:, n]).relevance for n in range(2)
    )
    torch.testing.assert_close(found.relevance[:, 0, :5], first)
    torch.testing.assert_close(found.relevance[:, 1, :6], second)
    assert not found.relevance[:, 0, 5:].any()
    with pytest.raises(InputError, match="pad them on the left"):
        explainer.continuation(prompt, after, attention_mask=torch.tensor([[1, 1, 1, 1, 0]] * 2))


def test_what_is_no_token_is_refused(gpt2: nn.Module) -> None:
    explainer, prompt = fastrel.Explainer(gpt2), torch.randint(3, 50, (2, 6))
    for given, message in (
        ({"token": 50}, "token holds 50, and the model has 50 tokens"),
        ({"token": "the"}, "token must be token ids, not 'the'"),
        ({"token": 0.5}, "token must be a token id"),
        ({"token": [1, 2, 3]}, r"\[2\] or \[2, K\] ids"),
        ({"attention_mask": torch.ones(2, 5)}, "does not fit input_ids"),
        ({"attention_mask": torch.zeros(2, 6)}, "leaves no token of text 0"),
    ):
        with pytest.raises(InputError, match=message):
            explainer.next_token(prompt, **given)


@pytest.mark.parametrize("weight", [1e-4, 1.0, 1e4])
def test_numbers_beside_a_text_count_by_their_relevance(weight: float) -> None:
    """Joined with what attention made, they are no part of its block: their share follows the head's weights."""

    class Beside(Classifier):
        def forward(self, ids: Tensor, numbers: Tensor) -> Any:  # type: ignore[override]
            x = self.layer(self.embed(ids))[:, 0]
            return self.cls(torch.cat([x[:, :8], weight * numbers.relu()], 1))

    torch.manual_seed(0)
    model = Beside(None).double().eval()
    given = torch.randint(0, 30, (2, 7)), torch.rand(2, 8, dtype=torch.double) + 0.5
    maps = fastrel.Explainer(model)(*given, target=1).maps
    whole = sum(one.relevance.sum(1) for one in maps.values())
    share = maps["numbers"].relevance.sum(1) / whole
    low, high = {1e-4: (0.0, 0.01), 1.0: (0.01, 0.99), 1e4: (0.99, 1.0)}[weight]
    assert bool((share >= low).all())
    assert bool((share <= high + 1e-9).all())


class Last(nn.Module):
    """Ids and mask [B, T] -> logits of the last token, as `read` finds it."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.read = nn.Embedding(30, 16), nn.Linear(16, 3), read
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.layer(self.embed(ids), src_key_padding_mask=mask == 0)
        return self.head(self.read(x, mask))


def _at_last(x: Tensor, mask: Tensor) -> Tensor:
    return F.one_hot(mask.sum(1) - 1, x.shape[1]).to(x.dtype)


@pytest.mark.parametrize(
    "read",
    [
        lambda x, mask: (_at_last(x, mask)[:, None] @ x).squeeze(1),
        lambda x, mask: torch.bmm(_at_last(x, mask)[:, None], x)[:, 0],
        lambda x, mask: (_at_last(x, mask)[:, :, None] * x).sum(1),
        lambda x, mask: (F.one_hot(mask.sum(1) - 1, 7).to(x.dtype)[:, None] @ x).squeeze(1),
    ],
    ids=["product", "bmm", "weighted sum", "a length in Python"],
)
def test_the_last_token_is_found_by_one_hot_codes(read: Any, ids: Tensor) -> None:
    mask = (torch.arange(7) < torch.tensor([[7], [4]])).long()
    plain = Last(lambda x, mask: x[torch.arange(x.shape[0]), mask.sum(1) - 1]).double().eval()
    expected = fastrel.Explainer(plain)(ids, mask, target=1).relevance
    found = fastrel.Explainer(Last(read).double().eval())(ids, mask, target=1).relevance
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not found[1, 4:].any()
