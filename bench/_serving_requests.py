"""What kind of request costs what, for serving.py: batches, gRPC, bytes instead of floats.

As in `_serving_price.py` no worker sleeps, nothing straggles, and servers are asked in turn: a
round's ratio is of neighbours in time.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import numpy as np
import psutil
from _report import environment
from _serving_models import images, prepare
from _serving_price import HERE, PACKAGES, SYSTEMS, write_queries
from _serving_process import in_turn, load, nercc_serve, running_on

MODEL = "lenet5-digits"
ROWS = 16
_FLOATS = {"input_shape": "224,224,3"}
_BYTES = _FLOATS | {"input_datatype": "UINT8", "preprocess": "_serving_models:prepare"}
SERVED = ("uncoded", "coded (8, 4)")
LARGER = {f"{name}, calls of 32": dict(SYSTEMS[name] or {}, max_batch_size=32) for name in SERVED}
BARE_GRPC = "bare gRPC"  # the bare handler, by `grpc.aio`


class Cell(NamedTuple):
    """One kind of request: of which server, by which transport, how many clients and rows."""

    server: str
    transport: str
    clients: int
    rows: int = 1


class Running(NamedTuple):
    """A server that runs: its URLs by transport, its process, and the queries for it."""

    urls: dict[str, str]
    process: psutil.Process
    queries: Path


# By table: the cells, the first of which the others are compared with.
TABLES = {
    "batches": [Cell(name, "REST", 8, ROWS) for name in ("bare", *SERVED, *LARGER)],
    **{
        f"gRPC, {name}, {clients} clients": [
            *(Cell(name, kind, clients) for kind in ("REST", "gRPC")),
            Cell(BARE_GRPC, "gRPC", clients),
        ]
        for name in SERVED
        for clients in (8, 64)
    },
    **{
        f"bytes, {kind}": [Cell(name, kind, 8) for name in ("floats", "bytes")]
        for kind in ("REST", "gRPC")
    },
}


def measure_requests(seconds: float, rounds: int) -> dict[str, Any]:
    """Measure all tables: `seconds` for each of `rounds` turns of each cell."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        servers = {}
        for name in dict.fromkeys(cell.server for cells in TABLES.values() for cell in cells):
            servers[name] = stack.enter_context(_serve(name, Path(folder)))
        tables = {
            name: _table(name, cells, servers, seconds, rounds) for name, cells in TABLES.items()
        }
    return {
        "environment": environment(PACKAGES),
        "seconds": seconds,
        "rounds": rounds,
        "model": MODEL,
        "tables": tables,
    }


def _table(
    name: str, cells: list[Cell], servers: dict[str, Running], seconds: float, rounds: int
) -> list[dict[str, Any]]:
    """Return for each cell requests a second and both sides' CPU time a request, by round."""
    rows: list[dict[str, Any]] = [
        cell._asdict() | {"rates": [], "cpu_ms": [], "client_cpu_ms": [], "errors": 0}
        for cell in cells
    ]
    for seed in range(-1, rounds):  # the first is to warm up
        for cell, row in in_turn(list(zip(cells, rows, strict=True)), seed):
            urls, process, queries = servers[cell.server]
            url, before = urls[cell.transport], sum(process.cpu_times()[:2])
            found = load(queries, url, "closed", cell.clients, seconds, max(seed, 0), cell.rows)
            spent = sum(process.cpu_times()[:2]) - before
            answered = sum(each is not None for each in found["latency"])
            if seed >= 0:
                row["rates"].append(answered / seconds)
                row["cpu_ms"].append(1e3 * spent / max(answered, 1))
                row["client_cpu_ms"].append(1e3 * found["cpu_s"] / max(answered, 1))
                row["errors"] += len(found["latency"]) - answered
    first = np.array(rows[0]["rates"])
    for row in rows:
        ratio = np.array(row["rates"]) / first
        print(
            f"{name}: {row['server']} {row['transport']} {np.median(row['rates']):.0f}/s "
            f"({np.median(ratio):.2f}: {ratio.min():.2f} to {ratio.max():.2f}), "
            f"{np.median(row['cpu_ms']):.2f} ms of CPU, {np.median(row['client_cpu_ms']):.2f} of "
            f"the client's, errors {row['errors']}",
            flush=True,
        )
    return rows


@contextlib.contextmanager
def _serve(name: str, folder: Path) -> Iterator[Running]:
    """Run a server's process, with queries for it."""
    queries, served = folder / f"{name.partition(' ')[0]}.npz", MODEL
    if name in ("floats", "bytes"):
        served = "_serving_models:images"
        _write_images(queries, in_bytes=name == "bytes")
        command, summary = nercc_serve(served, _BYTES if name == "bytes" else _FLOATS)
    else:
        write_queries(MODEL, queries)
        settings = (SYSTEMS | LARGER).get(name)
        if settings is None:
            command, summary = [sys.executable, str(HERE / "_serving_bare.py"), MODEL], {}
            command += ["gRPC"] if name == BARE_GRPC else []
        else:
            command, summary = nercc_serve(served, settings)
    called = served.replace(":", ".")
    with running_on(command, summary) as ready:
        urls = {
            "REST": f"http://127.0.0.1:{ready.get('http_port')}/v2/models/{called}/infer",
            "gRPC": f"grpc://127.0.0.1:{ready.get('grpc_port')}/{called}",
        }
        yield Running(urls, psutil.Process(ready["pid"]), queries)


def _write_images(path: Path, in_bytes: bool) -> None:
    """Write images as bytes, or as the floats that they become."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (32, 224, 224, 3), np.uint8)
    floats = np.asarray(prepare(x))
    labels = np.asarray(eqx.filter_jit(images)(floats)).argmax(axis=1)
    np.savez(path, queries=x if in_bytes else floats, labels=labels)


if __name__ == "__main__":  # to look at while the server is worked on
    measure_requests(float(sys.argv[1]), int(sys.argv[2]))
