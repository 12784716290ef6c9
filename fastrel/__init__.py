"""fastrel explains the predictions of transformers, fast."""

from pathlib import Path as _Path

# In a checkout the Triton kernels lie beside the package; installed, they are a part of it.
if not (_Path(__file__).parent / "triton_kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

from fastrel.eager import propagation
from fastrel.errors import CaptureError, FastrelError, InputError, UnsupportedModelError
from fastrel.explainer import Explainer
from fastrel.explanation import Explanation
from fastrel.maps import TokenMap
from fastrel.options import Options
from fastrel.prediction import Prediction
from fastrel.trace import BlockTrace
from fastrel.transform.method import Method

__version__ = "0.1.0"

__all__ = [
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
    "propagation",
]
