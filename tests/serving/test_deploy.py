"""What docs/deploy shows is valid, agrees with the server, and runs where it can run here."""

import asyncio
import json
import logging
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
import tomllib
import types
import warnings
from pathlib import Path

import pytest
from batching import until
from conftest import require
from pages import blocks

from nercc_jax import __version__

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
README = (DEPLOY / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOON = 120.0  # seconds: bounds on hanging, not on speed


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """kserve reads the command line when it is imported; settings read the environment."""
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    for name in [name for name in os.environ if name.startswith("NERCC_")]:
        if name != "NERCC_REQUIRE_EXTRAS":
            monkeypatch.delenv(name)
    require("fastapi", "serve")
    require("pydantic_settings", "serve")


def yaml_of(name):
    return require("yaml", "ray-serve").safe_load((DEPLOY / name).read_text())


def settings_of(arguments, environment):
    """What `nercc serve` would serve by, given these."""
    from commands import invoke

    from nercc_jax.serving import ServerSettings

    environment = {name: value for name, value in environment.items() if name.startswith("NERCC_")}
    result = invoke("serve", *arguments, "--print-config", env=environment)
    assert result.exit_code == 0, result.output
    return ServerSettings(**tomllib.loads(result.output))


def answers(settings, path):
    """Whether GET path is answered by a server of these settings, without a model."""
    from prometheus_client import CollectorRegistry

    from nercc_jax.serving.transport._rest import make_app
    from nercc_jax.serving.transport._state import ServerState

    httpx = require("httpx", "serve")

    async def get():
        transport = httpx.ASGITransport(make_app(ServerState({}, settings), CollectorRegistry()))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.get(path)

    return asyncio.run(get()).status_code == 200


# server.toml


def _reference(settings, without):
    """Each setting with its help and default; in a comment with an example where that is None."""
    from nercc_jax.serving.settings import to_toml

    for name, field in settings.model_fields.items():
        if name in without:
            continue
        if name in settings.panels:
            yield f"\n# {settings.panels[name]}\n"
        yield f"# {field.description}"
        shown = field.default
        if shown is None and field.examples:
            shown = field.examples[0]
        line = f"{name} = {to_toml(shown)}"
        yield f"# {line}" if field.default is None else line


def test_server_toml_shows_every_setting_with_its_default():
    from nercc_jax.serving import ModelSettings, ServerSettings
    from nercc_jax.serving.settings import read_settings

    server = _reference(ServerSettings, {"defaults", "models"})
    model = _reference(ModelSettings, {"model", "name", "version", "weights", "inputs"})
    reference = "\n".join([*server, "", "[defaults]", *model]) + "\n"
    text = (DEPLOY / "server.toml").read_text()
    assert reference in text
    settings, without = read_settings(DEPLOY / "server.toml"), {"models", "defaults"}
    assert [each.model for each in settings.resolved()] == ["lenet5-digits"]
    assert settings.model_dump(exclude=without) == ServerSettings().model_dump(exclude=without)
    for each in (settings.defaults, *settings.models):
        assert each.model_dump(exclude={"model"}) == ModelSettings().model_dump(exclude={"model"})
    # Those which have none are shown in comments, and are read as well as the others.
    every = tomllib.loads(re.sub(r"^# (?=\[\[|\w+ = )", "", text, flags=re.MULTILINE))
    assert every.keys() == ServerSettings.model_fields.keys()
    assert set(every["defaults"]).union(*every["models"]) == ModelSettings.model_fields.keys()
    defaults = dict(every["defaults"])
    del defaults["max_disagreement"]  # which goes with no tolerance
    server = ServerSettings(**every | {"defaults": defaults})
    assert server.models[1].input_shape == (28, 28, 1)
    assert server.models[2].input_shape == {"ids": (128,), "image": (28, 28, 1)}
    assert len(server.resolved()) == 3


# The container


def instructions():
    """Of the Containerfile: a list of (instruction, arguments)."""
    text = (DEPLOY / "Containerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines()]


def last_stage():
    stages = [number for number, (word, _) in enumerate(instructions()) if word == "FROM"]
    return dict(instructions()[stages[-1] :]), instructions()[: stages[-1]]


def image_environment():
    final, _ = last_stage()
    return dict(each.split("=", 1) for each in shlex.split(final["ENV"]))


def test_containerfile_installs_what_there_is():
    words = {word for word, _ in instructions()}
    assert words <= {
        *("FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT")
    }
    images = [value.split()[0] for word, value in instructions() if word == "FROM"]
    assert set(images) == {"python:3.12-slim"}
    final, build = last_stage()
    build_files = [value.split()[:-1] for word, value in build if word == "COPY"]
    for source in [each for files in build_files for each in files]:
        assert (ROOT / source).exists(), source
    copied = {each for files in build_files for each in files}
    described = {"pyproject.toml", "setup.py", "README.md", *PROJECT["license-files"]}
    needed = {*described, "nercc_jax", "models"}
    assert needed <= copied
    install = next(value for word, value in build if word == "RUN")
    target = re.search(r"pip install .*'\.\[(.*)\]'", install)
    assert target
    assert set(target[1].split(",")) <= PROJECT["optional-dependencies"].keys()
    assert "serve" in target[1].split(",")
    environment = install.split("-m venv ")[1].split()[0]
    assert final["COPY"] == f"--from=build {environment} {environment}"
    assert image_environment()["PATH"].split(":")[0] == f"{environment}/bin"


def test_container_drains_listens_and_has_no_root():
    final, _ = last_stage()
    entry = json.loads(final["ENTRYPOINT"])  # in shell form SIGTERM would reach the shell
    assert entry == ["nercc", "serve"]
    assert entry[0] in PROJECT["scripts"]
    assert int(final["USER"]) > 0
    assert f"--uid {final['USER']} " in final["RUN"]
    settings = settings_of([], image_environment())
    assert settings.host == "0.0.0.0"
    assert [settings.http_port, settings.grpc_port] == [int(p) for p in final["EXPOSE"].split()]
    check = json.loads(final["HEALTHCHECK"].split("CMD ", 1)[1])
    assert check[:2] == ["python", "-c"]
    compile(check[2], "HEALTHCHECK", "exec")
    port, path = re.findall(r"http://127\.0\.0\.1:(\d+)(/[\w/]+)", check[2])[0]
    assert int(port) == settings.http_port
    assert answers(settings, path)


# KServe


def read(kind, data):
    """An object of kserve's or Kubernetes' own classes; fails at what they do not know.

    kserve's own reader drops such things, and cannot read Kubernetes' classes from 37 on.
    """
    import kserve
    import kubernetes

    if part := re.fullmatch(r"list\[(.+)\]", kind, re.IGNORECASE):
        return [read(part[1], each) for each in data]
    if part := re.fullmatch(r"dict[(\[]str, (.+)[)\]]", kind, re.IGNORECASE):
        return {key: read(part[1], each) for key, each in data.items()}
    if kind == "object":
        return data
    if kind in ("str", "int", "bool"):
        assert type(data).__name__ == kind, data
        return data
    if kind == "ResourceQuantity":  # of kserve's: str
        return read("str", data)
    made = getattr(kserve, kind, None) or getattr(kubernetes.client, kind)
    fields = {made.attribute_map[name]: name for name in made.openapi_types}
    assert data.keys() <= fields.keys(), f"{kind} has no {data.keys() - fields.keys()}"
    return made(
        **{fields[key]: read(made.openapi_types[fields[key]], each) for key, each in data.items()}
    )


def test_inference_service_serves_what_the_container_does():
    from kubernetes.utils import parse_quantity

    service = read("V1beta1InferenceService", yaml_of("inference-service.yaml"))
    assert service.api_version == "serving.kserve.io/v1beta1"
    assert service.kind == "InferenceService"
    predictor = service.spec.predictor
    (container,) = predictor.containers
    assert container.name == "kserve-container"
    given = {each.name: each.value for each in container.env}
    assert given.pop("PROTOCOL") == "v2"
    assert all(name.startswith("NERCC_") for name in given)
    settings = settings_of(container.args, image_environment() | given)
    assert [each.model for each in settings.resolved()] == ["lenet5-digits"]
    ports = {each.name: each.container_port for each in container.ports}
    assert ports == {"http": settings.http_port, "grpc": settings.grpc_port}
    assert container.ports[0].name == "http"  # the one that KServe's service and probes take
    assert settings.drain_delay_s > 0
    grace = predictor.termination_grace_period_seconds
    assert grace > settings.drain_delay_s + settings.drain_timeout_s
    image = re.search(r"-t (\S+) ", (DEPLOY / "Containerfile").read_text())
    assert image
    assert container.image == image[1]
    assert container.image.split(":")[1] == __version__
    assert container.security_context.run_as_non_root
    requests, limits = container.resources.requests, container.resources.limits
    assert parse_quantity(requests["cpu"]) >= 1
    assert parse_quantity(requests["memory"]) <= parse_quantity(limits["memory"])
    # It is probed and scraped where there is an answer.
    notes = service.metadata.annotations
    assert notes["prometheus.io/scrape"] == "true"
    metrics = notes["prometheus.io/path"]
    probes = [container.startup_probe, container.liveness_probe, container.readiness_probe]
    asked = [(each.http_get.port, each.http_get.path) for each in probes]
    paths = ["/v2/health/live", "/v2/health/live", "/v2/health/ready", metrics]
    asked.append((int(notes["prometheus.io/port"]), metrics))
    assert asked == [(settings.http_port, path) for path in paths]
    for path in paths:
        assert answers(settings, path)
    assert yaml_of("prometheus.yml")["scrape_configs"][0]["metrics_path"] == metrics


# README


COMMANDS = [
    line
    for block in blocks(README, r"bash[^\n]*")
    for line in block.replace("\\\n", " ").splitlines()
    if line.split()[0] in ("pip", "nercc", "serve", "podman", "kubectl", "prometheus")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_name_what_there_is(command, monkeypatch):
    words = shlex.split(command, comments=True)
    for path in re.findall(r"docs/deploy/[\w.-]+", command):
        assert (ROOT / path).is_file(), path
    if words[0] == "pip":
        extras = re.fullmatch(r"\.\[(.+)\]", words[-1])
        assert extras
        assert set(extras[1].split(",")) <= PROJECT["optional-dependencies"].keys()
    elif words[0] == "nercc":
        monkeypatch.chdir(ROOT)
        settings_of(words[2:], {})
    elif words[:2] == ["podman", "run"]:
        image = words.index(f"nercc-jax:{__version__}")
        settings = settings_of(words[image + 1 :], image_environment())
        published = [int(each.split(":")[1]) for each in words if re.fullmatch(r"\d+:\d+", each)]
        assert published == [settings.http_port, settings.grpc_port]
        grace = int(words[words.index("--stop-timeout") + 1])
        assert grace > settings.drain_delay_s + settings.drain_timeout_s
    elif words[0] == "serve":
        scripts = require("ray.serve.scripts", "ray-serve")
        serve = scripts.cli.commands[words[1]]
        context = serve.make_context("serve", words[2:])
        target = context.params["config_or_import_path"]
        if not target.endswith(".yaml"):
            given = scripts.convert_args_to_dict(context.params["arguments"])
            application = application_of(target, given)
            assert application._bound_deployment.name == "CodedServer"


def application_of(import_path, arguments):
    """What Ray Serve makes of an import path and arguments."""
    require("ray.serve", "ray-serve")
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
    from ray.serve._private.utils import import_attr

    return build(import_attr(import_path), arguments)


def test_readme_names_what_there_is():
    commands = "pip", "nercc", "serve", "podman", "kubectl", "prometheus"
    assert {line.split()[0] for line in COMMANDS} == {*commands}
    links = re.findall(r"\]\(([\w.-]+)\)", README)
    assert {path.name for path in DEPLOY.iterdir()} - {"README.md"} == {*links}
    from pages import options_of

    options = options_of("serve")
    elsewhere = {"--format", "--stop-timeout", "--input-data"}
    assert set(re.findall(r"`(--[\w-]+)", README)) <= options | elsewhere


# nginx.conf


def test_the_proxy_reaches_the_server_and_takes_as_much():
    from nercc_jax.serving import ServerSettings

    text, settings = (DEPLOY / "nginx.conf").read_text(), ServerSettings()
    ports = re.findall(rf"server {re.escape(settings.host)}:(\d+);", text)
    assert ports == [str(settings.http_port), str(settings.grpc_port)]
    assert f"client_max_body_size {settings.max_body_bytes // 2**20}m;" in text
    for face in ("proxy", "grpc"):
        assert f"{face}_read_timeout 3600s;" in text
    assert "location /inference.GRPCInferenceService/ {" in text


# Ray Serve


@pytest.mark.slow
def test_ray_serve_yaml_is_as_ray_wants_it():
    require("ray.serve", "ray-serve")
    from ray.serve.schema import ServeDeploySchema

    config = yaml_of("ray-serve.yaml")
    schema = ServeDeploySchema.model_validate(config)
    given = schema.model_dump(exclude_unset=True)
    assert given["http_options"] == config["http_options"]  # what Ray does not know it would drop
    (application,) = schema.applications
    assert config["applications"][0].keys() <= type(application).model_fields.keys()
    (deployment,) = application.deployments
    made = application_of(application.import_path, application.args)._bound_deployment
    assert deployment.name == made.name
    assert made.num_replicas == 1


def build(**arguments):
    require("ray.serve", "ray-serve")
    from nercc_jax.cli.ray_serve import app

    deployment = app(arguments)._bound_deployment
    models, limits = deployment.init_args
    return deployment, models, limits


@pytest.mark.slow
def test_ray_application_takes_words_settings_and_files(tmp_path):
    deployment, (model,), _ = build(
        model="lenet5-digits", workers="5", deadline_s="2.5", input_shape="28,28,1"
    )
    assert (model.pool, model.workers, model.deadline_s) == ("ray", 5, 2.5)
    assert model.input_shape == (28, 28, 1)
    assert deployment._deployment_config.max_ongoing_requests > model.max_queue_size
    assert deployment._deployment_config.graceful_shutdown_timeout_s > 30

    file = tmp_path / "server.toml"
    file.write_text(
        """
        http_port = 1
        max_body_bytes = 1000
        drain_timeout_s = 100
        defaults = {num_workers = 6}
        models = [{model = "lenet5-digits"}, {name = "b", model = "a:b", pool = "devices"}]
        """
    )
    deployment, models, limits = build(config=str(file), workers=3)
    assert [(each.model, each.pool, each.workers, each.num_workers) for each in models] == [
        ("lenet5-digits", "ray", 3, 6),
        ("a:b", "devices", 3, 6),
    ]
    assert limits["max_body_bytes"] == 1000
    assert deployment._deployment_config.graceful_shutdown_timeout_s > 100
    _, (model,), _ = build(model="a:b", defaults={"pool": "devices"})
    assert model.pool == "devices"


@pytest.mark.slow
def test_serves_proxy_tells_when_a_request_came():
    """A proxy before it may have said so already."""
    require("ray.serve", "ray-serve")
    from nercc_jax.cli.ray_serve import stamp
    from nercc_jax.serving.transport._http import seconds_since_proxy

    came = []

    async def replica(scope, receive, send):
        came.append(scope.get("headers"))

    [middleware] = stamp()
    proxy = middleware.cls(replica, *middleware.args, **middleware.kwargs)
    begin = time.time()
    own, earlier = (b"host", b"here"), (b"x-request-start", b"t=%.6f" % (begin - 7))
    for headers in ([own], [own, earlier]):
        asyncio.run(proxy({"type": "http", "headers": headers}, None, None))
    asyncio.run(proxy({"type": "lifespan"}, None, None))
    assert came[0][0] == own
    assert 3 <= seconds_since_proxy(came[0], time.time() + 3) < 3 + SOON
    assert came[1] == [own, earlier]
    assert came[2] is None


@pytest.mark.slow
def test_ray_application_without_arguments_is_as_the_environment_says(monkeypatch):
    """`serve build` takes no others."""
    require("ray.serve", "ray-serve")
    from ray import serve
    from ray.serve._private.utils import import_attr

    monkeypatch.setenv("NERCC_MODELS", '[{"model": "lenet5-digits", "workers": 3}]')
    application = import_attr("nercc_jax.cli.ray_serve:application")
    assert isinstance(application, serve.Application)
    (model,) = application._bound_deployment.init_args[0]
    assert (model.model, model.pool, model.workers) == ("lenet5-digits", "ray", 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "a:b", "http_port": 8000}, r"http_port: .*http_options"),
        ({"model": "a:b", "wrokers": 8}, "wrokers"),
        ({"model": "a:b", "workers": "many"}, "workers"),
        ({}, "no model to serve"),
        ({"config": "/nowhere.toml"}, "no configuration file /nowhere.toml"),
    ],
)
def test_ray_application_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


@pytest.mark.slow
def test_ray_replica_is_ill_without_workers_and_ends_quietly_if_it_never_started():
    require("ray.serve", "ray-serve")
    from nercc_jax.cli.ray_serve import CodedServer

    def check(*states):
        report = types.SimpleNamespace(workers=[types.SimpleNamespace(state=s) for s in states])
        model = types.SimpleNamespace(pool=types.SimpleNamespace(report=lambda: report))
        models = types.SimpleNamespace(started={"m": model})
        replica = types.SimpleNamespace(_server_state=types.SimpleNamespace(models=models))
        asyncio.run(CodedServer.check_health(replica))

    check("starting", "busy")
    check("overdue")
    with pytest.raises(RuntimeError, match="m: none of its workers is ready"):
        check("starting", "starting")
    replica = types.SimpleNamespace(_server_state=None, _spans=None)
    asyncio.run(CodedServer.check_health(replica))
    asyncio.run(CodedServer.__del__(replica))


@pytest.fixture(scope="module")
def cluster():
    """A Ray of our own, where docs/deploy/ray-serve.yaml runs: its address, and the server's."""
    ray = require("ray", "ray-serve")
    require("ray.serve", "ray-serve")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fork, which Ray follows by exec
        ray.init(
            num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
    try:
        yield ray
    finally:
        ray.serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def served(cluster, tmp_path_factory, free_port):
    """The file's application, smaller and slower, on a free port."""
    config = yaml_of("ray-serve.yaml")
    config["http_options"] |= {"host": "127.0.0.1", "port": free_port}
    logs = tmp_path_factory.mktemp("logs")
    config["logging_config"]["logs_dir"] = str(logs)
    (application,) = config["applications"]
    # Two workers, and little to compile. Calls take half a second, to have something to drain.
    few = {"workers": 2, "max_batch_size": 1, "faults": {"service_delay_s": 0.5}}
    application["args"]["defaults"] |= few
    file = tmp_path_factory.mktemp("deploy") / "ray-serve.yaml"
    file.write_text(require("yaml", "ray-serve").safe_dump(config))
    address = cluster.get_runtime_context().gcs_address
    command = [str(Path(sys.executable).with_name("serve")), "run", "--non-blocking"]
    subprocess.run(
        [*command, "--address", address, str(file)],
        check=True,
        capture_output=True,
        timeout=SOON,
    )
    name = application["name"]
    until(lambda: status(cluster, name) not in ("NOT_STARTED", "DEPLOYING"), SOON)
    state = cluster.serve.status().applications[name]
    assert state.status == "RUNNING", state
    found = {"address": f"localhost:{free_port}", "http_port": free_port, "logs": logs}
    return types.SimpleNamespace(name=name, **found)


@pytest.fixture(scope="module")
def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def status(cluster, name):
    return cluster.serve.status().applications[name].status


def alive(class_name):
    """Actors of the cluster that live, by the name of their class."""
    from ray._private import state

    actors = [each for each in state.actors().values() if each["State"] == "ALIVE"]
    return [each for each in actors if each["ActorClassName"].split(":")[0] == class_name]


@pytest.mark.slow
def test_ray_serve_answers_as_the_model_itself(served):
    import numpy as np

    httpx = require("httpx", "serve")
    from faces import ask

    from nercc_models import load_model

    url = f"http://{served.address}"
    assert len(alive("Actor")) == 2
    (model,) = httpx.get(f"{url}/status").json()["models"]
    assert model["pool"] == {"kind": "ray", "num_workers": 2}
    x = np.full((3, 32, 32, 1), 0.5, np.float32)
    outputs = ask("json", served, "lenet5-digits", {"input": x}).outputs
    assert outputs["exact"].tolist() == [True] * 3
    np.testing.assert_allclose(outputs["logits"], load_model("lenet5-digits")(x), atol=1e-5)
    wrong = ask("json", served, "lenet5-digits", {})
    assert (wrong.status, "not inputs []" in wrong.error) == (400, True)
    assert "nercc_requests_total" in httpx.get(f"{url}/metrics").text
    (log,) = served.logs.glob("replica_*")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert "model is ready" in [line["message"] for line in lines], "where Serve logs"


@pytest.mark.slow
def test_readme_examples_run(served):
    """Against the same REST interface, wherever it runs."""
    require("tritonclient", "serve-test")

    def output(*command):
        options = {"check": True, "capture_output": True, "text": True, "timeout": SOON}
        return subprocess.run(command, **options).stdout

    for curl in [block for block in blocks(README, r"bash[^\n]*") if "curl" in block]:
        script = curl.replace("localhost:8000", served.address)
        script = script.replace("python ", f"{sys.executable} ")
        assert '"logits"' in output("bash", "-euo", "pipefail", "-c", script)
    (example,) = blocks(README, r"python[^\n]*")
    assert "localhost:8000" in example
    lines = output(sys.executable, "-c", example.replace("localhost:8000", served.address))
    assert len(lines.splitlines()) == 3
    assert "True" in lines.splitlines()[1]


@pytest.mark.slow
def test_readme_names_metrics_that_there_are(served):
    from prometheus_client.parser import text_string_to_metric_families

    text = require("httpx", "serve").get(f"http://{served.address}/metrics").text
    families = list(text_string_to_metric_families(text))
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


@pytest.mark.slow
def test_ray_serve_drains_when_the_application_is_deleted(cluster, served):
    """The last of this file: the application is gone after it."""
    httpx = require("httpx", "serve")
    url = f"http://{served.address}"
    from faces import ask

    answers, x = [], {"input": [[[[0.5]] * 32] * 32] * 8}
    client = threading.Thread(
        target=lambda: answers.append(ask("json", served, "lenet5-digits", x))
    )
    client.start()
    until(lambda: httpx.get(f"{url}/status").json()["models"][0]["queue"]["in_flight"], SOON)
    assert alive("ServeReplica")
    cluster.serve.delete(served.name)
    client.join(SOON)
    assert [answer.status for answer in answers] == [200]
    assert not alive("ServeReplica")
    until(lambda: not alive("Actor"), SOON)
    assert httpx.get(f"{url}/v2/health/ready").status_code == 404
