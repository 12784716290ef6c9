"""The process that takes requests: admits, refuses, waits until a deadline and no longer, and answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from pathlib import Path

import uvloop
from aiohttp import web

from fastrel.artefact.reading import reader
from fastrel.errors import InputError
from fastrel.serving import answers, wire
from fastrel.serving.asking import Asked, Refusal, asked
from fastrel.serving.methods import by_method
from fastrel.serving.metrics import Metrics
from fastrel.serving.service import Service
from fastrel.serving.stages import Stages
from fastrel.serving.window import Window
from fastrel.serving.wire import Answer

log = logging.getLogger("fastrel")

#: Why a request with this status was refused, for the metrics; others failed.
REASONS = {408: "deadline", 422: "input", 429: "full", 503: "not ready"}

PAGE = Path(__file__).parent / "page.html"

#: Seconds between self-tests of a worker, and between tries while none has answered yet.
CANARY, TRY = 60.0, 0.2

#: How many self-tests in a row may fail before the service is not ready any more.
FAILING = 3

#: Seconds that a connection may be silent.
KEEP_ALIVE = 15


class Front:
    """One service: its stages, what it has admitted, and its metrics."""

    def __init__(self, service: Service) -> None:
        #: What every artefact says about itself, by the name that requests ask for it.
        self.methods = by_method([service.artefact, *service.beside])
        self.about, *_ = self.methods.values()
        reader(service.artefact, self.about)  # what cannot work fails before anything is started
        self.service, self.stages, self.metrics = service, Stages(service), Metrics(self.about)
        self._about = json.dumps(asdict(self.about) | {"source": None, "methods": [*self.methods]}, ensure_ascii=False)
        self._admitted, self._uploading, self._draining, self._ready = 0, 0, False, False
        #: Requests beyond these wait here, where those whose client hangs up or whose deadline passes cost nothing.
        self._slots = asyncio.Semaphore(service.workers * service.batch * 2 + service.decoders)
        self._with_stages: set[asyncio.Task[Answer]] = set()
        self._window = Window(service.wait_ms / 1000, service.batch)
        self._idle = asyncio.Event()
        self._idle.set()

    def application(self) -> web.Application:
        """Routes."""
        app = web.Application()
        app.router.add_post("/explain", self._handled("explain"))
        app.router.add_post("/predict", self._handled("predict"))
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/model", self._model)
        if self.service.ui:
            app.router.add_get("/", self._page)
        return app

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT, then answer what was admitted; the exit code: 1 if the stages ended by themselves.

        Raises:
            InputError: the port is taken.
        """
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        runner = web.AppRunner(
            self.application(),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=5,
            keepalive_timeout=KEEP_ALIVE,
        )
        await runner.setup()
        site = web.TCPSite(runner, self.service.host, self.service.port, backlog=1024)
        try:
            await site.start()
        except OSError as error:
            raise InputError(f"cannot listen on {self.service.host}:{self.service.port}: {error.strerror}") from error
        async with self.stages:
            asked_to_stop, watching = asyncio.create_task(stop.wait()), asyncio.create_task(self._watch())
            await asyncio.wait([self.stages.ended, asked_to_stop, watching], return_when=asyncio.FIRST_COMPLETED)
            failed = not asked_to_stop.done()
            if failed:
                why = self.stages.reason() or "see above for why"
                print(f"fastrel: error: no worker can serve: {why}", file=sys.stderr)
            self._draining = True
            await site.stop()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._idle.wait(), 0.1 if failed else self.service.timeout_ms / 1000)
            watching.cancel()
            asked_to_stop.cancel()
            await runner.cleanup()
        return int(failed)

    async def _watch(self) -> None:
        """Ask for the self-test until it is answered, and every minute from then on. Ends where a worker says, before any has answered,
        why it cannot."""
        failed = 0
        while self._ready or self.stages.reason() is None:
            answer = await self.stages.ask(wire.pack({"want": "canary", "deadline": time.monotonic() + 60}), 60)
            failed = 0 if answer.status == 200 else failed + 1
            if failed >= FAILING and self._ready:
                self._note_ready(False)
                self.metrics.canary.set(float("nan"))
                print(f"fastrel: not ready, the self-test fails: {answer.error}", file=sys.stderr, flush=True)
            if answer.status == 200:
                self.metrics.canary.set(answer.header["error_of_self_test"])
                self.metrics.note(answer)
                if not self._ready:
                    self._note_ready(True)
                    print(f"fastrel: ready on http://{self.service.host}:{self.service.port}", file=sys.stderr, flush=True)
            await asyncio.sleep(CANARY if self._ready else TRY)

    def _note_ready(self, ready: bool) -> None:
        self._ready = ready
        self.metrics.ready.set(ready)

    def _handled(self, want: wire.Want) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            began = time.monotonic()
            try:
                kind = answers.chosen(request.headers.get("Accept", ""), self.about, want)
                if kind is None:
                    accepted = request.headers["Accept"]
                    raise Refusal(
                        406,
                        "accept",
                        f"cannot answer as {accepted!r}; /{want} answers as JSON"
                        + (", image/png and application/vnd.apache.arrow.stream" if want == "explain" else ""),
                    )
                asking = await self._read(request, want)
                async with self._place():
                    answer = await self._answered(asking, want, kind == answers.PNG)
                if answer.status != 200:
                    raise Refusal(answer.status, REASONS.get(answer.status, "failed"), answer.error)
                body = await self._rendered(answer, kind, asking)
                response = web.Response(body=body, content_type=kind)
            except Refusal as refusal:
                response = self._refused(refusal)
            except InputError as error:
                response = self._refused(Refusal(422, "input", str(error)))
            except (asyncio.CancelledError, ConnectionResetError, web.RequestPayloadError) as error:
                self.metrics.rejected.labels("hung up").inc()
                raise asyncio.CancelledError from error
            except Exception as error:
                log.exception("a request failed")
                response = self._refused(Refusal(500, "failed", f"the service failed: {type(error).__name__}"))
            if self._draining:
                response.force_close()  # a client that keeps its connection turns to another replica
            self.metrics.requests.labels(want, response.status).inc()
            self.metrics.seconds.labels("whole").observe(time.monotonic() - began)
            return response

        return handle

    async def _rendered(self, answer: Answer, kind: str, asking: Asked) -> bytes:
        """JSON at once, for a thread costs more than that; pictures and tables beside other requests."""
        about = [*self.methods.values()][asking.method]
        if kind == answers.JSON:
            return answers.rendered(answer, about, kind, asking.opacity, asking.top)
        return await asyncio.to_thread(answers.rendered, answer, about, kind, asking.opacity, asking.top)

    def _refused(self, refusal: Refusal) -> web.Response:
        self.metrics.rejected.labels(refusal.reason).inc()
        if refusal.reason == "deadline":
            self.metrics.expired.inc()
        response = web.json_response({"error": str(refusal)}, status=refusal.status)
        if refusal.status in (429, 503):
            response.headers["Retry-After"] = "1"
        if refusal.status in (408, 413, 429, 503):
            response.force_close()  # its body may not have been read
        return response

    async def _read(self, request: web.Request, want: wire.Want) -> Asked:
        """The request's body and what it asks for.

        Raises:
            Refusal.
        """
        self._check_room()
        try:
            body = await asyncio.wait_for(self._uploaded(request), self.service.upload_ms / 1000)
        except asyncio.TimeoutError as error:
            raise Refusal(408, "upload", f"the upload took longer than {self.service.upload_ms} ms") from error
        return asked(
            list(request.query.items()),
            request.content_type,
            body,
            self.about,
            self.service,
            explains=want == "explain",
            methods=[*self.methods],
        )

    async def _uploaded(self, request: web.Request) -> bytes:
        """The body. All that come in at a time may hold as much as a full queue does.

        Raises:
            Refusal.
        """
        body, limit = bytearray(), self.service.max_body
        too_large = Refusal(413, "size", f"the body has more than {limit} bytes")
        if (request.content_length or 0) > limit:
            raise too_large
        try:
            async for chunk in request.content.iter_any():
                body += chunk
                self._uploading += len(chunk)
                if len(body) > limit:
                    raise too_large
                if self._uploading > limit * self.service.queue:
                    raise Refusal(429, "full", "too much is being uploaded; try again later")
        finally:
            self._uploading -= len(body)
        return bytes(body)

    def _check_room(self) -> None:
        if not self._ready:
            raise Refusal(503, "not ready", "the service is not ready yet")
        if self._admitted >= self.service.queue:
            raise Refusal(429, "full", f"{self._admitted} requests are being worked on; try again later")

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """Among the requests that are admitted."""
        self._check_room()
        self._admitted += 1
        self._idle.clear()
        self.metrics.admitted.set(self._admitted)
        try:
            yield
        finally:
            self._admitted -= 1
            self.metrics.admitted.set(self._admitted)
            if not self._admitted:
                self._idle.set()

    async def _answered(self, asking: Asked, want: wire.Want, picture: bool) -> Answer:
        seconds = asking.timeout_ms / 1000
        deadline = time.monotonic() + seconds
        header = {
            "want": want,
            "deadline": deadline,
            "classes": asking.classes,
            "picture": picture,
            "method": asking.method,
        }

        async def answer_in_turn() -> Answer:
            if self._admitted > 1:  # a request that is alone waits for nobody
                await self._window.wait()
            await self._slots.acquire()
            data = wire.pack(header, {"body": asking.body, "pair": asking.pair})
            asked = self.stages.ask(data, deadline - time.monotonic() + 1)
            task = asyncio.create_task(asked)
            # The stages go on with what nobody waits for any more; until they are done, its slot is theirs.
            self._with_stages.add(task)
            task.add_done_callback(self._returned)
            return await asyncio.shield(task)

        try:
            answer = await asyncio.wait_for(answer_in_turn(), seconds)
        except asyncio.TimeoutError:
            return Answer(408, f"not done within {asking.timeout_ms} ms")
        self.metrics.note(answer)
        return answer

    def _returned(self, task: asyncio.Task[Answer]) -> None:
        self._with_stages.discard(task)
        self._slots.release()

    async def _health(self, request: web.Request) -> web.Response:
        if self._ready and not self._draining:
            return web.json_response({"status": "ready"})
        return web.json_response({"status": "draining" if self._draining else "starting"}, status=503)

    async def _metrics(self, request: web.Request) -> web.Response:
        text = self.metrics.text() + await self.stages.metrics()
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _model(self, request: web.Request) -> web.Response:
        return web.Response(text=self._about, content_type="application/json")

    async def _page(self, request: web.Request) -> web.StreamResponse:
        return web.FileResponse(PAGE)


def serve(service: Service) -> int:
    """Serve until stopped; the exit code."""

    return uvloop.run(Front(service).run())
