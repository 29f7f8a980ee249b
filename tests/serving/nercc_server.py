"""`nercc serve` in a process of its own, as users run it, and models of ours for it to serve."""

import atexit
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conftest import require

httpx = require("httpx", "serve-test")

# Bounds on hanging, not on speed: a start compiles for seconds, and the cores may be busy.
STARTS, ENDS = 300.0, 120.0

MODELS = '''
import time

import equinox as eqx
import jax
import numpy as np


def double(x):
    """(B, 4) to (B, 3)."""
    return 2 * x.reshape(len(x), 4)[:, :3]


def wide(x):
    return 2 * x.reshape(len(x), -1)[:, :3]


def moody(x):
    return 2 * eqx.error_if(x, (x < 0).any(), "no negative numbers, please")[:, :3]


def wait(x):
    if (x < 0).any():
        time.sleep(1000)
    return x


def hangs(x):
    return jax.pure_callback(wait, jax.ShapeDtypeStruct(x.shape, x.dtype), x)[:, :3]


def from_weights(path):
    matrix = np.load(path)
    return lambda x: x @ matrix


constant = 3
'''

# Compiled programs, which the servers that a process of tests starts have together.
_PROGRAMS = tempfile.mkdtemp(prefix="nercc-test-")
atexit.register(shutil.rmtree, _PROGRAMS, ignore_errors=True)


def environment(**settings: str) -> dict[str, str]:
    """What a server is started with: nothing of ours but what the test tells."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NERCC_")}
    return kept | {
        "JAX_COMPILATION_CACHE_DIR": _PROGRAMS,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        **settings,
    }


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("nercc")), "serve", *arguments]


class Server:
    """Starts in a folder, where `own.py` is, and waits until it is ready."""

    def __init__(self, folder: Path, *arguments: str, config: str | None = None, **settings: str):
        (folder / "own.py").write_text(MODELS)
        if config is not None:
            (folder / "server.toml").write_text(config)
            arguments = ("--config", "server.toml", *arguments)
        self._stderr = folder / "log"
        ports = {"NERCC_HTTP_PORT": "0", "NERCC_GRPC_PORT": "0"}
        with self._stderr.open("w") as log:
            self.process = subprocess.Popen(
                command(*arguments),
                cwd=folder,
                env=environment(**ports | settings),
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        try:
            line = self.wait_for("ready", STARTS)
        except BaseException:
            self.kill()
            raise
        self.http_port, self.grpc_port = line["http_port"], line["grpc_port"]
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.grpc = f"127.0.0.1:{self.grpc_port}"
        self.http = httpx.Client(base_url=self.url, timeout=ENDS, trust_env=False)

    def log(self) -> list[dict[str, Any]]:
        """All lines that are complete. Fails where one is no JSON object."""
        lines = self._stderr.read_text().splitlines(keepends=True)
        try:
            log = [json.loads(line) for line in lines if line.endswith("\n")]
        except ValueError as error:
            raise AssertionError(f"no JSON in the log:\n{''.join(lines)}") from error
        assert all(isinstance(line, dict) for line in log)
        return log

    def wait_for(self, message: str, seconds: float = ENDS) -> dict[str, Any]:
        """The first line with this message."""
        for _ in patience(seconds):
            found = [line for line in self.log() if line["message"] == message]
            if found:
                return found[0]
            assert self.process.poll() is None, self._stderr.read_text()
        raise AssertionError(f"no {message!r} in {seconds} s:\n{self._stderr.read_text()}")

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """All samples, by name and labels."""
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(self.http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        found = {(s.name, frozenset(s.labels.items())): s.value for s in samples}
        assert len(found) == len(samples), "a sample appears twice"
        return found

    def count(self, name: str, **labels: str) -> float:
        return self.metrics()[f"nercc_{name}", frozenset(labels.items())]

    def status(self, model: str) -> dict[str, Any]:
        models = self.http.get("/status").json()["models"]
        return next(each for each in models if each["name"] == model)

    def signal(self, which: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(which)

    def wait(self) -> int:
        """Its exit code; fails where it does not end."""
        return self.process.wait(ENDS)

    def kill(self) -> None:
        with contextlib.suppress(AttributeError):  # it did not get so far
            self.http.close()
        self.process.kill()
        self.process.wait()


def patience(seconds: float) -> Iterator[None]:
    """Rounds of a loop that waits for something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.02)


@contextlib.contextmanager
def running(folder: Path, *arguments: str, **settings: Any) -> Iterator[Server]:
    """A server, which ends as it should: at SIGTERM, with exit code 0 and without errors logged."""
    server = Server(folder, *arguments, **settings)
    try:
        yield server
        server.signal()
        assert server.wait() == 0
        troubles = [line for line in server.log() if line["level"] not in ("INFO", "DEBUG")]
        # JAX tells of whatever a model raises, and so does the server.
        troubles = [line for line in troubles if line["logger"] != "jax._src.callback"]
        troubles = [line for line in troubles if line["message"] != "inference failed"]
        assert not troubles, troubles
    finally:
        server.kill()
