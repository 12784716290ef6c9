"""Builds the kernels ahead of time where torch is there to build against (`--no-build-isolation`).

Without torch, or where compiling fails, the package is installed all the same, and the kernels are compiled at first use.
FASTREL_BUILD=strict makes a failure an error; FASTREL_BUILD=skip builds nothing; FASTREL_BUILD_CUDA=1 builds the CUDA passes too.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext


def build_module() -> ModuleType:
    """fastrel/build.py, which needs nothing of fastrel."""
    spec = importlib.util.spec_from_file_location("fastrel_build", Path(__file__).parent / "fastrel" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """Compiles with the same function as `fastrel build`."""

    def build_extension(self, ext: Extension) -> None:
        """The CPU kernels or the CUDA passes."""
        build = build_module()
        try:
            part = build.CUDA if ext.name.endswith("_cuda") else build.CPU
            build.compile_library(Path(self.get_ext_fullpath(ext.name)).absolute(), part)
        except build.BuildError as error:
            if os.environ.get("FASTREL_BUILD") == "strict":
                raise
            print(f"fastrel: its kernels will be compiled at first use: {error}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        """What was built."""
        return [path for path in super().get_outputs() if os.path.exists(path)]


def ahead_of_time() -> bool:
    """Whether to compile now."""
    return os.environ.get("FASTREL_BUILD") != "skip" and importlib.util.find_spec("torch") is not None


def packages() -> list[str]:
    """Those in fastrel/, and those that lie beside it in a checkout: [tool.setuptools.package-dir] says where."""
    sources = [path for path in Path("csrc").rglob("*") if path.is_dir() and path.name != "__pycache__"]
    beside = [Path("triton_kernels"), Path("csrc"), *sources]
    return [*find_packages(include=["fastrel", "fastrel.*"]), *(f"fastrel.{'.'.join(path.parts)}" for path in beside)]


if ahead_of_time():
    names = ["fastrel._C"] + ["fastrel._C_cuda"] * (os.environ.get("FASTREL_BUILD_CUDA") == "1")
    setup(
        packages=packages(),
        ext_modules=[Extension(name, sources=[], py_limited_api=True) for name in names],
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
else:
    setup(packages=packages())
