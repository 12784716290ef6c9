"""Where actors died, kept outside of them: imports nothing, so that it can be sent to a bare process."""

from __future__ import annotations


class Attempts:
    """Remembers which batches were begun and not ended: where actors died.

    Getting somewhere is to finish a batch or an item, or to find an item that kills.
    """

    def __init__(self, patience: int) -> None:
        self.patience, self.idle_starts = patience, 0
        self.begun: dict[str, int] = {}
        self.at: dict[str, str] = {}
        self.killers: dict[str, set[str]] = {}

    def start(self) -> bool:
        """An actor starts; False: too many did without getting anywhere."""
        self.idle_starts += 1
        return self.idle_starts <= self.patience

    def begin(self, batch: str) -> tuple[int, set[str]]:
        """A batch begins: how often it did before, and the items at which it ended badly."""
        before = self.begun.get(batch, 0)
        self.begun[batch] = before + 1
        if batch in self.at:
            self.killers.setdefault(batch, set()).add(self.at.pop(batch))
            self.idle_starts = 0
        return before, self.killers.get(batch, set())

    def item(self, batch: str, item: str | None) -> None:
        """It is at this item; None: at none."""
        if item is None:
            self.at.pop(batch, None)
            self.idle_starts = 0
        else:
            self.at[batch] = item

    def end(self, batch: str) -> None:
        """A batch is finished."""
        self.idle_starts = 0
        self.begun.pop(batch, None)
        self.killers.pop(batch, None)
