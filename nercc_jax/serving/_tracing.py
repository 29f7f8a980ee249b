"""Reports of single requests, made where they come in: lines of the log, OpenTelemetry's spans."""

import dataclasses
import importlib
import logging
import os
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from .core._request import Reply

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class RequestTrace:
    """A request that is reported: in the log if `logged`, and by OpenTelemetry's `span` if any."""

    model: str
    logged: bool
    span: Any = None
    id: str = ""
    error: str | None = None
    reply: Reply | None = None
    arrived_ns: int = dataclasses.field(default_factory=time.time_ns)


class RequestLog:
    """Starts a trace for each request, and reports it at the end. It never fails a request."""

    def __init__(self, rate: float = 0.0, provider: Any = None):
        """Create a log with a line of this share of requests, and spans by OpenTelemetry's SDK."""
        self._rate, self._tracer = rate, None
        if provider is not None:
            from opentelemetry import propagate, trace

            self._tracer, self._api = provider.get_tracer("nercc_jax"), trace
            self._extract = propagate.extract

    def start(self, model: str, headers: Callable[[], Mapping[str, str]]) -> RequestTrace | None:
        """Start a trace, within the span that `headers()` name; None where nobody wants one."""
        if not self._rate and self._tracer is None:
            return None
        trace = RequestTrace(model, random.random() < self._rate)
        try:
            if self._tracer is not None:
                about = {"kind": self._api.SpanKind.SERVER, "start_time": trace.arrived_ns}
                span = self._tracer.start_span(f"infer {model}", self._extract(headers()), **about)
                trace.span = span if span.is_recording() else None  # it may not be sampled
        except Exception:
            _LOG.exception("a request is not traced")
        return trace

    def end(self, trace: RequestTrace, outcome: str) -> None:
        """Write the line, and end the span, with the same facts."""
        fields: dict[str, Any] = {"id": trace.id, "model": trace.model, "outcome": outcome}
        fields["ms"] = round(1e-6 * (time.time_ns() - trace.arrived_ns), 3)
        try:
            if (reply := trace.reply) is not None:
                fields |= {"queue_ms": round(1e3 * reply.queued, 3), "answers": reply.sources()}
                fields |= {"asked": reply.asked.tolist(), "responded": reply.responded.tolist()}
            fields |= {} if trace.error is None else {"error": trace.error}
            if (span := trace.span) is not None:
                span.set_attributes({f"nercc.{name}": each for name, each in fields.items()})
                fields["trace_id"] = f"{span.context.trace_id:032x}"
                if trace.error is not None:
                    span.set_status(self._api.StatusCode.ERROR, trace.error)
                span.end()
            if trace.logged:
                _LOG.info("answered" if outcome == "ok" else "not answered", extra=fields)
        except Exception:
            _LOG.exception("a request is not reported")


def provider_from_environment() -> Any:
    """Return a provider of spans as OpenTelemetry's variables say; None without an endpoint."""
    get, otlp = os.environ.get, "OTEL_EXPORTER_OTLP_"
    endpoint = next(filter(get, (f"{otlp}TRACES_ENDPOINT", f"{otlp}ENDPOINT")), "")
    protocol = get(f"{otlp}TRACES_PROTOCOL") or get(f"{otlp}PROTOCOL")
    off = get("OTEL_SDK_DISABLED", "").lower() == "true" or get("OTEL_TRACES_EXPORTER") == "none"
    if off or not endpoint:
        return None
    try:
        from opentelemetry.sdk import resources, trace
        from opentelemetry.sdk.trace import export as exports

        way = "proto.grpc" if protocol == "grpc" else "proto.http"
        module = importlib.import_module(f"opentelemetry.exporter.otlp.{way}.trace_exporter")
    except ImportError as error:
        raise ImportError(
            f"{endpoint} is set, but {error.name} is missing: pip install '.[telemetry]' in a "
            "clone, or OTEL_SDK_DISABLED=true"
        ) from error
    ours = resources.Resource.create({resources.SERVICE_NAME: "nercc_jax"})
    ours = ours.merge(resources.OTELResourceDetector().detect())
    provider = trace.TracerProvider(resource=ours, shutdown_on_exit=False)
    provider.add_span_processor(exports.BatchSpanProcessor(module.OTLPSpanExporter()))
    return provider
