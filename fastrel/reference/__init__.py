"""The method in plain PyTorch: the specification that every other path of fastrel is tested against.

Four files, to be read next to the papers: `rules` (one function per layer), `gradients` (AttnLRP's), `tape` (a forward pass that can
be replayed backwards with those rules) and `models` (a ViT and a BERT written on the tape). It materialises every [heads, T, T]
tensor and calls nothing else of fastrel.
"""

from fastrel.reference.models import Block, Trace, bert, trace, vit
from fastrel.reference.rollout import rollout
from fastrel.reference.tape import Tape

__all__ = ["Block", "Tape", "Trace", "bert", "rollout", "trace", "vit"]
