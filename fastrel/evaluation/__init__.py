"""Evaluating methods over a data set: what `fastrel evaluate` runs.

`subjects` (a model with what it needs to read items) explain an item, `scorers` turn the map into numbers, `store` keeps
them where an interrupted run finds them again, `summary` and `plots` make tables and figures of them.
"""

from fastrel.evaluation.run import Configuration, configurations, evaluate, labels
from fastrel.evaluation.store import Store
from fastrel.evaluation.subjects import ImageSubject, TextSubject
from fastrel.evaluation.summary import Row, summarise

__all__ = [
    "Configuration",
    "ImageSubject",
    "Row",
    "Store",
    "TextSubject",
    "configurations",
    "evaluate",
    "labels",
    "summarise",
]
