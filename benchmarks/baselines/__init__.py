"""What fastrel is timed against and no registry has, written here by its published structure."""

from benchmarks.baselines.vit import ViT

__all__ = ["ViT"]
