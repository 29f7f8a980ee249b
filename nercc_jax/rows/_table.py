"""The table of a run over rows: a row for each input, and the values."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

# The states of a row: see `state.py`.
WAITING, AGAIN, SENT, FAILED, PREDICTED, COMPUTED = range(6)
NOBODY = -1

ROW = np.dtype(
    [
        ("state", "u1"),
        ("main", "i4"),  # the number of its latest call that is not a copy
        ("tries", "u1"),  # its calls that timed out, or whose workers died
        ("raised", "?"),  # whether the function raised on a call of this row alone
        ("late", "?"),  # whether its answer came late,
        ("overdue", "?"),  # or an in-flight call of it is late
        ("audit", "?"),  # whether it is computed even if its prediction is accurate enough
        ("deviation", "f8"),  # the expected error of its value
        ("score", "f8"),  # its error bar or error probability
        ("givers", "i4", (2,)),  # the workers that computed its value, and their call (`RowChecks`)
        ("call", "i4"),
        ("checked", "?"),
        ("learned", "?"),  # whether it was passed to the learner
        ("estimated", "?"),  # whether the learner has predicted it, with these expected errors:
        ("expected", "f8"),  # corrected by the errors of nearby pairs,
        ("plain", "f8"),  # and the learner's own deviation
        ("judged", "?"),  # whether its own value was compared with that prediction,
        ("excess", "f8"),  # the ratio of the error to the expected error,
        ("wrong", "?"),  # and whether the labels differ
        ("known", "?"),  # whether its present prediction is accurate enough not to compute it
    ]
)


class RowTable:
    """The state, value and statistics of each row.

    Attributes:
        rows: A record for each input (`ROW`).
        values: The function's own values where computed, otherwise predicted values; NaN for rows
            with neither. None before the first value.
        reasons: Why rows have FAILED, by row.
    """

    def __init__(self, number: int):
        self.rows = np.zeros(number, ROW)
        for name in ("deviation", "score", "expected", "plain"):
            self.rows[name] = np.inf
        self.rows["givers"] = self.rows["call"] = NOBODY
        self.values: Float[np.ndarray, "rows ..."] | None = None
        self.reasons: dict[int, str] = {}

    def __getitem__(self, name: str) -> Shaped[np.ndarray, "rows ..."]:
        """Return a column."""
        return self.rows[name]

    def all_in(self, state: int) -> Int[np.ndarray, " some"]:
        """Return the rows in a state."""
        return np.flatnonzero(self.rows["state"] == state)

    @property
    def open(self) -> Int[np.ndarray, " some"]:
        """The rows that are neither computed nor predicted, those that failed included."""
        return np.flatnonzero(self.rows["state"] < PREDICTED)

    @property
    def late(self) -> Bool[np.ndarray, " rows"]:
        """The mask of rows whose answer came late, or is late."""
        return self.rows["late"] | self.rows["overdue"]

    @property
    def vectors(self) -> Float[np.ndarray, "rows outputs"]:
        """The values as vectors; there must be some."""
        assert self.values is not None
        return self.values.reshape(len(self.rows), -1)

    @property
    def learnable(self) -> Int[np.ndarray, " few"]:
        """The computed rows whose values are finite."""
        computed = self.all_in(COMPUTED)
        return computed[np.isfinite(self.vectors[computed]).all(axis=1)]

    def put(
        self,
        rows: Int[np.ndarray, " few"],
        values: float | Float[np.ndarray, "few ..."],
        score: float | Float[np.ndarray, " few"],
        state: int | Shaped[np.ndarray, " few"],
        deviation: float | Float[np.ndarray, " few"] | None = None,
    ) -> None:
        """Set the values and the state of rows; `deviation` is the score by default."""
        if self.values is None:
            assert isinstance(values, np.ndarray)
            self.values = np.full((len(self.rows), *values.shape[1:]), np.nan, values.dtype)
        # Values in a wider dtype than the first ones keep their precision.
        if (wider := np.result_type(self.values, values)) != self.values.dtype:
            self.values = self.values.astype(wider)
        self.values[rows], self.rows["score"][rows] = values, score
        self.rows["deviation"][rows] = score if deviation is None else deviation
        self.rows["state"][rows], self.rows["known"][rows] = state, False
        for row in rows.tolist() if self.reasons else ():
            self.reasons.pop(row, None)

    def arrays(self, rows: Int[np.ndarray, " some"]) -> dict[str, np.ndarray]:
        """Return the entries of some rows for files, by name; rows taken back are not `done`."""
        assert self.values is not None
        state = self.rows["state"][rows]
        named = {"index": rows, "predictions": self.values[rows], "exact": state == COMPUTED}
        named |= {name: self.rows[name][rows] for name in ("deviation", "score")}
        return named | {"done": state >= PREDICTED}

    def take(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore what `arrays` returned in an earlier run; predicted rows are WAITING again."""
        rows, exact = arrays["index"], arrays["exact"]
        self.put(rows, arrays["predictions"], 0.0, COMPUTED)
        self.put(rows[~exact], np.nan, np.inf, WAITING)
