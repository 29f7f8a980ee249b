"""An OpenTelemetry span for each request, started when the server receives the request."""

import importlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from .core._request import Reply

_LOG = logging.getLogger(__name__)


class RequestSpans:
    """The spans of requests. An error of tracing is logged, and never fails a request."""

    def __init__(self, provider: Any = None):
        """Create spans with a provider of OpenTelemetry's SDK; none without it."""
        self._tracer = None
        if provider is not None:
            from opentelemetry import propagate, trace

            self._tracer, self._api = provider.get_tracer("nercc_jax"), trace
            self._extract = propagate.extract

    def start(self, model: str, headers: Callable[[], Mapping[str, str]]) -> Any:
        """Return a child of the span that `headers()` name; None if it is not sampled."""
        if self._tracer is None:
            return None
        try:
            about = {"kind": self._api.SpanKind.SERVER, "start_time": time.time_ns()}
            span = self._tracer.start_span(f"infer {model}", self._extract(headers()), **about)
        except Exception:  # for example from a sampler
            _LOG.exception("a request is not traced")
            return None
        span.set_attribute("nercc.model", model)
        return span if span.is_recording() else None

    def end(self, span: Any, outcome: str, error: BaseException | None = None) -> None:
        try:
            span.set_attribute("nercc.outcome", outcome)
            if error is not None:
                why = str(error) or type(error).__name__
                span.set_attribute("nercc.error", why)
                span.set_status(self._api.StatusCode.ERROR, why)
            span.end()
        except Exception:  # for example from a span processor
            _LOG.exception("the trace of a request is incomplete")


def describe_reply(span: Any, id: str, reply: Reply | None = None) -> None:
    """Add a request's id, and its reply's attributes if it has one, to its span."""
    found: dict[str, Any] = {"id": id}
    if reply is not None:
        found |= {"queue_ms": round(1e3 * reply.queued, 3), "answers": reply.sources()}
        found |= {"asked": reply.asked.tolist(), "responded": reply.responded.tolist()}
    span.set_attributes({f"nercc.{name}": each for name, each in found.items()})


def provider_from_environment() -> Any:
    """Return a provider of spans by OpenTelemetry's variables; None if they enable none.

    Raises ImportError if the exporter is missing.
    """
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
