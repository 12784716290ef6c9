"""From an explainer to an artefact."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from fastrel.artefact import compiled
from fastrel.artefact.describing import Description, describe
from fastrel.artefact.explaining import Explaining, counts
from fastrel.artefact.lengths import longest
from fastrel.artefact.metadata import METADATA, RANK, SELF_TEST, Input, MapOf, Metadata
from fastrel.data import files
from fastrel.engine import Call
from fastrel.errors import CaptureError, InputError, UnsupportedModelError, first_line
from fastrel.explainer import Explainer
from fastrel.graph.capture import LOCK, quiet
from fastrel.maps import TokenMap
from fastrel.models import Loaded
from fastrel.transform.method import AllMaps, PathIntegral
from fastrel.transform.program import Program
from fastrel.version import __version__


def export(
    explainer: Explainer,
    *inputs: Any,
    path: str | os.PathLike[str],
    targets: int = 1,
    loaded: Loaded | None = None,
    compile: bool = False,
    **named: Any,
) -> Path:
    """Write the explanation of `explainer(*inputs, **named)` as one file that needs neither the model's code nor its libraries.

    The program is forward and reverse pass in plain PyTorch operators, weights included. Batch size, number of targets and text
    length may vary; the size of pictures may not. Its results are those of `explainer.using(backend="torch")` to the bit, which
    is asked before anything is written. The first two samples of the inputs, with their results, are kept in the file as the
    self-test that `fastrel.load` runs.

    Args:
        explainer: what is written: its model, method and options.
        inputs: as the model takes them; tensors, and constants, which become a part of the program.
        path: ends in .pt2.
        targets: how many classes per sample the self-test explains.
        loaded: what `fastrel.models.load` gave: its preprocessing or tokenizer and its class names go into the file.
        compile: also write PATH.compiled.pt2 for this machine, by AOTInductor; takes minutes, and a C++ compiler.
        named: further inputs by name.

    Returns:
        The path that was written.

    Raises:
        InputError: a path or options that cannot be; inputs that the model rejects or that hold NaN.
        UnsupportedModelError: a method that is no graph, or a model whose graph fits one batch size only.
        CaptureError: torch.export cannot capture the program, or it computes something else.
    """
    path = Path(path)
    if path.suffix != ".pt2" or path.name.endswith(compiled.SUFFIX):
        raise InputError(f"path {str(path)!r} must end in .pt2, and not in {compiled.SUFFIX}, the compiled form")
    if isinstance(explainer.method.reading, (AllMaps, PathIntegral)):
        raise UnsupportedModelError(f"method {explainer.method.name!r} is no graph of operators and cannot be exported")
    plain = explainer.using(backend="torch")
    call, program = plain.programmed(*inputs, **named)
    logits = call.captured.outputs[program.leaves[0]].meta["val"]
    if logits.dim() != 2 or not 1 <= targets <= logits.shape[1]:
        raise InputError(f"targets={targets} of logits {tuple(logits.shape)}: export needs [B, C] and targets from 1 to C")
    given = [x.clone() if len(x) > 1 else torch.cat([x, x]) for x in call.tensors]  # one given twice is two inputs
    exported, fixed = _exported(call, program, given, targets)
    test = _self_test(exported, given, targets)
    maps = _compare(plain, call, test, inputs, named)
    about = describe(loaded)
    facts = replace(_metadata(plain, call, program, int(logits.shape[1]), maps, loaded, about), targets=fixed)
    extra = {SELF_TEST: base64.b64encode(safetensors.torch.save(test)).decode(), **about.files}
    files.folder(path.parent)
    with files.replaced(path) as temporary:
        torch.export.save(exported, temporary, extra_files={METADATA: facts.to_json(), **extra})
    beside = compiled.beside(path)
    beside.unlink(missing_ok=True)  # it would be of another program
    if compile:
        compiled.write(beside, exported, facts, extra)
    return path


def _exported(call: Call, program: Program, given: Sequence[Tensor], targets: int) -> tuple[ExportedProgram, int | None]:
    """The explanation as a program, and how many targets it explains at a time; None: any number."""
    nodes = [node for node in call.captured.inputs if isinstance(node.meta.get("val"), Tensor)]
    if len(nodes) != len(call.captured.inputs):
        raise InputError(
            "export takes models whose inputs are all tensors; give constants by functools.partial or a wrapper"
        )
    auto = torch.export.Dim.AUTO
    dynamic = tuple(
        {dim: auto for dim, size in enumerate(node.meta["val"].shape) if not isinstance(size, int)} for node in nodes
    )
    module = Explaining(call, program).eval()
    classes = torch.full((len(given[0]), max(targets, 2)), RANK, device=given[0].device)
    exported = _traced(module, (classes, *given), ({0: auto, 1: auto}, dynamic))
    batch, columns = _sizes(exported)
    fixed = None
    if is_concrete_int(columns):  # a rule goes through the targets one by one
        fixed = targets
        if columns != targets:
            exported = _traced(module, (classes[:, :targets], *given), ({0: auto}, dynamic))
            batch, _ = _sizes(exported)
    if is_concrete_int(batch):
        raise UnsupportedModelError(f"the batch size is a part of this model's graph, which fits batches of {batch} only")
    return exported, fixed


def _export_below_autograd(module: Explaining, given: tuple[Tensor, ...], **options: Any) -> ExportedProgram:
    """`torch.export.export` as it was before it began above automatic differentiation; torch has no public name for that."""
    from torch.export._trace import _export

    return _export(module, given, pre_dispatch=False, **options)


def _traced(module: Explaining, given: tuple[Tensor, ...], dynamic: Any) -> ExportedProgram:
    """A module as a program. torch.export does not follow automatic differentiation, by which some rules are written: such modules
    are traced below it.

    Raises:
        CaptureError: torch cannot.
    """
    ways = (torch.export.export, _export_below_autograd)
    failed: Exception | None = None
    with LOCK, quiet() as said, torch.no_grad():
        for trace in ways:
            try:
                return trace(module, given, dynamic_shapes=dynamic, strict=False)
            except Exception as error:
                failed = failed or error
                said.append(str(error))
    assert failed is not None
    raise CaptureError(
        f"torch.export could not export the explanation: {first_line(failed)}", details="\n".join(said)
    ) from failed


def _sizes(exported: ExportedProgram) -> tuple[Any, Any]:
    """Batch and number of targets as the program has them: numbers where they are fixed."""
    name = exported.graph_signature.user_inputs[0]
    node = next(node for node in exported.graph.nodes if node.name == name)
    batch, columns = node.meta["val"].shape
    return batch, columns


def _self_test(exported: Any, given: Sequence[Tensor], targets: int) -> dict[str, Tensor]:
    """Two samples, each explained for `targets` classes, as the program has them: inputs, and results by number."""
    two = [x[:2] for x in given]
    classes = torch.arange(RANK, RANK + targets, device=two[0].device).expand(2, -1)
    with torch.no_grad():
        results = exported.module()(classes, *two)
    kept = {"classes": classes, **{f"input{i}": x for i, x in enumerate(two)}}
    kept |= {f"result{i}": x for i, x in enumerate(results)}
    return {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in kept.items()}


def _compare(plain: Explainer, call: Call, test: dict[str, Tensor], inputs: Any, named: Any) -> dict[str, TokenMap]:
    """The explainer's maps of the samples of the self-test, after the program's own results were found to be those.

    Raises:
        CaptureError: they differ.
    """
    places = iter([test[f"input{i}"].to(x.device) for i, x in enumerate(call.tensors)])

    def first_two(x: Any) -> Any:
        return next(places) if isinstance(x, Tensor) else x

    args, kwargs = torch.utils._pytree.tree_map(first_two, (inputs, _ordered(call, named)))
    explanation = plain(*args, target=test["result1"].to(call.tensors[0].device), **kwargs)
    expected = [explanation.logits, explanation.target]
    expected += [x for one in explanation.maps.values() for x in (one.relevance, one.grid) if x is not None]
    found = [test[f"result{i}"] for i in range(len(expected) + 1) if i != 2]
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs is not None
        if not torch.allclose(ours.double(), theirs.cpu().double(), rtol=1e-6, atol=1e-12):
            worst = float((ours.double() - theirs.cpu().double()).abs().max())
            raise CaptureError(f"the exported program is not the explainer: a result differs by {worst:.3g}")
    return explanation.maps


def _ordered(call: Call, named: dict[str, Any]) -> dict[str, Any]:
    """Named inputs in the order of the graph."""
    return dict(sorted(named.items(), key=lambda item: call.names.index(item[0]) if item[0] in call.names else -1))


def _metadata(
    explainer: Explainer,
    call: Call,
    program: Program,
    classes: int,
    found: dict[str, TokenMap],
    loaded: Loaded | None,
    about: Description,
) -> Metadata:
    nodes = call.captured.inputs
    shapes = [tuple(size if isinstance(size, int) else None for size in node.meta["val"].shape) for node in nodes]
    known: dict[str, str] = {}

    def named(size: Any) -> str:
        return "" if isinstance(size, int) else known.setdefault(str(size), f"n{len(known)}")

    symbols = [tuple(named(size) for size in node.meta["val"].shape) for node in nodes]
    most = longest(call)
    read = [
        Input(name, str(x.dtype).removeprefix("torch."), shape, count, most, names)
        for name, x, shape, names, count in zip(call.names, call.tensors, shapes, symbols, counts(call), strict=True)
    ]
    maps = [
        MapOf(name, one.input, found[name].grid is not None, one.picture)
        for one in program.maps
        for name in [call.names[one.input] + one.branch]
    ]
    method = explainer.method
    return Metadata(
        inputs=tuple(read),
        maps=tuple(maps),
        classes=classes,
        class_names=() if loaded is None else tuple(loaded.class_names),
        kind="tensors" if loaded is None else loaded.kind,
        probabilities=None if loaded is None else loaded.probabilities,
        source={"class": type(explainer.model).__name__} if loaded is None else loaded.source,
        reader=about.reader,
        options={
            "method": method.name,
            "rules": explainer.rules,
            "start_layer": method.start_layer,
            "normalize": method.normalize,
            "precision": explainer.precision,
        },
        report=tuple(map(str, program.generic)),
        weights=_hash(call.values[: len(call.captured.owners)]),
        versions={"fastrel": __version__, "torch": torch.__version__},
        device=call.tensors[0].device.type,
    )


def _hash(values: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
