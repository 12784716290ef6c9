"""`fastrel serve` under load on this machine: the figures of docs/serving.md, by one command. Loopback only; it ends by itself.

python -m benchmarks.serving --write                                  the embedded model, some minutes, three of them to compile
python -m benchmarks.serving --artefact explain.pt2 --requests 1000

Exit code 1 if what the service adds, or its rate, is out of the limits in this file.
"""

from __future__ import annotations

import argparse
import http.client
import io
import itertools
import os
import platform
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import fastrel
from benchmarks.pages import Section
from fastrel.artefact.reading import collate, reader
from fastrel.cli import main as command
from fastrel.timing import measure
from tests.served import ROOT, Server, load, percentile, picture, served

SECTION = Section(ROOT / "docs" / "serving.md", "figures", "python -m benchmarks.serving --write")
BATCH, WAIT = 8, 5
#: What must hold: milliseconds added at one client (p50, p99), and the share of the bare call's rate at eight clients.
ADDED, SHARE = (WAIT + 3, 15), 0.9


def main() -> int:
    """Print the figures; 1 if the limits above do not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artefact", help="default: the embedded model")
    parser.add_argument("--requests", type=int, default=10_000, help="of the soak (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30, help="of overload (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put the figures into docs/serving.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.artefact or Path(folder) / "demo.pt2")
        if not options.artefact:
            command(["export", "--out", str(path)])
        lines, missed = figures(path, options)
    print("\n".join(lines))
    if options.write:
        SECTION.write(lines)
    for miss in missed:
        print(f"does not hold: {miss}", file=sys.stderr)
    return int(bool(missed))


def figures(path: Path, options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The lines of the page, and the limits that were missed."""
    missed: list[str] = []
    bodies = [picture(i, (64, 64)) for i in range(16)]
    bare = Bare(path)
    words = (
        "--workers",
        str(options.workers),
        "--threads",
        "1",
        "--batch",
        str(BATCH),
        "--wait-ms",
        str(WAIT),
        "--queue",
        "32",
    )
    rows = [
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before; torch {torch.__version__}; "
        f"{options.workers} workers, batches of {BATCH}, a window of {WAIT} ms.",
        "",
        "| what | found |",
        "|---|---|",
    ]

    def row(what: str, found: str) -> None:
        rows.append(f"| {what} | {found} |")

    with served(path, *words) as server:
        late = added(server, bodies, bare)
        what = "one client, in turns with the bare call: added to it, p50, p99"
        row(what, ", ".join(f"{x:.1f} ms" for x in late))
        if any(x > limit for x, limit in zip(late, ADDED, strict=True)):
            missed.append(f"{what}: at most {ADDED} ms")
        began, eight = time.monotonic(), load(server.port, 8, 10, bodies)
        rate = sum(code == 200 for code, _ in eight) / (time.monotonic() - began)
        share = rate / bare.throughput()
        what = "8 clients: samples per second; of what the bare call does in batches of 8"
        row(what, f"{rate:.0f}; {share:.0%}")
        if share < SHARE:
            missed.append(f"{what}: at least {SHARE:.0%}")
        overload(server, bodies, options.seconds, row)
        killed(server, bodies, row)
        soak(server, bodies, options.requests, row)
    with served(path, *words) as server:
        answered = restart(server, bodies)
        row(
            "SIGTERM with 8 clients: statuses (0: refused after it); exit code",
            f"{dict(answered)}; {server.process.returncode}",
        )
    return rows, missed


class Bare:
    """The artefact in this process, on one thread, decoding included."""

    def __init__(self, path: Path) -> None:
        torch.set_num_threads(1)
        self._artefact = fastrel.load(path)
        self._read = reader(path, self._artefact.metadata)

    def __call__(self, bodies: list[bytes]) -> None:
        """Decode and explain pictures."""
        samples = [self._read(Image.open(io.BytesIO(body))) for body in bodies]
        self._artefact(*(torch.from_numpy(x) for x in collate(samples, self._artefact.metadata)))

    def throughput(self) -> float:
        """Samples per second in batches."""
        body = picture(0, (64, 64))
        return measure({"": (BATCH, lambda: self([body] * BATCH))}, seconds=5)[""].throughput


def added(server: Server, bodies: list[bytes], bare: Bare) -> list[float]:
    """Milliseconds that a request takes more than the call, p50 and p99: in turns, so that both find caches as cold."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)

    def request(body: bytes) -> None:
        connection.request("POST", "/explain", body)
        response = connection.getresponse()
        response.read()
        assert response.status == 200, response.status

    numbers = itertools.cycle(range(len(bodies)))
    calls = {"bare": (1, lambda: bare([bodies[0]])), "served": (1, lambda: request(bodies[next(numbers)]))}
    found = measure(calls, seconds=8)
    return [found["served"].percentile(share) - found["bare"].percentile(share) for share in (0.5, 0.99)]


def overload(server: Server, bodies: list[bytes], seconds: float, row) -> None:
    before = server.memory()
    found = load(server.port, 160, seconds, bodies)
    codes = Counter(code for code, _ in found)
    accepted, refused = ([s for code, s in found if code == wanted] for wanted in (200, 429))
    row(f"160 clients on 32 places for {seconds:.0f} s: statuses", f"{dict(codes)}")
    row(
        "… of the accepted p50, p99; of those refused p50, p99",
        ", ".join(f"{percentile(x, share):.0f} ms" for x in (accepted, refused) for share in (0.5, 0.99)),
    )
    began = time.monotonic()
    server.explain(bodies[0])
    row(
        "… the first request afterwards; memory grown",
        f"{1000 * (time.monotonic() - began):.0f} ms; {(server.memory() - before) / 1e6:.0f} MB",
    )


def killed(server: Server, bodies: list[bytes], row) -> None:
    while len(server.explainers()) < 2:
        server.explain(bodies[0])
    found: list[tuple[int, float]] = []
    clients = threading.Thread(target=lambda: found.extend(load(server.port, 8, 20, bodies)))
    clients.start()
    time.sleep(2)
    os.kill(server.explainers()[0], signal.SIGKILL)
    clients.join()
    codes = Counter(code for code, _ in found)
    row("`kill -9` of one of two workers under 8 clients: statuses", f"{dict(codes)}")


def soak(server: Server, bodies: list[bytes], requests: int, row) -> None:
    load(server.port, 8, 20, bodies, "?top=3", limit=max(100, requests // 20))
    held, codes = [], Counter()
    for part in range(10):
        found = load(server.port, 8, 600, bodies, f"?top={1 + part % 4}", limit=requests // 10)
        codes += Counter(code for code, _ in found)
        held.append(server.memory() / 1e6)
    slope = np.polyfit(np.arange(10) * requests / 10, held, 1)[0] * 1000
    row(f"{sum(codes.values())} requests, 1 to 4 targets: statuses", f"{dict(codes)}")
    row("… memory after a tenth, in the end; per 1000 requests", f"{held[0]:.0f} MB, {held[-1]:.0f} MB; {slope:+.2f} MB")
    row("… self-test after it", f"{server.metric('fastrel_canary_error'):.1g} away")


def restart(server: Server, bodies: list[bytes]) -> Counter:
    found: list[tuple[int, float]] = []
    clients = threading.Thread(target=lambda: found.extend(load(server.port, 8, 4, bodies)))
    clients.start()
    time.sleep(2)
    server.stop()
    clients.join()
    return Counter(code for code, _ in found)


if __name__ == "__main__":
    sys.exit(main())
