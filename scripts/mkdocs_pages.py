"""A hook of mkdocs: pages of the site that are files outside docs/, with their links to docs/ made to fit."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]

PAGES = {
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}


def on_files(files: Any, config: Any) -> Any:
    """Add them."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        for prefix in ("](../docs/", "](docs/"):
            text = text.replace(prefix, "](")
        text = text.replace("\\|", "|")  # in code within tables, where this Markdown needs no backslash
        files.append(File.generated(config, page, content=text))
    return files
