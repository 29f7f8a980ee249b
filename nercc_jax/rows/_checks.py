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
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ..pools import PoolReport
from ..risk.votes import AnswerChecks
from ._learner import OF_CALLS
from ._table import COMPUTED, NOBODY, RowTable


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
    """Doubts about answers, by columns of the table of rows.

    `givers` are the workers that gave a row's value, twice the same if it was one, and `calls` the
    calls that it came in; nobody's if it has no value, or an earlier run gave it. Rows are
    `checked` if their value was found to look right, or was given by two workers.

    Attributes:
        fenced: The workers that are to get nothing.
        suspicious: How many answers were in doubt.
        corrected: Rows whose value became another than that which came first.
    """

    def __init__(
        self,
        table: RowTable,
        num_workers: int,
        rate: float,
        max_fenced: float,
        worker_dtype: str | None = None,
    ):
        """Start without answers; raise ValueError if there are fewer than three workers."""
        if num_workers < 3:
            raise ValueError(
                "check_answers needs three workers or more, of which two agree; this pool has "
                f"{num_workers}"
            )
        # Another worker computes the first row of each, too; the rest is looked at later. Where no
        # two of five agree, the function is random.
        self._checks = AnswerChecks(
            num_workers, max_fenced, worker_dtype, lambda what, number: None, first=1, most=5
        )
        self._table, self._num_workers, self._rate = table, num_workers, OF_CALLS * rate
        self.fenced: frozenset[int] = frozenset()
        self._accused: frozenset[int] = frozenset()
        self._outvoted: set[int] = set()  # calls with a wrong answer, the rest of which is trusted
        self._together: list[_Call] = []  # in their order, without those that were found wrong
        self._asked: set[int] = set()  # calls of which a row was doubted since they look so
        self._answers: dict[int, dict[int, _Answer]] = {}  # to rows in doubt, by worker
        self._came_first: dict[int, np.ndarray] = {}
        self.suspicious = self.corrected = 0

    def in_doubt(self, rows: Int[np.ndarray, " some"]) -> Bool[np.ndarray, " some"]:
        """Return which rows have answers that differ, or one that looked wrong."""
        return np.array([row in self._answers for row in rows.tolist()], bool)

    def avoid(self, rows: Int[np.ndarray, " some"]) -> frozenset[int]:
        """Return the workers that have given answers to rows in doubt, if others are left."""
        found = {worker for row in rows.tolist() for worker in self._answers.get(row, ())}
        return frozenset(found if len(found | self.fenced) < self._num_workers else ())

    def take(
        self,
        call: int,
        worker: int,
        rows: Int[np.ndarray, " some"],
        values: Float[np.ndarray, "some ..."],
        looks_wrong: Bool[np.ndarray, " some"],
        known: Bool[np.ndarray, " some"],
        residuals: Float[np.ndarray, "some outputs"],
    ) -> tuple[Bool[np.ndarray, " some"], Float[np.ndarray, "some ..."]]:
        """Take a worker's answers to rows that have no value, in a call of this number.

        They look wrong or not, as far as that is `known`. Residuals are in units of deviations,
        uncorrelated.

        Returns:
            Which rows have a value now, and the values; another worker is to compute the others.
        """
        given, values, table = np.zeros(len(rows), bool), values.copy(), self._table
        if worker in self.fenced:  # what it answers was sent before it was
            return given, values
        doubted = self.in_doubt(rows)
        for place in np.flatnonzero(doubted).tolist():
            row = int(rows[place])
            answers = self._answers[row]
            answers.setdefault(worker, _Answer(values[place].copy(), call))
            found = {each: answer.value for each, answer in answers.items()}
            verdict = self._checks.compare(None, found)
            if verdict is None:
                continue
            values[place], given[place] = verdict.value, True
            del self._answers[row]
            calls = [answers[giver].call for giver in verdict.givers]
            table["givers"][row], table["calls"][row] = verdict.givers, calls
            table["checked"][row] = True
            if verdict.agreed:
                self._outvoted |= {answer.call for answer in answers.values()} - {*calls}
        fresh = np.flatnonzero(~doubted)
        held = self._checks.screen(worker, looks_wrong[fresh]) | (worker in self._accused)
        trusted = fresh[~held]
        given[trusted] = True
        table["givers"][rows[trusted]], table["calls"][rows[trusted]] = worker, call
        for place in fresh[held].tolist():
            self._doubt(int(rows[place]), values[place], worker, call)
        seen = trusted[known[trusted]]
        table["checked"][rows[seen]] = True
        self._rank(call, rows[seen], residuals[seen])
        for row, value in zip(rows[given].tolist(), values[given], strict=True):
            if (before := self._came_first.pop(row, None)) is not None:
                self.corrected += not self._checks.agree(before, value)
        return given, values

    def recheck(
        self,
        rows: Int[np.ndarray, " some"],
        looks_wrong: Bool[np.ndarray, " some"],
        residuals: Float[np.ndarray, "some outputs"],
    ) -> Int[np.ndarray, " few"]:
        """Look at values that were given out before anything was known of their rows.

        Args as for `take`.

        Returns:
            The rows whose values are to be taken back.
        """
        calls = self._table["calls"][rows, 0]
        self._doubt_values(rows[looks_wrong])
        self._table["checked"][rows[~looks_wrong]] = True
        order = np.argsort(calls, kind="stable")
        order = order[~looks_wrong[order] & (calls[order] != NOBODY)]
        for places in np.split(order, np.flatnonzero(np.diff(calls[order])) + 1):
            if len(places):
                self._rank(int(calls[places[0]]), rows[places], residuals[places])
        return rows[looks_wrong]

    def _rank(
        self,
        call: int,
        rows: Int[np.ndarray, " some"],
        residuals: Float[np.ndarray, "some outputs"],
    ) -> None:
        """Note how wrong rows of a call look together, if there are several."""
        if len(rows) > 1:
            total = residuals.sum(axis=0)
            row = int(rows[np.argmax(residuals @ total)])
            bisect.insort(self._together, _Call(-float(total @ total) / len(rows), call, row))

    def _doubt(self, row: int, value: np.ndarray, worker: int, call: int) -> None:
        """Doubt an answer of a worker."""
        value = value.copy()
        self._came_first.setdefault(row, value)
        self._answers[row] = {} if worker == NOBODY else {worker: _Answer(value, call)}
        self._table["givers"][row] = self._table["calls"][row] = NOBODY
        self._table["checked"][row] = False
        self.suspicious += 1

    def _doubt_values(self, rows: Int[np.ndarray, " few"]) -> None:
        """Doubt the values that rows have, by their first givers."""
        givers, calls, values = self._table["givers"], self._table["calls"], self._table.values
        assert values is not None
        for row in rows.tolist():
            self._doubt(row, values[row], int(givers[row, 0]), int(calls[row, 0]))

    def doubt_calls(self) -> Int[np.ndarray, " few"]:
        """Doubt what came in one call with an answer that was outvoted since the last call.

        And doubt a row of each call whose answers look most wrong together. These are as many as
        may look wrong; those whose row was outvoted do not count.

        Returns:
            The rows whose values are to be taken back.
        """
        table, rows = self._table, np.zeros(0, int)
        if self._outvoted:
            rows = np.flatnonzero(np.isin(table["calls"], list(self._outvoted)).all(axis=1))
            self._together = [each for each in self._together if each.number not in self._outvoted]
            self._outvoted.clear()
        most = int(self._rate * np.count_nonzero(table["checked"]))
        calls = [each for each in self._together[:most] if each.number not in self._asked]
        self._asked |= {each.number for each in calls}
        asked = [each.row for each in calls if (table["calls"][each.row] == each.number).all()]
        rows = np.concatenate([rows, np.array(asked, int)])
        self._doubt_values(rows)
        return rows

    def follow_fences(self) -> Int[np.ndarray, " few"] | None:
        """Fence the workers that are to be fenced now, and distrust the accused.

        Returns:
            The computed rows whose values are to be taken back, since only accused workers gave
            them; None if there are no values, or nobody was accused since the last call.
        """
        accused, table, values = self._checks.accused, self._table, self._table.values
        new, self.fenced, self._accused = accused - self._accused, self._checks.fenced, accused
        if not new or values is None:
            return None
        for row, given in list(self._answers.items()):
            kept = {worker: answer for worker, answer in given.items() if worker not in accused}
            self._answers[row] = kept
            if given and not kept:
                del self._answers[row]  # as if nobody had computed it
        wrong = np.isin(table["givers"], list(accused))
        rows = np.flatnonzero((table["state"] == COMPUTED) & wrong.all(axis=1))
        for row in rows.tolist():
            self._came_first.setdefault(row, values[row].copy())
        self.suspicious += len(rows)
        one = (wrong[:, 0] != wrong[:, 1])[:, None]  # of the two that gave a row's value
        for name in ("givers", "calls"):  # the other one stands for both
            table[name][:] = np.where(one & wrong, table[name][:, ::-1], table[name])
            table[name][rows] = NOBODY
        table["checked"][:] &= table["givers"][:, 0] != table["givers"][:, 1]
        self._together.clear()
        return rows

    def look(self, report: PoolReport) -> None:
        """Trust workers again that were replaced. Others stay fenced to the end of the run."""
        self._checks.audits([worker.deaths for worker in report.workers])

    def counts(self) -> dict[str, Any]:
        """Return the counts for a run's summary."""
        status = self._checks.status()
        return {
            "checked": int(self._table["checked"].sum()),
            "suspicious": self.suspicious,
            "corrected": self.corrected,
            "fenced": status["fenced"],
            "not_fenced": status["not_fenced"],
        }
