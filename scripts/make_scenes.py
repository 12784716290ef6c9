"""Build what `fastrel demo` ships: a small ViT trained on scenes of several objects, samples and a held-out set.

    apt-get install dataset-fashion-mnist
    python scripts/make_scenes.py train --steps 4500 --batch 64                       # fastrel/demo/model.safetensors
    python scripts/make_scenes.py train --steps 5000 --batch 64 --resume --seed 1     # about 20 minutes each on 2 cores
    python scripts/make_scenes.py data                              # fastrel/demo/scenes.npz and scene*.png

A scene is a 2 x 2 mosaic of photographs from Fashion-MNIST (MIT licence), each of another class, some cells left empty,
each object moved at random within its cell. The model says for each class whether it is present (multi-label).
"""

import argparse
import gzip
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from fastrel.demo import CLASSES, SIZE, build_model, load_model, to_input

DATA = Path("/usr/share/datasets/fashion-mnist")
DEMO = Path(__file__).parent.parent / "fastrel" / "demo"
CELL = SIZE // 2


def load(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 28, 28] uint8 and labels [N] of a split, "train" or "t10k"."""
    with gzip.open(DATA / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(DATA / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images, labels


def make(
    images: np.ndarray, labels: np.ndarray, count: int, rng: np.random.Generator, empty: float
) -> tuple[np.ndarray, np.ndarray]:
    """Scenes [count, 64, 64] uint8 and what their four cells hold [count, 4], -1 for an empty cell."""
    by_class = [np.flatnonzero(labels == c) for c in range(len(CLASSES))]
    scenes, cells = np.zeros((count, SIZE, SIZE), np.uint8), np.full((count, 4), -1)
    for i in range(count):
        for cell, c in enumerate(rng.permutation(len(CLASSES))[:4]):
            if cell and rng.random() < empty:
                continue
            picture = images[rng.choice(by_class[c])]
            picture = picture[:, ::-1] if rng.random() < 0.5 else picture
            top, left = (cell // 2) * CELL + rng.integers(5), (cell % 2) * CELL + rng.integers(5)
            scenes[i, top : top + 28, left : left + 28] = picture
            cells[i, cell] = c
        order = rng.permutation(4)  # the first cell is never empty, so any place may be
        blocks = scenes[i].reshape(2, CELL, 2, CELL).transpose(0, 2, 1, 3).reshape(4, CELL, CELL)[order]
        scenes[i] = blocks.reshape(2, 2, CELL, CELL).transpose(0, 2, 1, 3).reshape(SIZE, SIZE)
        cells[i] = cells[i][order]
    return scenes, cells


def presence(cells: np.ndarray) -> torch.Tensor:
    """Which classes are present, [count, 10] of 0 and 1."""
    found = np.zeros((len(cells), len(CLASSES) + 1), np.float32)
    found[np.arange(len(cells))[:, None], cells] = 1
    return torch.from_numpy(found[:, :-1])


def train(steps: int, batch: int, seed: int, resume: bool) -> None:
    """Train the model, from scratch or further, and write its weights in half precision."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images, labels = load("train")
    held_out = make(*load("t10k"), 1000, np.random.default_rng(1), 0.25)
    model = load_model() if resume else build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if resume else 1.5e-3, weight_decay=0.05, betas=(0.9, 0.98))

    def rate(step: int) -> float:
        return min(step / 200, 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start = time.time()
    for step in range(steps):
        scenes, cells = make(images, labels, batch, rng, 0.25)
        loss = F.binary_cross_entropy_with_logits(model(to_input(scenes)), presence(cells))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 199 or step == steps - 1:
            with torch.no_grad():
                right = (model(to_input(held_out[0])) > 0) == (presence(held_out[1]) > 0)
            print(
                f"step {step + 1}: loss {loss.item():.3f}, held-out accuracy per class {right.float().mean():.4f}, "
                f"whole scene {right.all(1).float().mean():.3f}, {time.time() - start:.0f} s",
                flush=True,
            )
    save_file({name: t.half() for name, t in model.state_dict().items()}, DEMO / "model.safetensors")


def data(count: int, samples: int) -> None:
    """Write the held-out scenes and a few samples."""
    images, labels = load("t10k")
    scenes, cells = make(images, labels, count, np.random.default_rng(2), 0.1)
    np.savez_compressed(DEMO / "scenes.npz", scenes=scenes, cells=cells.astype(np.int8))
    scenes, cells = make(images, labels, samples, np.random.default_rng(12), 0.0)
    for i, (scene, held) in enumerate(zip(scenes, cells, strict=True)):
        names = "-".join(CLASSES[c].lower().replace(" ", "").replace("-", "") for c in held)
        Image.fromarray(scene).save(DEMO / f"scene{i}-{names}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "data"])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the weights that are there")
    parser.add_argument("--count", type=int, default=200, help="held-out scenes")
    parser.add_argument("--samples", type=int, default=4)
    options = parser.parse_args()
    if options.what == "train":
        train(options.steps, options.batch, options.seed, options.resume)
    else:
        data(options.count, options.samples)
