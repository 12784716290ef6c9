"""How long it takes until a model can be explained: capture, transform and the first prediction. `python -m benchmarks.capture`."""

import time

import timm
import torch

import fastrel

#: timm name, image size.
MODELS = (("vit_base_patch16_224", 224), ("deit_base_distilled_patch16_224", 224), ("swin_base_patch4_window7_224", 224))


def main() -> None:
    print("| model | first prediction less the second, s |\n|---|---|")
    for name, size in MODELS:
        explainer, image = fastrel.Explainer(timm.create_model(name).eval()), torch.randn(1, 3, size, size)
        times = []
        for _ in range(2):
            start = time.perf_counter()
            explainer.predict(image)
            times.append(time.perf_counter() - start)
        print(f"| {name} | {times[0] - times[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
