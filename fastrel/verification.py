"""Proof on the user's own model: what can be checked about an explanation without trusting the engine."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fastrel.errors import FastrelError
from fastrel.explanation import NOISY

if TYPE_CHECKING:
    from fastrel.explainer import Explainer, Prediction


@dataclass(frozen=True)
class Check:
    """One thing checked: `value` must be at most `limit` (None: for information)."""

    name: str
    value: float
    limit: float | None
    meaning: str

    @property
    def ok(self) -> bool:
        """Whether it holds."""
        return self.limit is None or self.value <= self.limit

    def __str__(self) -> str:
        verdict = "  " if self.limit is None else "ok" if self.ok else "✗ "
        bound = "" if self.limit is None else f" (limit {self.limit:.0e})"
        return f"{verdict} {self.name:<28}{self.value:.2e}{bound}  {self.meaning}"


@dataclass(frozen=True)
class Verification:
    """The report of `Explainer.verify`: checks, what took the generic rule, the shape of the map."""

    checks: tuple[Check, ...]
    generic: tuple[str, ...]
    blocks: int
    tokens: tuple[int, ...]
    grid: tuple[int, ...] | None

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        grid = f", on a grid of {self.grid[0]} × {self.grid[1]} patches" if self.grid else ""
        lines = [f"{self.blocks} attention blocks, {self.tokens[0]} tokens{grid}", *(str(check) for check in self.checks)]
        lines += [f"   generic rule: {name}" for name in self.generic]
        return "\n".join([*lines, "verified" if self.ok else "NOT verified"])


def verify(explainer: Explainer, args: Sequence[Any], kwargs: dict[str, Any]) -> Verification:
    """Check, for the predicted classes of one batch:

    - gradient: the engine's gradient lane where the map is read, times the value there and summed over features, against
      torch.autograd through the captured forward graph (L2, relative to the sums of absolute terms);
    - exactness: the map against the same in float64 by the plain PyTorch backend (relative L2 without the highest token);
    - batch: the map of the first sample alone against the batch;
    - rounding: `Explanation.noise_floor`;
    - finite: entries of the map that are not;
    - relevance that arrives: the sum of relevance where the map is read, of 1 at the logits. Under the positive rules none
      is created, and what is missing met sums of 0 or constants.
    """
    prediction = explainer.predict(*args, **kwargs)
    explanation = prediction.explain()
    tensors = [x for x in [*args, *kwargs.values()] if isinstance(x, Tensor)]
    single = tensors[0].dtype if tensors[0].is_floating_point() else torch.float32
    wide = torch.float64 in (explanation.relevance.dtype, single)
    low = any(p.dtype in (torch.float16, torch.bfloat16) for p in explainer.model.parameters())
    official = explainer.rules != "positive"
    target = explanation.target
    limit = 1e-9 if wide else 2e-2 if low else 1e-3
    first = dict(zip(kwargs, _first(kwargs.values()), strict=True))
    alone = explainer(*_first(args), target=None if target is None else target[:1], **first)
    moved = _distance(explanation.relevance[:1], alone.relevance)
    checks = [
        Check("finite", float((~explanation.relevance.isfinite()).sum()), 0, "entries of the map that are not finite"),
        Check("gradient", _gradient(explainer, prediction, target), limit, "against torch.autograd"),
        Check("batch", moved, None if official else limit, "one sample alone"),
    ]
    bound = None if official else (1e-8 if wide else 5e-2 if low else 1e-3)
    meaning = "against float64 in plain PyTorch"
    try:
        moved = _distance(explanation.relevance, _exactly(explainer, args, kwargs, target))
    except (RuntimeError, ValueError) as error:
        moved, bound, meaning = (
            float("nan"),
            None,
            f"not to be had, the model does not run in float64: {str(error).splitlines()[0]}",
        )
    checks.append(Check("exactness", moved, bound, meaning))
    noise = _noise(explanation)
    checks.append(Check("rounding", noise, None if official or low else NOISY, "how far rounding moves the map"))
    checks.append(Check("relevance that arrives", _arriving(explainer, prediction, target), None, "of 1 at the logits"))
    program = prediction._program
    grid = None if explanation.grid is None else tuple(explanation.grid.shape[-2:])
    return Verification(tuple(checks), program.generic, program.blocks, tuple(explanation.relevance.shape[1:]), grid)


def _first(values: Any) -> list[Any]:
    return [x[:1] if isinstance(x, Tensor) else x for x in values]


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance of maps over all tokens but the highest, the worst sample."""
    a, b = ours.double().flatten(1), theirs.double().flatten(1)
    highest = b.argmax(1, keepdim=True)
    a, b = a.scatter(1, highest, 0.0), b.scatter(1, highest, 0.0)
    norm = b.norm(dim=1)
    return float(((a - b).norm(dim=1) / norm.where(norm > 0, 1)).max())


def _noise(explanation: Any) -> float:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(explanation.noise_floor(1).max())


def _exactly(explainer: Explainer, args: Sequence[Any], kwargs: dict[str, Any], target: Any) -> Tensor:
    from fastrel.explainer import Explainer

    def widened(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    method = explainer.method
    other = Explainer(
        copy.deepcopy(explainer.model).double(),
        method.name,
        rules=explainer.rules,
        start_layer=method.start_layer,
        normalize_rollout=method.normalize,
        backend="torch",
    )
    return other(*map(widened, args), target=target, **{key: widened(x) for key, x in kwargs.items()}).relevance


class _Leaf(fx.Interpreter):
    """Runs the captured graph with one value as a leaf of autograd."""

    def __init__(self, module: fx.GraphModule, name: str) -> None:
        super().__init__(module)
        self.name, self.leaf = name, torch.empty(0)

    def run_node(self, n: fx.Node) -> Any:
        """As usual, but for that value."""
        value = super().run_node(n)
        if n.name == self.name:
            value = self.leaf = value.detach().clone().requires_grad_()
        return value


def _gradient(explainer: Explainer, prediction: Prediction, target: Any) -> float:
    """The gradient lane times the value, where the map is read, against autograd."""
    program = prediction._program
    other = explainer.using("input_x_gradient", rules=explainer.rules)
    other.backend = explainer.backend
    read = other._program(prediction._captured, program.leaves)
    ours = other._run(prediction._captured, read, prediction._values, prediction._inputs).explain(target).relevance
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(prediction._captured.graph, copies)
    graph.output(tuple(copies[node] for node in prediction._captured.outputs))
    runner = _Leaf(fx.GraphModule(torch.nn.Module(), graph), copies[read.read_at].name)
    with torch.enable_grad():
        outputs = runner.run(*prediction._values)
        logits = outputs[program.leaves[0]]
        chosen = logits if target is None else logits.gather(-1, target.reshape(-1, 1))
        (grad,) = torch.autograd.grad(chosen.sum(), runner.leaf)
    features = list(read.read_features)
    product = (grad * runner.leaf).detach().double()
    expected, size = (x.sum(features) if features else x for x in (product, product.abs()))
    # Relative to the terms: their sum is nearly 0 before a layer norm.
    return float((ours.double().flatten(1) - expected.flatten(1)).norm() / size.norm().clamp_min(1e-300))


def _arriving(explainer: Explainer, prediction: Prediction, target: Any) -> float:
    other = explainer.using("lrp", rules=explainer.rules)
    try:
        read = other._program(prediction._captured, prediction._program.leaves)
        lane = other._run(prediction._captured, read, prediction._values, prediction._inputs).explain(target).relevance
    except FastrelError:
        return float("nan")
    return float(lane.sum(1).mean())
