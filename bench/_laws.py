"""Laws by which workers straggle in benchmarks of tails."""

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from nercc_jax.pools import Episodes, Fault
from nercc_jax.stragglers import ExponentialLatency, ParetoLatency, TraceLatency


@dataclasses.dataclass(frozen=True)
class Law:
    """A law of stragglers, in addition to the service time of every call.

    `hardest` is the share of the queries, the hardest ones, whose calls take 10 service times more.
    """

    name: str
    words: str
    faults: tuple[Fault, ...]
    hardest: float = 0.0


# Seconds of calls, over their median (`python bench/tails.py --record`).
RECORDED = Path(__file__).parent / "results" / "service_times.json"


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


def large_queries(service: str, base: float) -> list[Fault]:
    """Return what makes calls of large queries, a fifth of all by their checksum, longer."""
    if service != "bimodal by query":
        return []

    def score(batch: Any) -> list[bool]:
        return [zlib.crc32(row.tobytes()) % 5 == 0 for row in np.asarray(batch)]

    latency = TraceLatency(jnp.array([base]))
    return [Fault("delay", latency=latency, score=score, least_score=1.0)]


def laws(base: float, num_workers: int, seed: int = 0) -> dict[str, Law]:
    """Return laws by name, in units of the base service time.

    A rack that dies loses what it has in hand. Each seed has other spells.
    """
    seed *= 10_000
    tenfold = TraceLatency(jnp.array([10 * base]))
    rack = tuple(range(num_workers // 4))
    independent = [
        Law(
            f"{share} %",
            f"each call independently, with probability {share} %: 10 service times more",
            (Fault("delay", share / 100, latency=tenfold),),
        )
        for share in (1, 5, 15)
    ]
    pareto = Law(
        "5 %, Pareto",
        "each call independently, with probability 5 %: a Pareto tail (5 service times at least, "
        "shape 1.5) more",
        (Fault("delay", 0.05, latency=ParetoLatency(5 * base, 1.5)),),
    )
    sticky = Law(
        "slow workers",
        "each worker by itself has spells (2 s on average, every 20 s) in which each of its calls "
        "takes an exponential time, 10 service times on average, more",
        tuple(
            Fault(
                "delay",
                workers=(worker,),
                latency=ExponentialLatency(10 * base),
                episodes=Episodes(20.0, 2.0, seed=worker + seed, origin=0.0),
            )
            for worker in range(num_workers)
        ),
    )
    rack_law = Law(
        "slow rack",
        f"{len(rack)} of the {num_workers} workers together have spells (1 s on average, every "
        "5 s) in which their calls take 10 service times more; every system meets the same spells",
        (
            Fault(
                "delay",
                workers=rack,
                latency=tenfold,
                episodes=Episodes(5.0, 1.0, seed=1005 + seed, origin=0.0),
            ),
        ),
    )
    rack_dies = Law(
        "rack dies",
        f"{len(rack)} of the {num_workers} workers hang together for 2 s every 20 s, on average, "
        "and come back a second later",
        (
            Fault(
                "hang", 1.0, workers=rack, episodes=Episodes(20.0, 2.0, seed=77 + seed, origin=0.0)
            ),
        ),
    )
    hard = Law(
        "hard queries",
        "the hardest 5 % of the queries (smallest margins, largest peaks): each of their calls, "
        "copies too, takes 10 service times more",
        (),
        hardest=0.05,
    )
    found = (*independent, pareto, sticky, rack_law, rack_dies, hard)
    return {law.name: law for law in found}
