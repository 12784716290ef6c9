"""Explanations as pictures and pages."""

from fastrel.render.overlay import STYLES, as_picture, contours, overlay, side_by_side, table
from fastrel.render.text import page, save_page, words

__all__ = ["STYLES", "as_picture", "contours", "overlay", "page", "save_page", "side_by_side", "table", "words"]
