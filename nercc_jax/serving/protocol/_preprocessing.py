"""Preprocessing: the way from the tensors of a request, such as bytes of images, to rows of floats.

It comes before coding, which mixes floats only: so bytes travel as they are, and are coded all the
same.
"""

import asyncio
import concurrent.futures
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PyTree

from ..core._request import fill_up
from ._servable import Servable

# Threads of a model's preprocessing; a compiled function leaves Python's lock.
_THREADS = min(os.cpu_count() or 1, 4)


class Preprocessing:
    """A servable's preprocessing: compiled, in batches, on the host's CPU, off the event loop."""

    def __init__(self, servable: Servable, sizes: Sequence[int]):
        """Compile it for batches of these sizes, in ascending order; others are filled up."""
        assert servable.preprocess is not None
        self._inputs, self._queries = servable.inputs, servable.queries
        self._sizes, self._function = sizes, jax.jit(servable.preprocess)
        self._executor = concurrent.futures.ThreadPoolExecutor(_THREADS, "nercc-preprocess")
        for size in sizes:
            self._compute({p.name: np.zeros((size, *p.shape), p.dtype) for p in self._inputs.parts})

    def __call__(self, given: Any) -> Float[np.ndarray, "batch ..."]:
        """Return rows of floats from an array (B, *shape), or by name if there are several.

        Raises ValueError for inputs that do not fit, or whose preprocessing is not finite.
        """
        columns = self._inputs.fit(given)
        number = len(columns[self._inputs.names[0]])
        pieces = []
        for begin in range(0, number, self._sizes[-1]):
            few = min(self._sizes[-1], number - begin)
            size = next(size for size in self._sizes if size >= few)
            piece = {name: fill_up(x[begin : begin + few], size) for name, x in columns.items()}
            pieces.append(jax.tree.map(lambda y, few=few: y[:few], self._compute(piece)))
        if len(pieces) > 1:
            pieces = [jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)]
        return self._queries.pack(pieces[0])

    def _compute(self, columns: dict[str, np.ndarray]) -> PyTree[Float[np.ndarray, "batch ..."]]:
        given = columns[self._inputs.names[0]] if self._inputs.alone else columns
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return jax.tree.map(lambda y: np.asarray(y, np.float32), self._function(given))

    async def run(self, given: Any) -> Float[np.ndarray, "batch ..."]:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self, given)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
