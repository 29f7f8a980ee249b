"""A model with its workers, its code and its batcher: what the server has for each name."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped

from ..codes import AbstractCode
from ..pools import AbstractPool, DevicePool, Faults, Overdue, PoolReport, RayPool
from ._batcher import CodedBatcher
from ._coder import Coder
from ._fidelity import Fidelity
from ._health import Health
from ._hints import HintLog, hints_of, hints_of_predictor
from ._kept import calibrate
from ._metrics import Meter, Meters
from ._phases import phase
from ._predictor import Predictor
from ._record import current
from ._request import DeadlineExceeded, Reply
from ._servable import Servable
from ._settings import ModelSettings

_LOG = logging.getLogger(__name__)

# A share of queries to be sent again above which a code is of no use.
_MOST_AGAIN = 0.9
# Seconds beyond a deadline in which the batcher may say itself that it has passed, and why.
_GRACE = 0.25


class ServedModel:
    """Takes queries, and answers them; the faces know the protocol.

    `uncoded`: why nothing is coded, if so.
    """

    uncoded: str | None = None

    def __init__(
        self,
        servable: Servable,
        code: AbstractCode,
        settings: ModelSettings,
        meters: Meters,
        kept: Path | None = None,
        predictor: Predictor | None = None,
    ):
        """Starts the workers and compiles everything, so that no request waits for the compiler.

        `kept`: where what calibration told is kept between starts, if it is. `predictor`: see
        `CodedBatcher`.

        Raises: ValueError for a code where nothing can be coded (`Servable.uncodable`), or where
        calibration shows that it cannot keep `max_disagreement`; RuntimeError where the workers do
        not start.
        """
        policy = settings.policy()
        if code.num_data == 1:
            self.uncoded = servable.uncodable or f"it is served by {type(code).__name__}"
        elif servable.uncodable is not None:
            raise ValueError(f"{type(code).__name__} for {servable.name}: {servable.uncodable}")
        self.servable, self.settings = servable, settings
        self._predictor = predictor
        begin = time.monotonic()
        self._coder = Coder(code, form=servable.outputs.form)
        fidelity = Fidelity(self._coder)
        if servable.calibration is not None and self._coder.guesses:
            with phase("calibrating", servable.name):
                calibrate(fidelity, servable, settings.worker_dtype, kept)
            _check(fidelity, self._coder, policy.max_disagreement)
        with phase("starting workers", servable.name):
            self.pool = _open_pool(servable, code, settings)
        self.meter = Meter(meters, servable.name, self.pool, code)
        with phase("compiling", servable.name):
            self._batcher = CodedBatcher(
                self.pool,
                self._coder,
                servable.inputs.shape,
                servable.outputs.shape,
                dtypes=(servable.inputs.dtype, servable.outputs.dtype),
                policy=policy,
                fidelity=fidelity,
                predictor=predictor,
                refuse=servable.outputs.refuse,
                observe=self.meter.observe,
            )
        self.meter.waiting.set_function(lambda: self._batcher.waiting)
        self._hint_log = HintLog(
            servable.name, lambda: self._hints(self.health(), self.pool.report())
        )
        self._hint_log.start()
        _LOG.info(
            "model is ready",
            extra={
                "model": servable.name,
                "code": type(code).__name__,
                "num_data": code.num_data,
                "num_workers": code.num_workers,
                "uncoded": self.uncoded,
                "pool": settings.pool,
                "workers": self.pool.num_workers,
                "seconds": round(time.monotonic() - begin, 3),
            },
        )

    async def infer(
        self,
        queries: Shaped[np.ndarray, "batch ..."] | Mapping[str, Shaped[np.ndarray, "batch ..."]],
        *,
        deadline: float | None = None,
        exact: bool = False,
        high: bool = False,
    ) -> Reply:
        """Answers queries: an array, or such by name where the model takes a dict of arrays.

        The reply's values are an array or a dict of such, as the model returns. Other arguments,
        and errors, are those of `CodedBatcher.submit`. Cancelling it drops what has not been sent.
        The deadline is kept whatever the batcher's thread does.
        """
        inputs, outputs = self.servable.inputs, self.servable.outputs
        # Of one array of floats the batcher itself says what does not fit.
        if isinstance(queries, Mapping) or not inputs.plain:
            queries = inputs.pack(queries)
        deadline = self._batcher.policy.deadline_s if deadline is None else deadline
        future = self._batcher.submit(
            queries, deadline=deadline, exact=exact, high=high, record=current.get()
        )
        reply = await _result(future, deadline)
        if outputs.alone:
            return reply
        return dataclasses.replace(reply, values=outputs.named(reply.values))

    def count(
        self, refusal: Literal["request_invalid", "request_overloaded", "request_deadline"]
    ) -> None:
        """Counts a request that was refused, here or where it was read."""
        self.meter.observe(refusal, 0.0)

    @property
    def ends_at(self) -> float:
        """The monotonic time at which something ends this process; infinite for nothing."""
        return self.pool.ends_at

    def health(self) -> Health:
        """Whether it is alive, and would answer a query now."""
        return self._batcher.health()

    def _hints(self, health: Health, report: PoolReport) -> list[str]:
        uncodable = self.servable.uncodable
        hints = hints_of(self._batcher, self._coder, self.pool, health, report, uncodable)
        return hints if self._predictor is None else hints + hints_of_predictor(self._predictor)

    def status(self) -> dict[str, Any]:
        health, report = self.health(), self.pool.report()
        audit = self._batcher.fidelity.audited()
        counted = self.meter.status()
        counted["totals"]["deaths"] = report.deaths
        counted["fidelity"] |= {
            "audited": audit.number,
            "audited_disagreement": audit.disagreement if audit.number else None,
        }
        code = self._coder.code
        return {
            "name": self.servable.name,
            "health": dataclasses.asdict(health),
            "hints": self._hints(health, report),
            "code": {
                "name": type(code).__name__,
                "num_data": code.num_data,
                "num_workers": code.num_workers,
            },
            "policy": self._batcher.controller.status(),
            "predictor": None if self._predictor is None else self._predictor.status(),
            "pool": {"kind": self.settings.pool, "num_workers": self.pool.num_workers},
            "workers": [
                {"state": worker.state, "deaths": worker.deaths, "busy_s": worker.busy_seconds}
                for worker in report.workers
            ],
            "queue": {
                "waiting": self._batcher.waiting,
                "max": self._batcher.policy.max_queue_size,
                "in_flight": self._batcher.in_flight,
            },
            **counted,
        }

    def close(self, drain: float) -> None:
        """Answers what was accepted for up to `drain` seconds; then the workers end."""
        self._hint_log.close()
        self._batcher.close(drain)
        self.pool.close()


async def _result(future: concurrent.futures.Future[Reply], deadline: float) -> Reply:
    """`asyncio.wrap_future` at half its price, which is a twentieth of a small request's.

    The event loop tells that the deadline has passed where the batcher should have, and has not.
    """
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def wake() -> None:
        if not done.done():
            done.set_result(None)

    def tell(_: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(wake)

    def expire() -> None:
        late = DeadlineExceeded(f"not answered within {deadline:g} s: the batcher is busy")
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # it was, just now
            future.set_exception(late)

    timer = loop.call_later(deadline + _GRACE, expire)
    future.add_done_callback(tell)
    try:
        await done
    except asyncio.CancelledError:
        future.cancel()
        raise
    finally:
        timer.cancel()
    return future.result()


def _open_pool(servable: Servable, code: AbstractCode, settings: ModelSettings) -> AbstractPool:
    inputs = servable.inputs
    options: Any = {
        "example": [
            np.zeros((size, *inputs.shape), inputs.dtype) for size in settings.policy().batch_sizes
        ],
        "worker_dtype": settings.worker_dtype,
        "faults": Faults.from_rates(
            service_delay=settings.service_delay_s,
            straggler_rate=settings.straggler_rate,
            straggler_delay=settings.straggler_delay_s,
            death_rate=settings.death_rate,
            seed=settings.fault_seed,
        ),
        "overdue": Overdue(settings.quantile, settings.patience),
        "max_attempts": settings.max_attempts,
        "hang_timeout": settings.hang_timeout_s,
    }
    number = settings.workers or settings.num_workers
    if settings.pool == "ray":
        return RayPool(
            servable.model,
            number,
            actor_options=settings.ray_options(),
            max_per_node=code.num_workers - code.num_data or None,
            min_workers=min(code.num_data, number),
            **options,
        )
    return DevicePool(servable.model, number, **options)


def _check(fidelity: Fidelity, coder: Coder, limit: float | None) -> None:
    """Raises: ValueError where the limit can only be kept by sending all queries twice."""
    if limit is None or coder.systematic:
        return
    if coder.doubts:
        doubt = fidelity.doubt(coder.num_data)
        again = doubt.share(doubt.limit(limit))
        kept, found = again <= _MOST_AGAIN, f"{100 * again:.0f} % of the queries"
    else:
        everyone = np.ones(coder.num_workers, bool)
        disagreement = fidelity.expect(coder.num_data, everyone).disagreement
        kept, found = bool((disagreement <= limit).all()), "every query"
    if not kept:
        raise ValueError(
            f"max_disagreement {limit}: with this code and calibration data {found} would be sent "
            "twice; allow more, use interleaved points, or a tuned code (`nercc tune`)"
        )
