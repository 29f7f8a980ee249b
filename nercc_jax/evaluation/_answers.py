"""A model's answers to the coded data points of many codes on the same groups."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from ..codes import AbstractCode, encoder_rows, multiply
from ._evaluation import own_outputs
from ._forecast import Forecast


class CodedAnswers:
    """The model's answers to coded data points of some groups, each asked for once.

    `originals` are its outputs on the data points, (groups, K, outputs), `evaluations` how many
    data points and coded ones it ran on.
    """

    def __init__(
        self,
        run: Callable[[ArrayLike], Array],
        groups: Float[np.ndarray, "groups num_data ..."],
        batch_size: int,
        originals: Float[np.ndarray, "groups num_data outputs"] | None = None,
    ):
        """`run` is the model (`batched`), and runs on the data points unless `originals` are known.

        Raises: ValueError where that is no finite vector for each.
        """
        self._run, self._groups, self._batch_size = run, groups, batch_size
        self.evaluations = 0
        if originals is None:
            originals = np.asarray(own_outputs(run, groups)).reshape(*groups.shape[:2], -1)
            self.evaluations = groups.shape[0] * groups.shape[1]
        self.originals = originals
        own = map(_row_name, np.eye(groups.shape[1]))
        self._known = {name: self.originals[:, place] for place, name in enumerate(own)}

    def of(self, code: AbstractCode) -> Float[np.ndarray, "groups num_workers outputs"]:
        """All workers' answers with this code."""
        rows = encoder_rows(code)
        names = [_row_name(row) for row in rows]
        new = {n: row for n, row in zip(names, rows, strict=True) if n not in self._known}
        if new:
            answers = self._ask(np.stack(list(new.values())))
            self._known |= {name: answers[:, place] for place, name in enumerate(new)}
        return np.stack([self._known[name] for name in names], axis=1)

    def forecast(self, code: AbstractCode) -> Forecast:
        """What `make_forecast` makes of these groups in this order."""
        return Forecast(code, jnp.asarray(self.of(code)), jnp.asarray(self.originals))

    def _ask(self, rows: np.ndarray) -> Float[np.ndarray, "groups rows outputs"]:
        """What the model makes of these combinations of every group's data points."""
        self.evaluations += len(self._groups) * len(rows)
        at_once = max(2 * self._batch_size // len(rows), 1)
        parts = []
        for place in range(0, len(self._groups), at_once):
            groups = self._groups[place : place + at_once]
            coded = np.asarray(_combine(rows, groups.reshape(*groups.shape[:2], -1)))
            parts.append(np.asarray(self._run(coded.reshape(-1, *groups.shape[2:]))))
        return np.concatenate(parts).reshape(len(self._groups), len(rows), -1)


def _row_name(row: np.ndarray) -> bytes:
    """Equal for rows of encoders that are the same to a millionth."""
    return (np.round(np.asarray(row, np.float32), 6) + 0.0).tobytes()  # -0.0 becomes 0.0


@jax.jit
def _combine(
    rows: Float[Array, "rows num_data"], groups: Float[Array, "groups num_data m"]
) -> Float[Array, "groups rows m"]:
    return multiply(rows, groups).astype(groups.dtype)
