"""Tails of a stream of single queries: what `CodedBatcher` makes of stragglers, and its rivals.

Every cell is `CodedBatcher` as it is shipped, before workers on paper (`SimulatedPool`): a clock
that jumps, so that an hour of traffic takes a minute, and the same each time. `--ground threads`
and `ray` run some cells before real workers that sleep (`DevicePool`, or Ray actors on this
machine), for what is seen on paper to be held against. `--ground services` crosses laws of service
times with ways to straggle, for what the server picks and for rivals in their best form, tuned on
other traffic; each run has one seed of arrivals, service times and faults. One of these laws is
what `service_times` measures on this machine. `--only 'lenet5/5 %/*'` names cells: work/law/system.
Needs MNIST and CIFAR-10 (`models/data.py` says where).
"""

import collections
import dataclasses
import fnmatch
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as `nercc serve` does
import jax.numpy as jnp
import numpy as np
from measure import block_bootstrap
from report import Report, environment, show
from streams import (
    ANY,
    SERVICES,
    Law,
    Lookup,
    Spells,
    Work,
    large_queries,
    laws,
    play,
    slow_rows,
    works,
)
from tails_systems import System, parity_models, rivals, systems, tune_rivals
from workloads import in_batches

from nercc_jax.pools import AbstractPool, DevicePool, Fault, Faults, RayPool
from nercc_jax.serving import CodedBatcher, Coder, Reply
from nercc_jax.stragglers import TraceLatency
from nercc_jax.testing import SimulatedPool
from nercc_models import load_model

WARM_UP = 2000  # queries that are not judged: what learns, learns from them
# Before real workers there are so many more: learning takes a minute there, and none on paper.
REAL_WARM_UP = 8000
_FEWEST_P9999 = 100_000  # judged queries
_ROUNDS = 400  # of the bootstrap
REAL_WORKERS = {"threads": DevicePool, "ray": functools.partial(RayPool, address="local")}
# What is tried before these, too.
REAL = (
    *("hedged, p90", "hedged, 1.35 x median", "two copies"),
    *("known, else hedged", "picked, 1.1 calls"),
)
# With laws of service times: the ways to straggle, and the systems besides `rivals`.
STRAGGLE: tuple[str, ...] = ("5 %", "slow workers", "slow rack", "hard queries")
TRIED = ("picked, 1.1 calls", "picked, 1.35 calls")
# Rivals are tuned on other traffic, of so many queries; Prequal's rule at one law of service times.
TUNING_SEED, TUNING = 99, 6000
_PREQUAL_AT = "lognormal 0.2"
_TAIL = ("p50_ms", "p99_ms", "p999_ms", "p99_by_p50", "p999_by_p50")


@dataclasses.dataclass(frozen=True)
class Load:
    """Workers, seconds of a call and their law (`SERVICES`), queries a second."""

    workers: int = 28
    base: float = 0.05
    service: str = "constant"
    rate: float = 130.0
    queries: int = 20_000
    seed: int = 0

    def at(self, share: float) -> "Load":
        """So much of the workers' time asked for, if every query is called once."""
        return dataclasses.replace(self, rate=share * self.workers / self.base)

    def before(self, workers: int, queries: int) -> "Load":
        """So many queries before so many workers, of which each gets as many a second."""
        rate = self.rate * workers / self.workers
        return dataclasses.replace(self, workers=workers, rate=rate, queries=queries)


def run(
    report: Report,
    only: tuple[str, ...] = ("*",),
    queries: int = Load.queries,
    ground: str = "paper",
    seed: int = 0,
) -> None:
    """Run the cells that patterns name, and add them to the file.

    Options:
        only: Patterns of cells, work/law/system.
        queries: In a cell; the first 2,000 are not judged.
        ground: "paper", "threads", "ray" or "services".
        seed: Of arrivals, service times and faults.
    """
    if report.quick:
        queries, only = WARM_UP + 500, ("*/5 %/two copies", "*/5 %*/Prequal")
    if queries <= WARM_UP or ground not in ("paper", "services", *REAL_WORKERS):
        raise ValueError(f"--queries {queries} must be over {WARM_UP}; --ground: {run.__doc__}")
    load = Load(queries=queries, seed=seed)
    chosen = laws(load.base, load.workers, seed)
    loads = {
        "": load,
        ", load 50 %": load.at(0.5),
        ", load 80 %": load.at(0.8),
        ", 1,000 workers": load.before(1000, 50 * queries),
    }
    laws_of: dict[str, tuple[str, ...]] = {suffix: ("5 %",) for suffix in loads}
    laws_of[""] = tuple(law for law in chosen if law != "hard queries")
    tried = REAL if ground in REAL_WORKERS else None
    if ground == "services":
        loads = {f", {each}": dataclasses.replace(load, service=each) for each in SERVICES}
        laws_of, tried = dict.fromkeys(loads, STRAGGLE), TRIED
    for name, make in works(report.data_dir).items():
        if name == "digits" or (name == ANY and ground != "services"):
            continue
        work, rows = None, []
        for law, suffix in ((law, suffix) for law in chosen for suffix in loads):
            wanted = _matching(only, name, law + suffix)
            if law not in laws_of[suffix] or not wanted:
                continue
            work, here = work or make(), loads[suffix]
            offered = systems(work, law) if name != ANY else rivals(_picks(report, work, law, here))
            for system in offered:
                untried = name != ANY and tried is not None and system.name not in tried
                if untried or not any(fnmatch.fnmatch(system.name, each) for each in wanted):
                    continue
                rounds = 0 if ground == "services" else _ROUNDS
                cell = serve(work, system, chosen[law], here, ground=ground, rounds=rounds)
                place = f"{name}/{law}{suffix}/{system.name}"
                rows.append({"cell": place} | {key: cell[key] for key in (*_TAIL[:3], "calls")})
                report.log(f"{ground} {rows[-1]}")
                _keep(report, ground, place, cell, load)
        if rows:
            show(rows)


def record(report: Report) -> None:
    """Record what calls of one query on Ray actors take, over their median."""
    number, warm_up, found = (200, 50, []) if report.quick else (5000, 500, [])
    work = works(report.data_dir)["lenet5"]()
    with RayPool(load_model(str(work.model)), 2, example=work.queries[:1], address="local") as pool:
        for query in work.queries[: number + warm_up]:
            begin = time.perf_counter()
            with pool.dispatch(query[None, None], copies=1) as batch:
                batch.wait()
            found.append(time.perf_counter() - begin)
    seconds = np.array(found[warm_up:])
    median = float(np.median(seconds))
    about = {"environment": environment("ray"), "median_ms": 1e3 * median}
    report.write(about | {"ratios": np.round(seconds / median, 3).tolist()})


def _keep(report: Report, ground: str, place: str, cell: dict[str, Any], load: Load) -> None:
    """Write a cell, with what was measured by other seeds if there is anything."""
    found = report.read()
    cells = found.setdefault(ground, {})
    if ground == "services":
        cell = over_seeds(cells.get(place, {}).get("seeds", {}) | {str(load.seed): cell})
    cells[place] = cell
    found["about"] = {
        "environment": environment(),
        "load": dataclasses.asdict(Load()),
        "laws": {each.name: each.words for each in laws(load.base, load.workers).values()},
        "services": {each: words for each, (words, _) in SERVICES.items()},
        "warm_up": WARM_UP,
        "real_warm_up": REAL_WARM_UP,
    }
    report.write(found)


def over_seeds(seeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each number over seeds, of latencies with the least and the largest."""
    cells = list(seeds.values())
    keys = dict.fromkeys(key for cell in cells for key in cell)  # p99.99 where there is enough
    numbers = {key: [cell[key] for cell in cells if key in cell] for key in keys}
    return {"seeds": seeds} | {
        key: [round(float(of(found)), 3) for of in (np.median, np.min, np.max)]
        if key.startswith("p") and key != "predicted"
        else float(np.sum(found) if key in ("queries", "lost") else np.mean(found))
        for key, found in numbers.items()
    }


def _picks(report: Report, work: Work, law_name: str, load: Load) -> dict[str, Any]:
    """Return the rivals' parameters for a law, from the file, or by tuning them."""
    found, place = report.read().get("tuned", {}), f"{law_name}, {load.service}"
    if place in found:
        return found[place]
    queries = WARM_UP + 200 if report.quick else TUNING
    other = dataclasses.replace(load, seed=TUNING_SEED, queries=queries)
    law = laws(load.base, load.workers, TUNING_SEED)[law_name]
    known = found.get(f"{law_name}, {_PREQUAL_AT}", {}).get("Prequal")
    if known is None and load.service != _PREQUAL_AT:
        at = dataclasses.replace(load, service=_PREQUAL_AT)
        known = _picks(report, work, law_name, at)["Prequal"]
    picks = tune_rivals(lambda system: serve(work, system, law, other, rounds=0), known)
    whole = report.read()
    whole.setdefault("tuned", {})[place] = picks
    report.write(whole)
    report.log(f"tuned {place} {picks}")
    return picks


def _matching(patterns: Sequence[str], *parts: str) -> list[str]:
    """Return the last parts of patterns with slashes whose first parts match these."""
    found = []
    for pattern in patterns:
        *first, last = (pattern.split("/") + ["*"] * 3)[:3]
        if all(fnmatch.fnmatch(part, each) for part, each in zip(parts, first, strict=True)):
            found.append(last)
    return found


def serve(
    work: Work,
    system: System,
    law: Law,
    load: Load,
    *,
    ground: str = "paper",
    rounds: int = _ROUNDS,
) -> dict[str, Any]:
    """Run one cell: a Poisson stream, each query's seconds, and its answer."""
    random, real = np.random.default_rng(100 * load.seed), ground in REAL_WORKERS
    warm_up = REAL_WARM_UP if real else WARM_UP
    queries = load.queries - WARM_UP + warm_up
    arrivals = np.cumsum(random.exponential(1 / load.rate, queries))
    # In one order again and again: what is asked twice is long forgotten.
    shuffled = np.random.default_rng(100 * load.seed + 1).permutation(len(work.queries))
    order = np.resize(shuffled, queries)
    pool, counts = _pool(work, system, law, load, ground), collections.Counter()
    predictor = None if system.predictor is None else system.predictor()
    begin = time.time()
    with pool:
        batcher: Any = (
            CodedBatcher(
                pool, Coder(system.code, system.models), work.queries.shape[1:],
                work.answers.shape[1:], policy=system.policy, predictor=predictor,
                observe=lambda what, number: counts.update([what]),
            )
            if system.balancer is None
            else system.balancer(pool)
        )  # fmt: skip
        seconds = np.full(queries, 60.0)
        right, predicted, decoded, lost = np.zeros((4, queries), bool)
        lost[:] = True

        def hear(number: int, latency: float, reply: Reply | None) -> None:
            if reply is None:
                return
            value, own = reply.values[0], work.answers[order[number]]
            seconds[number], lost[number] = latency, False
            if work.tolerance is None:
                right[number] = value.argmax() == own.argmax()
            else:
                right[number] = np.sqrt(np.mean((value - own) ** 2)) <= work.tolerance
            predicted[number] = reply.predicted[0]
            decoded[number] = not reply.exact[0] and not reply.predicted[0]

        with batcher:
            play(batcher, pool, work.queries[order], arrivals, hear, real=real)
            report = pool.report()
    judged = seconds[warm_up:]
    numbers = tail_of(judged)
    if rounds:
        numbers = np.array(block_bootstrap(judged, tail_of, rounds=rounds)).T
    tail: dict[str, Any] = dict(zip(_TAIL, np.round(numbers, 3).tolist(), strict=True))
    if len(judged) >= _FEWEST_P9999:
        tail["p9999_ms"] = round(1e3 * float(np.quantile(judged, 0.9999)), 3)
    student = counts["predict_seconds"] if system.policy.redundancy == "always" else queries
    extra = work.student_calls * student / queries if predictor is not None else 0.0
    return tail | {
        "queries": len(judged),
        "lost": int(lost[warm_up:].sum()),
        "right": float(right[warm_up:].mean()),
        "predicted": float(predicted[warm_up:].mean()),
        "decoded": float(decoded[warm_up:].mean()),
        "calls": (report.sent / queries) + extra,
        "audited": counts["audit_same"] + counts["audit_other"],
        "audited_other": counts["audit_other"],
        "drifts": counts["drift"],
        "again": counts["reexecution"] / queries,
        "seconds": round(time.time() - begin, 1),
    }


def tail_of(seconds: np.ndarray) -> np.ndarray:
    """Return the numbers of `_TAIL`."""
    p50, p99, p999 = np.quantile(seconds, (0.5, 0.99, 0.999))
    return np.array([1e3 * p50, 1e3 * p99, 1e3 * p999, p99 / p50, p999 / p50])


def _pool(work: Work, system: System, law: Law, load: Load, ground: str) -> AbstractPool:
    # Compiled when coded data points come; of a function, none do, nor in what Ray's actors get.
    otherwise = None if work.model is None or ground == "ray" else work.run
    models: list[Any] = [Lookup(work.queries, work.answers, otherwise)]
    if len(system.models) > 1:
        models += [_narrow(parity) for parity in parity_models(work)]
    hangs = any(fault.kind == "hang" for fault in law.faults)
    options: dict[str, Any] = {"hang_timeout": 1.0 if hangs else 600.0}
    if ground in REAL_WORKERS:
        base = Fault("delay", latency=TraceLatency(jnp.array([load.base])))
        faults = Faults((base, *map(_from_now, law.faults)), seed=7)
        return REAL_WORKERS[ground](models, load.workers, compiled=False, faults=faults, **options)
    noise, draw = np.random.default_rng(100 * load.seed + 2), SERVICES[load.service][1]
    faults = (*law.faults, *large_queries(load.service, work.queries, load.base))
    if law.hardest:
        hardness = work.hardness(work.answers)
        hard = hardness >= np.quantile(hardness, 1 - law.hardest)
        faults = (slow_rows(work.queries[hard], 10 * load.base), *faults)
    return SimulatedPool(
        models,
        load.workers,
        seconds=lambda size: load.base * draw(noise) + noise.exponential(0.0005),
        faults=Faults(faults, seed=100 * load.seed + 7),
        **options,
    )


def _from_now(fault: Fault) -> Fault:
    """Return the fault with its spells, if it has some, counted from now on."""
    if not isinstance(fault.when, Spells):
        return fault
    return dataclasses.replace(fault, when=dataclasses.replace(fault.when, origin=time.time()))


def _narrow(model: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: in_batches(model, rows, 8)
