"""The compilation cache: where it is, for which processes, and that it saves compilations."""

import os
import subprocess
import sys

import pytest

from nercc_jax.cli import keep_programs

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


def run(tmp_path, *parts, **environment):
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
    folder, hits, misses = run(tmp_path, *parts, WORK)
    (made,) = (tmp_path / "cache" / "nercc_jax").iterdir()
    assert folder == str(made)
    assert int(misses) > 0
    again, more_hits, more_misses = run(tmp_path, *parts, WORK)
    assert again == folder
    assert int(more_misses) == 0
    assert int(more_hits) == int(hits) + int(misses)


def test_importing_it_imports_no_jax(tmp_path):
    assert run(tmp_path, ENABLE, "import sys; print('jax' in sys.modules)")[1] == "False"


def test_processes_started_later_have_it(tmp_path):
    folder, *settings = run(tmp_path, ENABLE, show(*NAMES))
    assert settings == [folder, "0"]


def test_jaxs_own_setting_stays(tmp_path):
    own = {"JAX_COMPILATION_CACHE_DIR": "elsewhere"}
    assert run(tmp_path, ENABLE, show(*NAMES), **own) == ["elsewhere"] * 2 + ["None"]
    configured = "import jax; jax.config.update('jax_compilation_cache_dir', 'mine')"
    assert run(tmp_path, configured, ENABLE, show(*NAMES)) == ["mine", "None", "None"]
    assert not (tmp_path / "cache").exists()


def test_another_folder_can_be_chosen_later(tmp_path):
    """Once JAX has opened one, too."""
    compute, choose = "import jax; jax.numpy.ones(3) + 1", "enable_compilation_cache('chosen')"
    first = run(tmp_path, COUNT, ENABLE, compute, choose, WORK)[0]
    assert first.startswith(str(tmp_path / "cache"))
    assert len(list((tmp_path / "chosen").glob("*-cache"))) >= 3


def test_commands_run_without_a_folder(monkeypatch):
    def fail():
        raise PermissionError("read-only")

    monkeypatch.setattr("nercc_jax.cli._process.enable_compilation_cache", fail)
    keep_programs()
