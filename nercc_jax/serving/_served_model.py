"""A served model: a model with its workers, code, batcher and status."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from ..codes import AbstractCode
from ..pools.options import open_pool
from ._batcher import CodedBatcher
from ._policy import read_outputs
from .adapt._decoding import calibrate_decoding
from .adapt._predictor import Predictor
from .core._coder import Coder
from .core._request import DeadlineExceeded, Reply
from .core._requests import Health
from .core._setup import DispatchSetting
from .metrics import ANSWERS, OUTCOMES, SECONDS, Metrics
from .protocol.servable import FLOAT, Preprocessing, Servable
from .settings import ModelSettings

_LOG = logging.getLogger(__name__)

# Seconds after a deadline in which the batcher itself may report that it has passed, and why.
_GRACE = 0.25
# The least deadline after preprocessing, in seconds: the batcher needs a positive one.
_LEAST = 1e-3


class ServedModel:
    """A model that answers queries, independent of the transports and their protocol.

    Attributes:
        servable: the model and its tensors.
        settings: the model's settings.
        uncoded: the reason why nothing is coded; None if queries are coded.
        pool: the workers.
        meter: the metrics.
    """

    uncoded: str | None = None

    def __init__(
        self,
        servable: Servable,
        code: AbstractCode,
        settings: ModelSettings,
        metrics: Metrics,
        predictor: Predictor | None = None,
    ):
        """Start the workers, and compile all programs, so that no request waits for compilation.

        The predictor is as for `CodedBatcher`.

        Raises:
            ValueError: if the model cannot be coded (`Servable.uncodable`), and the code has K > 1.
            RuntimeError: if the workers do not start.
        """
        begin, tensors = time.monotonic(), servable.outputs
        shapes, floats = [part.shape for part in tensors.parts], tensors.parts[0].datatype == FLOAT
        policy = settings.policy(read_outputs(settings, shapes, floats=floats))
        if code.num_data == 1:
            self.uncoded = servable.uncodable or f"it is served by {type(code).__name__}"
        elif servable.uncodable is not None:
            raise ValueError(f"{type(code).__name__} for {servable.name}: {servable.uncodable}")
        self.servable, self.settings = servable, settings
        self._coder = Coder(code, form=tensors.form)
        x, decoding, about = servable.calibration, None, {"model": servable.name}
        exact_only = policy.outputs == "values" and policy.tolerance is None
        if x is not None and self._coder.can_decode and not exact_only:
            _LOG.info("calibrating", extra=about)
            dtype, accuracy, x = settings.worker_dtype, policy.accuracy, x() if callable(x) else x
            decoding = calibrate_decoding(
                self._coder, servable.model, x, accuracy, worker_dtype=dtype
            )
        _LOG.info("starting workers", extra=about)
        inputs, sizes = servable.queries, policy.batch_sizes
        self.pool = open_pool(
            servable.model,
            settings.num_workers,
            settings,
            num_data=code.num_data,
            example=[np.zeros((size, *inputs.shape), inputs.dtype) for size in sizes],
            overdue=DispatchSetting.of_policy(policy).overdue,
            hang_timeout=settings.hang_timeout_s,
        )
        _LOG.info("compiling", extra=about)
        self.meter = metrics.add(servable.name, self.pool)
        try:
            self._batcher = CodedBatcher(
                self.pool,
                self._coder,
                inputs.shape,
                tensors.shape,
                dtypes=(inputs.dtype, tensors.dtype),
                policy=policy,
                decoding=decoding,
                predictor=predictor,
                refuse=tensors.refuse,
                observe=self.meter.observe,
            )
            prepares = servable.preprocess is not None
            self._preprocessing = Preprocessing(servable, sizes) if prepares else None
        except BaseException:
            self.pool.close()
            raise
        self.meter.waiting = lambda: self._batcher.waiting
        about |= {name: self.status()[name] for name in ("code", "outputs", "pool")}
        about |= {"uncoded": self.uncoded, "seconds": round(time.monotonic() - begin, 3)}
        _LOG.info("model is ready", extra=about)

    async def infer(
        self,
        queries: Shaped[np.ndarray, "batch ..."] | Mapping[str, Shaped[np.ndarray, "batch ..."]],
        *,
        deadline: float | None = None,
        exact: bool = False,
    ) -> Reply:
        """Answer queries: an array, or arrays by name if the model takes a dict of arrays.

        Cancelling the call drops queries that have not been sent. The deadline is kept even if the
        batcher is stuck. Options and errors are those of `CodedBatcher.submit`.

        Returns:
            A reply whose values are an array, or a dict of arrays by output name.
        """
        inputs, outputs = self.servable.inputs, self.servable.outputs
        deadline = self._batcher.policy.deadline_s if deadline is None else deadline
        if self._preprocessing is not None:
            begin = time.monotonic()
            try:
                async with asyncio.timeout(deadline):
                    queries = await asyncio.to_thread(self._preprocessing, queries)
            except TimeoutError as error:
                self.meter.observe("request_deadline", 0.0)
                raise DeadlineExceeded(f"not preprocessed within {deadline:g} s") from error
            deadline = max(deadline - (time.monotonic() - begin), _LEAST)
        # The batcher itself checks a single array of floats.
        elif isinstance(queries, Mapping) or inputs.parts[0].datatype != FLOAT:
            queries = inputs.pack(queries)
        future = self._batcher.submit(queries, deadline=deadline, exact=exact)
        answer = asyncio.wrap_future(future)
        try:  # the batcher should end it before this timeout, with a better message
            done, _ = await asyncio.wait([answer], timeout=deadline + _GRACE)
            if not done:
                late = f"not answered within {deadline:g} s: the batcher is busy"
                with contextlib.suppress(concurrent.futures.InvalidStateError):  # just answered
                    future.set_exception(DeadlineExceeded(late))
            reply = await answer
        except asyncio.CancelledError:
            future.cancel()
            raise
        if outputs.alone:
            return reply
        return dataclasses.replace(reply, values=outputs.named(reply.values))

    @property
    def in_flight(self) -> int:
        """The number of requests without a reply."""
        return self._batcher.in_flight

    def health(self) -> Health:
        """Return whether the model is alive, and would answer a query now."""
        return self._batcher.health()

    def status(self) -> dict[str, Any]:
        """Return the model's part of the server's status, as JSON values."""
        servable, coder, batcher = self.servable, self._coder, self._batcher
        pool, meter = self.pool, self.meter
        learned, policy, report = batcher.status(), batcher.policy, pool.report()
        values = policy.outputs == "values"

        def totals(prefix: str, names: Sequence[str]) -> dict[str, int]:
            return {name: int(meter.read(f"{prefix}{name}")["total"]) for name in names}

        answers, requests = totals("query_", ANSWERS), totals("request_", OUTCOMES)
        right, wrong = totals("audit_", ("same", "other")).values()
        approximate, queries = answers["decoded"] + answers["predicted"], sum(answers.values())
        expected = meter.read("expected_disagreement")
        fidelity = {
            "decoded_share": approximate / queries if queries else None,
            "expected_disagreement": expected["sum"] / expected["count"]
            if expected["count"]
            else None,
            "audited": right + wrong,
            "audited_wrong": wrong / (right + wrong) if right + wrong else None,
            "stragglers": learned["decoding"],
        }
        if policy.tolerance is not None:
            fidelity["expected_beyond_bar"] = 1 - policy.coverage

        seconds = meter.read("request_ok")
        number, bounds = int(seconds["count"]), [1000 * bound for bound in SECONDS]
        below, edges = [0, *(int(seconds[str(bound)]) for bound in SECONDS), number], [0, *bounds]
        latency = {"bounds_ms": bounds, "counts": np.diff(below).tolist(), "number": number}
        for name, share in (("p50_ms", 0.5), ("p99_ms", 0.99), ("p999_ms", 0.999)):
            place = float(np.interp(share * number, below, [*edges, bounds[-1]]))
            latency[name] = place if number else None

        # Why nothing is coded or decoded.
        exact = (
            "outputs are values without a tolerance: all answers are exact; set a tolerance, or "
        )
        exact += "outputs = 'logits' if they are scores of labels"
        few = f"{pool.num_workers} workers for {coder.num_workers} coded data points of a group"
        saturated = "the pool is saturated: queries wait for a worker, none is spare for codes"
        uncalibrated = "nothing is decoded: give `inputs` to calibrate on, or max_disagreement = 1"
        promised = coder.can_decode and policy.accuracy.promises
        hints = (
            (batcher.waiting and not pool.idle, saturated),
            (servable.uncodable, f"nothing is coded: {servable.uncodable}"),
            (pool.num_workers < coder.num_workers, few),
            (coder.can_decode and values and policy.tolerance is None, exact),
            (promised and learned["decoding"] is None, uncalibrated),
        )
        code = {"num_data": coder.num_data, "num_workers": coder.num_workers}
        return {
            "name": servable.name,
            "health": dataclasses.asdict(batcher.health()),
            "hints": [hint for holds, hint in hints if holds],
            "code": {"name": type(coder.code).__name__, **code},
            "outputs": "values" if values else "scores",
            **{name: learned[name] for name in ("policy", "predictor", "checks")},
            "pool": {"kind": self.settings.pool, "num_workers": pool.num_workers},
            "workers": [
                {"state": worker.state, "deaths": worker.deaths, "busy_s": worker.busy_seconds}
                for worker in report.workers
            ],
            "queue": {
                "waiting": batcher.waiting,
                "max": policy.max_queue_size,
                "in_flight": batcher.in_flight,
            },
            "totals": {
                "requests": sum(requests.values()),
                "queries": answers,
                "errors": {name: count for name, count in requests.items() if name != "ok"},
                "groups": int(meter.read("group_fill")["count"]),
                "stragglers": int(meter.read("straggler")["total"]),
                "reexecutions": int(meter.read("reexecution")["total"]),
                "deaths": report.deaths,
            },
            "latency": latency,
            "fidelity": fidelity,
        }

    def close(self, drain: float) -> None:
        """Answer accepted requests for up to `drain` seconds; then end the workers."""
        self._batcher.close(drain)
        self.pool.close()
        self.meter.close()
