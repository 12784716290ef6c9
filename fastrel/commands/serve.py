"""`fastrel serve`: explanations over HTTP."""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from fastrel import methods
from fastrel.commands import export as exporting
from fastrel.commands import options as shared
from fastrel.commands.doctor import available_cores
from fastrel.errors import InputError, needed

HELP = "serve explanations over HTTP"
EPILOG = """\
POST /explain and /predict: a picture's bytes, or JSON with "image" (base64) or "text"; ?target=281&target=tabby, ?top=3,
?timeout_ms=500. Answers are JSON, or by Accept: image/png (an overlay), application/vnd.apache.arrow.stream. GET /health, /metrics,
/model.

examples:
  fastrel serve explain.pt2
  fastrel serve --model vit_base_patch16_224 --workers 4 --ui
  curl --data-binary @cat.jpg 'localhost:8000/explain?target=281&target=207'
  curl --data-binary @cat.jpg -H 'Accept: image/png' 'localhost:8000/explain?target=tabby' > overlay.png
"""

#: Options that say which model is exported, and how.
OF_MODELS = (
    "weights",
    "classes",
    "dtype",
    "device",
    "method",
    "rules",
    "start_layer",
    "normalize",
    "random",
    "compile",
    "beside",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "artefact",
        nargs="*",
        metavar="ARTEFACT",
        help="what `fastrel export` wrote, or give --model; several are of one model by other methods: ?method=rollout",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine alone; 0.0.0.0: everybody")
    parser.add_argument("--port", type=shared.positive, default=8000, metavar="N", help="default: %(default)s")
    parser.add_argument("--ui", action="store_true", help="a page for people at /")
    group = parser.add_argument_group("processes and batches")
    group.add_argument(
        "--workers", type=shared.positive, default=2, metavar="N", help="that explain; one that dies ends the service if it is "
        "the only one (default: %(default)s)"
    )  # fmt: skip
    group.add_argument(
        "--decoders", type=shared.positive, default=2, metavar="N", help="that decode (default: %(default)s)"
    )
    group.add_argument(
        "--threads", type=shared.positive, metavar="N", help="of each that explains (default: cores / workers)"
    )
    group.add_argument(
        "--batch", type=shared.positive, default=8, metavar="N", help="explained together (default: %(default)s)"
    )
    group.add_argument(
        "--wait-ms",
        type=shared.positive,
        default=5,
        metavar="N",
        help="for others, where any are worked on (default: %(default)s)",
    )
    group = parser.add_argument_group("limits")
    for name, default, what in (
        ("queue", 64, "requests admitted at a time; others get 429"),
        ("timeout-ms", 10_000, "for a request; then 408"),
        ("upload-ms", 10_000, "for its upload; then 408"),
        ("max-body", 10_000_000, "bytes of a request; then 413"),
        ("max-pixels", 50_000_000, "of a picture; then 422"),
        ("max-targets", 16, "of a request; then 422"),
    ):
        group.add_argument(
            f"--{name}", type=shared.positive, default=default, metavar="N", help=f"{what} (default: %(default)s)"
        )
    parser.add_argument(
        "--beside",
        nargs="+",
        default=[],
        choices=list(methods.METHODS),
        metavar="METHOD",
        help="with --model: further methods",
    )
    parser.add_argument("--random", action="store_true", help="random weights: nothing is loaded but the architecture")
    parser.add_argument(
        "--compile", action="store_true", help="with --model: compile it for this machine first, for minutes"
    )
    shared.model(parser, default="none: give ARTEFACT")
    shared.method(parser)


def run(options: argparse.Namespace) -> int:
    """Serve until stopped."""
    with needed("serve", "serve"):
        from fastrel.serving.front import serve
        from fastrel.serving.service import Service
    if bool(options.artefact) == (options.model is not None):
        raise InputError("give an ARTEFACT of fastrel export, or --model NAME")
    names = ("host", "port", "ui", "workers", "decoders", "batch", "wait_ms", "queue", "timeout_ms", "upload_ms",
             "max_body", "max_pixels", "max_targets")  # fmt: skip
    given = {name: getattr(options, name) for name in names}
    given["threads"] = options.threads or max(1, available_cores() // options.workers)
    if options.artefact:
        _refuse(options)
        first, *beside = options.artefact
        return serve(Service(first, beside=tuple(beside), **given))
    with tempfile.TemporaryDirectory(prefix="fastrel-") as folder:
        settings = shared.settings(options, random=options.random)
        chosen = [settings, *(replace(settings, method=name) for name in options.beside)]
        paths = [Path(folder) / f"{i}.pt2" for i in range(len(chosen))]
        # In a process of its own, for what it takes is not given back.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            for one, path in zip(chosen, paths, strict=True):
                pool.submit(exporting.write, one, path, compile=options.compile).result()
        return serve(Service(str(paths[0]), beside=tuple(map(str, paths[1:])), **given))


def _refuse(options: argparse.Namespace) -> None:
    """Raise InputError for what is said of a model that is not loaded here."""
    parser = argparse.ArgumentParser()
    configure(parser)
    defaults = parser.parse_args([])
    for name in OF_MODELS:
        if getattr(options, name) != getattr(defaults, name):
            word = name.replace("_", "-")
            raise InputError(f"--{word} belongs to --model; {options.artefact[0]!r} is served as it was exported")
