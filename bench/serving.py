"""Coded serving beside uncoded, hedged and replicated serving, and Ray Serve: latency, throughput.

`serving`, 20 minutes: the same model (LeNet5 on scikit-learn's digits), the same number of workers,
all of them Ray actors, the same load from a second process, with and without stragglers. Every call
takes `SERVICE` seconds longer than the model does, during which the worker sleeps: two cores then
stand for many machines. What the server itself costs is measured without (`serving_price`).

`serving_minutes`: ten minutes of an open loop, a server as a user starts it, each second judged.
`nercc serve` with workers that are threads, on MNIST's images that the model was not trained on,
and that come again after all others: what is picked within 1.1 calls a query, and hedging. `ASKED`
is what was asked of the first.
"""

import contextlib
import dataclasses
import functools
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import block_bootstrap
from report import Report, environment, show
from servers import HERE, PACKAGES, answered, load, nercc_serve, running, url_of, write_images

MODEL = "lenet5-digits"
WORKERS = 16
SERVICE = 0.05  # seconds of every call
STRAGGLE = 10 * SERVICE  # what a straggling call takes longer
RATES = (0.0, 0.05, 0.15)  # shares of calls that straggle
LOAD = 60.0  # queries a second, open loop
CLIENTS = 96  # closed loop
BATCH = 8
SHARES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}


@dataclasses.dataclass(frozen=True)
class System:
    """A server: words, what it costs in calls a query at most, and settings of `nercc serve`.

    Without settings it is Ray Serve.
    """

    words: str
    redundancy: float
    settings: dict[str, Any] | None = None


SYSTEMS = {
    "uncoded": System(
        "`nercc serve --scheme uncoded` with `copies = 1`: each query, or batch of those that "
        "wait, at the worker that is free first",
        1.0,
        {"scheme": "uncoded", "copies": 1},
    ),
    "hedged": System(
        "the same; what is out for 1.5 times the running median is sent a second time",
        1.0,
        {"scheme": "uncoded", "copies": 2},
    ),
    "replication (2, 1)": System(
        "`--scheme replication`: two copies at once, if workers are free",
        2.0,
        {"scheme": "replication", "num_data": 1, "num_workers": 2},
    ),
    "coded (8, 4)": System(
        "`nercc serve` with its defaults: NeRCC, interleaved and tuned; a straggler's query is "
        "decoded if its label is expected to differ with at most 5 %, and sent again otherwise",
        2.0,
        {},
    ),
    "coded (6, 4)": System(
        "`--num-workers 6`, untuned, at most 20 % expected disagreement: a cheaper code",
        1.5,
        {"num_workers": 6, "max_disagreement": 0.2},
    ),
    "Ray Serve": System(
        f"a replica a worker, with `serve.batch`: what waits at a replica, up to {BATCH} queries",
        1.0,
    ),
}


def run(report: Report, seconds: float = 25.0, only: tuple[str, ...] = (*SYSTEMS,)) -> None:
    """Measure latency by an open loop, and throughput by a closed one.

    Options:
        seconds: Of each open-loop cell.
        only: Systems.
    """
    rates = RATES
    if report.quick:
        seconds, rates, only = 2.0, RATES[1:2], ("hedged", "Ray Serve") if len(only) > 2 else only
    with tempfile.TemporaryDirectory() as folder:
        queries, rows = Path(folder) / "queries.npz", []
        number = write_images(queries, MODEL)
        for rate, name in ((rate, name) for rate in rates for name in only):
            rows.append(cell(name, rate, queries, seconds))
            report.log(rows[-1])
    report.write(
        {
            "environment": environment("ray", *PACKAGES),
            "model": MODEL,
            "queries": number,
            "workers": WORKERS,
            "service_s": SERVICE,
            "straggle_s": STRAGGLE,
            "load": LOAD,
            "clients": CLIENTS,
            "batch": BATCH,
            "seconds": seconds,
            "systems": {
                name: {"words": SYSTEMS[name].words, "redundancy": SYSTEMS[name].redundancy}
                for name in only
            },
            "rows": rows,
        }
    )
    columns = ("straggler_rate", "system", "p50_ms", "p99_ms", "p999_ms", "rel_acc", "errors")
    show({key: row[key] for key in columns} for row in rows)


def cell(name: str, rate: float, queries: Path, seconds: float) -> dict[str, Any]:
    """Measure one system under one law: an open loop for latency, and a closed one."""
    with serve(SYSTEMS[name], rate) as port:
        ask = functools.partial(load, queries, url_of({"http_port": port}, MODEL))
        ask("open", LOAD, min(5.0, seconds), 99)  # warm: medians, estimates, connections
        calls = None if SYSTEMS[name].settings is None else calls_of(port)
        found = ask("open", LOAD, seconds, 1)
        calls = None if calls is None else calls_of(port) - calls
        latency = np.array([np.inf if t is None else t for t in found["latency"]])
        exact, same = np.array(found["exact"]), np.array(found["same"])
        quantiles, low, high = block_bootstrap(
            latency, lambda t: 1e3 * np.quantile(t, [*SHARES.values()]), rounds=500
        )
        ends = zip(low.tolist(), high.tolist(), strict=True)
        row = {
            "system": name,
            "straggler_rate": rate,
            "queries": len(latency),
            "errors": found["errors"],
            **{f"{q}_ms": each for q, each in zip(SHARES, quantiles.tolist(), strict=True)},
            "intervals_ms": {q: list(pair) for q, pair in zip(SHARES, ends, strict=True)},
            "rel_acc": float(same.mean()),
            "approximate": float(1 - exact.mean()),
            "rel_acc_of_approximate": float(same[~exact].mean()) if (~exact).any() else None,
            "client_lateness_p99_ms": 1e3 * found["lateness_p99"],
            "calls_per_query": calls / len(latency) if calls else None,
        }
        if rate == 0:
            part = max(seconds / 6, 2.0)
            closed = [ask("closed", CLIENTS, part, seed) for seed in range(3)]
            row["throughput"] = [len(answered(each)) / part for each in closed]
        return row


@contextlib.contextmanager
def serve(system: System, rate: float) -> Iterator[int]:
    """Run a system's process, and give its port."""
    settings = {
        "pool": "ray",
        "workers": WORKERS,
        "faults": {
            "service_delay_s": SERVICE,
            "straggler_rate": rate,
            "straggler_delay_s": STRAGGLE,
        },
        "max_batch_size": BATCH,
    }
    command, variables = nercc_serve(MODEL, settings | (system.settings or {}))
    if system.settings is None:
        numbers = (8765, WORKERS, BATCH, SERVICE, rate, STRAGGLE)
        command = [sys.executable, str(HERE / "served.py"), "ray", *map(str, numbers)]
        variables = {}
    # Programs are compiled once, not again by every worker of every server.
    cache = str(Path(tempfile.gettempdir()) / "nercc-bench-cache")
    variables |= {"JAX_COMPILATION_CACHE_DIR": cache}
    variables |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with running(command, variables) as ports:
        yield ports["http_port"]
    time.sleep(2)  # Ray's processes end


def calls_of(port: int) -> int:
    """Return the calls that workers got so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    count = [line for line in lines if line.startswith("nercc_batch_size_count")]
    return int(float(count[0].split()[-1]))


# --- ten minutes

ASKED = {"p99_by_p50": 1.7, "worst_second_p99_s": 1.0}  # at most
MINUTES = {
    "workers": 16,
    "faults": {"service_delay_s": 0.05, "straggler_rate": 0.05, "straggler_delay_s": 0.5},
}
MINUTE_SYSTEMS = {
    "picked, 1.1 calls": {"scheme": "replication", "surrogate": "learn", "max_calls": 1.1},
    "hedged": {"scheme": "uncoded", "copies": 2},
}


def minutes(report: Report) -> None:
    """Measure each system for ten minutes, after a minute of the same."""
    seconds, warm, model, rows = 600.0, 60.0, "lenet5-mnist", []
    if report.quick:
        seconds, warm = 5.0, 5.0
    with tempfile.TemporaryDirectory() as folder:
        queries = Path(folder) / "queries.npz"
        number = write_images(queries, model, data_dir=report.data_dir)
        for name, settings in MINUTE_SYSTEMS.items():
            with running(*nercc_serve(model, MINUTES | settings)) as ports:
                load(queries, url_of(ports, model), "open", LOAD, warm, 99)
                done = load(queries, url_of(ports, model), "open", LOAD, seconds, 1)
            latency = np.array([np.inf if each is None else each for each in done["latency"]])
            second = np.array(done["due"]).astype(int)
            p50, p99, p999 = np.quantile(latency, [*SHARES.values()]).tolist()
            worst = max(np.quantile(latency[second == each], 0.99) for each in np.unique(second))
            rows.append(
                {
                    "system": name,
                    "queries": len(latency),
                    "errors": done["errors"],
                    "p50_ms": 1e3 * p50,
                    "p99_ms": 1e3 * p99,
                    "p999_ms": 1e3 * p999,
                    "p99_by_p50": p99 / p50,
                    "worst_second_p99_s": float(worst),
                    "exact": float(np.mean(done["exact"])),
                    "right": float(np.mean(done["same"])),
                    "client_lateness_p99_ms": 1e3 * done["lateness_p99"],
                }
            )
    about = {"model": model, "images": number, "seconds": seconds, "rate": LOAD}
    about |= {"workers": MINUTES, "asked": ASKED, "rows": rows}
    report.write({"environment": environment(*PACKAGES)} | about)
    show(rows)
