"""The plan for a service: copies, hedging, a code with its rule of waiting, or none of these.

Times are simulated, labels are measured. Candidates are screened on one half of the data, and the
most promising ones are measured on the other half, with other straggler sets.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from ..arrays import check_counts, check_not_negative
from ..codes import AbstractCode, NeRCC, Replication, decode_groups, regression_points
from ..codes.kept import copies_of, encoder_of
from ..evaluation import Estimate
from ..evaluation.answers import batched, coded_outputs, cut_groups, own_outputs
from ..evaluation.tables import text_table
from ..inference import order_points
from ..inference.models import Model, check_model
from ..schemes import Scheme
from ..stragglers import AbstractLatency, simulate
from ..stragglers.draws import latency_draws
from ..surrogates import Surrogate

DRAWS = 20_000  # simulated sets of queries for a p99
ALIKE = 0.03  # p99s that differ by less count as equal; the cheaper is then better
DOUBTED = "copies of the uncertain"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to serve the queries, and its results.

    `num_data` queries are coded together on `num_workers` workers, at the layout `points`, in the
    order `order` ("pixels" or None). A group is decoded when `wait_for` workers have answered, but
    not before `min_wait` seconds. Hedging makes up to `copies` calls of a query, `hedge_copies`
    further ones after every `hedge_after` seconds.

    `extra_work` is the number of calls a query beyond one. `disagreement` is the share of labels
    that differ from the model's own, lost ones included, and `most_disagreement` its upper bound;
    both are 0 if it is `exact`: all predictions are the model's own. `p50` and `p99` are quantiles
    of the seconds until the last of the queries is answered. A candidate that is not `held_out` was
    only screened, on a few straggler sets of the other half.
    """

    system: str
    num_data: int
    num_workers: int
    wait_for: int
    min_wait: float = 0.0
    points: str | None = None
    order: str | None = None
    copies: int = 1
    hedge_after: float | None = None
    hedge_copies: int = 1
    extra_work: float = 0.0
    disagreement: Estimate = Estimate(0.0, 0.0)  # noqa: RUF009, it is frozen
    most_disagreement: float = 0.0
    p50: float = 0.0
    p99: float = 0.0
    exact: bool = True
    held_out: bool = True

    @property
    def code(self) -> AbstractCode:
        """The code, untuned."""
        if self.points is not None:
            return NeRCC(self.num_data, self.num_workers, points=self.points, exact=True)
        return Replication(self.num_data, self.num_workers)

    def seen(
        self,
        times: Float[np.ndarray, " draws"],
        wrong: Bool[np.ndarray, "groups sets num_data"] | None = None,
        resent: float = 0.0,
    ) -> "Candidate":
        """Return the candidate with results: times to the last prediction, and wrong labels.

        Groups are independent, their straggler sets are not. The bound holds with a probability of
        99 %: if the share is 4.6 over the number of data points, none is wrong with a probability
        of 1 %. One of up to twenty candidates is chosen by this bound, so with 95 % a lucky one
        would often be chosen.
        """
        changes: Any = {"extra_work": self.num_workers / self.num_data - 1 + resent}
        changes |= zip(("p50", "p99"), np.quantile(times, (0.5, 0.99)).tolist(), strict=True)
        if wrong is None:
            return dataclasses.replace(self, **changes)
        share = Estimate.over(np.mean(wrong, axis=(1, 2)).tolist())
        wider = 2.576 / 1.960  # of the interval, which is one of 95 %
        least = -math.log(0.01) / (len(wrong) * wrong.shape[-1])
        most = max(share.mean + wider * share.half_width, least)
        changes |= {"disagreement": share, "most_disagreement": most, "exact": False}
        return dataclasses.replace(self, **changes)

    def feasible(self, asked: Mapping[str, Any]) -> bool:
        """Return whether it keeps to the limits in `asked`, and was not only screened."""
        return (
            self.held_out
            and self.extra_work <= asked["max_extra_work"] + 1e-9
            and self.most_disagreement <= asked["max_disagreement"]
        )

    def scheme(self, surrogate: Callable[[Array], Array] | None = None) -> Scheme:
        """Return the candidate as a scheme for `coded_inference`, with the surrogate if it has one.

        Raises:
            ValueError: The candidate needs a surrogate, and none is given.
        """
        if self.system != DOUBTED:
            return Scheme(self.code, order=self.order)  # pyright: ignore[reportArgumentType]
        if surrogate is None:
            raise ValueError("this plan answers by a surrogate: give it")
        cheap: Any = Surrogate(surrogate)  # pyright: ignore[reportArgumentType]
        share = 1 - self.wait_for / self.num_workers
        return Scheme(self.code, cheap, redundancy="uncertain", straggler_share=share)

    def __str__(self) -> str:
        return f"{self.system} ({self.num_workers}, {self.num_data})"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The systems that `plan` measured, and its recommendation.

    Attributes:
        candidates: All systems that were measured.
        recommended: The recommended one.
        reason: Why it is recommended.
        asked: The numbers that were passed to `plan`, by name.
        about: Counts of the data used for measurements, and the seconds that planning took.
    """

    candidates: tuple[Candidate, ...]
    recommended: Candidate
    reason: str
    asked: dict[str, Any]
    about: dict[str, Any]

    @classmethod
    def of(
        cls, candidates: Sequence[Candidate], asked: dict[str, Any], about: dict[str, Any]
    ) -> "Plan":
        """Return the plan that recommends the best candidate within the limits in `asked`.

        p99s that differ by less than 3 % count as equal; the cheaper candidate is then better.
        """
        allowed = [row for row in candidates if row.feasible(asked)]  # always including "uncoded"
        equal = (1 + ALIKE) * min(row.p99 for row in allowed)
        best = min(
            (row for row in allowed if row.p99 <= equal),
            key=lambda row: (round(row.extra_work, 3), row.most_disagreement, row.p99),
        )
        reason = f"{best} answers all {asked['num_queries']} queries within {_ms(best.p99)} (p99)"
        if not best.exact:
            reason += f", with at most {100 * best.most_disagreement:.2f} % of labels different"
        others = [row for row in allowed if row.system != best.system]
        then = "nothing else keeps to the budget"
        if others:
            second = min(others, key=lambda row: row.p99)
            then = f"the next best system within the budget, {second}, takes {_ms(second.p99)}"
            if second.p99 <= (1 + ALIKE) * best.p99:
                faster = f"nothing is faster by more than {100 * ALIKE:.0f} %"
                then = f"{faster} ({second} takes {_ms(second.p99)})"
        return cls(tuple(candidates), best, f"{reason}; {then}.", asked, about)

    def __str__(self) -> str:
        """Return a table of the best candidate of each system and size, and the recommendation."""
        best, about, asked = self.recommended, self.about, self.asked

        def rank(row: Candidate) -> tuple[bool, bool, float]:  # feasible by p99, else by labels
            kept = row.feasible(asked)
            return not kept, not row.held_out, row.p99 if kept else row.most_disagreement

        chosen: dict[Any, Candidate] = {None: best}
        for row in sorted(self.candidates, key=rank):
            chosen.setdefault((row.system, row.num_workers, row.num_data), row)
        table = [("", "system", "(N, K)", "wait", "extra", "differ", "p50", "p99")]
        for row in sorted({*chosen.values()}, key=lambda row: (rank(row)[0], row.p99)):
            share, most = 100 * row.disagreement.mean, 100 * row.most_disagreement
            cells = (
                "*" if row == best else "x" * rank(row)[0],
                row.system + (f", {row.order}" if row.order else ""),
                f"({row.num_workers}, {row.num_data})",
                str(row.wait_for) + (f", {_ms(row.min_wait)}" if row.min_wait else ""),
                f"{100 * row.extra_work:.0f}",
                "0" if row.exact else f"{share:.2f}<{most:.2f}",
                *(_ms(row.p50), _ms(row.p99)),
            )
            table.append(cells)
        how = ""
        if best.num_workers > best.num_data:
            how = f"decode when {best.wait_for} of {best.num_workers} workers have answered, but "
            how += f"not before {_ms(best.min_wait)} unless all have\n"
        if best.hedge_after is not None:
            how = f"send up to {best.copies} copies, {best.hedge_copies} further after every "
            how += f"{_ms(best.hedge_after)} of waiting\n"
        return (
            "Each system at each size: the fastest within the budget, or nearest to it\n\n"
            f"{text_table(table, left=2)}\n\n"
            "* recommended; x over the budget, too many labels differ, or only screened\n"
            "wait: answers to wait for, and how long at least; extra: % of calls beyond one a\n"
            "query; differ: % of labels, and an upper bound; p50, p99: until the last is answered\n"
            f"\nrecommended: {self.reason}\n{how}"
            f"codes were measured on {about['held_out_points']} held-out data points, "
            f"{about['straggler_sets']} straggler sets a group; planned in {about['seconds']} s"
        )


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
) -> Plan:
    """Find the way to serve a model with the least p99 latency that the budget allows.

    These systems are compared: one worker for each query ("uncoded"); one or two further copies of
    queries that are not answered after a quantile of the latency, for several quantiles ("hedged");
    copies from the start ("replication"), where lost queries count as wrong; copies from the start
    of the queries of which the surrogate is least certain, with its answers to lost ones ("copies
    of the uncertain"); and NeRCC codes, with and without ordering. The recommended candidate has
    the least p99 within the budget; within 3 % of it the least extra work, and then the least
    disagreement.

    **Time** is defined alike for all: `num_queries` arrive together, and the time ends when the
    last of them is answered, by a worker's answer to the query itself or by decoding. All calls
    take independent draws of `latency`, on idle workers; a copy that is too late counts as a whole
    call. If your workers straggle together, or queue, real times are longer, most for hedging.

    **Disagreement** is measured. Codes and rules are screened on one random half of `x`. The
    fastest ones are measured on the other half, with other straggler sets; one of those whose 99 %
    interval ends within `max_disagreement` is recommended. As it is chosen from several, its mean
    is optimistic: on new data, expect the mean, but not the interval's end, to be somewhat
    exceeded. With a thousand data points, at best 0.9 % can be promised, with two thousand 0.5 %,
    if no label is wrong in the held-out half.

    Args:
        model: A function from (B, ...) to vectors (B, outputs), which is compiled.
        x: Unlabelled data points like those in use, floats. Training data of the model make the
            plan too optimistic.
        latency: The law of the seconds of a call (such as `TraceLatency.from_file`), which draws
            for any number of workers, its last axis.
        key: The random key.
        num_queries: The number of queries that arrive together.
        max_workers: The most workers for the first copies of `num_queries` queries.
        max_extra_work: The most calls a query beyond one, in the mean.
        max_disagreement: The largest share of labels that may differ.
        num_data: The numbers of queries coded together, divisors of `num_queries` (default: all of
            the queries, and half of them).
        layouts: NeRCC's layouts, as in `regression_points`.
        surrogate: A cheap model whose certainty places copies, and which answers lost queries.
        buffer_size: The number of waiting queries that are ordered together (default:
            `num_queries`). The time that queries wait for others is not counted.
        overhead: The master's seconds in all (ordering, encoding, sending, decoding, a surrogate),
            added to every system's time.

    Raises:
        ValueError: A number is out of range, a layout is unknown, latencies are not finite or
            negative, the model is in training mode, there are too few data points to fill a group
            in both halves, or data points or outputs are not finite.
    """
    begin = time.perf_counter()
    buffer_size = num_queries if buffer_size is None else buffer_size
    num_queries, max_workers, buffer_size = check_counts(
        num_queries=num_queries, max_workers=max_workers, buffer_size=buffer_size
    )
    check_model(model)
    check_not_negative(max_extra_work=max_extra_work, overhead=overhead)
    if num_data is None:
        num_data = [k for k in (num_queries, num_queries // 2) if k > 1 and num_queries % k == 0]
    if max_workers < num_queries:
        raise ValueError(f"the queries need {num_queries} workers at least, not {max_workers}")
    if not 0 <= max_disagreement <= 1:
        raise ValueError(f"max_disagreement must be in [0, 1], not {max_disagreement}")
    if len(np.atleast_1d(x)) < 2 * num_queries:
        few = f"x of shape {np.shape(x)} fills no group of {num_queries} in both halves"
        raise ValueError(f"{few}: give {2 * num_queries} at least, and a thousand to promise 1 %")
    if broken := [k for k in num_data if not 1 <= k <= num_queries or num_queries % k]:
        raise ValueError(f"num_data must be divisors of the {num_queries} queries, not {broken}")
    for layout in layouts:
        regression_points(num_queries, num_queries + 1, layout)  # says what is wrong with it
    asked = {"num_queries": num_queries, "max_workers": max_workers, "buffer_size": buffer_size}
    asked |= {"overhead": float(overhead)}
    asked |= {"max_extra_work": float(max_extra_work), "max_disagreement": float(max_disagreement)}

    of_latencies, of_data = jax.random.split(key, 2)
    latencies, x = latency_draws(latency, of_latencies), np.asarray(x)
    order = np.asarray(jax.random.permutation(of_data, len(x)))
    screening, held_out = (
        _Half(model, x[np.sort(part)], surrogate, asked, latencies, sets)
        for sets, part in ((4, order[: len(x) // 2]), (48, order[len(x) // 2 :]))
    )
    found: list[Candidate] = []
    usual = latencies(0, (DRAWS, 16))
    hedges = itertools.product(((2, 1), (3, 1), (3, 2)), (0.5, 0.75, 0.9, 0.95, 0.99))
    for (copies, at_once), share in [((1, 1), 1.0), *hedges]:
        after = float(np.quantile(usual, share))
        drawn = latencies(copies, (copies, DRAWS, num_queries))
        there, sent, _ = simulate.Hedge(after, at_once).outcome(drawn[:1], drawn[1:])
        row = Candidate("uncoded", num_queries, num_queries, num_queries, hedge_copies=at_once)
        if copies > 1:
            row = dataclasses.replace(row, system="hedged", copies=copies, hedge_after=after)
        found.append(row.seen(np.max(there, axis=1) + overhead, resent=float(np.mean(sent)) - 1))
    ways = [Candidate("replication", num_queries, 0, 0)]
    if surrogate is not None:
        ways.append(Candidate(DOUBTED, num_queries, 0, 0, points="repeated"))
    for k, layout, order in itertools.product(num_data, layouts, (None, "pixels")):
        ways.append(Candidate(f"NeRCC {layout}", k, 0, 0, points=layout, order=order))
    fastest = min(row.p99 for row in found if row.feasible(asked))
    screened = [row for way in ways for row in screening.screened(way, fastest)]

    # Measure the most promising candidates until three keep to the limits; among p99s that count as
    # equal, the cheaper comes first.
    fast = [
        row for row in screened
        if not row.held_out and row.p99 < fastest and max_disagreement >= row.disagreement.mean
    ]  # fmt: skip
    fast.sort(key=lambda r: (round(math.log(r.p99) / math.log(1 + ALIKE)), r.extra_work, r.p99))
    judged: list[Candidate] = []
    for row in fast[:10]:
        if sum(other.most_disagreement <= max_disagreement for other in judged) < 3:
            judged.append(held_out.measured(row))
    about = {"calibration_points": len(screening.x), "held_out_points": len(held_out.x)}
    about |= {"straggler_sets": held_out.sets, "seconds": round(time.perf_counter() - begin, 1)}
    return Plan.of(found + judged + screened, asked, about)


class _Half:
    """One half of the data, on which candidates are measured, all with the same latencies."""

    def __init__(
        self,
        model: Model,
        x: Float[np.ndarray, "points ..."],
        surrogate: Callable[[Array], Array] | None,
        asked: Mapping[str, Any],
        latencies: Callable[[int, tuple[int, ...]], Float[np.ndarray, "..."]],
        sets: int,
    ):
        size, groups = 256, cut_groups(x, 1)  # data points in a call of the model
        run = batched(model, size)
        own, self.x = own_outputs(run, groups)[0], groups[:, 0]
        self._own = own[:, 0]
        if surrogate is not None:
            self._cheap = np.asarray(batched(surrogate, size)(self.x))
        self._latencies, self._asked, self.sets = latencies, asked, sets

        @functools.cache
        def recorded(
            points: str, num_data: int, num_workers: int, order: str | None
        ) -> tuple[Float[np.ndarray, "groups num_workers m"], Int[np.ndarray, "groups num_data"]]:
            """Return the answers of a layout's workers to ordered groups, and the own labels."""
            places, by = np.arange(len(self.x)), {"buffer_size": asked["buffer_size"]}
            if order is not None:
                places = np.asarray(order_points(jnp.asarray(self.x), num_data, **by))
            places = places[: len(places) // num_data * num_data].reshape(-1, num_data)
            code, own = NeRCC(num_data, num_workers, points=points), self._own[places]
            answers = coded_outputs([run], code, self.x[places], size, own)
            return answers, np.argmax(own, axis=-1)

        self._recorded = recorded

    def screened(self, way: Candidate, fastest: float) -> Iterator[Candidate]:
        """Yield a candidate at a third, two thirds and all of the redundancy in the budget.

        Each waits for all but 1, 2, 4, ... and N - K answers (copies also for all), and at least
        until the p99 of that time: this does not delay the p99, and most other answers have arrived
        by then. If none is faster than `fastest`, the last is yielded, to show each system.
        """
        asked, k = self._asked, way.num_data
        budget = int(k * (1 + asked["max_extra_work"]) + 1e-9)
        most = min(budget, asked["max_workers"] * k // asked["num_queries"])
        for workers in sorted({k + math.ceil((most - k) * share / 3) for share in (1, 2, 3)} - {k}):
            missing = {1, 2, 4, 8, 16, workers - k} | ({0} if way.points is None else set())
            waits = sorted(workers - each for each in missing if workers - each >= max(k // 2, 1))
            for number in waits:
                row = dataclasses.replace(way, num_workers=workers, wait_for=number)
                late = float(np.quantile(self._drawn(row)[0], 0.99))
                if late < fastest or number == waits[-1]:
                    yield self.measured(dataclasses.replace(row, min_wait=late - asked["overhead"]))

    def _drawn(self, row: Candidate) -> tuple[Float[np.ndarray, " draws"], Any, Any]:
        """Return the times of the last groups, exact workers, and the mask of lost queries."""
        own = copies_of(encoder_of(row.code)).T
        shape = DRAWS, self._asked["num_queries"] // row.num_data
        if row.system == DOUBTED:  # all queries are one group, and groups differ in their copies
            cheap = jnp.asarray(self._cheap)[: len(self.x) // row.num_data * row.num_data]
            scheme = row.scheme(lambda _: cheap)
            own = np.swapaxes(np.asarray(scheme.encoders(scheme.prepare(cheap))) > 0.5, 1, 2)
            own = np.repeat(own, -(-DRAWS // len(own)), axis=0)[:, None]
            shape = own.shape[:2]
        drawn = self._latencies(1, (*shape, own.shape[-1]))
        _, end, there = simulate.wait_for(row.wait_for, drawn, own, row.min_wait)
        return end.max(axis=1) + self._asked["overhead"], own, there > end[..., None]

    def measured(self, row: Candidate) -> Candidate:
        """Return a candidate with its times and its disagreement, on groups in its order."""
        times, own, lost = self._drawn(row)
        if row.points is None:  # replication: answers are exact, or lost
            return row.seen(times, lost if row.wait_for < row.num_workers else None)
        row = dataclasses.replace(row, held_out=self.sets > 4)
        if row.system == DOUBTED:
            off = np.argmax(self._cheap, axis=-1) != np.argmax(self._own, axis=-1)
            off = off[: len(off) // row.num_data * row.num_data].reshape(-1, 1, row.num_data)
            return row.seen(times, lost.reshape(len(off), -1, row.num_data) & off)
        layout = row.points, row.num_data, row.num_workers, row.order
        code, (answers, labels) = row.code, self._recorded(*layout)
        drawn = self._latencies(self.sets, (len(labels), self.sets, row.num_workers))
        draws = simulate.wait_for(row.wait_for, drawn, own, row.min_wait)
        lost, size = draws[2] > draws[1][..., None], 512  # groups that are decoded at a time
        wrong, rows = np.zeros(lost.shape, bool), np.argwhere(lost.any(axis=-1))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            group, index = np.resize(part, (size, 2)).T
            given, mask = jnp.asarray(answers[group]), jnp.asarray(draws[0][group, index])
            decoded = _decode(code, given, mask)
            off = np.argmax(decoded.predictions, axis=-1) != labels[group]
            wrong[tuple(part.T)] = (off | ~np.asarray(decoded.recovered))[: len(part)]
        return row.seen(times, wrong & lost)


_decode = eqx.filter_jit(decode_groups)


def _ms(seconds: float) -> str:
    """Return milliseconds with three digits."""
    return f"{1e3 * seconds:.3g} ms"
