"""Traces of requests: what happened to each, for the request log and for OpenTelemetry's spans.

The scheduler writes a `RequestTrace` as it goes. Once the request is answered, `RequestLog` writes
a line of it, and `Telemetry` makes spans of it on a thread of its own.
"""

import contextvars
import dataclasses
import importlib.metadata
import itertools
import logging
import math
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

_LOG = logging.getLogger(__name__)
_NUMBERS = itertools.count(1)

# Requests that wait for their spans, and steps of one request; more of either are left out.
_WAITING, _MOST_STEPS = 1000, 256
_LAST = 3.0  # seconds for the last spans when the server ends


@dataclasses.dataclass(frozen=True)
class TraceStep:
    """A step of a request, by the monotonic clock; `end` is None while it goes on."""

    name: str
    begin: float
    end: float | None
    details: Mapping[str, Any]


class GroupTrace:
    """The trace of a group: its workers' calls by coded data point, and other steps.

    The scheduler's thread writes, others read copies.
    """

    def __init__(self):
        self.number = next(_NUMBERS)
        self.requests: list[str] = []
        self.calls: dict[int, TraceStep] = {}
        self.steps: list[TraceStep] = []

    def sent(self, points: Iterable[int], now: float) -> None:
        for point in points:
            self.calls[point] = TraceStep("worker call", now, None, self._details(point=point))

    def answered(self, point: int, now: float, worker: int) -> None:
        if point in self.calls:  # it may have been sent before the trace began
            details = self._details(point=point, worker=worker)
            self.calls[point] = dataclasses.replace(self.calls[point], end=now, details=details)

    def add(self, name: str, begin: float, end: float, **details: Any) -> None:
        self.steps.append(TraceStep(name, begin, end, self._details(**details)))

    def _details(self, **details: Any) -> Mapping[str, Any]:
        return {"group": self.number, **details}


class RequestTrace:
    """The trace of a request. The scheduler's thread writes; its caller reads at the end.

    A trace that is neither logged nor a span still tells its `id` to those that share its groups.
    `span` is OpenTelemetry's, and `answers` are the sources of answers, by query.
    """

    def __init__(self, model: str, logged: bool):
        self.model, self.logged = model, logged
        self.span: Any = None
        self.id = ""
        self.error: str | None = None
        self.arrived, self.arrived_ns = time.monotonic(), time.time_ns()
        self.answers: dict[int, str] = {}
        self._groups: dict[GroupTrace, list[int]] = {}  # with the queries that are in it
        self._waits: list[TraceStep] = []
        self._resent_at: dict[int, float] = {}  # by query

    def enter(self, group: GroupTrace, query: int, arrived: float) -> None:
        group.requests.append(self.id)
        if not self.logged and self.span is None:
            return
        resent = self._resent_at.get(query)
        name, begin = ("queue", arrived) if resent is None else ("send again", resent)
        details = {"group": group.number, "query": query}
        self._waits.append(TraceStep(name, begin, time.monotonic(), details))
        self._groups.setdefault(group, []).append(query)

    def send_again(self, query: int) -> None:
        self._resent_at[query] = time.monotonic()

    def log_fields(self, outcome: str) -> dict[str, Any]:
        """Return the line of the log; `queue_ms` is how long the first query waited, if sent."""
        waits = [step for step in list(self._waits) if step.name == "queue"]
        queued = [step.end - step.begin for step in waits if step.end is not None]
        fields = {
            "id": self.id,
            "model": self.model,
            "outcome": outcome,
            "queue_ms": round(1e3 * min(queued), 3) if queued else None,
            "ms": round(1e3 * (time.monotonic() - self.arrived), 3),
            "answers": [answer for _, answer in sorted(self.answers.items())],
            "groups": self.groups(),
        }
        if self.error is not None:
            fields["error"] = self.error
        if self.span is not None:
            fields["trace_id"] = f"{self.span.get_span_context().trace_id:032x}"
        return fields

    def groups(self) -> list[dict[str, Any]]:
        """Return for each group the request's queries, and the requests that shared it.

        `asked` and `responded` count coded data points that were sent, and answered by now.
        """
        found = []
        for group, queries in dict(self._groups).items():
            calls = list(group.calls.copy().values())
            found.append(
                {
                    "group": group.number,
                    "queries": list(queries),
                    "shared_with": sorted(set(group.requests) - {self.id}),
                    "asked": len(calls),
                    "responded": sum(call.end is not None for call in calls),
                }
            )
        return found

    def steps(self) -> Iterator[TraceStep]:
        yield from list(self._waits)
        for group in list(self._groups):
            yield from list(group.steps)
            yield from group.calls.copy().values()


# The trace of the request that the transport's current task answers.
current: contextvars.ContextVar[RequestTrace | None] = contextvars.ContextVar("trace", default=None)


class RequestLog:
    """Starts a trace for each request, and reports it at the end. It never fails a request."""

    def __init__(self, rate: float = 0.0, telemetry: "Telemetry | None" = None):
        """Create a log with a line of this share of requests, and with spans by `telemetry`."""
        self._rate, self._telemetry = rate, telemetry

    def start(self, model: str, headers: Callable[[], Mapping[str, str]]) -> RequestTrace | None:
        """Start a trace, which `headers()` may name; None where nobody wants one."""
        if not self._rate and self._telemetry is None:
            return None
        trace = RequestTrace(model, random.random() < self._rate)
        try:
            if self._telemetry is not None:
                trace.span = self._telemetry.start_span(trace, headers())
        except Exception:
            _LOG.exception("a request is not traced")
        current.set(trace)
        return trace

    def end(self, trace: RequestTrace, outcome: str) -> None:
        current.set(None)
        try:
            if trace.logged:
                message = "answered" if outcome == "ok" else "not answered"
                _LOG.info(message, extra=trace.log_fields(outcome))
            if self._telemetry is not None and trace.span is not None:
                self._telemetry.end(trace, outcome)
        except Exception:
            _LOG.exception("a request is not logged")


class Telemetry:
    """Makes spans of traces, by a provider of OpenTelemetry's SDK, which samples and exports."""

    def __init__(self, provider: Any):
        from opentelemetry import propagate, trace

        self._api, self._extract = trace, propagate.extract
        self._provider = provider
        version = importlib.metadata.version("nercc-jax")
        self._tracer = provider.get_tracer("nercc_jax", version)
        self._ended: queue.Queue[tuple[RequestTrace, str, int] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="nercc-telemetry", daemon=True)
        self._thread.start()

    def start_span(self, trace: RequestTrace, headers: Mapping[str, str]) -> Any:
        """Return a request's span, within the one that its headers name; None if not sampled."""
        span = self._tracer.start_span(
            f"infer {trace.model}",
            self._extract(headers),
            kind=self._api.SpanKind.SERVER,
            start_time=trace.arrived_ns,
            attributes={"nercc.model": trace.model},
        )
        return span if span.is_recording() else None

    def end(self, trace: RequestTrace, outcome: str) -> None:
        """Make the spans soon, unless too many requests wait for theirs."""
        try:
            self._ended.put_nowait((trace, outcome, time.time_ns()))
        except queue.Full:
            _LOG.debug("a request's spans are left out: too many wait")

    def close(self) -> None:
        """Send what there is, within a few seconds."""
        try:
            self._ended.put(None, timeout=_LAST)
        except queue.Full:
            return
        self._thread.join(_LAST)

    def _run(self) -> None:
        while (ended := self._ended.get()) is not None:
            try:
                self._make_spans(*ended)
            except Exception:
                _LOG.exception("a request's spans are lost")
        self._provider.shutdown()

    def _make_spans(self, trace: RequestTrace, outcome: str, end: int) -> None:
        span = trace.span
        span.set_attributes({"nercc.request_id": trace.id, "nercc.outcome": outcome})
        for answer in set(trace.answers.values()):
            number = sum(each == answer for each in trace.answers.values())
            span.set_attribute(f"nercc.queries_{answer}", number)
        within = self._api.set_span_in_context(span)
        # Steps that are shared with other requests may go on, or begin, after the end.
        steps = [step for step in trace.steps() if _wall_ns(step.begin, trace) <= end]
        steps = sorted(steps, key=lambda step: step.begin)
        span.set_attribute("nercc.steps_left_out", max(len(steps) - _MOST_STEPS, 0))
        for step in itertools.islice(steps, _MOST_STEPS):
            attributes = {f"nercc.{name}": value for name, value in step.details.items()}
            ended = math.inf if step.end is None else _wall_ns(step.end, trace)
            attributes["nercc.over"] = ended <= end
            child = self._tracer.start_span(
                step.name, within, start_time=_wall_ns(step.begin, trace), attributes=attributes
            )
            child.end(int(min(ended, end)))
        if trace.error is not None:
            code = self._api.StatusCode.ERROR
            span.set_status(self._api.Status(code, trace.error))
        span.end(end)


def _wall_ns(moment: float, trace: RequestTrace) -> int:
    return trace.arrived_ns + round(1e9 * (moment - trace.arrived))


def telemetry_from_environment() -> Telemetry | None:
    """Return the telemetry that OpenTelemetry's variables ask for; None without an endpoint.

    The SDK and its exporter read all other variables: sampling, headers, the service's name. Raises
    ImportError where the packages are missing.
    """
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if off or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    prefixes = "OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_"
    endpoints = (f"{prefix}ENDPOINT" for prefix in prefixes)
    endpoint = next((name for name in endpoints if os.environ.get(name)), None)
    if endpoint is None:
        return None
    protocols = (os.environ.get(f"{prefix}PROTOCOL") for prefix in prefixes)
    protocol = next(filter(None, protocols), "http/protobuf")
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
            f"{endpoint} is set, but {error.name} is missing: pip install '.[telemetry]' in a "
            "clone, or OTEL_SDK_DISABLED=true"
        ) from error
    resource = Resource.create({SERVICE_NAME: "nercc_jax"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Telemetry(provider)
