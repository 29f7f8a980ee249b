"""The promises of dependent.py on the real server: a process, clients of HTTP, real time.

    python bench/dependent_server.py [--name after] [--seeds 1] [--only PATTERN]

`nercc serve` answers single queries that arrive as a Poisson stream, 40 a second, of which each
cell judges 4,000: MNIST's test images, each once, by LeNet5 with `--surrogate learn`, or digits in
turn, decoded. 48 workers are threads that sleep for 200 ms a call, as if they were machines of
their own: what a busy machine adds to that makes few calls late. Which images are slow is drawn as
in dependent.py; a copy of a slow one is slow, too. What is wrong is counted by the clients, in the
order in which they were answered. `/status` is read each second. Two minutes a cell; writes
results/dependent_server.json under `--name`. With `--checkout`, the server is that of another
version. Needs MNIST as parquet files.
"""

import argparse
import asyncio
import fnmatch
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import jax
import jax.numpy as jnp
import numpy as np
from _report import environment, read_json, write_json
from _serving_load import Rest
from _serving_process import cpu_seconds, nercc_serve, running_on
from _tails_systems import Work, works
from dependent import CASES, digits, hardness, own_answers

RESULTS = Path(__file__).parent / "results" / "dependent_server.json"
QUERIES, RATE, BEFORE = 4000, 40.0, 1000  # judged, a second, and digits before inverted ones
WORKERS, SERVICE = 48, 0.2  # three copies of each slow query fit; seconds of a call
_CASES = (
    "smallest 5 % of margins, 0.5 s",
    "smallest 5 % of margins, 3 s",
    "half from the hardest 12 %, 0.5 s",
    "random 5 %, 0.5 s",
    "digits, random 10 %, decoded",
    "digits, random 10 %, inverted in the second half",
)
_NAMES = {_CASES[-1]: "digits, random 10 %, then inverted"}
_LEARNS = {
    "scheme": "uncoded",
    "surrogate": "learn",
    "copies": 3,
    "straggler_threshold": 1.35,
    "batch_wait_timeout_s": 0.01,
}
_DECODES = {"copies": 3, "straggler_threshold": 1.35, "batch_wait_timeout_s": 0.11}


class Clients:
    """Clients that send each query when it is due, and what they were answered.

    Attributes:
        given: For each approximate answer, by time: the query, and whether its label is wrong.
        seconds: The time that each answer took.
        errors: What the server said of requests that failed.
    """

    def __init__(self, x: np.ndarray, labels: np.ndarray, server: Rest):
        self.x, self.labels, self.server = x, labels, server
        self.given: list[tuple[int, bool]] = []
        self.seconds = np.full(len(x), np.nan)
        self.errors: list[str] = []

    async def run(self, arrivals: np.ndarray) -> None:
        """Send all queries, and wait for their answers."""
        begin, tasks = time.monotonic(), []
        for number, arrival in enumerate(arrivals):
            await asyncio.sleep(max(begin + arrival - time.monotonic(), 0))
            tasks.append(asyncio.create_task(self._ask(number)))
        await asyncio.gather(*tasks)

    async def _ask(self, number: int) -> None:
        begin = time.monotonic()
        error, values, exact = await self.server.ask(self.server.pack(self.x[number][None]))
        if error is not None or values is None:
            self.errors.append(str(error))
            return
        self.seconds[number] = time.monotonic() - begin
        if not exact:
            self.given.append((number, bool(values[0].argmax() != self.labels[number])))


def serve(work: Work, case: str, seed: int, checkout: Path | None) -> dict[str, Any]:
    """Run one cell, and return what was given out and how much of it was wrong."""
    law, delay, allowed, kind = CASES[case]
    random = np.random.default_rng(seed)
    before = BEFORE if kind == "decode inverted" else 0
    order = np.resize(random.permutation(len(work.queries)), before + QUERIES)
    x, own = work.queries[order], work.answers[order]
    if before:
        x = np.concatenate([x[:before], x.max() + x.min() - x[before:]])
        own = np.concatenate([own[:before], own_answers(work, x[before:])])
    learns = kind == "learn"
    settings = {
        "workers": WORKERS,
        "max_disagreement": allowed,
        "service_delay_s": SERVICE,
        "straggler_rate": 0.05 if learns else 0.1,
        "straggler_delay_s": delay,
        "fault_seed": seed,
        **(_LEARNS if learns else _DECODES),
    }
    slow = np.zeros(len(x), bool)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slow.npy"
        if law is not None:
            slow = np.asarray(law.straggles(jax.random.key(seed), jnp.asarray(hardness(work, own))))
            np.save(path, x[slow])
            # Half of what a worker sees would straggle if it were struck by rank: ties are not.
            settings |= {"straggler_score": "_slow_queries:score", "straggler_rate": 0.5}
        command, summary = nercc_serve(str(work.model), settings)
        summary |= {"SLOW_QUERIES": str(path)}
        if checkout is not None:
            summary |= {"PYTHONPATH": str(checkout)}
        with running_on(command, summary) as ports:
            arrivals = np.cumsum(random.exponential(1 / RATE, len(x)))
            clients, statuses, used = asyncio.run(
                _drive(work, ports, x, own.argmax(axis=1), arrivals)
            )
    assert not clients.errors, clients.errors
    earlier = [wrong for number, wrong in clients.given if number < before]
    hard = [wrong for number, wrong in clients.given if slow[number]]
    judged = [wrong for number, wrong in clients.given if number >= before]
    quarters: list[list[bool]] = [[], [], [], []]
    for number, wrong in clients.given:
        if number >= before:
            quarters[4 * (number - before) // QUERIES].append(wrong)
    beyond = np.cumsum(np.asarray(judged, float) - allowed)
    return {
        "seed": seed,
        "queries": QUERIES,
        "slow": int(slow.sum()) if law is not None else None,
        "before": [len(earlier), sum(earlier)],
        "approximate": len(judged),
        "wrong": sum(judged),
        "of_slow": [len(hard), sum(hard)],
        "quarters": [[len(part), sum(part)] for part in quarters],
        "worst_beyond": float(max(beyond.max(initial=0.0), 0.0)),
        "latency": [float(np.nanquantile(clients.seconds, share)) for share in (0.5, 0.95, 0.99)],
        **_said(statuses),
        "cpus": used,
        "load_average": os.getloadavg()[0],
    }


async def _drive(
    work: Work, ports: dict[str, Any], x: np.ndarray, labels: np.ndarray, arrivals: np.ndarray
) -> tuple[Clients, list[dict[str, Any]], float]:
    """Send the queries; return the clients, the model's status each second, and CPUs used."""
    url = f"http://127.0.0.1:{ports['http_port']}"
    statuses: list[dict[str, Any]] = []

    async def watch(session: aiohttp.ClientSession) -> None:
        while True:
            async with session.get(f"{url}/status") as answer:
                statuses.append((await answer.json())["models"][0])
            await asyncio.sleep(1.0)

    async with Rest(f"{url}/v2/models/{work.model}/infer") as server, aiohttp.ClientSession() as s:
        watching = asyncio.create_task(watch(s))
        clients, begin = Clients(x, labels, server), time.monotonic()
        used = cpu_seconds(ports["pid"])
        await clients.run(arrivals)
        used = (cpu_seconds(ports["pid"]) - used) / (time.monotonic() - begin)
        await asyncio.sleep(5.0)  # late answers come, and a last status
        watching.cancel()
    return clients, statuses, used


def _said(statuses: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the server reported: drifts, audits, and each new hint with its second."""
    hints: list[tuple[int, str]] = []
    for second, status in enumerate(statuses):
        for hint in status["hints"]:
            words = "".join(letter for letter in hint if not letter.isdigit())
            if all(words != known for _, known in hints):
                hints.append((second, words))
    last = statuses[-1]
    fidelity = last["fidelity"]
    return {
        "predictor": last["predictor"],
        "stragglers": fidelity.get("stragglers"),
        "stragglers_met": last["totals"]["stragglers"],
        "audited": [fidelity["audited"], fidelity["audited_disagreement"]],
        "hints": hints,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--name", default="after")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--checkout", type=Path, default=None, help="of the server, if another")
    parser.add_argument("--only", default="*", metavar="PATTERN")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = read_json(options.results)
    loaded: dict[bool, Work] = {}
    for case in _CASES:
        if not fnmatch.fnmatch(case, options.only):
            continue
        decoded = case.startswith("digits")
        if decoded not in loaded:
            loaded[decoded] = digits() if decoded else works(options.data_dir)["lenet5"]()
        for seed in options.seeds:
            cell = serve(loaded[decoded], case, seed, options.checkout)
            print(options.name, case, cell, flush=True)
            cells = found.setdefault(options.name, {}).setdefault(_NAMES.get(case, case), [])
            cells[:] = [each for each in cells if each["seed"] != seed] + [cell]
            found["environment"] = environment(("jax", "jaxlib", "numpy", "aiohttp", "uvicorn"))
            write_json(options.results, found)


if __name__ == "__main__":
    main()
