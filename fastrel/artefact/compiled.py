"""The compiled form of an artefact, by AOTInductor: for the machine that made it, beside the program that runs anywhere."""

from __future__ import annotations

import platform
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastrel.artefact.metadata import METADATA, Metadata
from fastrel.data import files
from fastrel.errors import FastrelError, first_line

SUFFIX = ".compiled.pt2"

#: Extensions of instruction sets among the features that Linux lists of a processor.
_EXTENSIONS = re.compile(
    r"(?:avx|sse|ssse|fma|bmi|f16c|amx|popcnt|abm|movbe|gfni|adx|vaes|vpclmul|pclmul|asimd|sve|bf16|i8mm)\w*"
)


def beside(path: Path) -> Path:
    """Where the compiled form of the artefact at `path` lies."""
    return path.with_suffix(SUFFIX)


def machine(device: str = "cpu") -> dict[str, Any]:
    """What code compiled for a kind of device depends on here: torch's version, the kind of machine, extensions of its instruction set,
    and the GPU."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    words = found[1].split() if found else [torch.backends.cpu.get_cpu_capability().lower()]
    extensions = sorted(word for word in words if not found or _EXTENSIONS.fullmatch(word))
    found_here = {
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "extensions": extensions,
    }
    if device == "cpu":
        return found_here
    major, minor = torch.cuda.get_device_capability()
    return found_here | {"GPU": f"of capability {major}.{minor}, CUDA {torch.version.cuda}"}


def unfit(needs: Mapping[str, Any]) -> str | None:
    """Why code compiled on a machine like this cannot run here; None: it can."""
    here = machine("cuda" if "GPU" in needs else "cpu")
    for name in ("torch", "machine", "GPU"):
        if needs.get(name) != here.get(name):
            return f"it was compiled for {name} {needs[name]}, and this is {here[name]}"
    missing = sorted({*needs["extensions"]} - {*here["extensions"]})
    return f"it was compiled for a processor with {', '.join(missing)}, which this one lacks" if missing else None


def write(path: Path, exported: torch.export.ExportedProgram, about: Metadata, extra: Mapping[str, str]) -> None:
    """Compile a program and write it with its metadata.

    Raises:
        FastrelError: it cannot be compiled.
    """
    options = {"aot_inductor.check_lowerbound": False}  # a batch of one was exported as two
    with files.replaced(path) as temporary:
        try:
            torch._inductor.aoti_compile_and_package(exported, package_path=str(temporary), inductor_configs=options)
        except Exception as error:  # a missing or failing compiler, in torch's own words
            raise FastrelError(f"AOTInductor could not compile the explanation: {first_line(error)}") from error
        with zipfile.ZipFile(temporary, "a", zipfile.ZIP_STORED) as archive:
            root = archive.namelist()[0].partition("/")[0]
            facts = replace(about, compiled=machine(about.device))
            for name, content in {METADATA: facts.to_json(), **extra}.items():
                archive.writestr(f"{root}/extra/{name}", content)
