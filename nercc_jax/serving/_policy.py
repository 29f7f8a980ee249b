"""The batching policy: how groups are formed, how long they wait, and which answers are returned.

It needs no JAX, so that errors in settings are reported at once.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from ..risk import Accuracy

# The longest deadline of a request, in seconds, so that every wait is bounded.
MAX_DEADLINE_S = 3600.0

Outputs: TypeAlias = Literal["logits", "probabilities", "values"]
# Receives measurements, from any thread: their names are in the table of `metrics.py`.
Observe: TypeAlias = Callable[[str, float], Any]

_setting: Any = Field  # so that a type checker sees that each setting has a default


class BatchingPolicy(BaseModel):
    """Batching, waiting, redundancy, and the quality of answers.

    `ModelSettings` has these settings, too.

    Raises:
        ValueError: for values out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    max_batch_size: int = _setting(16, ge=1, le=2**16)
    """Maximum number of queries in one worker call, a power of two. All batch sizes are powers of
    two, compiled in advance; with few idle workers and a long queue, batches are larger."""
    batch_wait_timeout_s: float = _setting(0.01, ge=0, le=MAX_DEADLINE_S)
    """Seconds until the redundancy of a group that is not full is sent. Queries themselves do not
    wait for other queries."""
    max_queue_size: int = _setting(1024, ge=1, le=10**6)
    "Maximum number of queries in the queue; further ones are refused."
    deadline_s: float = _setting(10.0, gt=0, le=MAX_DEADLINE_S)
    "Default deadline of a request, in seconds; at most an hour."
    straggler_threshold: float = _setting(1.5, gt=0)
    """Time after which a worker straggles, as a multiple of the median answer time. Queries of
    stragglers are predicted, decoded, or sent again."""
    outputs: Outputs | None = _setting(None, examples=["values"])
    """Outputs of the model: `logits`, `probabilities` or `values`. The label is the largest logit;
    probabilities are the softmax of a classifier's logits; values are numbers without labels, whose
    answers are approximate only with a `tolerance`. Default: `logits` for shipped models, and if a
    `max_disagreement` is set; else `values`."""
    max_disagreement: float | None = _setting(None, ge=0, le=1, examples=[0.05])
    """Maximum share of wrong labels among the answers that are not the model's own, by a bound that
    fails with a probability of 0.25; no single answer may be wrong with a probability above five
    times that share, or a half. Answers that are too uncertain wait for more workers, and are sent
    again if none are left. 1 (in Python also None): decode when half of the redundancy has been
    answered. Default for labels: 0.05."""
    tolerance: float | None = _setting(None, gt=0, lt=float("inf"), examples=[0.01])
    """Largest error bar of an answer that is not the model's own, in units of the outputs (root
    mean square over a row's outputs). It makes the outputs `values`; without it, all answers that
    are values are exact."""
    coverage: float = _setting(0.9, gt=0, lt=1)
    "Share of the errors of approximate values that their error bars cover."
    redundancy: Literal["always", "uncertain"] = "always"
    """Redundancy to send while workers are idle: `always` sends all of the code's; `uncertain` only
    for queries that the surrogate could not answer, and none before it is calibrated."""
    max_calls: float | None = _setting(None, ge=1, lt=float("inf"), examples=[1.1])
    """Maximum mean number of calls a query (default: no limit). If set, straggler threshold, number
    of copies and redundancy are chosen repeatedly by the measured tail latency, within this budget
    and up to the copies and the redundancy set here."""
    check_answers: float | None = _setting(None, gt=0, lt=1, examples=[0.01])
    """Share of right answers that may look wrong and be computed again by another worker before
    they are returned (default: no checks). Workers found wrong are fenced: they get no queries, at
    most a quarter of all workers. Needs a surrogate."""
    copies: int = _setting(2, ge=1, le=10_000)
    """Maximum number of workers that compute the same query (hedging), if the first straggles and
    the query must be exact or cannot be decoded. 1 means to wait for stragglers."""

    @model_validator(mode="after")
    def _check_together(self) -> "BatchingPolicy":
        if self.tolerance is not None and self.outputs not in (None, "values"):
            raise ValueError(
                f"a tolerance is for outputs = 'values', not {self.outputs!r}, which "
                "max_disagreement is for"
            )
        values = self.tolerance is not None or self.outputs == "values"
        if values and self.max_disagreement is not None:
            raise ValueError(
                f"max_disagreement {self.max_disagreement} is for outputs with labels, and these "
                "are values: give a tolerance, or nothing for exact answers only"
            )
        if self.max_batch_size & (self.max_batch_size - 1):
            raise ValueError(f"max_batch_size must be a power of two, not {self.max_batch_size}")
        return self

    @property
    def accuracy(self) -> "Accuracy":
        """The promise about answers that are not the model's own."""
        from ..risk import Accuracy  # late: settings are read without JAX

        return Accuracy(
            max_disagreement=None if self.max_disagreement == 1 else self.max_disagreement,
            tolerance=self.tolerance,
            coverage=self.coverage,
        )

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The sizes of the batches that workers receive: all powers of two up to the largest."""
        return tuple(1 << power for power in range(self.max_batch_size.bit_length()))


def read_outputs(asked: Any, shapes: Sequence[tuple[int, ...]], *, floats: bool = True) -> Outputs:
    """Return how outputs of these `shapes` a row are interpreted, by policy or settings `asked`.

    Raises:
        ValueError: if an output with labels has a single number.
    """
    single = any(shape[-1:] in ((), (1,)) for shape in shapes)
    if asked.outputs in ("logits", "probabilities") and single:
        raise ValueError(
            f"outputs = {asked.outputs!r}, but an output has one number a row, whose largest is "
            "always itself: say outputs = 'values'"
        )
    if asked.outputs is not None:
        return asked.outputs
    labels = asked.max_disagreement is not None and asked.tolerance is None
    return "logits" if labels and floats and not single else "values"
