"""Explanations as pictures and pages."""

from fastrel.render.overlay import STYLES, as_picture, contours, overlay, side_by_side, table
from fastrel.render.parts import Part, page, page_of, picture_of
from fastrel.render.text import words

__all__ = [
    "STYLES",
    "Part",
    "as_picture",
    "contours",
    "overlay",
    "page",
    "page_of",
    "picture_of",
    "side_by_side",
    "table",
    "words",
]
