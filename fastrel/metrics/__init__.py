"""Scores of explanations: does the map find what the prediction rests on?

Every function takes maps as arrays or tensors of any scale, larger meaning more relevant, and scores samples one by one, so
that means, standard errors and paired tests are the caller's.
"""

from fastrel.metrics.insertion import blurred, deletion, insertion
from fastrel.metrics.perturbation import Curve, perturb
from fastrel.metrics.pointing import energy_inside, pointing_game
from fastrel.metrics.rationale import (
    average_precision,
    comprehensiveness,
    iou_f1,
    spans,
    sufficiency,
    token_f1,
    top_tokens,
)
from fastrel.metrics.road import imputed, road
from fastrel.metrics.segmentation import SegmentationScores, segmentation
from fastrel.metrics.sensitivity import sensitivity_n

__all__ = [
    "Curve",
    "SegmentationScores",
    "average_precision",
    "blurred",
    "comprehensiveness",
    "deletion",
    "energy_inside",
    "imputed",
    "insertion",
    "iou_f1",
    "perturb",
    "pointing_game",
    "road",
    "segmentation",
    "sensitivity_n",
    "spans",
    "sufficiency",
    "token_f1",
    "top_tokens",
]
