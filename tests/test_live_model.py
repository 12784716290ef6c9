"""The model as it is at the moment of the call, or a refusal: guards, changes, threads, versions, ambient modes."""

import collections
import contextlib
import copy
import dataclasses
import io
import logging
import os
import pickle
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrel
import fastrel.methods
from fastrel import engine
from fastrel.graph import fingerprint
from tests.small import EXAMPLES, ids, made, remembered

EXACT = 1e-12


class Attention(nn.Module):
    """Plain self-attention with a residual connection."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads
        self.norm, self.act = nn.LayerNorm(width), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.act(self.out(mixed.transpose(1, 2).flatten(2)))


class Small(nn.Module):
    """Embedding, attention, mean, head, and something in between that subclasses say."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.attention, self.head = nn.Linear(5, 8), Attention(), nn.Linear(8, 4)
        self.double().eval()

    def between(self, h: Tensor) -> Tensor:
        return h

    def forward(self, t: Tensor) -> Tensor:
        return self.head(self.between(self.attention(self.embed(t))).mean(1))


def tokens(batch: int = 2, length: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def off(explainer: fastrel.Explainer, model: nn.Module, *inputs: Tensor) -> float:
    """How far the explainer's logits are from the live model's."""
    with torch.no_grad():
        expected = model(*inputs)
    return float((explainer(*inputs).logits - expected).abs().max())


# Where a graph is valid (guards).

BRANCHES: dict[str, tuple[Callable[[Tensor], Tensor], list[tuple[int, int]]]] = {
    "B == 1": (lambda h: h * 2 if h.shape[0] == 1 else h, [(1, 8), (2, 8), (3, 8), (1, 8)]),
    "B == 1, seen second": (lambda h: -h if h.shape[0] == 1 else h, [(2, 8), (1, 8), (1, 6), (4, 6)]),
    "B == 2": (lambda h: h * 2 if h.shape[0] == 2 else h, [(1, 8), (2, 8), (3, 8)]),
    "B * T > 40": (lambda h: h * 2 if h.shape[0] * h.shape[1] > 40 else h, [(2, 8), (6, 8), (2, 30), (1, 41)]),
    "B % 2": (lambda h: -h if h.shape[0] % 2 else h, [(2, 8), (3, 8), (4, 8), (1, 8)]),
    "T % 2": (lambda h: -h if h.shape[1] % 2 else h, [(2, 8), (2, 7), (2, 10), (2, 9)]),
    "T == 8": (lambda h: -h if h.shape[1] == 8 else h, [(2, 7), (2, 8), (2, 9)]),
    "T == 8, captured there": (lambda h: -h if h.shape[1] == 8 else h, [(2, 8), (2, 7), (2, 12)]),
    "T > 12": (lambda h: h * 2 if h.shape[1] > 12 else h, [(2, 8), (2, 13), (2, 12)]),
    "B == T": (lambda h: h * 3 if h.shape[0] == h.shape[1] else h, [(2, 8), (8, 8), (4, 4), (4, 5)]),
    "a Python number of a size": (lambda h: h / int(h.shape[1] ** 0.5), [(2, 9), (2, 16), (2, 17), (2, 4)]),
    "a loop over a size": (lambda h: h + sum(0.1 * i for i in range(h.shape[1])), [(2, 3), (2, 5), (2, 4)]),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_graph_is_used_only_where_it_is_valid(name: str) -> None:
    branch, sizes = BRANCHES[name]

    class Branching(Small):
        def between(self, h: Tensor) -> Tensor:
            return branch(h)

    model = Branching()
    explainer = fastrel.Explainer(model)
    for batch, length in sizes:
        x = tokens(batch, length)
        assert off(explainer, model, x) < EXACT, (batch, length)
        assert explainer(x).relevance.shape == (batch, length)


def test_a_model_that_pads_odd_lengths_is_captured_for_each_parity() -> None:
    class Padding(Small):
        def forward(self, t: Tensor) -> Tensor:
            if t.shape[1] % 2:
                t = F.pad(t, (0, 0, 0, 1))
            return super().forward(t)

    model = Padding()
    explainer = fastrel.Explainer(model)
    for length in (7, 8, 9, 10):
        assert off(explainer, model, tokens(2, length)) < EXACT


def test_relations_between_two_inputs_are_conditions() -> None:
    class Two(Small):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            h = torch.cat((a, b), 1)
            return super().forward(h if a.shape[1] < b.shape[1] else -h)

    model = Two()
    explainer = fastrel.Explainer(model)
    for left, right in ((3, 6), (6, 3), (4, 4), (2, 9)):
        assert off(explainer, model, tokens(2, left), tokens(2, right)) < EXACT


def test_a_batch_of_one_is_compared_and_not_assumed() -> None:
    """One capture serves both, once a batch of one was seen to be treated alike."""
    model = Small()
    explainer = fastrel.Explainer(model)
    for batch in (1, 3, 1, 2):
        assert off(explainer, model, tokens(batch)) < EXACT
    assert len(explainer._engine._entries) == 1


# What a graph is of (fingerprint).


class Wide(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Configured:
    """An object of options, as Hugging Face models have."""

    def __init__(self) -> None:
        self.scale, self.nested = 1.0, {"factors": [1.0, 2.0]}


SCALE = 1.0


def helper(h: Tensor) -> Tensor:
    return h * SCALE


class Living(Small):
    """Everything about it may change."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.flag, self.mode = 1.0, False, "plain"
        self.shift = torch.zeros(8, dtype=torch.float64)
        self.table = {"shift": torch.zeros(8, dtype=torch.float64)}
        self.config = Configured()
        self.extra = nn.ModuleList([])
        self.adapter = nn.Linear(8, 8).double()
        self.second = nn.Linear(8, 4).double()
        self.second.weight = self.head.weight
        self.later: Any = None

    def between(self, h: Tensor) -> Tensor:
        for block in self.extra:
            h = block(h)
        h = h + self.adapter(h) if self.flag else h
        h = h if self.mode == "plain" else -h
        h = h * self.config.scale * self.config.nested["factors"][0] * self.factor + self.shift + self.table["shift"]
        h = h if self.later is None else h * self.later
        return helper(h) / self.temperature

    def forward(self, t: Tensor) -> Tensor:
        h = self.between(self.attention(self.embed(t))).mean(1)
        return self.head(h) + self.second(h)


def _set(owner: Callable[[Living], Any], name: str, value: Any) -> Callable[[Living], None]:
    return lambda model: setattr(owner(model), name, value() if isinstance(value, type(lambda: 0)) else value)


def _in_place(model: Living) -> None:
    with torch.no_grad():
        model.shift += 1


def _hooked(model: Living) -> None:
    model.attention.register_forward_hook(lambda module, args, out: out * 0.5)


def _pre_hooked(model: Living) -> None:
    model.attention.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def _wrapped(model: Living) -> None:
    plain = model.forward
    model.forward = lambda t: 3 * plain(t)  # type: ignore[method-assign]


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _parametrised(model: Living) -> None:
    nn.utils.parametrize.register_parametrization(model.embed, "weight", Doubled())


def _pruned(model: Living) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(model.embed, "weight", 0.5)


CHANGES: dict[str, Callable[[Living], None]] = {
    "a flag": _set(lambda m: m, "flag", True),
    "a string": _set(lambda m: m, "mode", "minus"),
    "a number": _set(lambda m: m, "temperature", -2.0),
    "an option of a config object": _set(lambda m: m.config, "scale", 3.0),
    "an entry deep in a config": lambda m: m.config.nested["factors"].__setitem__(0, 5.0),
    "a tensor attribute, replaced": _set(lambda m: m, "shift", lambda: torch.ones(8, dtype=torch.float64)),
    "a tensor attribute, in place": _in_place,
    "a tensor in a dict, replaced": lambda m: m.table.__setitem__("shift", torch.ones(8, dtype=torch.float64)),
    "None becomes a tensor": _set(lambda m: m, "later", lambda: torch.full((8,), 2.0, dtype=torch.float64)),
    "a block appended": lambda m: m.extra.append(Attention().double()),
    "an activation swapped": _set(lambda m: m.attention, "act", nn.ReLU()),
    "a layer replaced by a subclass": _set(lambda m: m, "head", lambda: Wide(8, 4).double()),
    "a layer replaced by Identity": _set(lambda m: m.attention, "norm", nn.Identity()),
    "a class swapped": _set(lambda m: m.head, "__class__", Wide),
    "a forward hook": _hooked,
    "a forward pre-hook": _pre_hooked,
    "forward wrapped": _wrapped,
    "the number of heads": _set(lambda m: m.attention, "heads", 4),
    "weights untied": lambda m: setattr(m.second, "weight", nn.Parameter(torch.randn(4, 8, dtype=torch.float64))),
    "weights tied elsewhere": lambda m: setattr(m.adapter, "weight", m.attention.out.weight),
    "weights in place": lambda m: m.head.weight.data.mul_(2),
    "weights' data replaced": lambda m: setattr(m.head.weight, "data", torch.randn(4, 8, dtype=torch.float64)),
    "more classes": _set(lambda m: m, "second", lambda: nn.Linear(8, 4).double()),
    "a parametrisation": _parametrised,
    "a pruning mask": _pruned,
    "state loaded": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),  # type: ignore[func-returns-value]
}


@pytest.fixture(scope="module")
def as_made() -> Callable[..., Any]:
    """`capture` of `Living()` as it is made."""
    return remembered()


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_changed_is_explained_as_it_is_now(
    name: str, as_made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Living(), tokens()
    explainer = fastrel.Explainer(model)
    monkeypatch.setattr(engine, "capture", as_made)
    assert off(explainer, model, x) < EXACT
    monkeypatch.setattr(engine, "capture", remembered())
    with torch.no_grad():
        before = model(x)
        CHANGES[name](model)
        moved = (model(x) - before).abs().max()
    assert off(explainer, model, x) < EXACT
    if name != "weights tied elsewhere":  # the adapter is off
        assert moved > 1e-6
    expected = fastrel.Explainer(model)(x).relevance
    assert (explainer(x).relevance - expected).abs().max() < EXACT


def test_what_the_code_reads_from_around_it_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Globals, class attributes, methods of classes, closures."""
    model, x = Living(), tokens()
    explainer = fastrel.Explainer(model)
    assert off(explainer, model, x) < EXACT
    monkeypatch.setattr(f"{__name__}.SCALE", 3.0)
    assert off(explainer, model, x) < EXACT
    monkeypatch.setattr(Living, "factor", 2.0)
    assert off(explainer, model, x) < EXACT
    monkeypatch.setattr(Attention, "forward", lambda self, h: self.out(self.norm(h)) + h, raising=True)
    with pytest.raises(fastrel.UnsupportedModelError, match="no attention"):
        explainer(x)


def test_a_closure_that_changed_is_seen() -> None:
    factor = 1.0

    class Closing(Small):
        def between(self, h: Tensor) -> Tensor:
            return h * factor

    model, x = Closing(), tokens()
    explainer = fastrel.Explainer(model)
    assert off(explainer, model, x) < EXACT
    factor = 4.0
    assert off(explainer, model, x) < EXACT


def test_lora_adapters_may_be_switched_merged_and_added() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv", "out"], init_lora_weights=False)
    model, x = peft.get_peft_model(Small(), config).double().eval(), tokens()
    explainer = fastrel.Explainer(model)
    assert off(explainer, model, x) < EXACT
    with model.disable_adapter():
        assert off(explainer, model, x) < EXACT
    assert off(explainer, model, x) < EXACT
    model.add_adapter("other", config)
    model.double().set_adapter("other")
    assert off(explainer, model, x) < EXACT
    model.merge_adapter()
    assert off(explainer, model, x) < EXACT
    model.unmerge_adapter()
    assert off(explainer, model, x) < EXACT


def test_a_change_that_means_nothing_captures_nothing() -> None:
    model, x = Living(), tokens()
    explainer = fastrel.Explainer(model)
    explainer(x)
    model.train()
    model.temperature = float("1.0")
    model.head.weight = nn.Parameter(model.head.weight.detach() * 2)
    model.second.weight = model.head.weight
    model.eval()
    assert off(explainer, model, x) < EXACT
    assert len(explainer._engine._entries) == 1


def test_attributes_that_the_model_writes_itself_are_no_change() -> None:
    class Recording(Small):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[Tensor] = []
            self.attention.register_forward_hook(lambda module, args, out: self.kept.append(out))

    model, x = Recording(), tokens()
    explainer = fastrel.Explainer(model)
    for _ in range(3):
        with torch.no_grad():
            model(x)
        explainer(x)
    assert len(explainer._engine._entries) <= 2
    assert float(model.kept[-1].sum()) == float(model.kept[-1].sum())  # a tensor with values, not a tracer's


def test_live_false_trusts() -> None:
    model, x = Living(), tokens()
    explainer = fastrel.Explainer(model, live=False)
    before = explainer(x).logits
    model.temperature = 2.0
    assert torch.equal(explainer(x).logits, before)
    explainer.reset()
    assert off(explainer, model, x) < EXACT


def test_the_fingerprint_of_a_large_model_is_cheap() -> None:
    """Counted, not timed: comparisons of objects, no description of the model."""
    import timm

    model = timm.create_model("vit_base_patch16_224", depth=12, embed_dim=48, num_heads=3)
    kept = fingerprint.Fingerprint(model)
    described = fingerprint._Meaning.of
    calls = []

    def counted(self: Any, x: Any) -> Any:
        calls.append(x)
        return described(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint._Meaning, "of", counted)
        assert kept.matches()
        assert not calls
        model.blocks[3].mlp.act = nn.ReLU()
        assert not kept.matches()
        assert calls


# One comparison with the model.


def test_a_capture_that_is_not_the_model_is_an_error_that_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrel import engine
    from fastrel.graph.capture import capture

    def wrong(*args: Any) -> Any:
        captured = capture(*args)
        for node in captured.graph.nodes:
            if node.target is torch.ops.aten.gelu.default:
                node.target = torch.ops.aten.relu.default
        return captured

    monkeypatch.setattr(engine, "capture", wrong)
    with pytest.raises(fastrel.CaptureError, match=r"not the model: output 0 is off by .*'attention.act' \(GELU\)"):
        fastrel.Explainer(Small())(tokens())


def test_a_model_that_is_random_in_eval_mode_is_refused() -> None:
    class Random(Small):
        def between(self, h: Tensor) -> Tensor:
            return F.dropout(h, 0.5)

    with pytest.raises(fastrel.CaptureError, match="differs from call to call"):
        fastrel.Explainer(Random())(tokens())


def test_outputs_that_hold_attention_products_keep_their_shape() -> None:
    """Rewrites of the graph must not change what the model returns."""

    class Returning(nn.Module):
        def __init__(self, einsum: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv, self.head, self.einsum = nn.Linear(8, 24), nn.Linear(8, 3), einsum

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            if self.einsum:
                mixed = torch.einsum("bhqk,bhkd->bhqd", (q @ k.mT).softmax(-1), v)
                return self.head((x + mixed.transpose(1, 2).flatten(2)).mean(1)), mixed
            q, k, v = (a.flatten(0, 1) for a in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v)
            return self.head((x + mixed.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)).mean(1)), mixed

    for einsum in (False, True):
        model, x = Returning(einsum).double().eval(), torch.randn(2, 7, 8, dtype=torch.float64)
        output = fastrel.Explainer(model)(x, target=1).output
        assert torch.allclose(output[1], model(x)[1])


# Predict first, explain later.


@pytest.mark.parametrize("what", ["weights", "buffer", "input", "logits", "weights.data", "array"])
def test_what_changed_since_the_prediction_is_refused(what: str) -> None:
    model, x = Living(), tokens()
    model.register_buffer("bias", torch.zeros(8, dtype=torch.float64))
    array = x.numpy()
    prediction = fastrel.Explainer(model).predict(x)
    with torch.no_grad():
        {
            "weights": lambda: model.head.weight.mul_(-1.3),
            "buffer": lambda: model.shift.add_(1),
            "input": lambda: x.zero_(),
            "logits": lambda: prediction.logits.neg_(),
            "weights.data": lambda: model.head.weight.data[:, ::2].zero_(),
            "array": lambda: array.fill(0),
        }[what]()
    names = {"weights": "head.weight", "buffer": "shift", "input": "t", "logits": "the output"}
    name = {**names, "weights.data": "head.weight", "array": "t"}[what]
    with pytest.raises(fastrel.InputError, match=f"{name} changed in place since the prediction"):
        prediction.explain(1)


def test_a_large_weight_written_to_through_data_since_the_prediction_is_refused() -> None:
    model, x = nn.Sequential(Small(), nn.Linear(4, 40_000), nn.Linear(40_000, 3)).double().eval(), tokens()
    explainer = fastrel.Explainer(model, "input_x_gradient")
    for change in (lambda w: w.mul_(-1), lambda w: w[:, 1::2].zero_()):
        prediction = explainer.predict(x)
        change(model[2].weight.data)
        with pytest.raises(fastrel.InputError, match=r"2\.weight changed in place"):
            prediction.explain(1)


# Options.


def test_options_are_frozen_and_using_keeps_what_it_is_not_told_to_change() -> None:
    explainer = fastrel.Explainer(Small(), rules="official", start_layer=-1, memory="low", backend="torch")
    with pytest.raises(AttributeError):
        explainer.rules = "positive"  # type: ignore[misc]
    other = explainer.using("rollout")
    assert (other.method.name, other.rules, other.method.start_layer, other.memory) == ("rollout", "official", -1, "low")
    assert other.backend == "torch"
    assert explainer.method.name == "transformer_attribution"
    assert explainer.using(rules="positive").method.name == "frozen_attribution"
    assert explainer.using(start_layer=None).method.start_layer == 0
    with pytest.raises(fastrel.InputError, match="unknown option 'layer'"):
        explainer.using(layer=3)
    with pytest.raises(fastrel.InputError, match="precision 'mixed' needs rules='positive'"):
        fastrel.Explainer(Small(), precision="mixed").using(rules="official")


def test_explainers_that_share_a_capture_explain_with_their_own_options() -> None:
    model, x = Small(), tokens()
    shared = fastrel.Explainer(model)
    for changes in ({"rules": "official"}, {"normalize_rollout": True}, {"start_layer": -1}, {"memory": "low"}):
        alone = fastrel.Explainer(model, **changes)(x, target=2).relevance
        assert torch.equal(shared.using(**changes)(x, target=2).relevance, alone)
    assert len(shared._engine._entries) == 1


@pytest.mark.parametrize("value", [1.5, "1", True])
def test_a_start_layer_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(fastrel.InputError, match="start_layer must be an int"):
        fastrel.Explainer(Small(), start_layer=value)


# Light, and travelling.


def test_explanations_and_explainers_pickle_copy_and_save() -> None:
    model, x = Small(), tokens(4)
    explainer = fastrel.Explainer(model, "rollout", start_layer=0)
    explanation = explainer.predict(x).explain([1, 2, 3, 0])
    for again in (pickle.loads(pickle.dumps(explanation)), copy.deepcopy(explanation)):
        assert torch.equal(again.relevance, explanation.relevance)
    saved = io.BytesIO()
    torch.save(explanation, saved)
    other = pickle.loads(pickle.dumps(explainer))
    assert torch.equal(other(x).relevance, explainer(x).relevance)
    assert copy.deepcopy(explainer).method == explainer.method

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.explainer = model, explainer

        def forward(self, t: Tensor) -> Tensor:
            return self.inner(t)

    holder = Holder()
    copied = copy.deepcopy(holder)
    holding = fastrel.Explainer(holder)
    for _ in range(3):
        assert torch.equal(holding(x).relevance, fastrel.Explainer(copied)(x).relevance)
    assert len(holding._engine._entries) == 1


def test_a_kept_sample_holds_neither_its_batch_nor_the_inputs_nor_the_model() -> None:
    import gc

    model, x = Small(), tokens(64)
    explanation = fastrel.Explainer(model)(x)[3]
    size = sum(t.untyped_storage().nbytes() for t in (explanation.relevance, explanation.logits, explanation.output))
    assert size <= 8 * (8 + 4 + 4)
    assert len(pickle.dumps(explanation)) < 4000
    gone = weakref.ref(x), weakref.ref(model)
    del x, model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_samples_slices_devices_and_print() -> None:
    explanation = fastrel.Explainer(Small())(tokens(4), target=[0, 1, 2, 3])
    assert [len(one) for one in explanation] == [1, 1, 1, 1]
    assert explanation[1:3].target.tolist() == [1, 2]
    assert torch.equal(explanation[-1].relevance, explanation.relevance[3:])
    assert explanation.cpu().to(torch.float32).relevance.dtype == torch.float32
    assert repr(explanation) == "Explanation(target=[0, 1, 2, 3], maps={t: (4, 8)})"
    with pytest.raises(IndexError):
        explanation[4]


# Bounded.


def test_captures_are_bounded_and_many_of_them_are_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CAPTURES", 3)
    monkeypatch.setattr(engine, "MANY", 3)

    class Warm(Small):
        def forward(self, t: Tensor, temperature: float) -> Tensor:
            return super().forward(t) / temperature

    model, x = Warm(), tokens()
    explainer = fastrel.Explainer(model)
    with caplog.at_level(logging.WARNING, "fastrel"):
        for i in range(engine.CAPTURES + 2):
            assert off_with(explainer, model, x, 1.0 + i) < EXACT
    assert len(explainer._engine._entries) == engine.CAPTURES
    assert sum("was captured" in record.message for record in caplog.records) == 1
    explainer.reset()
    assert not explainer._engine._entries


def off_with(explainer: fastrel.Explainer, model: nn.Module, x: Tensor, temperature: float) -> float:
    with torch.no_grad():
        return float((explainer(x, temperature).logits - model(x, temperature)).abs().max())


def test_prepare_captures_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    explainer = fastrel.Explainer(Small())
    explainer.prepare(tokens(4))
    monkeypatch.setattr("fastrel.engine.capture", None)
    monkeypatch.setattr("fastrel.engine.transform", None)
    assert explainer(tokens(4)).relevance.shape == (4, 8)


# Threads, and what is left behind.


def state() -> tuple[Any, ...]:
    """Process-wide switches that a capture could leave changed."""
    names = ("torch.export", "torch._export", "torch.fx", "torch._dynamo", "torch._subclasses")
    loggers = tuple((log.level, log.propagate, tuple(log.handlers)) for log in map(logging.getLogger, names))
    return torch.backends.mha.get_fastpath_enabled(), loggers, tuple(warnings.filters), torch.is_grad_enabled()


#: How often 8 models are first explained in 8 threads at once; before a release 15 times.
ROUNDS = max(3, EXAMPLES // 20)


def in_threads(work: list[Callable[[], None]]) -> list[BaseException]:
    errors: list[BaseException] = []

    def guarded(one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.slow
def test_many_models_in_many_threads_while_they_predict_elsewhere() -> None:
    """First calls at once, eager predictions of the same models meanwhile: no error, every value right."""
    before, x = state(), tokens(3)
    models = [Small() for _ in range(8)]
    for i, model in enumerate(models):
        with torch.no_grad():
            model.head.weight.mul_(i + 1)
    with torch.no_grad():
        expected = [model(x) for model in models]
    maps = [fastrel.Explainer(model)(x, target=1).relevance for model in models]
    done = threading.Event()

    def explain(i: int) -> None:
        explanation = fastrel.Explainer(models[i])(x, target=1)
        assert torch.allclose(explanation.logits, expected[i], rtol=1e-10)
        assert torch.allclose(explanation.relevance, maps[i], rtol=1e-10)

    def predict(i: int) -> None:
        while not done.is_set():
            with torch.no_grad():
                assert torch.allclose(models[i](x), expected[i], rtol=1e-10)
            time.sleep(0.05)  # lest the others wait for Python alone

    for _ in range(ROUNDS):
        done.clear()
        meanwhile: list[BaseException] = []
        watcher = threading.Thread(
            target=lambda found=meanwhile: found.extend(in_threads([partial(predict, i) for i in range(8)]))
        )
        watcher.start()
        errors = in_threads([partial(explain, i) for i in range(8)])
        done.set()
        watcher.join()
        assert not errors, errors
        assert not meanwhile, meanwhile
    assert state() == before


def test_a_model_in_training_elsewhere_keeps_its_mode() -> None:
    model = Small().train()
    seen: set[bool] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.add(model.attention.training)

    watcher = threading.Thread(target=look)
    watcher.start()
    fastrel.Explainer(model)(tokens())
    done.set()
    watcher.join()
    assert seen == {True}


GAINS: dict[int, float] = {}
BY_MODULE: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()


class ById(Small):
    def between(self, h: Tensor) -> Tensor:
        return h * GAINS.get(id(self), 1.0)


class ByModule(Small):
    def between(self, h: Tensor) -> Tensor:
        return h * BY_MODULE.get(self, 1.0)


def hooked() -> Small:
    model = Small()
    model.head.register_forward_hook(lambda module, args, out: out * 2 if module is model.head else out)
    return model


@pytest.mark.parametrize("make", [ById, ByModule, hooked])
@pytest.mark.parametrize("training", ["not", "all", "one module"])
def test_code_that_tells_modules_from_copies_of_them_is_never_explained_by_a_copy(make: Any, training: str) -> None:
    """What is captured is a copy, and of a model in training mode so is what it is compared with."""
    model, x = make().eval(), tokens()
    GAINS[id(model)] = BY_MODULE[model] = 1.2
    if training == "all":
        model.train()
    elif training == "one module":
        model.add_module("drop", nn.Dropout(0.0).train())
    with pytest.raises(fastrel.CaptureError, match=r"not the model|call model\.eval\(\) first"):
        fastrel.Explainer(model)(x)


@pytest.mark.parametrize("make", [ById, ByModule, hooked])
def test_a_layer_that_trains_as_it_predicts_leaves_the_model_itself_to_be_compared(make: Any) -> None:
    """A head put in the place of another is in training mode, which is nothing to it."""
    model, x = make().eval(), tokens()
    model.add_module("second", nn.Linear(4, 4))
    GAINS[id(model)] = BY_MODULE[model] = 1.2
    with pytest.raises(fastrel.CaptureError, match="not the model"):
        fastrel.Explainer(model)(x)


@pytest.mark.parametrize("what", ["size", "size in an f-string", "number", "number in an f-string"])
def test_a_choice_by_text_is_compared_with_the_model(what: str) -> None:
    class Texts(Small):
        def between(self, h: Tensor) -> Tensor:
            asked = {
                "size": lambda: "1" in str(h.shape[1]),
                "size in an f-string": lambda: "1" in f"{h.shape[1]}",
                "number": lambda: "-" in str(h[0, 0, 0]),
                "number in an f-string": lambda: "-" in f"{h[0, 0, 0]}",
            }[what]()
            return h * 2 if asked else h

    model = Texts()
    explainer = fastrel.Explainer(model)
    for x in (tokens(), -tokens(), torch.cat([tokens()] * 2, 1)[:, :11]):
        try:
            off_by = off(explainer, model, x)
        except fastrel.CaptureError:
            continue
        assert off_by < EXACT


def test_failures_leave_nothing_behind(capfd: pytest.CaptureFixture[str]) -> None:
    class Failing(Small):
        def between(self, h: Tensor) -> Tensor:
            return h if h.sum() > 0 else -h

    before = state()
    with pytest.raises(fastrel.CaptureError, match=r"torch\.export could not capture Failing") as caught:
        fastrel.Explainer(Failing())(tokens())
    assert state() == before
    assert caught.value.details
    assert capfd.readouterr().err == ""
    with pytest.raises(fastrel.InputError, match="rejects these inputs"):
        fastrel.Explainer(Small())(tokens()[..., :3])
    assert state() == before


# Ambient modes.


class Relu(Small):
    def between(self, h: Tensor) -> Tensor:
        return F.silu(F.relu(h) + h)


def test_ambient_modes_change_nothing() -> None:
    model, x = Relu(), tokens()
    expected = fastrel.Explainer(model)(x, target=1).relevance
    with torch.inference_mode():
        inside = fastrel.Explainer(model)
        made_inside = x.clone()
        assert torch.equal(inside(x, target=1).relevance, expected)
        assert torch.equal(inside(made_inside, target=lambda out: out[:, 1]).relevance, expected)
    assert torch.equal(inside(made_inside, target=1).relevance, expected)
    with torch.no_grad():
        assert torch.equal(fastrel.Explainer(model)(x, target=1).relevance, expected)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(fastrel.Explainer(model)(x, target=1).relevance, expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_default_dtype_is_part_of_what_is_captured() -> None:
    class Making(Small):
        def between(self, h: Tensor) -> Tensor:
            return h + torch.full((8,), 0.1).to(h)

    model, x = Making(), tokens()
    explainer = fastrel.Explainer(model)
    for dtype in (torch.float32, torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            assert off(explainer, model, x) == 0
        finally:
            torch.set_default_dtype(torch.float32)


def test_under_autocast_the_model_is_explained_as_it_predicts_there() -> None:
    model, x = Small().float(), tokens().float()
    explainer = fastrel.Explainer(model)
    plain = explainer(x, target=1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected, cast = model(x), explainer(x, target=1)
    assert cast.logits.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(cast.logits, expected)
    assert 0 < (cast.relevance - plain.relevance).abs().max() < 0.05 * plain.relevance.abs().max()
    assert torch.equal(explainer(x, target=1).relevance, plain.relevance)


def test_wrapped_models_are_explained_as_what_they_wrap() -> None:
    model, x = Small(), tokens()
    expected = fastrel.Explainer(model)(x, target=1).relevance
    assert torch.equal(fastrel.Explainer(nn.DataParallel(model))(x, target=1).relevance, expected)
    assert torch.equal(fastrel.Explainer(torch.compile(model))(x, target=1).relevance, expected)
    with pytest.raises(fastrel.InputError, match=r"compiled by torch\.jit"):
        fastrel.Explainer(torch.jit.trace(model, x))


# Targets that people have in hand.


def test_numpy_integers_and_scalars_are_classes() -> None:
    import numpy as np

    explainer, x = fastrel.Explainer(Small()), tokens()
    expected = explainer(x, target=2).relevance
    for target in (np.int64(2), torch.tensor(2), np.array([2, 2]), [np.int32(2), np.int32(2)]):
        assert torch.equal(explainer(x, target=target).relevance, expected)


def test_function_targets_explain_evidence_for_and_against() -> None:
    """The sign lives in the gradient: a contrast and its opposite have maps of their own. A method of one's own shows M alone."""
    reading = fastrel.methods.Chain("gradient_relevance", residual=False)
    explainer, x = fastrel.Explainer(Small(), fastrel.Method("M", "M alone", "here", "5", reading)), tokens()
    one = explainer(x, target=lambda out: out[:, 2]).relevance
    assert (one - explainer(x, target=2).relevance).abs().max() < EXACT
    against = explainer(x, target=lambda out: -out[:, 2]).relevance
    assert (one - against).abs().max() > 0.1 * one.max()
    forth = explainer(x, target=lambda out: out[:, 0] - out[:, 1]).relevance
    back = explainer(x, target=lambda out: out[:, 1] - out[:, 0]).relevance
    assert (forth - back).abs().max() > 0.1 * forth.max()
    assert (against >= 0).all()


def test_masks_with_minus_infinity_and_masked_classes_are_no_error() -> None:
    class Masked(Small):
        def forward(self, t: Tensor, mask: Tensor) -> Tensor:
            h = self.embed(t)
            q, k, v = self.attention.qkv(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            h = h + F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
            logits = self.head(h.mean(1))
            return logits.masked_fill(torch.tensor([False, False, False, True]), -torch.inf)

    model, x = Masked(), tokens()
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    mask[..., 6:] = -torch.inf
    explanation = fastrel.Explainer(model)(x, mask, target=1)
    assert explanation.relevance.isfinite().all()
    with pytest.raises(fastrel.InputError, match="the model's output for the target holds NaN or infinity in sample 0"):
        fastrel.Explainer(model)(x, mask, target=3)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 8, 5, device="meta"), "on meta"),
        (torch.zeros(2, 8, 5).to_sparse(), "sparse"),
        (torch.nested.nested_tensor([torch.zeros(3, 5), torch.zeros(4, 5)]), "nested"),
        ([object()], "no tensor"),
        ({"a": [1, 2]}, "no tensor"),
    ],
)
def test_inputs_without_numbers_are_refused(x: Any, message: str) -> None:
    with pytest.raises(fastrel.InputError, match=message):
        fastrel.Explainer(Small().float())(x)


def test_an_input_given_twice_is_two_inputs_at_the_next_call() -> None:
    model = made(lambda m, p, q: m.wide(torch.cat([m.encoder(p).mean(1), m.second(q).mean(1)], 1)))
    same, other = ids(2, 7), ids(2, 7, seed=5)
    explainer = fastrel.Explainer(model)
    explainer(same, same, target=1)
    explanation = explainer(same, other, target=1)
    torch.testing.assert_close(explanation.logits, model(same, other))
    expected = fastrel.Explainer(model)(same, other, target=1)
    for name in ("first", "second"):
        torch.testing.assert_close(explanation.maps[name].relevance, expected.maps[name].relevance)


def test_an_input_that_is_a_parameter_of_the_model_is_an_input() -> None:
    model = made(lambda m, x: m.head(m.encoder.blocks(x).mean(1)))
    model.start = nn.Parameter(torch.randn(2, 7, 16, dtype=torch.double))  # type: ignore[assignment]
    explainer = fastrel.Explainer(model)
    explainer(model.start, target=1)  # type: ignore[arg-type]
    other = torch.randn(2, 7, 16, dtype=torch.double)
    torch.testing.assert_close(explainer(other, target=1).logits, model(other))


def test_a_model_that_asks_whether_two_inputs_are_one_is_not_assumed_to_be_told() -> None:
    model = made(lambda m, p, q: m.head(m.encoder(p).mean(1) * (3.0 if p is q else 1.0) + m.second(q).mean(1)))
    same = ids(2, 7)
    explainer = fastrel.Explainer(model)
    torch.testing.assert_close(explainer(same, same.clone(), target=1).logits, model(same, same.clone()))
    with pytest.raises(fastrel.CaptureError, match="is not the model"):
        explainer(same, same, target=1)


class Scale:
    value = 1.0


@dataclasses.dataclass(slots=True)
class Slots:
    value: float = 1.0


SETTINGS: dict[str, Any] = {"value": 1.0, "inner": {"value": 1.0}}
SPACE = types.SimpleNamespace(value=1.0)
NUMBERS = torch.ones(2, dtype=torch.float64)


def by_default(x: Tensor, factor: float = 1.0) -> Tensor:
    return x * factor


def threefold(x: Tensor, factor: float = 1.0) -> Tensor:
    return x * 3.0


def _reorder(m: Any) -> None:
    first = m.several.pop("a")
    m.several["a"] = first


#: What a model's code reads from around it, and a change of it between two calls.
AROUND: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, pytest.MonkeyPatch], Any]]] = {
    "an attribute of a module": (lambda m, x: F.softsign(x), lambda m, p: p.setattr(F, "softsign", lambda x: 3 * x)),
    "an entry of a global dict": (lambda m, x: x * SETTINGS["value"], lambda m, p: p.setitem(SETTINGS, "value", 3.0)),
    "an entry of a dict in it": (lambda m, x: x * SETTINGS["inner"]["value"], lambda m, p: p.setitem(SETTINGS["inner"], "value", 3.0)),
    "an attribute of a class": (lambda m, x: x * Scale.value, lambda m, p: p.setattr(Scale, "value", 3.0)),
    "an attribute of an object": (lambda m, x: x * SPACE.value, lambda m, p: p.setattr(SPACE, "value", 3.0)),
    "an object with slots": (lambda m, x: x * m.slots.value, lambda m, p: setattr(m.slots, "value", 3.0)),
    "a default of an object's class": (lambda m, x: x * m.scale.value, lambda m, p: p.setattr(Scale, "value", 3.0)),
    "a queue": (lambda m, x: x * m.queue[0], lambda m, p: m.queue.__setitem__(0, 3.0)),
    "an argument of a partial": (lambda m, x: m.partial(x), lambda m, p: m.partial.args[0].update(value=3.0)),
    "the order of modules": (lambda m, x: m.several["b"](x) if next(iter(m.several)) == "a" else x, lambda m, p: _reorder(m)),
    "the code of a function": (lambda m, x: by_default(x), lambda m, p: p.setattr(by_default, "__code__", threefold.__code__)),
    "a number taken out of a tensor": (lambda m, x: x * m.number.item(), lambda m, p: m.number.fill_(3.0)),
    "numbers taken out of a tensor": (lambda m, x: x * m.number.tolist(), lambda m, p: m.number.fill_(3.0)),
    "a number out of an object's tensor": (lambda m, x: x * m.slots.value.item(), lambda m, p: m.slots.value.fill_(3.0)),
    "a number out of a global tensor": (lambda m, x: x * NUMBERS.tolist()[0], lambda m, p: NUMBERS.mul_(3.0)),
    "an object's tensor": (lambda m, x: x * m.scale.tensor, lambda m, p: setattr(m.scale, "tensor", 3 * m.scale.tensor)),
    "a numpy array": (lambda m, x: x * float(m.array[0]), lambda m, p: m.array.__setitem__(0, 3.0)),
    "a variable of the environment": (lambda m, x: x * float(os.environ.get("SCALE", "1")), lambda m, p: p.setenv("SCALE", "3")),
    "a default of a function": (lambda m, x: by_default(x), lambda m, p: p.setattr(by_default, "__defaults__", (3.0,))),
}  # fmt: skip


@pytest.mark.parametrize("name", AROUND)
def test_what_the_code_reads_around_itself_is_a_part_of_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, change = AROUND[name]
    model: Any = made(lambda m, x: m.head(read(m, m.encoder(x)).mean(1)))
    model.slots, model.scale, model.queue = Slots(), Scale(), collections.deque([1.0])
    model.scale.own, model.scale.tensor = 1, torch.ones((), dtype=torch.float64)
    model.number, model.array = torch.ones((), dtype=torch.float64), np.ones(2)
    if name == "a number out of an object's tensor":
        model.slots.value = torch.ones((), dtype=torch.float64)
    model.partial = partial(lambda settings, x: x * settings["value"], {"value": 1.0})
    model.several = nn.ModuleDict({"a": nn.Identity(), "b": nn.Tanh()})
    explainer, given = fastrel.Explainer(model), ids(2, 7)
    before = explainer(given, target=1).logits
    change(model, monkeypatch)
    after = model(given)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(explainer(given, target=1).logits, after)
    assert len(explainer._engine._entries) == 2


def test_a_hook_that_reads_what_changes_is_followed() -> None:
    model: Any = made(lambda m, x: m.head(m.encoder(x).mean(1)))
    steering = {"by": 0.0}
    model.encoder.register_forward_hook(lambda module, given, out: out + steering["by"] * out)
    explainer, given = fastrel.Explainer(model), ids(2, 7)
    explainer(given, target=1)
    steering["by"] = 3.0
    torch.testing.assert_close(explainer(given, target=1).logits, model(given))


def test_a_forward_that_a_subclass_gets_later_is_seen() -> None:
    class Later(type(made(lambda m, x: x))):  # type: ignore[misc]
        pass

    model = Later(lambda m, x: m.head(m.encoder(x).mean(1))).double().eval()
    explainer, given = fastrel.Explainer(model), ids(2, 7)
    explainer(given, target=1)
    Later.forward = lambda m, x: 3 * m.head(m.encoder(x).mean(1))
    torch.testing.assert_close(explainer(given, target=1).logits, model(given))


def test_a_model_that_remembers_its_last_call_is_refused() -> None:
    def remembering(m: Any, x: Tensor) -> Tensor:
        y = m.encoder(x).mean(1)
        if getattr(m, "last", None) is not None:
            y = y + m.last
        m.last = y.detach()
        return m.head(y)

    with pytest.raises(fastrel.CaptureError, match="is not the model"):
        fastrel.Explainer(made(remembering))(ids(2, 7), target=1)


def test_a_model_that_keeps_its_first_result_is_refused() -> None:
    kept: dict[str, Tensor] = {}
    model: Any = made(lambda m, x: m.head(kept.setdefault("first", m.encoder(x).mean(1))))
    explainer = fastrel.Explainer(model)
    explainer(ids(2, 7), target=1)
    with pytest.raises(fastrel.UnsupportedModelError, match="does not depend on the input"):
        explainer(ids(2, 7).flip(1), target=1)


def tripled_if_large(m: Any, x: Tensor, y: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and float(x.sum()) > 30:
        y = 3 * y
    return m.head(y)


def tripled_unless_it_fails(m: Any, x: Tensor, y: Tensor) -> Tensor:
    with contextlib.suppress(Exception):
        if x.sum().item() > 30:
            y = 3 * y
    return m.head(y)


@pytest.mark.parametrize("branch", [tripled_if_large, tripled_unless_it_fails])
def test_a_model_that_looks_at_numbers_is_compared_at_every_call(branch: Callable[..., Tensor]) -> None:
    """What it does not show torch.export, it did not do on the first inputs either."""
    model = made(lambda m, x: branch(m, x, m.encoder(x).mean(1)))
    explainer, small, large = fastrel.Explainer(model), torch.ones(2, 7, dtype=torch.long), torch.full((2, 7), 5)
    for _ in range(2):
        torch.testing.assert_close(explainer(small, target=1).logits, model(small))
    with pytest.raises(fastrel.CaptureError, match="is not the model"):
        explainer(large, target=1)
    torch.testing.assert_close(explainer(small, target=1).logits, model(small))


def test_inputs_laid_out_in_another_way_are_compared() -> None:
    model = made(lambda m, x: m.head(m.encoder(x).mean(1)) * (1 if x.is_contiguous() else 3))
    explainer, given = fastrel.Explainer(model), ids(3, 7)
    for _ in range(3):
        for x in (given, given.T.contiguous().T):
            torch.testing.assert_close(explainer(x, target=1).logits, model(x))
    assert len(explainer._engine._entries) == 2


def test_a_forward_that_was_put_on_a_model_reads_its_weights_as_they_are() -> None:
    model: Any = made(lambda m, x: m.head(m.encoder(x).mean(1)))
    model.forward = lambda x: 2 * model.head(model.encoder(x).mean(1))
    explainer, given = fastrel.Explainer(model), ids(2, 7)
    explainer(given, target=1)
    model.load_state_dict({name: x + 0.5 for name, x in model.state_dict().items()}, assign=True)
    torch.testing.assert_close(explainer(given, target=1).logits, model(given))
    assert len(explainer._engine._entries) == 1


def test_code_that_holds_a_parameter_goes_on_with_it() -> None:
    model: Any = made(lambda m, x: m.head(m.encoder(x).mean(1)))
    weight, bias = model.head.weight, model.head.bias
    model.head.forward = lambda x: F.linear(x, 2 * weight, bias)
    explainer, given = fastrel.Explainer(model), ids(2, 7)
    explainer(given, target=1)
    model.load_state_dict({name: x + 0.5 for name, x in model.state_dict().items()}, assign=True)
    torch.testing.assert_close(explainer(given, target=1).logits, model(given))


def test_hooks_keep_nothing_of_a_capture() -> None:
    model: Any = made(lambda m, x: m.head(m.encoder(x).mean(1)))
    everything: list[Any] = []
    named: dict[str, Any] = {}
    first: dict[str, Any] = {}
    model.kept = []
    model.encoder.register_forward_hook(lambda module, given, out: everything.append((module, out)))
    model.encoder.register_forward_hook(lambda module, given, out: named.update(encoder=out))
    model.encoder.register_forward_hook(lambda module, given, out: first.setdefault("encoder", [out]) and None)
    model.encoder.register_forward_hook(lambda module, given, out: model.kept.append(out))
    explainer, given = fastrel.Explainer(model), ids(2, 7)
    torch.testing.assert_close(explainer(given, target=1).logits, model(given))
    found = [*(out for _, out in everything), *named.values(), *first["encoder"], *model.kept]
    assert {type(x) for x in found} == {Tensor}
    entries = len(explainer._engine._entries)
    explainer(given, target=1)
    assert len(explainer._engine._entries) == entries == 1


NAMES = [str(i) for i in range(3000)]


def test_code_may_name_large_lists() -> None:
    model, given = made(lambda m, x: m.head(m.encoder(x).mean(1) * (len(NAMES) > 0))), ids(2, 7)
    explainer = fastrel.Explainer(model)
    for _ in range(2):
        torch.testing.assert_close(explainer(given, target=1).logits, model(given))
    assert len(explainer._engine._entries) == 1


def test_hooks_on_a_wrapper_are_refused() -> None:
    model = made(lambda m, x: m.head(m.encoder(x).mean(1)))
    wrapper = nn.DataParallel(model)
    explainer = fastrel.Explainer(wrapper)
    wrapper.register_forward_hook(lambda module, given, out: 2 * out)
    with pytest.raises(fastrel.InputError, match="forward hooks on the DataParallel around"):
        explainer(ids(2, 7), target=1)


def test_a_batch_of_one_is_compared_at_every_length() -> None:
    model = made(
        lambda m, x: m.head((lambda y: y[:, -3:] if x.shape[0] == 1 and x.shape[1] > 8 else y)(m.encoder(x)).mean(1))
    )
    explainer = fastrel.Explainer(model)
    for length in (5, 12):
        given = ids(1, length)
        torch.testing.assert_close(explainer(given, target=1).logits, model(given))


# What is compared again.


class Reading(Small):
    """Multiplies by a number in a file, which no fingerprint sees."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def between(self, h: Tensor) -> Tensor:
        return h * float(self.file.read_text())


def test_what_no_fingerprint_sees_is_found_within_some_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine, "NOW_AND_THEN", 4)
    (tmp_path / "gain").write_text("1")

    model, x = Reading(tmp_path / "gain"), tokens()
    explainer = fastrel.Explainer(model)
    assert off(explainer, model, x) < EXACT
    (tmp_path / "gain").write_text("3")
    with caplog.at_level(logging.WARNING, logger="fastrel"):
        wrong = [off(explainer, model, x) > EXACT for _ in range(6)]
    assert wrong[3:] == [False, False, False]
    assert "in a way that its fingerprint does not see" in caplog.text
    assert "up to 3 explanations before this one" in caplog.text


def as_numbers_where_it_is_not_captured(h: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return h
    return h * 3 if max(h.detach().flatten().tolist()) > 100 else h


def as_an_array_where_it_is_not_captured(h: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return h
    return h * 3 if float(h.detach().numpy().max()) > 100 else h


@pytest.mark.parametrize("branch", [as_numbers_where_it_is_not_captured, as_an_array_where_it_is_not_captured])
def test_a_model_that_makes_lists_or_arrays_is_compared_at_every_call(branch: Callable[[Tensor], Tensor]) -> None:
    class Branching(Small):
        def between(self, h: Tensor) -> Tensor:
            return branch(h)

    model = Branching()
    explainer = fastrel.Explainer(model)
    assert off(explainer, model, tokens()) < EXACT
    with pytest.raises(fastrel.CaptureError, match="is not the model"):
        explainer(1000 * tokens())


def test_a_model_that_asks_whether_it_is_captured_is_compared_at_every_size() -> None:
    class Asking(Small):
        def between(self, h: Tensor) -> Tensor:
            return h if torch.compiler.is_compiling() or h.shape[1] < 12 else 3 * h

    model = Asking()
    explainer = fastrel.Explainer(model)
    assert off(explainer, model, tokens(2, 8)) < EXACT
    with pytest.raises(fastrel.CaptureError, match="is not the model"):
        explainer(tokens(2, 12))


def test_another_model_in_a_wrapper_is_that_which_is_explained() -> None:
    wrapper, x = nn.DataParallel(Small()), tokens()
    explainer = fastrel.Explainer(wrapper)
    explainer(x)
    wrapper.module = Small()
    with torch.no_grad():
        wrapper.module.head.weight.mul_(3)
    assert off(explainer, wrapper.module, x) < EXACT


def test_a_graph_that_is_no_longer_the_model_is_used_for_no_kind_of_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "NOW_AND_THEN", 8)
    (tmp_path / "gain").write_text("1")

    model, several, one = Reading(tmp_path / "gain"), tokens(4), tokens(1)
    explainer = fastrel.Explainer(model)
    for x in (several, one):
        assert off(explainer, model, x) < EXACT
    (tmp_path / "gain").write_text("3")
    for _ in range(6):
        explainer(several)
    assert off(explainer, model, several) < EXACT
    assert off(explainer, model, one) < EXACT


def test_masked_numbers_within_reach_are_compared() -> None:
    """numpy writes into its constant `np.ma.masked` when that is asked for its bytes, and does not let itself."""
    import numpy as np

    from fastrel.graph.watched import Numbers

    assert Numbers(np.ma.masked).same()
    numbers = np.ma.masked_equal([1.0, 2.0, 3.0], 2)
    seen = Numbers(numbers)
    numbers[0] = np.ma.masked
    assert not seen.same()
