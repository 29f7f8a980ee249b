"""A span of OpenTelemetry for each request, made where requests come in."""

import dataclasses
import importlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from .core._request import Reply

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class RequestTrace:
    """A request that has a `span`."""

    model: str
    span: Any
    id: str = ""
    error: str | None = None
    reply: Reply | None = None


class RequestSpans:
    """Starts a span for each request, and ends it with what is known. It never fails a request."""

    def __init__(self, provider: Any = None):
        """Make spans by a provider of OpenTelemetry's SDK; none without it."""
        self._tracer = None
        if provider is not None:
            from opentelemetry import propagate, trace

            self._tracer, self._api = provider.get_tracer("nercc_jax"), trace
            self._extract = propagate.extract

    def start(self, model: str, headers: Callable[[], Mapping[str, str]]) -> RequestTrace | None:
        """Start a span, within the one that `headers()` name; None where it is not sampled."""
        if self._tracer is None:
            return None
        try:
            about = {"kind": self._api.SpanKind.SERVER, "start_time": time.time_ns()}
            span = self._tracer.start_span(f"infer {model}", self._extract(headers()), **about)
        except Exception:
            _LOG.exception("a request is not traced")
            return None
        return RequestTrace(model, span) if span.is_recording() else None

    def end(self, trace: RequestTrace, outcome: str) -> None:
        """End a request's span."""
        fields: dict[str, Any] = {"id": trace.id, "model": trace.model, "outcome": outcome}
        try:
            if (reply := trace.reply) is not None:
                fields |= {"queue_ms": round(1e3 * reply.queued, 3), "answers": reply.sources()}
                fields |= {"asked": reply.asked.tolist(), "responded": reply.responded.tolist()}
            fields |= {} if trace.error is None else {"error": trace.error}
            trace.span.set_attributes({f"nercc.{name}": each for name, each in fields.items()})
            if trace.error is not None:
                trace.span.set_status(self._api.StatusCode.ERROR, trace.error)
            trace.span.end()
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
