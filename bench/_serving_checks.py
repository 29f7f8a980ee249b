"""The cost of checking answers, for serving.py: a server without, beside the same with checks.

As in `_serving_price.py` no worker sleeps, nothing straggles, and servers are asked in turn. They
serve a fast model, LeNet5 on scikit-learn's digits, and RepVGG on CIFAR-10, and have learned before
from as many of these images as they keep. Beside requests a second and latencies stands the time of
all CPU cores that a server took for a request, which depends little on what else the machine does.
"""

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _report import environment
from _serving_load import PERIOD
from _serving_price import PACED, PACKAGES
from _serving_process import cpu_seconds, in_turn, load, nercc_serve, running_on, write_images

_UNCODED = {"scheme": "uncoded", "copies": 1}
_CHECKS = {"check_answers": 0.01}
SYSTEMS = {
    "uncoded": _UNCODED,
    "learner": _UNCODED | {"surrogate": "learn"},
    "learner, checks": _UNCODED | {"surrogate": "learn"} | _CHECKS,
    "student": _UNCODED | {"surrogate": "student"},
    "student, checks": _UNCODED | {"surrogate": "student"} | _CHECKS,
}
# A learner of the pixels knows little about what RepVGG says.
MODELS = {
    "lenet5-digits": tuple(SYSTEMS),
    "repvgg-cifar10": ("uncoded", "student", "student, checks"),
}
IMAGES = 2000  # at most, of each split that is asked about
CLIENTS = (1, 8)  # closed loops
LOADS = (*(("closed", clients) for clients in CLIENTS), ("paced", PACED))


def measure_checks(
    seconds: float, rounds: int, warm: float = 60.0, *, data_dir: Path | None = None
) -> dict[str, Any]:
    """Measure each load: `seconds` for each of `rounds` turns of each server.

    Before that each server is asked for `warm` seconds. `data_dir` has CIFAR-10.
    """
    return {
        "environment": environment(PACKAGES),
        "seconds": seconds,
        "rounds": rounds,
        "paced": {"clients": PACED, "period_s": PERIOD},
        "rows": [row for model in MODELS for row in _loads(model, seconds, rounds, warm, data_dir)],
    }


def _loads(
    model: str, seconds: float, rounds: int, warm: float, data_dir: Path | None
) -> list[dict[str, Any]]:
    """Return what each load of a model's servers came to, in each turn."""
    names = MODELS[model]
    rows: list[dict[str, Any]] = [
        {"model": model, "loop": loop, "clients": clients, "servers": {each: [] for each in names}}
        for loop, clients in LOADS
    ]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        queries = Path(folder) / "queries.npz"
        splits = ("train", "test") if model == "lenet5-digits" else ("test",)
        write_images(queries, model, splits, limit=IMAGES, data_dir=data_dir)
        servers: dict[str, tuple[str, int]] = {}
        for name in names:
            server = stack.enter_context(running_on(*nercc_serve(model, SYSTEMS[name])))
            url = f"http://127.0.0.1:{server['http_port']}/v2/models/{model}/infer"
            servers[name] = url, server["pid"]
            load(queries, url, "closed", 8, warm, 99)
        for turn in range(rounds):
            for row in rows:
                for name in in_turn(names, turn):
                    found = _asked(queries, *servers[name], row, seconds, turn)
                    row["servers"][name].append(found)
    for row in rows:
        _tell(row)
    return rows


def _asked(
    queries: Path, url: str, process: int, row: dict[str, Any], seconds: float, seed: int
) -> dict[str, float]:
    """Return what one load of a server came to."""
    before = cpu_seconds(process)
    done = load(queries, url, row["loop"], row["clients"], seconds, seed)
    spent = cpu_seconds(process) - before
    answered = [each for each in done["latency"] if each is not None]
    return {
        "requests": len(answered),
        "errors": len(done["latency"]) - len(answered),
        "per_second": len(answered) / seconds,
        "p50_ms": 1e3 * float(np.median(answered)),
        "cpu_ms": 1e3 * spent / max(len(answered), 1),
    }


def _tell(row: dict[str, Any]) -> None:
    servers = row["servers"]
    for name in servers:
        base = "uncoded" if "," not in name else name.partition(",")[0]
        text = f"{row['model']} {row['loop']} {row['clients']} {name:16}"
        for what in ("per_second", "p50_ms", "cpu_ms"):
            own, other, first = (
                np.array([each[what] for each in servers[key]]) for key in (name, base, "uncoded")
            )
            text += f" {what} {np.median(own):.4g} ({np.median(own / other):.3f} of {base},"
            text += f" {np.median(own / first):.3f} of uncoded)"
        print(text, flush=True)


if __name__ == "__main__":  # to look at while the server is worked on
    measure_checks(float(sys.argv[1]), int(sys.argv[2]), data_dir=Path(sys.argv[3]))
