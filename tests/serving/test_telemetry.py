"""Reports of single requests: OpenTelemetry's spans."""

# ruff: noqa: E402 (`require` comes before what needs it)

import http.server
import sys
import threading

import pytest
from conftest import require
from faces import ask
from in_process import real, serving
from nercc_server import ENDS, patience

require("opentelemetry.exporter.otlp.proto.http", "telemetry")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, Sampler
from opentelemetry.trace import StatusCode

from nercc_jax import NeRCC, Uncoded
from nercc_jax.serving._tracing import RequestSpans, provider_from_environment

pytestmark = pytest.mark.slow

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
UNSAMPLED = f"00-{TRACE}-{PARENT}-00"


def start(name, code):
    """A model three in ten of whose calls straggle. Groups wait to be filled for long."""
    usual = {"max_batch_size": 1, "batch_wait_timeout_s": 0.5}
    usual |= {"faults": {"straggler_rate": 0.3, "straggler_delay_s": 0.3}, "max_disagreement": 1}
    return real(name, lambda x: 2 * x, code, workers=4, outputs="logits", **usual)


@pytest.fixture(scope="module")
def spans():
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def server(spans):
    """`decodes` decodes whatever straggles, `repeats` sends it again."""
    provider = TracerProvider(sampler=ParentBased(ALWAYS_ON))
    provider.add_span_processor(SimpleSpanProcessor(spans))
    decodes = start("decodes", NeRCC(2, 4, points="interleaved", lambda_dec=0.0))
    found = {"grpc_port": 0, "spans": provider}
    with serving(decodes, start("repeats", Uncoded(2)), **found) as server:
        yield server


@pytest.fixture(autouse=True)
def no_spans_yet(spans):
    spans.clear()


def send(server, model, name, count=1, face="json", **headers):
    """Whether this request was answered: so many queries, by this id."""
    x = [[0.5] * 4] * count
    return ask(face, server, model, {"input": x}, id=name, headers=headers).is_(200)


def span_of(spans, name):
    """A request's span, once it is there."""
    for _ in patience(ENDS):
        for span in spans.get_finished_spans():
            if (span.attributes or {}).get("nercc.id") == name:
                return span
    raise AssertionError(f"no span of {name}")


def test_the_span_says_what_became_of_a_request(server, spans):
    """Of stragglers, too, which are decoded or sent again."""
    for model, answer in (("decodes", "decoded"), ("repeats", "reexecuted")):
        for number in range(60):
            assert send(server, model, f"{model}-{number}", count=2)
            span = span_of(spans, f"{model}-{number}")
            about = {key.removeprefix("nercc."): each for key, each in span.attributes.items()}
            assert (about["model"], about["outcome"]) == (model, "ok")
            assert 0 < about["queue_ms"] < 1e-6 * (span.end_time - span.start_time) < 1e3 * ENDS
            counts = zip(about["responded"], about["asked"], strict=True)
            assert all(1 <= responded <= asked <= 4 for responded, asked in counts)
            assert len(about["answers"]) == 2
            if answer in about["answers"]:
                break
        else:
            raise AssertionError("nothing ever straggled")
    assert not send(server, "decodes", "wrong", count=0)
    root = span_of(spans, "wrong")
    assert root.status.status_code == StatusCode.ERROR
    assert root.attributes["nercc.outcome"] == "invalid"
    assert "not of shape [0]" in root.attributes["nercc.error"]


def test_a_request_belongs_to_the_trace_of_who_asked_if_that_is_sampled(server, spans):
    assert send(server, "decodes", "quiet", traceparent=UNSAMPLED)
    for name in ("json", "raw"):
        assert send(server, "decodes", name, face=name, traceparent=TRACEPARENT)
        root = span_of(spans, name)
        assert f"{root.context.trace_id:032x}" == TRACE
        assert f"{root.parent.span_id:016x}" == PARENT
        assert (root.name, root.attributes["nercc.outcome"]) == ("infer decodes", "ok")
    found = {(span.attributes or {}).get("nercc.id") for span in spans.get_finished_spans()}
    assert "quiet" not in found


class Broken(Sampler):
    def should_sample(self, *_, **__):
        raise RuntimeError("a sampler that fails")

    def get_description(self):
        return "broken"


class Breaks(SpanProcessor):
    def on_end(self, span):
        raise RuntimeError("a processor that fails")


def test_no_request_fails_for_its_spans(caplog):
    assert RequestSpans().start("digits", dict) is None
    assert RequestSpans(TracerProvider(sampler=Broken())).start("digits", dict) is None
    assert "a request is not traced" in caplog.text
    provider = TracerProvider()
    provider.add_span_processor(Breaks())
    spans = RequestSpans(provider)
    spans.end(spans.start("digits", dict), "ok")
    assert "the trace of a request is incomplete" in caplog.text


@pytest.fixture
def bare(monkeypatch):
    for name in ("SDK_DISABLED", "TRACES_EXPORTER", "EXPORTER_OTLP_ENDPOINT"):
        monkeypatch.delenv(f"OTEL_{name}", raising=False)
    return monkeypatch


def test_nothing_is_traced_unless_an_endpoint_is_named_and_packages_are_there(bare):
    assert provider_from_environment() is None
    bare.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    bare.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ImportError, match=r"OTLP_ENDPOINT is set, .*\.\[telemetry\]"):
        provider_from_environment()
    bare.setenv("OTEL_SDK_DISABLED", "true")
    assert provider_from_environment() is None


def test_spans_reach_a_collector(bare):
    came = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers["content-length"]))
            came.append((self.path, content))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        bare.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        provider = provider_from_environment()
        log = RequestSpans(provider)
        log.end(log.start("digits", dict), "ok")
        provider.shutdown()
        collector.shutdown()
    ((path, content),) = came
    assert path == "/v1/traces"
    (found,) = ExportTraceServiceRequest.FromString(content).resource_spans
    named = {each.key: each.value.string_value for each in found.resource.attributes}
    assert named["service.name"] == "nercc_jax"
    assert [span.name for span in found.scope_spans[0].spans] == ["infer digits"]
