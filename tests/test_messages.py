"""What is said to a call that cannot be right: at most three lines, the value that is wrong, and what to do; nothing on stderr."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import fastrel
from fastrel import metrics
from fastrel.errors import FastrelError
from tests.small import ids, made

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Choosing(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.mean() > 0 else -self.layer(x)


def _lost(m: Any, tokens: Tensor) -> Tensor:
    """Correlations of features over tokens, from which nothing leads back to one token."""
    x = m.encoder(tokens)
    return m.head((x.mT @ x).mean(1))


def _poisoned() -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5).eval()
    nn.init.constant_(model.head.weight, float("nan"))
    return model


def _in_inference() -> nn.Module:
    with torch.inference_mode():
        return Plain().eval()


@pytest.fixture(scope="module")
def a() -> Any:
    """Some models and inputs."""

    class A:
        torch.manual_seed(0)
        vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5).eval()
        bert = transformers.BertForSequenceClassification(
            transformers.BertConfig(**SMALL, max_position_embeddings=16, num_labels=3)
        ).eval()
        gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)).eval()
        two = made(lambda m, p, q: m.wide(torch.cat([m.encoder(p).mean(1), m.second(q).mean(1)], 1)))
        images = torch.randn(2, 3, 32, 32)
        ids = ids(2, 7)
        see, read, go_on = fastrel.Explainer(vit), fastrel.Explainer(bert), fastrel.Explainer(gpt)
        seen, words = see(images, target=1), read(input_ids=ids, target=1)
        pair = fastrel.Explainer(two)(ids, ids, target=1)

    return A


def _with_loss(m: Any, tokens: Tensor) -> Any:
    logits = m.head(m.encoder(tokens)[:, 0])
    return {"loss": logits.sum(), "logits": logits}


def _changed(a: Any) -> None:
    images = a.images.clone()
    prediction = a.see.predict(images)
    images.zero_()
    prediction.explain(1)


def _nan(a: Any, value: float) -> Tensor:
    images = a.images.clone()
    images[1, 0, 3, 4] = value
    return images


def _headless() -> Any:
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=1).eval()


#: A call, and what its message holds: the value, the place, what to do.
CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a class beyond": (lambda a: a.see(a.images, target=99), r"99.*5 classes"),
    "a class of one sample beyond": (lambda a: a.see(a.images, target=[0, 7]), r"7.*5 classes"),
    "a negative class": (lambda a: a.see(a.images, target=-1), r"-1"),
    "too few classes": (lambda a: a.see(a.images, target=[1]), r"\[?1\]?.*2"),
    "a class by name": (lambda a: a.see(a.images, target="cat"), r"cat"),
    "a class that is a float": (lambda a: a.see(a.images, target=1.5), r"1\.5|float"),
    "classes that are floats": (lambda a: a.see(a.images, target=torch.tensor([0.0, 1.0])), r"float"),
    "ragged classes": (lambda a: a.see(a.images, target=[[1, 2], [3]]), r"\[\[1, 2\], \[3\]\]"),
    "classes for three dimensions": (lambda a: a.see(a.images, target=torch.zeros(2, 1, 1, dtype=torch.long)), r"2, 1, 1"),
    "a target that returns a float": (lambda a: a.see(a.images, target=lambda out: 0.5), r"float"),
    "a target that returns classes": (lambda a: a.see(a.images, target=lambda out: out.argmax(1)), r"torch.int64; return scores"),
    "a target that fails": (lambda a: a.see(a.images, target=lambda out: out[:, 99]), r"failed.*Tensor \[2, 5\]: IndexError"),
    "a target of two arguments": (lambda a: a.see(a.images, target=lambda a, b: a), r"target function failed.*missing 1 required"),
    "a map by the explanation": (lambda a: a.seen["x"], r"by sample, not by 'x'; there are the maps x: use .maps"),
    "a model that says it has no classes": (lambda a: fastrel.Explainer(_headless())(a.images), r"not logits: output \[B, 192\]"),
    "a target of another batch": (lambda a: a.see(a.images, target=lambda out: out[:1, 0]), r"1"),
    "a target without gradient": (lambda a: a.see(a.images, target=lambda out: out.detach()[:, 0]), r"depend|gradient"),
    "a target that reads a loss": (
        lambda a: fastrel.Explainer(made(_with_loss))(ids(1), target=lambda out: -out["loss"][None]),
        r"one number for the whole batch.*logits",
    ),
    "an output that is none": (lambda a: a.read.using(output="nope")(input_ids=a.ids), r"nope.*logits"),
    "NaN in a picture": (lambda a: a.see(_nan(a, float("nan"))), r"nan|NaN"),
    "infinity in a picture": (lambda a: a.see(_nan(a, float("inf"))), r"inf"),
    "where the NaN is": (lambda a: a.see(_nan(a, float("nan"))), r"x holds NaN.*sample 1, at \[1, 0, 3, 4\].*mask or replace"),
    "NaN in a weight": (lambda a: fastrel.Explainer(_poisoned())(torch.randn(2, 3, 32, 32)), r"output holds NaN.*weights"),
    "no classes": (lambda a: a.see(a.images, target=[]), r"\[\] holds no classes"),
    "a grid of another size": (lambda a: a.see.using(grid=(9, 9))(a.images, target=1), r"x lie on \(2, 2\), not on grid=\(9, 9\)"),
    "a copy of a prediction": (lambda a: copy.deepcopy(a.see.predict(a.images)), r"copy or pickle its explanation"),
    "a pickled prediction": (lambda a: pickle.dumps(a.see.predict(a.images)), r"copy or pickle its explanation"),
    "a model made in inference mode": (lambda a: fastrel.Explainer(_in_inference())(torch.zeros(2, 4)), r"weight.*inference mode"),
    "a model without numbers": (lambda a: fastrel.Explainer(Plain().to("meta"))(torch.zeros(2, 4)), r"layer\.weight.*meta.*load"),
    "a model that chooses by numbers": (lambda a: fastrel.Explainer(Choosing())(torch.zeros(2, 4)), r"Choosing.*torch\.where"),
    "live that is no switch": (lambda a: fastrel.Explainer(a.vit, live="no"), r"live.*'no'"),
    "four channels": (lambda a: a.see(torch.randn(2, 4, 32, 32)), r"2, 4, 32, 32|4 channels"),
    "a picture without a batch": (lambda a: a.see(a.images[0]), r"3, 32, 32.*x\[None\] is a batch of one"),
    "a class by position": (lambda a: a.see(a.images, 1), r"if the last one is a class, give it as target="),
    "classes by position": (lambda a: a.see(a.images, torch.tensor([0, 1])), r"int64 \[2\].*give it as target="),
    "tokens that are lost": (lambda a: fastrel.Explainer(made(_lost))(ids()), r"tokens through aten.matmul.*target= be a function"),
    "an array": (lambda a: a.see(a.images.numpy()), r"ndarray"),
    "a list of arrays": (lambda a: a.see([np.zeros((3, 32, 32))]), r"ndarray"),
    "another name": (lambda a: a.see(pixels=a.images), r"pixels"),
    "no input": (lambda a: a.see(), r"x|input"),
    "another size": (lambda a: a.see(torch.randn(2, 3, 33, 33)), r"33"),
    "another dtype": (lambda a: a.see(a.images.double()), r"double|float64|Double"),
    "an empty batch": (lambda a: a.see(a.images[:0]), r"0|empty"),
    "a method that is none": (lambda a: fastrel.Explainer(a.vit, "grad_cam"), r"grad_cam.*attention_gradcam"),
    "rules that are none": (lambda a: fastrel.Explainer(a.vit, rules="epsilon"), r"epsilon.*positive"),
    "a backend that is none": (lambda a: fastrel.Explainer(a.vit, backend="cudnn"), r"cudnn.*torch"),
    "a precision that is none": (lambda a: fastrel.Explainer(a.vit, precision="fp8"), r"fp8.*mixed"),
    "a memory that is none": (lambda a: fastrel.Explainer(a.vit, memory="tiny"), r"tiny.*low"),
    "a block that is none": (lambda a: fastrel.Explainer(a.vit, start_layer=9)(a.images), r"9.*1 attention block"),
    "a block that is a flag": (lambda a: fastrel.Explainer(a.vit, start_layer=True), r"True"),
    "a grid of nothing": (lambda a: fastrel.Explainer(a.vit, grid=(0, 3)), r"\(0, 3\)"),
    "a grid of a word": (lambda a: fastrel.Explainer(a.vit, grid="14x14"), r"14x14"),
    "an output that is a float": (lambda a: fastrel.Explainer(a.vit, output=1.5), r"1\.5"),
    "an option that is none": (lambda a: a.see.using(rule="official"), r"rule"),
    "no model": (lambda a: fastrel.Explainer(lambda x: x), r"function|callable|Module"),
    "patches of a text": (lambda a: a.words.patches, r"relevance"),
    "one map of two": (lambda a: a.pair.relevance, r"explanation\.maps\[name\]"),
    "a page without tokens": (lambda a: a.words[0].save("x.html"), r"tokens="),
    "a picture without a picture": (lambda a: a.seen[0].save("x.png"), r"image="),
    "a page of several samples": (lambda a: a.words.save("x.html", tokens=["a"] * 7), r"2 samples.*explanation\[0\]"),
    "too few tokens": (lambda a: a.words[0].save("x.html", tokens=["a"]), r"1 tokens.*7"),
    "too many names": (lambda a: a.words[0].save("x.html", tokens=["a"] * 7, names=["b", "c"]), r"2 names for 1"),
    "a classifier asked for a token": (lambda a: a.read.next_token(a.ids), r"\[B, T, V\].*\(2, 3\)"),
    "a token beyond": (lambda a: a.go_on.next_token(a.ids, token=50), r"50.*0 to 49"),
    "a mask of another shape": (lambda a: a.go_on.next_token(a.ids, attention_mask=torch.ones(2, 3)), r"\(2, 3\).*\(2, 7\)"),
    "a text that is masked away": (lambda a: a.go_on.next_token(a.ids, attention_mask=torch.zeros(2, 7)), r"no token of text 0"),
    "an empty continuation": (lambda a: a.go_on.continuation(a.ids, torch.zeros(2, 0, dtype=torch.long)), r"\(2, 0\)"),
    "ids that are floats": (lambda a: a.go_on.next_token(a.ids.float()), r"float32"),
    "a text beyond the positions": (lambda a: a.read(input_ids=ids(2, 30)), r"30"),
    "ids beyond the vocabulary": (lambda a: a.read(input_ids=a.ids + 60), r"index out of range.*64 to 109"),
    "a model without attention": (lambda a: fastrel.Explainer(Plain())(torch.randn(2, 4)), r"no attention.*captum"),
    "no target for words": (lambda a: a.go_on(input_ids=a.ids), r"\(2, 7, 50\).*target"),
    "an input that changed": (_changed, r"changed in place"),
    "no draws": (lambda a: a.see.noise_floor(a.images, draws=0), r"0"),
    "pixels of a text": (lambda a: a.read.using("integrated_gradients")(input_ids=a.ids, target=1), r"image"),
    "masks of another batch": (lambda a: metrics.pointing_game(torch.rand(3, 4, 4), torch.ones(2, 8, 8)), r"3, 4, 4.*2, 8, 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_is_told_what_is_wrong_and_what_to_do(name: str, a: Any, capfd: pytest.CaptureFixture[str]) -> None:
    call, held = CALLS[name]
    capfd.readouterr()
    with pytest.raises(FastrelError, match=f"(?s){held}") as error:
        call(a)
    message = str(error.value)
    assert len(message.splitlines()) <= 3, message
    assert len(message) < 500, message
    assert capfd.readouterr().err == ""


def test_there_are_fifty() -> None:
    assert len(CALLS) >= 50
