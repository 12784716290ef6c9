"""fastrel explains the predictions of transformers, fast."""

from fastrel.errors import CaptureError, FastrelError, InputError, UnsupportedModelError
from fastrel.explainer import Explainer, Prediction
from fastrel.explanation import BlockTrace, Explanation

__version__ = "0.1.0"

__all__ = [
    "BlockTrace",
    "CaptureError",
    "Explainer",
    "Explanation",
    "FastrelError",
    "InputError",
    "Prediction",
    "UnsupportedModelError",
]
