"""What holds for the package as a whole, and what it imports when.

A command that needs no numbers waits for no JAX.
"""

import ast
import importlib
import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
from conftest import require

import nercc_jax
import nercc_jax.serving
import nercc_jax.stragglers
import nercc_models
from nercc_jax.cli import keep_programs
from nercc_models.cards import DATA_TERMS
from nercc_models.names import TRAINED
from nercc_models.recipes import RECIPES

ROOT = Path(__file__).parents[1]
# What is imported, and what that must not load.
UNLOADED = {
    "import nercc_jax": {
        *("matplotlib", "rich", "sklearn", "datasets", "torch", "ray", "nercc_models"),
    },
    "from nercc_jax import hedge": {"jax"},
    "from nercc_jax.compilation import enable_compilation_cache as on; on('cache')": {"jax"},
    "import nercc_jax; nercc_jax.testing.check_code": {"pytest", "hypothesis"},
}


@pytest.mark.parametrize("code", UNLOADED)
def test_importing_needs_only_what_it_is_for(code, tmp_path):
    code = f"{code}; import sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert not UNLOADED[code.partition("; import sys;")[0]] & set(done.stdout.split())


def test_the_version_is_reported_by_all():
    done = subprocess.run(
        [Path(sys.executable).with_name("nercc"), "--version"], capture_output=True, text=True
    )
    versions = {done.stdout.split()[-1], importlib.metadata.version("nercc-jax")}
    assert versions == {nercc_jax.__version__}


def test_every_package_is_shipped():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = [path.parent for path in (ROOT / "nercc_jax").rglob("__init__.py")]
    names = {".".join(path.relative_to(ROOT).parts) for path in found}
    assert set(packages["packages"]) == {"nercc_models", *names}


def test_what_comes_from_others_is_named():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license-files"] == ["LICENSE", "NOTICE"]
    weights = ROOT / "models" / "weights"
    cards = {path.stem: json.loads(path.read_text()) for path in weights.glob("*.json")}
    assert cards.keys() == {path.stem for path in weights.glob("*.safetensors")}
    for name, card in cards.items():
        assert card["license"] == project["license"], name
        assert card["data_terms"] == DATA_TERMS[card["data"]], name
    notice = " ".join((ROOT / "NOTICE").read_text().split())
    for terms in DATA_TERMS.values():
        assert terms.partition("; ")[2] in notice
    for word in ("bench/h100_sxm.txtpb", "openxla/xla", "open_inference.proto", "2402.04377"):
        assert word in notice
    assert "The OpenXLA Authors" in (ROOT / "bench" / "h100_sxm.txtpb").read_text()


@pytest.mark.parametrize("home", [None, "https://example.org/them/it"])
def test_readme_has_no_link_that_leads_nowhere(home, monkeypatch):
    """On PyPI, and wherever else it is read without the folder it lies in."""
    metadata = {}
    fake = types.SimpleNamespace(setup=lambda **given: metadata.update(given))
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    for name, value in (("NERCC_HOME", home), ("NERCC_TAG", "v1")):
        monkeypatch.delenv(name, raising=False)
        if home is not None:
            monkeypatch.setenv(name, value)
    runpy.run_path(str(ROOT / "setup.py"))
    text = metadata["long_description"]
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)
    assert "```bash\n" in text
    if home is not None:
        assert f"]({home}/raw/v1/docs/how-it-works.png)" in text
        assert metadata["project_urls"]["Documentation"] == "https://them.github.io/it"
        kept = {link.removeprefix(f"{home}/blob/v1/") for link in links if "/blob/" in link}
        assert all((ROOT / link).exists() for link in kept)


@pytest.mark.parametrize("script", ["smoke", "run"])
def test_ci_names_tests_that_there_are(script):
    words = re.findall(r"tests/[\w/.-]+\.py(?:::\w+)?", (ROOT / ".ci" / script).read_text())
    assert words
    for word in words:
        path, _, name = word.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text() if name else (ROOT / path).is_file(), (
            word
        )


# -- What is imported when -------------------------------------------------------------------------

HEAVY = ("jax", "flax", "equinox", "optax", "matplotlib", "sklearn", "scipy")
CODE = """
import atexit, sys
atexit.register(lambda: print("loaded:", *sorted({{m.split(".")[0] for m in sys.modules}})))
sys.argv = ["nercc", *{arguments}]
from nercc_jax.cli import main
main()
"""


def run(arguments):
    """Exit code, what was printed, and the packages loaded at the end, in a fresh process."""
    command = [sys.executable, "-c", CODE.format(arguments=arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    output, _, loaded = done.stdout.partition("loaded:")
    return done.returncode, output + done.stderr, set(loaded.split())


@pytest.mark.parametrize("command", [[], *([n] for n in ("demo", "run", "tune", "plan", "models"))])
def test_help_imports_no_jax(command):
    code, output, loaded = run([*command, "--help"])
    assert code == 0, output
    assert "Usage" in output
    assert not loaded & {*HEAVY, "pydantic_settings"}


@pytest.mark.parametrize("arguments", [["--help"], ["--http-port", "70000"]])
def test_a_servers_settings_need_no_jax(arguments):
    """What is wrong with them is reported within a second."""
    require("starlette", "serve")
    code, output, loaded = run(["serve", *arguments])
    assert code == (0 if arguments == ["--help"] else 2), output
    assert "SIGTERM" in output or "--http-port: input should be" in output
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("command", ["demo", "run", "tune", "plan", "distill", "serve"])
def test_an_unknown_model_is_refused_before_jax_is_imported(command):
    if command == "serve":
        require("starlette", "serve")
    code, output, loaded = run([command, "--model", "lenet6"])
    assert code == 2
    assert "There is no model 'lenet6'" in output
    assert "lenet5-digits" in output
    assert not loaded & {"jax", "flax"}


def test_names_need_no_recipes_but_are_theirs():
    assert tuple(RECIPES) == TRAINED


@pytest.mark.parametrize(
    "package", [nercc_jax, nercc_jax.serving, nercc_jax.stragglers, nercc_models]
)
def test_what_type_checkers_see_is_what_there_is(package):
    """The names are written twice: as imports for readers, and with their places for Python."""
    tree = ast.parse(Path(package.__file__).read_text())
    seen = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    imported = {(node.module, alias.name) for node in seen for alias in node.names}
    places = {(place, name) for place, names in package._WHERE.items() for name in names.split()}
    assert imported == places
    if package is nercc_jax.serving:
        require("starlette", "serve")
    for place, name in places:
        module = importlib.import_module(f".{place}", package.__name__)
        assert getattr(package, name) is getattr(module, name)
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_a_server_without_its_extra_says_what_to_install():
    lines = ("import sys", "sys.modules['uvicorn'] = None", "from nercc_jax.serving import Server")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: nercc_jax.serving.Server needs ")
    assert last.endswith(": pip install '.[serve]' in a clone")


def test_importing_the_rooms_starts_no_backend():
    """A script sets its number of CPU devices after its imports."""
    rooms = "import nercc_jax.pools, nercc_jax.schemes, nercc_jax.tuning, nercc_jax.planning"
    code = f"{rooms}; import jax; jax.config.update('jax_num_cpu_devices', 3)"
    code += "; print(len(jax.devices()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "3"


# -- The compilation cache: where it is, for which processes, and that it saves compilations -------


COUNT = """
import jax
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event.rpartition("/")[2]))
"""
ENABLE = """
from nercc_jax.compilation import enable_compilation_cache
print(enable_compilation_cache())
"""
WORK = """
import numpy as np
from nercc_jax import Replication
code = Replication(3, 6)
code.decode(code.encode(np.ones((3, 2), "float32")), np.arange(6) > 1)
print(seen.count("cache_hits"), seen.count("cache_misses"))
"""
NAMES = ("COMPILATION_CACHE_DIR", "PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


def in_a_process(tmp_path, *parts, **environment):
    """Return the lines that a fresh process prints, with its cache folder in `tmp_path`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(["seen = []", *parts])],
        env=kept | {"XDG_CACHE_HOME": str(tmp_path / "cache")} | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def show(*names):
    """Return code that prints environment variables of JAX."""
    return "\n".join(["import os", *(f"print(os.environ.get('JAX_{name}'))" for name in names)])


@pytest.mark.parametrize("parts", [(ENABLE, COUNT), (COUNT, ENABLE)])
def test_a_second_process_compiles_nothing(parts, tmp_path):
    """Enabled before JAX is imported, and after."""
    folder, hits, misses = in_a_process(tmp_path, *parts, WORK)
    (made,) = (tmp_path / "cache" / "nercc_jax").iterdir()
    assert folder == str(made)
    assert int(misses) > 0
    again, more_hits, more_misses = in_a_process(tmp_path, *parts, WORK)
    assert again == folder
    assert int(more_misses) == 0
    assert int(more_hits) == int(hits) + int(misses)


def test_processes_started_later_have_it(tmp_path):
    folder, *settings = in_a_process(tmp_path, ENABLE, show(*NAMES))
    assert settings == [folder, "0"]


def test_jaxs_own_setting_stays(tmp_path):
    own = {"JAX_COMPILATION_CACHE_DIR": "elsewhere"}
    assert in_a_process(tmp_path, ENABLE, show(*NAMES), **own) == ["elsewhere"] * 2 + ["None"]
    configured = "import jax; jax.config.update('jax_compilation_cache_dir', 'mine')"
    assert in_a_process(tmp_path, configured, ENABLE, show(*NAMES)) == ["mine", "None", "None"]
    assert not (tmp_path / "cache").exists()


def test_another_folder_can_be_chosen_later(tmp_path):
    """Once JAX has opened one, too."""
    compute, choose = "import jax; jax.numpy.ones(3) + 1", "enable_compilation_cache('chosen')"
    first = in_a_process(tmp_path, COUNT, ENABLE, compute, choose, WORK)[0]
    assert first.startswith(str(tmp_path / "cache"))
    assert len(list((tmp_path / "chosen").glob("*-cache"))) >= 3


def test_commands_run_without_a_folder(monkeypatch):
    def fail():
        raise PermissionError("read-only")

    monkeypatch.setattr("nercc_jax.cli._process.enable_compilation_cache", fail)
    keep_programs()
