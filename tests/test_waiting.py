"""How often a call waits for a GPU: what looks at numbers, counted on a CPU as if looking waited there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastrel
from fastrel import inputs, targets
from tests import models

aten = torch.ops.aten

#: What gives Python a number, or a tensor whose size depends on numbers.
LOOKS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default}


class Looks(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.count += func in LOOKS or by_mask
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor is as one on a GPU, where calls are concerned."""
    for module in (inputs, targets):
        monkeypatch.setattr(module, "waits", lambda x: True)


def looks(explainer: fastrel.Explainer, given: dict[str, Any], **options: Any) -> int:
    """How often a call looks, when all is captured and compared."""
    for _ in range(2):
        explainer(**given, **options)
    with Looks() as counted:
        explainer(**given, **options)
    return counted.count


TARGETS = [None, 2, [1, 4], [[0, 1], [2, 3]], torch.tensor([1, 4])]


@pytest.mark.parametrize("name", ["timm_vit", "hf_bert"])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_call_waits_once_and_without_checks_never(on_a_gpu: None, name: str, target: Any) -> None:
    model, given = models.build(name), models.inputs(name, batch=2)
    assert looks(fastrel.Explainer(model, backend="torch"), given, target=target) == 1
    assert looks(fastrel.Explainer(model, backend="torch", checks=False), given, target=target) == 0


def test_what_is_wrong_is_still_said_and_the_first_of_it_first(on_a_gpu: None) -> None:
    model, given = models.build("timm_vit"), models.inputs("timm_vit")["x"]
    explainer = fastrel.Explainer(model, backend="torch")
    expected = explainer(given, target=1).relevance
    with pytest.raises(fastrel.InputError, match="target 99 is out of range: the model has 6 classes"):
        explainer(given, target=torch.tensor([0, 99, 1]))
    bad = given.clone()
    bad[1, 0, 3, 3] = torch.nan
    with pytest.raises(fastrel.InputError, match=r"x holds NaN or infinity in sample 1, at \[1, 0, 3, 3\]: nan"):
        explainer(bad, target=1)
    assert torch.equal(explainer(given, target=1).relevance, expected)
    with pytest.raises(fastrel.InputError, match="x holds NaN"):  # also where the call is captured first
        fastrel.Explainer(model, backend="torch")(bad)
    with pytest.raises(fastrel.InputError, match="x holds NaN"):
        explainer.predict(bad)


@pytest.mark.parametrize("far", [True, False])
def test_without_checks_nan_in_is_nan_out(request: pytest.FixtureRequest, far: bool) -> None:
    if far:
        request.getfixturevalue("on_a_gpu")
    model, given = models.build("timm_vit"), models.inputs("timm_vit")["x"]
    explainer = fastrel.Explainer(model, backend="torch", checks=False)
    explainer(given)
    given[1, 0, 3, 3] = torch.nan
    relevance = explainer(given, target=1).relevance
    assert relevance[1].isnan().all()
    assert relevance[[0, 2]].isfinite().all()
    if far:  # elsewhere a class that does not exist is refused as ever
        assert explainer(given[:1], target=torch.tensor([99])).relevance.isnan().all()


def test_checks_is_yes_or_no() -> None:
    with pytest.raises(fastrel.InputError, match="checks must be True or False, not 1"):
        fastrel.Explainer(models.build("timm_vit"), checks=1)  # type: ignore[arg-type]
