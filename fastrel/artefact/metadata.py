"""What an artefact says about itself, as JSON inside the file. Needs no torch: a process that only decodes reads it too."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fastrel.errors import InputError

#: Of the layout of the file and of the program's inputs and outputs; any other one is refused.
FORMAT = 1

#: Class RANK + r stands for the class with the r-th highest logit, r from 0: RANK alone for the predicted one.
RANK = -(1 << 32)

#: Names of what lies in the file beside the program.
METADATA, SELF_TEST, TOKENIZER = "fastrel.json", "selftest.safetensors.b64", "tokenizer.json"


@dataclass(frozen=True)
class Input:
    """A tensor that the program reads.

    Attributes:
        name, dtype: as the model has them.
        shape: None for sizes that vary; names: of those, the same where they go together; else "".
        count: integers in it must be below this, if anything.
        longest: sizes that vary besides the batch may be at most this, if anything.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    count: int | None = None
    longest: int | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class MapOf:
    """A map that the program returns: of which input, whether its tokens lie on an image of it, and along which of its dimensions
    height and width lie."""

    name: str
    input: int
    grid: bool
    picture: tuple[int, int] | None = None


@dataclass(frozen=True)
class Metadata:
    """What an artefact says about itself.

    Attributes:
        inputs, maps: what the program reads after the classes, and returns after logits, classes and ok.
        classes: how many the model has; `class_names`: these, if they are known.
        kind, probabilities, source: as `fastrel.models.Loaded` has them.
        reader: {"preprocessing": …}, {"tokenizer": …} or empty: from a picture or text to the inputs.
        options: method, rules, start_layer, normalize, precision.
        report: operators without a rule of their own.
        weights: sha256 of all parameters and buffers.
        versions: of fastrel and torch.
        targets: how many the program explains at a time; None: any number.
        device: on which the program runs.
        compiled: of a compiled artefact what it needs: torch, machine, the processor's features; else empty.
    """

    inputs: tuple[Input, ...]
    maps: tuple[MapOf, ...]
    classes: int
    class_names: tuple[str, ...]
    kind: str
    probabilities: str | None
    source: Mapping[str, Any]
    reader: Mapping[str, Any]
    options: Mapping[str, Any]
    report: tuple[str, ...]
    weights: str
    versions: Mapping[str, str]
    targets: int | None = None
    device: str = "cpu"
    compiled: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        """As it is kept in the file."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Metadata:
        """From what is kept in a file.

        Raises:
            InputError: it is of another format.
        """
        given = json.loads(text)
        if given.get("format") != FORMAT:
            raise InputError(
                f"the artefact has format {given.get('format')!r}, this fastrel reads {FORMAT}; export it with the fastrel "
                "that shall read it"
            )
        given["inputs"] = tuple(
            Input(**{**x, "shape": tuple(x["shape"]), "names": tuple(x.get("names", ()))}) for x in given["inputs"]
        )
        given["maps"] = tuple(MapOf(**x) for x in given["maps"])
        given["class_names"], given["report"] = tuple(given["class_names"]), tuple(given["report"])
        return cls(**given)


def read(path: str | os.PathLike[str]) -> Metadata:
    """The metadata of the artefact at `path`.

    Raises:
        InputError: there is no such file, or it is no artefact of fastrel, or of another format.
    """
    return Metadata.from_json(extra(path, METADATA))


def extra(path: str | os.PathLike[str], name: str) -> str:
    """A text that lies beside the program.

    Raises:
        InputError: there is no such file, or it is no artefact of fastrel.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = [entry for entry in archive.namelist() if entry.endswith(f"extra/{name}")]
            if not found:
                raise InputError(f"{os.fspath(path)!r} is no artefact of fastrel: it holds no {name}")
            return archive.read(found[0]).decode()
    except FileNotFoundError as error:
        raise InputError(f"there is no artefact {os.fspath(path)!r}") from error
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise InputError(f"{os.fspath(path)!r} is no artefact of fastrel, or damaged: {error}") from error
