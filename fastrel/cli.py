"""The `fastrel` command: arguments, exit codes and error messages. What each command does is in fastrel/commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastrel import __version__, data, methods
from fastrel.commands import build, compare, demo, doctor, evaluate, explain, verify
from fastrel.errors import FastrelError
from fastrel.evaluation import scorers
from fastrel.options import RULES

EPILOG = """\
exit codes: 0 all went well, 1 some inputs could not be explained (the others were), 2 nothing could be done

examples:
  fastrel demo
  fastrel explain cat.jpg --model vit_base_patch16_224 --out maps
  fastrel explain --text "a gripping, clever film" --model ./my-bert --out map.html
  fastrel compare cat-and-dog.jpg --model vit_base_patch16_224 --target 281 207 --out compare.png
  fastrel evaluate --data mosaics --metric pointing segmentation --out results
  fastrel verify --model swin_tiny_patch4_window7_224 --random
  fastrel methods
  fastrel doctor
"""

EVALUATE_EPILOG = """\
A run that was interrupted goes on where it was when the same command is given again. MODULE:FUNCTION is a function of yours
that returns the model (for texts: the model and its tokenizer).

examples:
  fastrel evaluate --data mosaics --methods transformer_attribution rollout --metric pointing segmentation --out results
  fastrel evaluate --data images:photos --model vit_base_patch16_224 --metric perturbation --limit 500 --out results
  fastrel evaluate --data imagenet-seg:gtsegs_ijcv.mat --model vit_base_patch16_224 --metric segmentation --out results
  fastrel evaluate --data eraser:movies/val.jsonl --model ./my-bert --metric rationale faithfulness --out results
"""

EXPLAIN_EPILOG = """\
examples:
  fastrel explain scene.png --out maps                                      the embedded model
  fastrel explain *.jpg --model vit_base_patch16_224 --out maps             timm, pretrained weights
  fastrel explain cat.jpg --model deit_tiny_patch16_224 --weights deit.pth --target 281 tiger --out maps --npz
  fastrel explain --text "not bad at all" --model ./my-bert --target 0 1 --out map.html
"""


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="fastrel",
        description="Explain the predictions of transformers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastrel {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    sub = commands.add_parser("demo", parents=[common], help="explain the shipped samples with the embedded model, offline")
    sub.add_argument("--out", default="fastrel-demo", metavar="DIR", help="where the overlays go (default: %(default)s)")
    sub.add_argument("--score", action="store_true", help="score the maps on held-out scenes instead, as a table")
    sub.set_defaults(run=demo.run)

    sub = commands.add_parser(
        "explain",
        parents=[common],
        help="explain images or a text with a model of yours",
        epilog=EXPLAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("images", nargs="*", metavar="IMAGE", help="picture files")
    sub.add_argument("--text", help="a text to explain instead of images")
    sub.add_argument("--model", metavar="NAME", help="timm model name; with --text a Hugging Face name or folder")
    sub.add_argument(
        "--weights", metavar="FILE", help="weights of the timm model (.pth, .safetensors); default: pretrained"
    )
    sub.add_argument(
        "--target",
        nargs="+",
        metavar="CLASS",
        help="class numbers, or names (or parts of them); default: the predicted class",
    )
    sub.add_argument(
        "--method", default="transformer_attribution", choices=list(methods.METHODS), help="default: %(default)s"
    )
    sub.add_argument("--rules", default="positive", choices=RULES, help="default: %(default)s")
    sub.add_argument(
        "--start-layer", type=int, metavar="N", help="first attention block, negative from the output (default: 0)"
    )
    sub.add_argument(
        "--normalize", action="store_true", default=None, help="normalise rows in the rollout, as BERT code does"
    )
    sub.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at a time (default: %(default)s)")
    sub.add_argument("--out", required=True, metavar="PATH", help="folder for overlays; with --text an .html file")
    sub.add_argument("--style", default="blend", choices=["blend", "contours"], help="default: %(default)s")
    sub.add_argument("--npz", action="store_true", help="also write the raw maps, one .npz per image")
    sub.set_defaults(run=explain.run)

    sub = commands.add_parser("compare", parents=[common], help="one picture, several methods, a row per class")
    sub.add_argument("image", metavar="IMAGE", help="picture file")
    sub.add_argument("--methods", nargs="+", metavar="METHOD", default=list(compare.DEFAULT), help="default: %(default)s")
    sub.add_argument("--target", nargs="+", metavar="CLASS", help="class numbers or names; default: the top two")
    sub.add_argument("--model", metavar="NAME", help="timm model name; default: the embedded model")
    sub.add_argument("--weights", metavar="FILE", help="weights of the timm model")
    sub.add_argument("--rules", default="positive", choices=RULES, help="default: %(default)s")
    sub.add_argument("--out", required=True, metavar="FILE", help="the figure, for instance compare.png")
    sub.set_defaults(run=compare.run)

    sub = commands.add_parser(
        "evaluate",
        parents=[common],
        help="score methods over a data set: tables and plots",
        epilog=EVALUATE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = "; ".join(f"{name}: {what}" for name, (_, what) in data.READERS.items())
    sub.add_argument("--data", required=True, metavar="KIND:PATH", help=f"what to explain. {kinds}")
    sub.add_argument(
        "--model", metavar="NAME", help="timm or Hugging Face model, or MODULE:FUNCTION; default: the embedded one"
    )
    sub.add_argument("--weights", metavar="FILE", help="weights of the timm model")
    sub.add_argument(
        "--methods",
        nargs="+",
        default=["transformer_attribution"],
        metavar="METHOD",
        help="the first is compared with the others",
    )
    sub.add_argument("--rules", nargs="+", default=["positive"], choices=RULES, help="default: positive")
    sub.add_argument(
        "--metric",
        nargs="+",
        required=True,
        choices=[*scorers.IMAGE_SCORERS, *scorers.TEXT_SCORERS],
        help="pictures: the first four; texts: the last two",
    )
    sub.add_argument("--start-layer", type=int, metavar="N", help="of transformer attribution (default: 0)")
    sub.add_argument("--normalize", action="store_true", default=None, help="of transformer attribution, as BERT code does")
    sub.add_argument("--limit", type=int, metavar="N", help="a random N of the items")
    sub.add_argument("--seed", type=int, default=0, help="which ones (default: %(default)s)")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder for scores, tables and plots")
    sub.set_defaults(run=evaluate.run)

    sub = commands.add_parser("methods", parents=[common], help="the attribution methods, their sources and costs")
    sub.set_defaults(run=list_methods)

    sub = commands.add_parser(
        "verify", parents=[common], help="check on a model of yours that its explanations are right; exit code 1 if not"
    )
    sub.add_argument(
        "--model", metavar="NAME", help="timm model name, MODULE:FUNCTION, or with --text a Hugging Face name or folder"
    )
    sub.add_argument("--weights", metavar="FILE", help="weights of the timm model; default: pretrained")
    sub.add_argument("--random", action="store_true", help="random weights of the timm model: nothing is loaded")
    sub.add_argument("--image", metavar="FILE", help="a picture to check on (default: noise)")
    sub.add_argument("--text", help="a text to check a Hugging Face classifier on")
    sub.add_argument("--rules", choices=RULES, default="positive", help="(default: %(default)s)")
    sub.add_argument("--start-layer", type=int, metavar="N", help="first block of the chain (default: 0)")
    sub.set_defaults(run=verify.run)

    sub = commands.add_parser("build", parents=[common], help="compile the kernels now instead of at first use")
    sub.add_argument(
        "--cuda", action="store_true", help="the CUDA passes, for GPUs without Triton, instead of the CPU kernels"
    )
    sub.set_defaults(run=build.run)

    sub = commands.add_parser("doctor", parents=[common], help="versions, devices and backends, with reasons")
    sub.set_defaults(run=doctor.run)
    return parser


def list_methods(options: argparse.Namespace) -> int:
    """`fastrel methods`."""
    for method in methods.METHODS.values():
        print(f"{method.name}\n    {method.summary}\n    {method.source}; cost in forward passes: {method.cost}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = build_parser().parse_args(argv)
    try:
        return options.run(options)
    except (FastrelError, OSError, ImportError) as error:
        if options.debug:
            raise
        print(f"fastrel: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastrel: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
