"""`fastrel explain`: overlays for pictures, a page for a text."""

import argparse
import sys

from fastrel.commands import images, text
from fastrel.errors import InputError


def run(options: argparse.Namespace) -> int:
    """Dispatch on what is to be explained."""
    if options.text is not None:
        if options.images:
            raise InputError(f"give images or --text, not both ({options.images[0]!r} was given as an image)")
        return text.run(options)
    if not options.images:
        raise InputError("nothing to explain: give picture files, or --text")
    failures = images.run(options)
    for path, reason in failures:
        print(f"fastrel: not explained: {path}: {reason}", file=sys.stderr)
    return 1 if failures else 0
