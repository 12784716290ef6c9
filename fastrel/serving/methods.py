"""Several artefacts of one model, told apart by their methods."""

from __future__ import annotations

from collections.abc import Sequence

from fastrel.artefact import metadata
from fastrel.artefact.metadata import Metadata
from fastrel.errors import InputError


def by_method(paths: Sequence[str]) -> dict[str, Metadata]:
    """What artefacts of one model say about themselves, by method, and where that does not tell them apart by rules too.

    Raises:
        InputError: one that has several maps, two by the same name, or another model's.
    """
    abouts = [metadata.read(path) for path in paths]
    found: dict[str, Metadata] = {}
    for path, about in zip(paths, abouts, strict=True):
        if len(about.maps) != 1:
            raise InputError(f"the artefact {path!r} has {len(about.maps)} maps; one is served")
        first = abouts[0]
        if (about.weights, about.inputs, about.reader) != (first.weights, first.inputs, first.reader):
            raise InputError(f"the artefact {path!r} is of another model or reads other inputs than {paths[0]!r}")
        name = str(about.options["method"])
        if sum(one.options["method"] == name for one in abouts) > 1:
            name = f"{name}, {about.options['rules']}"
        if name in found:
            raise InputError(f"two artefacts explain by {name!r}; one of them is enough")
        found[name] = about
    return found
