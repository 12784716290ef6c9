"""How much of the explainer's own rate is left end to end: files in, maps or overlays out.

    python -m benchmarks.throughput [--count 500] [--model vit_small_patch16_224] [--device cpu] [--workers 1]

Makes pictures as cameras do (JPEG, 500 x 375), random weights, batches of 8. The explainer's rate is that over inputs that lie
ready, measured between the others in the same process: machines that do other things meanwhile change between runs. Exit code 1 if
less is left than must be (90 % into Parquet, 80 % as overlays), which holds for 500 pictures: each run also starts its processes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastrel.batch import local, table
from fastrel.batch.explain import Explain
from fastrel.batch.store import Store
from fastrel.data import inputs

BATCH = 8
#: Shares of the explainer's own rate that must be left.
MAPS, OVERLAYS = 0.9, 0.8


def pictures(folder: Path, count: int) -> None:
    """Smooth noise, which compresses like a photograph."""
    for i in range(count):
        coarse = np.random.default_rng(i).integers(0, 255, (24, 32, 3), np.uint8)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.jpg", quality=90)


def own_rate(explain: Explain, batches: int) -> float:
    """Pictures per second over one batch that lies ready."""
    loaded = explain.loaded
    explainer = explain.settings.explainer(loaded)
    noise = np.random.default_rng(0).integers(0, 255, (375, 500, 3), np.uint8)
    x = loaded.inputs(loaded.reader(Image.fromarray(noise)) * BATCH)
    args, kwargs = loaded.arguments(x)
    explainer(*args, **kwargs).relevance.cpu()  # capture
    started = time.perf_counter()
    for _ in range(batches):
        explainer(*args, **kwargs).relevance.cpu()
    return batches * BATCH / (time.perf_counter() - started)


def main() -> int:
    """Print the table; 1 if less is left than must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    explain = Explain(options.model, random=True, device=options.device, batch_size=BATCH)
    rates = [own_rate(explain, max(2, options.count // BATCH // 4))]
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in", Path(folder) / "out"
        source.mkdir()
        pictures(source, options.count)
        items = inputs.find([str(source)], "image").items
        schema = table.schema(explain.shape(), {})
        started = time.perf_counter()
        with Store(str(out), {}) as store:
            tasks = store.tasks(items, retry=False)
            local.run(explain, tasks, store, schema, options.workers, lambda done, failed: None)
        maps = options.count / (time.perf_counter() - started)
        rates.append(own_rate(explain, max(2, options.count // BATCH // 4)))
        overlays = overlay_rate(explain, items, Path(folder) / "overlays", options.workers)
        rates.append(own_rate(explain, max(2, options.count // BATCH // 4)))
    before, between, after = rates
    shares = 2 * maps / (before + between), 2 * overlays / (between + after)
    print(
        f"{options.model}, {options.count} pictures of 500 x 375, batches of {BATCH}, {options.workers} workers, {options.device}"
    )
    print("| | pictures/s | of the explainer's own |")
    print("|---|---|---|")
    print(f"| explainer alone | {before:.1f}, {between:.1f}, {after:.1f} | |")
    print(f"| maps into Parquet | {maps:.1f} | {shares[0]:.0%} |")
    print(f"| overlays | {overlays:.1f} | {shares[1]:.0%} |")
    return 0 if shares[0] >= MAPS and shares[1] >= OVERLAYS else 1


def overlay_rate(explain: Explain, items: list[inputs.Item], out: Path, workers: int) -> float:
    """Pictures per second of `fastrel explain`, its start (loading, capture) left out."""
    from fastrel.commands import explain as command
    from fastrel.commands.outputs import Outputs

    options = argparse.Namespace(batch_size=BATCH, workers=workers, npz=False, style="blend")
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        failures = command.explain_all(options, explain, items, Outputs(str(out), {}))
    assert not failures, failures
    return len(items) / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
