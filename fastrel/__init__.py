"""fastrel explains the predictions of transformers, fast."""

from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path
from typing import TYPE_CHECKING
from typing import Any as _Any

from fastrel.version import __version__

# In a checkout the Triton kernels lie beside the package; installed, they are a part of it.
if not (_Path(__file__).parent / "triton_kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

if TYPE_CHECKING:
    from fastrel import batch as batch
    from fastrel import data as data
    from fastrel import functional as functional
    from fastrel import methods as methods
    from fastrel import metrics as metrics
    from fastrel import models as models
    from fastrel import render as render
    from fastrel.artefact.exporting import export
    from fastrel.artefact.loading import Artefact, load
    from fastrel.eager import propagation
    from fastrel.errors import CaptureError, FastrelError, InputError, UnsupportedModelError
    from fastrel.explainer import Explainer
    from fastrel.explanation import Explanation
    from fastrel.maps import TokenMap
    from fastrel.options import Options
    from fastrel.prediction import Prediction
    from fastrel.trace import BlockTrace
    from fastrel.transform.method import Method

#: Where each public name is defined. Read when it is asked for: processes that only decode pictures need no torch.
_HOMES = {
    "Artefact": "artefact.loading",
    "BlockTrace": "trace",
    "CaptureError": "errors",
    "Explainer": "explainer",
    "Explanation": "explanation",
    "FastrelError": "errors",
    "InputError": "errors",
    "Method": "transform.method",
    "Options": "options",
    "Prediction": "prediction",
    "TokenMap": "maps",
    "UnsupportedModelError": "errors",
    "export": "artefact.exporting",
    "load": "artefact.loading",
    "propagation": "eager",
}

__all__ = [
    "Artefact",
    "BlockTrace",
    "CaptureError",
    "Explainer",
    "Explanation",
    "FastrelError",
    "InputError",
    "Method",
    "Options",
    "Prediction",
    "TokenMap",
    "UnsupportedModelError",
    "__version__",
    "export",
    "load",
    "propagation",
]


#: Packages that `import fastrel` gives, each imported when it is asked for. Others are found by their names too.
_PACKAGES = ("batch", "data", "functional", "methods", "metrics", "models", "render")

if not TYPE_CHECKING:  # to a type checker a name that is not there is an error

    def __getattr__(name: str) -> _Any:
        if name in _HOMES:
            globals()[name] = found = getattr(_import_module(f"fastrel.{_HOMES[name]}"), name)
            return found
        if name.startswith("_") or _find_spec(f"fastrel.{name}") is None:
            raise AttributeError(f"module 'fastrel' has no attribute {name!r}")
        return _import_module(f"fastrel.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
