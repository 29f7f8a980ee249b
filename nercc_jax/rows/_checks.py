"""Checks of the answers of a run over rows: rows that look wrong are computed by other workers.

A row whose answer looks wrong has no value until a second worker has given the same answer, or a
third one has decided. Values from before there was a check are checked later, and taken back if
they look wrong. Values from the same call as an outvoted answer are in doubt, however they look.
Once a worker is accused, its answers no longer count: rows that no other worker computed are
computed again, and values that passed the check while the worker's answers may have calibrated it
are checked again.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ..pools import PoolReport
from ..risk.votes import AnswerChecks, HeldAnswer, HeldAnswers
from ._interface import RowSettings
from ._table import COMPUTED, NOBODY, RowTable


class RowChecks:
    """The answers in doubt, and the origin of all others in columns of the table of rows.

    `givers` are the two workers that computed a row's value, or the same one twice, and `call` is
    its call. They are NOBODY if the row has no value or an earlier run computed it; `call` also if
    two workers did. A row is `checked` if its value passed the check, or two workers computed it.

    Attributes:
        fenced: The workers that get no more calls.
        answers: The answers to each row in doubt: they differ, or one looked wrong.
        suspicious: The number of answers that were in doubt.
    """

    def __init__(
        self,
        table: RowTable,
        num_workers: int,
        settings: RowSettings,
        worker_dtype: str | None = None,
    ):
        """Start without answers; raise ValueError for fewer than three workers."""
        if num_workers < 3:
            raise ValueError(
                "check_answers needs three workers or more, of which two agree; this pool has "
                f"{num_workers}"
            )
        # A second worker also computes each worker's first row; others are checked later. If no two
        # of five answers agree, the function is random.
        most, observe = settings.max_fenced, lambda what, number: None
        self._votes = AnswerChecks(num_workers, most, worker_dtype, observe, first=1, most=5)
        self._table, self._num_workers = table, num_workers
        self.fenced: frozenset[int] = frozenset()
        self._accused: frozenset[int] = frozenset()
        self.answers: dict[int, HeldAnswers] = {}
        self.suspicious = 0

    def avoid(self, rows: Int[np.ndarray, " some"]) -> frozenset[int]:
        """Return the workers that have answered rows in doubt; none if no other worker is left."""
        found = {worker for row in rows.tolist() for worker in self.answers.get(row, ())}
        return frozenset(found if len(found | self.fenced) < self._num_workers else ())

    def take(
        self,
        call: int,
        worker: int,
        rows: Int[np.ndarray, " some"],
        values: Float[np.ndarray, "some ..."],
        looks_wrong: Bool[np.ndarray, " some"],
        known: Bool[np.ndarray, " some"],
    ) -> tuple[Bool[np.ndarray, " some"], Float[np.ndarray, "some ..."]]:
        """Take a worker's answers to rows without values, from the call with this number.

        `looks_wrong` is valid for the rows that are `known`.

        Returns:
            The mask of the rows that have a value now, and the values. Another worker must compute
            the other rows.
        """
        given, values, table = np.zeros(len(rows), bool), values.copy(), self._table
        if worker in self.fenced:  # its call was sent before that
            return given, values
        candidates = [self.answers.pop(row, None) or {} for row in rows.tolist()]
        new = [not each for each in candidates]
        trusted, verdicts = self._votes.receive(call, worker, candidates, values, looks_wrong)
        for place, verdict in verdicts.items():
            row = rows[place]
            values[place], given[place] = verdict.value, True
            table["givers"][row], table["checked"][row] = verdict.givers, True
            own = candidates[place][verdict.givers[0]].call
            table["call"][row] = NOBODY if verdict.agreed else own
        given[trusted] = True
        table["givers"][rows[trusted]], table["call"][rows[trusted]] = worker, call
        table["checked"][rows[trusted]] |= known[trusted]
        for place in np.flatnonzero(~given).tolist():
            self.answers[int(rows[place])] = candidates[place]
            self.suspicious += new[place]
        return given, values

    def review(self, report: PoolReport) -> tuple[Int[np.ndarray, " few"], bool]:
        """Update `fenced` after new votes, and distrust the answers of workers newly accused.

        Workers that were replaced are trusted again. Others stay fenced to the end of the run.

        Returns:
            The rows whose values must be taken back, and whether a worker was newly accused.
        """
        self._votes.look([worker.deaths for worker in report.workers])
        table, accused = self._table, self._votes.accused
        new, self.fenced, self._accused = accused - self._accused, self._votes.fenced, accused
        rows = np.zeros(0, int)
        if table.values is None:
            return rows, False
        if new:
            for row, given in list(self.answers.items()):
                kept = {worker: given[worker] for worker in given if worker not in accused}
                self.answers[row] = kept
                if given and not kept:
                    del self.answers[row]  # as if no worker had computed it
            wrong = np.isin(table["givers"], list(accused))
            rows = np.flatnonzero((table["state"] == COMPUTED) & wrong.all(axis=1))
            self.suspicious += len(rows)
            one = (wrong[:, 0] != wrong[:, 1])[:, None]  # one of a row's two workers is accused
            # The other worker is then recorded twice.
            table["givers"][:] = np.where(one & wrong, table["givers"][:, ::-1], table["givers"])
            table["givers"][rows] = table["call"][rows] = NOBODY
            table["checked"][:] &= table["givers"][:, 0] != table["givers"][:, 1]
        if self._votes.outvoted:
            also = np.flatnonzero(np.isin(table["call"], list(self._votes.outvoted)))
            rows = np.concatenate([rows, self.doubt(also)])
            self._votes.outvoted.clear()
        return rows, bool(new)

    def doubt(self, rows: Int[np.ndarray, " few"]) -> Int[np.ndarray, " few"]:
        """Turn the values of rows into answers in doubt; return the rows."""
        table = self._table
        assert table.values is not None
        for row in rows.tolist():
            worker, value = int(table["givers"][row, 0]), table.values[row].copy()
            one = {worker: HeldAnswer(value, int(table["call"][row]))}
            self.answers[row] = {} if worker == NOBODY else one
        table["givers"][rows] = table["call"][rows] = NOBODY
        table["checked"][rows] = False
        self.suspicious += len(rows)
        return rows

    def counts(self) -> dict[str, Any]:
        """Return the counts for a run's summary."""
        counts = {"checked": int(self._table["checked"].sum()), "suspicious": self.suspicious}
        status = self._votes.status()
        return counts | {name: status[name] for name in ("fenced", "not_fenced")}
