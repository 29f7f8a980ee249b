"""The cost of the server where nothing straggles and no worker sleeps, for serving.py.

The bare handler of `_serving_bare.py`, uncoded and coded servers stand side by side, with workers
that are threads of their processes, and are asked in turn: so what else the machine does meets all
of them alike, and a round's ratio is of neighbours in time.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np
from _report import environment
from _serving_load import PERIOD
from _serving_process import in_turn, load, nercc_serve, running

HERE = Path(__file__).parent
MODELS = ("lenet5-digits", "wide", "images")
_UNCODED = {"scheme": "uncoded", "copies": 1}
# By name: settings of `nercc serve`, None for the bare handler; and words.
SYSTEMS = {"bare": None, "uncoded": _UNCODED | {"workers": os.cpu_count()},
           "uncoded, 8 workers": _UNCODED, "coded (8, 4)": {}}  # fmt: skip
WORDS = {
    "bare": "what an engineer writes first: a FastAPI handler around the jitted model, no queue, "
    "no batches, no limits, no metrics (`bench/_serving_bare.py`)",
    "uncoded": "`nercc serve --scheme uncoded --workers 2`, `copies = 1`: a worker a core",
    "uncoded, 8 workers": "the same with as many workers as the code's",
    "coded (8, 4)": "`nercc serve` with its defaults",
}
CLIENTS = (1, 8)  # closed loops
PACED = 8  # clients that ask at a pace
PACKAGES = ("jax", "jaxlib", "numpy", "fastapi", "uvicorn", "grpcio", "aiohttp", "nercc-jax")


def model_of(name: str) -> tuple[Any, tuple[int, ...]]:
    """Return a model on a batch, and one query's shape."""
    import _serving_models

    from nercc_models import load_model

    if name in _serving_models.SHAPES:
        return getattr(_serving_models, name), _serving_models.SHAPES[name]
    network = load_model(name)
    return network, network.input_shape


def measure_price(seconds: float, rounds: int) -> dict[str, Any]:
    """Measure each model's cells: `seconds` for each of `rounds` turns of each system.

    Tails get twice as many turns, twice as long: of few queries p99 is one stall, or none.
    """
    rows = []
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            queries = Path(folder) / "queries.npz"
            write_queries(model, queries)
            urls = {name: stack.enter_context(_serve(model, name)) for name in SYSTEMS}
            for url in urls.values():
                for clients in (1, 8):
                    load(queries, url, "closed", clients, 2.0, 99)
                load(queries, url, "paced", PACED, 2.0, 99)
            rows += [_throughput(model, queries, urls, n, seconds, rounds) for n in CLIENTS]
            rows.append(_tail(model, queries, urls, 2 * seconds, 2 * rounds))
    return {
        "environment": environment(PACKAGES),
        "systems": WORDS,
        "seconds": seconds,
        "rounds": rounds,
        "paced": {"clients": PACED, "period_s": PERIOD},
        "rows": rows,
    }


def _throughput(
    model: str, queries: Path, urls: dict[str, str], clients: int, seconds: float, rounds: int
) -> dict[str, Any]:
    """Return requests a second of a closed loop, a number for each round."""
    rates: dict[str, list[float]] = {name: [] for name in urls}
    errors = 0
    for seed in range(rounds):
        for name in in_turn(list(urls), seed):
            result = load(queries, urls[name], "closed", clients, seconds, seed)
            answered = sum(each is not None for each in result["latency"])
            errors += len(result["latency"]) - answered
            rates[name].append(answered / seconds)
    row = {"model": model, "loop": "closed", "clients": clients, "errors": errors, "rates": rates}
    _tell(row, {name: np.divide(rates[name], rates["bare"]) for name in rates}, rates, "/s")
    return row


def _tail(
    model: str, queries: Path, urls: dict[str, str], seconds: float, rounds: int
) -> dict[str, Any]:
    """Return p50 and p99 of paced clients, over all rounds and in each."""
    rounds_of: dict[str, list[list[float]]] = {name: [] for name in urls}
    errors, exact = 0, {name: [] for name in urls}
    for seed in range(rounds):
        for name in in_turn(list(urls), seed):
            result = load(queries, urls[name], "paced", PACED, seconds, seed)
            answered = [each for each in result["latency"] if each is not None]
            errors += len(result["latency"]) - len(answered)
            rounds_of[name].append(answered)
            exact[name] += result["exact"]
    p99 = {name: [_ms(each, 0.99) for each in summary] for name, summary in rounds_of.items()}
    row = {
        "model": model,
        "loop": "paced",
        "clients": PACED,
        "errors": errors,
        "queries": {name: sum(map(len, summary)) for name, summary in rounds_of.items()},
        "approximate": {name: 1 - float(np.mean(summary)) for name, summary in exact.items()},
        "p50_ms": {name: _ms(np.concatenate(summary), 0.5) for name, summary in rounds_of.items()},
        "p99_ms": {name: _ms(np.concatenate(summary), 0.99) for name, summary in rounds_of.items()},
        "p99_ms_by_round": p99,
    }
    _tell(row, {name: np.divide(p99[name], p99["uncoded"]) for name in p99}, p99, " ms")
    print(f"  all rounds together: {row['p99_ms']}", flush=True)
    return row


def _ms(latencies: Sequence[float] | np.ndarray, share: float) -> float:
    return 1e3 * float(np.quantile(latencies, share))


def _tell(
    row: dict[str, Any], ratios: dict[str, Any], figures: dict[str, list[float]], unit: str
) -> None:
    cells = [
        f"{name} {np.median(figures[name]):.4g}{unit} "
        f"({np.median(ratio):.2f}: {ratio.min():.2f} to {ratio.max():.2f})"
        for name, ratio in ratios.items()
    ]
    print(f"{row['model']:14} {row['loop']} {row['clients']}: {', '.join(cells)}", flush=True)


def write_queries(name: str, path: Path) -> None:
    model, shape = model_of(name)
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(32, *shape)).astype(np.float32)
    np.savez(path, queries=queries, labels=np.asarray(eqx.filter_jit(model)(queries)).argmax(1))


@contextlib.contextmanager
def _serve(model: str, system: str) -> Iterator[str]:
    """Run a server's process, and give its address."""
    settings, served = SYSTEMS[system], model
    if settings is None:
        command, summary = [sys.executable, str(HERE / "_serving_bare.py"), model], {}
    else:
        if "-" not in model:  # shipped ones have a dash
            _, shape = model_of(model)
            served = f"_serving_models:{model}"
            settings = settings | {"input_shape": ",".join(map(str, shape))}
        command, summary = nercc_serve(served, settings)
    with running(command, summary) as port:
        name = served.replace(":", ".")
        yield f"http://127.0.0.1:{port}/v2/models/{name}/infer"


if __name__ == "__main__":  # to look at while the server is worked on
    measure_price(*map(float, sys.argv[1:2]), rounds=int(sys.argv[2]))
