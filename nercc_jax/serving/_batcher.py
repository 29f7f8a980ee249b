"""The batcher: a scheduler (`core`) with all that adapts (`adapt`), as users see it."""

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Shaped

from ..inference.models import warn_if_other
from ..pools import AbstractPool
from ..pools._batch import Refuse, refuse_odd
from ._policy import BatchingPolicy, Observe, read_outputs
from ._tracing import RequestTrace
from .adapt._adaptation import Adaptation
from .adapt._error_estimator import ErrorEstimator
from .adapt._predictor import Predictor
from .core._adaptation import accuracy_target
from .core._coder import Coder
from .core._health import Health
from .core._request import CODED, BatchSpec, Reply
from .core._scheduler import QueryScheduler


class CodedBatcher:
    """Serves single queries, and requests of several, by one code on one pool.

    A query of a systematic code (`Coder`) goes out as it came and is answered exactly, unless its
    worker straggles; then it is decoded from what its group's other workers answered, or, where
    that is not good enough, sent again. With any other code a group is sent when it is full.

    Use it as a context manager, or `close` it. The pool is the caller's, who must not give it to
    another batcher, and must keep it open until the batcher is closed.

    JAX leaves so many objects that a full garbage collection stops all threads for 60 ms and more.
    A process of your own that serves should call `gc.collect()` and `gc.freeze()` once it has
    compiled; `nercc serve` does.

    Attributes:
        policy: the batching policy.
        estimator: the estimator of decoding errors.
    """

    def __init__(
        self,
        pool: AbstractPool,
        coder: Coder,
        shape: Sequence[int],
        outputs: Sequence[int],
        *,
        dtypes: tuple[DTypeLike, DTypeLike] = (np.float32, np.float32),
        policy: BatchingPolicy | None = None,
        estimator: ErrorEstimator | None = None,
        predictor: Predictor | None = None,
        refuse: Refuse = refuse_odd,
        observe: Observe | None = None,
    ):
        """Compile what is needed for every batch size, and start.

        Args:
            pool: the workers.
            coder: the code, made ready for streams.
            shape: the shape of a query.
            outputs: the shape of an answer.
            dtypes: of queries and answers; dtypes other than float32 cannot be coded.
            policy: the batching policy. Where it does not state the outputs, one number a row is a
                value, and several are scores once the model's own answers look like scores.
            estimator: may be calibrated beforehand; the batcher continues with it.
            predictor: answers queries independently of their groups.
            refuse: tells which answers of workers are not valid.
            observe: called with every measurement, `observe(what, number)`; it must be quick.

        Raises:
            ValueError: for a policy, or dtypes, that do not fit the code or the predictor.
        """
        queries = BatchSpec(tuple(shape), np.dtype(dtypes[0]))
        answers = BatchSpec(tuple(outputs), np.dtype(dtypes[1]))
        if coder.num_data > 1 and {queries.dtype, answers.dtype} != {CODED}:
            raise ValueError(
                f"queries are {queries.dtype} and answers {answers.dtype}: only float32 can be "
                "coded, so give a Coder(Uncoded(1))"
            )
        policy = policy or BatchingPolicy()
        shapes = [answers.shape] if coder.form is None else coder.form.shapes
        read, _ = read_outputs(policy.outputs, policy.tolerance, shapes)
        if answers.dtype != CODED:  # nothing approximate
            read = policy.outputs or "values"
        self.policy = policy = dataclasses.replace(policy, outputs=read)
        exact_only = policy.outputs == "values" and policy.tolerance is None
        if exact_only and coder.can_decode and not coder.systematic:
            raise ValueError(
                "outputs are values without a tolerance, so that all answers are exact, and a code "
                "that mixes all queries would send each of them twice: give a tolerance, "
                "interleaved points, or no code"
            )
        target = accuracy_target(policy)
        self.estimator = estimator or ErrorEstimator(coder, target)
        known = self.estimator.target
        if (known.tolerance, known.coverage) != (target.tolerance, target.coverage):
            raise ValueError(
                f"the estimator is for a tolerance of {known.tolerance} and a coverage of "
                f"{known.coverage}, the policy for {target.tolerance} and {target.coverage}"
            )
        warn_if_other("the error estimate", self.estimator.conditions, pool.conditions)
        self._adaptation = Adaptation(
            pool,
            coder,
            policy,
            self.estimator,
            predictor,
            observe or (lambda what, number: None),
        )
        self._scheduler = QueryScheduler(
            pool, coder, queries, answers, policy, self._adaptation, refuse
        )
        self.estimator.compile(answers.shape, policy.max_batch_size)
        self._adaptation.start()
        self._scheduler.start()

    def submit(
        self,
        x: Shaped[np.ndarray, "batch ..."],
        *,
        deadline: float | None = None,
        exact: bool = False,
        high: bool = False,
        trace: RequestTrace | None = None,
    ) -> concurrent.futures.Future[Reply]:
        """Submit B queries, from any thread, and return at once.

        Args:
            x: the queries.
            deadline: seconds from now; by default the policy's.
            exact: accept only the model's own answers, hedged if a worker straggles.
            high: high priority, ahead of ordinary queries (`priority_lead_s`).
            trace: a record of what happens to the request.

        Returns:
            A future of the `Reply`. It may raise `DeadlineExceeded`, `InferenceFailed`, or
            `ServerClosing`. Cancelling it drops what has not been sent.

        Raises:
            ValueError: where x is not B finite queries, or the deadline is not positive or more
                than an hour.
            QueueFull: where the queue has no room.
            ServerClosing: while the batcher closes.
            InferenceFailed: once the batcher is broken.
        """
        return self._scheduler.submit(x, deadline=deadline, exact=exact, high=high, trace=trace)

    @property
    def waiting(self) -> int:
        """The number of queries that wait to be sent."""
        return self._scheduler.waiting

    @property
    def in_flight(self) -> int:
        """The number of requests without a reply."""
        return self._scheduler.in_flight

    def health(self) -> Health:
        """Return whether it is alive, and would answer a query now."""
        return self._scheduler.health()

    def status(self) -> dict[str, Any]:
        """Return what has been learned and measured so far.

        Returns:
            By name, None for what there is not: "policy", the setting picked under `max_calls`, and
            why; "predictor"; "checks" of the model's own answers; "decoding", what stragglers
            showed of decoded answers; "outputs", whether they are read as scores or values, and
            why; "audited", whether the latest decoded answers that were compared had wrong labels,
            or errors beyond their bars.
        """
        return self._adaptation.status()

    def hints(self) -> list[str]:
        """Return why nothing is decoded or predicted, and which workers answer wrongly."""
        return self._adaptation.hints()

    def close(self, drain: float = 0.0) -> None:
        """Accept no more requests, answer for up to `drain` seconds, and fail the rest."""
        self._scheduler.close(drain)
        self._scheduler.fail_open()
        self._adaptation.close()

    def __enter__(self) -> "CodedBatcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
