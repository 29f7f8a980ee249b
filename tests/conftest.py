"""Eight CPU devices, both precisions, a fixed key. Warnings are errors (pyproject.toml)."""

import importlib
import os
import sys
import warnings

import hypothesis
import jax
import jaxtyping
import pytest

# Must be set before the backend starts.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(20240204)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """The working precision; float32 runs as users run it, with x64 disabled."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture(autouse=True)
def forget_programs(request):
    """Drops compiled programs now and then.

    XLA maps memory for each, and the kernel allows a process 65,530 maps: the suite as one process
    would die of it (`Aborted` in the compiler).
    """
    yield
    done = request.session.stash.get(_DONE, 0) + 1
    request.session.stash[_DONE] = done
    if done % 50 == 0:
        jax.clear_caches()


_DONE = pytest.StashKey[int]()


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """For modules most of whose tests compile the same: programs are kept on disk, and found."""
    wanted = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def untyped():
    """Runs as users do, without the run-time type checks: our own errors must speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def require(module: str, extra: str):
    """Imports an optional package. Without it a test skips, but fails where CI installs all.

    What it warns of while it is imported is not ours to mend (`importorskip` ignores it, too).
    """
    if os.environ.get("NERCC_REQUIRE_EXTRAS") == "1":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
        return sys.modules[module]
    return pytest.importorskip(module, reason=f"needs pip install 'nercc-jax[{extra}]'")


hypothesis.settings.register_profile("nercc", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("nercc")
