"""The processes that decode and explain, as the front has them: started, asked, ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import aiohttp

from fastrel.serving.service import REASON, VARIABLE, Service
from fastrel.serving.wire import Answer

#: Seconds that the stages may take to end.
ENDING = 15


class Stages:
    """mosec with its workers, on a port of the loopback interface; they run while the block does."""

    def __init__(self, service: Service) -> None:
        self._service = replace(service, inner=service.inner or _free_port())
        self._url = f"http://127.0.0.1:{self._service.inner}"

    async def __aenter__(self) -> Stages:
        self._folder = Path(tempfile.mkdtemp(prefix="fastrel-"))
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fastrel.serving"),
            env={**os.environ, VARIABLE: self._service.to_environment(), REASON: str(self._folder / "reason")},
            start_new_session=True,  # a terminal's Ctrl-C is for the front, which lets them answer first
        )
        #: Done when they have ended.
        self.ended = asyncio.create_task(self._process.wait())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """SIGTERM, and an end by force of what does not end by that."""
        if not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
                try:
                    await asyncio.wait_for(asyncio.shield(self.ended), ENDING)
                except asyncio.TimeoutError:
                    os.killpg(self._process.pid, signal.SIGKILL)
        await self._session.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def reason(self) -> str | None:
        """Why a worker could not start; None as long as none has said so."""
        with contextlib.suppress(FileNotFoundError):
            return (self._folder / "reason").read_text()
        return None

    async def ask(self, data: bytes, seconds: float) -> Answer:
        """Their answer to what `wire.pack` made; a status that says so where they give none in time."""
        try:
            timeout = aiohttp.ClientTimeout(total=seconds)
            async with self._session.post(f"{self._url}/inference", data=data, timeout=timeout) as response:
                content = await response.read()
        except asyncio.TimeoutError:
            return Answer(408, "not done in time")
        except (aiohttp.ClientError, OSError) as error:
            return Answer(503, f"the stages do not answer: {type(error).__name__}")
        if response.status == 200:
            return Answer.from_bytes(content)
        said = content.decode(errors="replace")
        if response.status == 422 and "{" in said:
            return Answer(422, json.loads(said[said.index("{") :])["error"])
        return Answer(
            *{408: (408, "not done in time"), 429: (429, "the stages are full")}.get(response.status, (500, said))
        )

    async def metrics(self) -> bytes:
        """mosec's own, in Prometheus' format; nothing if it does not answer within a second."""
        with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError):
            async with self._session.get(f"{self._url}/metrics", timeout=aiohttp.ClientTimeout(total=1)) as response:
                return await response.read()
        return b""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
