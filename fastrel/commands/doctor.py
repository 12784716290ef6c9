"""`fastrel doctor`: what is installed, what can run, and why the rest cannot."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from fastrel import __version__, backends
from fastrel.backends import native

PACKAGES = ("torch", "triton", "timm", "torchvision", "transformers", "numpy", "pillow", "matplotlib")


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    print(f"fastrel {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}\n")
    print("packages")
    for name in PACKAGES:
        print(f"  {name:<14}{_version(name)}")
    print("\ndevices")
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"  {'cpu':<14}{torch.get_num_threads()} threads, {capability}")
    for i in range(torch.cuda.device_count()):
        print(f"  {f'cuda:{i}':<14}{torch.cuda.get_device_name(i)}")
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        print(f"  {'cuda':<14}none (torch was built {built})")
    print("\nbackends")
    for name, backend in backends.BACKENDS.items():
        reason = backend.unavailable()
        print(f"  {name:<14}{_about(name) if reason is None else 'not available: ' + reason}")
    return 0


def _about(backend: str) -> str:
    return f"available: {native.instruction_set()}, {native.origin()}" if backend == "cpp" else "available"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
