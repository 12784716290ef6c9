"""Compiling the kernels in csrc: at install time (setup.py), by `fastrel build`, or at first use.

Imports nothing of fastrel and torch only inside functions, because setup.py uses it where neither may be there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

#: Compiler flags of all parts. Kernels choose their instruction set at run time, so none names one.
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020a000000000000")

#: Compute capabilities to compile for, 80;90 say. Default: that of the GPU here, else all of `CUDA_ARCHS`.
ARCHS_VARIABLE = "FASTREL_CUDA_ARCHS"
CUDA_ARCHS = ("80", "90", "100", "120")

#: The folder that holds what was compiled at first use. Default: the user's cache folder.
CACHE_VARIABLE = "TORCH_EXTENSIONS_DIR"


@dataclass(frozen=True)
class Part:
    """A shared library: its name in messages and as a file, where its sources are, and how they are compiled."""

    name: str
    library: str
    sources: str
    flags: tuple[str, ...]
    link: tuple[str, ...]


CPU = Part("CPU", "_C", "cpu/*.cpp", ("-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"), ("-ltorch_cpu",))
CUDA = Part(
    "CUDA",
    "_C_cuda",
    "cuda/*.cu",
    ("-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA"),
    ("-ltorch_cpu", "-ltorch_cuda"),
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


def compiler(part: Part = CPU) -> list[str]:
    """The compiler: CXX, or the first of g++, c++ and clang++ on the PATH; for CUDA nvcc, with what it compiles for.

    Raises:
        BuildError: there is none.
    """
    if part is CUDA:
        if not shutil.which("nvcc"):
            raise BuildError("no CUDA compiler found (nvcc)")
        archs = cuda_archs()
        # PTX of the newest, which drivers compile for GPUs that come after it.
        newest = max(archs, key=lambda arch: int("".join(filter(str.isdigit, arch))))
        kinds = [*((arch, f"sm_{arch}") for arch in archs), (newest, f"compute_{newest}")]
        return ["nvcc", *(f"-gencode=arch=compute_{arch},code={code}" for arch, code in kinds)]
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler found (c++, g++, clang++, or the one that CXX names)")


def cuda_archs() -> tuple[str, ...]:
    """Compute capabilities to compile for."""
    import torch

    asked = os.environ.get(ARCHS_VARIABLE)
    if asked:
        return tuple(asked.split(";"))
    if torch.cuda.is_available():
        return tuple(
            sorted({"".join(map(str, torch.cuda.get_device_capability(i))) for i in range(torch.cuda.device_count())})
        )
    return CUDA_ARCHS


def key(part: Part = CPU) -> str:
    """Names a build: a hash of the sources, flags, machine and torch version; for CUDA also of what it is compiled for.

    Not of the compiler: kernels that were compiled before, while an image was built, say, are found where there is none.
    """
    import torch

    digest = hashlib.sha256()
    folder = source_folder()
    for path in sorted([*folder.rglob("*.h"), *folder.rglob("*.cuh"), *folder.glob(part.sources)]):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    archs = cuda_archs() if part is CUDA else ()
    digest.update(repr((FLAGS, part, archs, platform.machine(), sys.platform, torch.__version__)).encode())
    return digest.hexdigest()[:16]


def cached(part: Part = CPU) -> Path:
    """Where the library compiled at first use lies or would lie: TORCH_EXTENSIONS_DIR, or the user's cache folder.

    Raises:
        BuildError: the user has no home folder; no sources.
    """
    root = os.environ.get(CACHE_VARIABLE) or os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(root) if root else Path.home() / ".cache"
    except RuntimeError as error:
        raise BuildError(f"there is no home folder to keep them in; set {CACHE_VARIABLE} to a folder ({error})") from error
    return folder / "fastrel" / key(part) / f"{part.library}.so"


def is_intact(library: Path) -> bool:
    """Whether a library in the cache is the one that was compiled into it: its checksum lies beside it.

    Loading one that was cut short ends the process, so this is asked first.
    """
    try:
        return _checksum(library).read_bytes() == _sha256(library)
    except OSError:
        return False


def cache(part: Part = CPU, again: bool = False) -> Path:
    """The library in the cache, compiled if it is not there or damaged, or if `again`. Of several processes one compiles.

    Raises:
        BuildError: it cannot be compiled or kept, and why.
    """
    library = cached(part)
    if is_intact(library) and not again:
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with _locked(library.parent / "lock"):
            if again or not is_intact(library):
                if library.is_dir():
                    shutil.rmtree(library)
                _checksum(library).unlink(missing_ok=True)
                compile_library(library, part)
                _checksum(library).write_bytes(_sha256(library))
    except OSError as error:
        raise BuildError(f"they cannot be kept: {error}; set {CACHE_VARIABLE} to a folder that can be written") from error
    return library


def _checksum(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def _sha256(library: Path) -> bytes:
    return hashlib.sha256(library.read_bytes()).hexdigest().encode()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that other processes and threads wait for and that ends with this process; none where files have none."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_library(target: Path, part: Part = CPU, extra_flags: Sequence[str] = ()) -> None:
    """Compile a part of csrc into the shared library `target`, which appears when it is complete.

    Raises:
        BuildError: no sources, no compiler, or the compiler's message.
    """
    import torch

    folder, compile_ = source_folder(), compiler(part)
    include = Path(torch.__file__).parent / "include"
    libraries = Path(torch.__file__).parent / "lib"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:

        def to_object(source: Path) -> str:
            result = f"{scratch}/{source.stem}.o"
            includes = [f"-I{folder}/include", "-isystem", f"{include}", "-isystem", f"{include}/torch/csrc/api/include"]
            _run([*compile_, *FLAGS, *part.flags, *extra_flags, *includes, "-c", str(source), "-o", result])
            return result

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(to_object, sorted(folder.glob(part.sources), key=lambda path: "isa" not in path.name)))
        library = f"{scratch}/{target.name}"
        _run([*compile_, *extra_flags, "-shared", *objects, f"-L{libraries}", *part.link, "-o", library])
        os.replace(library, target)


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if result.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{result.stderr.strip()[:2000]}")
