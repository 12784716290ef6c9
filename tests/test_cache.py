"""The cache of compiled kernels: what is damaged is compiled again, what cannot be had is done without, and nothing crashes."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastrel import build
from fastrel.backends import native


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real kernels, which take half a minute to compile: found where the other tests have them."""
    if native.load():
        pytest.skip(f"no compiled kernels: {native.load()}")
    with open("/proc/self/maps") as maps:
        loaded = {Path(line.split()[-1]) for line in maps if f"{build.CPU.library}." in line}
    copy = tmp_path_factory.mktemp("kernels") / "_C.so"
    shutil.copy(next(path for path in loaded if "fastrel" in str(path)), copy)
    return copy


@pytest.fixture
def compiler(tmp_path: Path, kernels: Path) -> Path:
    """A compiler of no time: whatever it is to make is the real kernels. It leaves a line in `links` for every library."""
    script = tmp_path / "compiler"
    script.write_text(
        f"""#!{sys.executable}
import shutil, sys, time
if "-shared" in sys.argv:
    open({str(tmp_path / "links")!r}, "a").write("linked\\n")
    time.sleep(0.3)
shutil.copy({str(kernels)!r}, sys.argv[sys.argv.index("-o") + 1])
"""
    )
    script.chmod(0o755)
    return script


def links(compiler: Path) -> int:
    log = compiler.parent / "links"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def cached(tmp_path: Path, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds the kernels."""
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    for variable in (native.LIBRARY_VARIABLE, native.JIT_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(build, "compile_library", lambda target, part: shutil.copy(kernels, target))
    path = build.cache()
    monkeypatch.undo()
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    return path


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A new process, which finds its kernels in the cache alone."""
    inherited = {k: v for k, v in os.environ.items() if k not in (native.LIBRARY_VARIABLE, native.JIT_VARIABLE)}
    return subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **environment}, capture_output=True, text=True, timeout=120
    )


LOAD = "from fastrel.backends import native; print(native.load())"
DOCTOR = "from fastrel.cli import main; raise SystemExit(main(['doctor']))"

DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut to half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut by a page": lambda path: os.truncate(path, path.stat().st_size - 4096),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"garbage" * 1000),
    "another library": lambda path: shutil.copy(sys.modules["_struct"].__file__ or sys.executable, path),
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "file").touch()),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "gone": lambda path: path.unlink(),
    "a byte changed": lambda path: path.write_bytes(path.read_bytes()[:5000] + b"\x7f" + path.read_bytes()[5001:]),
    "without its checksum": lambda path: path.with_name("_C.so.sha256").unlink(),
    "with a checksum of something else": lambda path: path.with_name("_C.so.sha256").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_kernels_are_compiled_again(
    damage: str, cached: Path, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(build, "compile_library", lambda target, part: compiled.append(shutil.copy(kernels, target)))
    assert build.cache() == cached
    assert not compiled
    DAMAGES[damage](cached)
    assert not build.is_intact(cached)
    assert build.cache() == cached
    assert compiled
    assert build.is_intact(cached)
    assert cached.read_bytes() == kernels.read_bytes()


@pytest.mark.slow
def test_a_process_that_meets_damaged_kernels_says_so_and_goes_on(cached: Path, compiler: Path) -> None:
    """Loading a library that was cut short would end the process by SIGBUS."""
    DAMAGES["cut to half"](cached)
    doctor = python(DOCTOR, CXX="no-such-compiler")
    assert doctor.returncode == 0, doctor.stderr
    assert "cpp           not available: no-such-compiler cannot be run" in doctor.stdout
    assert "is damaged or from elsewhere, and is compiled again" in doctor.stderr
    result = python(LOAD, CXX=str(compiler))
    assert result.stdout == "None\n", result.stderr
    assert links(compiler) == 1


@pytest.mark.slow
def test_fastrel_build_repairs_the_cache(cached: Path, compiler: Path) -> None:
    DAMAGES["cut to half"](cached)
    code = "from fastrel.cli import main; raise SystemExit(main(['build']))"
    result = python(code, CXX=str(compiler))
    assert result.returncode == 0, result.stderr
    assert str(cached) in result.stdout
    assert build.is_intact(cached)


def test_kernels_of_another_system_are_compiled_again(cached: Path, compiler: Path) -> None:
    """Intact, and yet the loader refuses them: a home folder shared by machines with different system libraries."""
    cached.write_bytes(b"\x7fELF of elsewhere")
    build._checksum(cached).write_bytes(build._sha256(cached))
    result = python(LOAD, CXX=str(compiler))
    assert result.stdout == "None\n", result.stderr
    assert "was compiled for another system" in result.stderr


def test_kernels_in_the_cache_need_no_compiler(cached: Path) -> None:
    result = python(LOAD, PATH="", CXX="")
    assert result.stdout == "None\n", result.stderr
    assert not result.stderr


@pytest.mark.slow
def test_the_first_use_of_several_processes_compiles_once(tmp_path: Path, compiler: Path) -> None:
    environment = {**os.environ, "CXX": str(compiler), build.CACHE_VARIABLE: str(tmp_path / "empty")}
    environment.pop(native.LIBRARY_VARIABLE, None)
    command = [sys.executable, "-c", LOAD]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(3)
    ]
    assert [process.communicate(timeout=120)[0] for process in running] == [b"None\n"] * 3
    assert links(compiler) == 1


def unavailable(caplog: pytest.LogCaptureFixture) -> str:
    """Why there are no kernels, told in one line of the log."""
    native.load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "fastrel"):
            reason = native.load()
    finally:
        native.load.cache_clear()
    assert reason
    (line,) = [r.getMessage() for r in caplog.records if "runs without" in r.getMessage()]
    assert line == f"fastrel runs without its compiled CPU kernels: {reason.splitlines()[0]}"
    return reason


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No kernels anywhere yet."""
    for variable in (native.LIBRARY_VARIABLE, native.JIT_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(native, "_packaged", lambda part: None)
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    return monkeypatch


def test_a_user_without_a_home_folder_is_told_what_to_set(
    plain: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And plain PyTorch explains."""

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in (build.CACHE_VARIABLE, "XDG_CACHE_HOME"):
        plain.delenv(variable, raising=False)
    plain.setattr(Path, "home", nowhere)
    assert "no home folder to keep them in; set TORCH_EXTENSIONS_DIR" in unavailable(caplog)
    assert "no home folder" in native.origin()


def test_a_cache_that_cannot_be_written_is_named(
    plain: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    reason = unavailable(caplog)
    assert "they cannot be kept: " in reason
    assert str(tmp_path / "cache") in reason
    assert "set TORCH_EXTENSIONS_DIR to a folder that can be written" in reason


def test_a_full_disk_leaves_nothing_behind(
    plain: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    plain.setattr(build, "_run", lambda command: None)
    plain.setattr(build.os, "replace", full)
    assert "No space left on device" in unavailable(caplog)
    assert {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {"lock"}


def test_a_path_without_a_compiler_is_said(plain: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    plain.setenv("PATH", "")
    plain.delenv("CXX", raising=False)
    assert unavailable(caplog).startswith("no C++ compiler found")


def test_kernels_that_were_asked_for_must_be_fastrels(
    plain: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A library of something else loads and registers nothing."""
    other = sys.modules["_struct"].__file__
    if other is None:
        pytest.skip("this Python has no library of its own to mistake for ours")
    result = python(LOAD, FASTREL_LIBRARY=other)
    assert result.stdout == f"{other} holds no kernels of fastrel\n"


def test_what_names_a_build_is_not_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """But sources, flags, machine and torch."""
    before = build.key()
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    assert build.key() == before
    assert build.key(build.CUDA) != before
    for name, value in (("FLAGS", ("-O0",)), ("platform.machine", lambda: "other")):
        with monkeypatch.context() as patch:
            patch.setattr(f"fastrel.build.{name}", value)
            assert build.key() != before
