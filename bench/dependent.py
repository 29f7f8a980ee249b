"""Promises of approximate answers where queries straggle because of what they are.

`dependent`: every cell is `CodedBatcher` as it is shipped, before simulated workers, with LeNet5:
single queries in a Poisson stream, each of MNIST's 5,000 test images once, or digits in turn; and
with RepVGG and its student on CIFAR-10, and Lotka-Volterra's equations. Which images are slow
depends on the model's own margin (`SlowRows`), and a copy of a slow one is slow, too. The results
go into the file under `--name`, so that two versions can stand next to each other.

`dependent_server`: the same on the real server: a process, clients of HTTP, real time. `nercc
serve` answers single queries that arrive as a Poisson stream, 40 a second, of which each cell
judges 4,000: MNIST's test images, each once, by LeNet5 with `--surrogate learn`, or digits in turn,
decoded. 48 workers are threads that sleep for 200 ms a call, as if they were machines of their own:
what a busy machine adds to that makes few calls late. What is wrong is counted by the clients, in
the order in which they were answered. Two minutes a cell.

Needs MNIST and CIFAR-10 (`models/data.py` says where).
"""

import asyncio
import dataclasses
import fnmatch
import functools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from report import Report, environment, show
from simulators import SlowRows
from streams import Lookup, Work, play, slow_rows, works

from nercc_jax import NeRCC, Uncoded
from nercc_jax.pools import Fault, Faults
from nercc_jax.risk import RiskMonitor
from nercc_jax.serving import (
    BatchingPolicy,
    CodedBatcher,
    Coder,
    Predictor,
    Reply,
    calibrate_decoding,
)
from nercc_jax.stragglers import TraceLatency
from nercc_jax.testing import SimulatedPool
from nercc_models import load_model

WORKERS, SERVICE = 28, 0.05
# Workers that are slow for 3 s, three copies of each slow image, leave room for no more.
RATES = {0.5: 130.0, 3.0: 40.0}  # queries a second, by the seconds of slowness


@dataclasses.dataclass(frozen=True)
class Case:
    """A law of the slow rows (None: each call at random), seconds, allowance, and work.

    `kind` says how stragglers are answered: by a surrogate, or decoded; by what is decoded until
    images are inverted.
    """

    law: SlowRows | None = None
    delay: float = 0.5
    allowed: float = 0.1
    kind: str = "learn"
    work: str = "lenet5"

    @property
    def learns(self) -> bool:
        return self.kind in ("learn", "function", "student")

    @property
    def rate(self) -> float:
        """The share of calls that straggle where they do at random."""
        return 0.05 if self.kind in ("learn", "student") else 0.1


def _extreme(rate: float) -> SlowRows:
    return SlowRows(rate, leaning=1.0, hardest=rate)


def _leaning(rate: float, hardest: float = 0.12) -> SlowRows:
    return SlowRows(rate, leaning=0.5, hardest=hardest)


_function = functools.partial(Case, kind="function", work="lotka-volterra")
_student = functools.partial(Case, kind="student", work="repvgg")
_decoded = functools.partial(Case, allowed=0.05, kind="decode")
_inverted = functools.partial(Case, allowed=0.05, kind="decode inverted")
CASES: dict[str, Case] = {
    "smallest 5 % of margins, 0.5 s": Case(_extreme(0.05)),
    "smallest 5 % of margins, 3 s": Case(_extreme(0.05), 3.0),
    "half from the hardest 12 %, 0.5 s": Case(_leaning(0.05)),
    "random 5 %, 0.5 s": Case(),
    "Lotka-Volterra, largest 10 % of peaks, 0.5 s": _function(_extreme(0.1)),
    "Lotka-Volterra, half from the largest 20 %, 0.5 s": _function(_leaning(0.1, hardest=0.2)),
    "Lotka-Volterra, random 10 %, 0.5 s": _function(),
    "RepVGG with student, smallest 5 % of margins, 0.5 s": _student(_extreme(0.05)),
    "RepVGG with student, half from the hardest 12 %, 0.5 s": _student(_leaning(0.05)),
    "RepVGG with student, random 5 %, 0.5 s": _student(),
    "digits, random 10 %, decoded": _decoded(work="digits"),
    "digits, random 10 %, inverted in the second half": _inverted(work="digits"),
    # The bound's constants were chosen on the two cases above, so these judge it.
    "MNIST, random 10 %, decoded": _decoded(),
    "MNIST, random 10 %, inverted in the second half": _inverted(),
}


def run(
    report: Report,
    name: str = "after",
    seeds: int = 3,
    only: tuple[str, ...] = ("*",),
) -> None:
    """Run simulated cells, and `monitor`, the false alarms and delays of the drift test.

    Options:
        name: Of the version, in the file.
        seeds: Of each case.
        only: Patterns of cases.
    """
    cases, days, number = [*CASES], 1000, 5000
    if report.quick:
        cases, days, seeds, number = ["digits, random 10 %, decoded"], 20, 1, 600
    found = report.read()
    if any(fnmatch.fnmatch("monitor", each) for each in only):
        found["monitor"] = [monitor(share, days) for share in (0.1, 0.05, 0.01)]
        report.write(found)
    for case in cases:
        if any(fnmatch.fnmatch(case, each) for each in only):
            work = _loaded(CASES[case].work, report.data_dir)
            cells = [serve(work, CASES[case], seed, number) for seed in range(seeds)]
            found.setdefault(name, {})[case] = cells
            report.write(found | {"environment": environment()})
            report.log(case)
            columns = ("queries", "approximate", "wrong", "worst_beyond")
            show({key: cell[key] for key in columns} for cell in cells)


@functools.cache
def _loaded(name: str, data_dir: Path | None) -> Work:
    return works(data_dir)[name]()


def monitor(promised: float, days: int, runs: int = 200) -> dict[str, Any]:
    """Count false alarms in days of 1,000 answers, and the answers until a drift is found.

    A drift comes after 1,000 answers of which seven tenths of the promised share were wrong.
    """
    random = np.random.default_rng(0)
    days_wrong = (random.random((days, 1000)) < promised).tolist()
    alarms = [RiskMonitor(promised).add(wrong) for wrong in days_wrong]
    found: dict[str, Any] = {"promised": promised, "days": days, "false_alarms": sum(alarms)}
    for times in (1.5, 2.0, 4.0):
        delays = []
        for _ in range(min(runs, days)):
            test = RiskMonitor(promised)
            test.add((random.random(1000) < 0.7 * promised).tolist())
            test.alarm, delay = False, 1
            while not test.add([bool(random.random() < times * promised)]):
                delay += 1
            delays.append(delay)
        found[f"delay_{times:g}"] = [float(np.mean(delays)), float(np.quantile(delays, 0.9))]
    return found


def asked(
    work: Work, case: Case, seed: int, number: int, before: int
) -> tuple[np.random.Generator, np.ndarray, np.ndarray, np.ndarray]:
    """Return random numbers, queries, their own answers, and which queries are slow.

    Where images are inverted, those after the first `before` are.
    """
    random = np.random.default_rng(seed)
    order = np.resize(random.permutation(len(work.queries)), number)
    x, own = work.queries[order], work.answers[order]
    if case.kind == "decode inverted":
        x = np.concatenate([x[:before], x.max() + x.min() - x[before:]])
        own = np.concatenate([own[:before], work.run(x[before:])])
    slow = np.zeros(len(x), bool)
    if case.law is not None:
        hard = jnp.asarray(work.hardness(own))
        slow = np.asarray(case.law.straggles(jax.random.key(seed), hard))
    return random, x, own, slow


def serve(work: Work, case: Case, seed: int, number: int) -> dict[str, Any]:
    """Run one cell, and return what was given out, how much of it was wrong, and when."""
    random, x, own, slow = asked(work, case, seed, number, number // 2)
    faults = [Fault("delay", case.rate, latency=TraceLatency([case.delay]))]
    if case.law is not None:
        faults = [slow_rows(x[slow], case.delay)]
    coder = Coder(Uncoded(1) if case.learns else NeRCC(4, 8, points="interleaved"))
    policy = BatchingPolicy(
        straggler_threshold=1.35,
        outputs="logits" if work.tolerance is None else "values",
        max_disagreement=case.allowed if work.tolerance is None else None,
        tolerance=work.tolerance,
        deadline_s=60.0,
        copies=3,
        batch_wait_timeout_s=0.01 if case.learns else 0.11,
    )
    decoding = None
    if not case.learns:
        decoding = calibrate_decoding(
            coder, load_model(str(work.model)), work.training(), policy.accuracy
        )
    noise = np.random.default_rng(seed + 1)
    model: Any = Lookup(x, own, work.run)
    pool = SimulatedPool(
        model,
        WORKERS,
        seconds=lambda size: SERVICE + noise.exponential(0.0005),
        faults=Faults(faults, seed=seed),
        hang_timeout=600.0,
    )
    values, seconds = np.zeros_like(own), np.zeros(len(x))
    given: list[bool] = []  # whether each approximate answer was wrong, by time

    def hear(number: int, latency: float, reply: Reply | None) -> None:
        assert reply is not None
        values[number], seconds[number] = reply.values[0], reply.seconds
        if not reply.exact[0]:
            if work.tolerance is None:
                wrong = reply.values[0].argmax() != own[number].argmax()
            else:  # beyond the bar that was promised for nine of ten
                error = np.sqrt(np.mean((reply.values[0] - own[number]) ** 2))
                wrong = error > reply.expected_error[0]
            given.append(bool(wrong))

    batcher = CodedBatcher(
        pool, coder, x.shape[1:], own.shape[1:], policy=policy, decoding=decoding,
        predictor=Predictor(work.student) if case.learns else None,
    )  # fmt: skip
    with pool, batcher:
        arrivals = np.cumsum(random.exponential(1 / RATES[case.delay], len(x)))
        play(batcher, pool, x, arrivals, hear)
    late = slow if case.law is not None else seconds > 2 * np.median(seconds)
    hard = work.hardness(own)

    def bias(some: np.ndarray) -> list[float]:
        """Return the bias of the mean, in standard deviations, and of the largest 5 %'s share."""
        large = np.quantile(hard, 0.95)
        mean = (np.mean(some) - np.mean(hard)) / np.std(hard)
        return [float(mean), float(np.mean(some > large) - np.mean(hard > large))]

    return {
        "queries": len(x),
        "approximate": len(given),
        "wrong": sum(given),
        "worst_beyond": beyond(given, case.allowed),
        "bias": {"dropping": bias(hard[~late]), "ours": bias(work.hardness(values))},
        "latency": np.quantile(seconds, (0.5, 0.95, 0.99)).tolist(),
    }


def beyond(wrong: list[bool], allowed: float) -> float:
    """Return by how many the wrong answers were, at worst, beyond the allowance up to then."""
    return float(np.cumsum(np.asarray(wrong, float) - allowed).max(initial=0.0))


# --- the real server

QUERIES, RATE, BEFORE = 4000, 40.0, 1000  # judged, a second, and digits before inverted ones
SERVED = {"workers": 48}  # three copies of each slow query fit
# Cases on the server, by their names there.
SERVER_CASES = {
    **{name: name for name in [*CASES][:4]},
    "digits, random 10 %, decoded": "digits, random 10 %, decoded",
    "digits, random 10 %, then inverted": "digits, random 10 %, inverted in the second half",
}
LEARNS = {
    "scheme": "uncoded",
    "surrogate": "learn",
    "copies": 3,
    "straggler_threshold": 1.35,
    "batch_wait_timeout_s": 0.01,
}
DECODES = {"copies": 3, "straggler_threshold": 1.35, "batch_wait_timeout_s": 0.11}


def server(
    report: Report,
    name: str = "after",
    seeds: tuple[int, ...] = (0,),
    only: tuple[str, ...] = ("*",),
) -> None:
    """Run cells on `nercc serve`.

    Options:
        name: Of the version, in the file.
        seeds: Of each case.
        only: Patterns of cases.
    """
    found, number, cases = report.read(), QUERIES, [*SERVER_CASES]
    if report.quick:
        number, cases = 200, ["digits, random 10 %, decoded"]
    for case in cases:
        if any(fnmatch.fnmatch(case, each) for each in only):
            about = CASES[SERVER_CASES[case]]
            for seed in seeds:
                work = _loaded(about.work, report.data_dir)
                cell = served(work, about, seed, number)
                report.log(f"{case} {cell}")
                cells = found.setdefault(name, {}).setdefault(case, [])
                cells[:] = [each for each in cells if each["seed"] != seed] + [cell]
                report.write(found | {"environment": environment("aiohttp", "uvicorn")})


def served(work: Work, case: Case, seed: int, number: int) -> dict[str, Any]:
    """Run one cell, and return what was given out and how much of it was wrong."""
    from servers import nercc_serve, running

    before = BEFORE if case.kind == "decode inverted" else 0
    random, x, own, slow = asked(work, case, seed, before + number, before)
    faults = {
        "service_delay_s": 0.2,
        "straggler_rate": case.rate,
        "straggler_delay_s": case.delay,
        "fault_seed": seed,
    }
    settings = SERVED | (LEARNS if case.learns else DECODES)
    settings |= {"max_disagreement": case.allowed, "faults": faults}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slow.npy"
        if case.law is not None:
            np.save(path, x[slow])
            # Half of what a worker sees would straggle if it were struck by rank: ties are not.
            faults |= {"straggler_score": "served:slow_score", "straggler_rate": 0.5}
        command, variables = nercc_serve(str(work.model), settings)
        variables |= {"SLOW_QUERIES": str(path)}
        with running(command, variables) as ports:
            arrivals = np.cumsum(random.exponential(1 / RATE, len(x)))
            labels = own.argmax(axis=1)
            given, seconds, last = asyncio.run(_ask(work, ports, x, labels, arrivals))
    hard = [wrong for place, wrong in given if slow[place]]
    judged = [wrong for place, wrong in given if place >= before]
    return {
        "seed": seed,
        "queries": number,
        "slow": int(slow.sum()) if case.law is not None else None,
        "approximate": len(judged),
        "wrong": sum(judged),
        "of_slow": [len(hard), sum(hard)],
        "worst_beyond": beyond(judged, case.allowed),
        "latency": np.nanquantile(seconds, (0.5, 0.95, 0.99)).tolist(),
        "predictor": last["predictor"],
        "stragglers": last["fidelity"].get("stragglers"),
        "stragglers_met": last["totals"]["stragglers"],
        "load_average": os.getloadavg()[0],
    }


async def _ask(
    work: Work, ports: dict[str, Any], x: np.ndarray, labels: np.ndarray, arrivals: np.ndarray
) -> tuple[list[tuple[int, bool]], np.ndarray, dict[str, Any]]:
    """Send each query when it is due.

    Returns:
        For each approximate answer, by time, the query and whether its label is wrong; the seconds
        of all answers, and the model's status after them.
    """
    import aiohttp
    from load import Rest

    url = f"http://127.0.0.1:{ports['http_port']}"
    given: list[tuple[int, bool]] = []
    seconds = np.full(len(x), np.nan)

    async def ask(server: Rest, number: int) -> None:
        begin = time.monotonic()
        error, values, exact = await server.ask(server.pack(x[number][None]))
        assert error is None, error
        assert values is not None
        seconds[number] = time.monotonic() - begin
        if not exact:
            given.append((number, bool(values[0].argmax() != labels[number])))

    async with Rest(f"{url}/v2/models/{work.model}/infer") as rest, aiohttp.ClientSession() as s:
        begin, tasks = time.monotonic(), []
        for number, arrival in enumerate(arrivals):
            await asyncio.sleep(max(begin + arrival - time.monotonic(), 0))
            tasks.append(asyncio.create_task(ask(rest, number)))
        await asyncio.gather(*tasks)
        await asyncio.sleep(5.0)  # late answers come
        async with s.get(f"{url}/status") as answer:
            return given, seconds, (await answer.json())["models"][0]
