"""`fastrel serve`: what a request gets, and that it holds under load. Loopback only; every loop is bounded."""

import asyncio
import base64
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import fastrel
from fastrel.artefact.metadata import RANK
from fastrel.artefact.reading import reader
from fastrel.cli import main
from fastrel.data import pictures
from fastrel.errors import InputError
from fastrel.serving import answers
from fastrel.serving.asking import Asked
from fastrel.serving.decoding import Decoding
from fastrel.serving.explaining import Explaining
from fastrel.serving.front import Front
from fastrel.serving.service import Service
from fastrel.serving.stages import Stages
from fastrel.serving.window import Window
from fastrel.serving.wire import Answer, Work, pack, unpack
from tests import tiny
from tests.served import ROOT, Client, Server, free_port, load, percentile, picture, served

QUEUE, TIMEOUT, UPLOAD = 16, 5000, 2000
OPTIONS = ("--workers", "2", "--decoders", "1", "--threads", "1", "--batch", "4", "--wait-ms", "2", "--queue", str(QUEUE),
           "--timeout-ms", str(TIMEOUT), "--upload-ms", str(UPLOAD), "--max-pixels", "4000000", "--max-body", "2000000", "--ui",
           "--max-targets", "4")  # fmt: skip


@pytest.fixture(scope="module")
def server(vit_artefact: Path) -> Iterator[Server]:
    with served(vit_artefact, *OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def artefact(vit_artefact: Path) -> fastrel.Artefact:
    return fastrel.load(vit_artefact)


def expected(artefact: fastrel.Artefact, body: bytes, target: Any = None) -> fastrel.Explanation:
    (x,) = reader(artefact.path, artefact.metadata)(pictures.read(body).image)
    return artefact(torch.from_numpy(x)[None], target=target)


def same_map(answer: Any, explanation: fastrel.Explanation) -> None:
    found = np.array([one["patches"] for one in answer["maps"]], np.float32)
    np.testing.assert_allclose(found, explanation.patches[0].numpy().reshape(found.shape), rtol=1e-4, atol=1e-7)


# The wire and the stages, without any server.


def test_the_wire_gives_back_what_it_got() -> None:
    header, arrays = unpack(
        pack({"a": [1, "ü"]}, {"x": np.arange(6.0).reshape(2, 3), "body": b"\0{", "none": np.zeros((0, 2))})
    )
    assert header == {"a": [1, "ü"]}
    np.testing.assert_array_equal(arrays["x"], np.arange(6.0).reshape(2, 3))
    assert (arrays["body"], arrays["none"].shape) == (b"\0{", (0, 2))
    answer = Answer.from_bytes(Answer(408, "late", {"expired": True}).to_bytes())
    assert (answer.status, answer.error, answer.header) == (408, "late", {"expired": True})


def test_a_text_has_its_relevance_beside_its_tokens_in_arrow() -> None:
    about: Any = SimpleNamespace(class_names=("no", "yes"), probabilities="sigmoid", weights="w", options={"method": "m"})
    arrays = {
        "logits": np.array([0.0, 2.0], np.float32),
        "classes": np.array([1, 0]),
        "ok": np.array([True, True]),
        "map": np.arange(6, dtype=np.float32).reshape(2, 3),
    }
    answer = Answer(header={"tokens": ["[CLS]", "a", "[SEP]"]}, arrays=arrays)
    table = pa.ipc.open_stream(answers.rendered(answer, about, answers.ARROW, 0.75)).read_all()
    assert table["target_name"].to_pylist() == ["yes", "no"]
    assert table["probability"].to_pylist() == pytest.approx([1 / (1 + np.exp(-2)), 0.5])
    assert table["relevance"].to_pylist() == [[0, 1, 2], [3, 4, 5]]
    assert table["tokens"].to_pylist() == [["[CLS]", "a", "[SEP]"]] * 2


def test_one_batch_holds_requests_with_different_targets_and_none_changes_another(artefact: fastrel.Artefact) -> None:
    explaining = Explaining(artefact)
    samples = [np.random.default_rng(i).standard_normal((3, 32, 32)).astype(np.float32) for i in range(4)]
    samples[1][0, 0, 0] = np.nan
    targets = [(3,), (1,), (RANK, 2, 5), (6, 0)]
    works = [Work("explain", t, float("inf"), (x,)) for x, t in zip(samples, targets, strict=True)]
    answers = explaining(
        [*works, Work("explain", (1,), 0.0, (samples[0],)), Work("predict", (), float("inf"), (samples[0],))]
    )
    for i, (answer, target) in enumerate(zip(answers[:4], targets, strict=True)):
        found = artefact(torch.from_numpy(samples[i])[None], target=[list(target)])
        assert answer.arrays["ok"].tolist() == found.ok[0].tolist() == [i != 1] * len(target)
        np.testing.assert_allclose(answer.arrays["map"], found.patches[0], rtol=1e-4, atol=1e-7)
        np.testing.assert_array_equal(answer.arrays["classes"], found.target[0])
    assert [answer.status for answer in answers] == [200] * 4 + [408, 200]
    np.testing.assert_allclose(answers[5].arrays["logits"], answers[0].arrays["logits"], rtol=1e-4, atol=1e-6)


def test_what_is_past_its_deadline_does_not_reach_the_model(artefact: fastrel.Artefact) -> None:
    class Never(fastrel.Artefact):
        def explain(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("explained")

    class Broken(Never):
        def self_test(self) -> float:
            raise RuntimeError

    broken = Broken(artefact.path, artefact.metadata, lambda *given: None)
    assert Explaining(broken, lambda: 0.0)([Work("canary", (), 1.0)])[0].status == 500
    never = Never(artefact.path, artefact.metadata, lambda *given: None)
    sample = (np.zeros((3, 32, 32), np.float32),)
    assert [a.status for a in Explaining(never, lambda: 10.0)([Work("explain", (1,), 9.0, sample)])] == [408]
    # What the model raises fails that request alone, and nothing is raised.
    assert [a.status for a in Explaining(never, lambda: 10.0)([Work("explain", (1,), 11.0, sample)] * 2)] == [500, 500]


def test_the_decode_stage_never_imports_torch(vit_artefact: Path) -> None:
    code = (
        "import sys; from fastrel.serving.decoding import Decode, Decoding; from fastrel.serving.service import Service\n"
        "from fastrel.serving import wire\n"
        "header = {'want': 'explain', 'classes': [1], 'deadline': 1e9, 'picture': True}\n"
        "work = Decoding(Service(sys.argv[1]))(wire.pack(header, {'body': sys.stdin.buffer.read()}))\n"
        "assert work.sample[0].shape == (3, 32, 32) and work.picture.shape == (32, 32, 3)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(vit_artefact)], input=picture(), check=True, cwd=ROOT)


# What a request gets.


def test_an_explanation_as_json_is_that_of_the_artefact(server: Server, artefact: fastrel.Artefact) -> None:
    body = picture(1)
    status, answer = server.explain(body)
    assert status == 200
    same_map(answer, expected(artefact, body))
    assert answer["maps"][0]["class"] == answer["top"][0]["class"]
    status, answer = server.explain(body, "?target=3&target=5,1")
    assert [one["class"] for one in answer["maps"]] == [3, 5, 1]
    same_map(answer, expected(artefact, body, [[3, 5, 1]]))
    as_json = json.dumps({"image": base64.b64encode(body).decode(), "target": [3, 5, 1]}).encode()
    assert server.explain(as_json, Content_Type="application/json")[1]["maps"] == answer["maps"]
    status, answer = server.explain(body, "?top=2", route="/explain")
    assert [one["class"] for one in answer["maps"]] == [one["class"] for one in answer["top"][:2]]
    status, answer = server.explain(body, route="/predict")
    assert status == 200
    assert "maps" not in answer
    assert answer["top"][0]["probability"] == pytest.approx(
        float(expected(artefact, body).logits.softmax(1).max()), rel=1e-4
    )


def test_overlays_and_arrow_by_accept(server: Server, artefact: fastrel.Artefact) -> None:
    body = picture(2)
    status, content, headers = server.request("POST", "/explain?target=3&target=4", body, {"Accept": "image/png,*/*;q=0.1"})
    assert (status, headers["Content-Type"]) == (200, "image/png")
    assert Image.open(io.BytesIO(content)).size == (2 * 224 + 8, 224 + 22)  # with their names
    plain = server.request("POST", "/explain?target=3&opacity=0", body, {"Accept": "image/png"})[1]
    assert plain != content
    kind = "application/vnd.apache.arrow.stream"
    status, content, headers = server.request("POST", "/explain?target=3&target=4", body, {"Accept": kind})
    assert (status, headers["Content-Type"]) == (200, kind)
    table = pa.ipc.open_stream(content).read_all()
    assert table["target"].to_pylist() == [3, 4]
    found = table["map"].combine_chunks().to_numpy_ndarray()
    np.testing.assert_allclose(found, expected(artefact, body, [[3, 4]]).patches[0].numpy(), rtol=1e-4, atol=1e-7)
    assert table.schema.metadata[b"weights"].decode() == artefact.metadata.weights
    status, content, _ = server.request("POST", "/explain", body, {"Accept": "video/mp4"})
    assert (status, "video/mp4" in content.decode()) == (406, True)


@pytest.mark.parametrize(
    ("body", "query", "headers", "status", "said"),
    [
        (b"", "", {}, 400, "empty"),
        (b"{", "", {"Content_Type": "application/json"}, 400, "not JSON"),
        (b"[1]", "", {"Content_Type": "application/json"}, 400, "list"),
        (b'{"text": "a"}', "", {"Content_Type": "application/json"}, 400, "text"),
        (b'{"image": "?"}', "", {"Content_Type": "application/json"}, 400, "base64"),
        (b"no picture", "", {}, 422, "not a picture"),
        (None, "?target=-1", {}, 422, "-1"),
        (None, "?target=5000", {}, 422, "5000"),
        (None, "?target=cat", {}, 422, "'cat'"),
        (None, "?target=", {}, 422, "no class"),
        (None, "?target=1,2,3,4,5", {}, 422, "5 targets"),
        (None, "?top=10000", {}, 422, "10000"),
        (None, "?top=0", {}, 422, "'0'"),
        (None, "?target=1&top=2", {}, 422, "not both"),
        (None, "?class=1", {}, 400, "'class'"),
        (None, "?opacity=NaN", {}, 422, "NaN"),
        (None, "?timeout_ms=0", {}, 422, "timeout_ms '0'"),
        (None, "?top=1&top=2", {}, 422, "top is given as 1 and as 2"),
        (b'{"image": "", "target": 1}', "?target=2", {"Content_Type": "application/json"}, 422, "1 in the JSON and '2'"),
        (b'{"image": 5}', "", {"Content_Type": "application/json"}, 400, "'image': 'int'"),
        (b'{"image": ""}', "", {}, 400, "Content-Type: application/json"),
        (b"--x", "", {"Content_Type": "multipart/form-data; boundary=x"}, 400, "--data-binary"),
        (None, "?method=rollout", {}, 422, "'rollout' is not served; there are frozen_attribution"),
        (None, "?target=--5", {}, 422, "'--5'"),
        (None, "?target=%C2%B2", {}, 422, "'²'"),
        (None, "?target=" + 5000 * "9", {}, 422, "999"),
        (b"[" * 200_000, "", {"Content_Type": "application/json"}, 400, "not JSON"),
        (b'{"image": "", "targets": 1}', "", {"Content_Type": "application/json"}, 400, "'targets'"),
        (b'{"image": "", "opacity": ' + 400 * b"9" + b"}", "", {"Content_Type": "application/json"}, 422, "opacity 999"),
    ],
)
def test_what_is_malformed_is_refused_with_the_value(
    server: Server, body: bytes | None, query: str, headers: dict[str, str], status: int, said: str
) -> None:
    found, answer = server.explain(picture() if body is None else body, query, **headers)
    assert (found, said in answer["error"]) == (status, True), answer


def test_predict_names_as_many_classes_as_are_asked_for(server: Server) -> None:
    assert [len(server.explain(picture(), query, "/predict")[1]["top"]) for query in ("", "?top=2", "?top=7")] == [5, 2, 7]
    for query, said in (("?top=8", "'8'"), ("?top=abc", "'abc'"), ("?target=1", "is for /explain")):
        status, answer = server.explain(picture(), query, "/predict")
        assert (status, said in answer["error"]) == (422, True), answer


def test_nginx_in_front_takes_what_the_service_takes(server: Server, tmp_path: Path) -> None:
    """`deploy/nginx.conf` itself, but for names and ports."""
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if not nginx:
        pytest.skip("nginx is not installed")
    port = free_port()
    site = (ROOT / "deploy" / "nginx.conf").read_text()
    for old, new in (("explain:8000", f"127.0.0.1:{server.port}"), ("listen 80;", f"listen 127.0.0.1:{port};")):
        assert old in site
        site = site.replace(old, new)
    folders = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    settings = tmp_path / "nginx.conf"
    settings.write_text(
        f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/errors; events {{}} http {{ access_log off; {folders} {site} }}"
    )
    process = subprocess.Popen([nginx, "-e", str(tmp_path / "errors"), "-c", str(settings)])
    try:
        front, body = Client(port), picture(3)
        for _ in range(100):
            with contextlib.suppress(OSError):
                if front.get("/health")[0] == 200:
                    break
            time.sleep(0.1)
        status, answer = front.explain(body, "?target=2")
        assert status == 200
        assert answer["maps"] == server.explain(body, "?target=2")[1]["maps"]
        assert front.get("/metrics")[0] == 403
        assert front.request("POST", "/explain", b"x" * 10_500_000)[0] == 413
        assert front.get("/")[0] == 200
    finally:
        process.terminate()
        process.wait(20)


def test_the_type_of_the_highest_weight_is_answered(artefact: fastrel.Artefact) -> None:
    for accept, kind in (
        ("application/json;q=0.5, image/png;q=0.9", answers.PNG),
        ("*/*;q=0.1, image/png", answers.PNG),
        ("application/json;q=0, image/png", answers.PNG),
        ("application/json;q=0, */*", answers.PNG),
        ("", answers.JSON),
        ("image/jpeg", None),
    ):
        assert answers.chosen(accept, artefact.metadata, "explain") == kind, accept


def test_other_methods_and_routes_are_refused(server: Server) -> None:
    assert server.get("/explain")[0] == 405
    assert server.get("/nothing")[0] == 404
    assert server.request("POST", "/explain", b"x" * 2_000_001)[0] == 413


def png_of(width: int, height: int) -> bytes:
    """A black PNG of one bit per pixel, without memory for its pixels."""
    row = b"\0" * (1 + (width + 7) // 8)
    packer = zlib.compressobj(9)
    data = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack("!I", len(content)) + kind + content + struct.pack("!I", zlib.crc32(kind + content))

    head = struct.pack("!IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_picture_bombs_and_odd_pictures_get_4xx_or_a_right_map(server: Server, artefact: fastrel.Artefact) -> None:
    before = server.memory()
    for width, height in ((19000, 19000), (11000, 11000), (1, 5_000_000)):
        status, answer = server.explain(png_of(width, height))
        assert status == 422, answer
        assert "pixels" in answer["error"]
    assert server.explain(picture()[:300])[0] == 422  # cut short
    assert server.memory() - before < 300e6
    turned = Image.Exif()
    turned[0x0112] = 6
    base = Image.open(io.BytesIO(picture(5, (50, 40))))
    odd = [
        saved(Image.new("L", (1, 65000), 90), "PNG"),
        saved(base, "GIF", save_all=True, append_images=[base.transpose(Image.Transpose.ROTATE_180)]),
        saved(base.convert("CMYK"), "JPEG"),
        saved(Image.fromarray(np.random.default_rng(0).integers(0, 65535, (30, 30)).astype(np.uint16)), "PNG"),
        saved(base, "JPEG", exif=turned),
    ]
    for body in odd:
        status, answer = server.explain(body)
        assert status == 200, answer
        same_map(answer, expected(artefact, body))


@pytest.mark.slow
def test_one_batch_holds_requests_for_several_methods(artefact: fastrel.Artefact, tmp_path: Path) -> None:
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    explainer, loaded = fastrel.Explainer(tiny.vit(), "gradient_attention"), fastrel.models.load("tests.tiny:vit")
    other = fastrel.load(fastrel.export(explainer, images, path=tmp_path / "other.pt2", loaded=loaded))
    works = [Work("explain", (2,), float("inf"), (x.numpy(),), method=i % 2) for i, x in enumerate(images)]
    answers = Explaining(artefact, beside=[other])(works)
    for x, answer, one in zip(images, answers, (artefact, other, artefact), strict=True):
        np.testing.assert_allclose(answer.arrays["map"], one(x[None], target=[[2]]).patches[0], rtol=1e-4, atol=1e-7)
    assert [*Front(Service(str(artefact.path), beside=(str(other.path),))).methods] == [
        "frozen_attribution",
        "gradient_attention",
    ]
    with pytest.raises(InputError, match="by 'frozen_attribution, positive'; one of them is enough"):
        Front(Service(str(artefact.path), beside=(str(artefact.path),)))
    changed = tiny.vit()
    torch.nn.init.ones_(changed.head.weight)
    third = fastrel.export(fastrel.Explainer(changed, "rollout"), images, path=tmp_path / "third.pt2", loaded=loaded)
    with pytest.raises(InputError, match="is of another model"):
        Front(Service(str(artefact.path), beside=(str(third),)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_artefacts_of_other_dtypes_are_served(tmp_path: Path, dtype: torch.dtype) -> None:
    images = torch.randn(2, 3, 16, 16, dtype=dtype)
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=4).eval().to(dtype)
    artefact = fastrel.load(fastrel.export(fastrel.Explainer(model), images, path=tmp_path / "a.pt2"))
    explaining = Explaining(artefact)
    explaining.warm(2)
    (answer,) = explaining([Work("explain", (1,), float("inf"), (images[0].float().numpy(),))])
    assert answer.status == 200
    np.testing.assert_allclose(answer.arrays["map"], artefact(images[:1], target=[[1]]).patches[0].float(), rtol=1e-4)


def test_what_is_past_its_deadline_is_not_decoded(vit_artefact: Path) -> None:
    header = {"want": "explain", "classes": [1], "deadline": time.monotonic() - 1, "picture": False}
    with pytest.raises(InputError, match="deadline passed"):
        Decoding(Service(str(vit_artefact)))(pack(header, {"body": b"no picture"}))


# When requests go on, without any stages.


def test_what_nobody_waits_for_keeps_its_slot_until_the_stages_are_done(vit_artefact: Path) -> None:
    """Else the stages would be given more than they can take, by clients that hang up."""

    class Slow(Stages):
        at_once = most = 0

        async def ask(self, data: bytes, seconds: float) -> Answer:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            await asyncio.sleep(0.5)
            self.at_once -= 1
            return Answer()

    async def run() -> tuple[int, list[int]]:
        service = Service(str(vit_artefact), workers=1, batch=1, decoders=1, wait_ms=1)  # three slots
        front, stages = Front(service), Slow(service)
        front.stages = stages
        late = await asyncio.gather(*[front._answered(Asked(b"", (1,), 20), "explain", False) for _ in range(9)])
        patient = await front._answered(Asked(b"", (1,), 5000), "explain", False)
        return stages.most, [*(one.status for one in late), patient.status]

    assert asyncio.run(run()) == (3, [408] * 9 + [200])


def test_those_who_wait_go_on_together() -> None:
    async def waited(*arrivals: float, size: int) -> list[float]:
        window = Window(1.0, size)

        async def one(arrival: float) -> float:
            await asyncio.sleep(arrival)
            began = time.monotonic()
            await window.wait()
            return time.monotonic() - began

        gone = asyncio.create_task(one(0))
        waiting = [asyncio.create_task(one(arrival)) for arrival in arrivals]
        await asyncio.sleep(0.05)
        gone.cancel()  # its client hung up
        return await asyncio.gather(*waiting)

    first, second = asyncio.run(waited(0, 0.5, size=8))
    assert first > 0.95
    assert second < 0.8
    assert max(asyncio.run(waited(0, 0.2, size=3))) < 0.8  # three are a batch


@pytest.mark.parametrize(("requests", "waits"), [(1, False), (2, True)])
def test_a_request_that_is_alone_waits_for_nobody(vit_artefact: Path, requests: int, waits: bool) -> None:
    class Prompt(Stages):
        async def ask(self, data: bytes, seconds: float) -> Answer:
            return Answer()

    async def lasted() -> float:
        service = Service(str(vit_artefact), wait_ms=1000)
        front, began = Front(service), time.monotonic()
        front.stages = Prompt(service)

        async def one() -> None:
            async with front._place():
                await asyncio.sleep(0)  # the other one is there
                assert (await front._answered(Asked(b"", (1,), 5000), "explain", False)).status == 200

        front._ready = True
        await asyncio.gather(*[one() for _ in range(requests)])
        return time.monotonic() - began

    assert (asyncio.run(lasted()) > 0.9) == waits


# Under load.


@pytest.mark.load
def test_overload_is_shed_at_once_and_nothing_is_lost(server: Server) -> None:
    before = server.memory()
    results = load(server.port, clients=6 * QUEUE, seconds=6, bodies=[picture(i) for i in range(8)], limit=3000)
    codes = Counter(status for status, _ in results)
    assert set(codes) == {200, 429}, codes
    assert percentile([s for code, s in results if code == 200], 0.99) <= TIMEOUT
    assert server.explain(picture())[0] == 200
    assert server.memory() - before < 100e6


@pytest.mark.load
def test_a_deadline_holds(server: Server) -> None:
    body, done = picture(), server.metric("fastrel_explained")
    began = time.monotonic()
    statuses = [server.explain(body, "?timeout_ms=1")[0] for _ in range(20)]
    assert statuses.count(408) >= 15  # a process may be that fast
    assert time.monotonic() - began < 20
    assert server.metric("fastrel_expired_total") >= statuses.count(408)
    assert server.explain(body)[0] == 200
    # A worker's own count is heard with its answers; both have answered by now.
    while server.metric("fastrel_explained") < done + 1:
        server.explain(body)
    assert server.metric("fastrel_explained") <= done + statuses.count(200) + 10


@pytest.mark.load
def test_clients_that_hang_up_leave_room_for_others(server: Server) -> None:
    body = picture()
    head = f"POST /explain HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(3 * QUEUE):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(head + body)
    end = time.monotonic() + TIMEOUT / 1000
    while server.explain(body)[0] == 429:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert server.metric("fastrel_admitted") == 0


@pytest.mark.load
def test_200_slow_uploads_disturb_nobody_and_are_closed(server: Server) -> None:
    slow = []
    for _ in range(200):
        client = socket.create_connection(("127.0.0.1", server.port))
        client.sendall(b"POST /explain HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nsome")
        slow.append(client)
    assert [server.explain(picture(i))[0] for i in range(5)] == [200] * 5
    codes: Counter[bytes] = Counter()
    for client in slow:
        client.settimeout(UPLOAD / 1000 + 10)
        codes[client.recv(4096)[9:12]] += 1
        client.close()
    assert codes == {b"408": 200}


@pytest.mark.load
def test_a_killed_worker_costs_its_own_batch_at_most_and_comes_back(vit_artefact: Path, server: Server) -> None:
    while len(server.explainers()) < 2:
        server.explain(picture())
    victim = server.explainers()[-1]
    results: list[tuple[int, float]] = []
    bodies = [picture(i) for i in range(8)]
    clients = threading.Thread(target=lambda: results.extend(load(server.port, 6, 8, bodies, limit=2000)))
    clients.start()
    time.sleep(1)
    os.kill(victim, signal.SIGKILL)
    clients.join()
    codes = Counter(status for status, _ in results)
    assert codes[200] > 0
    assert not {*codes} - {200, 408, 500}, codes
    assert codes[408] + codes[500] <= 4 + 4  # its batch, and one that was on its way to it
    assert max(seconds for _, seconds in results) <= TIMEOUT / 1000 + 2
    assert server.explain(picture())[0] == 200


@pytest.mark.load
def test_a_picture_that_kills_its_decoder_is_not_tried_again_and_the_decoder_comes_back(
    vit_artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a decoder with a bug does it: any process of this service dies of a picture 13 pixels wide, and leaves a line."""
    deaths = tmp_path / "deaths"
    (tmp_path / "sitecustomize.py").write_text(f"""
import os
from PIL import Image
load = Image.Image.resize
def deadly(image, *args, **kwargs):
    if image.width == 13:
        with open({str(deaths)!r}, "a") as file:
            print(os.getpid(), file=file)
        os.kill(os.getpid(), 9)
    return load(image, *args, **kwargs)
Image.Image.resize = deadly
""")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with served(vit_artefact, *OPTIONS[:2], "--decoders", "2", *OPTIONS[4:]) as server, ThreadPoolExecutor(1) as pool:
        poison = pool.submit(server.explain, picture(size=(13, 13)))
        others = [server.explain(picture(i))[0] for i in range(10)]
        assert poison.result(TIMEOUT / 1000 + 5)[0] == 408
        assert [server.explain(picture(i))[0] for i in range(10)] == [200] * 10
        stages = psutil.Process(server.process.pid).children(recursive=True)
        assert sum("multiprocessing.spawn" in " ".join(one.cmdline()) for one in stages) == 4
    assert len(deaths.read_text().splitlines()) == 1
    assert set(others) == {200}, others


def test_health_metrics_and_the_canary(server: Server) -> None:
    assert server.get("/health") == (200, b'{"status": "ready"}')
    text = server.get("/metrics")[1].decode()
    for name in ("fastrel_requests_total", "fastrel_rejected_total", 'fastrel_seconds_bucket{le="0.005",stage="decode"}',
                 "fastrel_model_info", "fastrel_batch_size_count", "fastrel_expired_total", "fastrel_not_ok_total"):  # fmt: skip
        assert name in text, name
    assert "mosec" in text
    assert server.metric("fastrel_canary_error") < 1e-4
    about = json.loads(server.get("/model")[1])
    assert about["classes"] == 7


@pytest.mark.load
def test_memory_is_flat(server: Server) -> None:
    """A short one; `python -m benchmarks.serving` sends 10,000 requests."""
    bodies = [picture(i, (30 + 7 * i, 200 - 9 * i)) for i in range(16)]
    held = []
    for _ in range(3):  # the first fills what allocators keep
        for query in ("", "?top=3"):
            load(server.port, 8, 4, bodies, query, limit=300)
        held.append(server.memory())
    assert held[2] - held[1] < 20e6


@pytest.mark.slow
def test_sigterm_answers_what_was_admitted_and_ends_with_0(vit_artefact: Path) -> None:
    # Started before the other one ends, as in a rolling restart: not ready before it is warm.
    server = Server(vit_artefact, *OPTIONS[2:], "--workers", "1", ready=False)
    try:
        while True:
            assert server.process.poll() is None
            try:
                status, said = server.get("/health")
                break
            except OSError:
                time.sleep(0.05)
        assert (status, said) == (503, b'{"status": "starting"}')
        assert server.explain(picture())[0] == 503
        server.wait_ready()
        with ThreadPoolExecutor(14) as pool:
            waiting = [pool.submit(server.explain, picture(i), "?top=4") for i in range(14)]
            while (admitted := server.metric("fastrel_admitted")) == 0:
                assert not all(one.done() for one in waiting), "too fast for this test"
            server.process.send_signal(signal.SIGTERM)
            codes = []
            for one in waiting:
                try:
                    codes.append(one.result()[0])
                except ConnectionRefusedError:
                    codes.append(0)  # it came after the signal: refused, as a load balancer's health check tells
        assert {*codes} <= {200, 0}
        assert codes.count(200) >= admitted
        assert server.process.wait(60) == 0
        with pytest.raises(OSError):  # noqa: PT011
            server.get("/health")
    finally:
        server.stop()


def test_a_service_that_cannot_serve_says_so(
    vit_artefact: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in (
        ([str(tmp_path / "none.pt2")], "there is no artefact"),
        ([str(vit_artefact), "--port", str(server.port)], "cannot listen"),
        ([], "give an ARTEFACT"),
        ([str(vit_artefact), "--rules", "official"], "--rules"),
    ):
        assert main(["serve", *arguments]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_workers_that_cannot_load_the_artefact_end_it_with_the_reason(vit_artefact: Path, tmp_path: Path) -> None:
    content = bytearray(vit_artefact.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    (tmp_path / "damaged.pt2").write_bytes(content)
    server = Server(tmp_path / "damaged.pt2", *OPTIONS, ready=False)
    assert server.process.wait(120) == 1
    assert "no worker can serve: " in server.said()


@pytest.mark.load
def test_without_any_worker_it_ends_with_1(server: Server) -> None:
    """The last test that uses this server."""
    while len(server.explainers()) < 2:
        server.explain(picture())
    for pid in server.explainers():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert server.process.wait(60) == 1
    assert "no worker can serve" in server.said()
