"""The plan for a service: which code, when to decode, and what to send again; or none."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ..codes import regression_points
from ..codes._checks import check_counts, check_not_negative
from ..codes.whole_files import JsonFormat
from ..evaluation import Estimate
from ..evaluation.tables import text_table
from ..inference.models import Conditions, Model, check_model
from ..risk import ErrorProbability
from ..schemes import Scheme
from ..stragglers import AbstractLatency
from ..stragglers.groups import Latencies
from ._planner import DOUBTED, KNOWN, Candidate, Half, PlanEffort, Planner

_FORMAT = JsonFormat(
    "plan",
    frozenset({"recommended", "reason", "asked", "about", "doubt", "candidates"}),
    frozenset({"conditions"}),
    editable=True,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The systems that `plan` measured, and its recommendation.

    Attributes:
        candidates: All systems that were measured.
        recommended: The recommended one.
        reason: Why it is recommended.
        error_probability: The surrogate's, where the recommended system gives out its answers.
        asked: The arguments of `plan`, by name.
        about: The data that it was measured on, and the seconds that took.
    """

    candidates: tuple[Candidate, ...]
    recommended: Candidate
    reason: str
    error_probability: ErrorProbability | None
    asked: dict[str, Any]
    about: dict[str, Any]

    @classmethod
    def of(
        cls,
        candidates: Sequence[Candidate],
        asked: dict[str, Any],
        about: dict[str, Any],
        alike: float = PlanEffort.alike,
        probability: ErrorProbability | None = None,
    ) -> "Plan":
        """Return the plan that recommends the best of those that keep to what is asked.

        p99s that differ by a share of `alike` at most are equal; the cheaper is then better. The
        surrogate has this error probability.
        """
        allowed = [row for row in candidates if row.feasible(asked)]  # "uncoded" always is one
        least = min(row.p99 for row in allowed)
        equal = [row for row in allowed if row.p99 <= (1 + alike) * least]
        best = min(
            equal, key=lambda row: (round(row.extra_work, 3), row.most_disagreement, row.p99)
        )

        def words(row: Candidate) -> tuple[str, str]:
            size = f" ({row.num_workers}, {row.num_data})" * (row.num_workers != row.num_data)
            again = " with re-execution" if row.limit == 0 else ""
            return f"{row.system}{size}{again}", f"{1e3 * row.p99:.3g} ms"

        name, seconds = words(best)
        reason = f"{name} answers all {asked['num_queries']} queries within {seconds} (p99)"
        if not best.exact:
            reason += f", with at most {100 * best.most_disagreement:.2f} % of labels different"
        others = [row for row in allowed if row.system != best.system]
        then = "nothing else keeps to the budget"
        if others:
            second = min(others, key=lambda row: row.p99)
            name, seconds = words(second)
            then = f"the next best system within the budget, {name}, takes {seconds}"
            if second.p99 <= (1 + alike) * best.p99:
                faster = f"nothing is faster by more than {100 * alike:.0f} %"
                then = f"{faster} ({name} takes {seconds})"
        doubt = probability if best.system == KNOWN else None
        return cls(tuple(candidates), best, f"{reason}; {then}.", doubt, asked, about)

    def scheme(self, surrogate: Callable[[Array], Array] | None = None) -> Scheme:
        """Return the recommended system, to run by `coded_inference`.

        Args:
            surrogate: The surrogate that was planned with, where the recommended system orders by
                it, or answers stragglers' queries by it.

        Raises:
            ValueError: The surrogate is missing.
        """
        further = {"buffer_size": self.asked["buffer_size"]}
        doubt = self.error_probability
        return self.recommended.scheme(surrogate, error_probability=doubt, **further)

    def feasible(self, candidate: Candidate) -> bool:
        """Return whether a candidate keeps to what was asked for, with enough certainty."""
        return candidate.feasible(self.asked)

    def __str__(self) -> str:
        """Return a table of the best candidate of each system at each size, and what to do.

        The best is the fastest within the budget. Where none is, it is the one with the fewest
        labels that differ, preferably measured on held-out data and not only screened.
        """

        def rank(row: Candidate) -> tuple:
            if self.feasible(row):
                return 0, row.p99
            return 1 + (not row.held_out), row.most_disagreement, row.p99

        def ms(seconds: float) -> str:
            return f"{1e3 * seconds:.{0 if seconds >= 0.1 else 1}f}"

        best, about = self.recommended, self.about
        chosen: dict[Any, Candidate] = {None: best}
        for row in sorted(self.candidates, key=rank):
            size = row.num_workers, row.num_data, row.limit is None
            chosen.setdefault((row.system, *size), row)
        head = "", "system", "(N, K)", "wait, ms", "again", "extra", "differ", "p50, ms", "p99, ms"
        table: list[tuple[str, ...]] = [head]
        for row in sorted({*chosen.values()}, key=lambda row: (not self.feasible(row), row.p99)):
            share, most = 100 * row.disagreement.mean, 100 * row.most_disagreement
            cells = (
                "*" if row == best else "" if self.feasible(row) else "x",
                row.system + (f", {row.order}" if row.order else ""),
                f"({row.num_workers}, {row.num_data})",
                str(row.wait_for) + (f", {ms(row.min_wait)}" if row.min_wait else ""),
                f"{100 * row.resent:.1f}" if row.resent > 0 else "",
                f"{100 * row.extra_work:.0f}",
                "0" if row.exact else f"{share:.2f}<{most:.2f}",
                *(ms(row.p50), ms(row.p99)),
            )
            table.append(cells)
        lines = ["Each system at each size: the fastest within the budget, or nearest to it", ""]
        lines.append(text_table(table, left=2))
        lines += [
            "",
            "* recommended; x over the budget, too many labels differ, or only screened",
            "wait: answers to wait for, and how long at least; again: % of calls sent twice;",
            "extra: % of calls beyond one a query; differ: % of labels, and an upper bound;",
            "p50, p99: milliseconds until the last of the queries is answered",
            "",
            f"recommended: {self.reason}",
        ]
        if best.num_workers > best.num_data or best.limit is not None:
            doubt = f"; send again what has an error probability above {best.limit}"
            again = {None: "", 0.0: "; send again what has no answer"}.get(best.limit, doubt)
            lines.append(
                f"decode when {best.wait_for} of {best.num_workers} workers have answered, but not "
                f"before {1e3 * best.min_wait:.3g} ms unless all have{again}"
            )
        if best.hedge_after is not None:
            lines.append(
                f"send up to {best.copies} copies, {best.hedge_copies} further after every "
                f"{1e3 * best.hedge_after:.3g} ms of waiting"
            )
        lines.append(
            f"codes were measured on {about['held_out_points']} held-out data points, "
            f"{about['straggler_sets']} straggler sets a group; planned in {about['seconds']} s"
        )
        return "\n".join(lines)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read the plan that `save` wrote.

        The conditions of its error probability are "unknown", so that it warns of none, where the
        file does not have them.

        Raises:
            ValueError: The file, which is named, is damaged or holds no plan. One without a
                checksum is read as it stands.
            OSError: As `open`.
        """
        content = _FORMAT.read(Path(path))

        def candidate(row: dict[str, Any]) -> Candidate:
            fields: dict[str, Any] = row | {"disagreement": Estimate(**row["disagreement"])}
            return Candidate(**fields)

        try:
            conditions, doubt = Conditions(**(content.get("conditions") or {})), content["doubt"]
            return cls(
                tuple(map(candidate, content["candidates"])),
                candidate(content["recommended"]),
                content["reason"],
                doubt and ErrorProbability.from_json(doubt, conditions),
                content["asked"],
                content["about"],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no plan: {error}") from error

    def save(self, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
        """Write the plan as JSON, which `load` reads.

        Args:
            path: The file.
            about: JSON values to add to `Plan.about`.

        Raises:
            TypeError: `about` is no JSON.
            OSError: As `open`.
        """
        probability = self.error_probability
        content = {
            "recommended": dataclasses.asdict(self.recommended),
            "reason": self.reason,
            "asked": self.asked,
            "about": self.about | dict(about or {}),
            "doubt": probability and probability.to_json(),
            "conditions": probability and dataclasses.asdict(probability.conditions),
            "candidates": [dataclasses.asdict(candidate) for candidate in self.candidates],
        }
        _FORMAT.write(Path(path), content)


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
    layouts: Sequence[str] = ("chebyshev", "interleaved", "repeated"),
    surrogate: Callable[[Array], Array] | None = None,
    buffer_size: int | None = None,
    overhead: float = 0.0,
    batch_size: int = 256,
    effort: PlanEffort = PlanEffort(),  # noqa: B008, it is frozen
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Plan:
    """Find the way to serve a model with the least p99 latency that the budget allows.

    Compared are: one worker for each query ("uncoded"); further copies, one or two at once, of what
    is not answered after a quantile of the latency, all chosen ("hedged"); copies from the start
    ("replication"), where what is lost counts as wrong or is sent again; what a surrogate, if there
    is one, is sure enough of, and copies of the rest ("known, else hedged"); copies from the start
    of what the surrogate is least sure of, where it answers what is late ("copies of the
    uncertain"); and NeRCC codes, with and without ordering. The recommendation is the least p99
    among those within the budget; within 3 % of it the least extra work, and then the least
    disagreement.

    **Time** is the same for all: `num_queries` come together, and the clock runs until the last of
    them is answered, by a worker's answer to the query itself or by decoding. All calls take
    independent draws of `latency`, on workers that are free; a copy that comes too late counts as a
    whole call. If your workers straggle together, or queue, this flatters all systems, hedging
    most.

    **Disagreement** is measured: codes and rules are screened on one random half of `x`. The
    fastest of them meet the other half with straggler sets of their own; of those that keep to
    `max_disagreement` there, by the end of their 99 % interval, one is recommended. Being chosen
    from several flatters it: expect its mean, but not that end, to be somewhat exceeded on data
    that chose nothing. Of a thousand data points 0.9 % can be promised at best, of two thousand
    0.5 %: none wrong in the held-out half.

    Args:
        model: Maps (B, ...) to vectors (B, outputs), and is compiled.
        x: Unlabelled data points as they will come, floats. Those that the model was trained on
            promise too much.
        latency: The law of the seconds that a call takes (or `TraceLatency.from_file`), which draws
            for any number of workers, its last axis.
        key: Random key.
        num_queries: Queries that come together.
        max_workers: The most workers for the first copies of `num_queries` queries.
        max_extra_work: The most calls beyond one for each query, as a share, in the mean.
        max_disagreement: The largest share of labels that may differ.
        num_data: Numbers of queries to code together, divisors of `num_queries`. Default: all of
            them, and half of them.
        layouts: NeRCC's layouts, as in `regression_points`.
        surrogate: A cheap model to order by, to answer by, and to place copies by.
        buffer_size: Waiting queries that are ordered at a time. Default: those that come together.
            How long queries wait for others is not counted.
        overhead: Seconds, measured or estimated, that the master takes in all (ordering, encoding,
            sending, decoding, a surrogate); added to every system's time.
        batch_size: Data points in a call of the model.
        effort: The work of the plan.
        on_stage: Called with a description of the next stage.

    Raises:
        ValueError: A number is out of range, a layout is unknown, latencies are not finite or
            negative, the model is in training mode, there are too few data points to fill a group
            in both halves, or data points or outputs are not finite.
    """
    begin = time.perf_counter()
    num_queries, max_workers, buffer_size = check_counts(
        num_queries=num_queries,
        max_workers=max_workers,
        buffer_size=num_queries if buffer_size is None else buffer_size,
    )
    check_model(model)
    check_not_negative(max_extra_work=max_extra_work, overhead=overhead)
    asked = {
        "num_queries": num_queries,
        "max_workers": max_workers,
        "max_extra_work": float(max_extra_work),
        "max_disagreement": float(max_disagreement),
        "buffer_size": buffer_size,
        "overhead": float(overhead),
    }
    together, needed = (
        f"{num_queries} queries that come together",
        f"{num_queries} workers at least",
    )
    if num_data is None:
        num_data = [k for k in (num_queries, num_queries // 2) if k > 1 and num_queries % k == 0]
    broken = [k for k in num_data if not 1 <= k <= num_queries or num_queries % k]
    for fits, message in (
        (
            max_workers >= num_queries,
            f"{together} need {needed}, not {max_workers}",
        ),
        (buffer_size >= num_queries, f"buffer_size {buffer_size} is less than the {together}"),
        (0 <= max_disagreement <= 1, f"max_disagreement must be in [0, 1], not {max_disagreement}"),
        (
            len(np.atleast_1d(x)) >= 2 * num_queries,
            f"x of shape {np.shape(x)} fills no group of {num_queries} in both halves: give "
            f"{2 * num_queries} data points at least, and a thousand to promise 1 %",
        ),
        (not broken, f"num_data must be divisors of the {num_queries} queries, not {broken}"),
    ):
        if not fits:
            raise ValueError(message)
    for layout in layouts:
        regression_points(num_queries, num_queries + 1, layout)  # says what is wrong with it

    keys = jax.random.split(key, 2)
    latencies = Latencies(latency, keys[0])
    on_stage("the model's own answers")
    x = np.asarray(x)
    order = np.asarray(jax.random.permutation(keys[1], len(x)))
    halves = [
        Half(model, x[np.sort(part)], buffer_size, surrogate, batch_size)
        for part in (order[: len(x) // 2], order[len(x) // 2 :])
    ]
    planner = Planner(latencies, asked, effort, *halves)
    on_stage("systems without a code")
    found, probability = list(planner.without_code()), None
    fastest = min(row.p99 for row in found if row.exact and row.feasible(asked))
    orders: tuple[str | None, ...] = (None, "pixels")
    approximate: Any = {"exact": False, "held_out": False}
    if surrogate is not None:
        orders = (*orders, "surrogate")
        known, probability = planner.known()
        doubted = Candidate(DOUBTED, num_queries, 0, 0, 0.0, "repeated", **approximate)
        copied = planner.screened([doubted], [None], np.inf)
        found += known + planner.judged(copied, np.inf) + copied
    on_stage("screening codes")
    codes = [
        Candidate(f"NeRCC {points}", k, 0, 0, 0.0, points, **approximate)
        for k, points in itertools.product(num_data, layouts)
    ]
    screened = planner.screened(codes, orders, fastest)
    on_stage("measuring on held-out data")
    found += planner.judged(screened, fastest) + screened

    rows = [dataclasses.replace(r, p50=r.p50 + overhead, p99=r.p99 + overhead) for r in found]
    about = {
        "calibration_points": len(halves[0].x),
        "held_out_points": len(halves[1].x),
        "straggler_sets": effort.sets,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    return Plan.of(rows, asked, about, effort.alike, probability)
