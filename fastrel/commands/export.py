"""`fastrel export`: a model's explanation as a file."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from fastrel import precision
from fastrel.artefact import compiled, onnx
from fastrel.artefact.exporting import export
from fastrel.batch.settings import Settings
from fastrel.commands import options as shared
from fastrel.data import pictures
from fastrel.errors import InputError
from fastrel.models import Loaded, Sample

HELP = "write a model's explanation as one file that needs neither the model's code nor its libraries"
EPILOG = """\
OUT.pt2 holds forward and reverse pass in plain PyTorch operators with the weights, preprocessing or tokenizer, class names and a
self-test; OUT.compiled.pt2 beside it the same compiled for this machine. fastrel.load("OUT.pt2") is called like the explainer.

examples:
  fastrel export --model vit_base_patch16_224 --out explain.pt2
  fastrel export --model ./my-bert --start-layer -1 --normalize --out explain.pt2 --no-compile
  fastrel export --model vit_base_patch16_224 --out explain.onnx --format onnx
"""
_TEXT = "the quick brown fox jumps over the lazy dog"


def configure(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--out", required=True, metavar="FILE", help="explain.pt2, or explain.onnx")
    parser.add_argument("--format", default="pt2", choices=["pt2", "onnx"], help="default: %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="only the program, not compiled for this machine")
    parser.add_argument(
        "--targets", type=shared.positive, default=1, metavar="K", help="classes in the self-test (default: %(default)s)"
    )
    parser.add_argument("--random", action="store_true", help="random weights: nothing is loaded but the architecture")
    parser.add_argument("--image", metavar="FILE", help="a picture for the self-test (default: noise)")
    parser.add_argument("--text", help=f"a text for the self-test of a model of texts (default: {_TEXT!r})")
    shared.model(parser)
    shared.method(parser)
    group = parser.add_argument_group("computing")
    group.add_argument("--precision", default="float32", choices=precision.PRECISIONS, help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    """Write the file."""
    out = Path(options.out)
    if out.suffix != f".{options.format}":
        raise InputError(f"--out {options.out!r} must end in .{options.format}, which --format says")
    if options.format == "onnx":
        onnx.require()
    with tempfile.TemporaryDirectory(prefix="fastrel-") as folder:
        written = write(
            shared.settings(options, random=options.random),
            Path(folder) / "explain.pt2" if options.format == "onnx" else out,
            compile=options.format == "pt2" and not options.no_compile,
            targets=options.targets,
            image=None if options.image is None else pictures.read(options.image).image,
            text=options.text,
        )
        if options.format == "onnx":
            written = [onnx.write(written[0], out)]
    for one in written:
        print(f"-> {one}: {one.stat().st_size / 1e6:.1f} MB")
    return 0


def write(
    settings: Settings,
    path: Path,
    *,
    compile: bool,
    targets: int = 1,
    image: Image.Image | None = None,
    text: str | None = None,
) -> list[Path]:
    """Export a model that settings name, with a self-test on this picture (default: noise) or text; the files."""
    loaded = settings.load()
    kind, foreign = ("pictures", "--text") if loaded.kind == "image" else ("texts", "--image")
    if (text if loaded.kind == "image" else image) is not None:
        raise InputError(f"{settings.model or 'the embedded model'} is a model of {kind}: {foreign} is none of its inputs")
    args, kwargs = loaded.arguments(loaded.inputs(_samples(loaded, image or pictures.noise(), text or _TEXT)))
    explainer = settings.explainer(loaded)
    export(explainer, *args, path=path, targets=targets, loaded=loaded, compile=compile, **kwargs)
    return [path, compiled.beside(path)] if compile else [path]


def _samples(loaded: Loaded, image: Image.Image, text: str) -> list[Sample]:
    """Two that go into the file as its self-test."""
    if loaded.kind == "image":
        return [loaded.reader(image)[0], loaded.reader(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))[0]]
    return [loaded.reader(text)[0]] * 2
