"""Peak memory of an explanation beyond the model's own forward pass: `python -m benchmarks.memory [--plot FILE.png]`.

Each case runs in a process of its own: the rise of its peak resident memory from after a warm forward pass (Linux).
"""

from __future__ import annotations

import argparse
import subprocess
import sys

#: timm name, image size, tokens.
SIZES = [
    ("vit_base_patch16_224", 224, 197),
    ("vit_base_patch14_dinov2", 392, 785),
    ("vit_base_patch14_dinov2", 518, 1370),
]


def measure(name: str, size: int, what: str) -> float:
    """MB, in this process."""
    import ctypes
    import gc

    import timm
    import torch

    import fastrel

    model = timm.create_model(name, **({"img_size": size} if "dinov2" in name else {})).eval()
    explainer = fastrel.Explainer(model, memory="low" if what == "low" else "normal")
    # Captures, and compiles or loads the kernels, on a small batch of what costs little: the last block.
    image = torch.randn(1, 3, size, size)
    captured = explainer.using(start_layer=-1)
    captured.predict(image)
    with torch.inference_mode():
        model(image)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    start = _status("VmRSS")
    explainer(image, target=0)
    return (_status("VmHWM") - start) / 1e3


def _status(key: str) -> float:
    with open("/proc/self/status") as file:
        return next(float(line.split()[1]) for line in file if line.startswith(key))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", metavar="FILE", help="memory against tokens as a picture")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(measure(options.case[0], int(options.case[1]), options.case[2]))
        return
    found: dict[str, list[float]] = {"normal": [], "low": []}
    print("| tokens | peak extra memory, MB | with memory='low', MB |\n|---|---|---|")
    for name, size, tokens in SIZES:
        for what in found:
            command = [sys.executable, "-m", "benchmarks.memory", "--case", name, str(size), what]
            found[what].append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        print(f"| {tokens} | {found['normal'][-1]:.0f} | {found['low'][-1]:.0f} |", flush=True)
    if options.plot:
        import matplotlib.pyplot as plt

        tokens = [size[2] for size in SIZES]
        for what, values in found.items():
            plt.plot(tokens, values, marker="o", label=f"memory={what!r}")
        plt.xlabel("tokens")
        plt.ylabel("peak extra memory, MB")
        plt.xlim(0)
        plt.ylim(0)
        plt.legend()
        plt.savefig(options.plot, dpi=150)


if __name__ == "__main__":
    main()
