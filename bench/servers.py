"""Servers and load as processes of their own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import served
from workloads import in_batches

from nercc_models import load_data, load_model

HERE = Path(__file__).parent
PACKAGES = ("fastapi", "uvicorn", "grpcio", "aiohttp", "nercc-jax")
UNCODED = {"scheme": "uncoded", "copies": 1}


def nercc_serve(model: str, settings: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Return the command that serves a model, and its environment variables."""
    texts = {
        key: json.dumps(value) if isinstance(value, dict) else str(value)
        for key, value in settings.items()
    }
    variables = {f"NERCC_DEFAULTS__{key.upper()}": value for key, value in texts.items()}
    variables |= {"NERCC_HTTP_PORT": "0", "NERCC_GRPC_PORT": "0"}
    return [str(Path(sys.executable).parent / "nercc"), "serve", "--model", model], variables


@contextlib.contextmanager
def running(
    command: Sequence[str], variables: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Run a server's process until the end of the context; give its ports and its `pid`.

    Raises:
        RuntimeError: It does not start.
    """
    process = subprocess.Popen(
        command,
        env=os.environ | (variables or {}),
        cwd=HERE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    output, lines = process.stderr, []
    assert output is not None
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
            process.wait(60.0)
        except subprocess.TimeoutExpired:
            process.kill()


def url_of(ports: Mapping[str, Any], model: str) -> str:
    """Return the address of a model of a server that runs."""
    return f"http://127.0.0.1:{ports['http_port']}/v2/models/{model.replace(':', '.')}/infer"


def load(
    queries: Path, url: str, loop: str, amount: float, seconds: float, seed: int, rows: int = 1
) -> Any:
    """Run a load by `load.py`, and return its outcome; requests have `rows` queries."""
    command = [sys.executable, str(HERE / "load.py"), str(queries), url, loop]
    command += [str(amount), str(seconds), str(seed), str(rows)]
    done = subprocess.run(command, check=True, capture_output=True, timeout=seconds + 120)
    return json.loads(done.stdout)


def answered(found: Mapping[str, Any]) -> list[float]:
    """Return the latencies of a load's requests that were answered."""
    return [each for each in found["latency"] if each is not None]


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
    np.savez(path, queries=x, labels=in_batches(network, x, 100).argmax(1))
    return len(x)


def write_queries(path: Path, model: str, kind: str = "") -> None:
    """Write random queries of a model of `served`, and its own labels.

    "bytes" are such queries before `served.prepare`, and "floats" the same ones after it.
    """
    function, shape = served.model_of(model)
    rng = np.random.default_rng(0)
    queries = floats = rng.normal(size=(32, *shape)).astype(np.float32)
    if kind:
        raw = rng.integers(0, 256, (32, *shape), np.uint8)
        floats = np.asarray(served.prepare(raw))
        queries = raw if kind == "bytes" else floats
    np.savez(path, queries=queries, labels=in_batches(function, floats, 32).argmax(1))
