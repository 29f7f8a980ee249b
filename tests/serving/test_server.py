"""`nercc serve` from outside: what it says of itself, metrics, the status, the log."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import require
from faces import ask
from nercc_server import ENDS, Server, running
from pages import blocks

require("httpx", "serve-test")

pytestmark = pytest.mark.slow

CONFIG = """
model_control = "explicit"
[defaults]
scheme = "uncoded"
input_shape = [4]
workers = 2
max_batch_size = 2
[[models]]
model = "own:moody"
name = "moody"
[[models]]
model = "own:double"
name = "slow"
faults = {service_delay_s = 0.4}
[[models]]
model = "own:double"
name = "counted"
[[models]]
model = "own:double"
name = "untouched"
[[models]]
model = "own:from_weights"
name = "weighs"
weights = "weights.npy"
version = 2
scheme = "nercc"
num_data = 2
num_workers = 4
[[models]]
model = "lenet5-digits"
input_shape = [32, 32, 1]
"""
NAMES = ["moody", "slow", "counted", "untouched", "weighs", "lenet5-digits"]
ROOT = Path(__file__).parents[2]
README = (ROOT / "docs/deploy/README.md").read_text()
OUTCOMES = ("ok", "deadline", "failed", "cancelled")
OUTCOMES += ("invalid", "overloaded", "queue_full", "draining")
ONE = {"input": [[1.0, 2, 3, 4]]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(folder):
    np.save(folder / "weights.npy", 3 * np.eye(4, 5, dtype=np.float32))
    with running(folder, config=CONFIG) as server:
        yield server


def test_weights_are_read_again_and_a_version_is_as_it_is_set(server, folder):
    path = "/v2/repository/models/weighs"
    for factor in (3, 5):
        for version in ("", "2"):
            found = ask("raw", server, "weighs", ONE, version=version).outputs["output"]
            assert found.tolist() == [[factor, 2 * factor, 3 * factor, 4 * factor, 0]]
        np.save(folder / "weights.npy", 5 * np.eye(4, 5, dtype=np.float32))
        assert server.http.post(f"{path}/unload").is_success
        assert ask("json", server, "weighs", ONE).is_(404)
        assert server.http.post(f"{path}/load").is_success


# Metrics and status.


def test_every_label_is_there_from_the_start(server):
    metrics = server.metrics()

    def values(name, label):
        return {
            dict(labels)[label]: value
            for (sample, labels), value in metrics.items()
            if sample == f"nercc_{name}" and ("model", "untouched") in labels
        }

    for name, label, expected in (
        ("requests_total", "outcome", OUTCOMES),
        ("queries_total", "answer", ("exact", "decoded", "predicted", "reexecuted")),
        ("audited_total", "label", ("same", "other", "unknown")),
        ("worker_calls_total", "result", ("answered", "late", "error")),
    ):
        assert values(name, label) == dict.fromkeys(expected, 0)
    states = {"idle": 2, "busy": 0, "overdue": 0, "starting": 0, "fenced": 0}
    assert values("workers", "state") == states
    for name in ("stragglers_total", "reexecutions_total", "worker_deaths_total", "queue_queries"):
        assert values(name, "model") == {"untouched": 0}
    for name in ("request", "queue"):
        assert values(f"{name}_seconds_count", "model") == {"untouched": 0}
    for name in ("batch_size", "group_fill", "workers_responded"):
        assert set(values(f"{name}_bucket", "le").values()) == {0}


def test_metrics_and_status_agree_with_what_was_sent(server):
    def count(name, model="counted", **labels):
        return server.count(name, model=model, **labels)

    others = {"deadline": "slow", "failed": "moody"}
    before = [count("requests_total", model, outcome=each) for each, model in others.items()]
    for face, rows in (("json", 1), ("binary", 2), ("typed", 7), ("raw", 1)):
        assert ask(face, server, "counted", {"input": np.ones((rows, 4))}).is_(200)
    # Refused where they are read, by the model, and by the batcher; by either face.
    path = "/v2/models/counted/infer"
    assert server.http.post(path, content=b"{").status_code == 400
    packed = {"content-encoding": "br"}
    assert server.http.post(path, content=b"{}", headers=packed).status_code == 415
    for x in ([1.0, 2, 3, 4], [[1e39] * 4]):
        for face in ("json", "raw"):
            assert ask(face, server, "counted", {"input": x}).is_(400)
    late = ask("json", server, "slow", ONE, parameters={"nercc_deadline_ms": 20})
    assert late.is_(504)
    assert ask("json", server, "moody", {"input": [[-1.0] * 4]}).is_(502)
    after = [count("requests_total", model, outcome=each) for each, model in others.items()]
    assert after == [number + 1 for number in before]

    assert count("requests_total", outcome="ok") == count("request_seconds_count") == 4
    assert count("requests_total", outcome="invalid") == 6
    assert count("queries_total", answer="exact") == count("batch_size_sum") == 11
    assert count("queue_queries") == 0
    assert count("worker_calls_total", result="answered") == count("batch_size_count")
    status = server.status("counted")
    assert (status["totals"]["requests"], status["totals"]["errors"]["invalid"]) == (10, 6)
    none = dict.fromkeys(("decoded", "predicted", "reexecuted"), 0)
    assert status["totals"]["queries"] == {"exact": 11} | none
    assert status["latency"]["number"] == sum(status["latency"]["counts"]) == 4
    assert 0 < status["latency"]["p50_ms"] <= status["latency"]["p999_ms"]


def test_the_dashboard_asks_for_metrics_that_there_are(server):
    dashboard = (ROOT / "docs/deploy/grafana-dashboard.json").read_text()
    asked = set(re.findall(r"\b(?:nercc|process)_[a-z_]+\b", dashboard)) - {"nercc_jax"}
    assert len(asked) > 15
    assert asked <= {name for name, _ in server.metrics()}


def test_readme_examples_run(server):
    """Against the same REST interface, wherever it runs."""
    for curl in [block for block in blocks(README, r"bash[^\n]*") if "curl" in block]:
        script = curl.replace("localhost:8000", f"127.0.0.1:{server.http_port}")
        script = script.replace("python ", f"{sys.executable} ")
        options = {"check": True, "capture_output": True, "text": True, "timeout": ENDS}
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], **options)
        assert '"logits"' in done.stdout


def test_readme_names_metrics_that_there_are(server):
    from prometheus_client.parser import text_string_to_metric_families

    families = list(text_string_to_metric_families(server.http.get("/metrics").text))
    found = {sample.name: set() for family in families for sample in family.samples}
    found |= {family.name: set() for family in families if family.type == "histogram"}
    for sample in (sample for family in families for sample in family.samples):
        found[sample.name] |= sample.labels.items()
    table = README.split("## What to watch")[1].split("## ")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) >= 6
    for metrics, meaning in rows:
        labels = set()
        for name, label in re.findall(r"`(\w+)(?:\{(\w+)\})?`", metrics):
            assert name in found
            labels |= {value for key, value in found[name] if key == label}
            assert not label or labels, f"{name} has no label {label}"
        assert set(re.findall(r"`(\w+)`", meaning)) <= labels


def test_the_status_has_what_the_page_reads(server):
    """Whatever the page takes out of an object by name."""
    answer = server.http.get("/status")
    assert answer.headers["cache-control"] == "no-store"
    status = answer.json()
    assert status["server"]["state"] == "serving"
    assert sorted(model["name"] for model in status["models"]) == sorted(NAMES)
    page = (ROOT / "nercc_jax/serving/status.html").read_text()
    of_values = {"expected_beyond_bar"}  # of models with a tolerance
    parts = "totals", "queue", "pool", "code", "fidelity", "latency"
    read = re.findall(rf"\b({'|'.join(parts)})\.(\w+)", page)
    assert len(read) > 8
    for model in status["models"]:
        assert all(name in model[part] for part, name in read if name not in of_values)
        assert {"health", "hints", "outputs", "policy", "predictor", "checks"} <= model.keys()
        assert len(model["latency"]["counts"]) == len(model["latency"]["bounds_ms"]) + 1
        assert len(model["workers"]) == model["pool"]["num_workers"]
        assert set(model["totals"]["errors"]) == set(OUTCOMES) - {"ok"}
        assert all({"state", "deaths", "busy_s"} <= worker.keys() for worker in model["workers"])
    assert server.status("counted")["code"] == {"name": "Uncoded", "num_data": 1, "num_workers": 1}


# The log.


def test_the_log_is_json_without_lines_of_requests_but_for_failures(server):
    assert ask("json", server, "counted", ONE, id="right").is_(200)
    assert ask("raw", server, "counted", {"input": [[1.0] * 7]}, id="wrong").is_(400)
    ask("json", server, "moody", {"input": [[-1.0] * 4]}, id="moody 7")
    lines = server.log()
    assert not [line for line in lines if line.get("id") in ("right", "wrong")]
    (line,) = [line for line in lines if line.get("id") == "moody 7"]
    assert "no negative numbers, please" in line["why"]
    assert (line["message"], line["level"]) == ("inference failed", "WARNING")
    assert line["time"]


def test_the_compiled_messages_are_those_of_the_protocols_file(tmp_path):
    protoc = require("grpc_tools.protoc", "serve-test")
    folder = ROOT / "nercc_jax/serving/transport"
    made = tmp_path / "made.binpb"
    options = [f"-I{folder}", f"--descriptor_set_out={made}", "open_inference.proto"]
    assert protoc.main(["protoc", *options]) == 0
    assert made.read_bytes() == (folder / "open_inference.binpb").read_bytes()


# -- The status page in a browser: numbers move, workers are shown, a lost server is shown ---------


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def shown_server(tmp_path_factory):
    command = "--model own:double --input-shape 4 --workers 8"
    folder = tmp_path_factory.mktemp("page")
    server = Server(
        folder, *command.split(), "--faults", "straggler_rate=0.1, straggler_delay_s=0.2"
    )
    yield server
    server.kill()


@pytest.fixture(scope="module")
def page():
    require("playwright", "serve-test")
    from playwright.sync_api import sync_playwright

    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        # CI installs it; see .ci/run.
        require("no_such_browser", "serve-test: and Chromium, apt-get install chromium")
    with sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = driver.chromium.launch(executable_path=path, args=options)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.trouble = []
        page.on("pageerror", lambda error: page.trouble.append(str(error)))
        yield page
        browser.close()


def test_numbers_move(shown_server, page):
    page.goto(shown_server.url)
    page.wait_for_selector("html[data-state=serving]")
    model = page.locator('[data-model="own.double"]')
    assert model.locator("[data-worker]").count() == 8

    def number(field):
        return float(model.locator(f'[data-field="{field}"]').get_attribute("data-value") or "nan")

    before = number("queries")
    for step in range(60):
        x = {"input": [[step / 60, 0.1, 0.2, 0.3]] * 2}
        assert ask("json", shown_server, "own.double", x).is_(200)
    page.wait_for_function(
        'before => Number(document.querySelector(\'[data-model="own.double"] '
        "[data-field=queries]').dataset.value) >= before + 120",
        arg=before,
    )
    assert number("rate") > 0
    assert number("p99") > 0
    assert page.locator("#state").inner_text() == "serving"
    # Something is drawn: bars of the latency histogram with height.
    bars = model.locator(".latency svg rect").evaluate_all(
        "all => all.map(b => b.height.baseVal.value)"
    )
    assert max(bars) > 50
    assert page.trouble == []


@pytest.fixture
def shown(shown_server, page):
    """Shows what a server would tell whose model's status is what a test makes of it."""
    status = shown_server.http.get("/status").json()
    (model,) = status["models"]

    def show():
        page.route("**/status", lambda route: route.fulfill(json=status))
        page.goto(shown_server.url)
        page.wait_for_selector("[data-model]")
        return page

    yield model, show
    page.unroute("**/status")
    assert page.trouble == []


def set_workers(model, *states):
    for number, worker in enumerate(model["workers"]):
        worker["state"] = states[number % len(states)]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: set_workers(model, "overdue"),
        lambda model: set_workers(model, "starting", "overdue"),
        lambda model: model["health"].update(ready=False, trouble="no answer for 4 s"),
        lambda model: model.update(health=None),
    ],
    ids=["all overdue", "some starting", "not ready", "being started"],
)
def test_it_is_not_green_unless_somebody_would_answer(shown, change):
    model, show = shown
    change(model)
    page = show()
    page.wait_for_selector("html[data-state=troubled]")
    assert page.locator("#state").inner_text() in ("no worker answers", "not ready")


def test_a_lost_server_is_reported(shown_server, page):
    shown_server.kill()
    page.wait_for_selector("html[data-state=lost]")
    assert page.locator("#state").inner_text().startswith("no connection since")
