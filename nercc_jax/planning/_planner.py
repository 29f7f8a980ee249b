"""Ways to serve, measured for a plan: their times by the simulator, their labels on data.

Codes and rules are screened on one half of the data, and the most promising are judged on the
other, with straggler sets of their own.
"""

import dataclasses
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
        draws: Groups of queries whose times are drawn for a p99.
        screen_draws: The same in screening.
        sets: Straggler sets that each group of the held-out half meets.
        screen_sets: The same in screening, on the other half.
        enough: Ways that keep to what was asked on the held-out half, after which no more are
            measured there.
        most: Ways that are measured there, at most.
        hedge_quantiles: Quantiles of the latency after which hedging sends again.
        early: Quantile of the latency before which nothing else is sent again.
        known_copies: Copies of a query whose answer no surrogate knows, at most.
        alike: Share by which p99s may differ and still count as equal; the cheaper is then better.
    """

    draws: int = 20_000
    screen_draws: int = 5_000
    sets: int = 48
    screen_sets: int = 4
    enough: int = 3
    most: int = 10
    hedge_quantiles: tuple[float, ...] = (0.5, 0.75, 0.9, 0.95, 0.99)
    early: float = 0.9
    known_copies: int = 3
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

    @property
    def placement(self) -> dict[str, Any]:
        """The options of a scheme that places this candidate's copies."""
        share = 1 - self.wait_for / self.num_workers
        return {"redundancy": "uncertain", "straggler_share": share}

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
    """One half of the data: its groups in each order, and all workers' answers to each code."""

    def __init__(
        self,
        model: Model,
        x: ArrayLike,
        buffer_size: int,
        surrogate: Callable[[Array], Array] | None,
        batch_size: int,
    ):
        self._run, self._batch_size = batched(model, batch_size), batch_size
        self._buffer_size = buffer_size
        groups = cut_groups(x, 1)
        self.x = groups[:, 0]
        recorder = Recorder(self._run, groups, batch_size)
        self.own, self._form = recorder.own[:, 0], recorder.form
        self.form = None if self._form.is_vector else self._form
        self._cheap: Any = None if surrogate is None else batched(surrogate, batch_size)(self.x)
        self._answers: dict[tuple[str | None, int], Recorder] = {}

    def answers(self, order: str | None, num_data: int) -> Recorder:
        """Return the model's answers on groups in this order."""
        if (order, num_data) not in self._answers:
            places = np.arange(len(self.x))
            if order is not None:
                features = self._cheap if order == "surrogate" else None
                options: Any = {"features": features, "buffer_size": self._buffer_size}
                places = np.asarray(order_points(jnp.asarray(self.x), num_data, **options))
            places = places[: len(places) // num_data * num_data].reshape(-1, num_data)
            known = self.own[places], self._form
            made = Recorder(self._run, self.x[places], self._batch_size, known)
            self._answers[order, num_data] = made
        return self._answers[order, num_data]

    @property
    def cheap(self) -> Float[Array, "points m"]:
        """The surrogate's outputs, as vectors."""
        return join(self._cheap, 1)[0]

    @property
    def off(self) -> Bool[np.ndarray, " points"]:
        """The mask of the surrogate's labels that are not the model's."""
        return np.asarray(~agree_on_labels(self.cheap, jnp.asarray(self.own), self.form))


class Planner:
    """The measurements of a plan.

    Args:
        latencies: Of calls. Numbered streams of draws are those that must not be the same; what is
            compared with each other meets the same.
        asked: The plan's arguments.
        effort: The work of the plan.
        calibration: The half of the data for screening and calibration.
        held_out: The half for judging.
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
        self._made: dict[Any, tuple[Any, np.ndarray]] = {}

    def _sizes(self, num_data: int) -> Iterator[tuple[int, list[int]]]:
        """Yield a third, two thirds and all of the redundancy that the budget allows, as workers.

        Each has numbers of answers to wait for: all but 1, 2, 4, ... and N - K; at least K / 2.
        """
        groups, budget = self._queries // num_data, 1 + self._asked["max_extra_work"]
        most = min(int(num_data * budget + 1e-9), self._asked["max_workers"] // groups)
        further = {math.ceil((most - num_data) * share / 3) for share in (1, 2, 3)}
        for workers in sorted(num_data + number for number in further if number > 0):
            yield workers, _waits(num_data, workers)

    def _rule(self, row: Candidate) -> tuple[Any, Waiting]:
        """Return the code of a candidate, and when its groups end."""
        size = row.num_data, row.num_workers, row.points
        if size not in self._made:
            self._made[size] = row.code, own_workers(row.code)
        code, own = self._made[size]
        return code, Waiting(self._latencies.law, own, row.wait_for, row.min_wait)

    def _shape(self, groups: int, workers: int, draws: int | None = None) -> tuple[int, int]:
        """Return how many draws of groups with this many workers in all are held at a time."""
        return max(min(draws or self._effort.draws, 4_000_000 // workers), 1000), groups

    def _draw(
        self, row: Candidate, stream: int, draws: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        groups = self._queries // row.num_data
        shape = self._shape(groups, groups * row.num_workers, draws)
        return self._rule(row)[1].draw(self._latencies, stream, shape)

    def _ends(self, row: Candidate, draws: int | None = None) -> Float[np.ndarray, " draws"]:
        """Return when the last of all groups ends."""
        return np.max(self._draw(row, 1, draws or self._effort.screen_draws)[1], axis=1)

    def without_code(self) -> Iterator[Candidate]:
        """Yield uncoded, hedged and replicated ways, for which nothing depends on the data.

        They are exact, or lose predictions, which count as wrong.
        """
        latencies, queries = self._latencies, self._queries
        hedges = itertools.product(((2, 1), (3, 1), (3, 2)), self._effort.hedge_quantiles)
        for (copies, at_once), share in [((1, 1), 0.0), *hedges]:
            after = latencies.quantile(share) if copies > 1 else np.inf
            drawn = latencies.draw(copies, (copies, *self._shape(queries, 3 * queries)))
            there, sent, _ = simulate.Hedge(after, at_once).outcome(drawn[:1], drawn[1:])
            row = Candidate("uncoded", queries, queries, queries, 0.0)
            if copies > 1:
                hedged = {"copies": copies, "hedge_after": after, "hedge_copies": at_once}
                row = dataclasses.replace(row, system="hedged", **hedged)
            yield row.seen(np.max(there, axis=1), resent=float(np.mean(sent)) - 1)

        for workers, waits in ((queries, _waits(queries, queries)), *self._sizes(queries)):
            system = "replication" if workers > queries else "uncoded"
            again = latencies.draw(7, (*self._shape(1, workers), queries))
            whole = Candidate(system, queries, workers, workers, 0.0)
            if workers > queries:
                yield whole.seen(self._draw(whole, 8)[1][:, 0])
            for number in waits:
                whole = dataclasses.replace(whole, wait_for=number)
                late = float(np.quantile(self._draw(whole, 8)[1], 0.99))
                for min_wait, limit in ((0.0, 0.0), (self._early, 0.0), (late, None)):
                    row = dataclasses.replace(whole, min_wait=min_wait, limit=limit)
                    _, end, own = self._draw(row, 8)
                    lost = own > end[..., None]
                    if limit is None:
                        yield dataclasses.replace(row, exact=False).seen(end[:, 0], lost)
                    else:
                        times = last_prediction(end, own, lost, again)
                        yield row.seen(times, resent=float(np.mean(lost)))

    def known(self) -> tuple[list[Candidate], ErrorProbability]:
        """Measure the surrogate at each straggler threshold, on the half that set no limit.

        Its error probability is that of predictions without answers; it serves a scheme with
        `Uncoded`, too.
        """
        first, half = self._calibration, self._held_out
        never, own = jnp.full(len(first.x), jnp.inf), jnp.asarray(first.own)
        probability = error_probability_of_predictions(first.cheap, never, own, first.form)
        unsure = np.asarray(probability(half.cheap, jnp.full(len(half.x), jnp.inf), half.cheap))
        queries, copies = self._queries, self._effort.known_copies
        shape, found = self._shape(queries, copies * queries), []
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
                served = hedge.outcome(drawn[:1], drawn[1:], known=sure[point])
                share = row.disagreement
                row = dataclasses.replace(
                    row,
                    copies=copies,
                    hedge_after=hedge.limit,
                    disagreement=Estimate(late * share.mean, late * share.half_width),
                    most_disagreement=late * row.most_disagreement,
                )
                resent = float(np.mean(served.calls)) - 1
                found.append(row.seen(np.max(served.seconds, axis=1), resent=resent))
        return found, probability

    def doubted(self) -> list[Candidate]:
        """Measure copies of what the surrogate is least sure of; it answers what is late."""
        found, queries = [], self._queries
        for workers, waits in self._sizes(queries):
            for number in waits:
                row = Candidate(DOUBTED, queries, workers, number, 0.0, "repeated", exact=False)
                late = self._measured(row, self._calibration).p99
                for min_wait in sorted({self._early, late}):
                    row = dataclasses.replace(row, min_wait=min_wait)
                    found.append(self._measured(row, self._calibration))
        return [*found, *self.judged(found, np.inf)]

    def screened(
        self,
        sizes: Sequence[int],
        layouts: Sequence[str],
        orders: Sequence[str | None],
        fastest: float,
    ) -> list[Candidate]:
        """Return all codes and rules that might be faster, by few sets on the first half.

        Waiting until the p99 of the time in which enough answer makes that p99 no later, and most
        others are in by then. One rule is always there, so that every code is shown.
        """
        found = []
        for num_data, points in itertools.product(sizes, layouts):
            for workers, waits in self._sizes(num_data):
                rows = []
                for number in waits:
                    row = Candidate(f"NeRCC {points}", num_data, workers, number, 0.0, points)
                    row = dataclasses.replace(row, exact=False, held_out=False)
                    late = row.seen(self._ends(row)).p99
                    for min_wait in sorted({self._early, late}):
                        row = dataclasses.replace(row, min_wait=min_wait)
                        row = row.seen(self._ends(row))
                        if row.p99 < fastest or (number == waits[-1] and min_wait == late):
                            rows.append(row)
                for order, row in itertools.product(orders, rows):
                    row = dataclasses.replace(row, order=order)
                    found.append(self._measured(row, self._calibration))
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

    def _measured(self, row: Candidate, half: Half) -> Candidate:
        """Return a row with its times and its disagreement, on a half's groups in its order."""
        held, effort = half is self._held_out, self._effort
        if row.system == DOUBTED:
            groups = len(half.x) // row.num_data
            cheap = half.cheap[: groups * row.num_data]
            outputs = cheap if half.form is None else half.form.split(cheap)
            scheme = Scheme(row.code, Surrogate(lambda _: outputs), **row.placement)
            encoders = scheme.encoders(scheme.prepare(cheap))
            own = np.swapaxes(np.asarray(encoders) > 0.5, 1, 2)[:, None]
            rule = Waiting(self._latencies.law, own, row.wait_for, row.min_wait)
            sets = -(-(effort.draws if held else effort.screen_draws) // groups)
            _, end, there = rule.draw(self._latencies, 11, (groups, sets))
            wrong = (there > end[..., None]) & half.off[: len(cheap)].reshape(groups, 1, -1)
            return row.seen(end.ravel(), wrong, held_out=held)
        code, rule = self._rule(row)
        coded = half.answers(row.order, row.num_data)
        answers, labels = np.asarray(coded.of(code).coded), np.argmax(coded.own, axis=-1)
        shape = len(labels), effort.sets if held else effort.screen_sets
        mask, end, there = rule.draw(self._latencies, 4 if held else 3, shape)
        known, size = there <= end[..., None], 512  # groups that are decoded at a time
        wrong, rows = np.zeros(known.shape, bool), np.argwhere(~known.all(axis=-1))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            group, index = np.resize(part, (size, 2)).T
            given = (answers[group], mask[group, index], labels[group])
            off = np.asarray(_wrong_labels(code, *map(jnp.asarray, given)))
            wrong[tuple(part.T)] = off[: len(part)]
        return row.seen(
            self._ends(row, effort.draws if held else None), wrong & ~known, held_out=held
        )


def _waits(num_data: int, num_workers: int) -> list[int]:
    missing = {1, 2, 4, 8, 16, num_workers - num_data} - {0}
    least = max(num_data // 2, 1)
    return sorted({num_workers - number for number in missing if num_workers - number >= least})


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
