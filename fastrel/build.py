"""Compiling the CPU kernels in csrc: at install time (setup.py), by `fastrel build`, or at first use.

Imports nothing of fastrel and torch only inside functions, because setup.py uses it where neither may be there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

#: Compiler flags; kernels choose their instruction set at run time, so none names one.
FLAGS = (
    "-std=c++20",
    "-O3",
    "-ffp-contract=fast",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-DNDEBUG",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says why."""


def source_folder() -> Path:
    """csrc: inside the installed package, or beside it in a checkout.

    Raises:
        BuildError: neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "cpu").is_dir():
            return folder
    raise BuildError("the kernels' sources (csrc) are not part of this installation")


def compiler() -> list[str]:
    """The C++ compiler: CXX, or the first of c++, g++ and clang++ on the PATH.

    Raises:
        BuildError: there is none.
    """
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler found (c++, g++, clang++, or the one that CXX names)")


def key() -> str:
    """Names a build: a hash of the sources, flags, compiler, machine and torch version."""
    import torch

    digest = hashlib.sha256()
    folder = source_folder()
    for path in sorted([*folder.rglob("*.h"), *folder.glob("cpu/*.cpp")]):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout
    digest.update(repr((FLAGS, version, platform.machine(), sys.platform, torch.__version__)).encode())
    return digest.hexdigest()[:16]


def cached() -> Path:
    """Where the library compiled at first use lies or would lie: TORCH_EXTENSIONS_DIR, or the user's cache folder."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(root) if root else home) / "fastrel" / key() / "_C.so"


def compile_library(target: Path, extra_flags: Sequence[str] = ()) -> None:
    """Compile csrc/cpu into the shared library `target`, which appears when it is complete.

    Raises:
        BuildError: no sources, no compiler, or the compiler's message.
    """
    import torch

    folder, compile_ = source_folder(), compiler()
    include = Path(torch.__file__).parent / "include"
    libraries = Path(torch.__file__).parent / "lib"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:

        def to_object(source: Path) -> str:
            result = f"{scratch}/{source.stem}.o"
            includes = [f"-I{folder}/include", f"-isystem{include}", f"-isystem{include}/torch/csrc/api/include"]
            _run([*compile_, *FLAGS, *extra_flags, *includes, "-c", str(source), "-o", result])
            return result

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(to_object, sorted(folder.glob("cpu/*.cpp"), key=lambda path: "isa" not in path.name)))
        library = f"{scratch}/{target.name}"
        _run([*compile_, *extra_flags, "-shared", *objects, f"-L{libraries}", "-ltorch_cpu", "-o", library])
        os.replace(library, target)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{result.stderr.strip()}")
