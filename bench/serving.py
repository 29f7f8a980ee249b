"""Coded serving beside uncoded, hedged and replicated serving, and Ray Serve: latency, throughput.

    python bench/serving.py [--quick] [--price] [--requests] [--minutes]

Some 55 minutes. `--price`: only the cells without stragglers and sleep, and what checks of answers
cost, 30 minutes; `--requests`: only those of batches, gRPC and bytes, 4 minutes; `--minutes`: only
ten minutes of an open loop, for each of two systems.

One run: the same model (LeNet5 on scikit-learn's digits), the same number of workers, all of them
Ray actors, the same load from a second process, with and without stragglers. Every call takes
`SERVICE` seconds longer than the model does, during which the worker sleeps: two cores then stand
for many machines. What the server itself costs is measured without, by `_serving_price.py`. Writes
`results/serving.json`, `results/serving_price.json` and `results/serving_requests.json`, which
docs/serving.md shows, `results/serving_checks.json`, and with `--minutes`
`results/serving_minutes.json`.
"""

import argparse
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
from _report import block_bootstrap, environment, write_json
from _serving_checks import measure_checks
from _serving_minutes import measure_minutes
from _serving_price import measure_price
from _serving_process import load, nercc_serve, running, write_images
from _serving_requests import measure_requests

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MODEL = "lenet5-digits"
WORKERS = 16
SERVICE = 0.05  # seconds of every call
STRAGGLE = 10 * SERVICE  # what a straggling call takes longer
RATES = (0.0, 0.05, 0.15)  # shares of calls that straggle
LOAD = 60.0  # queries a second, open loop
CLIENTS = 96  # closed loop
BATCH = 8
PACKAGES = ("jax", "jaxlib", "numpy", "ray", "fastapi", "uvicorn", "aiohttp", "nercc-jax")


@dataclasses.dataclass(frozen=True)
class System:
    """A server: what it is called, what it costs in calls a query at most, how it is started."""

    name: str
    words: str
    redundancy: float
    settings: dict[str, Any] | None = None  # of `nercc serve`
    ray_batch: int = 0  # or of Ray Serve


SYSTEMS = (
    System(
        "uncoded",
        "`nercc serve --scheme uncoded` with `copies = 1`: each query, or batch of those that "
        "wait, at the worker that is free first",
        1.0,
        {"scheme": "uncoded", "copies": 1},
    ),
    System(
        "hedged",
        "the same; what is out for 1.5 times the running median is sent a second time",
        1.0,
        {"scheme": "uncoded", "copies": 2},
    ),
    System(
        "replication (2, 1)",
        "`--scheme replication`: two copies at once, if workers are free",
        2.0,
        {"scheme": "replication", "num_data": 1, "num_workers": 2},
    ),
    System(
        "coded (8, 4)",
        "`nercc serve` with its defaults: NeRCC, interleaved and tuned; a straggler's query is "
        "decoded if its label is expected to differ with at most 5 %, and sent again otherwise",
        2.0,
        {},
    ),
    System(
        "coded (6, 4)",
        "`--num-workers 6`, untuned, at most 20 % expected disagreement: a cheaper code",
        1.5,
        {"num_workers": 6, "max_disagreement": 0.2},
    ),
    System(
        "Ray Serve",
        f"a replica a worker, with `serve.batch`: what waits at a replica, up to {BATCH} queries",
        1.0,
        ray_batch=BATCH,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency and throughput of servers, side by side.")
    parser.add_argument("--quick", action="store_true", help="a few seconds each: does it run?")
    parser.add_argument("--price", action="store_true", help="only what the server itself costs")
    parser.add_argument("--requests", action="store_true", help="only batches, gRPC and bytes")
    parser.add_argument("--minutes", action="store_true", help="only ten minutes of an open loop")
    parser.add_argument("--seconds", type=float, default=25.0, help="of each open-loop cell")
    parser.add_argument("--only", nargs="*", help="some systems, to try")
    parser.add_argument(
        "--data-dir", type=Path, help="the folder of MNIST and CIFAR-10, else downloaded"
    )
    arguments = parser.parse_args()
    quick = "-quick" if arguments.quick else ""
    if arguments.minutes:
        seconds, warm = (10.0, 10.0) if quick else (600.0, 60.0)
        minutes = measure_minutes(seconds, warm, data_dir=arguments.data_dir)
        write_json(RESULTS / f"serving_minutes{quick}.json", minutes)
        return
    path, price = RESULTS / f"serving{quick}.json", RESULTS / f"serving_price{quick}.json"
    requests = RESULTS / f"serving_requests{quick}.json"
    write_json(requests, measure_requests(*((1.0, 1) if quick else (1.5, 7))))
    if not arguments.requests:
        write_json(price, measure_price(*((1.0, 1) if quick else (1.5, 3))))
        checks = RESULTS / f"serving_checks{quick}.json"
        seconds, rounds, warm = (1.0, 1, 5.0) if quick else (2.0, 7, 60.0)
        found = measure_checks(seconds, rounds, warm, data_dir=arguments.data_dir)
        write_json(checks, found)
    if not arguments.price and not arguments.requests:
        seconds = 4.0 if quick else arguments.seconds
        write_json(path, measure(seconds, arguments.only))


def measure(seconds: float, only: list[str] | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        queries = Path(folder) / "queries.npz"
        number = write_images(queries, MODEL)
        rows = []
        systems = [each for each in SYSTEMS if not only or each.name in only]
        for rate in RATES:
            for system in systems:
                rows.append(_cell(system, rate, queries, seconds))
                _tell(rows[-1])
    return {
        "environment": environment(PACKAGES),
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
            each.name: {"words": each.words, "redundancy": each.redundancy} for each in systems
        },
        "rows": rows,
    }


def _cell(system: System, rate: float, queries: Path, seconds: float) -> dict[str, Any]:
    """Measure one system under one law: an open loop for latency, and a closed one."""
    with _serve(system, rate) as port:
        url = f"http://127.0.0.1:{port}/v2/models/{MODEL}/infer"
        ask = functools.partial(load, queries, url)
        ask("open", LOAD, min(5.0, seconds), 99)  # warm: medians, estimates, connections
        before = _calls(system, port)
        result = ask("open", LOAD, seconds, 1)
        after = _calls(system, port)
        latency = np.array([np.inf if t is None else t for t in result["latency"]])
        exact, same = np.array(result["exact"]), np.array(result["same"])
        row = {
            "system": system.name,
            "straggler_rate": rate,
            "queries": len(latency),
            "errors": result["errors"],
            **{f"p{name}_ms": 1e3 * float(np.quantile(latency, share)) for name, share in _SHARES},
            "intervals_ms": _intervals(latency),
            "rel_acc": float(same.mean()),
            "approximate": float(1 - exact.mean()),
            "rel_acc_of_approximate": float(same[~exact].mean()) if (~exact).any() else None,
            "client_lateness_p99_ms": 1e3 * result["lateness_p99"],
            "calls_per_query": (after - before) / len(latency) if after else None,
        }
        if rate == 0:
            parts = [ask("closed", CLIENTS, max(seconds / 6, 2.0), seed) for seed in range(3)]
            answered = [sum(t is not None for t in part["latency"]) for part in parts]
            row["throughput"] = [count / max(seconds / 6, 2.0) for count in answered]
        return row


_SHARES = (("50", 0.5), ("99", 0.99), ("999", 0.999))


def _intervals(latency: np.ndarray) -> dict[str, list[float]]:
    """Return 95 % intervals by bootstrap over stretches of 100 queries."""
    shares = [share for _, share in _SHARES]
    _, low, high = block_bootstrap([latency], lambda t: 1e3 * np.quantile(t, shares), rounds=500)
    ends = zip(low.tolist(), high.tolist(), strict=True)
    return {f"p{name}": list(pair) for (name, _), pair in zip(_SHARES, ends, strict=True)}


# Programs are compiled once, not again by every worker of every server.
_CACHE = {
    "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "nercc-bench-cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


@contextlib.contextmanager
def _serve(system: System, rate: float) -> Iterator[int]:
    """Run a system's process, and give its port."""
    if system.settings is not None:
        settings = {
            "pool": "ray",
            "workers": WORKERS,
            "service_delay_s": SERVICE,
            "straggler_rate": rate,
            "straggler_delay_s": STRAGGLE,
            "max_batch_size": BATCH,
            **system.settings,
        }
        command, summary = nercc_serve(MODEL, settings)
    else:
        command, summary = [sys.executable, str(HERE / "_serving_ray.py"), "8765", str(WORKERS)], {}
        command += [str(system.ray_batch), str(SERVICE), str(rate), str(STRAGGLE)]
    with running(command, summary | _CACHE) as port:
        yield port
    time.sleep(2)  # Ray's processes end


def _calls(system: System, port: int) -> int:
    """Return the calls that workers got so far; 0 where the server does not say."""
    if system.settings is None:
        return 0
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    count = [line for line in lines if line.startswith("nercc_batch_size_count")]
    return int(float(count[0].split()[-1]))


def _tell(row: dict[str, Any]) -> None:
    throughput = row.get("throughput")
    print(
        f"{100 * row['straggler_rate']:3.0f} % {row['system']:24} "
        f"p50 {row['p50_ms']:6.0f}  p99 {row['p99_ms']:6.0f}  p99.9 {row['p999_ms']:6.0f} ms  "
        f"RelAcc {100 * row['rel_acc']:6.2f} %  approximate {100 * row['approximate']:4.1f} %  "
        f"calls {row['calls_per_query'] or float('nan'):4.2f}  errors {row['errors']}"
        + (f"  throughput {np.median(throughput):.0f}/s" if throughput else ""),
        flush=True,
    )


if __name__ == "__main__":
    main()
