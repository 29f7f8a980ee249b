"""What docs/deploy shows is valid, agrees with the server, and runs where it can run here."""

import os
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import require
from pages import blocks

import nercc_jax

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
README = (DEPLOY / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """kserve reads the command line when it is imported; settings read the environment."""
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    for name in [name for name in os.environ if name.startswith("NERCC_")]:
        if name != "NERCC_REQUIRE_EXTRAS":
            monkeypatch.delenv(name)
    require("starlette", "serve")
    require("pydantic_settings", "serve")


def yaml_of(name):
    return require("yaml", "ray").safe_load((DEPLOY / name).read_text())


def settings_of(arguments, environment):
    """What `nercc serve` would serve by, given these."""
    from commands import invoke

    from nercc_jax.serving import ServerSettings

    environment = {name: value for name, value in environment.items() if name.startswith("NERCC_")}
    result = invoke("serve", *arguments, "--print-config", env=environment)
    assert result.exit_code == 0, result.output
    return ServerSettings(**tomllib.loads(result.output))


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


def image_environment():
    stages = [number for number, (word, _) in enumerate(instructions()) if word == "FROM"]
    final = dict(instructions()[stages[-1] :])
    return dict(each.split("=", 1) for each in shlex.split(final["ENV"]))


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
    service = yaml_of("inference-service.yaml")
    read("V1beta1InferenceService", service)
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    assert service["kind"] == "InferenceService"
    predictor = service["spec"]["predictor"]
    (container,) = predictor["containers"]
    assert container["name"] == "kserve-container"
    given = {each["name"]: each["value"] for each in container["env"]}
    assert given.pop("PROTOCOL") == "v2"
    assert all(name.startswith("NERCC_") for name in given)
    settings = settings_of(container["args"], image_environment() | given)
    assert [each.model for each in settings.resolved()] == ["lenet5-digits"]
    ports = [(each["name"], each["containerPort"]) for each in container["ports"]]
    # The first is the one that KServe's service and probes take.
    assert ports == [("http", settings.http_port), ("grpc", settings.grpc_port)]
    assert settings.drain_delay_s > 0
    grace = predictor["terminationGracePeriodSeconds"]
    assert grace > settings.drain_delay_s + settings.drain_timeout_s
    image = re.search(r"-t (\S+) ", (DEPLOY / "Containerfile").read_text())
    assert image
    assert container["image"] == image[1] == f"nercc-jax:{nercc_jax.__version__}"
    assert container["securityContext"]["runAsNonRoot"]
    # It is probed and scraped where there is an answer.
    notes = service["metadata"]["annotations"]
    assert notes["prometheus.io/scrape"] == "true"
    metrics = notes["prometheus.io/path"]
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
    asked = [(each["port"], each["path"]) for each in probes]
    paths = ["/v2/health/live", "/v2/health/live", "/v2/health/ready", metrics]
    asked.append((int(notes["prometheus.io/port"]), metrics))
    assert asked == [(settings.http_port, path) for path in paths]
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
        image = words.index(f"nercc-jax:{nercc_jax.__version__}")
        settings = settings_of(words[image + 1 :], image_environment())
        published = [int(each.split(":")[1]) for each in words if re.fullmatch(r"\d+:\d+", each)]
        assert published == [settings.http_port, settings.grpc_port]
        grace = int(words[words.index("--stop-timeout") + 1])
        assert grace > settings.drain_delay_s + settings.drain_timeout_s


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
