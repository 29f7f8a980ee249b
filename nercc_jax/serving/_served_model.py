"""A served model: the model with its workers, its code and its batcher, and its status."""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from ..codes import AbstractCode
from ..pools import AbstractPool, DevicePool, Faults, PoolReport, RayPool
from ..pools.clock import WALL
from ._batcher import CodedBatcher
from ._metrics import Metrics
from ._policy import read_outputs
from ._settings import ModelSettings
from .adapt._decoding import DecodingScores, calibrate_or_restore
from .adapt._predictor import Predictor
from .core._adaptation import overdue_rule
from .core._coder import Coder
from .core._health import Health
from .core._request import DeadlineExceeded, Reply
from .protocol._servable import Preprocessing, Servable

_LOG = logging.getLogger(__name__)

# The share of resent queries above which a code is of no use.
_MOST_RESENT = 0.9
# Seconds beyond a deadline in which the batcher itself may report that it has passed, and why.
_GRACE = 0.25
# Seconds that are left of a deadline after preprocessing, at least: the batcher takes no less.
_LEAST = 1e-3
_LOOK = 1.0  # seconds between looks for hints
# Looks in a row that must see a hint before it is logged, and miss it before it is over: a busy
# pool is saturated every other moment.
_BEGINS, _ENDS = 3, 30


class ServedModel:
    """A model that takes queries and answers them; transports know the protocol.

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
        cache: Path | None = None,
        predictor: Predictor | None = None,
        straggler_score: Callable[[Any], Any] | None = None,
    ):
        """Start the workers, and compile everything, so that no request waits for the compiler.

        `cache` is a file for results of calibration. Injected stragglers are chosen by the score of
        rows. The predictor is as for `CodedBatcher`.

        Raises:
            ValueError: for a code where nothing can be coded (`Servable.uncodable`), or where
                calibration shows that it cannot keep `max_disagreement` or `tolerance`.
            RuntimeError: where the workers do not start.
        """
        tensors = servable.outputs
        shapes = [part.shape for part in tensors.parts]
        outputs, self._why_read = read_outputs(settings.outputs, settings.tolerance, shapes)
        if tensors.uncodable is not None and settings.outputs is None:
            outputs, self._why_read = "values", "they are no floats"
        policy = settings.policy(outputs)
        if code.num_data == 1:
            self.uncoded = servable.uncodable or f"it is served by {type(code).__name__}"
        elif servable.uncodable is not None:
            raise ValueError(f"{type(code).__name__} for {servable.name}: {servable.uncodable}")
        self.servable, self.settings = servable, settings
        begin = time.monotonic()
        self._coder = Coder(code, form=servable.outputs.form)
        x, decoding = servable.calibration, None
        exact_only = policy.outputs == "values" and policy.tolerance is None
        if x is not None and self._coder.can_decode and not exact_only:
            with log_phase("calibrating", servable.name):
                dtype, model = settings.worker_dtype, servable.model
                accuracy = policy.accuracy
                decoding = calibrate_or_restore(self._coder, model, x, accuracy, dtype, cache)
            _check(decoding, self._coder)
        with log_phase("starting workers", servable.name):
            self.pool = _open_pool(servable, code, settings, straggler_score)
        self.meter = metrics.add(servable.key, self.pool, code)
        with log_phase("compiling", servable.name):
            self._batcher = CodedBatcher(
                self.pool,
                self._coder,
                servable.queries.shape,
                servable.outputs.shape,
                dtypes=(servable.queries.dtype, servable.outputs.dtype),
                policy=policy,
                decoding=decoding,
                predictor=predictor,
                refuse=servable.outputs.refuse,
                observe=self.meter.observe,
            )
            sizes = policy.batch_sizes
            prepares = servable.preprocess is not None
            self._preprocessing = Preprocessing(servable, sizes) if prepares else None
        self.meter.waiting = lambda: self._batcher.waiting
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
                "outputs": self.outputs(),
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
        """Answer queries: an array, or arrays by name where the model takes a dict of arrays.

        Cancelling it drops what has not been sent. The deadline is kept whatever the batcher does.
        Options and errors are those of `CodedBatcher.submit`.

        Returns:
            A reply whose values are an array or a dict of arrays, as the model returns.
        """
        inputs, outputs = self.servable.inputs, self.servable.outputs
        deadline = self._batcher.policy.deadline_s if deadline is None else deadline
        if self._preprocessing is not None:
            begin = time.monotonic()
            try:
                async with asyncio.timeout(deadline):
                    queries = await self._preprocessing.run(queries)
            except TimeoutError as error:
                self.count("request_deadline")
                raise DeadlineExceeded(f"not preprocessed within {deadline:g} s") from error
            deadline = max(deadline - (time.monotonic() - begin), _LEAST)
        # One array of floats is checked by the batcher itself.
        elif isinstance(queries, Mapping) or not inputs.plain:
            queries = inputs.pack(queries)
        future = self._batcher.submit(queries, deadline=deadline, exact=exact, high=high)
        reply = await _result(future, deadline)
        if outputs.alone:
            return reply
        return dataclasses.replace(reply, values=outputs.named(reply.values))

    def count(self, refusal: str) -> None:
        """Count a request that was refused before it reached the batcher, by that measure."""
        self.meter.observe(refusal, 0.0)

    @property
    def ends_at(self) -> float:
        """The monotonic time at which something will end this process; infinite for nothing."""
        return self.pool.ends_at

    @property
    def in_flight(self) -> int:
        """The number of requests without a reply."""
        return self._batcher.in_flight

    def outputs(self) -> dict[str, str | None]:
        """Return how outputs are read, as scores, as values or not yet (None), and why."""
        read = self._batcher.status()["outputs"]
        return read | {"why": self._why_read or read["why"]}

    def health(self) -> Health:
        """Return whether it is alive, and would answer a query now."""
        return self._batcher.health()

    def status(self) -> dict[str, Any]:
        """Return the model's part of the server's status."""
        health, report = self.health(), self.pool.report()
        adapted, counted = self._batcher.status(), self.meter.status()
        audited = adapted["audited"]
        policy = self._batcher.policy
        missed = "disagreement" if policy.tolerance is None else "beyond_bar"
        if policy.tolerance is not None:
            counted["fidelity"]["expected_beyond_bar"] = 1 - policy.coverage
        counted["totals"]["deaths"] = report.deaths
        counted["fidelity"] |= {
            "audited": len(audited),
            f"audited_{missed}": sum(audited) / len(audited) if audited else None,
            "stragglers": adapted["decoding"],
        }
        code = self._coder.code
        return {
            "name": self.servable.key,
            "health": dataclasses.asdict(health),
            "hints": self._hints(health, report),
            "code": {
                "name": type(code).__name__,
                "num_data": code.num_data,
                "num_workers": code.num_workers,
            },
            "outputs": self.outputs(),
            "policy": adapted["policy"],
            "predictor": adapted["predictor"],
            "checks": adapted["checks"],
            "pool": {"kind": self.settings.pool, "num_workers": self.pool.num_workers},
            "workers": [
                {"state": worker.state, "deaths": worker.deaths, "busy_s": worker.busy_seconds}
                for worker in report.workers
            ],
            "queue": {
                "waiting": self._batcher.waiting,
                "max": self._batcher.policy.max_queue_size,
                "in_flight": self.in_flight,
            },
            **counted,
        }

    def close(self, drain: float) -> None:
        """Answer what was accepted for up to `drain` seconds; then end the workers."""
        self._hint_log.close()
        self._batcher.close(drain)
        if self._preprocessing is not None:
            self._preprocessing.close()
        self.pool.close()
        self.meter.close()

    def _hints(self, health: Health, report: PoolReport) -> list[str]:
        """Return why things are not as they should be, and why nothing is coded or decoded."""
        batcher, coder, pool = self._batcher, self._coder, self.pool
        hints = [] if health.trouble is None else [health.trouble]
        if all(worker.state == "overdue" for worker in report.workers):
            hints.append(f"all {pool.num_workers} workers are overdue")
        if report.internal_errors:
            hints.append(f"the pool had {report.internal_errors} errors of its own: see the log")
        if batcher.waiting and not pool.idle:
            hints.append(
                "the pool is saturated: queries wait for a worker, none is spare for codes"
            )
        if self.servable.uncodable is not None:
            hints.append(f"nothing is coded: {self.servable.uncodable}")
        if pool.num_workers < coder.num_workers:
            hints.append(
                f"{pool.num_workers} workers for {coder.num_workers} coded data points of a group"
            )
        return hints + batcher.hints()


class HintLog:
    """A thread that logs each hint when it has lasted, and when it is over."""

    def __init__(self, model: str, look: Callable[[], Sequence[str]]):
        """Create the thread; `look` returns the hints, which are the same but for their numbers."""
        self._model, self._look = model, look
        self._logged: dict[str, str] = {}
        self._changes: collections.Counter[str] = collections.Counter()  # looks that saw a change
        self._turns = WALL.turns("nercc-hints", self._turn)
        self.start = self._turns.start

    def close(self) -> None:
        self._turns.close(_LOOK)

    def update(self, hints: Sequence[str]) -> None:
        """Log the changes that have lasted long enough."""
        seen = {re.sub(r"\d+", "", hint): hint for hint in hints}
        changed = seen.keys() ^ self._logged.keys()
        self._changes = collections.Counter({kind: self._changes[kind] + 1 for kind in changed})
        for kind in sorted(changed):
            if self._changes[kind] < (_BEGINS if kind in seen else _ENDS):
                continue
            del self._changes[kind]
            if kind in seen:
                self._logged[kind] = seen[kind]
                _LOG.info("hint: %s", seen[kind], extra={"model": self._model})
            else:
                _LOG.info("over: %s", self._logged.pop(kind), extra={"model": self._model})

    def _turn(self) -> float:
        try:
            self.update(self._look())
        except Exception:
            _LOG.exception("looking for hints failed", extra={"model": self._model})
        return time.monotonic() + _LOOK


@contextlib.contextmanager
def log_phase(what: str, model: str) -> Iterator[None]:
    """Log a long phase of a start when it begins, and its seconds when it ends."""
    begin = time.monotonic()
    _LOG.info(what, extra={"model": model})
    yield
    seconds = round(time.monotonic() - begin, 3)
    _LOG.info("%s: done", what, extra={"model": model, "seconds": seconds})


async def _result(future: concurrent.futures.Future[Reply], deadline: float) -> Reply:
    """Await a future as `asyncio.wrap_future` does, at half its price.

    That is a twentieth of a small request's. The event loop itself reports that the deadline has
    passed where the batcher should have, and has not.
    """
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def wake() -> None:
        if not done.done():
            done.set_result(None)

    def notify(_: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(wake)

    def expire() -> None:
        late = DeadlineExceeded(f"not answered within {deadline:g} s: the batcher is busy")
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # it was, just now
            future.set_exception(late)

    timer = loop.call_later(deadline + _GRACE, expire)
    future.add_done_callback(notify)
    try:
        await done
    except asyncio.CancelledError:
        future.cancel()
        raise
    finally:
        timer.cancel()
    return future.result()


def _open_pool(
    servable: Servable,
    code: AbstractCode,
    settings: ModelSettings,
    straggler_score: Callable[[Any], Any] | None,
) -> AbstractPool:
    inputs = servable.queries
    options: Any = {
        "example": [
            np.zeros((size, *inputs.shape), inputs.dtype) for size in settings.policy().batch_sizes
        ],
        "worker_dtype": settings.worker_dtype,
        "faults": Faults.from_rates(
            service_delay=settings.service_delay_s,
            straggler_rate=settings.straggler_rate,
            straggler_delay=settings.straggler_delay_s,
            straggler_score=straggler_score,
            straggler_leaning=settings.straggler_leaning,
            death_rate=settings.death_rate,
            wrong_workers=settings.wrong_workers,
            wrong_rate=settings.wrong_rate,
            seed=settings.fault_seed,
        ),
        "overdue": overdue_rule(settings.policy()),
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


def _check(decoding: DecodingScores, coder: Coder) -> None:
    """Raise ValueError where a limit can only be kept by sending all queries twice."""
    accuracy = decoding.accuracy
    if coder.systematic or not decoding.calibrated or not accuracy.promises:
        return
    again = decoding.resent(coder.num_data)
    if again > _MOST_RESENT:
        asked = f"max_disagreement {accuracy.max_disagreement}"
        if accuracy.tolerance is not None:
            asked = f"tolerance {accuracy.tolerance}"
        raise ValueError(
            f"{asked}: with this code and calibration data {100 * again:.0f} % of the queries "
            "would be sent twice; allow more, use interleaved points, or a tuned code "
            "(`nercc tune`)"
        )
