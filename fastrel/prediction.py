"""A prediction that can be explained, for any target, without another forward pass."""

from __future__ import annotations

import functools
import math
import secrets
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastrel.engine import Call, Engine
from fastrel.errors import InputError, UnsupportedModelError
from fastrel.explanation import Explanation
from fastrel.graph.ambient import plainly
from fastrel.inputs import Checks, image_size, is_device_error, rejected
from fastrel.maps import TokenMap
from fastrel.methods.integrated_gradients import integrated_gradients
from fastrel.noise import Maps, floor, perturbed
from fastrel.options import Options
from fastrel.outputs import unclear
from fastrel.targets import Seeds, Target, class_seeds, even_seeds, function_seeds
from fastrel.trace import BlockTrace
from fastrel.transform.method import PathIntegral
from fastrel.transform.program import Program

#: How many numbers of a larger tensor are looked at, at random places, to tell whether it was written to.
SAMPLE = 64

#: Tensors up to this size are compared whole.
WHOLE = 2**16

#: Bits of a number, by its size in bytes.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Versions:
    """Tensors as they are now: whether they were written to since.

    Autograd counts writes. What it does not see, writes through `.data` and through arrays of numpy that share the memory, shows in
    the numbers: of tensors in main memory all are kept, of those beyond `WHOLE` numbers `SAMPLE` at random places.
    """

    def __init__(self, tensors: Sequence[tuple[str, Any]], values: bool) -> None:
        self._known = [(name, x, _State.of(x, values)) for name, x in tensors if isinstance(x, Tensor)]

    def changed(self) -> str | None:
        """The name of the first tensor that was written to."""
        return next((name for name, x, state in self._known if not state.is_of(x)), None)


@dataclass(frozen=True)
class _State:
    version: int
    place: int
    numbers: Tensor | None

    @classmethod
    def of(cls, x: Tensor, values: bool) -> _State:
        return cls(x._version, x.data_ptr(), _numbers(x) if values else None)

    def is_of(self, x: Tensor) -> bool:
        if (x._version, x.data_ptr()) != (self.version, self.place):
            return False
        now = None if self.numbers is None else _numbers(x)
        return now is None or self.numbers is None or torch.equal(_bits(now), _bits(self.numbers))


@torch.no_grad()
def _numbers(x: Tensor) -> Tensor | None:
    """Some numbers of a tensor; None where looking at them would wait for a device, or where there are none to be had."""
    if x.device.type != "cpu" or type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided or not x.numel():
        return None
    if x.is_quantized or x.is_conj() or x.is_neg() or x.element_size() not in _BITS:
        return None
    if x.numel() <= WHOLE:
        return x.clone()
    return _bits(x).take(_places(x.numel()))


def _bits(x: Tensor) -> Tensor:
    """Numbers as integers, so that NaN equals itself."""
    return x.detach().view(_BITS[x.element_size()])


@functools.lru_cache(maxsize=256)
def _places(count: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(secrets.randbits(63))
    return torch.randint(count, (SAMPLE,), generator=generator, device="cpu")


class Prediction:
    """A prediction that can be explained. Made by `Explainer.predict`.

    Holds what the explanation needs: the inputs, values saved in between, and the model's parameters as they are. Where one
    of them is written to before `explain`, that is refused; see `Versions`.

    `kept`: it may be explained later, so that the numbers of its tensors are watched, too, and not their versions alone. `checks`:
    of its inputs, where they are not settled yet.

    Attributes:
        logits: the logits, as the model returns them.
        output: everything the model returns.
    """

    def __init__(
        self,
        engine: Engine,
        options: Options,
        call: Call,
        program: Program,
        grad: bool = False,
        kept: bool = False,
        checks: Checks | None = None,
    ) -> None:
        self._engine, self._options, self._call, self._program = engine, options, call, program
        self._checks = checks
        with plainly(grad):
            outputs, saved = self._run_forward(program)
        self._outputs: list[Any] = list(outputs)
        self._saved: Sequence[Any] | None = saved
        owners = [".".join(owner) if isinstance(owner, tuple) else "a constant" for owner in call.captured.owners]
        named = [*zip([*owners, *call.names], call.values, strict=True)]
        self._versions = Versions([*named, *(("the output", x) for x in self._outputs)], values=kept)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: copies would hold parameters of their own, which are not the model's."""
        raise InputError(
            "a prediction belongs to its model and cannot be copied or pickled; copy or pickle its explanation"
        )

    @property
    def logits(self) -> Tensor:
        """The model's logits, [B, C]."""
        return self._outputs[self._program.leaves[0]]

    @property
    def output(self) -> Any:
        """What the model returned, in its own type."""
        return self._rebuild(self._outputs)

    def explain(self, target: Target = None) -> Explanation:
        """Explain this prediction.

        Args:
            target: None (the predicted class of each sample) · an int · [B] class indices · [B, K] (K targets per sample,
                at less than K times the cost) · a function of the model's output that returns [B] or [B, K] values, for
                regression, similarities, contrasts (`lambda out: out[:, 3] - out[:, 5]`) or multi-label scores.

        Returns:
            The explanation: relevance [B, T], or [B, K, T] for K targets per sample, on the model's device and in its dtype
            (float32 for 16-bit models).

        Raises:
            InputError: the target does not fit the output; weights, inputs or outputs changed since the prediction; it was
                explained by `explain_once`.
            UnsupportedModelError: a rule does not take what this model gives it.
        """
        return self._explained(target, once=False)

    def explain_once(self, target: Target = None, create_graph: bool = False) -> Explanation:
        """`explain`, after which the prediction cannot be explained again: what it kept is freed as the reverse pass goes."""
        return self._explained(target, once=True, create_graph=create_graph)

    def noise_floor(self, target: Target = None, draws: int = 2) -> Tensor:
        """How far each map moves under perturbations of rounding size, [B] or [B, K]; see `fastrel.noise`.

        Args:
            target: what to explain, as `explain` takes it.
            draws: how many perturbations to try, each a forward and a reverse pass.

        Returns:
            The largest relative L2 distance over the draws, [B] or [B, K]: 0.01 is a hundredth of the map.

        Raises:
            InputError: draws < 1; as `explain`.
        """
        explanation = self.explain(target)
        return self.noise_of(explanation.maps, target if callable(target) else explanation.target, draws)

    def noise_of(self, maps: Maps, target: Target, draws: int) -> Tensor:
        """`noise_floor` of maps that were made from this prediction.

        Raises:
            InputError: draws < 1.
        """
        if draws < 1:
            raise InputError(f"noise_floor needs draws >= 1, got {draws}")

        def again(seed: int) -> Maps:
            other = Prediction(self._engine, self._options, perturbed(self._call, seed), self._program)
            return other.explain(target).maps

        return floor(maps, map(again, range(draws)))

    def trace(self, target: Target = None) -> list[BlockTrace]:
        """What passed through every block; for predictions by a program that was made to trace."""
        with plainly():
            seeds = self.seeds(target)
            program, saved = self._prepared(seeds, trace=True)
            _, _, records = program.reverse(_arguments(program, seeds, saved))
        found: dict[int, dict[str, Tensor]] = {}
        for (block, name), value in zip(program.record_names, records, strict=True):
            found.setdefault(block, {})[name] = value
        names = BlockTrace.__dataclass_fields__
        return [BlockTrace(**{name: found[block].get(name) for name in names}) for block in sorted(found)]  # type: ignore

    def _explained(self, target: Target, once: bool, create_graph: bool = False) -> Explanation:
        checks, self._checks = self._checks or Checks(self._engine.checks), None
        changed = self._versions.changed()
        if changed:
            raise InputError(f"{changed} changed in place since the prediction, so no map belongs to it; predict again")
        with plainly(create_graph):
            if self._saved is None:
                raise InputError("this prediction was explained by explain_once, which frees what it kept; use explain")
            seeds = self.seeds(target, checks)
            program, saved = self._prepared(seeds)
            if isinstance(self._options.method.reading, PathIntegral):
                rows = grids = [self._along_path(seeds)]
            else:
                arguments = _arguments(program, seeds, saved)
                del saved
                if once:
                    self._saved = None
                rows, grids, _ = self._run_reverse(program, arguments)
            maps = self._maps(program, rows, grids, seeds.several, checks)
            checks.settle()
        source = None if once else weakref.ref(self)
        asked = None if once else target if callable(target) else seeds.classes
        return Explanation(self.logits, seeds.classes, maps, self.output, program.generic, _prediction=source, _asked=asked)

    def _maps(
        self, program: Program, rows: list[Any], grids: list[Any], several: bool, checks: Checks
    ) -> dict[str, TokenMap]:
        found: dict[str, TokenMap] = {}
        method = self._options.method
        # Maps at pixels lie on those.
        asked = None if method.at_pixels or isinstance(method.reading, PathIntegral) else self._options.grid
        placed = False
        for where, row, grid in zip(program.maps, rows, grids, strict=True):
            relevance = row.reshape(*row.shape[:2], -1).transpose(0, 1)
            checks.finite("the explanation", relevance)
            name = self._call.names[where.input] + where.branch
            if len(relevance) != len(self.logits):
                raise UnsupportedModelError(
                    f"the map of {name} has {len(relevance)} samples and the prediction {len(self.logits)}: the model puts several "
                    "texts or pictures of a sample into the batch; explain what reads one of them (a choice, a side) by itself"
                )
            patches = self._on_grid(relevance) if grid is None else grid.transpose(0, 1)
            if asked and grid is not None and tuple(grid.shape[-len(asked) :]) != tuple(asked):
                raise InputError(f"the patches of {name} lie on {tuple(grid.shape[2:])}, not on grid={asked}")
            if not several:
                relevance, patches = relevance[:, 0], None if patches is None else patches[:, 0]
            placed = placed or patches is not None
            value = self._call.values[len(self._call.captured.owners) + where.input]
            beside = tuple(self._call.names[i] for i in where.beside)
            found[name] = TokenMap(relevance, patches, image_size(value, where.picture), beside)
        if asked and not placed:
            sizes = ", ".join(f"{one.relevance.shape[-1]} of {name}" for name, one in found.items())
            raise InputError(f"grid={asked} does not fit the tokens: {sizes}")
        return found

    def _on_grid(self, relevance: Tensor) -> Tensor | None:
        """The patches [B, K, …] of a map [B, K, T] on the grid that was given."""
        grid = self._options.grid
        if grid is None or math.prod(grid) > relevance.shape[2]:
            return None
        return relevance[..., -math.prod(grid) :].reshape(*relevance.shape[:2], *grid)

    def _run_forward(self, program: Program) -> Any:
        """Outputs and saved values; the graph's own failures are those of the model on these inputs."""
        try:
            return program.forward(*self._call.values)
        except (RuntimeError, IndexError, ValueError) as error:
            if is_device_error(error):
                raise
            raise rejected(self._engine.model, error, self._call.tensors) from error

    def _run_reverse(self, program: Program, arguments: list[Any]) -> Any:
        try:
            return program.reverse(arguments)
        except RuntimeError as error:
            if is_device_error(error):
                raise
            name = type(self._engine.model).__name__
            rule = program.rule_of(error) or "an operator"
            raise UnsupportedModelError(f"cannot explain {name}, the rule of {rule} does not take it: {error}") from error

    def seeds(self, target: Target, checks: Checks | None = None) -> Seeds:
        """Where the reverse pass starts for a target; with `checks`, numbers on a GPU are looked at when these are settled.

        Raises:
            InputError: the target does not fit the output.
        """
        if not callable(target):
            headless = target is None and getattr(self._engine.model, "num_classes", None) == 0  # as timm calls it
            why = unclear(self._call.captured, self._options.output, headless)
            if target is None and self._options.method.is_class_blind and (why or self.logits.dim() > 2):
                return even_seeds(self.logits, self._program.leaves[0])
            if why:
                raise InputError(why)
            return class_seeds(self.logits, self._program.leaves[0], target, checks)
        with torch.inference_mode(False):
            return function_seeds(self._outputs, self._rebuild, target, self._call.batch)

    def _prepared(self, seeds: Seeds, trace: bool = False) -> tuple[Program, Sequence[Any]]:
        """The program that explains the seeded outputs, and what it saved of this prediction."""
        if seeds.outputs == self._program.leaves and self._saved is not None:
            return self._program, self._saved
        program = self._engine.program(self._call.entry, self._options, seeds.outputs, trace)
        return program, self._run_forward(program)[1]

    def _along_path(self, seeds: Seeds) -> Tensor:
        """Integrated gradients of the seeded outputs [K, B, H, W]."""
        values, inputs = self._call.values, self._call.tensors
        position = [i for i, x in enumerate(values) if x is inputs[0]]
        if len(inputs) != 1 or inputs[0].dim() != 4 or not position:
            raise InputError("integrated_gradients explains models of one image input [B, C, H, W]")
        maps = []
        for weights in seeds.gradient[0]:

            def score(image: Tensor, weights: Tensor = weights) -> Tensor:
                outputs, _ = self._program.forward(*values[: position[0]], image, *values[position[0] + 1 :])
                repeats = len(image) // len(weights)
                return (outputs[self._program.leaves[0]] * weights.repeat(repeats, 1)).sum(1)

            maps.append(integrated_gradients(score, inputs[0]))
        return torch.stack(maps)

    def _rebuild(self, outputs: list[Any]) -> Any:
        return pytree.tree_unflatten(outputs, self._call.captured.out_spec)


def _arguments(program: Program, seeds: Seeds, saved: Sequence[Any]) -> list[Any]:
    """What a reverse graph takes: the seeds of all lanes, and what the forward graph saved."""
    starts: list[Tensor] = []
    for features, gradient, relevance in zip(program.leaf_features, seeds.gradient, seeds.relevance, strict=True):
        dims = [dim + 1 for dim in features]
        row = relevance.abs().sum(dims, keepdim=True) if dims else relevance.abs()
        starts += [gradient, relevance, row]
    return [*starts, *saved]
