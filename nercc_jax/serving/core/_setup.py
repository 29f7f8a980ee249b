"""The parts of a batcher that never change, and the part of its policy that may."""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Shaped

from ...pools import AbstractPool, Overdue
from ...pools.batch import Refuse
from ...pools.clock import AbstractClock
from .._policy import BatchingPolicy, Observe, read_outputs
from ._coder import Coder

# The only dtype that can be coded.
CODED = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """The shape and dtype of the rows of a batch: queries, or answers."""

    shape: tuple[int, ...]
    dtype: np.dtype = CODED

    def zeros(self, number: int) -> Shaped[np.ndarray, "number ..."]:
        return np.zeros((number, *self.shape), self.dtype)

    def check(self, x: np.ndarray) -> Shaped[np.ndarray, "batch ..."]:
        """Return queries as workers receive them.

        Raises ValueError where they are not rows of this shape and kind, or not finite.
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
        if x.dtype != self.dtype:  # workers compute in float32, where too large a number is inf
            with np.errstate(over="ignore"):
                x = x.astype(self.dtype)
        x = np.ascontiguousarray(x)
        if not np.isfinite(x).all():
            finite = np.isfinite(x.reshape(len(x), -1)).all(axis=1)
            raise ValueError(
                f"queries {np.flatnonzero(~finite).tolist()} are not finite in float32"
            )
        return x


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a batcher that never change.

    Attributes:
        pool: The workers.
        coder: The code.
        policy: The policy, with its outputs as they are read.
        queries: The shape and dtype of a query.
        answers: The same of an answer.
        refuse: Returns why a worker's answer is not valid.
        observe: Takes a measurement.
    """

    pool: AbstractPool
    coder: Coder
    policy: BatchingPolicy
    queries: BatchSpec
    answers: BatchSpec
    refuse: Refuse
    observe: Observe

    @property
    def clock(self) -> AbstractClock:
        return self.pool.clock

    def checked(self, *, predicts: bool) -> "Setup":
        """Return the setup with its outputs as they are read.

        `predicts` says that there is a surrogate.

        Raises:
            ValueError: where its parts do not fit each other.
        """
        policy, coder, dtypes = self.policy, self.coder, (self.queries.dtype, self.answers.dtype)
        if coder.num_data > 1 and {*dtypes} != {CODED}:
            raise ValueError(
                f"queries are {dtypes[0]} and answers {dtypes[1]}: only float32 can be "
                "coded, so give a Coder(Uncoded(1))"
            )
        if predicts and {*dtypes} != {CODED}:
            raise ValueError(f"only float32 can be predicted, not {[str(each) for each in dtypes]}")
        shapes = [self.answers.shape] if coder.form is None else coder.form.shapes
        read = read_outputs(policy, shapes, floats=self.answers.dtype == CODED)
        policy = dataclasses.replace(policy, outputs=read)
        for wanted, name, why in (
            (policy.redundancy == "uncertain", "redundancy 'uncertain'", "what is uncertain"),
            (policy.check_answers is not None, "check_answers", "what answers should be"),
        ):
            if wanted and not predicts:
                raise ValueError(
                    f"{name} needs a predictor (`--surrogate`): nothing else tells {why}"
                )
        if policy.tolerance is not None and not (predicts or coder.has_deviation):
            raise ValueError(
                f"a tolerance needs error bars, and {type(coder.code).__name__} has none: give a "
                "predictor (`--surrogate`), or NeRCC with K of 2 or more"
            )
        return dataclasses.replace(self, policy=policy)


Redundancy = Literal["none", "uncertain", "always"]


class DispatchSetting(NamedTuple):
    """The part of a policy that may change while queries are served.

    Attributes:
        overdue: the rule by which a call counts as late, and the copies that follow at once.
        redundancy: the coded data points that are sent beyond the queries: all that the code has
            ("always"), those for queries that a surrogate could not answer ("uncertain"), or none.
        hedges: whether late queries are sent again soon, where the policy hedges at all.
    """

    overdue: Overdue
    redundancy: Redundancy
    hedges: bool = True

    @classmethod
    def of_policy(cls, policy: BatchingPolicy) -> "DispatchSetting":
        return cls(Overdue(factor=policy.straggler_threshold), policy.redundancy)
