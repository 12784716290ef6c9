"""The embedded default: a small ViT that knows which of ten kinds of clothing a scene holds, and scenes to try it on.

Made by scripts/make_scenes.py from Fashion-MNIST (Zalando, MIT licence). Everything here works offline.
"""

from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

CLASSES = (
    "T-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
SIZE = 64
MEAN, STD = 0.25, 0.33


def build_model() -> nn.Module:
    """The architecture, untrained: a plain timm ViT on 64 x 64 pixels, 8 x 8 patches, ten independent classes."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=SIZE, patch_size=8, embed_dim=96, depth=6, num_heads=3, num_classes=len(CLASSES)
    ).eval()


def load_model() -> nn.Module:
    """The trained model in float32, in eval mode. Its logits [B, 10] are positive for classes that it sees."""
    from safetensors.torch import load_file

    model = build_model()
    with as_file(files(__package__) / "model.safetensors") as path:
        state = load_file(path)
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model


def to_input(scenes: np.ndarray) -> Tensor:
    """Scenes [B, 64, 64] (grey) or [B, 64, 64, 3], uint8 -> model input [B, 3, 64, 64] float32."""
    x = torch.from_numpy(np.array(scenes)).float() / 255
    x = x[:, None].expand(-1, 3, -1, -1) if x.dim() == 3 else x.permute(0, 3, 1, 2)
    return ((x - MEAN) / STD).contiguous()


def sample_paths() -> list[Path]:
    """The picture files that ship with the package."""
    return sorted(Path(str(path)) for path in files(__package__).iterdir() if path.name.endswith(".png"))


def held_out() -> tuple[np.ndarray, np.ndarray]:
    """Scenes the model has not seen, [N, 64, 64] uint8, and the classes of their cells [N, 4] (row by row; -1: empty)."""
    with as_file(files(__package__) / "scenes.npz") as path, np.load(path) as archive:
        return archive["scenes"], archive["cells"].astype(int)
