"""ParM: sums of data points, on workers that run a model trained for sums."""

from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Bool, Float, Int

from ..arrays import check_counts, namespace
from .code import AbstractNumpyCode


class Parity(AbstractNumpyCode):
    """Parity models (ParM): the answer of one missing worker of a group is a subtraction.

    The first K workers run the served model on a data point each. With G = N - K, parity worker
    K + g protects the group of the k = K / G data points g, g + G, g + 2G, ...: it gets their sum,
    and runs the *parity model*, trained to map a sum of k inputs to the sum of the served model's k
    outputs (`worker_models` is 0 for the first K workers, 1 for the others). A data point whose own
    worker answered is exact. Otherwise, if the group's parity worker and all its other workers
    answered, its prediction is the parity worker's answer minus theirs, with the error of the
    parity model. Otherwise the data point is lost.

    A linear model is its own parity model, and exact. Source: Kosaian, Rashmi and Venkataraman,
    SOSP 2019.
    """

    num_data: int = eqx.field(static=True)
    num_workers: int = eqx.field(static=True)

    def __init__(self, num_data: int, num_workers: int):
        """Make a code; raise ValueError unless K is a multiple of the number of parity workers."""
        num_data, num_workers = check_counts(num_data=num_data, num_workers=num_workers)
        parities = num_workers - num_data
        if parities < 1 or num_data % parities:
            raise ValueError(
                f"{num_workers} workers for {num_data} data points leave {parities} for parities: "
                "there must be 1 or more, and num_data a multiple of them"
            )
        self.num_data, self.num_workers = num_data, num_workers

    @property
    def k(self) -> int:
        """Return the number of data points that a parity worker protects."""
        return self.num_data // (self.num_workers - self.num_data)

    @property
    def worker_models(self) -> Int[np.ndarray, " num_workers"]:
        return (np.arange(self.num_workers) >= self.num_data).astype(int)

    def _encoder(self) -> Float[Any, "num_workers num_data"]:
        return np.concatenate([np.eye(self.num_data), self._protects()])

    def _decoder(self, available: Bool[Any, " num_workers"]) -> Float[Any, "num_data num_workers"]:
        protects, xp = self._protects(), namespace(available)
        own, parity = available[: self.num_data], available[self.num_data :]
        alone = (protects & ~own[None]).sum(axis=1) == 1
        rebuilt = ~own & (protects & (alone & parity)[:, None]).any(axis=0)
        exact = np.eye(self.num_data, self.num_workers)
        weights = protects.astype(float)
        others = weights.T @ weights - np.eye(self.num_data)
        subtraction = np.concatenate([-others, weights.T], axis=1)
        matrix = xp.where(own[:, None], exact, xp.where(rebuilt[:, None], subtraction, 0))
        return matrix.astype(float)

    def _protects(self) -> Bool[np.ndarray, "parities num_data"]:
        groups = self.num_workers - self.num_data
        return np.arange(self.num_data) % groups == np.arange(groups)[:, None]
