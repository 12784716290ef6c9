"""The `fastrel` command: arguments, exit codes and error messages. What each command does is in fastrel/commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol

from fastrel import __version__
from fastrel.commands import (
    batch,
    bench,
    build,
    compare,
    demo,
    doctor,
    evaluate,
    explain,
    export,
    list_methods,
    serve,
    show,
    verify,
)
from fastrel.errors import FastrelError

EPILOG = """\
exit codes: 0 all went well, 1 some inputs could not be explained (the others were), 2 nothing could be done

examples:
  fastrel demo
  fastrel explain cat.jpg --model vit_base_patch16_224 --out maps
  fastrel explain --text "a gripping, clever film" --model ./my-bert --out map.html
  fastrel batch photos/ --model vit_base_patch16_224 --target top3 --out maps
  fastrel compare cat-and-dog.jpg --model vit_base_patch16_224 --target 281 207 --out compare.png
  fastrel evaluate --data mosaics --metric pointing segmentation --out results
  fastrel export --model vit_base_patch16_224 --out explain.pt2
  fastrel serve explain.pt2 --ui
  fastrel verify --model swin_tiny_patch4_window7_224 --random
  fastrel bench --model vit_base_patch16_224 --random
  fastrel methods
  fastrel doctor
"""


class Command(Protocol):
    """What a module in fastrel/commands holds: one line of help, examples, its options, and what it does."""

    HELP: str
    EPILOG: str

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add its options."""

    def run(self, options: argparse.Namespace) -> int:
        """Do it; the exit code."""
        ...


#: name -> module; a command of one's own is a file and a line here.
COMMANDS: dict[str, Command] = {
    "demo": demo,
    "explain": explain,
    "batch": batch,
    "show": show,
    "compare": compare,
    "evaluate": evaluate,
    "export": export,
    "serve": serve,
    "methods": list_methods,
    "verify": verify,
    "bench": bench,
}


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
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            parents=[common],
            help=command.HELP,
            epilog=command.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.configure(sub)
        sub.set_defaults(run=command.run)

    sub = commands.add_parser("build", parents=[common], help="compile the kernels now instead of at first use")
    sub.add_argument(
        "--cuda", action="store_true", help="the CUDA passes, for GPUs without Triton, instead of the CPU kernels"
    )
    sub.set_defaults(run=build.run)

    sub = commands.add_parser("doctor", parents=[common], help="versions, devices and backends, with reasons")
    sub.set_defaults(run=doctor.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = build_parser().parse_args(argv)
    try:
        return options.run(options)
    except (FastrelError, OSError, ImportError) as error:
        if options.debug:
            print(getattr(error, "details", ""), file=sys.stderr)
            raise
        print(f"fastrel: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastrel: interrupted; batch, explain and evaluate go on where they were when run again", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
