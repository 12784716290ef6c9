"""From a file to something that can be called like the explainer that it was made of."""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastrel.artefact import compiled as compiled_
from fastrel.artefact import metadata
from fastrel.artefact.metadata import RANK, SELF_TEST, Input, Metadata
from fastrel.errors import InputError, first_line
from fastrel.explanation import Explanation
from fastrel.inputs import image_size
from fastrel.maps import TokenMap
from fastrel.targets import class_indices

log = logging.getLogger("fastrel")

#: How far a result of the self-test may lie from what it was at the export, relative to the largest value.
TOLERANCE = 1e-4


class Artefact:
    """An explanation from a file, called like the explainer that it was made of. Made by `fastrel.load`.

    Attributes:
        metadata: what it says about itself.
        compiled: whether the form compiled for this machine runs; `reason`: if not, why not.
    """

    def __init__(self, path: Path, about: Metadata, compiled: Callable[..., Any] | None = None, reason: str = "") -> None:
        self.path, self.metadata, self.compiled, self.reason = path, about, compiled is not None, reason
        self._runs: Callable[..., Any] = compiled or self._program.module()

    def __call__(self, *args: Tensor, target: Any = None, **kwargs: Tensor) -> Explanation:
        """Explain inputs [B, …], given as to the model, by place or by name.

        Args:
            args: inputs by place.
            kwargs: inputs by name.
            target: None (the predicted class) · an int · [B] · [B, K]. `RANK + r` of `fastrel.artefact.metadata` is the class of
                rank r of each sample.

        Returns:
            An explanation whose `ok` [B] or [B, K] is false, and whose maps are NaN, where a sample is not finite or a class out
            of range; no sample changes another one's map.

        Raises:
            InputError: inputs of other names, sizes or dtypes than the artefact reads, or a target of another shape.
        """
        inputs = self._bound(args, kwargs)
        classes, several = _classes(target, len(inputs[0]))
        return self.explain(inputs, classes, several)

    def explain(self, inputs: Sequence[Tensor], classes: Tensor, several: bool = True) -> Explanation:
        """Explain inputs in the artefact's own order for classes [B, K]; without `several`, the K of one is left out."""
        logits, chosen, ok, *maps = self._results(inputs, classes.to(inputs[0].device))
        left = iter(maps if several else [x[:, 0] for x in maps])
        found = {}
        for one in self.metadata.maps:
            relevance, grid = next(left), next(left) if one.grid else None
            found[one.name] = TokenMap(relevance, grid, image_size(inputs[one.input], one.picture))
        return Explanation(
            logits, chosen if several else chosen[:, 0], found, logits, self.metadata.report, ok if several else ok[:, 0]
        )

    def predict(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """The logits [B, C] alone, without a reverse pass; by the program that is not compiled.

        Args:
            args: inputs [B, …], given as to the model, by place.
            kwargs: the same by name.

        Raises:
            InputError: inputs of other names, sizes or dtypes than the artefact reads.
        """
        inputs = self._bound(args, kwargs)
        classes = torch.full((len(inputs[0]), self.metadata.targets or 1), RANK, device=inputs[0].device)
        with torch.no_grad():
            return self._forward(classes, *inputs)[0]

    @functools.cached_property
    def _program(self) -> torch.export.ExportedProgram:
        try:
            return torch.export.load(self.path)
        except Exception as error:  # whatever torch finds wrong with it
            raise InputError(
                f"torch {torch.__version__} cannot read the program in {str(self.path)!r}: {first_line(error)}"
            ) from error

    @functools.cached_property
    def _forward(self) -> Callable[..., Any]:
        """The program without its reverse pass: of all results the logits, in the place of the others too."""
        module: Any = self._program.module()
        output = module.graph.output_node()
        output.args = ([output.args[0][0]] * len(output.args[0]),)
        module.graph.eliminate_dead_code()
        module.recompile()
        return module

    def self_test(self) -> float:
        """How far the results on the samples in the file lie from what they were at the export, relative to the largest value."""
        test = self.stored
        inputs = [test[f"input{i}"].to(self.metadata.device) for i in range(len(self.metadata.inputs))]
        with torch.no_grad():
            results = self._runs(test["classes"].to(self.metadata.device), *inputs)
        worst = 0.0
        for i, found in enumerate(results):
            expected = test[f"result{i}"].double()
            difference = (found.cpu().double() - expected).abs().nan_to_num(torch.inf).max()
            worst = max(worst, float(difference / expected.abs().max().clamp(min=1e-30)))
        return worst

    @functools.cached_property
    def stored(self) -> dict[str, Tensor]:
        """The self-test: `classes`, `input<i>` as the program reads them, `result<i>` as it returned them at the export."""
        return _stored(self.path)

    def __repr__(self) -> str:
        form = "compiled" if self.compiled else "not compiled"
        return f"Artefact({str(self.path)!r}, {self.metadata.options['method']}, {form})"

    def _results(self, inputs: Sequence[Tensor], classes: Tensor) -> list[Tensor]:
        """What the program returns, in turns where it explains a fixed number of targets."""
        at_once, count = self.metadata.targets, classes.shape[1]
        with torch.no_grad():
            if at_once in (None, count):
                return list(self._runs(classes, *inputs))
            padded = torch.cat([classes, classes[:, -1:].expand(-1, -count % at_once)], 1)
            turns = [self._runs(part, *inputs) for part in padded.split(at_once, 1)]
        return [turns[0][0], *(torch.cat(parts, 1)[:, :count] for parts in list(zip(*turns, strict=True))[1:])]

    def _bound(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        wanted = self.metadata.inputs
        names = [x.name for x in wanted]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(args) > len(names) or sorted(given) != sorted(names) or len(given) != len(args) + len(kwargs):
            missing = [name for name in names[len(args) :] if name not in kwargs]
            raise InputError(
                f"the artefact reads {', '.join(names)}, all of them as it was exported; given were {len(args)} by place and "
                f"{', '.join(sorted(kwargs)) or 'none'} by name: {', '.join(missing) or 'none'} missing"
            )
        for x in wanted:
            value = given[x.name]
            if not isinstance(value, Tensor):
                raise InputError(f"{x.name} must be a tensor, not {type(value).__name__}")
            kind = (str(value.dtype).removeprefix("torch."), value.device.type)
            if not _fits(value, x) or kind != (x.dtype, self.metadata.device) or not value.numel():
                varies = "any" if x.longest is None else f"up to {x.longest}"
                shape = [size or (varies if dim else "any") for dim, size in enumerate(x.shape)]
                raise InputError(
                    f"{x.name} {tuple(value.shape)} of {kind[0]} on {kind[1]} does not fit the artefact, which reads {shape} of "
                    f"{x.dtype} on {self.metadata.device}"
                )
        if len({len(value) for value in given.values()}) != 1:
            raise InputError(f"inputs of several batch sizes {sorted({len(value) for value in given.values()})}")
        sizes: dict[str, tuple[str, int]] = {}
        for x in wanted:
            for symbol, size, fixed in zip(x.names, given[x.name].shape, x.shape, strict=False):
                first, expected = sizes.setdefault(symbol, (x.name, size))
                if fixed is None and size != expected:
                    raise InputError(
                        f"{x.name} {tuple(given[x.name].shape)} has {size} where {first} has {expected}: they go together"
                    )
        return [given[name] for name in names]


def load(path: str | os.PathLike[str], compiled: bool | None = None) -> Artefact:
    """Read what `fastrel.export` wrote, and run its self-test. Needs neither timm nor transformers nor the model's source.

    Args:
        path: of the `.pt2` file; a compiled form is looked for beside it.
        compiled: True: the form compiled for this machine or an error; False: never; None: where it is there and fits.

    Returns:
        The artefact, to be called like the explainer that it was made of.

    Raises:
        InputError: no artefact, or one of another format; the compiled form is asked for and does not fit this machine or torch;
            or the self-test gives other results than at the export.
    """
    path = Path(path)
    about = metadata.read(path)
    if about.device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"the artefact {str(path)!r} was exported for {about.device}, and there is none here")
    reason, found = "not asked for", None
    if compiled is not False:
        found, reason = _compiled(path, about)
        if found is None and compiled:
            raise InputError(f"no compiled form of {str(path)!r} can run here: {reason}")
    artefact = Artefact(path, about, found, reason)
    error = artefact.self_test()
    if not error <= TOLERANCE:
        raise InputError(
            f"the self-test of {str(path)!r} gives results that are {error:.2g} away from those at its export with torch "
            f"{about.versions['torch']}; here is torch {torch.__version__}. Export it again"
        )
    return artefact


def _compiled(path: Path, about: Metadata) -> tuple[Callable[..., Any] | None, str]:
    """The compiled form, or why there is none."""
    beside = compiled_.beside(path)
    if not beside.is_file():
        return None, f"there is no {beside.name}"
    needs = metadata.read(beside)
    if needs.weights != about.weights or needs.options != about.options:
        return None, f"{beside.name} is of another program"
    reason = compiled_.unfit(needs.compiled)
    if reason:
        log.warning("%s is not used: %s; the program runs uncompiled", beside, reason)
        return None, reason
    try:
        with _no_word_of_outdated_files():
            return torch._inductor.aoti_load_package(str(beside)), ""
    except Exception as error:  # whatever torch finds wrong with it
        said = (
            f"torch, which unpacks it into {tempfile.gettempdir()} and runs it there, cannot load it: {first_line(error)}"
        )
        log.warning("%s is not used: %s; the program runs uncompiled", beside, said)
        return None, said


@contextlib.contextmanager
def _no_word_of_outdated_files() -> Iterator[None]:
    """torch calls a file outdated where there is no compiler, and then loads it all the same."""
    logger = logging.getLogger("torch._inductor.package.package")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _fits(value: Tensor, expected: Input) -> bool:
    """Whether a tensor has a shape that the program reads."""
    if value.dim() != len(expected.shape):
        return False
    sizes = list(zip(value.shape, expected.shape, strict=True))
    varying = [size for size, fixed in sizes[1:] if fixed is None]
    fixed = all(wanted in (None, size) for size, wanted in sizes)
    return fixed and (expected.longest is None or max(varying, default=0) <= expected.longest)


def _stored(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(base64.b64decode(metadata.extra(path, SELF_TEST)))
    except (binascii.Error, safetensors.SafetensorError) as error:
        raise InputError(f"the self-test of {str(path)!r} is damaged: {error}") from error


def _classes(target: Any, batch: int) -> tuple[Tensor, bool]:
    """A target as classes [B, K], and whether the caller asked for a K."""
    if target is None:
        return torch.full((batch, 1), RANK), False
    classes = class_indices(target, batch)
    return classes.reshape(batch, -1), classes.dim() == 2
