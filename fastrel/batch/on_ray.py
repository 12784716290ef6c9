"""A run over a data set on a cluster, through Ray Data: a pool of actors that explain, one block of the data set per part.

Ray's own checkpoints and `write_parquet` are not used: after a resume they batch the remaining items in another way, so that
rows differ by rounding, and their filter needs processors of its own. Here an actor gives back a part as the bytes of a Parquet
file, and the driver keeps it as the local engine does: the same files, the same batches, the same resumption.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fastrel.batch import attempts
from fastrel.batch import table as tables
from fastrel.batch.decoding import Decoded, decode
from fastrel.batch.explain import Explain
from fastrel.batch.local import Progress
from fastrel.batch.row import Row
from fastrel.batch.store import Store, Task
from fastrel.errors import FastrelError, InputError, needed, reason

with needed("--ray", "ray"):
    import ray
    import ray.data

# By value, so that the actor that counts need not import fastrel, and torch with it.
ray.cloudpickle.register_pickle_by_value(attempts)

KILLS = "it kills the process that explains it (tried twice)"

#: Seconds for a cluster to answer.
_REACHED_S = 20

#: How often actors may start without getting anywhere in between, per actor.
_PATIENCE = 3

#: The smallest part of a processor or GPU that Ray counts.
_UNIT = 1e-4


def run(
    explain: Explain,
    tasks: Sequence[Task],
    store: Store,
    schema: Any,
    progress: Progress,
    *,
    actors: int = 1,
    cpus: float = 1,
    gpus: float = 0,
    address: str | None = None,
) -> None:
    """Do the tasks with `actors` actors of so many processors and GPUs each; they see the same files as this process.

    address: of a running cluster ("auto": the one of this machine); None: that of RAY_ADDRESS, or one that is started here for
        the time of the run.

    Raises:
        InputError: nothing answers at the address, or the nodes of the cluster have no room for the actors.
        FastrelError: an actor cannot work at all (a model that is not there, say), or actors die again and again before any
            item is finished.
    """
    started = not ray.is_initialized()
    if started:
        _reach(address)
        # Without an address Ray would join whatever cluster somebody has started on this machine.
        where = address or os.environ.get("RAY_ADDRESS", "local")
        own: dict[str, Any] = {"include_dashboard": False} if where == "local" else {}
        ray.init(address=where, log_to_driver=False, logging_level=logging.WARNING, **own)
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        _require(actors, cpus, gpus)
        counter: Any = ray.remote(num_cpus=0)(attempts.Attempts).remote(_PATIENCE * actors)
        blocks = ray.data.from_items([{"task": i} for i in range(len(tasks))], override_num_blocks=len(tasks))
        results = blocks.map_batches(
            Worker,
            batch_size=1,
            fn_constructor_args=(explain, list(tasks), schema, counter, os.getcwd(), list(sys.path)),
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        for row in results.iter_rows():
            if row["hopeless"]:
                raise FastrelError(f"the actors cannot work: {row['hopeless']}")
            task = tasks[row["task"]]
            store.put(task, tables.decode(row["parquet"]))
            progress(len(task.items), int(row["failed"]))
    except ray.exceptions.RayError as error:
        raise FastrelError(f"Ray gave up: {_cause(error)}") from error
    finally:
        if started:
            ray.shutdown()


def _reach(address: str | None) -> None:
    """Ray tries for minutes to reach a cluster that is not there."""
    host, _, port = (address or "").rpartition(":")
    if host and "/" not in host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), _REACHED_S).close()
        except OSError as error:
            raise InputError(f"no cluster answers at {address!r}: {error}; `ray status` there tells its address") from error


def room(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float) -> float:
    """How many actors of so many processors and GPUs fit at once: an actor is on one node, a part of a GPU on one GPU.

    nodes: what each has of "CPU" and "GPU". Infinity for actors that need neither.
    """

    def fitting(has: float, each: float) -> float:
        return round(has / _UNIT) // round(each / _UNIT) if each >= _UNIT else math.inf

    def on(node: Mapping[str, float]) -> float:
        devices = node.get("GPU", 0)
        parts = devices * fitting(1, gpus) if _UNIT <= gpus < 1 else fitting(devices, gpus)
        return min(fitting(node.get("CPU", 0), cpus), parts)

    return sum(map(on, nodes))


def _require(actors: int, cpus: float, gpus: float) -> None:
    """Ray waits for ever for processors that are not there."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if (most := room(nodes, cpus, gpus)) < actors:
        has = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise InputError(
            f"{actors} actors of {cpus:g} CPUs and {gpus:g} GPUs each: the cluster has room for {most:g}; its nodes have {has}"
        )


class Worker:
    """An actor's work: parts of the data set. It finds files and modules where the process that started the run does."""

    def __init__(
        self, explain: Explain, tasks: list[Task], schema: Any, counter: Any, folder: str, path: Sequence[str]
    ) -> None:
        self.explain, self.tasks, self.schema, self.counter = explain, tasks, schema, counter
        with contextlib.suppress(OSError):
            os.chdir(folder)
        sys.path += [entry for entry in path if entry not in sys.path]
        self.may_start = ray.get(counter.start.remote())

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A part as the bytes of its file; or, in words of fastrel's and not of Ray's, why none can be made."""
        number = int(batch["task"][0])
        parquet, failed, hopeless = b"", 0, ""
        try:
            rows = self._rows(number)
            parquet = tables.encode(tables.table(rows, self.schema))
            failed = len({row.item for row in rows if row.error is not None})
        except Exception as error:
            hopeless = reason(error)
        return {"task": [number], "parquet": [parquet], "failed": [failed], "hopeless": [hopeless]}

    def _rows(self, number: int) -> list[Row]:
        if not self.may_start:
            raise FastrelError("they die again and again before anything is finished; is there memory for the model?")
        items = self.tasks[number].items
        size = self.explain.settings.batch_size
        return [row for at in range(0, len(items), size) for row in self._batch(f"{number}:{at}", items[at : at + size])]

    def _batch(self, key: str, items: Sequence[Any]) -> list[Row]:
        """The rows of a batch; one at whose first try an actor died is tried once more, item by item."""
        reader, kind = self.explain.loaded.reader, self.explain.loaded.kind
        before, killers = ray.get(self.counter.begin.remote(key))
        rows: list[Row] = []
        if before == 0:
            rows = self.explain.rows([decode(item, reader, kind) for item in items])
        for item in items if before else ():
            if item.name in killers:
                rows += self.explain.rows([Decoded(item.name, error=KILLS)])
                continue
            ray.get(self.counter.item.remote(key, item.name))
            rows += self.explain.rows([decode(item, reader, kind)])
            ray.get(self.counter.item.remote(key, None))
        ray.get(self.counter.end.remote(key))
        return rows


def _cause(error: BaseException) -> str:
    """What Ray's error began with."""
    while inner := getattr(error, "cause", None) or error.__cause__:
        error = inner
    return reason(error)
