"""Which code, how many workers, when to decode and what to send again; or nothing of the kind."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ..codes import check_counts, check_not_negative, regression_points
from ..evaluation import Estimate
from ..inference import Conditions, Model, check_model
from ..risk import ErrorProbability
from ..schemes import Scheme
from ..stragglers import AbstractLatency, Latencies
from ..surrogates import Surrogate
from ._candidates import Candidate, feasible, uncoded_systems
from ._codes import TOLD_SETS, Codes, Half
from ._known import KNOWN, known_systems

PLANNED = ("chebyshev", "interleaved", "repeated")

_FORMAT, _VERSION = "nercc-jax plan", 1
# The p99 of two systems is told apart beyond this; among equals the cheaper is better.
ALIKE = 0.03


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` measured, and what it recommends: `recommended`, because of `reason`.

    `error_probability` is the recommended system's, where it sends again what is uncertain. `asked`
    are the arguments of `plan` that it answers to, by name; `about` is what it was measured
    on, and how many seconds that took.
    """

    candidates: tuple[Candidate, ...]
    recommended: Candidate
    reason: str
    error_probability: ErrorProbability | None
    asked: dict[str, Any]
    about: dict[str, Any]

    def scheme(self, surrogate: Callable[[Array], Array] | None = None) -> Scheme:
        """The recommended system, to run by `coded_inference`.

        `surrogate`: the one that was planned with, where the recommended system orders by it, or
        answers stragglers' queries by it.

        Raises: ValueError where that is missing.
        """
        ordered, code = self.recommended.order, self.recommended.code
        known = self.recommended.system == KNOWN
        if (ordered == "surrogate" or known) and surrogate is None:
            raise ValueError("this plan orders by a surrogate, or answers by it: give it")
        order = surrogate if ordered == "surrogate" else "pixels" if ordered else None
        beside = Surrogate(surrogate) if known and surrogate is not None else None
        size = self.asked["buffer_size"]
        return Scheme(
            code,
            surrogate=beside,
            error_probability=self.error_probability,
            order=order,
            buffer_size=size,
        )

    def feasible(self, candidate: Candidate) -> bool:
        """Whether a candidate keeps to what was asked for, and is known well enough to say so."""
        return feasible(candidate, self.asked)

    def save(self, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
        """Writes the plan as JSON, `about` added to what it says of itself; `load_plan` reads it.

        Raises: TypeError where `about` is no JSON, OSError as `open` does.
        """
        rows = [dataclasses.asdict(candidate) for candidate in self.candidates]
        error_probability = self.error_probability and {
            field.name: np.asarray(getattr(self.error_probability, field.name)).tolist()
            for field in dataclasses.fields(self.error_probability)
            if field.name not in ("form", "conditions")  # plans are for vectors
        }
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "recommended": dataclasses.asdict(self.recommended),
            "reason": self.reason,
            "asked": self.asked,
            "about": self.about | dict(about or {}),
            "doubt": error_probability,
            "conditions": self.error_probability
            and dataclasses.asdict(self.error_probability.conditions),
            "candidates": rows,
        }
        Path(path).write_text(json.dumps(content, indent=1) + "\n")


def load_plan(path: str | Path) -> Plan:
    """The plan that `Plan.save` wrote.

    Of files that do not say at which precision and where their doubt was calibrated, its
    `conditions` are "unknown", and so it warns of none.

    Raises: ValueError, naming the file, where it holds none; OSError as `open` does.
    """
    try:
        content = json.loads(Path(path).read_text())
        if content["format"] != _FORMAT or content["version"] != _VERSION:
            raise ValueError(f"it does not say 'format': {_FORMAT!r}, 'version': {_VERSION}")
        error_probability: Any = content["doubt"] and {
            name: jnp.asarray(value, float) for name, value in content["doubt"].items()
        }
        conditions = Conditions(**(content.get("conditions") or {}))
        rows = tuple(_candidate(row) for row in content["candidates"])
        return Plan(
            rows,
            _candidate(content["recommended"]),
            content["reason"],
            ErrorProbability(**error_probability, conditions=conditions)
            if error_probability
            else None,
            content["asked"],
            content["about"],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no plan: {error}") from error


def _candidate(row: dict[str, Any]) -> Candidate:
    return Candidate(**{**row, "disagreement": Estimate(**row["disagreement"])})


def plan(
    model: Model,
    x: Float[ArrayLike, "points ..."],
    latency: AbstractLatency,
    *,
    key: PRNGKeyArray,
    num_queries: int = 8,
    max_workers: int = 20,
    max_extra_work: float = 1.5,
    max_disagreement: float = 0.005,
    num_data: Sequence[int] | None = None,
    layouts: Sequence[str] = PLANNED,
    surrogate: Callable[[Array], Array] | None = None,
    buffer_size: int | None = None,
    overhead: float = 0.0,
    batch_size: int = 256,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Plan:
    """Finds the way to serve a model with the least p99 latency that the budget allows.

    Compared are: one worker a query ("uncoded"); another copy for what is not answered after a
    quantile of the latency, the quantile chosen ("hedged"); copies from the start ("replication");
    what a surrogate, where there is one, is sure enough of, and copies of the rest ("known, else
    hedged"); and NeRCC codes, with and without ordering. What a group of workers has not answered
    in time counts as wrong, or is decoded, or is sent again; of decoded ones, only those in doubt
    are.
    Recommended is the least p99 among those within the budget; of what is within 3 % of it, the
    least extra work, and then the least disagreement.

    **Time** is the same for all: `num_queries` come together, and the clock runs until the last of
    them is answered, by a worker's answer to the query itself or by decoding. All calls take
    independent draws of `latency`, on workers that are free; a copy that comes too late counts as a
    whole call. What the master does (ordering, encoding, sending, decoding, a surrogate) takes
    `overhead` in all. If your workers straggle together, or queue, this flatters all systems,
    hedging above all. Each p99 is of up to 20,000 draws, the same for all.

    **Disagreement** is measured: doubt is calibrated, and codes and rules are screened, on one
    random half of `x`. The fastest of them, 10 as they are and 10 with re-execution at most, meet
    the other half with straggler sets of their own; of those that keep to `max_disagreement` there,
    by the end of their 99 % interval, one is recommended. To be chosen from several flatters it:
    expect its mean, but not that end, to be somewhat exceeded on data that chose nothing
    (`bench/plan.py` measures on such). Of a thousand data points 0.9 % can be promised at
    best, of two thousand 0.5 %: none wrong of the half that is held out.

    - `model`: maps (B, ...) to vectors (B, outputs), and is compiled.
    - `x`: unlabelled data points as they will come, floats; those that the model was trained on
      promise too much. `latency`: seconds a call takes (a law, or `TraceLatency.from_file`).
    - `max_workers`: at most so many workers for the first copies of `num_queries` queries.
      `max_extra_work`: calls beyond one a query, as a share, in the mean. `max_disagreement`: at
      most such a share of labels may differ.
    - `num_data`: numbers of queries to code together, divisors of `num_queries`; all of them and
      half of them unless given. `layouts`: NeRCC's, as in `regression_points`. `surrogate`: a
      cheap model to order by, and to answer by.
    - `buffer_size`: how many waiting queries are ordered at a time; those that come together unless
      given. How long queries wait for others is not counted. `overhead`: seconds, measured or
      guessed, that are added to the time of every system.
    - `batch_size`: data points that the model is run on at a time. `on_stage`: told what comes
      next, in words.

    Raises: ValueError for numbers out of range, unknown layouts, latencies that are not finite or
    negative, a model in training mode, too few data points to fill a group in both halves, and data
    points or outputs that are not finite.
    """
    begin = time.perf_counter()
    num_queries, max_workers, buffer_size = check_counts(
        num_queries=num_queries,
        max_workers=max_workers,
        buffer_size=num_queries if buffer_size is None else buffer_size,
    )
    asked = {
        "num_queries": num_queries,
        "max_workers": max_workers,
        "max_extra_work": float(max_extra_work),
        "max_disagreement": float(max_disagreement),
        "buffer_size": buffer_size,
        "overhead": float(overhead),
    }
    check_model(model)
    _check(asked, np.shape(x))
    sizes = _sizes(num_data, num_queries)
    for layout in layouts:
        regression_points(num_queries, num_queries + 1, layout)  # says what is wrong with it
    keys = jax.random.split(key, 3)
    latencies = Latencies(latency, keys[0])
    on_stage("systems without a code")
    exact = list(uncoded_systems(latencies, asked))
    doubts: dict[Candidate, ErrorProbability] = {}
    fastest = min(row.p99 for row in exact if row.exact and feasible(row, asked))
    on_stage("the model's own answers")
    halves = [
        Half(model, part, asked["buffer_size"], surrogate, batch_size)
        for part in _in_halves(np.asarray(x), keys[1])
    ]
    known: list[Candidate] = []
    if surrogate is not None:
        known, doubts = known_systems(latencies, asked, (halves[0], halves[1]))
    codes = Codes(latencies, asked, (halves[0], halves[1]), fastest)
    on_stage("screening codes")
    orders = (None, "pixels") + (() if surrogate is None else ("surrogate",))
    screened = codes.screen(sizes, layouts, orders)
    on_stage("measuring on held-out data")
    coded, of_codes = codes.measure(screened, keys[2])
    doubts |= of_codes
    found = (*exact, *known, *coded, *(entry.row for entry in screened))
    rows = tuple(_later(row, asked["overhead"]) for row in found)
    best = _best(rows, asked)
    about = {
        "calibration_points": len(halves[0].x),
        "held_out_points": len(halves[1].x),
        "straggler_sets": TOLD_SETS,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    error_probability = doubts.get(found[rows.index(best)])
    return Plan(rows, best, _reason(best, rows, asked), error_probability, asked, about)


def _later(row: Candidate, seconds: float) -> Candidate:
    return dataclasses.replace(row, p50=row.p50 + seconds, p99=row.p99 + seconds)


def _in_halves(x: np.ndarray, key: PRNGKeyArray) -> list[np.ndarray]:
    """A random half, the other half; each in the order given."""
    order = np.asarray(jax.random.permutation(key, len(x)))
    return [x[np.sort(part)] for part in (order[: len(x) // 2], order[len(x) // 2 :])]


def _check(asked: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    queries, workers = asked["num_queries"], asked["max_workers"]
    if workers < queries:
        raise ValueError(
            f"{queries} queries that come together need {queries} workers at least, not {workers}"
        )
    if asked["buffer_size"] < queries:
        raise ValueError(
            f"buffer_size {asked['buffer_size']} is less than the {queries} queries that come "
            "together"
        )
    check_not_negative(max_extra_work=asked["max_extra_work"], overhead=asked["overhead"])
    if not 0 <= asked["max_disagreement"] <= 1:
        raise ValueError(f"max_disagreement must be in [0, 1], not {asked['max_disagreement']}")
    if not shape or shape[0] < 2 * queries:
        raise ValueError(
            f"x of shape {shape} fills no group of {queries} in both halves: give {2 * queries} "
            "data points at least, and a thousand to promise 1 %"
        )


def _sizes(num_data: Sequence[int] | None, queries: int) -> list[int]:
    if num_data is None:
        num_data = [size for size in (queries, queries // 2) if size > 1 and queries % size == 0]
    if broken := [size for size in num_data if not 1 <= size <= queries or queries % size]:
        raise ValueError(f"num_data must be divisors of the {queries} queries, not {broken}")
    return list(num_data)


def _best(rows: Sequence[Candidate], asked: Mapping[str, Any]) -> Candidate:
    allowed = [row for row in rows if feasible(row, asked)]
    least = min(row.p99 for row in allowed)  # "uncoded" always is one
    alike = [row for row in allowed if row.p99 <= (1 + ALIKE) * least]
    return min(alike, key=lambda row: (round(row.extra_work, 3), row.most_disagreement, row.p99))


def _reason(best: Candidate, rows: Sequence[Candidate], asked: Mapping[str, Any]) -> str:
    """Why the best is the best, in one sentence."""
    others = [row for row in rows if feasible(row, asked) and row.system != best.system]
    told = f"{_words(best)} answers all {asked['num_queries']} queries within {_ms(best.p99)} (p99)"
    if not best.exact:
        told += f", with at most {100 * best.most_disagreement:.2f} % of labels different"
    if not others:
        return f"{told}; nothing else keeps to the budget."
    second = min(others, key=lambda row: row.p99)
    name, time = _words(second), _ms(second.p99)
    if second.p99 <= (1 + ALIKE) * best.p99:
        share = f"{100 * ALIKE:.0f} %"
        return f"{told}; nothing is faster by more than {share} ({name} takes {time})."
    return f"{told}; the next best system within the budget, {name}, takes {time}."


def _words(row: Candidate) -> str:
    size = "" if row.num_workers == row.num_data else f" ({row.num_workers}, {row.num_data})"
    again = " with re-execution" if row.limit is not None and row.system != KNOWN else ""
    return f"{row.system}{size}{again}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
