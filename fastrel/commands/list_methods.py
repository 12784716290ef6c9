"""`fastrel methods`: the attribution methods."""

import argparse

from fastrel import methods

HELP = "the attribution methods, their sources and costs"
EPILOG = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(options: argparse.Namespace) -> int:
    """List them."""
    for method in methods.METHODS.values():
        print(f"{method.name}\n    {method.summary}\n    {method.source}; cost in forward passes: {method.cost}")
    return 0
