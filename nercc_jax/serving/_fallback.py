"""The fallback for queries whose own workers straggle: predict, decode, or send again.

`GroupPredictor` and `GroupDecoder` make approximate answers, and `FallbackPolicy` decides.
"""

import dataclasses
import math
from collections.abc import Container, Iterable
from typing import NamedTuple

import numpy as np

from ..pools.batch import answers_to_wait_for
from ..pools.clock import AbstractClock
from ._policy import BatchingPolicy
from .adapt._adaptation import Adaptation
from .core._coder import Coder
from .core._group import Group, GroupPrediction
from .core._request import CODED, Answer, ApproximateAnswer, BatchSpec, Query


@dataclasses.dataclass(frozen=True)
class GroupAnswer:
    """An answer that is not the model's own, and the cell and row of its query in the group.

    It is forced where it is less certain than was promised, but the budget allows no other.
    """

    cell: int
    row: int
    answer: Answer
    forced: bool = False


class GroupPredictor:
    """Looks up a surrogate's answers to a group's queries, once for each query."""

    def __init__(
        self,
        adaptation: Adaptation,
        policy: BatchingPolicy,
        queries: BatchSpec,
        answers: BatchSpec,
        clock: AbstractClock,
    ):
        """Create a lookup.

        Raises:
            ValueError: where the policy needs a surrogate and there is none, or where queries or
                answers cannot be predicted.
        """
        self._adaptation, self._shape, self._clock = adaptation, answers.shape, clock
        if adaptation.predictor is not None:
            dtypes = [str(each.dtype) for each in (queries, answers)]
            if {queries.dtype, answers.dtype} != {CODED}:
                raise ValueError(f"only float32 can be predicted, not {dtypes}")
        elif policy.redundancy == "uncertain":
            raise ValueError(
                "redundancy 'uncertain' needs a predictor (`--surrogate`): nothing else tells what "
                "is uncertain"
            )

    def predictions(
        self, group: Group, cells: Iterable[int]
    ) -> dict[tuple[int, int], GroupPrediction]:
        """Return predictions for the open queries of these cells, by cell and row.

        Empty while no surrogate is ready. A query is looked up once: what a surrogate learns while
        the query waits is hardly more.
        """
        predictor = self._adaptation.predictor
        if predictor is None or not self._adaptation.can_predict:
            return {}  # nor what it predicted before it drifted
        waiting = list(group.open_queries(cells))
        new = [each for each in waiting if each[:2] not in group.predictions]
        if new:
            begin = self._clock.now()
            x = [query.x for *_, query in new if query.x is not None]
            assert len(x) == len(new), "queries that somebody waits for have their data"
            found = predictor.predict(np.stack(x))
            if found is None:
                return {}
            end = self._clock.now()
            self._adaptation.observe("predict_seconds", end - begin)
            basis = int(group.sent.sum()), int(group.mask.sum())
            for place, (cell, row, _) in enumerate(new):
                value = found.values[place].reshape(self._shape)
                errors = float(found.disagreement[place]), float(found.error_bound[place])
                answer = Answer(value, "predicted", *basis, *errors)
                group.predictions[cell, row] = GroupPrediction(answer, bool(found.sure[place]))
            if group.trace is not None:
                sure = int(found.sure.sum())
                group.trace.add("predict", begin, end, sure=sure, uncertain=len(new) - sure)
        return {each[:2]: group.predictions[each[:2]] for each in waiting}


class GroupDecoder:
    """Decodes groups, and decides which decoded answers are good enough to be given out."""

    def __init__(
        self,
        coder: Coder,
        policy: BatchingPolicy,
        adaptation: Adaptation,
        clock: AbstractClock,
    ):
        """Create a decoder.

        Raises:
            ValueError: where `wait_for` does not fit the code, or nothing gives error bars for a
                tolerance.
        """
        self._coder, self._adaptation, self._clock = coder, adaptation, clock
        self._width, self._resends = policy.max_batch_size, policy.max_reexecution is not None
        self._accuracy = policy.accuracy
        if policy.tolerance is not None and not (
            adaptation.predictor is not None or coder.has_deviation
        ):
            raise ValueError(
                f"a tolerance needs error bars, and {type(coder.code).__name__} has none: give a "
                "predictor (`--surrogate`), or NeRCC with K of 2 or more"
            )
        num_data, num_workers = coder.num_data, coder.num_workers
        # The number of answers that suffice to decode a full group if no error is estimated.
        enough = policy.wait_for
        if enough is None and coder.systematic:
            enough = num_workers - (num_workers - num_data) // 2
        elif enough is None:
            enough = answers_to_wait_for(num_data, num_workers)
        if not 1 <= enough <= num_workers:
            raise ValueError(f"wait_for must be from 1 to N = {num_workers}, not {enough}")
        self.enough = enough

    def decode_group(
        self, group: Group, cells: list[int], last: bool, skip: Container[tuple[int, int]]
    ) -> tuple[list[GroupAnswer], list[GroupAnswer]]:
        """Decode the queries of cells whose own workers will not answer in time.

        If this is the `last` time, no further answers are waited for. Cells and rows to skip have
        an answer already.

        Returns:
            The answers that may be given out, and the best there are to other queries. Both are
            empty where no answer is sound, or none could be given.
        """
        number = len(group.cells)
        if not self._accuracy.promises:
            limit, decodes = math.inf, self._enough_answers(group, last)
        elif not self._coder.ranks(self._accuracy):
            return [], []  # no decoded answer has a bar
        else:
            limit, risk = self._adaptation.scores.limit(number), self._adaptation.risk("decoded")
            # What has no calibration, or has had a drift, is compared without being given out.
            limit = limit if risk.drifts == 0 else -1.0
            decodes = limit > 0 or not risk.waits or (last and (self._resends or risk.waits))
        if not decodes:
            return [], []
        begin = self._clock.now()
        predictions, sound, features, probability = self.decode(
            group.values(), group.decodable, number
        )
        decoded = self._clock.now()
        self._adaptation.observe("decode_seconds", decoded - begin)
        self._adaptation.observe("workers_responded", int(group.mask.sum()))
        error = np.full_like(probability, np.nan)
        good = probability <= limit if self._accuracy.promises else np.isnan(probability)
        if self._accuracy.tolerance is not None:
            probability, error = error, probability
        basis = int(group.sent.sum()), int(group.mask.sum())
        found: tuple[list[GroupAnswer], list[GroupAnswer]] = [], []
        for cell, row, _ in group.open_queries(cells):
            if sound[row, cell] and (cell, row) not in skip:
                errors = float(probability[row, cell]), float(error[row, cell])
                value, known = predictions[row, cell, ...], features[row, cell].copy()
                answer = Answer(value, "decoded", *basis, *errors, features=known)
                found[not good[row, cell]].append(GroupAnswer(cell, row, answer))
        if group.trace is not None:
            group.trace.add("decode", begin, decoded, answers=basis[1])
            sure, uncertain = map(len, found)
            now = self._clock.now()
            group.trace.add("error probability", decoded, now, sure=sure, uncertain=uncertain)
        return found

    def decode(
        self, values: np.ndarray, mask: np.ndarray, queries: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Decode values for a number of queries.

        Returns:
            By row and place: the predictions; whether they are sound, since a code may have lost a
            query, or a sum of large answers may have overflowed; the features of their score; and
            the score, the probability of a wrong label or the error bar of values.
        """
        promises = self._accuracy.promises
        score = self._adaptation.scores.of(queries) if promises else None
        found = self._coder.decode(values, mask, self._width, score, features=promises)
        assert found.score is not None
        finite = np.isfinite(found.predictions).reshape(*found.score.shape, -1).all(axis=-1)
        parts = found.predictions, found.recovered & finite, found.features, found.score
        predictions, sound, features, score = (each[:, :queries] for each in parts)
        return predictions, sound, features, score

    def ready(self, group: Group, last: bool) -> bool:
        """Return whether it makes sense to decode a group now."""
        answers = int(group.decodable.sum())
        waited = self._coder.systematic or answers >= self.enough or last
        return bool(answers) and waited and self._coder.can_decode

    def _enough_answers(self, group: Group, last: bool) -> bool:
        """Return whether the number of answers alone allows decoding."""
        answers = int(group.decodable.sum())
        enough, least = self.enough, min(group.coder.num_data, self.enough)
        if group.coder.systematic:
            redundancy = int((group.sent & ~group.moved).sum()) - len(group.cells)
            enough = enough if group.full else len(group.cells) + redundancy // 2
            least = max(len(group.cells) - 2, 1)
        return answers >= enough or (last and answers >= least)


class Budget:
    """A share of the queries that may be spent on further calls, earned as queries come.

    No stretch of queries costs much more than its share: at most what `_SAVED` queries earn is kept
    for later.
    """

    _SAVED = 1000

    def __init__(self, share: float | None):
        """Create a budget; a share of None means no bound."""
        self._share, self._left = share, 0.0

    def earn(self, queries: int) -> None:
        if self._share is not None:
            self._left = min(self._left + self._share * queries, max(self._share * self._SAVED, 1))

    def affords(self) -> bool:
        return self._share is None or self._left >= 1

    def spend(self) -> None:
        if self._share is not None:
            self._left -= 1


class Fallback(NamedTuple):
    """The answers to give out now, and the queries to send again."""

    answers: list[GroupAnswer]
    resend: list[Query]


class FallbackPolicy:
    """Decides what becomes of queries whose own workers straggle.

    It takes the cheapest way that is good enough: a surrogate's answer, a decoded one, and else a
    second call within the `budget`. Of a group it changes only which stragglers are counted.
    """

    def __init__(
        self,
        coder: Coder,
        policy: BatchingPolicy,
        adaptation: Adaptation,
        predictor: GroupPredictor,
        decoder: GroupDecoder,
    ):
        self._coder, self._adaptation, self._observe = coder, adaptation, adaptation.observe
        self._predictor, self._decoder = predictor, decoder
        self.budget = Budget(policy.max_reexecution)

    def decide(self, group: Group, late: np.ndarray, *, hedges: bool) -> Fallback:
        """Decide about a group's queries; coded data points that are late are not waited for.

        Without hedging, only queries whose calls have failed are sent again.
        """
        if self._coder.systematic and not late.any():
            return Fallback([], [])  # each query has a worker of its own that is in time
        lost = [
            number
            for number, cell in enumerate(group.cells)
            if cell.pending and not (group.sent & ~late)[group.layout.own[number]].any()
        ]
        if not lost:
            return Fallback([], [])
        self._observe("straggler", int((late & ~group.counted).sum()))
        group.counted |= late
        last = not (group.outstanding & ~late).any()
        approximates = self._adaptation.approximates
        good, best = self._predicted(group, lost) if approximates and late.any() else [], []
        if approximates and self._decoder.ready(group, last):
            answered = {(given.cell, given.row) for given in good}
            sure, best = self._decoder.decode_group(group, lost, last, answered)
            admitted = self._admitted(group, sure) + self._admitted(group, best, calibrated=False)
            places = {(given.cell, given.row) for given in admitted}
            best = [each for each in best + sure if (each.cell, each.row) not in places]
            good += admitted
        if not last:
            return Fallback(good, [])
        if not hedges:
            # Those whose own coded data points will get no answer.
            sent = {each: group.layout.own[each] for each in lost}
            sent = {each: points[group.sent[points]].tolist() for each, points in sent.items()}
            lost = [each for each in lost if all(map(group.batch.abandoned, sent[each]))]
        more, resend = self._resend(group, lost, good, best)
        return Fallback(good + more, resend)

    def _predicted(self, group: Group, cells: list[int]) -> list[GroupAnswer]:
        """Return the predictions for these cells that may be given out."""
        found = self._predictor.predictions(group, cells)
        answers = {each.sure: [] for each in found.values()}
        for place, each in found.items():
            answers[each.sure].append(GroupAnswer(*place, each.answer))
        self._remember(group, answers.get(False, []))
        return self._admitted(group, answers.get(True, []))

    def _admitted(
        self, group: Group, answers: list[GroupAnswer], *, calibrated: bool = True
    ) -> list[GroupAnswer]:
        """Return the answers that may be given out by what was seen of other stragglers."""
        self._remember(group, answers)
        found = []
        for each in answers:
            if self._adaptation.admits(each.answer, calibrated=calibrated):
                risk = self._adaptation.risk(each.answer.source)
                shown = map(float, risk.expected(each.answer.disagreement, each.answer.error))
                disagreement, error = shown
                if each.answer.error > 0:
                    query = group.cells[each.cell].queries[each.row]
                    record = query.approximate[each.answer.source]
                    record.widened = error / each.answer.error
                answer = dataclasses.replace(each.answer, disagreement=disagreement, error=error)
                found.append(dataclasses.replace(each, answer=answer))
        return found

    def _remember(self, group: Group, answers: list[GroupAnswer]) -> None:
        """Have answers compared with the model's own, whether they are given out or not."""
        for each in answers:
            query = group.cells[each.cell].queries[each.row]
            source = each.answer.source
            epoch = self._adaptation.risk(source).epoch
            query.approximate[source] = ApproximateAnswer(each.answer, query.x, epoch)

    def _resend(
        self, group: Group, cells: list[int], good: list[GroupAnswer], best: list[GroupAnswer]
    ) -> Fallback:
        """Send queries again, once each, the least certain first; beyond the budget give `best`."""
        uncertain = {(given.cell, given.row): given for given in best}
        answered = {(given.cell, given.row) for given in good}
        left = [
            (cell, row, query)
            for cell, row, query in group.open_queries(cells)
            if not query.reexecuted and (cell, row) not in answered
        ]

        def certainty(each: tuple[int, int, Query]) -> float:
            given = uncertain.get(each[:2])
            if given is None:
                return -1.0
            disagreement = given.answer.disagreement
            return 0.0 if math.isnan(disagreement) else 1 - disagreement

        answers, resend = [], []
        for cell, row, query in sorted(left, key=certainty):
            answer = uncertain.get((cell, row))
            if answer is not None and not self.budget.affords():
                self._observe("over_budget", 1)
                answers.append(dataclasses.replace(answer, forced=True))
                continue
            self.budget.spend()
            query.reexecuted = True
            if query.request.trace is not None:
                query.request.trace.send_again(query.place)
            self._observe("reexecution", 1)
            resend.append(query)
        return Fallback(answers, resend)
