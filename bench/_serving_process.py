"""Servers and load as processes of their own, for serving.py."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

from nercc_models import load_data, load_model

HERE = Path(__file__).parent
_ENDS = 60.0  # seconds that a server may take to end
_Each = TypeVar("_Each")


def nercc_serve(model: str, settings: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Return the command that serves a model, and its environment variables."""
    summary = {f"NERCC_DEFAULTS__{key.upper()}": str(value) for key, value in settings.items()}
    summary |= {"NERCC_HTTP_PORT": "0", "NERCC_GRPC_PORT": "0"}
    return [str(Path(sys.executable).parent / "nercc"), "serve", "--model", model], summary


@contextlib.contextmanager
def running(command: Sequence[str], summary: Mapping[str, str] | None = None) -> Iterator[int]:
    """Run a server's process until the end of the context, and give its port of HTTP.

    Raises: RuntimeError where it does not start.
    """
    with running_on(command, summary) as ports:
        yield ports["http_port"]


@contextlib.contextmanager
def running_on(
    command: Sequence[str], summary: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Run a server as `running` does, and give what it says once it is ready: all its ports."""
    process = subprocess.Popen(
        command,
        env=os.environ | (summary or {}),
        cwd=HERE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    output = process.stderr
    assert output is not None
    lines = []
    try:
        for line in output:
            lines.append(line)
            if '"ready"' in line:
                break
        else:
            raise RuntimeError(f"{command} did not start: " + "".join(lines[-5:]))
        threading.Thread(target=output.read, daemon=True).start()  # the pipe must not fill up
        yield json.loads(lines[-1]) | {"pid": process.pid}
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_ENDS)
        except subprocess.TimeoutExpired:
            process.kill()


def load(
    queries: Path, url: str, loop: str, amount: float, seconds: float, seed: int, rows: int = 1
) -> Any:
    """Run a load by `_serving_load.py`, and return its outcome; requests have `rows` queries."""
    command = [sys.executable, str(HERE / "_serving_load.py"), str(queries), url, loop]
    command += [str(amount), str(seconds), str(seed), str(rows)]
    done = subprocess.run(command, check=True, capture_output=True, timeout=seconds + 120)
    return json.loads(done.stdout)


def write_images(
    path: Path,
    model: str,
    splits: Sequence[str] = ("test",),
    *,
    limit: int | None = None,
    data_dir: Path | None = None,
) -> int:
    """Write a model's images, at most `limit` of each split, and its own labels for `load`.

    Returns:
        The number of images.
    """
    network = load_model(model)
    found = [load_data(network.data, each, data_dir=data_dir, limit=limit) for each in splits]
    x = np.concatenate([np.asarray(network.preprocess(each.images), np.float32) for each in found])
    y = [np.asarray(network(jnp.asarray(few))) for few in np.array_split(x, len(x) // 100)]
    np.savez(path, queries=x, labels=np.concatenate(y).argmax(1))
    return len(x)


def in_turn(each: Sequence[_Each], turn: int) -> list[_Each]:
    """Return the order in which to ask servers in a turn: another one is first each time."""
    first = turn % len(each)
    return [*each[first:], *each[:first]]


def cpu_seconds(process: int) -> float:
    """Return the seconds of CPU time that a process has taken."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
