"""Approximate answers on the deciding thread: how they are made, given out, and compared.

They stand at their queries (`Query.approximate`), by source. Each is compared with the model's own
answer, however late that comes, whether it was given out or not. What becomes of them is for
`core/decide.py` to say.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from ._policy import MAX_DEADLINE_S
from .adapt._adaptation import Adaptation
from .core._coder import DecodedGroup
from .core._group import Group, repeat_rows
from .core._request import Answer, Query, Request
from .core._setup import Setup
from .core.decide import GiveOut, Place

# The share of approximate answers whose queries nobody has as they came that is computed, too.
_AUDITED = 0.02


class Approximations:
    """A maker of approximate answers, and the books of those that are to be compared.

    The groups, and their memory, that are kept for late answers are bounded. `adaptation` says what
    is known.
    """

    def __init__(
        self,
        setup: Setup,
        adaptation: Adaptation,
        submit: Callable[[Request], bool],
        *,
        most: int = 4096,
        size: int = 1 << 26,
    ):
        """Compile the decoder; keep at most `most` groups and `size` bytes.

        `submit` takes requests of the server's own, unless queries wait, and returns whether.
        """
        self._setup, self.adaptation, self._submit = setup, adaptation, submit
        self._most, self._left = most, size
        self._kept: dict[Group, int] = {}
        self._random, coder = np.random.default_rng(0), setup.coder
        if coder.can_decode:
            zeros, everyone = setup.answers.zeros(coder.num_workers), np.ones(coder.num_workers)
            self._decoded(zeros[:, None], everyone > 0, coder.num_data)

    def predict(self, group: Group, places: Sequence[Place]) -> None:
        """Add a surrogate's answers to a group's queries, of which each is looked up once.

        What a surrogate learns while a query waits is hardly more. Before it is ready, and while
        it has drifted, there are none.
        """
        new = [query for query in map(group.query, places) if "predicted" not in query.approximate]
        adaptation, setup = self.adaptation, self._setup
        if not new or adaptation.predictor is None or not adaptation.can_predict:
            return
        begin = setup.clock.now()
        # Queries that somebody waits for have their data.
        x = np.stack([x for each in new if (x := each.x) is not None])
        found = adaptation.predictor.predict(x)
        if found is None:
            return
        setup.observe("predict_seconds", setup.clock.now() - begin)
        epoch = adaptation.predictor.risk.epoch
        basis = int((~np.isnan(group.sent_at)).sum()), int(group.mask.sum())
        values = found.predictions.reshape(-1, *setup.answers.shape)
        numbers = found.error_probability, found.deviation, found.recovered
        numbers = (np.asarray(each).tolist() for each in numbers)
        for query, value, known, error, sure in zip(new, values, *numbers, strict=True):
            about = {"x": query.x, "epoch": epoch, "within": sure}
            made = Answer(value, "predicted", *basis, known, error, **about)
            query.approximate["predicted"] = made

    def decode(self, group: Group, places: Sequence[Place]) -> None:
        """Add decoded answers to a group's queries, where they are sound.

        A code may have lost a query, and a sum of large answers may overflow.
        """
        setup, decoding, number = self._setup, self.adaptation.decoding, len(group.cells)
        begin, accuracy = setup.clock.now(), setup.policy.accuracy
        known = [(point, each) for point, each in enumerate(group.answers) if each is not None]
        some = known[0][1]
        values = np.zeros((len(group.answers), group.rows, *some.shape[1:]), some.dtype)
        for point, answer in known:
            values[point] = repeat_rows(answer, group.rows)
        found = self._decoded(values, group.mask, number)
        setup.observe("decode_seconds", setup.clock.now() - begin)
        basis = int((~np.isnan(group.sent_at)).sum()), int(group.mask.sum())
        setup.observe("workers_responded", basis[1])
        limit, epoch = decoding.limit(number), decoding.risk.epoch
        for cell, row in places:
            query, value = group.query((cell, row)), found.predictions[row, cell, ...]
            query.approximate.pop("decoded", None)
            if not found.recovered[cell] or not np.isfinite(value).all():
                continue
            known, labels = float(found.score[row, cell]), accuracy.tolerance is None
            query.approximate["decoded"] = Answer(
                value,
                "decoded",
                *basis,
                disagreement=known if labels else math.nan,
                error=math.nan if labels else known,
                features=found.features[row, cell].copy(),
                x=query.x,
                epoch=epoch,
                within=known <= limit if accuracy.promises else math.isnan(known),
            )

    def _decoded(self, values: np.ndarray, mask: np.ndarray, queries: int) -> DecodedGroup:
        policy, decoding = self._setup.policy, self.adaptation.decoding
        promises = policy.accuracy.promises
        score = decoding.scores.of(queries) if promises else None
        width = policy.max_batch_size
        return self._setup.coder.decode(values, mask, width, score, features=promises)

    def give(self, group: Group, given: GiveOut) -> tuple[Query, Answer]:
        """Return an answer that is given out, as the caller sees it, which is to be compared."""
        (cell, _), source = given
        query, tolerance = group.query(given.place), self._setup.policy.tolerance
        answer, risk = query.approximate[source], self.adaptation.risk(source)
        disagreement, error = map(float, risk.expected(answer.disagreement, answer.error))
        if answer.error > 0:
            answer.widened = error / answer.error
        answer.given = True
        # A query that nobody has as it came is computed for comparison alone, now and then.
        if np.isnan(group.sent_at[group.layout.own[cell]]).all():
            del query.approximate[source]
            answer.given = self._random.random() < _AUDITED and self._ask_again(answer)
        if answer.given:
            risk.give()
        self._setup.observe("expected_disagreement", disagreement)
        if tolerance is not None:
            self._setup.observe("expected_error", error / tolerance)
        basis = answer.asked, answer.responded
        return query, Answer(answer.value[None], source, *basis, disagreement, error)

    def learn(self, query: Query, own: np.ndarray | None) -> None:
        """Compare approximate answers to a query with the model's own, and learn from this.

        None stands for one that will never come.
        """
        x = query.x
        approximate, query.approximate = query.approximate, {}
        for each in approximate.values():
            right = self.adaptation.audit(each, own)
            if each.given:
                known = "audit_same" if right else "audit_other"
                self._setup.observe("audit_unknown" if own is None else known, 1)
            x = each.x if x is None else x
        if x is not None and own is not None:
            self.adaptation.add_answer(x, own)

    def keep(self, group: Group) -> list[Group]:
        """Keep a group that is over for what may still come; return the groups that are not kept.

        Queries whose answers do not come by themselves are computed again.
        """
        own, batch = group.layout.own, group.batch
        if group.answers:
            # All but the approximate answers that were given out goes.
            for (cell, _), query in group.compared():
                given = [each for each in query.approximate.values() if each.given]
                query.approximate = {each.source: each for each in given if len(own[cell])}
                for each in query.approximate.values():  # and the arrays that they are parts of
                    each.value = np.array(each.value)
                    each.x = None if each.x is None else each.x.copy()
            group.answers = []
            batch.drop_answers(group.mask)  # another may have come, and is to be received
            batch.suffice()
        over, forgotten = [], []
        if any(group.compared()) and group not in self._kept:
            kept = [each for _, query in group.compared() for each in query.approximate.values()]
            arrays = [each for one in kept for each in (one.value, one.x) if each is not None]
            arrays += [query.request.reply.values for _, query in group.compared()]
            self._kept[group] = size = sum(each.nbytes for each in arrays)
            self._left -= size
            while len(self._kept) > self._most or (self._left < 0 and self._kept):
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
        """Have the model answer, for comparison, where workers are free; return whether."""
        setup = self._setup
        if given.x is None or given.repeated or not setup.pool.idle:
            return False
        zeros, now = setup.answers.zeros(1), setup.clock.now()
        request = Request(given.x[None], zeros, now, MAX_DEADLINE_S, True, own="audit")
        request.queries[0].approximate[given.source] = given
        given.repeated = self._submit(request)
        return given.repeated
