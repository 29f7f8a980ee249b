"""Eight CPU devices, both precisions, a fixed key. Warnings are errors (pyproject.toml)."""

import contextlib
import ctypes
import functools
import gc
import importlib
import os
import pathlib
import re
import shutil
import sys
import threading
import types
import warnings
import zlib

# As the `nercc` command does, before anything loads OpenBLAS: its idle threads keep busy the cores
# that XLA's need (48 tests of learners: 22 s instead of 53, on two).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import jax
import jaxtyping
import pytest
import type_checks
from jax._src import compilation_cache
from jax._src.interpreters import mlir

type_checks.install()

# The longest files with slow tests, to begin with: what is begun last, one worker ends alone. Those
# that wait for processes and those that compile take turns, for two workers to have one of each.
LONGEST = (
    *("test_predictor.py", "test_codes.py", "test_start.py"),
    *("test_schedules.py", "test_ray_cluster.py", "test_programs.py", "test_limits.py"),
    *("test_dissection.py", "test_learning_scheme.py", "test_run.py", "test_pools.py"),
    *("test_batcher.py", "test_server.py", "test_splines.py", "test_ray_data.py"),
    *("test_tuning.py", "test_chaos.py", "test_cli.py"),
    *("test_planner.py", "test_ray_pools.py"),
)
FIRST = {name: place for place, name in enumerate(LONGEST)}

# Must be set before the backend starts.
jax.config.update("jax_num_cpu_devices", 8)

# Where numbers are the subject, both precisions run by default; elsewhere one case, a slow one.
NUMERICS = {"test_codes.py", "test_splines.py"}

# Compiling is most of the time. Four programs (decoding, its two gradients, one of them vmapped)
# took XLA 23.8 s of CPU time, 16.1 s without its fusion emitters, and 9.2 s without most of LLVM's
# optimisations, too; as one piece, a seventh less. CI runs accuracy and gradients in float32 once
# more as users compile. JAX 0.12 aborts at the first flag; the second gains it nothing.
AS_USERS_DO = os.environ.get("NERCC_COMPILE_AS_USERS_DO") == "1"
if not AS_USERS_DO and jax.__version_info__ < (0, 11):
    plain = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {plain}"
jax.config.update("jax_disable_most_optimizations", not AS_USERS_DO)
if not AS_USERS_DO:
    # Of processes that tests start, too: a server took 18 s of CPU time until it listened, then 12.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    # The half that is left is Python's. Looking for garbage 70 times less often, and programs that
    # do not name the lines they come from: 35.5 s of CPU time became 29.6 (three codes' gradients).
    gc.set_threshold(50_000, 20, 100)
    jax.config.update("jax_traceback_in_locations_limit", 0)


class KeptContexts(threading.local):
    """What JAX makes anew for each program, with all that MLIR knows: 4 of a small one's 20 ms.

    Each thread keeps one for some programs; for good it would keep all their constants.
    """

    def __init__(self, make):
        self.make, self.used = make, 0

    def __call__(self):
        if self.used % 64 == 0:
            self.context = self.make()
        self.used += 1
        return self.context


if not AS_USERS_DO and jax.__version_info__ < (0, 11):
    mlir.make_ir_context = KeptContexts(mlir.make_ir_context)

# Nor do they compile what they import where a machine keeps no bytecode: collecting the tests takes
# 11 s of CPU time instead of 24, and so it is with each of the processes.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Ray's workers have the lowest priority but four: beside a test that compiles they would get a
# thirtieth of a core, and take minutes to import JAX.
os.environ.setdefault("RAY_worker_niceness", "0")

# Without optimisation a fit of 100 knots is off by 1.02e-5 in float32: more than is promised.
LARGE = re.compile(r"\[float32-(100|200)[\]-]")


@pytest.fixture(autouse=True)
def compile_quickly(request):
    large = "slow" in request.keywords and LARGE.search(request.node.name) is not None
    jax.config.update("jax_disable_most_optimizations", not AS_USERS_DO and not large)


def pytest_configure(config):
    """Compiled programs are kept on disk, between workers and runs: compiling is most of the time.

    All of them, however quickly compiled: thousands of small ones come again in every file. To
    compress CI's 14,400 took 21 s of CPU time; as they are, they take 0.9 GB instead of 0.4.
    """
    others = [getattr(compilation_cache, name, "unknown") for name in ("zstandard", "zstd")]
    if others == [None, None]:  # then JAX compresses by zlib
        compilation_cache.compress_executable = functools.partial(zlib.compress, level=0)
    folder = config.cache.mkdir("programs")
    if not hasattr(config, "workerinput") and _bytes_in(folder) > 2 << 30:
        shutil.rmtree(folder)  # of older sources, mostly
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_xdist_auto_num_workers(config):
    """One worker more than there are cores: tests wait for what they start, a tenth of the time."""
    del config
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else None


def _bytes_in(folder) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(folder))


def pytest_collection_modifyitems(config, items):
    lines = pathlib.Path(__file__).with_name("slow.txt").read_text().splitlines()
    listed = {f"tests/{line}" for line in lines if not line.startswith("#")}
    seen, kept, others = set(), [], []
    for item in items:
        function = item.nodeid.partition("[")[0]
        wide = _is_wide(item)
        if item.nodeid in listed or (wide and item.path.name not in NUMERICS - {"test_codes.py"}):
            item.add_marker(pytest.mark.slow)
        # Elsewhere float64 is the same source with another dtype: one case of each test shows it.
        repeats = wide and item.path.name not in NUMERICS and function in seen
        (others if repeats else kept).append(item)
        if wide:
            seen.add(function)
        drawn = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
        if drawn or item.name == "runTest":
            item.add_marker(pytest.mark.drawn)
    items[:] = sorted(kept, key=lambda item: FIRST.get(item.path.name, len(FIRST)))
    config.hook.pytest_deselected(items=others)


def _is_wide(item) -> bool:
    return "dtype" in item.fixturenames and item.callspec.params.get("dtype") == "float64"


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(20240204)


@pytest.fixture
def backend():
    """Scripted workers, for which `open_scheduler` makes schedulers: see `schedulers.py`."""
    from schedulers import (
        ScriptedBackend,  # late, as all that imports nercc_jax: the run-time type checks
    )

    return ScriptedBackend()


@pytest.fixture
def open_scheduler(backend):
    from schedulers import open_schedulers

    with open_schedulers(backend) as make:
        yield make


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """The working precision; float32 runs as users run it, with x64 disabled."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture(autouse=True)
def forget_programs(request):
    """Drops compiled programs before there are too many; they come back from the disk.

    XLA maps memory for each program, and the kernel allows a process 65,530 maps: the suite as one
    process would die of it (`Aborted` in the compiler). And a process's memory grows to 5 GB, of
    which every core of the machine runs one. Counting takes 10 ms, so it is done now and then.
    """
    yield
    stash = request.session.stash
    done = stash[_DONE] = stash.get(_DONE, 0) + 1
    if done % 10 == 0 and _too_many_programs(stash.get(_ROOM, _BYTES)):
        jax.clear_caches()
        gc.collect()
        if _TRIM is not None:
            _TRIM(0)
        # What stays is no reason to forget everything again ten tests later.
        stash[_ROOM] = max(_BYTES, _resident() + _MORE)


_DONE, _ROOM = pytest.StashKey[int](), pytest.StashKey[int]()
_PROCESS, _LIMIT = pathlib.Path("/proc/self"), pathlib.Path("/proc/sys/vm/max_map_count")
_MAPS = int(_LIMIT.read_text()) if _LIMIT.exists() else None
_BYTES, _MORE = 3 << 30, 1 << 30
# glibc's, which gives free memory back.
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


def _resident() -> int:
    return int((_PROCESS / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _too_many_programs(room: int) -> bool:
    if _MAPS is None:
        return False
    maps = (_PROCESS / "maps").read_bytes().count(b"\n")
    return _resident() > room or maps > 0.6 * _MAPS


@pytest.fixture
def untyped():
    """Runs as users do, without the run-time type checks: our own errors must speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@contextlib.contextmanager
def bench_modules(**modules: str):
    """Modules of bench/ by these names; there they import each other, as scripts do."""
    folder = str(pathlib.Path(__file__).parents[1] / "bench")
    sys.path.insert(0, folder)
    yield types.SimpleNamespace(**{n: importlib.import_module(m) for n, m in modules.items()})
    sys.path.remove(folder)


def require(module: str, extra: str):
    """Imports an optional package. Without it a test skips, but fails where CI installs all.

    What it warns of while it is imported is not ours to mend (`importorskip` ignores it, too).
    """
    if os.environ.get("NERCC_REQUIRE_EXTRAS") == "1":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
        return sys.modules[module]
    return pytest.importorskip(module, reason=f"needs pip install '.[{extra}]'")


# The same inputs each time; in CI's slow part (`--hypothesis-profile=fresh`) others each time.
# A failure prints how to draw its input again: add that to the test as an `@example`.
hypothesis.settings.register_profile("nercc", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.register_profile(
    "fresh", deadline=None, max_examples=60, derandomize=False, print_blob=True
)
hypothesis.settings.load_profile("nercc")


@pytest.fixture(scope="module", autouse=True)
def no_ray_stays():
    """A process stays part of a Ray to its end; the next file may want another."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
