"""Requests as OpenTelemetry's spans, and what they went through as spans within them.

Each is made after its request was answered, by a thread of its own, from the request's record.
"""

import importlib.metadata
import itertools
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Mapping
from typing import Any

from ._record import Record

_LOG = logging.getLogger(__name__)

# Requests that wait to be told of; more are left out. So are steps of one request beyond so many.
_WAITING, _MOST_STEPS = 1000, 256
_LAST = 3.0  # seconds for the last spans, when the server ends
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


class Telemetry:
    """Makes spans by a provider of OpenTelemetry's SDK, which samples and exports them."""

    def __init__(self, provider: Any):
        from opentelemetry import propagate, trace

        self._trace, self._extract = trace, propagate.extract
        self._provider = provider
        version = importlib.metadata.version("nercc-jax")
        self._tracer = provider.get_tracer("nercc_jax", version)
        self._ended: queue.Queue[tuple[Record, str, int] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="nercc-telemetry", daemon=True)
        self._thread.start()

    def begin(self, record: Record, headers: Mapping[str, str]) -> Any:
        """A request's span, within the one that its headers name; None if it is not sampled."""
        span = self._tracer.start_span(
            f"infer {record.model}",
            self._extract(headers),
            kind=self._trace.SpanKind.SERVER,
            start_time=record.arrived_ns,
            attributes={"nercc.model": record.model},
        )
        return span if span.is_recording() else None

    def end(self, record: Record, outcome: str) -> None:
        """Its spans are made soon, unless too many wait for that already."""
        try:
            self._ended.put_nowait((record, outcome, time.time_ns()))
        except queue.Full:
            _LOG.debug("a request's spans are left out: too many wait")

    def close(self) -> None:
        """Sends what there is, for no longer than some seconds."""
        try:
            self._ended.put(None, timeout=_LAST)
        except queue.Full:
            return
        self._thread.join(_LAST)

    def _run(self) -> None:
        while (ended := self._ended.get()) is not None:
            try:
                self._tell(*ended)
            except Exception:
                _LOG.exception("a request's spans are lost")
        self._provider.shutdown()

    def _tell(self, record: Record, outcome: str, end: int) -> None:
        span = record.span
        span.set_attributes({"nercc.request_id": record.id, "nercc.outcome": outcome})
        for answer in set(record.answers.values()):
            number = sum(each == answer for each in record.answers.values())
            span.set_attribute(f"nercc.queries_{answer}", number)
        within = self._trace.set_span_in_context(span)
        # Of what it shared with others some may go on, or begin, since it ended.
        steps = [step for step in record.steps() if _at(step.begin, record) <= end]
        steps = sorted(steps, key=lambda step: step.begin)
        span.set_attribute("nercc.steps_left_out", max(len(steps) - _MOST_STEPS, 0))
        for step in itertools.islice(steps, _MOST_STEPS):
            about = {f"nercc.{name}": value for name, value in step.details.items()}
            ended = math.inf if step.end is None else _at(step.end, record)
            about["nercc.over"] = ended <= end
            child = self._tracer.start_span(
                step.name, within, start_time=_at(step.begin, record), attributes=about
            )
            child.end(int(min(ended, end)))
        if record.error is not None:
            code = self._trace.StatusCode.ERROR
            span.set_status(self._trace.Status(code, record.error))
        span.end(end)


def _at(moment: float, record: Record) -> int:
    """A monotonic time by the clock on the wall, in nanoseconds."""
    return record.arrived_ns + round(1e9 * (moment - record.arrived))


def telemetry_by_environment() -> Telemetry | None:
    """What OpenTelemetry's own variables ask for: None unless they name an OTLP endpoint.

    The SDK and its exporter read all others: sampling, headers, the service's name and so on.

    Raises: ImportError where the packages are not there.
    """
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if off or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    endpoint = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    if endpoint is None:
        return None
    protocol = next(filter(None, map(os.environ.get, _PROTOCOLS)), "http/protobuf")
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        else:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ImportError(
            f"{endpoint} is set, but {error.name} is missing: pip install 'nercc-jax[telemetry]', "
            "or OTEL_SDK_DISABLED=true"
        ) from error
    resource = Resource.create({SERVICE_NAME: "nercc_jax"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Telemetry(provider)
