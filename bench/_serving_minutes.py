"""Ten minutes of an open loop, for serving.py: a server as a user starts it, each second judged.

`nercc serve` with workers that are threads, on MNIST's images that the model was not trained on,
and that come again after all others: what is picked within 1.1 calls a query, and hedging. `ASKED`
is what was asked of the first.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _report import environment
from _serving_price import PACKAGES
from _serving_process import load, nercc_serve, running, write_images

ASKED = {"p99_by_p50": 1.7, "worst_second_p99_s": 1.0}  # at most
WORKERS = {
    "workers": 16,
    "service_delay_s": 0.05,
    "straggler_rate": 0.05,
    "straggler_delay_s": 0.5,
}
RATE = 60.0  # queries a second
SYSTEMS = {
    "picked, 1.1 calls": {"scheme": "replication", "surrogate": "learn", "max_calls": 1.1},
    "hedged": {"scheme": "uncoded", "copies": 2},
}
MODEL = "lenet5-mnist"


def measure_minutes(seconds: float, warm: float, *, data_dir: Path | None = None) -> dict[str, Any]:
    """Measure each system for `seconds`, after `warm` seconds of the same. `data_dir` has MNIST."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        queries = Path(folder) / "queries.npz"
        number = write_images(queries, MODEL, data_dir=data_dir)
        for name, settings in SYSTEMS.items():
            with running(*nercc_serve(MODEL, WORKERS | settings)) as port:
                url = f"http://127.0.0.1:{port}/v2/models/{MODEL}/infer"
                load(queries, url, "open", RATE, warm, 99)
                done = load(queries, url, "open", RATE, seconds, 1)
            rows.append({"system": name} | _judged(done))
            print(rows[-1], flush=True)
    return {
        "environment": environment(PACKAGES),
        "model": MODEL,
        "images": number,
        "seconds": seconds,
        "rate": RATE,
        "workers": WORKERS,
        "asked": ASKED,
        "rows": rows,
    }


def _judged(done: dict[str, Any]) -> dict[str, Any]:
    """Return the latencies of a load, over all of it and in its worst second."""
    latency = np.array([np.inf if each is None else each for each in done["latency"]])
    second = np.array(done["due"]).astype(int)
    exact, same = np.array(done["exact"]), np.array(done["same"])
    p50, p99, p999 = np.quantile(latency, (0.5, 0.99, 0.999)).tolist()
    seconds = [float(np.quantile(latency[second == each], 0.99)) for each in np.unique(second)]
    return {
        "queries": len(latency),
        "errors": done["errors"],
        "p50_ms": 1e3 * p50,
        "p99_ms": 1e3 * p99,
        "p999_ms": 1e3 * p999,
        "p99_by_p50": p99 / p50,
        "worst_second_p99_s": max(seconds),
        "exact": float(exact.mean()),
        "right": float(same.mean()),
        "client_lateness_p99_ms": 1e3 * done["lateness_p99"],
    }
