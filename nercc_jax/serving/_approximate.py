"""Approximate answers: how they are computed, returned, and compared with the model's own answers.

Queries hold their approximate answers by source (`Query.approximate`). Each is compared with the
model's own answer, however late that comes, whether it was returned to the client or not.
`core/decide.py` decides which ones are returned.

The deciding thread calls these methods, so each returns at once. One other thread trains the
surrogate and picks the setting; it hands over immutable objects.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..arrays import root_mean_square
from ..evaluation.criteria import agree_on_labels
from ..inference.models import check_conditions
from ..risk import Comparison, Risk
from ..risk.accuracy import error_ratios
from ._policy import MAX_DEADLINE_S
from .adapt._decoding import DecodingScores
from .adapt._predictor import Predictor
from .adapt._setting_controller import SettingController
from .core._group import Group, Place
from .core._request import Answer, Query, Request, Source, repeat_rows
from .core._setup import DispatchSetting, Setup
from .core.decide import GiveOut, LateEvidence

_LOG = logging.getLogger(__name__)

_PAUSE = 1.0  # seconds before the learning thread continues after a failure
# The most bytes of groups kept for late answers, and the bytes of a group without its arrays.
_KEPT, _GROUP = 1 << 26, 1 << 14


class Approximations:
    """The two sources of approximate answers, their comparison, and the choice of settings.

    Groups wait for late answers in bounded memory.

    Attributes:
        setup: The batcher's parts; their `observe` also informs the choice of settings.
        turns: The learning thread, not started yet.
        decoded: The evidence from stragglers on the risk of decoded answers.
        predictor: The surrogate, calibrated or not; None without one.
    """

    def __init__(
        self,
        setup: Setup,
        scores: DecodingScores,
        predictor: Predictor | None,
        submit: Callable[[Request], bool],
    ):
        """Compile the decoder.

        `submit` submits a request of the server's own and returns True, or False if queries wait.

        Raises:
            ValueError: If the policy does not fit the predictor, or the accuracy for which the
                scores were calibrated.
        """
        policy, coder = setup.policy, setup.coder
        known, wanted = scores.accuracy, policy.accuracy
        if (known.tolerance, known.coverage) != (wanted.tolerance, wanted.coverage):
            raise ValueError(
                f"decoding was calibrated for a tolerance of {known.tolerance} and a coverage of "
                f"{known.coverage}, the policy has {wanted.tolerance} and {wanted.coverage}"
            )
        if scores.calibrated:
            check_conditions(setup.pool.conditions, scores)
        self.turns = setup.clock.turns("nercc-learning", self._turn)
        uncalibrated = wanted.promises and not scores.calibrated
        self.decoded = Risk(wanted, needs_evidence=uncalibrated)
        self._controller = None
        if policy.max_calls is not None:
            self._controller = SettingController(setup, predictor, self.decoded, self.turns.wake)
            setup = dataclasses.replace(setup, observe=self._controller.observe)
        self.setup, self.predictor, self._submit = setup, predictor, submit
        self._scores = dataclasses.replace(scores, accuracy=wanted)
        # Values without a tolerance have exact answers only.
        self._allowed = policy.outputs != "values" or policy.tolerance is not None
        self._setting = DispatchSetting.of_policy(policy)
        if coder.can_decode and not self._decodes:
            # Coded data points that mix queries are useless if nothing may be decoded.
            self._setting = self._setting._replace(redundancy="none")
        if predictor is not None:
            predictor.attach(setup, self.turns.wake)
        self._kept: dict[Group, int] = {}
        self._left = _KEPT
        if coder.can_decode:
            zeros, everyone = setup.answers.zeros(coder.num_workers), np.ones(coder.num_workers)
            coder.decode(zeros[:, None], everyone > 0, policy.max_batch_size)

    def _turn(self) -> float:
        """Run a turn of the predictor and the controller; return when the next one is due."""
        due = math.inf
        for learner in (self.predictor, self._controller):
            try:
                due = due if learner is None else min(due, learner.turn())
            except Exception:
                # Earlier results stay in use; the next turn may succeed.
                _LOG.exception("learning from the traffic failed")
                self.setup.observe("internal_error", 1)
                due = min(due, self.setup.clock.now() + _PAUSE)
        return due

    @property
    def _decodes(self) -> bool:
        """True if decoded answers may be returned: calibrated, or without a promised accuracy."""
        promises = self.setup.policy.accuracy.promises
        return self._allowed and (not promises or bool(self._scores.calibrated))

    @property
    def setting(self) -> DispatchSetting:
        """The present setting."""
        return self._setting if self._controller is None else self._controller.setting

    def _risk(self, source: Source) -> Risk:
        if source == "predicted":
            assert self.predictor is not None
            return self.predictor.risk
        return self.decoded

    def _limit(self, queries: int) -> float | None:
        """Return the limit of decoded answers' scores, as `LateEvidence.limit`."""
        if not self._scores.accuracy.promises:
            return math.inf
        if queries not in self._scores.calibrated:
            return None
        # After a drift, decoded answers are only compared, not returned.
        return self._scores.limit(queries) if self.decoded.drifts == 0 else -1.0

    def evidence(self, queries: int) -> LateEvidence:
        """Return the present evidence, for a group with this number of queries."""
        predictor = self.predictor
        risk: dict[Source, Risk] = {"decoded": self.decoded}
        if predictor is not None:
            risk["predicted"] = predictor.risk
        predicts = predictor is not None and self._allowed and predictor.state == "answering"
        limit = self._limit(queries)
        return LateEvidence(self.setting, self._allowed, predicts, limit, risk)

    def predict(self, group: Group, places: Sequence[Place]) -> None:
        """Add the surrogate's answers to a group's queries, once for each query.

        A surrogate learns hardly anything while a query waits. Until it is calibrated, and after a
        drift, no answers are added.
        """
        new = [query for query in map(group.query, places) if "predicted" not in query.approximate]
        setup, predictor = self.setup, self.predictor
        if not new or predictor is None or not self._allowed:
            return
        begin = setup.clock.now()
        # Open queries still have their data.
        x = np.stack([x for each in new if (x := each.x) is not None])
        found = predictor.predict(x)
        if found is None:
            return
        setup.observe("predict_seconds", setup.clock.now() - begin)
        epoch = predictor.risk.epoch
        basis = int((~np.isnan(group.sent_at)).sum()), int(group.mask.sum())
        values = found.predictions.reshape(-1, *setup.answers.shape)
        numbers = found.error_probability, found.deviation, found.recovered
        numbers = (np.asarray(each).tolist() for each in numbers)
        for query, value, known, error, sure in zip(new, values, *numbers, strict=True):
            about = {"x": query.x, "epoch": epoch, "within": sure}
            made = Answer(value, "predicted", *basis, known, error, **about)
            query.approximate["predicted"] = made

    def decode(self, group: Group, places: Sequence[Place]) -> None:
        """Add decoded answers to a group's queries, if they are recovered and finite.

        The sum of large answers may overflow.
        """
        setup, number = self.setup, len(group.cells)
        begin, accuracy = setup.clock.now(), setup.policy.accuracy
        known = [(point, each) for point, each in enumerate(group.answers) if each is not None]
        some = known[0][1]
        values = np.zeros((len(group.answers), group.rows, *some.shape[1:]), some.dtype)
        for point, answer in known:
            values[point] = repeat_rows(answer, group.rows)
        found = setup.coder.decode(values, group.mask, setup.policy.max_batch_size)
        scores, score = np.full((group.rows, number), np.nan), self._scores.calibrated.get(number)
        if score is not None and accuracy.promises:
            scores = setup.coder.score(values, found, score)
        setup.observe("decode_seconds", setup.clock.now() - begin)
        basis = int((~np.isnan(group.sent_at)).sum()), int(group.mask.sum())
        setup.observe("workers_responded", basis[1])
        limit, labels = self._limit(number), accuracy.tolerance is None
        assert limit is not None
        for cell, row in places:
            query, value = group.query((cell, row)), found.predictions[row, cell, ...]
            query.approximate.pop("decoded", None)
            if not found.recovered[cell] or not np.isfinite(value).all():
                continue
            known = float(scores[row, cell])
            query.approximate["decoded"] = Answer(
                value,
                "decoded",
                *basis,
                disagreement=known if labels else math.nan,
                error=math.nan if labels else known,
                x=query.x,
                epoch=self.decoded.epoch,
                within=known <= limit if accuracy.promises else math.isnan(known),
            )

    def give(self, group: Group, given: GiveOut) -> tuple[Query, Answer]:
        """Mark an approximate answer as given out; return its query, and the answer to send."""
        source = given.source
        query, tolerance = group.query(given.place), self.setup.policy.tolerance
        answer, risk = query.approximate[source], self._risk(source)
        disagreement, error = map(float, risk.expected(answer.disagreement, answer.error))
        if answer.error > 0:
            answer.widened = error / answer.error
        answer.given = True
        risk.give()
        self.setup.observe("expected_disagreement", disagreement)
        if tolerance is not None:
            self.setup.observe("expected_error", error / tolerance)
        basis = answer.asked, answer.responded
        return query, Answer(answer.value[None], source, *basis, disagreement, error)

    def learn(self, query: Query, own: np.ndarray | None) -> None:
        """Compare approximate answers to a query with the model's own, and train the surrogate.

        `own` is None if the model's own answer will never come.
        """
        x = query.x
        approximate, query.approximate = query.approximate, {}
        for each in approximate.values():
            right = self.audit(each, own)
            if each.given:
                known = "audit_same" if right else "audit_other"
                self.setup.observe("audit_unknown" if own is None else known, 1)
            x = each.x if x is None else x
        if x is not None and own is not None and self.predictor is not None:
            self.predictor.add_answer(x, own)

    def audit(self, given: Answer, own: np.ndarray | None) -> bool:
        """Compare an approximate answer with the model's own; return whether it was right.

        Without an own answer (None) it counts as wrong. If too many answers that were given out are
        wrong, no more are given out until there is new evidence from other stragglers.
        """
        labels, risk = self.setup.policy.tolerance is None, self._risk(given.source)
        wrong, excess, value = labels, math.inf, given.value.ravel()
        if own is not None:
            form = self.setup.coder.form
            wrong = labels and not bool(agree_on_labels(value, own.ravel(), form))
            error = root_mean_square(value - own.ravel())
            excess = float(error_ratios(error, np.asarray(given.error)))
        drifted = risk.add(
            Comparison(given.disagreement, given.error, wrong, excess),
            given=given.given,
            epoch=given.epoch,
            unknown=own is None,
            widened=given.widened,
        )
        if drifted:
            if given.source == "predicted" and self.predictor is not None:
                self.predictor.discard()
            self.setup.observe("drift", 1)
            what = f"{given.source} answers went wrong more often than promised: see the status"
            _LOG.warning(what)
        return not (wrong if labels else excess > given.widened)

    def keep(self, group: Group) -> list[Group]:
        """Keep a group without open queries for late answers; return the groups no longer kept.

        Queries to compare that no in-flight call will answer are sent again if workers are idle.
        """
        own, batch = group.layout.own, group.batch
        if group.answers:
            # Only the approximate answers that were given out are kept.
            for _, query in group.compared():
                given = [each for each in query.approximate.values() if each.given]
                query.approximate = {each.source: each for each in given}
                for each in query.approximate.values():  # copied, to free the whole arrays
                    each.value = np.array(each.value)
                    each.x = None if each.x is None else each.x.copy()
            group.answers = []
            batch.drop_answers(group.mask)  # not those that have just arrived
            batch.suffice()
        over, forgotten = [], []
        if any(group.compared()) and group not in self._kept:
            kept = [each for _, query in group.compared() for each in query.approximate.values()]
            arrays = [each for one in kept for each in (one.value, one.x) if each is not None]
            arrays += [query.request.reply.values for _, query in group.compared()]
            self._kept[group] = size = _GROUP + sum(each.nbytes for each in arrays)
            self._left -= size
            while self._left < 0 and self._kept:
                over.append(oldest := next(iter(self._kept)))
                self.discard(oldest)
                forgotten += [query for _, query in oldest.compared()]
        outstanding = ~np.isnan(group.sent_at) & ~group.mask
        for point in np.flatnonzero(outstanding).tolist():
            outstanding[point] = not (batch.abandoned(point) or batch.lost(point))
        never = [query for (cell, _), query in group.compared() if not outstanding[own[cell]].any()]
        for query in {*forgotten, *never}:
            for source, each in list(query.approximate.items()):
                if self._ask_again(each):
                    del query.approximate[source]
            self.learn(query, None)
        if not any(group.compared()) and group not in over:
            self.discard(group)
            over.append(group)
        return over

    def discard(self, group: Group) -> None:
        self._left += self._kept.pop(group, 0)

    def _ask_again(self, given: Answer) -> bool:
        """Send a query again for comparison, if a worker is idle; return whether it was sent."""
        setup = self.setup
        if given.x is None or not setup.pool.idle:
            return False
        zeros, now = setup.answers.zeros(1), setup.clock.now()
        request = Request(given.x[None], zeros, now, MAX_DEADLINE_S, True, own="audit")
        request.queries[0].approximate[given.source] = given
        if asked := self._submit(request):
            given.x = None
        return asked

    def status(self) -> dict[str, Any]:
        """Return the status of the settings, the surrogate and decoding; None for missing parts."""
        controller, predictor = self._controller, self.predictor
        shown = self._decodes and self.setup.policy.accuracy.promises
        return {
            "policy": None if controller is None else controller.status(),
            "predictor": None if predictor is None else predictor.status(),
            "decoding": self.decoded.status() if shown else None,
        }
