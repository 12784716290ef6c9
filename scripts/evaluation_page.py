"""Puts results of scripts/evaluation.sh into docs/evaluation.md: python -m scripts.evaluation_page [results].

Each table stands between two marks; those whose results are not there stay as they are.
"""

import shutil
import sys
from pathlib import Path

from benchmarks.pages import Section

ROOT = Path(__file__).resolve().parent.parent
PAGE, FIGURES = ROOT / "docs" / "evaluation.md", ROOT / "docs" / "figures"
COMMAND = "bash scripts/evaluation.sh && python -m scripts.evaluation_page"


def main(results: Path) -> None:
    """Fill the page."""
    for name in Section.names(PAGE, COMMAND):
        section, folder, single = Section(PAGE, name, COMMAND), results / name, results / f"{name}.md"
        if (folder / "results.md").exists():
            plot = next(folder / own for own in ("curves.png", "scores.png") if (folder / own).exists())
            shutil.copy(plot, FIGURES / f"{name}-{plot.name}")
            table = (folder / "results.md").read_text().strip()
            section.write([table, "", f"![The {plot.stem} of this table](figures/{name}-{plot.name})"])
        elif single.exists() and single.stat().st_size:
            table = single.read_text()
            section.write([table[table.index("|") :].strip()])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "results"))
