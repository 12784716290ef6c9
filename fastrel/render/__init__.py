"""Explanations as pictures and pages."""

from fastrel.render.overlay import as_picture, overlay, side_by_side, table
from fastrel.render.text import page, save_page, words

__all__ = ["as_picture", "overlay", "page", "save_page", "side_by_side", "table", "words"]
