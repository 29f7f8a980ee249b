"""Reports: JSON with commit, rooms' hashes, machine and versions, and Markdown tables."""

import ast
import datetime
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import time
import tokenize
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
DATA = ROOT.parent / "shared" / "data"
PACKAGES = ("jax", "jaxlib", "numpy", "equinox", "optax", "flax")


class Report:
    """A benchmark's results: a file of JSON, lines of progress, and a table in Markdown.

    Attributes:
        path: The file of the results.
        quick: Whether a small version is run.
        data_dir: The folder of data sets; None where they come from the hub.
    """

    def __init__(
        self,
        name: str,
        quick: bool = False,
        data_dir: Path | None = None,
        output: Path | None = None,
    ):
        self.quick, self._begin = quick, time.perf_counter()
        self.data_dir = data_dir or (DATA if DATA.is_dir() else None)
        self.path = output or RESULTS / f"{name}{'-quick' if quick else ''}.json"

    def log(self, text: object) -> None:
        """Print a line of progress, with the seconds since the beginning."""
        print(f"{time.perf_counter() - self._begin:6.0f} s  {text}", flush=True)

    def read(self) -> dict[str, Any]:
        """Return the results in the file; empty where there is none."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def write(self, content: Mapping[str, Any]) -> None:
        """Write the results; the file is whole at any time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.with_suffix(".partial")
        whole.write_text(as_json(content) + "\n")
        whole.replace(self.path)

    def add(self, **news: Any) -> None:
        """Add to the results, and to its `parts`: others may have written at the same time."""
        results = self.read()
        parts = results.get("parts", {}) | news.get("parts", {})
        self.write(results | news | {"parts": parts})


def as_json(value: Any, depth: int = 3) -> str:
    """Return JSON with six digits of each number, and a line for each item of the outer levels."""
    if isinstance(value, Mapping):
        start, end = "{}"
        items = [f"{json.dumps(key)}:{as_json(value[key], depth - 1)}" for key in value]
    elif isinstance(value, list | tuple):
        start, end = "[]"
        items = [as_json(each, depth - 1) for each in value]
    else:
        return json.dumps(float(f"{value:.6g}") if isinstance(value, float) else value)
    gap = "\n" if depth > 0 and items else ""
    return start + gap + f",{gap}".join(items) + gap + end


def show(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print rows as a table in Markdown; where a row lacks a column, its cell is empty."""
    rows = [{key: _cell(value) for key, value in row.items()} for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[row.get(key, "") for key in columns] for row in rows]
    print("", *(f"| {' | '.join(line)} |" for line in lines), "", sep="\n", flush=True)


def _cell(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " to ".join(map(_cell, value))
    return "" if value is None else str(value)


def code_of(source: str) -> str:
    """Return a Python source without docstrings, comments and empty lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        holds = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if holds and ast.get_docstring(node, clean=False) is not None:
            text = slice(node.body[0].lineno - 1, node.body[0].end_lineno)
            lines[text] = [""] * len(lines[text])
    return "\n".join(filter(None, map(str.rstrip, lines)))


@functools.cache
def room_hashes(root: Path = ROOT) -> dict[str, str]:
    """Return a hash of the code of each room of `nercc_jax`, by which pages see their age."""
    hashes = {}
    for room in sorted(each for each in (root / "nercc_jax").iterdir() if each.is_dir()):
        files = sorted(room.rglob("*.py"))
        text = "".join(f"{each.relative_to(root)}\n{code_of(each.read_text())}" for each in files)
        if files:
            hashes[room.name] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return hashes


def _git(*words: str) -> str:
    found = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def environment(*more: str) -> dict[str, Any]:
    """Return the commit, the rooms' hashes, the machine, its load, and versions of packages."""
    device, info = jax.devices()[0], Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpus = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", "nercc_jax", "models", "bench/*.py")),
        "rooms": room_hashes(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{device.platform}: {device.device_kind}",
        "cpu": cpus[0] if cpus else platform.processor() or platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in (*PACKAGES, *more)},
    }
