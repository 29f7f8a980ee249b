"""What latency.py compares: ways to serve a stream, and laws by which workers straggle."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _latency_stream import Rule, System

from nercc_jax import (
    AbstractCode,
    Berrut,
    ExactStragglers,
    NeRCC,
    Parity,
    Replication,
    Uncoded,
    load_code,
    save_code,
    tune,
)
from nercc_jax.codes import Layout
from nercc_jax.pools import Episodes, Fault, Faults, Overdue
from nercc_jax.stragglers import ExponentialLatency, ParetoLatency, TraceLatency

# The pool's models: the served one, and ParM's for k = 2 and 4.
PARITIES = (2, 4)
P95 = Overdue(0.95, 1.0, floor=0.0)


# Found by the grid of `latency.py --rules`; the same for every system, and for tuned hedging.
PATIENCE = 1.4
FILL = 2.0

# A task out for longer is overdue: what its batch has waiting, or a copy of it, is sent.
_HEDGED = Overdue(0.5, PATIENCE, floor=0.0)
# (N, K) of the interleaved codes.
INTERLEAVED = ((10, 8), (12, 8), (16, 8), (6, 4), (8, 4))
# A copy sent after 1.4 service times answers at 2.4: only what it did not rescue is decoded.
_LAST_RESORT = 2.0 * PATIENCE


def systems(codes: "Codes") -> tuple[System, ...]:
    """All that are compared, the simplest first."""
    alone = Uncoded(1)
    return (
        System("uncoded, groups of 8", Uncoded(8), whole=True),
        System("equal resources", alone),
        System("replication, 2 copies", Replication(1, 2), needed=1, overdue=_HEDGED),
        System("hedging, p95", alone, copies=2, overdue=P95),
        System("hedging, 1.4 x median", alone, copies=2, overdue=_HEDGED),
        System("hedging, 1.4 x median, 3 copies", alone, copies=3, overdue=_HEDGED),
        _parity(2, PATIENCE),
        _parity(4, PATIENCE),
        _full_groups("BACC (12, 8)", Berrut(8, 12), 10),
        _full_groups("NeRCC Chebyshev (12, 8)", codes.chebyshev, 10),
        *(_interleaved(code) for code in codes.interleaved.values()),
        _hedged(codes.interleaved[6, 4]),
    )


def rule_systems(codes: "Codes") -> tuple[System, ...]:
    """The grid that the rules come from: how long to wait, of how many, and when to fill up."""
    alone = Uncoded(1)
    made = [
        System("equal resources", alone),
        System("hedging, p90", alone, copies=2, overdue=Overdue(0.9, 1.0, floor=0.0)),
        _parity(2, 0.0),
    ]
    for factor in (1.2, 1.4, 1.8):
        overdue = Overdue(0.5, factor, floor=0.0)
        made += [
            System(f"hedging, {factor} x median", alone, copies=2, overdue=overdue),
            _parity(2, factor),
            _interleaved(codes.interleaved[12, 8], patience=factor),
        ]
    made += [_interleaved(codes.interleaved[12, 8], enough=enough) for enough in (8, 12)]
    made += [_interleaved(codes.interleaved[12, 8], fill=fill) for fill in (1.0, None)]
    made += [
        _full_groups(f"BACC (12, 8), enough {enough}", Berrut(8, 12), enough)
        for enough in (10, 11, 12)
    ]
    made += [_hedged(codes.interleaved[shape]) for shape in ((12, 8), (6, 4))]
    return tuple(made)


def _interleaved(code: NeRCC, **changes: Any) -> System:
    """A stream behind an interleaved code; half of its redundancy may straggle unawaited."""
    n, k = code.num_workers, code.num_data
    rule = Rule(PATIENCE, n - (n - k) // 2, k - 2, FILL)
    told = "".join(f", {name} {value}" for name, value in changes.items())
    rule = dataclasses.replace(rule, **changes)
    return System(f"NeRCC ({n}, {k}){told}", code, rule, overdue=_HEDGED)


def _parity(k: int, patience: float) -> System:
    """ParM on the parity model for k; with no patience as published, decoding what it can."""
    told = {PATIENCE: "", 0.0: ", at once"}.get(patience, f", patience {patience}")
    return System(
        f"ParM, k = {k}{told}",
        Parity(k, k + 1),
        Rule(patience, k, 1, FILL),
        overdue=_HEDGED,
        models=(0, 1 + PARITIES.index(k)),
    )


def _full_groups(name: str, code: AbstractCode, enough: int) -> System:
    """A code of which no worker sees a query as it came: decoded when so many have answered."""
    rule = Rule(PATIENCE, enough, code.num_data, FILL)
    return System(name, code, rule, overdue=_HEDGED, needed=enough)


def _hedged(code: NeRCC) -> System:
    """The same with a second copy of each straggler, and decoding as the last resort."""
    plain = _interleaved(code, patience=_LAST_RESORT)
    return dataclasses.replace(
        plain,
        name=f"NeRCC ({code.num_workers}, {code.num_data}), hedged",
        copies=2,
        needed=code.num_workers,
    )


@dataclasses.dataclass(frozen=True)
class Codes:
    """NeRCC's codes, tuned."""

    chebyshev: NeRCC
    interleaved: dict[tuple[int, int], NeRCC]


def tuned_codes(folder: Path, model, images: np.ndarray) -> Codes:
    """From their files where those are there; tuning all takes some minutes."""
    return Codes(
        _tuned(folder, model, images, 12, 8, "chebyshev"),
        {(n, k): _tuned(folder, model, images, n, k, "interleaved") for n, k in INTERLEAVED},
    )


def _tuned(
    folder: Path, model, images: np.ndarray, num_workers: int, num_data: int, points: Layout
) -> NeRCC:
    """A code with lambdas and points by gradient descent, for up to four stragglers."""
    path = folder / f"latency-lenet5-mnist-{num_workers}-{num_data}-{points}.json"
    if path.exists():
        code = load_code(path)
        assert isinstance(code, NeRCC)
        return code
    own = points == "interleaved"
    start = NeRCC(num_data, num_workers, points=points, lambda_dec=0.0 if own else None)
    # Without stragglers an interleaved code is exact already.
    most = min(4, num_workers - num_data)
    laws = {str(s): ExactStragglers(s) for s in range(1 if own else 0, most + 1)}
    x = jnp.asarray(images)
    tuned = tune(model, start, x, laws, key=jax.random.key(0), points=True).code
    if own:
        # Tuning walks on log lambda_enc; queries must go out as they came.
        tuned = eqx.tree_at(lambda code: code.lambda_enc, tuned, jnp.zeros_like(tuned.lambda_enc))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_code(path, tuned, {"model": "lenet5-mnist", "outputs": "logits", "stragglers": list(laws)})
    return tuned


@dataclasses.dataclass(frozen=True)
class Law:
    """How workers straggle, beside the base delay of every call."""

    name: str
    words: str
    faults: tuple[Fault, ...]


def laws(base: float, num_workers: int) -> tuple[Law, ...]:
    """The laws, in units of the base service time."""
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
                episodes=Episodes(20.0, 2.0, seed=worker, origin=0.0),
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
                episodes=Episodes(5.0, 1.0, seed=1005, origin=0.0),
            ),
        ),
    )
    return (*independent, pareto, sticky, rack_law)


@dataclasses.dataclass(frozen=True)
class Turns(Episodes):
    """One law's turns: `lasting` seconds out of every `every`, from `origin` on.

    A pool's faults are fixed when its workers start, which takes a minute; so all laws share one
    pool, and take turns. With `within`, the turn's spells are that law's, and the same ones in each
    `slot` seconds from `lead` seconds after its start: a rack's spells are few, and every system
    must meet the same. Each turn has others.
    """

    within: Episodes | None = None
    lead: float = 0.0
    slot: float = 1.0

    def spells(self) -> Iterator[tuple[float, float]]:
        for turn in itertools.count():
            start = self.origin + turn * self.every
            if self.within is None:
                yield start, start + self.lasting
                continue
            pattern = _window(self.within, turn * self.slot, (turn + 1) * self.slot)
            for number in range(int((self.lasting - self.lead) / self.slot)):
                shift = start + self.lead + (number - turn) * self.slot
                for begin, end in pattern:
                    yield shift + begin, shift + end


def _window(episodes: Episodes, start: float, end: float) -> list[tuple[float, float]]:
    """The spells between two times, cut off at both."""
    before = itertools.takewhile(lambda spell: spell[0] < end, episodes.spells())
    return [(max(begin, start), min(stop, end)) for begin, stop in before if stop > start]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which law rules when: one after the other, `turn` seconds each, again and again.

    A turn has blocks of `slot` seconds each, from `lead` seconds after its start.
    """

    origin: float
    turn: float
    number: int
    lead: float
    slot: float

    def start(self, count: int) -> float:
        """When a turn begins, in seconds since the epoch; law `count % number` rules in it."""
        return self.origin + count * self.turn

    def faults(self, base: float, laws: Sequence[Law]) -> Faults:
        """The base delay of every call, and every law in its turns."""
        parts = [Fault("delay", latency=TraceLatency(jnp.array([base])))]
        for index, law in enumerate(laws):
            for fault in law.faults:
                turns = Turns(
                    every=self.number * self.turn + 1e-9,  # an episode must not fill its period
                    lasting=self.turn,
                    origin=self.start(index),
                    within=fault.episodes,
                    lead=self.lead,
                    slot=self.slot,
                )
                parts.append(dataclasses.replace(fault, episodes=turns))
        return Faults(tuple(parts), seed=7)
