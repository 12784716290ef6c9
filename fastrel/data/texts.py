"""Texts with the words that people give as the reason."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastrel.data.items import TextItem
from fastrel.errors import InputError


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a plain or gzipped text file, empty ones left out."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def eraser(path: Path) -> list[TextItem]:
    """ERASER (DeYoung et al., ACL 2020): a JSON object per line.

    Its own format: annotation_id, classification and evidences, lists of {docid, start_token, end_token}; document
    `docid` is the file docs/<docid> beside it. Also {id, label, text, spans: [[start, end]]} in one file. Words are split
    at blanks and spans count them, the end not included. Classes are numbered as sorted (NEG 0, POS 1). Items without
    evidence are left out.
    """
    found = []
    for number, line in _lines(path):
        try:
            entry = json.loads(line)
            found.append(_inline(entry) if "text" in entry else _with_documents(entry, path.parent / "docs"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number}: not an ERASER item: {error!r}") from error
    labels = sorted({label for _, label, _, _ in found})
    items = []
    for name, label, words, spans in found:
        rationale = np.zeros(len(words), bool)
        for start, end in spans:
            rationale[start:end] = True
        if rationale.any():
            items.append(TextItem(name, name, words, label if isinstance(label, int) else labels.index(label), rationale))
    return items


def _inline(entry: dict[str, Any]) -> tuple[str, Any, tuple[str, ...], list[tuple[int, int]]]:
    return str(entry["id"]), entry["label"], tuple(entry["text"].split()), [(a, b) for a, b in entry["spans"]]


def _with_documents(entry: dict[str, Any], folder: Path) -> tuple[str, Any, tuple[str, ...], list[tuple[int, int]]]:
    evidence = [part for group in entry["evidences"] for part in group]
    documents = {part["docid"] for part in evidence} or set(entry.get("docids") or [entry["annotation_id"]])
    if len(documents) != 1:
        raise ValueError(f"evidence in {len(documents)} documents; one is supported")
    words = tuple((folder / documents.pop()).read_text(encoding="utf-8").split())
    spans = [(part["start_token"], part["end_token"]) for part in evidence]
    return str(entry["annotation_id"]), entry["classification"], words, spans


_NODE = re.compile(r"\((\d) ([^()]+)\)")


def sst(path: Path) -> list[TextItem]:
    """Stanford Sentiment Treebank (Socher et al., EMNLP 2013): trees with a label 0 … 4 on every phrase and word.

    Neutral sentences (2) are left out; class 0 is negative, 1 positive. The rationale are the words whose own label has the
    sentence's polarity; sentences without one are left out.
    """
    items = []
    for number, line in _lines(path):
        whole, leaves = re.match(r"\((\d) ", line), _NODE.findall(line)
        if whole is None or not leaves:
            raise InputError(f"{path}, line {number}: not a tree: {line.strip()[:60]!r}")
        polarity = int(whole[1]) - 2
        rationale = np.array([(int(label) - 2) * polarity > 0 for label, _ in leaves])
        words = tuple(word.replace("-LRB-", "(").replace("-RRB-", ")").replace("\\/", "/") for _, word in leaves)
        if polarity and rationale.any():
            name = f"{path.name}:{number}"
            items.append(TextItem(name, name, words, int(polarity > 0), rationale))
    return items
