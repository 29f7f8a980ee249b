"""Checks of the answers of a run over rows: one that looks wrong is given again by other workers.

A row whose answer is suspicious has no value until another worker has given the same one, or a
third has decided. What came before anything was known is looked at later, and taken back where it
looks wrong; so is all that only a worker gave which is fenced by now.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ._answer_checks import AnswerChecks
from ._backend import PoolReport
from ._pool import AbstractPool

_FIRST = 1  # rows of each worker that another computes, too: the rest is looked at later
_MOST = 5  # workers that compute a row until two agree: where none do, the function is random
_NOBODY = -1


class RowChecks:
    """Rows in doubt, with the answers to them, and who gave the values of the others.

    Attributes:
        checked: Rows whose values were found to look right, or were given by two workers.
        suspicious: How many rows were in doubt.
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
        # The worker whose value a row has; nobody where two gave it, or an earlier run.
        self._giver = np.full(num_rows, _NOBODY)
        self._answers: dict[int, dict[int, np.ndarray]] = {}  # to rows in doubt, by worker
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
        given, values = self.in_doubt(rows), values.copy()
        fresh = np.flatnonzero(~given)
        for place in np.flatnonzero(given).tolist():
            row = int(rows[place])
            self._answers[row].setdefault(worker, values[place].copy())
            verdict = self._checks.compare(None, self._answers[row])
            given[place] = verdict is not None
            if verdict is not None:
                del self._answers[row]
                values[place], self.checked[row] = verdict.value, True
                before = self._came_first.pop(row)
                self.corrected += not np.allclose(before, verdict.value, rtol=1e-3, equal_nan=True)
        held = self._screen(worker, rows[fresh], values[fresh], looks_wrong[fresh])
        given[fresh] = ~held
        self._giver[rows[fresh[~held]]] = worker
        self.checked[rows[fresh[known[fresh] & ~held]]] = True
        return given, values

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
        doubted = np.zeros(len(rows), bool)
        for worker in np.unique(self._giver[rows]).tolist():
            places = np.flatnonzero(self._giver[rows] == worker)
            doubted[places] = self._screen(
                worker, rows[places], values[places], looks_wrong[places]
            )
        self.checked[rows[~doubted]] = True
        return rows[doubted]

    def _screen(
        self,
        worker: int,
        rows: Int[np.ndarray, " some"],
        values: Float[np.ndarray, "some ..."],
        looks_wrong: Bool[np.ndarray, " some"],
    ) -> Bool[np.ndarray, " some"]:
        """Return which answers are in doubt from now on."""
        held = looks_wrong if worker == _NOBODY else self._checks.screen(worker, looks_wrong)
        for place in np.flatnonzero(held).tolist():
            self._doubt(int(rows[place]), worker, values[place])
        return held

    def _doubt(self, row: int, worker: int, value: np.ndarray) -> None:
        self._came_first[row] = value = value.copy()
        self._answers[row] = {} if worker == _NOBODY else {worker: value}
        self._giver[row], self.checked[row] = _NOBODY, False
        self.suspicious += 1

    def follow_fences(
        self, computed: Bool[np.ndarray, " rows"], values: Float[np.ndarray, "rows ..."] | None
    ) -> Int[np.ndarray, " few"]:
        """Have the pool send nothing to workers that are fenced now.

        Args:
            computed: Which rows have computed values.
            values: The values of all rows.

        Returns:
            The rows whose values are to be taken back, since only such a worker gave them.
        """
        fenced = self._checks.fenced
        new, changed, self._fenced = fenced - self._fenced, fenced != self._fenced, fenced
        if changed:
            self._pool.fence(fenced)
        if not new or values is None:
            return np.zeros(0, int)
        rows = np.flatnonzero(computed & np.isin(self._giver, list(new)))
        for row in rows.tolist():
            self._doubt(row, int(self._giver[row]), values[row])
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
