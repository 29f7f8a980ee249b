"""Ray: a node of a cluster is killed, another one frozen.

`cluster`: single images come as a stream, latency counted from the scheduled arrival; a row is a
stretch of it. A head that does no work and three nodes are raylets of this machine, an address
each, and `nercc serve` runs LeNet5 behind a code on workers of theirs: undisturbed, from the moment
in which all processes of a node are killed (SIGKILL), after that, from the moment in which all of
another one's stop (SIGSTOP), and when they go on. The result is put beside others in the file, by
label.

"""

import asyncio
import contextlib
import signal
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
from load import Rest
from ray.cluster_utils import Cluster
from report import Report, environment, show
from servers import nercc_serve, running, url_of

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
