"""A call in the manner of Hugging Face's pipelines. Needs pyarrow: pip install "fastrel[batch]"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastrel.batch import Explain
from fastrel.batch.row import Row
from fastrel.errors import InputError
from fastrel.render import words


class Pipeline:
    """`Pipeline("my-bert")("a fine film")` -> what the model says, and which words made it.

    Args:
        model: a name, folder or MODULE:FUNCTION, as on the command line; None: the model that ships.
        options: of `fastrel.batch.Explain`, `target=("top3",)` or `device="cuda"`, say.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self.explain = Explain(model, **options)

    def __call__(self, inputs: Any) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """One dict per class explained, for one input; a list of these for a list.

        Each has "label", "score" (its probability), and of texts "words", [(word, relevance), …], of pictures "map" [gh, gw].

        Args:
            inputs: a text, or the bytes of a picture, a PIL image or an array [H, W, 3] of uint8; or a list of such.

        Raises:
            InputError: an input that cannot be explained; the message says which.
        """
        if not isinstance(inputs, (list, tuple)):
            return self._all([inputs])[0]
        return self._all(inputs)

    def _all(self, inputs: Sequence[Any]) -> list[list[dict[str, Any]]]:
        made: list[list[dict[str, Any]]] = [[] for _ in inputs]
        for row in self.explain.rows_of([str(i) for i in range(len(inputs))], inputs):
            if row.error is not None:
                raise InputError(f"input {row.item}: {row.error}")
            made[int(row.item)].append(_answer(row))
        return made


def _answer(row: Row) -> dict[str, Any]:
    answer: dict[str, Any] = {"label": row.target_name or row.target, "score": row.probability}
    if row.tokens is not None and row.relevance is not None:
        return {**answer, "words": words(row.tokens, row.relevance)}
    return {**answer, "map": row.map if row.map is not None else row.relevance}
