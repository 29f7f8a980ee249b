"""Checks of the answers of a run over rows: one that looks wrong is given again by other workers.

A row whose answer is suspicious has no value until another worker has given the same one, or a
third has decided. What came before anything was known is looked at later, and taken back where it
looks wrong. What came in one call with an answer that was outvoted is in doubt, however it looks.
Where all answers of a call are off by a little, none looks wrong alone. So one is asked for again
of those calls whose residuals, added up, are the largest: as many as a part of the rate allows.
An answer of a worker that is accused by now counts for nothing: what no other worker gave is
computed again, and all that was found to look right while its answers calibrated the check is
looked at again.
"""

import bisect
import itertools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ..pools import AbstractPool, PoolReport
from ..pools._answer_checks import AnswerChecks, Verdict

_NOBODY = -1
OF_CALLS = 0.25  # of right answers that may look wrong: those that do so with others of their call


class _Answer(NamedTuple):
    """An answer to a row in doubt, and the number of the call that it came in."""

    value: np.ndarray
    call: int


class _Call(NamedTuple):
    """A call whose answers look right one by one, in the order of how wrong they look together.

    Attributes:
        score: The square of the sum of their residuals, over their number, negative.
        number: The call's.
        row: The one that is furthest off where most are.
    """

    score: float
    number: int
    row: int


class RowChecks:
    """Rows in doubt, with the answers to them, and who gave the values of the others.

    Attributes:
        checked: Rows whose values were found to look right, or were given by two workers.
        suspicious: How many answers were in doubt.
        corrected: Rows whose value became another than that which came first.
    """

    def __init__(self, num_rows: int, pool: AbstractPool, max_fenced: float, rate: float):
        """Start without answers; raise ValueError if the pool has fewer than three workers."""
        if pool.num_workers < 3:
            raise ValueError(
                "check_answers needs three workers or more, of which two agree; this pool has "
                f"{pool.num_workers}"
            )
        self._pool, dtype = pool, pool.worker_dtype
        # Another worker computes the first row of each, too; the rest is looked at later. Where no
        # two of five agree, the function is random.
        self._checks = AnswerChecks(
            pool.num_workers, max_fenced, dtype, lambda what, number: None, first=1, most=5
        )
        self._fenced: frozenset[int] = frozenset()
        self._accused: frozenset[int] = frozenset()
        # The workers that gave a row's value, twice the same if it was one; nobody if it has none,
        # or an earlier run gave it.
        self._givers = np.full((num_rows, 2), _NOBODY)
        self._calls = np.full((num_rows, 2), _NOBODY)  # the calls that these values came in
        self._numbers = itertools.count()  # of calls
        self._outvoted: set[int] = set()  # calls with a wrong answer, the rest of which is trusted
        self._rate = OF_CALLS * rate
        self._together: list[_Call] = []  # in their order, without those that were found wrong
        self._asked: set[int] = set()  # calls of which a row was doubted since they look so
        self._answers: dict[int, dict[int, _Answer]] = {}  # to rows in doubt, by worker
        self._came_first: dict[int, np.ndarray] = {}
        self.checked = np.zeros(num_rows, bool)
        self.suspicious = self.corrected = 0

    def in_doubt(self, rows: Int[np.ndarray, " some"]) -> Bool[np.ndarray, " some"]:
        return np.array([row in self._answers for row in rows.tolist()], bool)

    def avoid(self, rows: Int[np.ndarray, " some"]) -> set[int]:
        """Return the workers that have given answers to rows in doubt, if others are left."""
        if not self._answers:
            return set()
        found = {worker for row in rows.tolist() for worker in self._answers.get(row, ())}
        return found if len(found | self._fenced) < self._pool.num_workers else set()

    def take(
        self,
        worker: int,
        rows: Int[np.ndarray, " some"],
        values: Float[np.ndarray, "some ..."],
        looks_wrong: Bool[np.ndarray, " some"],
        known: Bool[np.ndarray, " some"],
        residuals: Float[np.ndarray, "some outputs"],
    ) -> tuple[Bool[np.ndarray, " some"], Float[np.ndarray, "some ..."]]:
        """Take a worker's answers to rows that have no value.

        They look wrong or not, as far as that is `known`. Residuals are in units of deviations,
        uncorrelated.

        Returns:
            Which rows have a value now, and the values; another worker is to compute the others.
        """
        given, values, call = np.zeros(len(rows), bool), values.copy(), next(self._numbers)
        if worker in self._fenced:  # what it answers was sent before it was
            return given, values
        doubted = self.in_doubt(rows)
        for place in np.flatnonzero(doubted).tolist():
            row = int(rows[place])
            answers = self._answers[row]
            answers.setdefault(worker, _Answer(values[place].copy(), call))
            found = {each: answer.value for each, answer in answers.items()}
            verdict = self._checks.compare(None, found)
            if verdict is not None:
                values[place], given[place] = verdict.value, True
                self._settle(row, verdict)
        fresh = np.flatnonzero(~doubted)
        held = self._checks.screen(worker, looks_wrong[fresh]) | (worker in self._accused)
        for place in fresh[held].tolist():
            self._doubt(int(rows[place]), worker, call, values[place])
        given[fresh] = ~held
        self._givers[rows[fresh[~held]]], self._calls[rows[fresh[~held]]] = worker, call
        seen = fresh[known[fresh] & ~held]
        self.checked[rows[seen]] = True
        if len(seen) > 1:
            self._rank(call, rows[seen], residuals[seen])
        came = zip(rows[given].tolist(), values[given], strict=True) if self._came_first else ()
        for row, value in came:
            if (before := self._came_first.pop(row, None)) is not None:
                self.corrected += not self._checks.agree(before, value)
        return given, values

    def _settle(self, row: int, verdict: Verdict) -> None:
        """End the doubt of a row, and note the calls in which other answers to it came."""
        answers = self._answers.pop(row)
        self._givers[row], self.checked[row] = verdict.givers, True
        self._calls[row] = [answers[giver].call for giver in verdict.givers]
        if verdict.agreed:
            self._outvoted |= {answer.call for answer in answers.values()} - {*self._calls[row]}

    def recheck(
        self,
        rows: Int[np.ndarray, " some"],
        values: Float[np.ndarray, "some ..."],
        looks_wrong: Bool[np.ndarray, " some"],
        residuals: Float[np.ndarray, "some outputs"],
    ) -> Int[np.ndarray, " few"]:
        """Look at values that were given out before anything was known of their rows.

        Args as for `take`.

        Returns:
            The rows whose values are to be taken back.
        """
        for place in np.flatnonzero(looks_wrong).tolist():
            row = int(rows[place])
            # The only giver: of two none is looked at.
            self._doubt(row, int(self._givers[row, 0]), int(self._calls[row, 0]), values[place])
        self.checked[rows[~looks_wrong]] = True
        calls = self._calls[rows, 0]
        order = np.argsort(calls, kind="stable")
        order = order[~looks_wrong[order] & (calls[order] != _NOBODY)]
        for places in np.split(order, np.flatnonzero(np.diff(calls[order])) + 1):
            if len(places) > 1:
                self._rank(int(calls[places[0]]), rows[places], residuals[places])
        return rows[looks_wrong]

    def _rank(
        self,
        call: int,
        rows: Int[np.ndarray, " some"],
        residuals: Float[np.ndarray, "some outputs"],
    ) -> None:
        """Note how wrong rows of a call look together."""
        total = residuals.sum(axis=0)
        row = int(rows[np.argmax(residuals @ total)])
        bisect.insort(self._together, _Call(-float(total @ total) / len(rows), call, row))

    def _doubt(self, row: int, worker: int, call: int, value: np.ndarray) -> None:
        value = value.copy()
        self._came_first.setdefault(row, value)
        self._answers[row] = {} if worker == _NOBODY else {worker: _Answer(value, call)}
        self._givers[row] = self._calls[row] = _NOBODY
        self.checked[row] = False
        self.suspicious += 1

    def doubt_calls(self, values: Float[np.ndarray, "rows ..."]) -> Int[np.ndarray, " few"]:
        """Doubt what came in one call with an answer that was outvoted since the last call.

        And doubt a row of each call whose answers look most wrong together. These are as many as
        may look wrong; those whose row was outvoted do not count.

        Returns:
            The rows whose values are to be taken back.
        """
        rows = np.zeros(0, int)
        if self._outvoted:
            rows = np.flatnonzero(np.isin(self._calls, list(self._outvoted)).all(axis=1))
            self._together = [each for each in self._together if each.number not in self._outvoted]
            self._outvoted.clear()
        most = int(self._rate * np.count_nonzero(self.checked))
        calls = [each for each in self._together[:most] if each.number not in self._asked]
        self._asked |= {each.number for each in calls}
        asked = [each.row for each in calls if (self._calls[each.row] == each.number).all()]
        rows = np.concatenate([rows, np.array(asked, int)])
        for row in rows.tolist():
            self._doubt(row, int(self._givers[row, 0]), int(self._calls[row, 0]), values[row])
        return rows

    def follow_fences(
        self, computed: Bool[np.ndarray, " rows"], values: Float[np.ndarray, "rows ..."] | None
    ) -> Int[np.ndarray, " few"] | None:
        """Have the pool send nothing to workers that are fenced now, and distrust the accused.

        Returns:
            The computed rows whose values are to be taken back, since only accused workers gave
            them; None if there are no values, or nobody was accused since the last call.
        """
        fenced, accused = self._checks.fenced, self._checks.accused
        if fenced != self._fenced:
            self._pool.fence(fenced)
        new, self._fenced, self._accused = accused - self._accused, fenced, accused
        if not new or values is None:
            return None
        for row, given in list(self._answers.items()):
            kept = {worker: answer for worker, answer in given.items() if worker not in accused}
            self._answers[row] = kept
            if given and not kept:
                del self._answers[row]  # as if nobody had computed it
        wrong = np.isin(self._givers, list(accused))
        rows = np.flatnonzero(computed & wrong.all(axis=1))
        for row in rows.tolist():
            self._came_first.setdefault(row, values[row].copy())
        self.suspicious += len(rows)
        one = wrong[:, :1] != wrong[:, 1:]  # of the two that gave a row's value
        self._givers = np.where(one & wrong, self._givers[:, ::-1], self._givers)
        self._calls = np.where(one & wrong, self._calls[:, ::-1], self._calls)
        self._givers[rows] = self._calls[rows] = _NOBODY
        self.checked &= self._givers[:, 0] != self._givers[:, 1]
        self._together.clear()
        return rows

    def look(self, report: PoolReport) -> None:
        """Trust workers again that were replaced. Others stay fenced to the end of the run."""
        self._checks.audits(report)

    def counts(self) -> dict[str, Any]:
        status = self._checks.status()
        return {
            "checked": int(self.checked.sum()),
            "suspicious": self.suspicious,
            "corrected": self.corrected,
            "fenced": status["fenced"],
            "not_fenced": status["not_fenced"],
        }
