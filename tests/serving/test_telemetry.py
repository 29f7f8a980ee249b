"""Reports of single requests: lines of the log, and OpenTelemetry's spans."""

# ruff: noqa: E402 (`require` comes before what needs it)

import http.server
import logging
import sys
import threading

import pytest
from conftest import require
from faces import ask
from in_process import real, serving
from nercc_server import ENDS, patience

require("opentelemetry.exporter.otlp.proto.http", "telemetry")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, Sampler
from opentelemetry.trace import StatusCode

from nercc_jax import NeRCC, Uncoded
from nercc_jax.serving._tracing import RequestLog, provider_from_environment

pytestmark = pytest.mark.slow

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
UNSAMPLED = f"00-{TRACE}-{PARENT}-00"
JOURNAL = "nercc_jax.serving._tracing"


def start(name, code):
    """A model three in ten of whose calls straggle. Groups wait to be filled for long."""
    usual = {"max_batch_size": 1, "batch_wait_timeout_s": 0.5, "ordering": False}
    faults = {"straggler_rate": 0.3, "straggler_delay_s": 0.3, "max_disagreement": 1}
    return real(name, lambda x: 2 * x, code, workers=4, outputs="logits", **usual | faults)


@pytest.fixture(scope="module")
def spans():
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def server(spans):
    """`decodes` decodes whatever straggles, `repeats` sends it again."""
    provider = TracerProvider(sampler=ParentBased(ALWAYS_ON))
    provider.add_span_processor(SimpleSpanProcessor(spans))
    decodes = start("decodes", NeRCC(2, 4, points="interleaved", lambda_dec=0.0))
    found = {"grpc_port": 0, "request_log_rate": 1.0, "spans": provider}
    with serving(decodes, start("repeats", Uncoded(2)), **found) as server:
        yield server


@pytest.fixture(autouse=True)
def lines(caplog, spans):
    """The log's lines of requests, by id."""
    spans.clear()
    caplog.set_level(logging.INFO, logger=JOURNAL)
    return lambda: {each.id: each for each in caplog.records if each.name == JOURNAL}


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


def test_the_log_and_the_span_say_what_became_of_a_request(server, spans, lines):
    assert send(server, "decodes", "two", count=2)
    line, span = lines()["two"], span_of(spans, "two")
    assert (line.model, line.outcome) == ("decodes", "ok")
    assert 0 < line.queue_ms < line.ms < 1e3 * ENDS
    assert len(line.trace_id) == 32
    assert all(1 <= a <= b <= 4 for a, b in zip(line.responded, line.asked, strict=True))
    assert set(line.answers) <= {"exact", "decoded", "reexecuted"}
    for name in ("model", "outcome", "ms", "queue_ms"):
        assert span.attributes[f"nercc.{name}"] == getattr(line, name)
    for name in ("answers", "asked", "responded"):
        assert list(span.attributes[f"nercc.{name}"]) == getattr(line, name)


def test_what_was_not_answered_is_in_the_log_and_an_error_of_its_span(server, spans, lines):
    assert not send(server, "decodes", "wrong", count=0)
    line = lines()["wrong"]
    assert line.outcome == "invalid"
    assert not hasattr(line, "answers")
    assert "not of shape [0]" in line.error
    root = span_of(spans, "wrong")
    assert root.status.status_code == StatusCode.ERROR
    assert root.attributes["nercc.outcome"] == "invalid"


def test_a_request_belongs_to_the_trace_of_who_asked(server, spans):
    for name in ("json", "raw"):
        assert send(server, "decodes", name, face=name, traceparent=TRACEPARENT)
        root = span_of(spans, name)
        assert f"{root.context.trace_id:032x}" == TRACE
        assert f"{root.parent.span_id:016x}" == PARENT
        assert (root.name, root.attributes["nercc.outcome"]) == ("infer decodes", "ok")


@pytest.mark.parametrize(("model", "answer"), [("decodes", "decoded"), ("repeats", "reexecuted")])
def test_they_say_what_a_straggler_did(server, spans, lines, model, answer):
    for number in range(60):
        name = f"{model}-{number}"
        assert send(server, model, name, count=2)
        if answer in lines()[name].answers:
            break
    else:
        raise AssertionError("nothing ever straggled")
    assert answer in span_of(spans, name).attributes["nercc.answers"]


def test_what_the_client_does_not_sample_is_not_traced(server, spans, lines):
    assert send(server, "decodes", "quiet", traceparent=UNSAMPLED)
    assert send(server, "decodes", "loud", traceparent=TRACEPARENT)
    span_of(spans, "loud")
    assert lines()["loud"].trace_id == TRACE
    assert not hasattr(lines()["quiet"], "trace_id")
    found = {(span.attributes or {}).get("nercc.id") for span in spans.get_finished_spans()}
    assert "quiet" not in found


class Broken(Sampler):
    def should_sample(self, *_, **__):
        raise RuntimeError("a sampler that fails")

    def get_description(self):
        return "broken"


def test_no_request_fails_for_its_spans(caplog):
    log = RequestLog(0.0, TracerProvider(sampler=Broken()))
    record = log.start("digits", dict)
    assert record is not None
    log.end(record, "ok")
    assert "a request is not traced" in caplog.text


def test_a_share_of_the_requests_is_logged(lines):
    assert RequestLog(0.0).start("digits", dict) is None
    log = RequestLog(0.25)
    for number in range(400):
        record = log.start("digits", dict)
        record.id = str(number)
        log.end(record, "ok")
    assert 50 < len(lines()) < 150


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


def trace_one(bare, port):
    """The provider of one request's span, with its endpoint at this port."""
    bare.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    provider = provider_from_environment()
    log = RequestLog(0.0, provider)
    log.end(log.start("digits", dict), "ok")
    return provider


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
        trace_one(bare, collector.server_port).shutdown()
        collector.shutdown()
    ((path, content),) = came
    assert path == "/v1/traces"
    (found,) = ExportTraceServiceRequest.FromString(content).resource_spans
    named = {each.key: each.value.string_value for each in found.resource.attributes}
    assert named["service.name"] == "nercc_jax"
    assert [span.name for span in found.scope_spans[0].spans] == ["infer digits"]
