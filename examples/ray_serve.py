"""An artefact on a Ray cluster: the service's own two functions, decode and explain, as deployments that scale apart.

ARTEFACT=explain.pt2 serve run examples.ray_serve:app
"""

import asyncio
import os

from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from fastrel.artefact import metadata
from fastrel.errors import InputError
from fastrel.serving.service import Service


@serve.deployment(max_ongoing_requests=64)
class Explained:
    """The model, in batches of requests with different targets."""

    def __init__(self, path: str) -> None:
        from fastrel.artefact.loading import load
        from fastrel.serving.explaining import Explaining

        self.explaining = Explaining(load(path))

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.005)
    async def explain(self, works: list) -> list:
        """An answer for each."""
        return self.explaining(works)


@serve.deployment(max_ongoing_requests=64, max_queued_requests=64)
class Decoded:
    """HTTP: refuses what is wrong, decodes, waits for the map."""

    def __init__(self, path: str, explained: serve.handle.DeploymentHandle) -> None:
        from fastrel.serving.decoding import Decoding

        self.service, self.about, self.explained = Service(path), metadata.read(path), explained
        self.decoding = Decoding(self.service)

    async def __call__(self, request: Request) -> Response:
        """As POST /explain of `fastrel serve`, in JSON."""
        from fastrel.serving import answers, wire
        from fastrel.serving.asking import Refusal, asked

        kind = request.headers.get("content-type", "")
        try:
            body = await request.body()
            if len(body) > self.service.max_body:
                raise Refusal(413, "size", f"the body has more than {self.service.max_body} bytes")
            query = request.query_params.multi_items()
            asking = asked(query, kind, body, self.about, self.service, explains=True)
            # Deadlines are on a machine's own clock, and the model may be on another one.
            header = {"want": "explain", "classes": asking.classes, "deadline": float("inf"), "picture": False}
            work = await asyncio.to_thread(self.decoding, wire.pack(header, {"body": asking.body}))
            answer = await asyncio.wait_for(self.explained.explain.remote(work), asking.timeout_ms / 1000)
        except asyncio.TimeoutError:
            return Response(f"not done within {asking.timeout_ms} ms", 408)
        except (Refusal, InputError) as error:
            return Response(str(error), getattr(error, "status", 422))
        if answer.status != 200:
            return Response(answer.error, answer.status)
        return Response(answers.rendered(answer, self.about, answers.JSON, 0.75), media_type=answers.JSON)


def build(path: str) -> serve.Application:
    """The application for an artefact."""
    return Decoded.bind(path, Explained.bind(path))


if "ARTEFACT" in os.environ:
    app = build(os.environ["ARTEFACT"])
