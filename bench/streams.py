"""Streams of single queries, for benchmarks of tails: works that are served, laws, and a driver."""

import dataclasses
import functools
import gc
import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import simulators
from jaxtyping import Float
from report import RESULTS
from workloads import in_batches

from nercc_jax.pools import Fault
from nercc_jax.serving import Reply
from nercc_jax.stragglers import ExponentialLatency, ParetoLatency, TraceLatency
from nercc_models import load_data, load_model, load_student, student_card

ANY = "any model"


@dataclasses.dataclass(frozen=True)
class Work:
    """A served model: queries, its own answers, and the allowance for other answers.

    `wanted` is the share of stragglers' labels that may be another, by law where it is another than
    usual; or None with a `tolerance`: then answers may be off by so much. `student` costs
    `student_calls` of a call. `training()`: others of `model`, to tune codes on.
    """

    name: str
    queries: np.ndarray
    answers: np.ndarray
    wanted: float | None = None
    tolerance: float | None = None
    student: Any = None
    student_calls: float = 0.0
    model: str | None = None
    training: Callable[[], np.ndarray] = lambda: np.zeros(0)

    def run(self, rows: Any) -> np.ndarray:
        """Return the model's answers to rows that may be no queries, in calls of eight."""
        return in_batches(_loaded(str(self.model)), np.asarray(rows, np.float32), 8)

    def hardness(self, outputs: np.ndarray) -> Float[np.ndarray, " rows"]:
        """Return the peaks of a function's outputs, or the negative margins of labels."""
        if self.tolerance is not None:
            return np.abs(outputs).reshape(len(outputs), -1).max(axis=1)
        top = np.sort(outputs, axis=1)
        return top[:, -2] - top[:, -1]


@functools.cache
def _loaded(name: str) -> Any:
    return load_model(name)


def works(data_dir: Path | None) -> dict[str, Callable[[], Work]]:
    """Return makers of works by name; each is loaded when it is wanted."""
    images = functools.partial(_classifier, data_dir=data_dir)
    return {
        ANY: _any_model,
        "lenet5": lambda: images("lenet5-mnist", student=False),
        "repvgg": lambda: images("repvgg-cifar10"),
        "vit": lambda: images("vit-cifar10"),
        "lotka-volterra": _function,
        # It is calibrated on all of its training images.
        "digits": lambda: images("lenet5-digits", wanted=0.05, student=False, training=10_000),
    }


def _any_model() -> Work:
    """Return numbers that stand for any model: of exact answers, no tail depends on it."""
    queries = np.arange(10_000, dtype=np.float32)[:, None]
    answers = np.random.default_rng(0).normal(size=(len(queries), 2)).astype(np.float32)
    return Work(ANY, queries, answers, tolerance=1e-6)


def _classifier(
    name: str,
    data_dir: Path | None,
    wanted: float = 0.1,
    student: bool = True,
    training: int = 1000,
) -> Work:
    network = _loaded(name)
    x = network.preprocess(load_data(network.data, "test", data_dir=data_dir).images)
    x, share, cheap = np.asarray(x, np.float32), 0.0, None
    if student:
        cheap, card = load_student(name), student_card(name)
        share = card["multiplications"] / card["base_multiplications"]

    def others() -> np.ndarray:
        images = load_data(network.data, "train", data_dir=data_dir).images
        chosen = np.random.default_rng(0).permutation(len(images))[:training]
        return np.asarray(network.preprocess(images[chosen]), np.float32)

    y = in_batches(network, x, 100).astype(np.float32)
    return Work(name, x, y, wanted, None, cheap, share, name, others)


def _function() -> Work:
    case = simulators.load("Lotka-Volterra")
    x = case.inputs(True, 0, 5000)
    y = in_batches(case.function, x, 100).astype(np.float32)
    return Work("Lotka-Volterra", x, y, tolerance=0.05 * float(y.std()))


class Lookup:
    """The model's own answers, looked up, and `otherwise` for rows that are no queries."""

    def __init__(
        self, x: np.ndarray, y: np.ndarray, otherwise: Callable[[np.ndarray], np.ndarray] | None
    ):
        self.answers = {row.tobytes(): answer for row, answer in zip(x, y, strict=True)}
        self.otherwise = otherwise

    def __call__(self, batch: Any) -> np.ndarray:
        rows = np.asarray(batch, np.float32)
        known = [self.answers.get(row.tobytes()) for row in rows]
        if all(each is not None for each in known):
            return np.stack([each for each in known if each is not None])
        assert self.otherwise is not None
        return self.otherwise(rows)  # coded data points


def slow_rows(rows: np.ndarray, seconds: float) -> Fault:
    """Return the fault that makes the calls of these queries longer, copies too."""
    slow = {row.tobytes() for row in rows}

    def latency(batch: Any) -> float:
        return seconds * any(row.tobytes() in slow for row in np.asarray(batch))

    return Fault("delay", latency=latency)


def play(
    batcher: Any,
    pool: Any,
    x: np.ndarray,
    arrivals: Float[np.ndarray, " queries"],
    hear: Callable[[int, float, Reply | None], Any],
    *,
    real: bool = False,
) -> None:
    """Send single queries when they are due, and `hear` of each answer and its seconds.

    A simulated pool's clock jumps. Latencies count from the scheduled arrival.
    """
    clock, ended = pool.clock, [0]

    def send(number: int, due: float) -> None:
        def answered(future: Any) -> None:
            ended[0] += 1
            failed = future.exception() is not None
            hear(number, clock.now() - due, None if failed else future.result())

        batcher.submit(x[number][None]).add_done_callback(answered)

    if real:
        gc.collect()
        gc.freeze()  # as `nercc serve` does
        begin = clock.now()
        for number, when in enumerate(arrivals):
            time.sleep(max(begin + when - clock.now(), 0))
            send(number, begin + when)
        while ended[0] < len(arrivals):
            time.sleep(0.01)
        return
    for number, when in enumerate(arrivals):
        clock.at(when, lambda number=number, when=when: send(number, when))
    while ended[0] < len(arrivals):
        clock.step()


# --- laws


@dataclasses.dataclass(frozen=True)
class Law:
    """A law of stragglers, in addition to the service time of every call.

    `hardest` is the share of the queries, the hardest ones, whose calls take 10 service times more.
    """

    name: str
    words: str
    faults: tuple[Fault, ...]
    hardest: float = 0.0


# Seconds of calls, over their median (`python bench/run.py service_times`).
RECORDED = RESULTS / "service_times.json"


@functools.cache
def _recorded() -> np.ndarray:
    return np.array(json.loads(RECORDED.read_text())["ratios"])


# Service times as multiples of the base, for a generator of random numbers.
SERVICES: dict[str, tuple[str, Callable[[np.random.Generator], float]]] = {
    "constant": ("the base", lambda random: 1.0),
    "lognormal 0.2": (
        "a lognormal law with a standard deviation of 0.2 of its logarithm",
        lambda random: random.lognormal(0.0, 0.2),
    ),
    "lognormal 0.44": (
        "the same with 0.44, so that p90 is 1.76 times the median",
        lambda random: random.lognormal(0.0, 0.44),
    ),
    "bimodal": (
        "one call in five takes twice as long",
        lambda random: 1.0 + (random.random() < 0.2),
    ),
    "bimodal by query": (
        "one query in five is large: each of its calls, copies too, takes twice as long",
        lambda random: 1.0,
    ),
    "recorded": (
        "what calls of LeNet5 on Ray actors took on a machine of two cores, one drawn for each",
        lambda random: random.choice(_recorded()),
    ),
}


def large_queries(service: str, queries: np.ndarray, base: float) -> list[Fault]:
    """Return what makes calls of large queries, a fifth of all by their checksum, longer."""
    if service != "bimodal by query":
        return []
    large = [zlib.crc32(row.tobytes()) % 5 == 0 for row in queries]
    return [slow_rows(queries[large], base)]


@dataclasses.dataclass(frozen=True)
class Spells:
    """Random spells of time from a seed, with exponential lengths and pauses, from `origin` on.

    They begin every so many seconds, in the mean, and last so many: `when` of a `Fault`.
    """

    every: float
    lasting: float
    seed: int = 0
    origin: float = 0.0

    def __call__(self, now: float) -> bool:
        edges = _edges(self.every, self.lasting, self.seed)
        return bool(np.searchsorted(edges, now - self.origin, side="right") % 2)


@functools.cache
def _edges(every: float, lasting: float, seed: int) -> np.ndarray:
    """Return when spells begin and end, one after the other."""
    drawn = np.random.default_rng([seed, 0x5BE11]).exponential(size=(8192, 2))
    return np.cumsum(drawn * [every - lasting, lasting])


def laws(base: float, num_workers: int, seed: int = 0) -> dict[str, Law]:
    """Return laws by name, in units of the base service time.

    A rack that dies loses what it has in hand. Each seed has other spells.
    """
    seed *= 10_000
    tenfold, rack = TraceLatency(jnp.array([10 * base])), tuple(range(num_workers // 4))

    def spells(every: float, last: float, number: int) -> Spells:
        return Spells(every, last, number + seed)

    found = [
        Law(
            f"{share} %",
            f"each call independently, with probability {share} %: 10 service times more",
            (Fault("delay", share / 100, latency=tenfold),),
        )
        for share in (1, 5, 15)
    ] + [
        Law(
            "5 %, Pareto",
            "each call independently, with probability 5 %: a Pareto tail (5 service times at "
            "least, shape 1.5) more",
            (Fault("delay", 0.05, latency=ParetoLatency(5 * base, 1.5)),),
        ),
        Law(
            "slow workers",
            "each worker by itself has spells (2 s on average, every 20 s) in which each of its "
            "calls takes an exponential time, 10 service times on average, more",
            tuple(
                Fault(
                    "delay", workers=(worker,), latency=ExponentialLatency(10 * base),
                    when=spells(20.0, 2.0, worker),
                )
                for worker in range(num_workers)
            ),
        ),
        Law(
            "slow rack",
            f"{len(rack)} of the {num_workers} workers together have spells (1 s on average, every "
            "5 s) in which their calls take 10 service times more; every system meets the same "
            "spells",
            (Fault("delay", workers=rack, latency=tenfold, when=spells(5.0, 1.0, 1005)),),
        ),
        Law(
            "rack dies",
            f"{len(rack)} of the {num_workers} workers hang together for 2 s every 20 s, on "
            "average, and come back a second later",
            (Fault("hang", 1.0, workers=rack, when=spells(20.0, 2.0, 77)),),
        ),
        Law(
            "hard queries",
            "the hardest 5 % of the queries (smallest margins, largest peaks): each of their "
            "calls, copies too, takes 10 service times more",
            (),
            hardest=0.05,
        ),
    ]  # fmt: skip
    return {law.name: law for law in found}
