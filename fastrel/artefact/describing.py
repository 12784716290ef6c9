"""What feeds a model, as data that an artefact carries: numbers of a preprocessing, or the file of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastrel.artefact.metadata import TOKENIZER
from fastrel.data.preprocessing import Preprocessing
from fastrel.models import Loaded


@dataclass(frozen=True)
class Description:
    """What feeds a model: `reader` as JSON, and files that it names, as text."""

    reader: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def describe(loaded: Loaded | None) -> Description:
    """What feeds a model; empty where that is code of a library, which an artefact cannot carry."""
    if loaded is None:
        return Description()
    if loaded.kind == "image" and isinstance(loaded.reader.prepare, Preprocessing):
        return Description({"preprocessing": loaded.reader.prepare.describe()})
    core = getattr(getattr(loaded.reader, "tokenizer", None), "backend_tokenizer", None)
    if core is None:
        return Description()
    tokenizer = loaded.reader.tokenizer
    reader = {"tokenizer": TOKENIZER, "limit": loaded.reader.limit, "pad": tokenizer.pad_token_id or 0}
    return Description(reader, {TOKENIZER: core.to_str()})
