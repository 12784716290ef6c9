"""Tables that a benchmark puts between two marks of a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Section:
    """What stands in `page` between the marks `<!-- NAME: COMMAND -->` and `<!-- end of NAME -->`."""

    page: Path
    name: str
    command: str

    @staticmethod
    def names(page: Path, command: str) -> list[str]:
        """Of the sections of a page that a command fills, in order."""
        return re.findall(rf"^<!-- (\S+): {re.escape(command)} -->$", page.read_text(), re.MULTILINE)

    def read(self) -> list[str]:
        """Its lines."""
        _, inside, _ = self._parts()
        return inside.strip().splitlines()

    def write(self, lines: Sequence[str]) -> None:
        """Put these lines there."""
        before, _, after = self._parts()
        self.page.write_text(before + "\n\n" + "\n".join(lines) + "\n\n" + after)

    def _parts(self) -> tuple[str, str, str]:
        text = self.page.read_text()
        begin, end = f"<!-- {self.name}: {self.command} -->", f"<!-- end of {self.name} -->"
        start, stop = text.index(begin) + len(begin), text.index(end)
        return text[:start], text[start:stop], text[stop:]
