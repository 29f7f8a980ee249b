"""The table of a run over rows: a row for each input, and the values."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

# States, in which a row is one at a time: see `state.py`.
WAITING, AGAIN, SENT, FAILED, PREDICTED, COMPUTED = range(6)
NOBODY = -1

ROW = np.dtype(
    [
        ("state", "u1"),
        ("main", "i4"),  # the call that it was sent in last, without copies
        ("tries", "u1"),  # calls that had it, and gave no answer in time
        ("raised", "?"),  # whether the function raised on it alone
        ("late", "?"),  # whether it came late,
        ("overdue", "?"),  # or a call that has it is late
        ("audit", "?"),  # whether it is computed whatever is known of it
        ("deviation", "f8"),  # how far its value may be off, and its error bar or error probability
        ("score", "f8"),
        ("givers", "i4", (2,)),  # the workers that gave its value, and in which call (`RowChecks`)
        ("call", "i4"),
        ("checked", "?"),
        ("learned", "?"),  # whether the learner has been given it
        ("estimated", "?"),  # whether the learner has predicted it, and how far that may be off:
        ("expected", "f8"),  # by errors nearby,
        ("plain", "f8"),  # and by the learner's own deviation
        ("judges", "?"),  # whether its own value was compared with that prediction,
        ("excess", "f8"),  # the error in units of what was expected,
        ("wrong", "?"),  # and whether the labels differ
        ("known", "?"),  # whether it need not be computed, as things are
    ]
)


class RowTable:
    """All that is known of each row.

    Attributes:
        rows: A row for each input (`ROW`).
        values: The function's own values where computed, otherwise predicted ones; NaN where there
            is none. None before the first.
        reasons: Why rows have FAILED.
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
        """The rows that are neither computed nor predicted."""
        return np.flatnonzero(self.rows["state"] < PREDICTED)

    @property
    def late(self) -> Bool[np.ndarray, " rows"]:
        """The mask of rows that came late, or are late."""
        return self.rows["late"] | self.rows["overdue"]

    @property
    def vectors(self) -> Float[np.ndarray, "rows outputs"]:
        """The values as vectors, when there are any."""
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
        """Give rows their values, and take them to a state; `deviation` is the score by default."""
        if self.values is None:
            assert isinstance(values, np.ndarray)
            self.values = np.full((len(self.rows), *values.shape[1:]), np.nan, values.dtype)
        # What comes in a wider dtype than the first rows keeps all its digits.
        if (wider := np.result_type(self.values, values)) != self.values.dtype:
            self.values = self.values.astype(wider)
        self.values[rows], self.rows["score"][rows] = values, score
        self.rows["deviation"][rows] = score if deviation is None else deviation
        self.rows["state"][rows], self.rows["known"][rows] = state, False
        for row in rows.tolist() if self.reasons else ():
            self.reasons.pop(row, None)

    def arrays(self, rows: Int[np.ndarray, " some"]) -> dict[str, np.ndarray]:
        """Return what is known of some rows, by name; those taken back are not done."""
        assert self.values is not None
        state = self.rows["state"][rows]
        named = {"index": rows, "predictions": self.values[rows], "exact": state == COMPUTED}
        named |= {name: self.rows[name][rows] for name in ("deviation", "score")}
        return named | {"done": state >= PREDICTED}

    def take(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take what `arrays` returned in another process; rows that were predicted wait again."""
        rows, exact = arrays["index"], arrays["exact"]
        self.put(rows, arrays["predictions"], 0.0, COMPUTED)
        self.put(rows[~exact], np.nan, np.inf, WAITING)
