"""The two stages under mosec. Started by the front as `python -m fastrel.serving`; it ends when the front does."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from mosec import Server

from fastrel.serving.decoding import Decode
from fastrel.serving.explaining import Explain
from fastrel.serving.service import Service


def run() -> None:
    """Serve until a signal; also until the parent is gone."""
    service = Service.from_environment()
    sys.argv = [sys.argv[0], "--address", "127.0.0.1", "--port", str(service.inner), "--log-level", "warning"]
    # Admission is the front's; here everything that it let in has a place.
    sys.argv += ["--capacity", str(4 * service.queue), "--timeout", str(service.timeout_ms)]
    sys.argv += ["--max-request-size", str(service.max_body + (1 << 16))]
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    server = Server()
    route, timeout = "/inference", service.timeout_ms / 1000
    server.append_worker(Decode, num=service.decoders, timeout=timeout, route=route)
    environment = [{"OMP_NUM_THREADS": str(service.threads)}] * service.workers
    server.append_worker(
        Explain,
        num=service.workers,
        max_batch_size=service.batch,
        max_wait_time=1,  # the window is the front's; these are requests that it lets go together
        env=environment,
        timeout=timeout,
        route=route,
    )
    server.run()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
