"""The parts of a batcher that never change, and the settings that may change while it serves."""

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


# By kind of dtype, the kinds of arrays that are accepted for it.
_KINDS = {"f": "f", "i": "iu", "u": "iu", "b": "b"}


def fit_rows(
    x: np.ndarray, shape: tuple[int, ...], dtype: np.dtype, wanted: str, name: str = ""
) -> Shaped[np.ndarray, "batch ..."]:
    """Return queries, (B, *shape), cast to a dtype; errors quote `wanted` and `name`.

    Raises ValueError if they have another shape or kind, or do not fit into the dtype.
    """
    if x.ndim != len(shape) + 1 or x.shape[1:] != shape or not len(x):
        raise ValueError(f"the model takes {wanted}, not of shape {list(x.shape)}")
    if x.dtype.kind not in _KINDS[dtype.kind]:
        raise ValueError(f"the model takes {wanted}, not {x.dtype}")
    with np.errstate(over="ignore"):  # numbers that are too large become inf
        fitting = np.ascontiguousarray(x, dtype)
    if dtype.kind == "f":
        good, wrong = np.isfinite(fitting), f"are not finite in {dtype}"
    elif x.dtype == dtype:
        return fitting
    else:
        limits = np.iinfo(dtype)
        good = (x >= limits.min) & (x <= limits.max)
        wrong = f"have numbers beyond {dtype}"
    if not good.all():
        bad = np.flatnonzero(~good.reshape(len(x), -1).all(axis=1)).tolist()
        raise ValueError(f"{name}queries {bad} {wrong}")
    return fitting


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """The shape and dtype of the rows of a batch: queries, or answers."""

    shape: tuple[int, ...]
    dtype: np.dtype = CODED

    def zeros(self, number: int) -> Shaped[np.ndarray, "number ..."]:
        return np.zeros((number, *self.shape), self.dtype)

    def check(self, x: np.ndarray) -> Shaped[np.ndarray, "batch ..."]:
        """Return queries in the workers' dtype. Raises ValueError as `fit_rows` does."""
        shape = ", ".join(map(str, self.shape))
        wanted = f"queries of shape (B, {shape}) with B of 1 or more, {self.dtype}"
        return fit_rows(np.asarray(x), self.shape, self.dtype, wanted)


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a batcher that never change.

    Attributes:
        pool: The workers.
        coder: The code.
        policy: The policy, whose `outputs` are set once `checked` has been called.
        queries: The shape and dtype of a query.
        answers: The shape and dtype of an answer.
        refuse: Returns why a worker's answer is not valid, or None.
        observe: Records a measurement.
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
        """Return the setup with the policy's `outputs` set (`read_outputs`).

        `predicts` is whether there is a surrogate.

        Raises:
            ValueError: if its parts do not fit each other.
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
        policy = BatchingPolicy.model_validate(policy.model_dump() | {"outputs": read})
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
    """The settings that may change while queries are served.

    Attributes:
        overdue: the rule by which a call is late, and the number of copies sent together.
        redundancy: the redundant coded data points that are sent: "always" all of the code's,
            "uncertain" those for queries that a surrogate could not answer, or "none".
        hedges: whether late queries are sent again, if the policy allows copies.
    """

    overdue: Overdue
    redundancy: Redundancy
    hedges: bool = True

    @classmethod
    def of_policy(cls, policy: BatchingPolicy) -> "DispatchSetting":
        return cls(Overdue(factor=policy.straggler_threshold), policy.redundancy)
