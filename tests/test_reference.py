"""The reference equals the method's official code, array by array."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrel import reference
from fastrel.reference.rollout import gradient_relevance, rollout
from fastrel.reference.rules import Rules
from tests import golden_files as golden

VITS, BERTS = ["vit_a", "vit_b"], ["bert_a", "bert_b_padded"]
CASES = [(name, target) for name in VITS + BERTS for target in golden.targets(name)]


def trace(name: str, target: int, rules: Rules = "official", frozen: bool = False) -> reference.Trace:
    params, data, config = golden.parameters(name), golden.load(name), golden.config(name)
    if name.startswith("vit"):
        image = golden.tensor(data["input"]).requires_grad_()
        run = lambda tape: reference.vit(tape, params, image, heads=config["num_heads"])  # noqa: E731
    else:
        embedding, mask = bert_embedding(params, golden.tensor(data["input_ids"])), golden.tensor(data["attention_mask"])
        heads = config["num_attention_heads"]
        run = lambda tape: reference.bert(tape, params, embedding, mask, heads=heads, eps=1e-12)  # noqa: E731
    return reference.trace(run, torch.tensor([target]), rules, frozen)


def bert_embedding(params: dict[str, Tensor], input_ids: Tensor) -> Tensor:
    table = {kind: params[f"bert.embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")}
    x = table["word"][input_ids] + table["token_type"][0] + table["position"][: input_ids.shape[1]]
    norm = "bert.embeddings.LayerNorm"
    return F.layer_norm(x, x.shape[-1:], params[f"{norm}.weight"], params[f"{norm}.bias"], 1e-12).requires_grad_()


def maps(result: reference.Trace) -> list[Tensor]:
    return [gradient_relevance(b.gradient, b.relevance) for b in result.blocks]


def check(ours: Tensor, name: str, key: str) -> None:
    error = golden.relative_error(ours, golden.tensor(golden.load(name)[key]))
    assert error < 1e-9, f"{name}: {key} differs by {error:.1e}"


@pytest.mark.parametrize(("name", "target"), CASES)
def test_official_blocks_equal_golden(name: str, target: int) -> None:
    result = trace(name, target)
    check(result.logits, name, "logits")
    for i, block in enumerate(result.blocks):
        prefix = f"t{target}/block{i}"
        check(block.attention[0], name, f"{prefix}/attention")
        check(block.gradient[0], name, f"{prefix}/attention_gradient")
        check(block.relevance[0], name, f"{prefix}/attention_relevance")
        if name in VITS:
            check(block.value_relevance[0], name, f"{prefix}/value_relevance")


@pytest.mark.parametrize(("name", "target"), CASES)
def test_official_maps_equal_golden(name: str, target: int) -> None:
    result = trace(name, target)
    starts = [key for key in golden.load(name) if key.startswith(f"t{target}/transformer_attribution/start")]
    assert starts
    for key in starts:
        start = int(key.rpartition("start")[2])
        row = rollout(maps(result), start_layer=start, normalize=name in BERTS)[0, 0]
        check(row[1:] if name in VITS else overwrite_cls(row), name, key)
    if name in VITS:
        for start in (0, 1):
            relevance = [b.relevance.clamp(min=0).mean(1) for b in result.blocks]
            check(rollout(relevance, start_layer=start)[0, 0, 1:], name, f"t{target}/lrp_rollout/start{start}")
        check(result.input_relevance[0].sum(0), name, f"t{target}/full")
    else:
        full = result.embedding_relevance[0].sum(-1)
        full[0] = 0
        check(full, name, f"t{target}/full")


@pytest.mark.parametrize(("name", "target"), [case for case in CASES if case[0] in VITS])
def test_original_lrp_equals_golden(name: str, target: int) -> None:
    result = trace(name, target, "original_lrp")
    check(result.input_relevance[0].sum(0), name, f"t{target}/orig_lrp/full")
    check(result.blocks[-1].relevance.clamp(min=0).mean(1)[0, 0, 1:], name, f"t{target}/orig_lrp/last_layer")


def overwrite_cls(row: Tensor) -> Tensor:
    """The published BERT code overwrites the CLS entry by the row's minimum."""
    return torch.cat((row.min()[None], row[1:]))


@pytest.mark.parametrize("rules", ["positive", "official"])
def test_a_batch_equals_its_samples(rules: str) -> None:
    name = "vit_a"
    params, image = golden.parameters(name), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    target = torch.tensor([0, 4, 2])

    def run(x: Tensor, t: Tensor) -> reference.Trace:
        x = x.clone().requires_grad_()
        return reference.trace(lambda tape: reference.vit(tape, params, x, heads=3), t, rules)

    batch = run(image, target)
    for i in range(3):
        single = run(image[i : i + 1], target[i : i + 1])
        for whole, one in zip(batch.blocks, single.blocks, strict=True):
            assert golden.relative_error(whole.relevance[i], one.relevance[0]) < 1e-10
            assert golden.relative_error(whole.gradient[i], one.gradient[0]) < 1e-10


@pytest.mark.parametrize(("name", "target"), CASES)
def test_positive_relevance_is_non_negative_and_never_grows(name: str, target: int) -> None:
    """What A V⁺ cannot place (a value feature negative at every token) is lost; nothing else is."""
    result = trace(name, target, "positive")
    below = 1.0
    for block in reversed(result.blocks):
        assert (block.relevance >= 0).all()
        total = float(block.input_relevance.sum())
        assert 0 < total <= below + 1e-12
        below = total


def test_the_study_s_default_form_is_the_reference() -> None:
    """docs/numerics.md compares what fastrel computes."""
    from studies.forms import FormTape

    params, image = golden.parameters("vit_a"), golden.tensor(golden.load("vit_a")["input"])
    found = []
    for tape in (reference.Tape("positive"), FormTape()):
        run = reference.vit(tape, params, image, heads=golden.config("vit_a")["num_heads"])
        rel = tape.relprop(run.logits, F.one_hot(torch.tensor([1]), run.logits.shape[1]).double())
        found.append([rel[id(attn)] for _, attn, _ in run.blocks])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
