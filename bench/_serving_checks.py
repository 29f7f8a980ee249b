"""The cost of checking answers, for serving.py: a server without, beside the same with checks.

As in `_serving_price.py` no worker sleeps, nothing straggles, and servers are asked in turn. They
serve a fast model, LeNet5 on scikit-learn's digits, and have learned before from as many of these
as they keep. Beside requests a second and latencies stands the time of all CPU cores that a server
took for a request, which depends little on what else the machine does.
"""

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from _report import environment
from _serving_load import PERIOD
from _serving_price import PACED, PACKAGES
from _serving_process import cpu_seconds, load, nercc_serve, running_on

from nercc_models import load_data, load_model

MODEL = "lenet5-digits"
_UNCODED = {"scheme": "uncoded", "copies": 1}
_CHECKS = {"check_answers": 0.01}
SYSTEMS = {
    "uncoded": _UNCODED,
    "learner": _UNCODED | {"surrogate": "learn"},
    "learner, checks": _UNCODED | {"surrogate": "learn"} | _CHECKS,
    "student": _UNCODED | {"surrogate": "student"},
    "student, checks": _UNCODED | {"surrogate": "student"} | _CHECKS,
}
CLIENTS = (1, 8)  # closed loops
LOADS = (*(("closed", clients) for clients in CLIENTS), ("paced", PACED))


def measure_checks(seconds: float, rounds: int, warm: float = 60.0) -> dict[str, Any]:
    """Measure each load: `seconds` for each of `rounds` turns of each server.

    Before that each server is asked for `warm` seconds.
    """
    rows: list[dict[str, Any]] = [
        {
            "model": MODEL,
            "loop": loop,
            "clients": clients,
            "servers": {each: [] for each in SYSTEMS},
        }
        for loop, clients in LOADS
    ]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        queries = Path(folder) / "queries.npz"
        _write_queries(queries)
        servers = {}
        for name, settings in SYSTEMS.items():
            servers[name] = stack.enter_context(running_on(*nercc_serve(MODEL, settings)))
            load(queries, _url(servers[name]), "closed", 8, warm, 99)
        for turn in range(rounds):
            for row in rows:
                names = list(SYSTEMS)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    found = _asked(queries, servers[name], row, seconds, turn)
                    row["servers"][name].append(found)
    for row in rows:
        _tell(row)
    return {
        "environment": environment(PACKAGES),
        "seconds": seconds,
        "rounds": rounds,
        "paced": {"clients": PACED, "period_s": PERIOD},
        "rows": rows,
    }


def _asked(
    queries: Path, server: dict[str, Any], row: dict[str, Any], seconds: float, seed: int
) -> dict[str, float]:
    """Return what one load of a server came to."""
    before = cpu_seconds(server["pid"])
    done = load(queries, _url(server), row["loop"], row["clients"], seconds, seed)
    spent = cpu_seconds(server["pid"]) - before
    answered = [each for each in done["latency"] if each is not None]
    return {
        "requests": len(answered),
        "errors": len(done["latency"]) - len(answered),
        "per_second": len(answered) / seconds,
        "p50_ms": 1e3 * float(np.median(answered)),
        "cpu_ms": 1e3 * spent / max(len(answered), 1),
    }


def _url(server: dict[str, Any]) -> str:
    return f"http://127.0.0.1:{server['http_port']}/v2/models/{MODEL}/infer"


def _write_queries(path: Path) -> None:
    network = load_model(MODEL)
    parts = [load_data(network.data, part).images for part in ("train", "test")]
    x = np.asarray(network.preprocess(np.concatenate(parts)), np.float32)
    np.savez(path, queries=x, labels=np.asarray(network(jnp.asarray(x))).argmax(1))


def _tell(row: dict[str, Any]) -> None:
    servers = row["servers"]
    for name in servers:
        base = "uncoded" if "," not in name else name.partition(",")[0]
        text = f"{row['loop']} {row['clients']} {name:16}"
        for what in ("per_second", "p50_ms", "cpu_ms"):
            own, other, first = (
                np.array([each[what] for each in servers[key]]) for key in (name, base, "uncoded")
            )
            text += f" {what} {np.median(own):.4g} ({np.median(own / other):.3f} of {base},"
            text += f" {np.median(own / first):.3f} of uncoded)"
        print(text, flush=True)


if __name__ == "__main__":  # to look at while the server is worked on
    measure_checks(float(sys.argv[1]), int(sys.argv[2]), *map(float, sys.argv[3:]))
