"""Options that several commands share."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from fastrel import methods
from fastrel.batch import Explain
from fastrel.batch.settings import Settings
from fastrel.data.inputs import Content, Found, find
from fastrel.errors import InputError
from fastrel.graph.facts import MEMORIES
from fastrel.models.request import DTYPES
from fastrel.options import RULES, Backend
from fastrel.precision import PRECISIONS


def model(parser: argparse.ArgumentParser, default: str = "the embedded model") -> None:
    """Which model, and where it runs."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="timm or torchvision name, Hugging Face name or folder, or MODULE:FUNCTION, a function of yours that returns the "
        "model, (model, preprocessing), (model, tokenizer) with a tokenizer like Hugging Face's (it has convert_ids_to_tokens), or a "
        f"fastrel.models.Loaded; default: {default}",
    )
    group.add_argument(
        "--weights", metavar="PATH", help="weights instead of the model's own: .safetensors, .pth, or a folder of shards"
    )
    group.add_argument(
        "--classes",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="for models of pictures with text (CLIP, SigLIP): the classes in words, 'a photo of a cat' for instance",
    )
    group.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="default: %(default)s; stored: as the weights are"
    )
    device(group)


def device(parser: Any) -> None:
    """Where it runs."""
    parser.add_argument(
        "--device", default="auto", metavar="DEVICE", help="cpu, cuda, cuda:1, …; default: a GPU if there is one"
    )


def explaining(parser: argparse.ArgumentParser, several: bool = True) -> None:
    """How explanations are computed, the same for every command that computes any; of several items: how many at a time."""
    group = parser.add_argument_group("computing")
    group.add_argument("--precision", default="float32", choices=PRECISIONS, help="default: %(default)s")
    group.add_argument("--backend", default="auto", choices=get_args(Backend), help="default: auto")
    group.add_argument("--memory", default="normal", choices=MEMORIES, help="low: less of it, more time")
    if not several:
        return
    group.add_argument("--batch-size", type=positive, default=8, metavar="N", help="at a time (default: %(default)s)")
    group.add_argument(
        "--workers",
        type=natural,
        default=1,
        metavar="N",
        help="processes that read and decode ahead (default: 1; 0: one, and nothing ahead)",
    )


def method(parser: argparse.ArgumentParser) -> None:
    """Which method, with its options."""
    group = parser.add_argument_group("method")
    group.add_argument(
        "--method",
        choices=list(methods.METHODS),
        help=f"default: {methods.default('positive').name}, by other rules {methods.default('official').name}",
    )
    group.add_argument("--rules", default="positive", choices=RULES, help="default: %(default)s")
    group.add_argument(
        "--start-layer", type=int, metavar="N", help="first attention block, negative from the output (default: 0)"
    )
    group.add_argument(
        "--normalize", action="store_true", default=None, help="normalise rows in the rollout, as BERT code does"
    )


def inputs(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """What is to be explained."""
    group = parser.add_argument_group("inputs")
    group.add_argument(
        "inputs",
        nargs="+" if required else "*",
        metavar="INPUT",
        help="files, folders (with their sub-folders), patterns, @FILE (a list of these), .csv, .tsv, .jsonl and .parquet "
        "tables, .tar archives, folders that Hugging Face datasets saved",
    )
    group.add_argument("--column", metavar="NAME", help="of tables and data sets: paths or pictures, or texts")
    group.add_argument(
        "--pair-column",
        metavar="NAME",
        help="of tables and data sets: texts that a model reads together with those of --column",
    )
    group.add_argument(
        "--long",
        default="refuse",
        choices=["refuse", "window"],
        help="texts longer than the model reads: refuse them, or read them in overlapping windows (default: %(default)s)",
    )
    group.add_argument(
        "--target",
        nargs="+",
        metavar="CLASS",
        help="class numbers, names (or parts of them), or topK; default: the predicted",
    )


def asked(options: argparse.Namespace) -> tuple[Explain, Found]:
    """What explains the inputs of a command, and those that it holds; none is an error.

    Raises:
        InputError: pairs are asked of a model that reads pictures or a prompt alone, or there is nothing to explain.
    """
    column, pair_column = options.column, options.pair_column
    explain = Explain(**vars(settings(options)), pairs=pair_column is not None)
    kind = explain.loaded.kind
    if pair_column is not None and kind not in ("text", "multimodal"):
        what = "pictures" if kind == "image" else "one text, the prompt"
        raise InputError(f"--pair-column {pair_column}: {options.model!r} reads {what} alone, no pairs")
    content: Content = "image" if kind in ("image", "multimodal") else "text"
    found = find(options.inputs, content, column, pair_column)
    if not found.items:
        raise InputError(f"nothing to explain in {' '.join(options.inputs)}: no {content}s")
    return explain, found


def settings(options: argparse.Namespace, **changes: Any) -> Settings:
    """The settings that options give, those of a command that lacks some at their defaults."""
    given = {
        name: getattr(options, name)
        for name in ("model", "weights", "dtype", "device", "long", "method", "rules", "start_layer", "precision", "backend",
                     "memory", "batch_size")
        if hasattr(options, name)
    }  # fmt: skip
    target = getattr(options, "target", None)
    normalize = getattr(options, "normalize", None)
    made: dict[str, Any] = {
        "classes": tuple(getattr(options, "classes", ())),
        "target": None if target is None else tuple(target),
        "normalize_rollout": normalize,
    }
    return Settings(**{**given, **made, **changes})


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def natural(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)
