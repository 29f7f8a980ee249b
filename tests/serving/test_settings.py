"""The settings of a server: each by file, environment and flag, and what is wrong with it."""

# ruff: noqa: E402 (`require` comes before what needs it)

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
from commands import invoke
from conftest import require
from nercc_server import ENDS, MODELS, command, environment

require("pydantic_settings", "serve")
require("starlette", "serve")

from nercc_jax import NeRCC, save_code
from nercc_jax.cli import _serve, _serving_models
from nercc_jax.serving import ModelSettings, ServerSettings
from nercc_jax.serving.settings import read_settings

# Values that the settings do not have unless set, where they are neither numbers nor one of a few.
GIVEN = {
    "host": "0.0.0.0",
    "token_file": "tokens",
    "tls_certificate": "tls.pem",
    "address": "local",
    "runtime_env": {"working_dir": "."},
    "model": "own:double",
    "name": "mine",
    "weights": "weights.npy",
    "input_shape": [2, 3],
    "input_datatype": "INT64",
    "preprocess": "own:double",
    "inputs": "points.npy",
    "code": "code.json",
    "actor_options": {"max_task_retries": 1, "name": "\U0001f642", "resources": {"TPU": 4.0}},
    "max_batch_size": 32,
    "surrogate": "learn",
    "max_calls": 1.5,
    "faults": {"straggler_score": "own:double", "wrong_workers": {"swap": [0, 2]}},
}


def another(name, field):
    """A value of a setting that it does not have unless it is set."""
    kinds = (field.annotation, *get_args(field.annotation))
    options = [each for kind in kinds if get_origin(kind) is Literal for each in get_args(kind)]
    if name in GIVEN:
        return GIVEN[name]
    if options:
        return next(each for each in options if each != field.default)
    if bool in kinds:
        return not field.default
    return (field.default or 2) + 1 if int in kinds else (field.default or 1.0) / 2


SERVER, MODEL = (
    {name: another(name, field) for name, field in kind.model_fields.items()
     if name not in ("defaults", "models")}
    for kind in (ServerSettings, ModelSettings)
)  # fmt: skip
# Limits of outputs with labels, and of values, which no model has both of.
LABELS, VALUES = {"outputs", "max_disagreement"}, {"tolerance", "coverage"}
# Flags that are no settings.
ELSEWHERE = {"config", "check", "print_config"}
ONE = [{"model": "own:double", "input_shape": [4]}]


class Told(Exception):
    """What the command would have started."""


@pytest.fixture(autouse=True)
def never_serve(monkeypatch):
    """In these tests' own process nothing serves; the log and the signals stay pytest's."""

    def run(server):
        for start in server.starts.values():
            start()
        raise Told(server)

    monkeypatch.setattr("nercc_jax.serving.transport._server.Server.run", run)
    monkeypatch.setattr(_serve, "_start_log", lambda *_: None)
    monkeypatch.setattr(_serve, "keep_programs", lambda: None)
    monkeypatch.setattr(_serve.signal, "signal", lambda *_: None)


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """A working directory with models of ours, and nothing in the environment."""
    (tmp_path / "own.py").write_text(MODELS)
    (tmp_path / "env.yaml").write_text("env_vars: {A: b}")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("NERCC_"):
            monkeypatch.delenv(name)


def toml(value):
    """JSON writes all but tables, infinity and NaN alike."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml(each)}" for name, each in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)  # TOML has no halves of a character


def write(server=(), defaults=(), models=()):
    """A configuration file."""
    lines = [f"{name} = {toml(value)}" for name, value in dict(server).items()]
    lines += ["[defaults]", *(f"{name} = {toml(value)}" for name, value in dict(defaults).items())]
    for model in models:
        lines += ["[[models]]", *(f"{name} = {toml(value)}" for name, value in model.items())]
    path = Path("server.toml")
    path.write_text("\n".join(lines))
    return path


def as_variable(value):
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


@pytest.fixture
def given(monkeypatch):
    """Runs the command until it starts models; the server's settings, and the models'."""
    read = {}

    def remember(*arguments, **options):
        read["server"] = read_settings(*arguments, **options)
        return read["server"]

    def start(chosen, registry, join):
        raise Told(chosen)

    monkeypatch.setattr("nercc_jax.serving.settings.read_settings", remember)
    monkeypatch.setattr(_serving_models, "starts_of", start)

    def run(*arguments, **variables):
        result = invoke("serve", *arguments, env=variables)
        assert isinstance(result.exception, Told), result.output
        (chosen,) = result.exception.args
        return read["server"], chosen

    return run


# One source after the other.


@pytest.mark.parametrize("name", {**SERVER, **MODEL})
def test_a_setting_by_file_environment_and_flag(name, given, monkeypatch):
    """Each comes before the one before it."""
    ours = name in SERVER
    kind, value = (ServerSettings, SERVER[name]) if ours else (ModelSettings, MODEL[name])
    other, expected = getattr(kind(), name), getattr(kind(**{name: value}), name)
    assert other != expected
    variable = f"NERCC_{'' if ours else 'DEFAULTS__'}{name.upper()}"
    models = [{"model": "a:b"}, {"model": "c:d"}][: 1 if name in ("name", "model") else 2]

    def file(value):
        set_to = {} if value is None else {name: value}
        return write(set_to, models=models) if ours else write(defaults=set_to, models=models)

    def found(path, **flags):
        settings = read_settings(path, **flags)
        return getattr(settings if ours else settings.defaults, name)

    assert found(file(value)) == expected
    monkeypatch.setenv(variable, as_variable(value))
    assert found(None) == found(file(other)) == expected
    monkeypatch.delenv(variable)
    if not ours:
        table = {"model": "m", name: value}
        monkeypatch.setenv("NERCC_MODELS", json.dumps([table]))
        for path in (None, write(models=[table])):
            assert getattr(read_settings(path).models[0], name) == expected
        monkeypatch.delenv("NERCC_MODELS")
    if name == "model":
        return
    flag = f"--{name.replace('_', '-')}"
    text = [",".join(map(str, value)) if isinstance(value, list) else toml(value).strip('"')]
    if name == "input_shape":
        other = [4]
    variables = {} if other is None else {variable: as_variable(other)}
    server, chosen = given("--config", str(file(other)), flag, *text, **variables)
    if ours:
        assert getattr(server, name) == expected
    else:
        assert [getattr(model, name) for model in chosen] == [expected] * len(models)


def test_sources_are_put_together_setting_by_setting(monkeypatch):
    path = write({"host": "0.0.0.0"}, {"num_data": 2, "num_workers": 5, "copies": 4}, ONE)
    monkeypatch.setenv("NERCC_DEFAULTS__NUM_WORKERS", "6")
    monkeypatch.setenv("NERCC_DEFAULTS__COPIES", "3")
    settings = read_settings(path, defaults={"copies": 1})
    (model,) = settings.resolved()
    assert (model.num_data, model.num_workers, model.copies) == (2, 6, 1)
    assert settings.host == "0.0.0.0"
    # Models come before defaults, even where they say what is usual.
    usual = ModelSettings().num_data
    path = write(defaults={"num_data": 5}, models=[ONE[0] | {"num_data": usual}])
    assert read_settings(path).resolved()[0].num_data == usual


def test_grpc_can_be_left_out(monkeypatch):
    assert read_settings(write({"grpc_port": "none"})).grpc_port is None
    monkeypatch.setenv("NERCC_GRPC_PORT", "none")
    assert read_settings(None).grpc_port is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NERCC_REQUIRE_EXTRAS", "1"),
        # Kubernetes, beside services named nercc and nercc-predictor.
        ("NERCC_SERVICE_HOST", "10.0.0.1"),
        ("NERCC_PORT", "tcp://10.0.0.1:80"),
        ("NERCC_PREDICTOR_SERVICE_PORT_HTTP", "80"),
        ("NERCC_PREDICTOR_PORT_80_TCP_ADDR", "10.0.0.1"),
        ("NERCCC", "1"),
    ],
)
def test_variables_of_others_are_left_alone(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert read_settings(None).model_dump() == ServerSettings().model_dump()


# The command.


def test_every_setting_has_a_flag():
    flags = [option.name for option in _serve.options()]
    assert sorted(flags) == sorted([*SERVER, *MODEL, *ELSEWHERE])


def test_models_by_flag_replace_those_of_the_file_and_a_shipped_one_is_served_without_any(given):
    _, chosen = given("--config", str(write(models=ONE)), "--model", "a:b", "--model", "c:d")
    assert [model.model for model in chosen] == ["a:b", "c:d"]
    assert [model.model for model in given()[1]] == ["lenet5-digits"]


def run(*arguments, **variables):
    result = invoke("serve", *arguments, env=variables)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


def refused(message, *arguments, **variables):
    code, output = run(*arguments, **variables)
    assert code == 2
    assert output.startswith("error: "), output
    assert len(output.strip().splitlines()) == 1, output
    assert message in output


OWN = ("--model", "own:double", "--input-shape", "4")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        # Of a file, ...
        ("http_port = ", "server.toml is no TOML: Invalid value"),
        ('http_port = "x"', "http_port: input should be a valid integer"),
        ("htp_port = 1", "htp_port: there is no such setting"),
        ("host = 1\ndrain_delay_s = -2", "drain_delay_s: input should be greater than or equal"),
        (
            "max_bytes_in_flight = 9",
            "max_body_bytes 67108864 must not be more than max_bytes_in_fl",
        ),
        ('model_control = "all"', "model_control: input should be 'none' or 'explicit'"),
        ("defaults = 7", "defaults: input should be"),
        ("[defaults]\nnum_dat = 3", "defaults.num_dat: there is no such setting"),
        ("[defaults]\nmax_batch_size = 3", "max_batch_size must be a power of two, not 3"),
        ("[defaults]\ndeadline_s = nan", "deadline_s: input should be less than or equal to 3600"),
        ("[defaults]\nfaults = {death_rate = 2}", "defaults.faults: death_rate is a share, from 0"),
        ('[defaults]\nscheme = "lcc"', "scheme: input should be 'nercc', 'berrut'"),
        ('[[models]]\nname = "a"', "each of the models needs `model`"),
        ("models = 7", "models: input should be a valid list"),
        ('[[models]]\nmodel = "a"\n[[models]]\nmodel = "a"', "must have different names"),
        ('[[models]]\nmodel = "a:b"\n[[models]]\nmodel = "c"\nname = "a.b"', "different names"),
        # ... of the environment, ...
        ({"HTTP_PORT": "many"}, "http_port: input should be a valid integer"),
        ({"MODELS": "[{"}, 'error parsing value for field "models"'),
        ({"MODELS": '[{"modle": "a"}]'}, "models.0.modle: there is no such setting"),
        ({"DEFAULTS__INPUT_SHAPE": "[four]"}, "input_shape"),
        ({"DEFAULTS__NUM_DAT": "3"}, "defaults.num_dat: there is no such setting"),
        ({"HTP_PORT": "80"}, "the environment has NERCC_HTP_PORT: there is no such setting"),
        (
            {"DEFAULT__NUM_DATA": "3"},
            "the environment has NERCC_DEFAULT__NUM_DATA: there is no such",
        ),
        ({"NUM_DATA": "3"}, "the environment has NERCC_NUM_DATA: there is no such setting"),
        # ... and by flags.
        (("--config", "nothing.toml"), "there is no configuration file nothing.toml"),
        (("--http-port", "70000"), "--http-port: input should be less than or equal to 65535"),
        (("--max-batch-size", "3"), "max_batch_size must be a power of two, not 3"),
        (("--input-shape", "4,x"), "--input-shape: 28, 28, 1 or a table as in TOML is needed"),
        (("--input-shape", "0"), "--input-shape: positive numbers are needed"),
        (("--input-shape", "a=[4],b='x'"), "--input-shape: 28, 28, 1 or a table"),
        ((*OWN, "--input-datatype", "BYTES"), "input 'input' cannot be BYTES: there are BOOL"),
        (
            (*OWN, "--input-datatype", "ids='INT64'"),
            "inputs ['input'] have shapes, but ['ids'] have",
        ),
        ((*OWN, "--input-datatype", "INT64", "--scheme", "nercc"), "cannot have nercc"),
        ((*OWN, "--input-datatype", "INT8", "--code", "code.json"), "cannot have code.json"),
        (("--actor-options", "{x"), "--actor-options: 28, 28, 1 or a table as in TOML"),
        (("--faults", "straggler_rate"), "--faults: 28, 28, 1 or a table as in TOML"),
        (("--faults", "straggle_rate = 1"), "--faults: there is no fault 'straggle_rate', only"),
        ((*OWN, "--faults", "straggler_score='a'"), "straggler_score a: one of your own is"),
        (("--grpc-port", "any"), "--grpc-port: input should be a valid integer"),
        (("--model", "nothing"), "no model 'nothing'"),
        (("--model", "own:"), "named module:function, not 'own:'"),
        (("--model", "own:nothing"), "own:nothing: module 'own' has no attribute 'nothing'"),
        (("--model", "nothing:x:"), "nothing:x:: ValueError: invalid format"),
        (("--model", "own:double"), "say the shape of one query with --input-shape"),
        (("--model", "own:constant", "--input-shape", "4"), "is a int, not a callable"),
        (("--model", "own:double", "--input-shape", "5"), "own.double does not run on a batch"),
        (("--model", "own:twice", "--input-shape", "4"), "'output' was ShapeDtypeStruct"),
        ((*OWN, "--weights", "nothing.npy"), "there are no weights at nothing.npy"),
        ((*OWN, "--inputs", "nothing.npy"), "--inputs nothing.npy: there is no such file"),
        ((*OWN, "--inputs", "words.txt"), "words.txt: a file ends in .npy, .npz, .csv, .parquet"),
        ((*OWN, "--inputs", "flat.npy"), "needs shape (rows, *shape of a data point), not (5,)"),
        ((*OWN, "--inputs", "one.npz"), "of shape [-1, 4], not arrays by name ['x']"),
        ((*OWN, "--code", "nothing.json"), "nothing.json"),
        ((*OWN, "--code", "words.txt"), "words.txt"),
        ((*OWN, "--num-data", "8", "--num-workers", "4"), "need at least 8 workers, not 4"),
        (("--tls-certificate", "nowhere"), "nowhere cannot be read: No such"),
        (("--tls-certificate", "blank"), "blank needs the key, the certificate and its chain"),
        (("--token-file", "nowhere"), "nowhere cannot be read: No such file or directory"),
        (("--token-file", "blank"), "blank has no token"),
    ],
)
def test_what_is_wrong_is_reported_in_one_sentence(given, message, monkeypatch):
    Path("server.toml").write_text(given if isinstance(given, str) else "")
    Path("words.txt").write_text("words")
    Path("blank").write_text("\n \n")
    Path("own.py").write_text(MODELS + "\n\ndef twice(x):\n    return x.astype('float16')\n")
    monkeypatch.delitem(sys.modules, "own", raising=False)
    np.save("flat.npy", np.zeros(5))
    np.savez("one.npz", x=np.zeros((5, 4)))
    save_code("code.json", NeRCC(2, 4))
    arguments = given if isinstance(given, tuple) else ("--config", "server.toml")
    variables = given if isinstance(given, dict) else {}
    refused(message, *arguments, **{f"NERCC_{name}": each for name, each in variables.items()})


@pytest.mark.parametrize(
    ("text", "table", "expected"),
    [
        ("28,28,1", [28, 28, 1], (28, 28, 1)),
        ("a=[28, 28],b=[4]", {"a": [28, 28], "b": [4]}, {"a": (28, 28), "b": (4,)}),
        ("{age = [], meta = [4]}", {"age": [], "meta": [4]}, {"age": (), "meta": (4,)}),
        ("64", [64], (64,)),
    ],
)
def test_shapes_by_name(text, table, expected, monkeypatch):
    for given in (text, table):
        assert ModelSettings(input_shape=given).input_shape == expected
    assert read_settings(write(defaults={"input_shape": table})).defaults.input_shape == expected
    monkeypatch.setenv("NERCC_DEFAULTS__INPUT_SHAPE", text)
    assert read_settings(None).defaults.input_shape == expected


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({}, "Uncoded"),
        ({"scheme": "uncoded"}, "Uncoded"),
        ({"scheme": "replication"}, "Replication"),
        ({"input_datatype": None}, "NeRCC"),
        ({"input_datatype": None, "scheme": "berrut-spline"}, "BerrutSpline"),
    ],
)
def test_what_cannot_be_coded_is_served_uncoded_unless_it_was_asked_for(given, code):
    given = {"model": "own:double", "input_shape": "4", "input_datatype": "INT64", **given}
    settings = ModelSettings(**given)
    assert type(_serving_models.load_parts(settings)[1]).__name__ == code


def test_a_port_that_is_taken_is_reported_in_one_sentence():
    """Before anything is loaded; after the log. test_start.py has both ports."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = subprocess.run(
            command(*OWN, "--scheme", "uncoded", "--workers", "1"),
            env=environment(NERCC_HTTP_PORT=str(port), NERCC_GRPC_PORT="0"),
            capture_output=True,
            text=True,
            timeout=ENDS,
        )
    assert result.returncode == 2
    *lines, last = result.stderr.strip().splitlines()
    assert last == f"error: cannot listen on 127.0.0.1:{port}: is the port taken?"
    assert "Traceback" not in result.stderr
    assert "loading" not in result.stderr
    assert all(json.loads(line)["level"] for line in lines)


@pytest.mark.parametrize("given", [{}, {"grpc_port": None}, {"grpc_port": 0}, SERVER])
def test_the_printed_configuration_is_what_was_given(given, tmp_path):
    labels = {name: value for name, value in MODEL.items() if name not in VALUES}
    values = {name: value for name, value in MODEL.items() if name not in LABELS}
    models = [labels, values | {"name": "values"}, ONE[0]]
    path = write({k: toml_none(v) for k, v in given.items()}, {"num_data": 3}, models)
    code, printed = run("--config", str(path), "--print-config", "--num-workers", "9")
    assert code == 0
    (tmp_path / "printed.toml").write_text(printed)
    again, first = read_settings(Path("printed.toml")), read_settings(path)
    exclude = {"models", "defaults"}
    assert again.model_dump(exclude=exclude) == first.model_dump(exclude=exclude)
    expected = [ModelSettings(num_workers=9).over(model).model_dump() for model in first.resolved()]
    assert [model.model_dump() for model in again.resolved()] == expected
    assert {model["num_workers"] for model in expected} == {9}


def toml_none(value):
    return "none" if value is None else value


def test_settings_can_be_checked_only():
    code, output = run(*OWN, "--check")
    assert (code, output) == (0, "own.double can be served\n")
    refused("own:nothing: module 'own' has no attribute", "--model", "own:nothing", "--check")


def test_missing_extras_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(
        "grpc, httptools, orjson, prometheus_client, pydantic_settings, "
        "pythonjsonlogger, starlette, uvicorn: pip install"
    )


NUMBERS = [
    name
    for kind in (ServerSettings, ModelSettings)
    for name, field in kind.model_fields.items()
    if {int, float} & {field.annotation, *get_args(field.annotation)}
]
# Versions have names, and a threshold above all answer times is one.
AS_LARGE_AS_ONE_LIKES = {"version", "straggler_threshold"}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_have_bounds_on_both_sides(name):
    """No wait, queue or buffer is without one, and NaN is within none."""
    kind = ServerSettings if name in SERVER else ModelSettings
    signs, field = ("gt", "ge", "lt", "le"), kind.model_fields[name]
    bounds = {sign: getattr(each, sign) for each in field.metadata for sign in signs
              if hasattr(each, sign)}  # fmt: skip
    beyond = [bounds.get("gt", bounds.get("ge", math.inf) - 1), math.nan]
    if name not in AS_LARGE_AS_ONE_LIKES:
        beyond += [bounds.get("lt", bounds.get("le", -math.inf) + 1), math.inf]
    for value in beyond:
        path = write({name: value}) if name in SERVER else write(defaults={name: value})
        where = name if name in SERVER else f"defaults.{name}"
        with pytest.raises(ValueError, match=rf"^{where}: input should be .*, not {value}$"):
            read_settings(path)
