"""A server on eight worker processes, of which one stops answering without dying (SIGSTOP).

    python bench/stuck.py [--seconds 30]

`nercc serve --pool ray` with the model on digits, a call of 50 ms, uncoded, hedged: nobody restarts
anything, and the worker's process, its node and Ray say that it is alive. A closed loop tells the
throughput, clients that ask at a pace of their own the tail; each before, from the moment in which
the worker stops, and after it goes on. Writes results/stuck.json.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from _report import environment, write_json
from _serving_price import write_queries
from _serving_process import load, nercc_serve, running

RESULTS = Path(__file__).parent / "results" / "stuck.json"
PACKAGES = ("jax", "numpy", "ray", "nercc-jax")
MODEL, WORKERS, CALL = "lenet5-digits", 8, 0.05
SETTINGS = {
    "scheme": "uncoded",
    "pool": "ray",
    "workers": WORKERS,
    "worker_cpus": 0.1,
    "service_delay_s": CALL,
    "max_batch_size": 1,
}
BUSY = 2 * WORKERS  # clients of the closed loop: always as many wait as are served
PACED = WORKERS // 2  # clients that ask every 100 ms: a quarter of what the workers can do


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="of a stretch")
    seconds = parser.parse_args().seconds
    command, summary = nercc_serve(MODEL, SETTINGS)
    summary["NERCC_ADDRESS"] = "local"
    with tempfile.TemporaryDirectory() as folder, running(command, summary) as port:
        queries = Path(folder) / "queries.npz"
        write_queries(MODEL, queries)
        url = f"http://127.0.0.1:{port}/v2/models/{MODEL}/infer"
        load(queries, url, "closed", BUSY, 5.0, 99)  # it learns how long answers take
        rows = [_stretch("all answer", queries, url, seconds)]
        stuck = _worker()
        for what, name in ((signal.SIGSTOP, "one is stuck"), (signal.SIGCONT, "it goes on")):
            stuck.send_signal(what)
            rows.append(_stretch(name, queries, url, seconds))
    about = {"settings": SETTINGS, "clients": {"closed": BUSY, "paced": PACED}, "seconds": seconds}
    write_json(RESULTS, about | {"environment": environment(PACKAGES), "rows": rows})


def _worker() -> psutil.Process:
    """Return one of the pool's processes."""
    below = psutil.Process().children(recursive=True)
    actors = ("ray::Actor", "ray::_Actor")
    found = [each for each in below if " ".join(each.cmdline()).startswith(actors)]
    if len(found) != WORKERS:
        sys.exit(f"bench/stuck.py: {len(found)} workers' processes, not {WORKERS}")
    return found[0]


def _stretch(name: str, queries: Path, url: str, seconds: float) -> dict[str, Any]:
    """Start the paced clients first, so that they are there when something happens."""
    row: dict[str, Any] = {"stretch": name}
    for loop, clients in (("paced", PACED), ("closed", BUSY)):
        result = load(queries, url, loop, clients, seconds, 0)
        answered = np.array([each for each in result["latency"] if each is not None])
        row[loop] = {
            "queries": len(result["latency"]),
            "errors": len(result["latency"]) - len(answered),
            "a_second": round(len(answered) / seconds, 1),
            "p50_ms": round(1e3 * float(np.quantile(answered, 0.5)), 1),
            "p99_ms": round(1e3 * float(np.quantile(answered, 0.99)), 1),
            "max_ms": round(1e3 * float(answered.max()), 1),
        }
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
