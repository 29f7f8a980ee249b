"""Tails of a stream of single queries: what `CodedBatcher` makes of stragglers, and its rivals.

    python bench/tails.py [--only PATTERN ...] [--queries NUMBER]
                          [--threads | --ray | --record | --services [--seed N]]

Every cell is `CodedBatcher` as it is shipped, before workers on paper (`SimulatedPool`): a clock
that jumps, so that an hour of traffic takes a minute, and the same each time. `--threads` and
`--ray` run some cells before real workers that sleep (`DevicePool`, or Ray actors on this machine),
for what is seen on paper to be held against. All go into results/tails.json, cell by cell, which
docs/tails.md shows. `--services` crosses laws of service times with ways to straggle, for what the
server picks and for rivals in their best form, tuned on other traffic; each run has one seed of
arrivals, service times and faults. One of these laws is what `--record` measures on this machine.
`--only 'lenet5/5 %/*'` names cells: work/law/system. Needs MNIST and CIFAR-10 as parquet files
(`models/data.py` says where).
"""

import argparse
import collections
import dataclasses
import fnmatch
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as `nercc serve` does
import equinox as eqx
import jax.numpy as jnp
import numpy as np
from _balancers import Balancer
from _laws import RECORDED, SERVICES, Law, large_queries, laws
from _report import block_bootstrap, environment, read_json, write_json
from _tails_systems import ANY, System, Work, parity_models, rivals, systems, tune_rivals, works

from nercc_jax.pools import AbstractPool, DevicePool, Fault, Faults, RayPool
from nercc_jax.pools.garbage import short_collections
from nercc_jax.serving import CodedBatcher, Coder, Reply
from nercc_jax.stragglers import TraceLatency
from nercc_jax.testing import SimulatedPool
from nercc_models import load_model

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "numpy", "equinox")
WARM_UP = 2000  # queries that are not judged: what learns, learns from them
# Before real workers there are so many more: learning takes a minute there, and none on paper.
REAL_WARM_UP = 8000
_FEWEST_P9999 = 100_000  # judged queries
_BLOCK, _ROUNDS = 100, 400  # queries that the bootstrap keeps together, and its rounds
_COUNTED = ("predict_seconds", "audit_same", "audit_other", "drift", "reexecution")
_RECORDED, _UNRECORDED = 5000, 500  # calls, after so many to warm up
_WIDTH = 8  # rows that the model is compiled for
REAL_WORKERS = {"threads": DevicePool, "ray": functools.partial(RayPool, address="local")}
# What is tried before these, too.
REAL = (
    *("hedged, p90", "hedged, 1.35 x median", "two copies"),
    *("known, else hedged", "picked, 1.1 calls"),
)
# With laws of service times: the ways to straggle, and the systems.
STRAGGLE: tuple[str, ...] = ("5 %", "slow workers", "slow rack", "hard queries")
TRIED = ("picked, 1.1 calls", "picked, 1.35 calls")  # besides `rivals`, whatever the model
# Rivals are tuned on other traffic, of so many queries; Prequal's rule at one law of service times.
TUNING_SEED, _TUNING = 99, 6000
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN")
    parser.add_argument("--queries", type=int, default=Load.queries)
    ground = parser.add_mutually_exclusive_group()
    for name in REAL_WORKERS:
        ground.add_argument(f"--{name}", dest="ground", action="store_const", const=name)
    ground.add_argument("--record", dest="ground", action="store_const", const="record")
    ground.add_argument("--services", dest="ground", action="store_const", const="services")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(ground="paper")
    parser.add_argument("--data-dir", type=Path, default=None)
    options = parser.parse_args()
    if options.queries <= WARM_UP:
        parser.error(f"--queries {options.queries}: the first {WARM_UP} are not judged, give more")
    if options.ground == "record":
        record(works(options.data_dir)["lenet5"]())
        return
    for name, make in works(options.data_dir).items():
        _run(name, make, options, RESULTS / "tails.json")


def _run(name: str, make: Callable[[], Work], options: argparse.Namespace, path: Path) -> None:
    load, ground = Load(queries=options.queries, seed=options.seed), options.ground
    chosen = laws(load.base, load.workers, load.seed)
    loads = {
        "": load,
        ", load 50 %": load.at(0.5),
        ", load 80 %": load.at(0.8),
        ", 1,000 workers": load.before(1000, 50 * load.queries),
    }
    laws_of: dict[str, tuple[str, ...]] = {suffix: ("5 %",) for suffix in loads}
    laws_of[""] = tuple(law for law in chosen if law != "hard queries")
    tried = REAL if ground in REAL_WORKERS else None
    if ground == "services":
        loads = {f", {each}": dataclasses.replace(load, service=each) for each in SERVICES}
        laws_of, tried = dict.fromkeys(loads, STRAGGLE), TRIED
    work = None
    for law_name, law in chosen.items():
        for suffix, heavier in loads.items():
            wanted = _matching(options.only, name, law_name + suffix)
            if law_name not in laws_of[suffix] or not wanted or (name == ANY and tried != TRIED):
                continue
            work = work or make()
            if name == ANY:
                offered = rivals(_picks(work, law_name, heavier, path))
            else:
                offered = systems(work, law_name)
            for system in offered:
                if not any(fnmatch.fnmatch(system.name, pattern) for pattern in wanted):
                    continue
                if name != ANY and tried is not None and system.name not in tried:
                    continue
                cell = f"{name}/{law_name}{suffix}/{system.name}"
                rounds = 0 if ground == "services" else _ROUNDS
                measured = serve(work, system, law, heavier, ground=ground, rounds=rounds)
                print(ground, cell, _described(measured), flush=True)
                _keep(path, ground, cell, measured, load)


def record(work: Work) -> None:
    """Write what calls of one query on Ray actors take, over their median."""
    found = []
    with RayPool(load_model(str(work.model)), 2, example=work.queries[:1], address="local") as pool:
        for query in work.queries[: _RECORDED + _UNRECORDED]:
            begin = time.perf_counter()
            with pool.dispatch(query[None, None], copies=1) as batch:
                batch.wait()
            found.append(time.perf_counter() - begin)
    seconds = np.array(found[_UNRECORDED:])
    median = float(np.median(seconds))
    about = {"environment": environment((*PACKAGES, "ray")), "median_ms": 1e3 * median}
    write_json(RECORDED, about | {"ratios": np.round(seconds / median, 3).tolist()})


def _keep(path: Path, ground: str, cell: str, measured: dict[str, Any], load: Load) -> None:
    """Write a cell, with what was measured by other seeds if there is anything."""
    found = read_json(path)
    cells = found.setdefault(ground, {})
    if ground == "services":
        seeds = cells.get(cell, {}).get("seeds", {}) | {str(load.seed): measured}
        measured = over_seeds(seeds)
    cells[cell] = measured
    chosen = laws(load.base, load.workers)
    found["about"] = {
        "environment": environment(PACKAGES),
        "load": dataclasses.asdict(Load()),
        "laws": {each.name: each.words for each in chosen.values()},
        "services": {each: words for each, (words, _) in SERVICES.items()},
        "warm_up": WARM_UP,
        "real_warm_up": REAL_WARM_UP,
    }
    write_json(path, found)


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


def _picks(work: Work, law_name: str, load: Load, path: Path) -> dict[str, Any]:
    """Return the rivals' parameters for a law, from the file, or by tuning them."""
    found = read_json(path).get("tuned", {})
    place = f"{law_name}, {load.service}"
    if place in found:
        return found[place]
    other = dataclasses.replace(load, seed=TUNING_SEED, queries=_TUNING)
    law = laws(load.base, load.workers, TUNING_SEED)[law_name]
    known = found.get(f"{law_name}, {_PREQUAL_AT}", {}).get("Prequal")
    if known is None and load.service != _PREQUAL_AT:
        at = dataclasses.replace(load, service=_PREQUAL_AT)
        known = _picks(work, law_name, at, path)["Prequal"]
    picks = tune_rivals(lambda system: serve(work, system, law, other, rounds=0), known)
    whole = read_json(path)
    whole.setdefault("tuned", {})[place] = picks
    write_json(path, whole)
    print("tuned", place, picks, flush=True)
    return picks


def _matching(patterns: list[str], *parts: str) -> list[str]:
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
    order = np.resize(
        np.random.default_rng(100 * load.seed + 1).permutation(len(work.queries)), queries
    )
    pool = _pool(work, system, law, load, ground)
    counts: collections.Counter[str] = collections.Counter()

    def observe(what: str, number: float) -> None:
        if what in _COUNTED:
            counts[what] += 1

    predictor = None if system.predictor is None else system.predictor()

    def batcher_on(pool: AbstractPool) -> CodedBatcher | Balancer:
        if system.balancer is not None:
            return system.balancer(pool)
        return CodedBatcher(
            pool,
            Coder(system.code, system.models),
            work.queries.shape[1:],
            work.answers.shape[1:],
            policy=system.policy,
            predictor=predictor,
            observe=observe,
        )

    begin = time.time()
    with pool, batcher_on(pool) as batcher:
        outcomes = Outcomes(work, order, batcher, pool)
        (outcomes.stream if real else outcomes.plan)(arrivals)
        report = pool.report()
    student = counts["predict_seconds"] if system.policy.redundancy == "always" else queries
    extra = work.student_calls * student / queries if predictor is not None else 0.0
    return outcomes.summary(warm_up, rounds) | {
        "calls": (report.sent / queries) + extra,
        "audited": counts["audit_same"] + counts["audit_other"],
        "audited_other": counts["audit_other"],
        "drifts": counts["drift"],
        "again": counts["reexecution"] / queries,
        "seconds": round(time.time() - begin, 1),
    }


class Table:
    """The model's own answers, looked up, and `otherwise` for rows that are no queries."""

    def __init__(self, work: Work, otherwise: Callable[[np.ndarray], np.ndarray] | None):
        self.answers = {x.tobytes(): y for x, y in zip(work.queries, work.answers, strict=True)}
        self.otherwise = otherwise

    def __call__(self, batch: Any) -> np.ndarray:
        rows = np.asarray(batch, np.float32)
        known = [self.answers.get(row.tobytes()) for row in rows]
        if all(each is not None for each in known):
            return np.stack([each for each in known if each is not None])
        assert self.otherwise is not None
        return self.otherwise(rows)  # coded data points


def _pool(work: Work, system: System, law: Law, load: Load, ground: str) -> AbstractPool:
    # Compiled when coded data points come; of a function, none do, nor in what Ray's actors get.
    model = None if work.model is None else eqx.filter_jit(load_model(work.model))
    models: list[Any] = [Table(work, None if ground == "ray" else _narrow(model))]
    if len(system.models) > 1:
        models += [_narrow(parity) for parity in parity_models(work)]
    hangs = any(fault.kind == "hang" for fault in law.faults)
    options: dict[str, Any] = {"hang_timeout": 1.0 if hangs else 600.0}
    if ground in REAL_WORKERS:
        base = Fault("delay", latency=TraceLatency(jnp.array([load.base])))
        faults = Faults((base, *map(_from_now, law.faults)), seed=7)
        return REAL_WORKERS[ground](models, load.workers, compiled=False, faults=faults, **options)
    noise, draw = np.random.default_rng(100 * load.seed + 2), SERVICES[load.service][1]
    large = large_queries(load.service, load.base)
    faults = (*law.faults, *_slow_queries(work, law.hardest, load.base), *large)
    return SimulatedPool(
        models,
        load.workers,
        seconds=lambda size: load.base * draw(noise) + noise.exponential(0.0005),
        faults=Faults(faults, seed=100 * load.seed + 7),
        **options,
    )


def _slow_queries(work: Work, share: float, base: float) -> list[Fault]:
    """Return the fault that makes the hardest share of the queries slow, if any."""
    if not share:
        return []
    if work.tolerance is None:
        top = np.sort(work.answers, axis=1)
        hardness = top[:, -2] - top[:, -1]
    else:
        hardness = np.abs(work.answers).reshape(len(work.answers), -1).max(axis=1)
    hard = hardness >= np.quantile(hardness, 1 - share)
    slow = {row.tobytes() for row in work.queries[hard]}

    def score(batch: Any) -> list[bool]:
        return [row.tobytes() in slow for row in np.asarray(batch)]

    latency = TraceLatency(jnp.array([10 * base]))
    return [Fault("delay", latency=latency, score=score, least_score=1.0)]


def _from_now(fault: Fault) -> Fault:
    """Return the fault with its spells, if it has some, counted from now on."""
    if fault.episodes is None:
        return fault
    episodes = dataclasses.replace(fault.episodes, origin=time.time())
    return dataclasses.replace(fault, episodes=episodes)


def _narrow(model: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Return a model of few rows on the host, compiled for more."""

    def run(rows: np.ndarray) -> np.ndarray:
        wide = rows[np.arange(_WIDTH) % len(rows)]
        return np.asarray(model(jnp.asarray(wide)))[: len(rows)]

    return run


class Outcomes:
    """The outcome of each query."""

    def __init__(
        self,
        work: Work,
        order: np.ndarray,
        batcher: CodedBatcher | Balancer,
        pool: AbstractPool,
    ):
        self._work, self._order, self._batcher, self._pool = work, order, batcher, pool
        self.seconds = np.full(len(order), np.nan)
        self.right = np.zeros(len(order), bool)
        self.predicted, self.decoded = np.zeros(len(order), bool), np.zeros(len(order), bool)
        self.ended = 0

    def plan(self, arrivals: np.ndarray) -> None:
        """Run the stream by a clock that jumps."""
        clock: Any = self._pool.clock
        for number, when in enumerate(arrivals):
            clock.at(when, lambda number=number, when=when: self._send(number, when))
        while self.ended < len(arrivals):
            clock.step()

    def stream(self, arrivals: np.ndarray) -> None:
        """Run the stream as time goes by; latencies count from the scheduled arrival."""
        with short_collections():  # as `nercc serve` does
            begin = self._pool.clock.now()
            for number, when in enumerate(arrivals):
                left = begin + when - self._pool.clock.now()
                if left > 0:
                    time.sleep(left)
                self._send(number, begin + when)
            while self.ended < len(arrivals):
                time.sleep(0.01)

    def _send(self, number: int, scheduled: float) -> None:
        place = self._order[number]
        future = self._batcher.submit(self._work.queries[place][None])
        future.add_done_callback(lambda future: self._hear(number, scheduled, future))

    def _hear(self, number: int, scheduled: float, future: Any) -> None:
        self.ended += 1
        if future.exception() is not None:
            return
        reply: Reply = future.result()
        self.seconds[number] = self._pool.clock.now() - scheduled
        value, own = reply.values[0], self._work.answers[self._order[number]]
        if self._work.tolerance is None:
            self.right[number] = value.argmax() == own.argmax()
        else:
            self.right[number] = np.sqrt(np.mean((value - own) ** 2)) <= self._work.tolerance
        self.predicted[number] = reply.predicted[0]
        self.decoded[number] = not reply.exact[0] and not reply.predicted[0]

    def summary(self, warm_up: int, rounds: int) -> dict[str, Any]:
        """Return the numbers of judged queries; latencies with intervals unless `rounds` is 0."""
        judged = slice(warm_up, None)
        seconds = self.seconds[judged]
        lost = int(np.isnan(seconds).sum())
        seconds = np.nan_to_num(seconds, nan=60.0)
        if rounds:
            ends = block_bootstrap([seconds], tail_of, block=_BLOCK, rounds=rounds)
            numbers = np.round(np.array(ends).T, 3).tolist()
        else:
            numbers = np.round(tail_of(seconds), 3).tolist()
        tail: dict[str, Any] = dict(zip(_TAIL, numbers, strict=True))
        if len(seconds) >= _FEWEST_P9999:
            tail["p9999_ms"] = round(1e3 * float(np.quantile(seconds, 0.9999)), 3)
        return tail | {
            "queries": len(seconds),
            "lost": lost,
            "right": float(self.right[judged].mean()),
            "predicted": float(self.predicted[judged].mean()),
            "decoded": float(self.decoded[judged].mean()),
        }


def tail_of(seconds: np.ndarray) -> np.ndarray:
    """Return the numbers of `_TAIL`."""
    p50, p99, p999 = np.quantile(seconds, (0.5, 0.99, 0.999))
    return np.array([1e3 * p50, 1e3 * p99, 1e3 * p999, p99 / p50, p999 / p50])


def _described(cell: dict[str, Any]) -> str:
    p50, p99, p999 = (np.ravel(cell[key])[0] for key in _TAIL[:3])
    return (
        f"p50 {p50:.0f}, p99 {p99:.0f}, p99.9 {p999:.0f} ms; {cell['calls']:.3f} calls, right "
        f"{100 * cell['right']:.2f} %, predicted {100 * cell['predicted']:.1f} %, decoded "
        f"{100 * cell['decoded']:.1f} %, lost {cell['lost']}; {cell['seconds']} s"
    )


if __name__ == "__main__":
    main()
