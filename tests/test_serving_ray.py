"""The Ray Serve example answers like the service. A bounded run on this machine."""

import json
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("ray.serve")


def test_the_ray_serve_app_answers_and_refuses(vit_artefact: Path) -> None:
    import ray
    from ray import serve

    from examples.ray_serve import build
    from tests.served import picture

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}}
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(str(vit_artefact)))
        url = f"http://127.0.0.1:{port}/?target=3&target=5"
        with urllib.request.urlopen(urllib.request.Request(url, picture()), timeout=60) as response:
            answer = json.load(response)
        assert [one["class"] for one in answer["maps"]] == [3, 5]
        assert answer["maps"][0]["ok"]
        with pytest.raises(urllib.error.HTTPError, match="422"):
            urllib.request.urlopen(urllib.request.Request(url.replace("target=5", "target=99"), picture()), timeout=60)
        with pytest.raises(urllib.error.HTTPError, match="422"):
            urllib.request.urlopen(urllib.request.Request(url, b"no picture"), timeout=60)
        with pytest.raises(urllib.error.HTTPError, match="408"):
            urllib.request.urlopen(urllib.request.Request(url + "&timeout_ms=1", picture()), timeout=60)
        with pytest.raises(urllib.error.HTTPError, match="413"):
            urllib.request.urlopen(urllib.request.Request(url, b"x" * 10_000_001), timeout=60)
    finally:
        serve.shutdown()
        ray.shutdown()
