"""`fastrel batch --ray` on a cluster of two nodes on this machine: the rows of the local engine, whatever dies.

`python -m pytest tests/test_batch_ray.py` runs it by itself; FASTREL_KILLS=10 kills the driver ten times.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastrel.batch import local, read, table
from fastrel.batch.attempts import Attempts
from fastrel.batch.explain import Explain
from fastrel.batch.store import Store, Task, parts
from fastrel.cli import main
from fastrel.data import inputs
from fastrel.errors import FastrelError, InputError
from tests import tiny
from tests.small import RELEASE
from tests.test_batch import found, rows

pytestmark = pytest.mark.slow

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray listens on loopback alone
ray = pytest.importorskip("ray")

#: What takes minutes and is of a kind with others here.
for_releases = pytest.mark.skipif(not RELEASE, reason="takes minutes: before a release, FASTREL_EXAMPLES=300")

KILLS = int(os.environ.get("FASTREL_KILLS", "1"))
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two nodes of one processor each, which import this fastrel; the address."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        loopback = "127.0.0.1"
        nodes = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "node_ip_address": loopback}
        )
        nodes.add_node(num_cpus=1, node_ip_address=loopback)
        yield nodes.address
        nodes.shutdown()


@pytest.fixture(scope="module")
def connected(cluster: str) -> Iterator[None]:
    """One connection for several runs: what Ray Data starts for each driver takes longer than what is tested here."""
    ray.init(address=cluster, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def explain() -> Explain:
    torch.set_num_threads(1)
    made = Explain("tests.tiny:vit", target=("top2",), batch_size=3)
    made.shape()
    return made


def run(engine: str, explain: Explain, folder: Path, out: Path, **options: Any) -> None:
    """One of the engines over a folder, eight items a part."""
    with Store(str(out), {}) as store:
        tasks = store.tasks(found(folder), retry=False, size=8)
        schema = table.schema((4, 4), {})
        if engine == "local":
            local.run(explain, tasks, store, schema, 0, lambda done, failed: None)
        else:
            from fastrel.batch import on_ray

            on_ray.run(explain, tasks, store, schema, lambda done, failed: None, **options)


def test_an_address_where_no_cluster_is_is_an_error_not_a_wait(explain: Explain, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match=r"no cluster answers at '127\.0\.0\.1:1'"):
        run("ray", explain, tiny.pictures(tmp_path / "p", 1), tmp_path / "out", actors=1, address="127.0.0.1:1")
    assert time.monotonic() - started < 20


def test_both_engines_write_the_same_and_a_killed_driver_loses_nothing(
    cluster: str, explain: Explain, tmp_path: Path
) -> None:
    folder = tiny.pictures(tmp_path / "p", 60)
    run("local", explain, folder, tmp_path / "local")
    command = ["--model", "tests.tiny:slow", "--target", "top2", "--batch-size", "3", "--part", "8", "--ray"]
    code = "import sys; from fastrel.cli import main; sys.exit(main(sys.argv[1:]))"
    random = np.random.default_rng(0)
    arguments = ["batch", str(folder), *command, "--address", cluster, "--actors", "2", "--out", str(tmp_path / "ray")]
    killed = 0
    for _ in range(KILLS):
        driver = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL)
        before = len(parts(tmp_path / "ray"))
        deadline = time.monotonic() + 300
        while driver.poll() is None and len(parts(tmp_path / "ray")) == before and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(random.uniform(0, 0.5))
        killed += driver.poll() is None
        driver.kill()
        assert driver.wait() in (0, -signal.SIGKILL)
    assert killed >= 1
    assert rows(tmp_path / "ray").num_rows > 0
    assert main(arguments) == 0
    made, expected = rows(tmp_path / "ray"), rows(tmp_path / "local")
    assert made.replace_schema_metadata().equals(expected.replace_schema_metadata())


@for_releases
@pytest.mark.usefixtures("connected")
def test_an_actor_that_dies_costs_no_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.pictures(tmp_path / "p", 20, red=11)
    explain = Explain("tests.tiny:once", target=("1",), batch_size=3)
    monkeypatch.chdir(tmp_path)
    run("ray", explain, folder, tmp_path / "out", actors=2)
    assert (tmp_path / "died").exists()
    run("local", explain, folder, tmp_path / "local")
    made, expected = read(tmp_path / "out"), read(tmp_path / "local")
    assert made.numpy()["item"] == expected.numpy()["item"]
    assert np.allclose(made.numpy()["map"], expected.numpy()["map"], atol=1e-6)
    assert not made.failures


@pytest.mark.usefixtures("connected")
def test_a_picture_that_kills_its_actor_is_reported(tmp_path: Path) -> None:
    folder = tiny.pictures(tmp_path / "p", 20, red=11)
    run("ray", Explain("tests.tiny:deadly", target=("1",), batch_size=3), folder, tmp_path / "out", actors=1)
    assert {Path(name).name for name in read(tmp_path / "out").failures} == {"00011.png"}
    assert "kills the process that explains it" in next(iter(read(tmp_path / "out").failures.values()))
    assert len(read(tmp_path / "out")) == 19


def test_several_pictures_that_kill_in_one_batch_are_not_taken_for_a_model_that_does() -> None:
    attempts, killers, starts = Attempts(patience=3), list("abcdefgh"), 0
    while True:
        assert attempts.start()
        starts += 1
        before, known = attempts.begin("0:0")
        left = [item for item in killers if item not in known]
        if not left:
            break
        if before:
            attempts.item("0:0", left[0])
    assert known == {*killers}
    assert starts == len(killers) + 2
    assert [Attempts(patience=3).start(), *(attempts.start() for _ in range(4))] == [True, True, True, True, False]


class Counting:
    """The handle of an actor that counts starts, in this process."""

    def __init__(self, may_start: bool) -> None:
        self.start = self
        self.may_start = may_start

    def remote(self) -> Any:
        return ray.put(self.may_start)


@pytest.mark.usefixtures("connected")
def test_what_an_actor_cannot_do_is_said_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrel.batch.on_ray import Worker

    item = inputs.Item("x", inputs.Value(b""))
    tasks, schema = [Task("shard-0-of-1-000000.parquet", (item,))], table.schema((4, 4), {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    for may_start, model, reason in ((True, "tests.nowhere:f", "cannot load 'tests.nowhere:f': ModuleNotFoundError"),
                                     (False, "tests.tiny:vit", "they die again and again")):  # fmt: skip
        worker = Worker(Explain(model), tasks, schema, Counting(may_start), os.getcwd(), ["/some/where"])
        assert worker({"task": [0]})["hopeless"][0].startswith(reason)
    assert sys.path[-1] == "/some/where"


@for_releases
@pytest.mark.usefixtures("connected")
def test_a_model_that_kills_every_actor_ends_the_run(tmp_path: Path) -> None:
    folder = tiny.pictures(tmp_path / "p", 2)
    explain = Explain("tests.tiny:fatal", target=("1",))  # never loaded here: it would end this process
    with pytest.raises(FastrelError, match="die again and again"):
        run("ray", explain, folder, tmp_path / "out", actors=1)


@pytest.mark.usefixtures("connected")
def test_the_callable_maps_a_data_set_of_one_s_own(tmp_path: Path) -> None:
    folder = tiny.pictures(tmp_path / "p", 9)
    (folder / "bad.png").write_bytes(b"no")
    files = ray.data.read_binary_files(str(folder), include_paths=True)
    frame = files.map_batches(Explain("tests.tiny:vit", target=("top2",)), batch_size=3).to_pandas()
    assert len(frame) == 19
    assert [Path(name).name for name in frame["item"][frame["error"].notna()]] == ["bad.png"]
    assert np.stack(list(frame["map"])).shape == (19, 4, 4)


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "expected"),
    [
        ([{"CPU": 4.0}] * 4, 16, 0, 0),  # together as many as one actor needs, and none that can hold it
        ([{"CPU": 4.0}] * 4, 3, 0, 4),
        ([{"CPU": 4.0}, {"CPU": 7.0}], 2, 0, 5),
        ([{"CPU": 3.0}], 0.3, 0, 10),
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 64.0}], 1, 1, 2),
        ([{"CPU": 8.0, "GPU": 2.0}], 1, 0.6, 2),  # no actor has parts of two GPUs
        ([{"CPU": 8.0, "GPU": 2.0}], 1, 0.25, 8),
        ([{"GPU": 2.0, "memory": 1e9}], 0, 1, 2),
        ([], 1, 0, 0),
    ],
)
def test_actors_fit_where_a_node_has_room_for_them(
    nodes: list[dict[str, float]], cpus: float, gpus: float, expected: int
) -> None:
    from fastrel.batch.on_ray import room

    assert room(nodes, cpus, gpus) == expected


@pytest.mark.usefixtures("connected")
def test_too_few_processors_are_an_error_not_a_hang(explain: Explain, tmp_path: Path) -> None:
    folder = tiny.pictures(tmp_path / "p", 2)
    started = time.monotonic()
    with pytest.raises(
        InputError, match="3 actors of 1 CPUs and 0 GPUs each: the cluster has room for 2; its nodes have 1 CPUs"
    ):
        run("ray", explain, folder, tmp_path / "out", actors=3)
    with pytest.raises(InputError, match="1 actors of 1 CPUs and 1 GPUs each: the cluster has room for 0"):
        run("ray", explain, folder, tmp_path / "out", actors=1, gpus=1)
    assert time.monotonic() - started < 60
