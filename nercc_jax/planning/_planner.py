"""Ways to serve, measured for a plan: their times by the simulator, their labels on data.

Codes and rules are screened on one half of the data, and the most promising are judged on the
other, with straggler sets of their own.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from ..codes import NeRCC, decode_groups
from ..codes._trees import Form, join
from ..evaluation import Estimate
from ..evaluation._answers import Recorder, batched, cut_groups
from ..evaluation._criteria import agree_on_labels
from ..inference import order_points
from ..inference.models import Model
from ..risk import ErrorProbability
from ..risk._error_probability import (
    error_probability_from_answers,
    error_probability_of_predictions,
)
from ..schemes import Scheme
from ..stragglers import simulate
from ..stragglers.groups import Latencies, Waiting, last_prediction, own_workers
from ..surrogates import Surrogate
from ..surrogates.surrogate import decode_with_deviation
from ._candidates import DOUBTED, KNOWN, Candidate, PlanEffort

_CHUNK = 512  # groups that are decoded at a time

Probabilities = dict[Candidate, ErrorProbability | None]


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
        self._own, self._form = recorder.own[:, 0], recorder.form
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
            known = self._own[places], self._form
            made = Recorder(self._run, self.x[places], self._batch_size, known)
            self._answers[order, num_data] = made
        return self._answers[order, num_data]

    def outputs(self) -> tuple[Float[Array, "points m"], Float[Array, "points m"], Form | None]:
        """Return the surrogate's outputs and the model's, as vectors, and their form."""
        form = None if self._form.is_vector else self._form
        return join(self._cheap, 1)[0], jnp.asarray(self._own), form


class Measured(NamedTuple):
    """One half's data points, (groups, sets, K), under a code and a rule.

    `end` is when their group ended, `own` when their own answer comes; `wrong` are labels that
    differ; `error_probability` is 0 for answers of one's own, and where it is not calibrated.
    """

    end: Float[np.ndarray, "groups sets"]
    own: Float[np.ndarray, "groups sets num_data"]
    wrong: Bool[np.ndarray, "groups sets num_data"]
    error_probability: Float[np.ndarray, "groups sets num_data"]

    @property
    def disagreement(self) -> dict[str, Any]:
        """The fields of a candidate; groups are independent, sets are not."""
        share = Estimate.over(np.mean(self.wrong, axis=(1, 2)).tolist())
        return disagreement(share, self.wrong.shape[0] * self.wrong.shape[2])


def disagreement(share: Estimate, points: int) -> dict[str, Any]:
    """Return the fields of a share of wrong labels among so many, with its upper bound.

    The bound holds with a probability of 99 %: if the share were 4.6 over the number, none would be
    seen with a probability of 1 %. One of up to twenty candidates is chosen by this, and 95 % would
    often choose one that was lucky.
    """
    wider = 2.576 / 1.960  # of the interval, which is one of 95 %
    most = max(share.mean + wider * share.half_width, -math.log(0.01) / points)
    return {"disagreement": share, "most_disagreement": most}


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
        self._made: dict[tuple[int, int, str | None], tuple[Any, np.ndarray]] = {}

    def _workers(self, num_data: int) -> list[int]:
        """Return a third, two thirds and all of the redundancy that the budget allows."""
        groups, budget = self._queries // num_data, 1 + self._asked["max_extra_work"]
        most = min(int(num_data * budget + 1e-9), self._asked["max_workers"] // groups)
        further = [math.ceil((most - num_data) * share / 3) for share in (1, 2, 3)]
        return sorted({num_data + number for number in further if number > 0})

    def _rule(self, row: Candidate) -> tuple[Any, Waiting]:
        """Return the code of a candidate, and when its groups end."""
        size = row.num_data, row.num_workers, row.points
        if size not in self._made:
            self._made[size] = row.code, own_workers(row.code)
        code, own = self._made[size]
        return code, Waiting(self._latencies.law, own, row.wait_for, row.min_wait)

    def _draw(
        self, row: Candidate, stream: int, draws: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        groups = self._queries // row.num_data
        shape = self._effort.shape(groups, groups * row.num_workers, draws)
        return self._rule(row)[1].draw(self._latencies, stream, shape)

    def _ends(self, row: Candidate, draws: int | None = None) -> Float[np.ndarray, " draws"]:
        """Return when the last of all groups ends, if nothing is sent again."""
        return np.max(self._draw(row, 1, draws or self._effort.screen_draws)[1], axis=1)

    def without_code(self) -> Iterator[Candidate]:
        """Yield uncoded, hedged and replicated ways, for which nothing depends on the data.

        They are exact, or lose predictions, which count as wrong.
        """
        latencies, queries = self._latencies, self._queries
        shape = self._effort.shape(queries, 3 * queries)
        hedges = itertools.product(((2, 1), (3, 1), (3, 2)), self._effort.hedge_quantiles)
        for (copies, at_once), share in [((1, 1), 0.0), *hedges]:
            after = latencies.quantile(share) if copies > 1 else np.inf
            drawn = latencies.draw(copies, (copies, *shape))
            there, sent, _ = simulate.Hedge(after, at_once).outcome(drawn[:1], drawn[1:])
            row = Candidate("uncoded", queries, queries, queries, 0.0)
            if copies > 1:
                hedged = {"copies": copies, "hedge_after": after, "hedge_copies": at_once}
                row = dataclasses.replace(row, system="hedged", **hedged)
            yield row.seen(np.max(there, axis=1), resent=float(np.mean(sent)) - 1)

        for workers in (queries, *self._workers(queries)):
            system = "replication" if workers > queries else "uncoded"
            again = latencies.draw(7, (*self._effort.shape(1, workers), queries))
            whole = Candidate(system, queries, workers, workers, 0.0)
            if workers > queries:
                yield whole.seen(self._draw(whole, 8)[1][:, 0])
            for number in _waits(queries, workers):
                whole = dataclasses.replace(whole, wait_for=number)
                for min_wait in (0.0, self._early):
                    row = dataclasses.replace(whole, min_wait=min_wait, limit=0.0)
                    _, end, own = self._draw(row, 8)
                    lost = own > end[..., None]
                    times = last_prediction(end, own, lost, again)
                    yield row.seen(times, resent=float(np.mean(lost)))
                late = float(np.quantile(self._draw(whole, 8)[1], 0.99))
                row = dataclasses.replace(whole, min_wait=late, exact=False)
                _, end, own = self._draw(row, 8)
                wrong = np.mean(own > end[..., None], axis=(1, 2))
                half = 1.96 * float(np.std(wrong)) / math.sqrt(len(wrong))
                share = Estimate(float(np.mean(wrong)), half)
                yield row.seen(end[:, 0], **disagreement(share, len(wrong) * queries))

    def known(self) -> Probabilities:
        """Measure the surrogate at each straggler threshold, on the half that set no limit.

        Its error probability is that of predictions without answers; it serves a scheme with
        `Uncoded`, too.
        """
        cheap, answers, form = self._calibration.outputs()
        no_answers = jnp.full(len(cheap), jnp.inf)
        probability = error_probability_of_predictions(cheap, no_answers, answers, form)
        cheap, answers, _ = self._held_out.outputs()
        unsure = np.asarray(probability(cheap, jnp.full(len(cheap), jnp.inf), cheap))
        wrong = np.asarray(~agree_on_labels(cheap, answers, form))
        queries, copies = self._queries, self._effort.known_copies
        shape = self._effort.shape(queries, copies * queries)
        drawn = self._latencies.draw(9, (copies, *shape))
        point = self._latencies.random(10).integers(0, len(unsure), shape)
        found: Probabilities = {}
        for share in self._effort.hedge_quantiles:
            hedge = simulate.Hedge(self._latencies.quantile(share))
            late = float(np.mean(hedge.outcome(drawn[:1], drawn[1:]).late))
            # Half of what may be wrong leaves room for chance on the other half.
            limits = set() if not late else {
                probability.limit(min(self._wanted / late, 1.0) / part) for part in (1, 2)
            }  # fmt: skip
            for limit in sorted(limits - {0.0}):
                sure = unsure <= limit
                wrongly = Estimate.over((sure & wrong).astype(float).tolist())
                most = disagreement(wrongly, len(unsure))["most_disagreement"]
                served = hedge.outcome(drawn[:1], drawn[1:], known=sure[point])
                row = dataclasses.replace(
                    Candidate(KNOWN, queries, queries, queries, 0.0, exact=False, limit=limit),
                    copies=copies,
                    hedge_after=hedge.limit,
                    disagreement=Estimate(late * wrongly.mean, late * wrongly.half_width),
                    most_disagreement=late * most,
                )
                resent = float(np.mean(served.calls)) - 1
                found[row.seen(np.max(served.seconds, axis=1), resent=resent)] = probability
        return found

    def doubted(self) -> Probabilities:
        """Measure copies of what the surrogate is least sure of, which then answers what is late.

        All are screened on the first half, and the fastest of those that keep to what is asked are
        measured on the other one.
        """
        queries = self._queries

        def measured(row: Candidate, half: Half) -> Candidate:
            """Return the row with its times and its disagreement, on a half's groups in order."""
            cheap, answers, form = half.outputs()
            cheap, answers = (each[: len(each) // queries * queries] for each in (cheap, answers))
            off = ~agree_on_labels(cheap, answers, form)
            outputs = cheap if form is None else form.split(cheap)
            scheme = Scheme(row.code, Surrogate(lambda _: outputs), **row.placement)
            encoders = scheme.encoders(scheme.prepare(cheap))
            judged = half is self._held_out
            draws = self._effort.draws if judged else self._effort.screen_draws
            own = np.swapaxes(np.asarray(encoders) > 0.5, 1, 2)[:, None]
            rule = Waiting(self._latencies.law, own, row.wait_for, row.min_wait)
            _, end, there = rule.draw(self._latencies, 11, (len(own), -(-draws // len(own))))
            wrong = (there > end[..., None]) & np.asarray(off).reshape(len(own), 1, queries)
            share = Estimate.over(np.mean(wrong, axis=(1, 2)).tolist())
            return row.seen(end.ravel(), **disagreement(share, off.size), held_out=judged)

        found = []
        for workers in self._workers(queries):
            for number in _waits(queries, workers):
                row = Candidate(DOUBTED, queries, workers, number, 0.0, "repeated", exact=False)
                late = measured(row, self._calibration).p99
                for min_wait in sorted({self._early, late}):
                    row = dataclasses.replace(row, min_wait=min_wait)
                    found.append(measured(row, self._calibration))
        kept = [row for row in found if row.disagreement.mean <= self._wanted]
        best = sorted(kept, key=lambda row: (row.p99, row.extra_work))[: self._effort.enough]
        return dict.fromkeys([*found, *(measured(row, self._held_out) for row in best)])

    def screen(
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
        kinds = ((k, n, points) for k in sizes for n in self._workers(k) for points in layouts)
        for num_data, num_workers, points in kinds:
            rows, numbers = [], _waits(num_data, num_workers)
            for number in numbers:
                row = Candidate(f"NeRCC {points}", num_data, num_workers, number, 0.0, points)
                row = dataclasses.replace(row, exact=False, held_out=False)
                late = row.seen(self._ends(row)).p99
                for min_wait in sorted({self._early, late}):
                    row = dataclasses.replace(row, min_wait=min_wait)
                    row = row.seen(self._ends(row))
                    shown = number == numbers[-1] and min_wait == late
                    if shown or row.p99 < fastest:
                        rows.append(row)
            for order in orders:
                for row in rows:
                    row = dataclasses.replace(row, order=order)
                    found.append(row.seen(**self._measured(row, self._calibration).disagreement))
        return found

    def measure(
        self, screened: Sequence[Candidate], fastest: float, key: PRNGKeyArray
    ) -> Probabilities:
        """Measure the most promising on the held-out half, as they are and with re-execution.

        Return the error probability of those that send again what is uncertain.
        """
        fast = [row for row in screened if row.p99 < fastest and self._wanted > 0]
        plain: Probabilities = {}
        again: Probabilities = {}
        entries = [
            (row.p99, row.extra_work, row) for row in fast if row.disagreement.mean <= self._wanted
        ]
        for row in self._in_turn(entries, plain):
            measured = self._measured(row, self._held_out)
            times = self._ends(row, self._effort.draws)
            plain[row.seen(times, **measured.disagreement, held_out=True)] = None

        entries = []
        for row in fast:  # if three times the wrong ones are sent again
            _, end, own = self._draw(row, 1, self._effort.screen_draws)
            unknown, share = own > end[..., None], 3 * row.disagreement.mean
            random = self._latencies.random(0).random(own.shape)
            resent = unknown & (random < share / max(np.mean(unknown), 1e-9))
            seconds = self._latencies.draw(2, own.shape)
            p99 = row.seen(last_prediction(end, own, resent, seconds)).p99
            if p99 < fastest and row.extra_work + share <= self._asked["max_extra_work"]:
                entries.append((p99, row.extra_work + share, row))
        for row in self._in_turn(entries, again):
            again |= self._with_error_probability(row, key)
        return plain | again

    def _in_turn(
        self, entries: list[tuple[float, float, Candidate]], measured: Mapping[Candidate, Any]
    ) -> Iterator[Candidate]:
        """Yield by p99, then by extra work, until enough of the measured ones keep what is asked.

        Among p99s within 3 % the cheaper comes first.
        """
        step = math.log(1 + self._effort.alike)
        order = sorted(entries, key=lambda e: (round(math.log(e[0]) / step), e[1], e[0]))
        for _, _, row in order[: self._effort.most]:
            kept = sum(other.most_disagreement <= self._wanted for other in measured)
            if kept >= self._effort.enough:
                return
            yield row

    def _with_error_probability(self, row: Candidate, key: PRNGKeyArray) -> Probabilities:
        """Measure re-execution of uncertain ones, for this disagreement and for half of it."""
        code, rule = self._rule(row)
        known = self._calibration.answers(row.order, row.num_data).of(code)
        sets = self._effort.calibration_sets
        probability = error_probability_from_answers(known, {"rule": rule}, key, sets)
        seen = self._measured(row, self._held_out, probability)
        # A plan is asked for a share of all labels, a limit for one of those that are not exact.
        wanted = min(self._wanted / max(float(probability.shares[0]), 1e-9), 1.0)
        limits = {probability.limit(wanted), probability.limit(wanted / 2)}

        # When the last of the groups' predictions is there, a few draws for each.
        groups = self._queries // row.num_data
        order = self._latencies.random(0).permutation(seen.end.size)
        order = np.tile(order[: order.size // groups * groups].reshape(-1, groups), (4, 1))
        end, own = seen.end.reshape(-1)[order], seen.own.reshape(-1, row.num_data)[order]
        seconds = self._latencies.draw(2, own.shape)
        found: Probabilities = {}
        # With a limit of 0 all is sent again that has no answer of its own: replication does that.
        for limit in sorted(limits - {0.0}):
            again = seen.error_probability > limit
            times = last_prediction(end, own, again.reshape(-1, row.num_data)[order], seconds)
            left = seen._replace(wrong=seen.wrong & ~again).disagreement
            resent = float(np.mean(again))
            again_row = row.seen(times, **left, limit=limit, resent=resent, held_out=True)
            found[again_row] = probability
        return found

    def _measured(
        self, row: Candidate, half: Half, probability: ErrorProbability | None = None
    ) -> Measured:
        screening = half is self._calibration
        sets = self._effort.screen_sets if screening else self._effort.sets
        code, rule = self._rule(row)
        coded = half.answers(row.order, row.num_data)
        answers, labels = np.asarray(coded.of(code).coded), np.argmax(coded.own, axis=-1)
        shape = len(labels), sets
        mask, end, own = rule.draw(self._latencies, 3 if screening else 4, shape)
        known = own <= end[..., None]
        wrong, unsure = np.zeros(known.shape, bool), np.zeros(known.shape)
        rows = np.argwhere(~known.all(axis=-1))
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            group, index = np.resize(part, (_CHUNK, 2)).T
            y, responded = jnp.asarray(answers[group]), jnp.asarray(mask[group, index])
            decoded = _decode(code, y, responded, jnp.asarray(labels[group]), probability)
            for kept, new in zip((wrong, unsure), decoded, strict=True):
                kept[tuple(part.T)] = np.asarray(new)[: len(part)]
        unsure[known] = 0
        return Measured(end, own, wrong & ~known, unsure)


def _waits(num_data: int, num_workers: int) -> list[int]:
    """Return numbers of answers to wait for: all but 1, 2, 4, ... and N - K; at least K / 2."""
    missing = {1, 2, 4, 8, 16, num_workers - num_data} - {0}
    least = max(num_data // 2, 1)
    return sorted({num_workers - number for number in missing if num_workers - number >= least})


@eqx.filter_jit
def _decode(
    code: NeRCC,
    answers: Float[Array, "groups num_workers outputs"],
    mask: Bool[Array, "groups num_workers"],
    labels: Int[Array, "groups num_data"],
    error_probability: ErrorProbability | None,
) -> tuple[Array, Array]:
    """Return which labels differ or are lost, and their error probabilities (or 0)."""
    if error_probability is None:
        decoded, trust = decode_groups(code, answers, mask), jnp.zeros(labels.shape)
    else:
        decoded, deviation = decode_with_deviation(code, None, answers, mask)
        trust = error_probability(decoded.predictions, deviation)
    return (jnp.argmax(decoded.predictions, axis=-1) != labels) | ~decoded.recovered, trust
