"""Queries and answers as arrays, of which each row is one: what fits, and what does not."""

import dataclasses

import numpy as np
from jaxtyping import Shaped

CODED = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Arrays (B, *shape). Others than float32 cannot be coded."""

    shape: tuple[int, ...]
    dtype: np.dtype = CODED

    def zeros(self, number: int) -> Shaped[np.ndarray, "number ..."]:
        return np.zeros((number, *self.shape), self.dtype)

    def check(self, x: np.ndarray) -> Shaped[np.ndarray, "batch ..."]:
        """Queries as workers get them.

        Raises: ValueError where they are not B of this shape and kind, or not finite.
        """
        x = np.asarray(x)
        if x.ndim != len(self.shape) + 1 or x.shape[1:] != self.shape or not len(x):
            raise ValueError(
                f"queries must come as an array of shape (B, {', '.join(map(str, self.shape))}) "
                f"with B of 1 or more, not {x.shape}"
            )
        if self.dtype != CODED:
            if x.dtype != self.dtype:
                raise ValueError(f"queries are {x.dtype}, but the model takes {self.dtype}")
            return np.ascontiguousarray(x)
        if not np.issubdtype(x.dtype, np.floating):
            raise ValueError(f"queries are {x.dtype}: codes work on floats, so convert them first")
        if x.dtype != self.dtype:  # in which workers run: what is too large for it is infinite
            with np.errstate(over="ignore"):
                x = x.astype(self.dtype)
        x = np.ascontiguousarray(x)
        if not np.isfinite(x).all():
            finite = np.isfinite(x.reshape(len(x), -1)).all(axis=1)
            raise ValueError(
                f"queries {np.flatnonzero(~finite).tolist()} are not finite in float32"
            )
        return x
