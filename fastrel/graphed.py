"""An explanation as one CUDA graph: at small batches the host, not the GPU, is what takes time.

    graphed = explainer.graphed(images, targets=1)   # warms up and captures: sizes, targets per sample and weights' places are fixed
    explanation = graphed(images, target=[281, 207])
    graphed = explainer.graphed(images, batch_sizes=(1, 4, 16))   # a graph each: any batch up to 16, filled up to the next of these

Nothing in it waits for the device or depends on data: forward pass, seeds and reverse pass are launched once and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastrel import weights
from fastrel.engine import Engine
from fastrel.errors import InputError
from fastrel.explanation import Explanation
from fastrel.graph.capture import Signature, in_order
from fastrel.graph.constants import check_device
from fastrel.inputs import Checks, image_size, input_names, waits
from fastrel.maps import TokenMap
from fastrel.options import Options
from fastrel.outputs import logits_index
from fastrel.targets import Target, classes_of
from fastrel.transform.lanes import lane_dtype
from fastrel.transform.method import AllMaps, PathIntegral
from fastrel.transform.program import Program

#: Runs before the capture: kernels are compiled and memory is taken in them.
WARM_UP = 3


#: What one run gives: the model's outputs, the classes [B, K], and for each map relevance [B, K, T] and the patches or None.
Results = tuple[list[Tensor], Tensor, list[Tensor], list[Tensor | None]]


def run(program: Program, values: Sequence[Any], classes: Tensor | None) -> Results:
    """Prediction and explanation without a look at any value: what a CUDA graph can hold.

    classes [B, K], or None for the predicted ones.
    """
    outputs, saved = program.forward(*values)
    logits = outputs[program.leaves[0]]
    chosen = logits.argmax(1, keepdim=True) if classes is None else classes
    seed = torch.zeros(chosen.shape[1], *logits.shape, dtype=lane_dtype(logits.dtype), device=logits.device)
    seed = seed.scatter(2, chosen.T.unsqueeze(-1), 1.0)
    return list(outputs), chosen, *reverse(program, seed, saved)


def reverse(program: Program, seed: Tensor, saved: Sequence[Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """The explanation of classes by their one-hot vectors, seed [K, B, C]: for each map of the program relevance [B, K, T] and
    the patches [B, K, gh, gw] or None."""
    row = seed.sum([dim + 1 for dim in program.leaf_features[0]], keepdim=True)
    rows, grids, _ = program.reverse([seed, seed, row, *saved])
    relevance = [one.reshape(*one.shape[:2], -1).transpose(0, 1) for one in rows]
    return relevance, [None if grid is None else grid.transpose(0, 1) for grid in grids]


class Recorded(NamedTuple):
    """A CUDA graph's results, what computes them anew in the same places, the prepared weights that it reads, and the memory it was
    recorded in."""

    results: Results
    replay: Callable[[], None]
    weights: weights.Recording
    pool: Any


def record(compute: Callable[[], Results], device: torch.device, pool: Any = None) -> Recorded:
    """A CUDA graph of `compute`, in the memory of another one (`pool`) that is never replayed meanwhile.

    Raises:
        InputError: the device is no GPU.
    """
    if device.type != "cuda":
        raise InputError(f"a CUDA graph needs a model on a CUDA device, and this one is on {device}")
    with torch.no_grad(), torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile, a DataLoader's that pins memory for one.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"), weights.recording() as read:
            results = compute()
    return Recorded(results, graph.replay, read, graph.pool())


def check_same_kind(given: Sequence[Tensor], captured: Sequence[Tensor]) -> None:
    """Inputs of the very shapes, dtypes and devices that were captured: copying into their places would convert others unasked.

    Raises:
        InputError: anything else.
    """
    kinds, expected = ([(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in xs] for xs in (given, captured))
    if kinds != expected:
        raise InputError(f"inputs of {kinds} do not fit the captured graph, which takes {expected}")


class Graphed:
    """Predictions and explanations by replay, a graph for each of some batch sizes. Not for several threads at a time: inputs and
    results have one place each."""

    def __init__(
        self,
        engine: Engine,
        options: Options,
        args: Any,
        kwargs: dict[str, Any],
        targets: int,
        batch_sizes: Sequence[int] = (),
        checks: bool = True,
    ) -> None:
        self._model, self._checks = engine.model, checks
        batch = _batch(args, kwargs)
        sizes = sorted({*(batch_sizes or [batch])})
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
            raise InputError(f"batch_sizes must be whole numbers from 1 on, not {batch_sizes!r}")
        self._replays: dict[int, _Replay] = {}
        pool = None
        for size in reversed(sizes):  # the others have room in the memory of the largest
            these, named = pytree.tree_map(lambda x, size=size: _filled(x, batch, size), (args, kwargs))
            one = self._replays[size] = _Replay(engine, options, these, named, targets, pool)
            pool = one.recorded.pool

    def __call__(self, *args: Any, target: Target = None, **kwargs: Any) -> Explanation:
        """Explain a batch for as many classes per sample as were captured. Between two sizes that were captured it is filled up to
        the larger one by its last sample, which changes none of the others.

        Raises:
            InputError: inputs or targets of other sizes or dtypes than captured; NaN or infinity in the output or the result, which
                nobody asks with `checks=False`; the model changed since, but for weights that were written in place (`live=False`
                does not ask).
        """
        ordered = in_order(self._model, args, kwargs)
        batch = _batch(args, ordered)
        size = next((one for one in reversed(self._replays) if one >= batch), max(self._replays))
        replay = self._replays[size]
        checks = Checks(self._checks)
        classes = replay.classes(target, batch, checks)
        if batch >= size:
            return replay(args, ordered, classes, checks)
        args, ordered, classes = pytree.tree_map(lambda x: _filled(x, batch, size), (args, ordered, classes))
        return replay(args, ordered, classes, checks)[:batch]


def _batch(args: Any, kwargs: Any) -> int:
    return next((len(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()), 1)


def _filled(x: Any, batch: int, size: int) -> Any:
    """The first `size` samples of a tensor, its last one again and again where it has fewer."""
    if not isinstance(x, Tensor) or not x.dim() or len(x) != batch or batch == size:
        return x
    return x[torch.arange(size, device=x.device).clamp(max=batch - 1)]


class _Replay:
    """One of the graphs: inputs of the very sizes that were captured."""

    def __init__(self, engine: Engine, options: Options, args: Any, kwargs: Any, targets: int, pool: Any) -> None:
        args, kwargs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
        self._model = engine.model
        call = engine.enter(args, kwargs)
        captured, values, self._inputs = call.captured, call.values, call.tensors
        logits = logits_index(captured, options.output)
        device = captured.outputs[logits].meta["val"].device
        if isinstance(options.method.reading, (AllMaps, PathIntegral)) or targets < 0:
            raise InputError(f"method {options.method.name!r} with targets={targets} cannot be captured as a CUDA graph")
        if call.entry.doubts:
            raise InputError(
                f"{type(self._model).__name__} looks at numbers or writes to what it may read again, so that every call must be "
                "compared with it; a CUDA graph cannot"
            )
        self._entry = call.entry if engine.live else None
        self._signature, self._given = call.entry.signature, call.names
        self._places = _places(captured.parameters(self._model))
        check_device(captured.graph, device)
        self._program = engine.explaining(call, options)
        self._spec, self._names = captured.out_spec, [call.names[one.input] + one.branch for one in self._program.maps]
        self._sizes = [image_size(values[len(captured.owners) + one.input], one.picture) for one in self._program.maps]
        self._beside = [tuple(call.names[i] for i in one.beside) for one in self._program.maps]
        batch = len(self._inputs[0])
        self._classes = torch.zeros(batch, targets, dtype=torch.long, device=device) if targets else None
        self.recorded = record(lambda: run(self._program, values, self._classes), device, pool)

    def classes(self, target: Target, batch: int, checks: Checks) -> Tensor | None:
        """The classes of a target for a batch of so many samples, [batch, K]; None for the predicted ones.

        Raises:
            InputError: another number of them than was captured.
        """
        if (target is None) != (self._classes is None):
            raise InputError(
                "a graph captured with targets=0 explains the predicted class; with targets=K it needs target=[B, K]"
            )
        if self._classes is None:
            return None
        logits = self.recorded.results[0][self._program.leaves[0]]
        classes = classes_of(logits[:1].expand(batch, *logits.shape[1:]), target, checks).reshape(batch, -1)
        if classes.shape[1] != self._classes.shape[1]:
            raise InputError(
                f"target of shape {tuple(classes.shape)} does not fit the captured {(batch, self._classes.shape[1])}"
            )
        return classes

    def __call__(self, args: Any, ordered: dict[str, Any], classes: Tensor | None, checks: Checks) -> Explanation:
        self._check_model()
        given = [x for x in pytree.tree_leaves((args, ordered)) if isinstance(x, Tensor)]
        check_same_kind(given, self._inputs)
        if not self._is_same_call(args, ordered):
            raise InputError(
                "other constants, keywords, tied inputs or ambient modes than captured; call graphed(...) again with these"
            )
        if self._classes is not None and classes is not None:
            count = self.recorded.results[0][self._program.leaves[0]].shape[1]
            self._classes.copy_(classes.clamp(0, count - 1))
        for place, x in zip(self._inputs, given, strict=True):
            place.copy_(x)
        self.recorded.weights.refresh()
        self.recorded.replay()
        outputs, explained, relevance, grids = pytree.tree_map(
            lambda x: x.clone() if isinstance(x, Tensor) else x, self.recorded.results
        )
        if self._classes is not None and classes is not None and waits(classes):
            # Those that do not exist are not refused yet.
            known = torch.eq(classes, self._classes).unsqueeze(-1)
            relevance = [row.where(known, torch.nan) for row in relevance]
            grids = [grid if grid is None else grid.where(known.unsqueeze(-1), torch.nan) for grid in grids]
        checks.finite("the model's output", outputs[self._program.leaves[0]])
        for row in relevance:
            checks.finite("the explanation", row)
        checks.settle()
        one = self._classes is None or self._classes.shape[1] == 1
        maps: dict[str, TokenMap] = {}
        for name, size, beside, row, grid in zip(self._names, self._sizes, self._beside, relevance, grids, strict=True):
            grid = grid[:, 0] if one and grid is not None else grid
            maps[name] = TokenMap(row[:, 0] if one else row, grid, size, beside)
        output = pytree.tree_unflatten(outputs, self._spec)
        explained = explained[:, 0] if one else explained
        return Explanation(outputs[self._program.leaves[0]], explained, maps, output, self._program.generic)

    def _is_same_call(self, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether a call is like the captured one but for the numbers; tensors may be given by position or by name."""
        expected, (found, leaves) = self._signature, Signature.of(args, kwargs)
        if found == expected:
            return True
        constants = any(not isinstance(leaf, Tensor) for leaf in leaves)
        names = input_names(self._model, args, kwargs)
        return not constants and names == self._given and replace(found, spec=expected.spec) == expected

    def _check_model(self) -> None:
        entry = self._entry
        if entry is None:
            return
        if not entry.fingerprint.matches() or _places(entry.captured.parameters(self._model)) != self._places:
            raise InputError(
                f"{type(self._model).__name__} changed since its explanation was captured as a CUDA graph; call graphed(...) again"
            )


def _places(weights: Sequence[Tensor] | None) -> list[int] | None:
    """Where weights lie, which a graph reads there for ever."""
    return None if weights is None else [x.data_ptr() for x in weights]
