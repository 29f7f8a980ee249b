"""NeRCC codes measured for the planner: screened on one half of the data, judged on the other."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree

from ..codes import NeRCC, decode_groups
from ..codes._trees import Form, join
from ..evaluation import Estimate
from ..evaluation._answers import Recorder, batched, cut_groups
from ..inference import order_points
from ..inference.models import Model
from ..risk import ErrorProbability
from ..risk._error_probability import error_probability_from_answers
from ..stragglers._waiting import Latencies, Waiting, draw_groups, last_prediction, own_workers
from ..surrogates.surrogate import decode_with_deviation
from ._candidates import (
    EARLY,
    PROMISED,
    Candidate,
    at_most,
    make_candidate,
    number_of_draws,
    numbers_of_workers,
    waits,
)

# Straggler sets that each group meets: in screening, on held-out data, in calibration.
_SCREEN_SETS, TOLD_SETS, _CALIBRATION_SETS = 4, 48, 64
_SCREEN_DRAWS, _TOLD_DRAWS = 5_000, 20_000
# Of draws that must not be the same; what is compared with each other meets the same.
_STREAMS = {"shuffle": 0, "ends": 1, "again": 2, "screen": 3, "held_out": 4}
_CHUNK = 512  # groups that are decoded at a time
_ENOUGH, _MOST = 3, 10  # measured are those with the least p99: till so many do, and no more
_STEP = math.log(1.03)  # in the logarithm of the p99, among which the cheaper comes first


class Screened(NamedTuple):
    """A code, a rule, and how it did at a first look."""

    code: NeRCC
    rule: Waiting
    row: Candidate


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
        self._surrogate = None if surrogate is None else batched(surrogate, batch_size)
        groups = cut_groups(x, 1)
        self.x = groups[:, 0]
        recorder = Recorder(self._run, groups, batch_size)
        self._own, self._form = recorder.own[:, 0], recorder.form
        self._answers: dict[tuple[str | None, int], Recorder] = {}

    def answers(self, order: str | None, num_data: int) -> Recorder:
        """Return the model's answers on groups in this order."""
        if (order, num_data) not in self._answers:
            places = self._places(order, num_data)
            self._answers[order, num_data] = Recorder(
                self._run, self.x[places], self._batch_size, (self._own[places], self._form)
            )
        return self._answers[order, num_data]

    @functools.cached_property
    def _cheap(self) -> PyTree[Float[Array, "points ..."]]:
        assert self._surrogate is not None
        return self._surrogate(self.x)

    def outputs(self) -> tuple[Float[Array, "points m"], Float[Array, "points m"], Form | None]:
        """Return the surrogate's outputs and the model's, as vectors, and their form."""
        form = None if self._form.is_vector else self._form
        return join(self._cheap, 1)[0], jnp.asarray(self._own), form

    def _places(self, order: str | None, num_data: int) -> Int[np.ndarray, "groups num_data"]:
        places = np.arange(len(self.x))
        if order is not None:
            features = None
            if order == "surrogate":
                features = self._cheap
            size = self._buffer_size
            x = jnp.asarray(self.x)
            places = order_points(x, num_data, features=features, buffer_size=size)
        whole = len(self.x) // num_data * num_data
        return np.asarray(places)[:whole].reshape(-1, num_data)


class Codes:
    """The codes that a plan compares, under one law of latency.

    `fastest` is the p99 of the best that takes no code: only faster ones are looked at.
    """

    def __init__(
        self,
        latencies: Latencies,
        asked: Mapping[str, Any],
        halves: tuple[Half, Half],
        fastest: float,
    ):
        self._latencies, self._asked, self._fastest = latencies, asked, fastest
        self._calibration, self._held_out = halves

    def screen(
        self, sizes: Sequence[int], layouts: Sequence[str], orders: Sequence[str | None]
    ) -> list[Screened]:
        """Return all codes and rules that might be faster, by few sets on the first half."""
        found = []
        for num_data in sizes:
            for num_workers in numbers_of_workers(num_data, self._asked):
                for points in layouts:
                    code = NeRCC(num_data, num_workers, points=points, exact=True)
                    rules = list(self._rules(code))
                    for order in orders:
                        found += [
                            self._look(code, rule, points, order, times) for rule, times in rules
                        ]
        return found

    def _rules(self, code: NeRCC) -> Iterator[tuple[Waiting, np.ndarray]]:
        """Return rules by which a code may be faster, and times to the last prediction under them.

        Waiting until the p99 of the time in which enough answer makes that p99 no later, and most
        others are in by then. One rule is always there, so that every code is shown.
        """
        early = self._latencies.quantile(EARLY)
        own, numbers = own_workers(code), waits(code.num_data, code.num_workers)
        for number in numbers:
            late = self._ends(Waiting(self._latencies.law, own, number, 0.0))
            late = float(np.quantile(late, PROMISED))
            for min_wait in sorted({early, late}):
                rule = Waiting(self._latencies.law, own, number, min_wait)
                times = self._ends(rule)
                shown = number == numbers[-1] and min_wait == late
                if shown or np.quantile(times, PROMISED) < self._fastest:
                    yield rule, times

    def _ends(self, rule: Waiting, draws: int = _SCREEN_DRAWS) -> Float[np.ndarray, " draws"]:
        """Return when the last of all groups ends, if nothing is sent again."""
        return np.max(self._draw(rule, draws)[1], axis=1)

    def _draw(self, rule: Waiting, draws: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        num_data, num_workers = rule.own.shape
        groups = self._asked["num_queries"] // num_data
        shape = (number_of_draws(draws, groups * num_workers), groups)
        return draw_groups(rule, self._latencies, _STREAMS["ends"], shape)

    def _look(
        self, code: NeRCC, rule: Waiting, points: str, order: str | None, times: np.ndarray
    ) -> Screened:
        row = make_candidate(
            f"NeRCC {points}",
            *(code.num_data, code.num_workers, int(rule.number), float(rule.min_wait)),
            times=times,
            points=points,
            order=order,
            exact=False,
            held_out=False,
        )
        wrong = self._measured(Screened(code, rule, row), self._calibration, "screen").wrong
        return Screened(code, rule, _with(row, **_disagreement(wrong)))

    def _measured(
        self,
        entry: Screened,
        half: Half,
        what: str,
        error_probability: ErrorProbability | None = None,
    ) -> "_Measured":
        sets = _SCREEN_SETS if what == "screen" else TOLD_SETS
        return _Measured(*entry, half, self._latencies, sets, _STREAMS[what], error_probability)

    def measure(
        self, screened: Sequence[Screened], key: PRNGKeyArray
    ) -> tuple[list[Candidate], dict[Candidate, ErrorProbability]]:
        """Measure the most promising on the held-out half, as they are and with re-execution."""
        wanted, most = (self._asked[n] for n in ("max_disagreement", "max_extra_work"))
        fast = [s for s in screened if s.row.p99 < self._fastest and wanted > 0]
        plain = [s for s in fast if s.row.disagreement.mean <= wanted]
        rows: list[Candidate] = []
        probabilities: dict[Candidate, ErrorProbability] = {}
        for entry in _in_turn([(s.row.p99, s.row.extra_work, s) for s in plain], rows, wanted):
            seen = self._measured(entry, self._held_out, "held_out")
            times = self._ends(entry.rule, _TOLD_DRAWS)
            rows.append(_with(entry.row, times, **_disagreement(seen.wrong), held_out=True))
        again = [(*self._guess(s), s) for s in fast]
        again = [g for g in again if g[0] < self._fastest and g[1] <= most]
        summary: list[Candidate] = []
        for entry in _in_turn(again, summary, wanted):
            error_probability, found = self._with_error_probability(entry, key)
            summary += found
            probabilities |= dict.fromkeys(found, error_probability)
        return rows + summary, probabilities

    def _guess(self, entry: Screened) -> tuple[float, float]:
        """Estimate the p99 and the extra work if three times the wrong ones are sent again."""
        _, end, own = self._draw(entry.rule, _SCREEN_DRAWS)
        unknown = own > end[..., None]
        share = 3 * entry.row.disagreement.mean
        random = self._latencies.random(_STREAMS["shuffle"])
        again = unknown & (random.random(own.shape) < share / max(np.mean(unknown), 1e-9))
        seconds = self._latencies.draw(_STREAMS["again"], own.shape)
        times = last_prediction(end, own, again, seconds)
        return float(np.quantile(times, PROMISED)), entry.row.extra_work + share

    def _with_error_probability(
        self, entry: Screened, key: PRNGKeyArray
    ) -> tuple[ErrorProbability, list[Candidate]]:
        """Measure re-execution of uncertain ones, for this disagreement and for half of it."""
        code, row = entry.code, entry.row
        known = self._calibration.answers(row.order, row.num_data).of(code)
        error_probability = error_probability_from_answers(
            known, {"rule": entry.rule}, key, _CALIBRATION_SETS
        )
        seen = self._measured(entry, self._held_out, "held_out", error_probability)
        groups = self._asked["num_queries"] // code.num_data
        # A plan is asked for a share of all labels, a limit for one of those that are not exact.
        wanted = self._asked["max_disagreement"] / max(float(error_probability.shares[0]), 1e-9)
        wanted = min(wanted, 1.0)
        found = []
        # With a limit of 0 all is sent again that has no answer of its own: replication does that.
        for limit in sorted(
            {error_probability.limit(wanted), error_probability.limit(wanted / 2)} - {0.0}
        ):
            again = seen.error_probability > limit
            times = seen.times(again, self._latencies, groups)
            found.append(
                _with(
                    row,
                    times,
                    **_disagreement(seen.wrong & ~again),
                    limit=limit,
                    resent=float(np.mean(again)),
                    held_out=True,
                )
            )
        return error_probability, found


class _Measured:
    """One half's data points, (groups, sets, K), under a code and a rule.

    `end` is when their group ended, `own` when their own answer comes; `wrong` are labels that
    differ; `error_probability` is 0 for answers of one's own, and where it is not calibrated.
    """

    def __init__(
        self,
        code: NeRCC,
        rule: Waiting,
        row: Candidate,
        half: Half,
        latencies: Latencies,
        sets: int,
        stream: int,
        error_probability: ErrorProbability | None,
    ):
        coded = half.answers(row.order, row.num_data)
        answers, labels = np.asarray(coded.of(code).coded), np.argmax(coded.own, axis=-1)
        mask, self.end, self.own = draw_groups(rule, latencies, stream, (len(labels), sets))
        known = self.own <= self.end[..., None]
        self.wrong, self.error_probability = np.zeros(known.shape, bool), np.zeros(known.shape)
        rows = np.argwhere(~known.all(axis=-1))
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            group, index = np.resize(part, (_CHUNK, 2)).T
            given, responded, wanted = map(
                jnp.asarray, (answers[group], mask[group, index], labels[group])
            )
            summary = _decode(code, given, responded, wanted, error_probability)
            for kept, new in zip((self.wrong, self.error_probability), summary, strict=True):
                kept[tuple(part.T)] = np.asarray(new)[: len(part)]
        self.wrong &= ~known
        self.error_probability[known] = 0

    def times(
        self, again: np.ndarray, latencies: Latencies, groups: int
    ) -> Float[np.ndarray, " draws"]:
        """Return when the last of this many groups' predictions is there, a few draws for each."""
        order = latencies.random(_STREAMS["shuffle"]).permutation(self.end.size)
        order = np.tile(order[: order.size // groups * groups].reshape(-1, groups), (4, 1))
        end = self.end.reshape(-1)[order]
        own, again = (part.reshape(-1, part.shape[-1])[order] for part in (self.own, again))
        seconds = latencies.draw(_STREAMS["again"], own.shape)
        return last_prediction(end, own, again, seconds)


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


def _disagreement(wrong: Bool[np.ndarray, "groups sets num_data"]) -> dict[str, Any]:
    """Return the share of labels that differ; groups are independent, sets are not."""
    share = Estimate.over(np.mean(wrong, axis=(1, 2)).tolist())
    most = at_most(share, wrong.shape[0] * wrong.shape[2])
    return {"disagreement": share, "most_disagreement": most}


def _in_turn(
    entries: Sequence[tuple[float, float, Screened]], summary: list[Candidate], wanted: float
) -> Iterator[Screened]:
    """Yield entries by p99, then by extra work, until enough of the measured ones will do."""
    order = sorted(entries, key=lambda e: (round(math.log(e[0]) / _STEP), e[1], e[0]))
    for _, _, entry in order[:_MOST]:
        if sum(row.most_disagreement <= wanted for row in summary) >= _ENOUGH:
            return
        yield entry


def _with(row: Candidate, times: np.ndarray | None = None, **changes: Any) -> Candidate:
    """Return the same candidate with other numbers."""
    if times is not None:
        changes |= {
            "p50": float(np.quantile(times, 0.5)),
            "p99": float(np.quantile(times, PROMISED)),
        }
    extra = row.num_workers / row.num_data - 1 + changes.get("resent", row.resent)
    return dataclasses.replace(row, extra_work=extra, **changes)
