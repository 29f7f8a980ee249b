"""Checks of the answers of a run over rows: one that looks wrong is given again by other workers.

A row whose answer is suspicious has no value until another worker has given the same one, or a
third has decided. What came before anything was known is looked at later, and taken back where it
looks wrong. What came in one call with an answer that was outvoted is in doubt, however it looks.
An answer of a worker that is accused by now counts for nothing: what no other worker gave is
computed again, and all that was found to look right while its answers calibrated the check is
looked at again.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ._answer_checks import AnswerChecks, Verdict
from ._backend import PoolReport
from ._pool import AbstractPool

_FIRST = 1  # rows of each worker that another computes, too: the rest is looked at later
_MOST = 5  # workers that compute a row until two agree: where none do, the function is random
_NOBODY = -1


class _Answer(NamedTuple):
    """An answer to a row in doubt, and the number of the call that it came in."""

    value: np.ndarray
    call: int


class RowChecks:
    """Rows in doubt, with the answers to them, and who gave the values of the others.

    Attributes:
        checked: Rows whose values were found to look right, or were given by two workers.
        suspicious: How many answers were in doubt.
        corrected: Rows whose value became another than that which came first.
    """

    def __init__(self, num_rows: int, pool: AbstractPool, max_fenced: float):
        """Start without answers.

        Raises:
            ValueError: If the pool has fewer than three workers.
        """
        if pool.num_workers < 3:
            raise ValueError(
                "check_answers needs three workers or more, of which two agree; this pool has "
                f"{pool.num_workers}"
            )
        self._pool, dtype = pool, pool.worker_dtype
        self._checks = AnswerChecks(
            pool.num_workers, max_fenced, dtype, lambda what, number: None, _FIRST, _MOST
        )
        self._fenced: frozenset[int] = frozenset()
        self._accused: frozenset[int] = frozenset()
        # The workers that gave a row's value, twice the same if it was one; nobody if it has none,
        # or an earlier run gave it.
        self._givers = np.full((num_rows, 2), _NOBODY)
        self._calls = np.full((num_rows, 2), _NOBODY)  # the calls that these values came in
        self._numbers = itertools.count()  # of calls
        self._outvoted: set[int] = set()  # calls with a wrong answer, the rest of which is trusted
        self._answers: dict[int, dict[int, _Answer]] = {}  # to rows in doubt, by worker
        self._came_first: dict[int, np.ndarray] = {}
        self.checked = np.zeros(num_rows, bool)
        self.suspicious = self.corrected = 0

    def in_doubt(self, rows: Int[np.ndarray, " some"]) -> Bool[np.ndarray, " some"]:
        """Return which rows are in doubt."""
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
    ) -> tuple[Bool[np.ndarray, " some"], Float[np.ndarray, "some ..."]]:
        """Take a worker's answers.

        Args:
            worker: The worker.
            rows: Rows that have no value.
            values: Its answers.
            looks_wrong: Which of them look wrong.
            known: Of which of them that could be told.

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
        held = self._screen(worker, call, rows[fresh], values[fresh], looks_wrong[fresh])
        given[fresh] = ~held
        self._givers[rows[fresh[~held]]], self._calls[rows[fresh[~held]]] = worker, call
        self.checked[rows[fresh[known[fresh] & ~held]]] = True
        self._count_corrected(rows[given], values[given])
        return given, values

    def _settle(self, row: int, verdict: Verdict) -> None:
        """End the doubt of a row, and note the calls in which other answers to it came."""
        answers = self._answers.pop(row)
        self._givers[row], self.checked[row] = verdict.givers, True
        self._calls[row] = [answers[giver].call for giver in verdict.givers]
        if verdict.agreed:
            self._outvoted |= {answer.call for answer in answers.values()} - {*self._calls[row]}

    def _count_corrected(
        self, rows: Int[np.ndarray, " some"], values: Float[np.ndarray, "some ..."]
    ) -> None:
        for row, value in zip(rows.tolist(), values, strict=True) if self._came_first else ():
            if (before := self._came_first.pop(row, None)) is not None:
                self.corrected += not self._checks.agree(before, value)

    def recheck(
        self,
        rows: Int[np.ndarray, " some"],
        values: Float[np.ndarray, "some ..."],
        looks_wrong: Bool[np.ndarray, " some"],
    ) -> Int[np.ndarray, " few"]:
        """Look at values that were given out before anything was known of their rows.

        Returns:
            The rows whose values are to be taken back.
        """
        for place in np.flatnonzero(looks_wrong).tolist():
            row = int(rows[place])
            # The only giver: of two none is looked at.
            self._doubt(row, int(self._givers[row, 0]), int(self._calls[row, 0]), values[place])
        self.checked[rows[~looks_wrong]] = True
        return rows[looks_wrong]

    def _screen(
        self,
        worker: int,
        call: int,
        rows: Int[np.ndarray, " some"],
        values: Float[np.ndarray, "some ..."],
        looks_wrong: Bool[np.ndarray, " some"],
    ) -> Bool[np.ndarray, " some"]:
        """Return which answers are in doubt from now on."""
        held = self._checks.screen(worker, looks_wrong)
        if worker in self._accused:
            held = np.ones(len(rows), bool)
        for place in np.flatnonzero(held).tolist():
            self._doubt(int(rows[place]), worker, call, values[place])
        return held

    def _doubt(self, row: int, worker: int, call: int, value: np.ndarray) -> None:
        value = value.copy()
        self._came_first.setdefault(row, value)
        self._answers[row] = {} if worker == _NOBODY else {worker: _Answer(value, call)}
        self._givers[row] = self._calls[row] = _NOBODY
        self.checked[row] = False
        self.suspicious += 1

    def doubt_calls(self, values: Float[np.ndarray, "rows ..."]) -> Int[np.ndarray, " few"]:
        """Doubt what came in one call with an answer that was outvoted since the last call.

        Args:
            values: The values of all rows.

        Returns:
            The rows whose values are to be taken back.
        """
        if not self._outvoted:
            return np.zeros(0, int)
        rows = np.flatnonzero(np.isin(self._calls, list(self._outvoted)).all(axis=1))
        for row in rows.tolist():
            self._doubt(row, int(self._givers[row, 0]), int(self._calls[row, 0]), values[row])
        self._outvoted.clear()
        return rows

    def follow_fences(
        self, computed: Bool[np.ndarray, " rows"], values: Float[np.ndarray, "rows ..."] | None
    ) -> Int[np.ndarray, " few"] | None:
        """Have the pool send nothing to workers that are fenced now, and distrust the accused.

        Args:
            computed: Which rows have computed values.
            values: The values of all rows.

        Returns:
            The rows whose values are to be taken back, since only accused workers gave them; None
            if there are no values, or nobody was accused since the last call.
        """
        fenced, accused = self._checks.fenced, self._checks.accused
        if fenced != self._fenced:
            self._pool.fence(fenced)
        new, self._fenced, self._accused = accused - self._accused, fenced, accused
        return self._distrust(accused, computed, values) if new and values is not None else None

    def _distrust(
        self,
        accused: frozenset[int],
        computed: Bool[np.ndarray, " rows"],
        values: Float[np.ndarray, "rows ..."],
    ) -> Int[np.ndarray, " few"]:
        """Forget the answers of workers; return the computed rows that nobody else gave."""
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
        return rows

    def look(self, report: PoolReport) -> None:
        """Trust workers again that were replaced. Others stay fenced to the end of the run."""
        self._checks.audits(report)

    def counts(self) -> dict[str, Any]:
        """Return the part of a summary that is about checks."""
        status = self._checks.status()
        return {
            "checked": int(self.checked.sum()),
            "suspicious": self.suspicious,
            "corrected": self.corrected,
            "fenced": status["fenced"],
            "not_fenced": status["not_fenced"],
        }
