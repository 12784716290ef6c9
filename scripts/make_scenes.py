"""Build what `fastrel demo` ships: a small ViT trained on scenes of several objects, samples and a held-out set.

    apt-get install dataset-fashion-mnist
    python scripts/make_scenes.py train        # fastrel/demo/model.safetensors; half an hour on one core that has bfloat16
    python scripts/make_scenes.py data         # fastrel/demo/scenes.npz and scene*.png

A scene is a 2 x 2 mosaic of photographs from Fashion-MNIST (MIT licence), each of another class, some cells left empty,
each object moved at random within its cell. The model says for each class whether it is present (multi-label).

What it is trained on is what maps show afterwards, no map: the classes of a scene, read from the class token; and *where they are*, as
in LV-ViT (Jiang et al., NeurIPS 2021): each patch token, read by the same head, names the class of its cell where something is to be
seen, and none elsewhere. Patches are left out at random, a quarter of the scenes is seen cell by cell, and the cells of training
scenes are drawn each for itself, so that what lies in one says nothing about another.
"""

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from fastrel.demo import CLASSES, SIZE, build_model, to_input

DATA = Path("/usr/share/datasets/fashion-mnist")
DEMO = Path(__file__).parent.parent / "fastrel" / "demo"
CELL, PATCH = SIZE // 2, 8

#: Steps at the beginning in which the model sees single cells only.
ALONE = 600


def load(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 28, 28] uint8 and labels [N] of a split, "train" or "t10k"."""
    with gzip.open(DATA / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(DATA / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images, labels


def make(
    images: np.ndarray, labels: np.ndarray, count: int, rng: np.random.Generator, empty: float, repeat: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Scenes [count, 64, 64] uint8 and what their four cells hold [count, 4], -1 for an empty cell.

    With `repeat`, cells are drawn each for itself, so that one says nothing about another; without it their classes differ.
    """
    by_class = [np.flatnonzero(labels == c) for c in range(len(CLASSES))]
    scenes, cells = np.zeros((count, SIZE, SIZE), np.uint8), np.full((count, 4), -1)
    for i in range(count):
        classes = rng.integers(len(CLASSES), size=4) if repeat else rng.permutation(len(CLASSES))[:4]
        for cell, c in enumerate(classes):
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


def presence_in_patches(scenes: np.ndarray, cells: np.ndarray) -> torch.Tensor:
    """The class of each patch [count, 64, 10], 0 and 1: its cell's where something is to be seen in it, else none."""
    side = SIZE // PATCH
    seen = scenes.reshape(-1, side, PATCH, side, PATCH).mean((2, 4)) > 8
    of_patch = np.where(seen, cells.reshape(-1, 2, 2).repeat(side // 2, 1).repeat(side // 2, 2), -1)
    return presence(of_patch.reshape(-1, 1)).view(-1, side * side, len(CLASSES))


def by_cell(x: torch.Tensor) -> torch.Tensor:
    """What belongs to the patches of scenes [B, 64, D], cell by cell [4 B, 16, D]."""
    half = SIZE // PATCH // 2
    return x.view(-1, 2, half, 2, half, x.shape[-1]).transpose(2, 3).reshape(-1, half * half, x.shape[-1])


def start(model: nn.Module) -> None:
    """Places told apart by sines and cosines, and queries that are keys: tokens attend to what is like them and near them before
    anything is learned (after Trockman and Kolter, ICML 2023)."""
    width, side = model.embed_dim, SIZE // PATCH
    angle = torch.arange(float(side))[:, None] * 8 ** -torch.linspace(0, 1, width // 4)
    axis = torch.cat([angle.sin(), angle.cos()], 1)
    places = torch.cat([axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)], 2)
    with torch.no_grad():
        model.pos_embed[0, 1:] = 0.5 * places.reshape(side * side, width)
        for block in model.blocks:
            query = 0.08 * torch.randn(width, width)
            block.attn.qkv.weight[: 2 * width] = torch.cat([query, query])


def loss_of(model: nn.Module, scenes: np.ndarray, cells: np.ndarray, alone: bool, kept: float) -> torch.Tensor:
    """Cross-entropy of the class token and, ten times as heavy, of the patches, of which a random share is `kept`.

    Both are read by the model's own head. Where cells are `alone`, the model sees each by itself.
    """
    inner = model._pos_embed(model.patch_embed(to_input(scenes)))
    token, patches, of_patch = inner[:, :1], inner[:, 1:], presence_in_patches(scenes, cells)
    if alone:
        token, patches, of_patch = token.repeat_interleave(4, 0), by_cell(patches), by_cell(of_patch)
        cells = cells.reshape(-1, 1)
    count = patches.shape[1]
    chosen = torch.rand(len(patches), count).argsort(1)[:, : round(kept * count), None]
    patches, of_patch = (x.gather(1, chosen.expand(-1, -1, x.shape[2])) for x in (patches, of_patch))
    out = model.head(model.norm(model.blocks(torch.cat([token, patches], 1)))).float()
    whole = F.binary_cross_entropy_with_logits(out[:, 0], presence(cells))
    return whole + 10 * F.binary_cross_entropy_with_logits(out[:, 1:], of_patch)


def train(steps: int, batch: int, seed: int, state: Path) -> None:
    """Train the model from scratch, or on from the `state` that an interrupted run left, and write its weights in half precision."""
    images, labels = load("train")
    development = make(*load("t10k"), 1000, np.random.default_rng(1), 0.25)
    torch.manual_seed(seed)
    model = build_model().train()
    start(model)
    for block in model.blocks:
        block.attn.fused_attn = False  # faster so, in bfloat16
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, betas=(0.9, 0.98))
    first = 0
    if state.exists():
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    begun = time.time()
    for step in range(first, steps):
        torch.manual_seed(seed + step)
        rng = np.random.default_rng([seed, step])
        for group in optimizer.param_groups:  # up, level, and down over the last quarter
            group["lr"] = 1.5e-3 * min((step + 1) / 200, 1, 4 * (1 - step / steps))
        scenes, cells = make(images, labels, batch, rng, 0.25, repeat=True)
        alone = batch if step < ALONE else batch // 4
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, scenes[:alone], cells[:alone], alone=True, kept=0.75) * alone / batch
            if alone < batch:
                loss += loss_of(model, scenes[alone:], cells[alone:], alone=False, kept=0.6) * (1 - alone / batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 500 == 499 or step == steps - 1:
            with torch.no_grad():
                right = (model(to_input(development[0])) > 0) == (presence(development[1]) > 0)
            print(
                f"step {step + 1}: loss {loss.item():.3f}, held-out accuracy per class {right.float().mean():.4f}, "
                f"whole scene {right.all(1).float().mean():.3f}, {time.time() - begun:.0f} s",
                flush=True,
            )
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, state)
    save_file({name: t.half() for name, t in model.state_dict().items()}, DEMO / "model.safetensors")
    state.unlink()


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
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--state", type=Path, default=Path("make_scenes.pt"), help="where an interrupted training goes on from"
    )
    parser.add_argument("--count", type=int, default=200, help="held-out scenes")
    parser.add_argument("--samples", type=int, default=4)
    options = parser.parse_args()
    if options.what == "train":
        train(options.steps, options.batch, options.seed, options.state)
    else:
        data(options.count, options.samples)
