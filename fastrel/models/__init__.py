"""From a name to a model with what it takes to feed it: preprocessing or tokenizer, class names, kind.

`load("vit_base_patch16_224")`, `load("./my-bert")`, `load("my_module:build")`: one file per family of names.
"""

from fastrel.models.loaded import Kind, Loaded
from fastrel.models.loading import load
from fastrel.models.readers import Pictures, Sample, Texts

__all__ = ["Kind", "Loaded", "Pictures", "Sample", "Texts", "load"]
