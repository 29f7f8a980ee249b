"""Ways to serve, measured for a plan: their times by the simulator, their labels on data.

Codes and rules are screened on one half of the data, and the most promising are judged on the
other, with straggler sets of their own.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ..codes import AbstractCode, NeRCC, Replication, Uncoded, decode_groups
from ..codes._trees import join
from ..evaluation import Estimate
from ..evaluation._answers import Recorder, batched, cut_groups
from ..evaluation._criteria import agree_on_labels
from ..inference import order_points
from ..inference.models import Model
from ..risk import ErrorProbability
from ..risk._error_probability import error_probability_of_predictions
from ..schemes import Scheme
from ..stragglers import simulate
from ..stragglers.groups import Latencies, Waiting, last_prediction, own_workers
from ..surrogates import Surrogate

KNOWN, DOUBTED = "known, else hedged", "copies of the uncertain"


@dataclasses.dataclass(frozen=True)
class PlanEffort:
    """The work of a plan, and the numbers that its comparison rests on.

    Attributes:
        draws: Groups of queries whose times are drawn for a p99; a quarter in screening.
        sets: Straggler sets that each group of the held-out half meets; a twelfth in screening.
        enough: Ways that keep to what was asked on the held-out half, after which no more are
            measured there.
        most: Ways that are measured there, at most.
        hedge_quantiles: Quantiles of the latency after which hedging sends again.
        early: Quantile of the latency before which nothing else is sent again.
        alike: Share by which p99s may differ and still count as equal; the cheaper is then better.
    """

    draws: int = 20_000
    sets: int = 48
    enough: int = 3
    most: int = 10
    hedge_quantiles: tuple[float, ...] = (0.5, 0.75, 0.9, 0.95, 0.99)
    early: float = 0.9
    alike: float = 0.03


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to serve the queries, and what it does.

    `num_data` queries are coded together on `num_workers` workers, at the layout `points`, in the
    order `order` ("pixels", "surrogate" or None). A group is decoded when `wait_for` workers have
    answered, but not before `min_wait` seconds. Hedging sends up to `copies` of a query,
    `hedge_copies` further ones every `hedge_after` seconds. `limit` is the error probability above
    which a surrogate's answers are not given out; 0 sends again what has no answer of its own.

    `extra_work` is what is sent beyond one call a query, as a share: N/K - 1 and what is sent
    again, `resent`. `disagreement` is the share of labels that differ from the model's own, lost
    ones included, and `most_disagreement` its upper bound; 0 for `exact` ones, whose predictions
    are all the model's own. `p50` and `p99` are of the seconds until the last of the queries is
    answered. What is not `held_out` was only screened, on few straggler sets of the other half.
    """

    system: str
    num_data: int
    num_workers: int
    wait_for: int
    min_wait: float
    points: str | None = None
    order: str | None = None
    copies: int = 1
    hedge_after: float | None = None
    hedge_copies: int = 1
    limit: float | None = None
    resent: float = 0.0
    extra_work: float = dataclasses.field(kw_only=True, default=0.0)
    disagreement: Estimate = Estimate(0.0, 0.0)  # noqa: RUF009, it is frozen
    most_disagreement: float = 0.0
    p50: float = dataclasses.field(kw_only=True, default=0.0)
    p99: float = dataclasses.field(kw_only=True, default=0.0)
    exact: bool = True
    held_out: bool = True

    @property
    def code(self) -> AbstractCode:
        """Return the code, untuned."""
        if self.points is not None:
            return NeRCC(self.num_data, self.num_workers, points=self.points, exact=True)
        if self.num_workers == self.num_data:
            return Uncoded(self.num_data)
        return Replication(self.num_data, self.num_workers)

    def scheme(self, surrogate: Callable[[Array], Array] | None = None, **further: Any) -> Scheme:
        """Return it as a scheme, with the surrogate that it orders by, or answers by.

        Raises:
            ValueError: The surrogate is missing.
        """
        ordered, answered = self.order == "surrogate", self.system in (KNOWN, DOUBTED)
        if (ordered or answered) and surrogate is None:
            raise ValueError("this plan orders by a surrogate, or answers by it: give it")
        if answered:
            further["surrogate"] = Surrogate(surrogate)  # pyright: ignore[reportArgumentType]
        if self.system == DOUBTED:
            share = 1 - self.wait_for / self.num_workers
            further |= {"redundancy": "uncertain", "straggler_share": share}
        order: Any = surrogate if ordered else self.order
        return Scheme(self.code, order=order, **further)

    def seen(
        self,
        times: np.ndarray | None = None,
        wrong: Bool[np.ndarray, "groups ... num_data"] | None = None,
        **changes: Any,
    ) -> "Candidate":
        """Return the same way with other results: times to the last prediction, and wrong labels.

        Groups are independent, their straggler sets are not. The bound holds with a probability of
        99 %: if the share were 4.6 over the number, none would be seen with a probability of 1 %.
        One of up to twenty candidates is chosen by this, and 95 % would often choose one that was
        lucky.
        """
        if times is not None:
            p50, p99 = (float(np.quantile(times, quantile)) for quantile in (0.5, 0.99))
            changes |= {"p50": p50, "p99": p99}
        if wrong is not None:
            share = Estimate.over(np.mean(wrong, axis=tuple(range(1, wrong.ndim))).tolist())
            wider = 2.576 / 1.960  # of the interval, which is one of 95 %
            least = -math.log(0.01) / (len(wrong) * wrong.shape[-1])
            most = max(share.mean + wider * share.half_width, least)
            changes |= {"disagreement": share, "most_disagreement": most}
        extra = self.num_workers / self.num_data - 1 + changes.get("resent", self.resent)
        return dataclasses.replace(self, extra_work=extra, **changes)

    def feasible(self, asked: Mapping[str, Any]) -> bool:
        """Return whether it keeps to what was asked for, and was not only screened."""
        workers = self.num_workers * asked["num_queries"] // self.num_data
        return (
            (self.held_out or self.exact)
            and workers <= asked["max_workers"]
            and self.extra_work <= asked["max_extra_work"] + 1e-9
            and self.most_disagreement <= asked["max_disagreement"]
        )


class Half:
    """One half of the data: the model's answers, and a surrogate's.

    Attributes:
        x: Data points.
        own: The model's outputs on them.
        form: The structure of the outputs; None for vectors.
        cheap: The surrogate's outputs, as vectors.
        off: Whether the surrogate's label is not the model's.
    """

    def __init__(
        self,
        model: Model,
        x: ArrayLike,
        buffer_size: int,
        surrogate: Callable[[Array], Array] | None,
        batch_size: int,
    ):
        run, groups = batched(model, batch_size), cut_groups(x, 1)
        recorder, self.x = Recorder(run, groups, batch_size), groups[:, 0]
        self.own, form = recorder.own[:, 0], recorder.form
        self.form = None if form.is_vector else form
        features: Any = None if surrogate is None else batched(surrogate, batch_size)(self.x)
        if surrogate is not None:
            self.cheap = join(features, 1)[0]
            agree = agree_on_labels(self.cheap, jnp.asarray(self.own), self.form)
            self.off = np.asarray(~agree)

        @functools.cache
        def answers(order: str | None, num_data: int) -> Recorder:
            places = np.arange(len(self.x))
            if order is not None:
                by: Any = {"features": features if order == "surrogate" else None}
                by["buffer_size"] = buffer_size
                places = np.asarray(order_points(jnp.asarray(self.x), num_data, **by))
            places = places[: len(places) // num_data * num_data].reshape(-1, num_data)
            return Recorder(run, self.x[places], batch_size, (self.own[places], form))

        self.answers = answers  # the record of groups in this order


class Planner:
    """The measurements of a plan, on the half of the data for screening, and that for judging.

    Numbered streams of latencies are those that must not be the same; what is compared with each
    other meets the same.
    """

    def __init__(
        self,
        latencies: Latencies,
        asked: Mapping[str, Any],
        effort: PlanEffort,
        calibration: Half,
        held_out: Half,
    ):
        self._latencies, self._asked, self._effort = latencies, asked, effort
        self._calibration, self._held_out = calibration, held_out
        self._queries, self._wanted = asked["num_queries"], asked["max_disagreement"]
        self._early = latencies.quantile(effort.early)
        self._own: dict[Any, np.ndarray] = {}

    def sizes(self, num_data: int, least: int = 1) -> Iterator[tuple[int, list[int]]]:
        """Yield a third, two thirds and all of the redundancy that the budget allows, as workers.

        There are `least` more than data points. Each has numbers of answers to wait for: all but 1,
        2, 4, ... and N - K; at least K / 2.
        """
        groups, budget = self._queries // num_data, 1 + self._asked["max_extra_work"]
        most = min(int(num_data * budget + 1e-9), self._asked["max_workers"] // groups)
        further = {0} | {math.ceil((most - num_data) * share / 3) for share in (1, 2, 3)}
        for workers in sorted(num_data + number for number in further if number >= least):
            missing = {1, 2, 4, 8, 16, workers - num_data} - {0}
            waits = {workers - number for number in missing}
            yield workers, sorted(each for each in waits if each >= max(num_data // 2, 1))

    def _draw(
        self, row: Candidate, stream: int, shape: tuple[int, ...], own: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return masks of answers, ends of groups, and data points' own times, for many groups."""
        if own is None:
            size = row.num_data, row.num_workers, row.points
            if size not in self._own:
                self._own[size] = own_workers(row.code)
            own = self._own[size]
        rule = Waiting(self._latencies.law, own, row.wait_for, row.min_wait)
        return rule.draw(self._latencies, stream, shape)

    def without_code(self) -> Iterator[Candidate]:
        """Yield uncoded, hedged and replicated ways, for which nothing depends on the data.

        They are exact, or lose predictions, which count as wrong.
        """
        latencies, queries, draws = self._latencies, self._queries, self._effort.draws
        uncoded = Candidate("uncoded", queries, queries, queries, 0.0)
        hedges = itertools.product(((2, 1), (3, 1), (3, 2)), self._effort.hedge_quantiles)
        for (copies, at_once), share in [((1, 1), 1.0), *hedges]:
            after, row = latencies.quantile(share), uncoded
            if copies > 1:
                hedged = {"copies": copies, "hedge_after": after, "hedge_copies": at_once}
                row = dataclasses.replace(uncoded, system="hedged", **hedged)
            drawn = latencies.draw(copies, (copies, draws, queries))
            there, sent, _ = simulate.Hedge(after, at_once).outcome(drawn[:1], drawn[1:])
            yield row.seen(np.max(there, axis=1), resent=float(np.mean(sent)) - 1)

        again = latencies.draw(7, (draws, 1, queries))
        for workers, waits in self.sizes(queries, 0):
            system = "replication" if workers > queries else "uncoded"
            whole = Candidate(system, queries, workers, workers, 0.0)
            if workers > queries:
                yield whole.seen(self._draw(whole, 8, (draws, 1))[1][:, 0])
            for number in waits:
                whole = dataclasses.replace(whole, wait_for=number)
                late = float(np.quantile(self._draw(whole, 8, (draws, 1))[1], 0.99))
                for min_wait, limit in ((0.0, 0.0), (self._early, 0.0), (late, None)):
                    row = dataclasses.replace(whole, min_wait=min_wait, limit=limit)
                    _, end, own = self._draw(row, 8, (draws, 1))
                    lost = own > end[..., None]
                    if limit is None:
                        yield dataclasses.replace(row, exact=False).seen(end[:, 0], lost)
                    else:
                        times = last_prediction(end, own, lost, again)
                        yield row.seen(times, resent=float(np.mean(lost)))

    def known(self) -> tuple[list[Candidate], ErrorProbability]:
        """Measure the surrogate at each straggler threshold, on the half that set no limit.

        Its error probability is that of predictions without answers; it serves a scheme with
        `Uncoded`, too. What it does not know has up to three copies.
        """
        first, half, found, copies = self._calibration, self._held_out, [], 3
        never, own = jnp.full(len(first.x), jnp.inf), jnp.asarray(first.own)
        probability = error_probability_of_predictions(first.cheap, never, own, first.form)
        unsure = np.asarray(probability(half.cheap, jnp.full(len(half.x), jnp.inf), half.cheap))
        queries, shape = self._queries, (self._effort.draws, self._queries)
        drawn = self._latencies.draw(9, (copies, *shape))
        point = self._latencies.random(10).integers(0, len(unsure), shape)
        for share in self._effort.hedge_quantiles:
            hedge = simulate.Hedge(self._latencies.quantile(share))
            late = float(np.mean(hedge.outcome(drawn[:1], drawn[1:]).late))
            # Half of what may be wrong leaves room for chance on the other half.
            allowed = [min(self._wanted / late, 1.0) / part for part in (1, 2)] if late else []
            for limit in sorted({probability.limit(each) for each in allowed} - {0.0}):
                sure = unsure <= limit
                row = Candidate(KNOWN, queries, queries, queries, 0.0, exact=False, limit=limit)
                row = row.seen(wrong=(sure & half.off)[:, None])
                mean, half_width = row.disagreement.mean, row.disagreement.half_width
                changes: Any = {"copies": copies, "hedge_after": hedge.limit}
                changes["disagreement"] = Estimate(late * mean, late * half_width)
                changes["most_disagreement"] = late * row.most_disagreement
                served = hedge.outcome(drawn[:1], drawn[1:], known=sure[point])
                changes["resent"] = float(np.mean(served.calls)) - 1
                found.append(row.seen(np.max(served.seconds, axis=1), **changes))
        return found, probability

    def screened(
        self, ways: Iterable[Candidate], orders: Sequence[str | None], fastest: float
    ) -> list[Candidate]:
        """Return ways with all sizes and rules that might be faster, by few sets on the first half.

        Waiting until the p99 of the time in which enough answer makes that p99 no later, and most
        others are in by then. One rule is always there, so that every code is shown.
        """
        found, half = [], self._calibration
        for way in ways:
            for workers, waits in self.sizes(way.num_data):
                rows = []
                for number in waits:
                    row = dataclasses.replace(way, num_workers=workers, wait_for=number)
                    late = row.seen(self._times(row, half)).p99
                    for min_wait in sorted({self._early, late}):
                        row = dataclasses.replace(row, min_wait=min_wait)
                        row = row.seen(self._times(row, half))
                        if row.p99 < fastest or (number == waits[-1] and min_wait == late):
                            rows.append(row)
                for order, row in itertools.product(orders, rows):
                    found.append(self._measured(dataclasses.replace(row, order=order), half))
        return found

    def judged(self, screened: Iterable[Candidate], fastest: float) -> list[Candidate]:
        """Measure the most promising on the held-out half.

        They go by p99, then by extra work, until enough keep to what is asked; among p99s that
        count as equal the cheaper comes first.
        """
        step, found = math.log(1 + self._effort.alike), []
        fast = [
            row for row in screened
            if row.p99 < fastest and 0 < self._wanted >= row.disagreement.mean
        ]  # fmt: skip
        fast.sort(key=lambda row: (round(math.log(row.p99) / step), row.extra_work, row.p99))
        for row in fast[: self._effort.most]:
            found.append(self._measured(row, self._held_out))
            kept = sum(other.most_disagreement <= self._wanted for other in found)
            if kept >= self._effort.enough:
                break
        return found

    def _own_by_doubt(self, row: Candidate, half: Half) -> np.ndarray:
        """Return which workers run on which data points of each group, by the surrogate's doubt."""
        cheap = half.cheap[: len(half.x) // row.num_data * row.num_data]
        outputs = cheap if half.form is None else half.form.split(cheap)
        scheme = row.scheme(lambda _: outputs)
        encoders = np.asarray(scheme.encoders(scheme.prepare(cheap)))
        return np.swapaxes(encoders > 0.5, 1, 2)[:, None]

    def _times(self, row: Candidate, half: Half) -> Float[np.ndarray, " draws"]:
        """Return when the last of all groups ends."""
        draws = self._effort.draws // (1 if half is self._held_out else 4)
        if row.system == DOUBTED:
            own = self._own_by_doubt(row, half)
            return self._draw(row, 11, (len(own), -(-draws // len(own))), own)[1].ravel()
        return np.max(self._draw(row, 1, (draws, self._queries // row.num_data))[1], axis=1)

    def _measured(self, row: Candidate, half: Half) -> Candidate:
        """Return a row with its times and its disagreement, on a half's groups in its order."""
        held, times = half is self._held_out, self._times(row, half)
        if row.system == DOUBTED:
            own = self._own_by_doubt(row, half)
            _, end, there = self._draw(row, 11, (len(own), len(times) // len(own)), own)
            off = half.off[: len(own) * row.num_data].reshape(len(own), 1, -1)
            return row.seen(times, (there > end[..., None]) & off, held_out=held)
        coded = half.answers(row.order, row.num_data)
        code: Any = row.code
        answers, labels = np.asarray(coded.of(code).coded), np.argmax(coded.own, axis=-1)
        sets = self._effort.sets // (1 if held else 12)
        mask, end, there = self._draw(row, 4 if held else 3, (len(labels), sets))
        known, size = there <= end[..., None], 512  # groups that are decoded at a time
        wrong, rows = np.zeros(known.shape, bool), np.argwhere(~known.all(axis=-1))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            group, index = np.resize(part, (size, 2)).T
            given = (answers[group], mask[group, index], labels[group])
            off = np.asarray(_wrong_labels(code, *map(jnp.asarray, given)))
            wrong[tuple(part.T)] = off[: len(part)]
        return row.seen(times, wrong & ~known, held_out=held)


@eqx.filter_jit
def _wrong_labels(
    code: NeRCC,
    answers: Float[Array, "groups num_workers outputs"],
    mask: Bool[Array, "groups num_workers"],
    labels: Int[Array, "groups num_data"],
) -> Bool[Array, "groups num_data"]:
    """Return which labels differ or are lost."""
    decoded = decode_groups(code, answers, mask)
    return (jnp.argmax(decoded.predictions, axis=-1) != labels) | ~decoded.recovered
