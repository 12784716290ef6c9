"""Which implementations of the fused operators there are, and why one cannot run here."""

from fastrel.errors import InputError

#: Every backend of the design; None where it can run, else the reason.
_UNAVAILABLE = {
    "torch": None,
    "cpp": "no compiled CPU kernels are part of this version",
    "triton": "no Triton kernels are part of this version",
    "cuda": "no CUDA kernels are part of this version",
}


def status() -> dict[str, str | None]:
    """Each backend and why it cannot run here; None where it can."""
    return dict(_UNAVAILABLE)


def require(name: str) -> None:
    """Raise InputError unless `name` is "auto" or a backend that can run."""
    if name == "auto":
        return
    if name not in _UNAVAILABLE:
        raise InputError(f"unknown backend {name!r}; choose auto or one of {', '.join(_UNAVAILABLE)}")
    reason = _UNAVAILABLE[name]
    if reason:
        raise InputError(f"backend {name!r} cannot run: {reason}")
