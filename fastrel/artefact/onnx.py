"""The program of an artefact as an ONNX file, for where torch is not wanted. Same inputs, same results, checks included."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch

from fastrel.artefact import metadata
from fastrel.artefact.loading import load
from fastrel.data import files
from fastrel.errors import FastrelError, InputError, first_line


def require() -> None:
    """Raise InputError unless what writes and checks ONNX is installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise InputError(f'ONNX needs {", ".join(missing)}: pip install "fastrel[onnx]"')


def write(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Write the artefact at `source` as ONNX, with its metadata as the model's property "fastrel", and compare ONNX Runtime's results
    with its self-test.

    Inputs are `classes` [B, K] and then the model's by name; results `logits`, `explained`, `ok`, and for each map
    `relevance<i>` and `patches<i>` where it has any.

    Raises:
        InputError: a path that does not end in .onnx, or what it needs is not installed.
        FastrelError: the program has an operator that ONNX lacks, or ONNX Runtime computes something else.
    """
    require()
    import onnx
    import onnxruntime

    target = Path(target)
    if target.suffix != ".onnx":
        raise InputError(f"path {str(target)!r} must end in .onnx")
    about = metadata.read(source)
    names = ["logits", "explained", "ok"]
    for i, one in enumerate(about.maps):
        names += [f"relevance{i}"] + [f"patches{i}"] * one.grid
    with files.replaced(target) as temporary:
        try:
            program = torch.onnx.export(
                torch.export.load(source),
                dynamo=True,
                verbose=False,
                input_names=["classes", *(x.name for x in about.inputs)],
                output_names=names,
            )
            assert program is not None
            model = program.model_proto
        except Exception as error:  # whatever torch's exporter says
            raise FastrelError(f"torch could not write the explanation as ONNX: {first_line(error)}") from error
        onnx.helper.set_model_props(model, {"fastrel": about.to_json()})
        onnx.save(model, temporary)
        _compare(onnxruntime.InferenceSession(str(temporary)), load(source, compiled=False).stored)
    return target


def _compare(session: object, stored: dict[str, torch.Tensor]) -> None:
    count = sum(name.startswith("input") for name in stored)
    given = [stored["classes"], *(stored[f"input{i}"] for i in range(count))]
    feeds = {x.name: value.numpy() for x, value in zip(session.get_inputs(), given, strict=True)}  # type: ignore[attr-defined]
    for i, found in enumerate(session.run(None, feeds)):  # type: ignore[attr-defined]
        expected = stored[f"result{i}"].double()
        difference = float(
            (torch.from_numpy(found).double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        )
        if not difference <= 1e-4:
            raise FastrelError(f"ONNX Runtime computes something else: result {i} is {difference:.2g} away")
