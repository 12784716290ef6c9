"""A running `fastrel serve`, on the loopback interface, and clients that count and stop by themselves."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def picture(seed: int = 0, size: tuple[int, int] = (40, 40), kind: str = "png") -> bytes:
    """A picture of noise as a file."""
    noise = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


class Client:
    """Asks what listens on a port of the loopback interface."""

    def __init__(self, port: int) -> None:
        self.port = port

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        seconds: float = 60,
    ) -> tuple[int, bytes, Mapping[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.read(), dict(response.getheaders())
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, bytes]:
        return self.request("GET", path)[:2]

    def explain(self, body: bytes, query: str = "", route: str = "/explain", **headers: str) -> tuple[int, Any]:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        status, content, _ = self.request("POST", route + query, body, given)
        return status, json.loads(content)


class Server(Client):
    """`fastrel serve ARTEFACT …` as a process of its own."""

    def __init__(self, artefact: Path, *options: str, ready: bool = True) -> None:
        super().__init__(free_port())
        words = [sys.executable, "-m", "fastrel", "serve", str(artefact), *options, "--port", str(self.port)]
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(words, cwd=ROOT, stderr=self._said)
        if ready:
            try:
                self.wait_ready()
            except AssertionError:
                self.process.kill()  # its stages end when it is gone
                raise

    def wait_ready(self, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}: {self.said()}")
            with contextlib.suppress(OSError):
                if self.get("/health")[0] == 200:
                    return
            time.sleep(0.1)
        raise AssertionError("not ready in time")

    def said(self) -> str:
        """What it and its workers wrote to stderr."""
        self._said.seek(0)
        return self._said.read().decode(errors="replace")

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", self.get("/metrics")[1].decode(), re.MULTILINE)
        return sum(map(float, found))

    def explainers(self) -> list[int]:
        """Processes that explain."""
        return [int(pid) for pid in re.findall(r'fastrel_explained{pid="(\d+)"}', self.get("/metrics")[1].decode())]

    def memory(self) -> int:
        """Bytes that all its processes hold."""
        import psutil

        whole = psutil.Process(self.process.pid)
        found = 0
        for one in [whole, *whole.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += one.memory_info().rss
        return found

    def stop(self, seconds: float = 60) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@contextlib.contextmanager
def served(artefact: Path, *options: str) -> Iterator[Server]:
    server = Server(artefact, *options)
    try:
        yield server
    finally:
        server.stop()


def load(
    port: int, clients: int, seconds: float, bodies: Sequence[bytes], query: str = "", limit: int = 100_000
) -> list[tuple[int, float]]:
    """What `clients`, one request after the other each, get for some seconds: (status, seconds), status 0 for a broken connection."""
    import aiohttp

    found: list[tuple[int, float]] = []
    end = time.monotonic() + seconds

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        sent = 0
        while time.monotonic() < end and len(found) < limit:
            began = time.monotonic()
            try:
                url = f"http://127.0.0.1:{port}/explain{query}"
                async with session.post(url, data=bodies[(number + sent) % len(bodies)]) as response:
                    await response.read()
                    status = response.status
            except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
                status = 0
            found.append((status, time.monotonic() - began))
            sent += 1
            if status != 200:
                await asyncio.sleep(0.02)

    async def all_of_them() -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
            await asyncio.gather(*(client(session, i) for i in range(clients)))

    asyncio.run(all_of_them())
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """In milliseconds."""
    return 1000 * float(np.quantile(values, share)) if values else float("nan")
