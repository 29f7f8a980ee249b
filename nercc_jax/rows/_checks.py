"""Checks of the answers of a run over rows: one that looks wrong is given again by other workers.

A row whose answer is suspicious has no value until another worker has given the same one, or a
third has decided. Values that came before anything was known are looked at later, and taken back
where they look wrong. Those that came in one call with an answer that was outvoted are in doubt,
however they look. Answers of a worker that is accused by now count for nothing: rows that no other
worker gave are computed again, and values that were found to look right while its answers
calibrated the check are looked at again.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ..pools import PoolReport
from ..risk.votes import AnswerChecks, HeldAnswer, HeldAnswers
from ._interface import RowSettings
from ._table import COMPUTED, NOBODY, RowTable


class RowChecks:
    """Doubts about answers, by columns of the table of rows.

    `givers` are the workers that gave a row's value, twice the same if it was one, and `call` is
    the call that it came in; nobody's if it has no value, an earlier run gave it, or two workers
    did. Rows are `checked` if their value was found to look right, or was given by two workers.

    Attributes:
        fenced: The workers that are to get nothing.
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
        """Start without answers; raise ValueError if there are fewer than three workers."""
        if num_workers < 3:
            raise ValueError(
                "check_answers needs three workers or more, of which two agree; this pool has "
                f"{num_workers}"
            )
        # Another worker computes the first row of each, too; the rest is looked at later. Where no
        # two of five agree, the function is random.
        most, observe = settings.max_fenced, lambda what, number: None
        self._votes = AnswerChecks(num_workers, most, worker_dtype, observe, first=1, most=5)
        self._table, self._num_workers = table, num_workers
        self.fenced: frozenset[int] = frozenset()
        self._accused: frozenset[int] = frozenset()
        self.answers: dict[int, HeldAnswers] = {}
        self.suspicious = 0

    def avoid(self, rows: Int[np.ndarray, " some"]) -> frozenset[int]:
        """Return the workers that have given answers to rows in doubt, if others are left."""
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
        """Take a worker's answers to rows that have no value, in a call of this number.

        They look wrong or not, as far as that is `known`.

        Returns:
            Which rows have a value now, and the values; another worker is to compute the others.
        """
        given, values, table = np.zeros(len(rows), bool), values.copy(), self._table
        if worker in self.fenced:  # its calls were sent before it was
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
        """Follow the votes since the last call: fence workers, and distrust what they gave.

        Workers that were replaced are trusted again. Others stay fenced to the end of the run.

        Returns:
            The rows whose values are to be taken back, and whether a worker was accused.
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
                    del self.answers[row]  # as if nobody had computed it
            wrong = np.isin(table["givers"], list(accused))
            rows = np.flatnonzero((table["state"] == COMPUTED) & wrong.all(axis=1))
            self.suspicious += len(rows)
            one = (wrong[:, 0] != wrong[:, 1])[:, None]  # of the two that gave a row's value
            # The other one stands for both.
            table["givers"][:] = np.where(one & wrong, table["givers"][:, ::-1], table["givers"])
            table["givers"][rows] = table["call"][rows] = NOBODY
            table["checked"][:] &= table["givers"][:, 0] != table["givers"][:, 1]
        if self._votes.outvoted:
            also = np.flatnonzero(np.isin(table["call"], list(self._votes.outvoted)))
            rows = np.concatenate([rows, self.doubt(also)])
            self._votes.outvoted.clear()
        return rows, bool(new)

    def doubt(self, rows: Int[np.ndarray, " few"]) -> Int[np.ndarray, " few"]:
        """Doubt the values that rows have, by their first givers; return the rows."""
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
