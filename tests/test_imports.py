"""What is imported when: a command that needs no numbers waits for no JAX."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require

import nercc_jax
import nercc_jax.serving
import nercc_jax.stragglers
import nercc_models
from nercc_models.names import TRAINED
from nercc_models.recipes import RECIPES

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
    require("fastapi", "serve")
    code, output, loaded = run(["serve", *arguments])
    assert code == (0 if arguments == ["--help"] else 2), output
    assert "SIGTERM" in output or "--http-port: input should be" in output
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("command", ["demo", "run", "tune", "plan", "distill", "serve"])
def test_an_unknown_model_is_refused_before_jax_is_imported(command):
    if command == "serve":
        require("fastapi", "serve")
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
        require("fastapi", "serve")
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
