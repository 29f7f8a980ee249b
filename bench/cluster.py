"""Ray: a node of a cluster is killed, and what a call of a pool costs.

`cluster`: single images come as a stream, latency counted from the scheduled arrival; a row is a
stretch of it. A head that does no work and three nodes are raylets of this machine, an address
each, and `nercc serve` runs LeNet5 behind a code on workers of theirs: undisturbed, from the moment
in which all processes of a node are killed (SIGKILL), after that, from the moment in which all of
another one's stop (SIGSTOP), and when they go on. The result is put beside others in the file, by
label.

`ray_calls`: a `RayPool`'s calls against Ray's own futures of as many actors with the same function,
turn by turn in one process, with small inputs and large images. All answers of a batch are waited
for, so that both do the same calls.
"""

import asyncio
import contextlib
import functools
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import ray
from load import Rest
from ray.cluster_utils import Cluster
from report import Report, environment, show
from servers import nercc_serve, running, url_of

from nercc_jax import RayPool

MODEL = "lenet5-digits"
TIMEOUT = 30.0  # of a client


async def _stretch(url: str, seconds: float, rate: float, timeout: float) -> list[Any]:
    """Send a query at each tick; return (latency in s, error, whether it is exact) of each."""
    x = np.random.default_rng(0).uniform(size=(1, 32, 32, 1)).astype(np.float32)
    seen, tasks = [], []
    async with Rest(url, timeout) as server:

        async def ask(due: float) -> None:
            error, _, exact = await server.ask(server.pack(x))
            seen.append((time.monotonic() - due, error, exact))

        start = time.monotonic()
        for number in range(int(seconds * rate)):
            due = start + number / rate
            await asyncio.sleep(max(due - time.monotonic(), 0.0))
            tasks.append(asyncio.create_task(ask(due)))
        await asyncio.gather(*tasks)
    return seen


def stretch(
    name: str, url: str, seconds: float, rate: float, timeout: float = TIMEOUT, **about: Any
) -> dict[str, Any]:
    """Return the row of a stretch."""
    seen = asyncio.run(_stretch(url, seconds, rate, timeout))
    times = np.array([1e3 * latency for latency, error, _ in seen if error is None])
    row = {
        "stretch": name,
        **about,
        "queries": len(seen),
        "errors": len(seen) - len(times),
        "p50_ms": round(float(np.median(times)), 1),
        "p99_ms": round(float(np.quantile(times, 0.99)), 1),
        "max_ms": round(float(times.max()), 1),
        "exact": round(sum(exact for *_, exact in seen) / len(seen), 4),
    }
    show([row])
    return row


@contextlib.contextmanager
def cluster_of(nodes: int) -> Iterator[tuple[Any, list[Any]]]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    found = [
        cluster.add_node(num_cpus=8, node_ip_address=f"127.0.0.{number + 2}")
        for number in range(nodes)
    ]
    try:
        yield cluster, found
    finally:
        cluster.shutdown()


def processes_of(node: Any) -> list[psutil.Process]:
    """Return the raylet of a node, and all that it started."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [raylet, *raylet.children(recursive=True)]


def workers_by_node(nodes: list[Any]) -> list[int]:
    """Return for each node how many of its processes are workers of a pool."""
    named = [[" ".join(each.cmdline()) for each in processes_of(node)] for node in nodes]
    return [
        sum(name.startswith(("ray::Actor", "ray::_Actor")) for name in names) for names in named
    ]


def run(report: Report, label: str = "first", seconds: float = 15.0, rate: float = 20.0) -> None:
    """Run a stretch while all is well, while a node is dead, and while one is frozen.

    Options:
        label: Of the rows, in the file.
        seconds: Of a stretch.
        rate: Queries a second.
    """
    warnings.simplefilter("ignore")  # of fork, which Ray follows by exec
    seconds, rows = 3.0 if report.quick else seconds, []
    command, variables = nercc_serve(MODEL, {})
    command += ["--pool", "ray", "--drain-timeout-s", "1"]
    with (
        cluster_of(3) as (cluster, nodes),
        running(command, variables | {"RAY_ADDRESS": cluster.address}) as ports,
    ):
        url = url_of(ports, MODEL)

        def now(name: str) -> None:
            placed = workers_by_node([cluster.head_node, *nodes])
            rows.append(stretch(name, url, seconds, rate, workers_by_node=placed))

        def strike(node: Any, what: signal.Signals) -> None:
            for process in processes_of(node):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(what)

        def fullest() -> Any:
            """Return the node with the most workers: the worst that can happen."""
            return nodes[int(np.argmax(workers_by_node(nodes)))]

        stretch("to learn how long answers take", url, min(seconds, 5.0), rate)
        now("undisturbed")
        first = fullest()
        strike(first, signal.SIGKILL)
        nodes.remove(first)
        now("a node is killed")
        now("after that")
        second = fullest()
        strike(second, signal.SIGSTOP)
        now("a node is frozen")
        strike(second, signal.SIGCONT)
        now("it goes on")
    about = {"rate": rate, "seconds": seconds, "environment": environment("ray", "nercc-jax")}
    report.write(report.read() | {label: about | {"rows": rows}})


# --- a pool's calls


def answer(batch: Any) -> Any:
    """Next to no work, and a small answer."""
    return batch.reshape(len(batch), -1)[:, :8] * 2.0


def seconds_of(function: Callable[[], Any], seconds: float) -> list[float]:
    """Return the seconds of each call, for this long."""
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        function()
        found.append(time.perf_counter() - begin)
    return found


def calls(report: Report, workers: int = 20, seconds: float = 3.0, rounds: int = 3) -> None:
    """Time a pool's calls and Ray's own futures.

    Options:
        workers: Actors of each.
        seconds: Of a measurement.
        rounds: Turns of both.
    """
    warnings.simplefilter("ignore")
    if report.quick:
        workers, seconds, rounds = 2, 0.5, 1
    rows: list[dict[str, Any]] = []
    with RayPool(answer, workers, compiled=False, address="local") as pool:

        @ray.remote(num_cpus=0)
        class Actor:
            def run(self, batch: np.ndarray) -> np.ndarray:
                return answer(batch)

        actors: list[Any] = [Actor.remote() for _ in range(workers)]

        def bare(points: np.ndarray) -> None:
            """Call actors as Ray's users do: arguments as they are, answers by futures."""
            pairs = zip(actors, points, strict=True)
            futures = [actor.run.remote(x).future() for actor, x in pairs]
            np.stack([future.result() for future in futures])

        def pooled(points: np.ndarray) -> None:
            with pool.dispatch(points) as batch:
                batch.wait()

        for name, shape in {"small": (8,), "image": (224, 224, 3)}.items():
            points = np.random.default_rng(0).normal(size=(workers, 1, *shape))
            points, times = points.astype(np.float32), {}
            for turn in range(rounds + 1):  # the first is to warm up
                for way in (bare, pooled):
                    found = seconds_of(functools.partial(way, points), seconds)
                    times.setdefault(way.__name__, []).extend(found if turn else [])
            each = {way: 1e6 * statistics.median(of) / workers for way, of in times.items()}
            rate = {way: workers * len(of) / sum(of) for way, of in times.items()}
            rows.append(
                {
                    "inputs": name,
                    "futures_us": each["bare"],
                    "pool_us": each["pooled"],
                    "own_us": each["pooled"] - each["bare"],
                    "futures_calls_per_s": rate["bare"],
                    "pool_calls_per_s": rate["pooled"],
                }
            )
    show(rows)
    report.write({"workers": workers, "environment": environment("ray"), "rows": rows})
