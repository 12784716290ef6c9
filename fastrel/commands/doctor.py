"""`fastrel doctor`: what is installed, what can run, and why the rest cannot."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastrel import __version__, backends, precision
from fastrel.backends import native
from fastrel.errors import FastrelError

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
        print(f"  {name:<14}{_about(name, backend)}")
    print("\nprecision, on this processor")
    for name in precision.PRECISIONS[1:]:
        print(f"  {name:<14}{_products(name)}")
    print(f"  {'because':<14}{_reasons()}")
    print("\nserving, on this machine")
    for name, value in recommendations().items():
        print(f"  {name:<14}{value}")
    return 0


#: What glibc's allocator is told: keep large blocks for the next explanation instead of asking the system for them again.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "268435456", "MALLOC_TRIM_THRESHOLD_": "536870912"}


def recommendations() -> dict[str, str]:
    """Threads and memory for a process that does nothing but explain."""
    cores = available_cores()
    set_to = os.environ.get("OMP_NUM_THREADS")
    now = torch.get_num_threads()
    one, many = f"OMP_NUM_THREADS={cores} and one worker", f"OMP_NUM_THREADS=1 and {cores} workers"
    threads = f"1 core: {one}" if cores == 1 else f"{cores} cores: for latency {one}, for throughput {many}"
    threads += f"; now {now} {'thread' if now == 1 else 'threads'}{f', OMP_NUM_THREADS={set_to}' if set_to else ''}"
    if now > cores:
        threads += ", more than there are cores: they will wait for each other"
    found = {"threads": threads}
    if platform.libc_ver()[0] == "glibc":
        missing = " ".join(f"{name}={value}" for name, value in ALLOCATOR.items() if name not in os.environ)
        found["allocator"] = (
            f"set {missing}; `fastrel bench` with and without tells what it saves" if missing else "as recommended"
        )
    return found


def available_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def _about(name: str, backend: backends.Backend) -> str:
    """Whatever is wrong with a backend, the others are reported."""
    try:
        reason = backend.unavailable()
        if reason:
            return f"not available: {reason}"
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if name in ("triton", "cuda") else []
        failing = [found for device in devices if (found := backend.runs_on(device))]
        if failing:
            return f"not available on every device: {'; '.join(failing)}"
        return f"available: {native.instruction_set()}, C++ kernels: {native.origin()}" if name == "cpp" else "available"
    except Exception as error:
        return f"fails: {error!r}"


def _products(name: precision.Precision) -> str:
    try:
        chosen = precision.products(name, "positive")
    except FastrelError as error:
        return str(error)
    gradient = "bfloat16" if chosen.bf16_gradient else "float32"
    return f"relevance in {chosen.relevance or 'float32'}, gradient in {gradient}"


def _reasons() -> str:
    """What decides the precision: settings, and what was measured."""
    asked = [f"{variable}={os.environ[variable]}" for variable in precision.VARIABLES.values() if os.environ.get(variable)]
    if native.load():
        return ", ".join([*asked, "without C++ kernels nothing is faster than float32"])
    measured = " and ".join(f"{dtype} at {speed:.2g}" for dtype, speed in precision.speeds().items())
    return ", ".join([*asked, f"products in {measured} times the speed of float32"])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
