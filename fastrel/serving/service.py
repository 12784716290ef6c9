"""What a service is asked for."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

#: The environment variable by which the processes of the stages get it.
VARIABLE = "FASTREL_SERVICE"

#: Names the file in which a worker that cannot start says why.
REASON = "FASTREL_SERVICE_REASON"


@dataclass(frozen=True)
class Service:
    """An artefact and how it is served.

    Attributes:
        artefact: its path; `beside`: of artefacts of the same model by other methods, which requests may ask for.
        host, port: where requests are taken; `inner`: the port of the stages on the loopback interface, 0 for any free one.
        workers, decoders: processes that explain, and that decode; threads: of each that explains.
        batch, wait_ms: samples at most that are explained together, and how long one waits for others if any are worked on.
        queue: requests that are admitted at a time, those being worked on included.
        timeout_ms: what a request may take at most, from its last byte on; upload_ms: its upload.
        max_body, max_pixels, max_targets: of a request.
        ui: whether / is a page for people.
    """

    artefact: str
    host: str = "127.0.0.1"
    port: int = 8000
    inner: int = 0
    workers: int = 2
    decoders: int = 2
    threads: int = 1
    batch: int = 8
    wait_ms: int = 5
    queue: int = 64
    timeout_ms: int = 10_000
    upload_ms: int = 10_000
    max_body: int = 10_000_000
    max_pixels: int = 50_000_000
    max_targets: int = 16
    ui: bool = False
    beside: tuple[str, ...] = ()

    def to_environment(self) -> str:
        """As JSON, for `VARIABLE`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> Service:
        """What `to_environment` gave, in a process of a stage."""
        given = json.loads(os.environ[VARIABLE])
        return cls(**{**given, "beside": tuple(given["beside"])})
