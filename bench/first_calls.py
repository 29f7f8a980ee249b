"""Time a user's first calls, which are compilation mostly, against another revision.

    python bench/first_calls.py [--against REV] [--repeats N] [--quick]

Each step runs in a fresh process without a compilation cache. What a step needs is prepared before
its clock starts. The two checkouts take turns, and the other revision is checked out into a
temporary git worktree; a + marks uncommitted changes. For each step:

- CPU seconds: user and system time of all threads, and of child processes where a whole process is
  measured. They depend less than the wall clock on what else the machine does.
- Wall seconds.

Lines of StableHLO are exact, and tell how much there is to compile. Prints medians over the
repeats, and writes results/first_calls.json (--quick: first_calls-quick.json, without the demo).
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _report import environment, write_json
from _settings import PACKAGES

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
TIMEOUT = 600  # seconds, for one process

_IMPORTS = """
import jax
import jax.numpy as jnp
import numpy as np
from nercc_jax import Berrut, ExactStragglers, NeRCC, evaluate
"""
_CODE = f"""{_IMPORTS}
code = NeRCC(8, 20)
mask = np.arange(20) != 2
x = np.ones((8, 64), np.float32)
y = np.ones((20, 64), np.float32)
"""
_DECODE = "jax.jit(lambda y, mask: code.decode(y, mask)).lower(y, mask)"
_GRADIENT = """jax.jit(
    jax.grad(lambda code, y: code.decode(y, mask).sum(), argnums=(0, 1), allow_int=True)
).lower(code, y)"""

# Setup and step of each: Python's text, since both run in other processes.
STEPS = {
    "import": ("", _IMPORTS),
    "make NeRCC(8, 20)": (_IMPORTS, "NeRCC(8, 20)"),
    "first encode": (_CODE, "code.encode(x).block_until_ready()"),
    "first decode": (_CODE, "code.decode(y, mask).block_until_ready()"),
    "gradient of decode in jit": (_CODE, f"{_GRADIENT}.compile()"),
    "decode in jit": (_CODE, f"{_DECODE}.compile()"),
    "evaluate jnp.sin": (
        f"{_CODE}\npoints = np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32)",
        """evaluate(
    jnp.sin, {"NeRCC": code}, points, {"2": ExactStragglers(2)}, key=jax.random.key(0)
)""",
    ),
}
README, DEMO = "README's example", "nercc demo"
_CLOCKED = """
import json, time
{setup}
cpu, wall = time.process_time(), time.perf_counter()
{step}
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
print("\\n" + json.dumps({{"cpu_s": cpu, "wall_s": wall}}))
"""
_LINES = f"""{_CODE}
import json
lines = {{}}
for code in (NeRCC(8, 20), Berrut(8, 20)):
    name = type(code).__name__
    lines[f"decode, {{name}}"] = {_DECODE}.as_text().count("\\n")
    lines[f"gradient of decode, {{name}}"] = {_GRADIENT}.as_text().count("\\n")
print("\\n" + json.dumps(lines))
"""


@dataclasses.dataclass(frozen=True)
class Checkout:
    """A folder with the sources of a revision."""

    folder: Path
    revision: str

    def run(self, arguments: Sequence[str], **settings: str) -> str:
        """Run Python on these sources in an empty folder; return its output.

        Raises: subprocess.SubprocessError if it fails or takes longer than `TIMEOUT`.
        """
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name == "JAX_PLATFORMS" or not name.startswith(("JAX_", "XLA_", "PYTHON"))
        }
        # `.typings/nercc_models` is a link to the folder `models`.
        path = os.pathsep.join(map(str, (self.folder, self.folder / ".typings")))
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=folder,
                env=inherited | {"PYTHONPATH": path, "XDG_CACHE_HOME": folder} | settings,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
        if done.returncode:
            raise subprocess.SubprocessError(done.stderr.strip()[-2000:])
        return done.stdout

    def report(self, program: str) -> dict[str, Any]:
        """Run a program without a compilation cache; return the JSON of its last line."""
        printed = self.run(["-c", program], JAX_ENABLE_COMPILATION_CACHE="false")
        return json.loads(printed.strip().rpartition("\n")[2])


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[Checkout]:
    """Check out a revision in a temporary worktree, removed at the end."""
    commit = git("rev-parse", "--short", f"{revision}^{{commit}}")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / commit
        git("worktree", "add", "--detach", str(folder), commit)
        try:
            yield Checkout(folder, commit)
        finally:
            git("worktree", "remove", "--force", str(folder))


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def measure(checkout: Checkout, step: str) -> dict[str, float] | None:
    """Return CPU and wall seconds of a step, or None, with a message, where it fails."""
    try:
        if step in STEPS:
            setup, code = STEPS[step]
            return checkout.report(_CLOCKED.format(setup=setup, step=code))
        if step == DEMO:  # its own cache, which is empty
            return process_seconds(checkout, ["-m", "nercc_jax", "demo"])
        (example,) = re.findall(
            r"^```python\n(.*?)^```$",
            (checkout.folder / "README.md").read_text(),
            re.DOTALL | re.MULTILINE,
        )
        return process_seconds(checkout, ["-c", example], JAX_ENABLE_COMPILATION_CACHE="false")
    except subprocess.SubprocessError as error:
        print(f"{step} failed on {checkout.revision}: {error}", file=sys.stderr)
        return None


def process_seconds(
    checkout: Checkout, arguments: Sequence[str], **settings: str
) -> dict[str, float]:
    """Return CPU and wall seconds of a whole process and its children."""

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before, start = cpu(), time.perf_counter()
    checkout.run(arguments, **settings)
    return {"cpu_s": cpu() - before, "wall_s": time.perf_counter() - start}


def measure_all(
    checkouts: Sequence[Checkout], steps: Sequence[str], repeats: int
) -> list[dict[str, Any]]:
    """Measure every step on each checkout in turn; return one row for each step."""
    rows = []
    for step in steps:
        found: dict[str, list[dict[str, float] | None]] = {c.revision: [] for c in checkouts}
        for repeat in range(repeats):
            for checkout in checkouts if repeat % 2 == 0 else checkouts[::-1]:
                found[checkout.revision].append(measure(checkout, step))
        seconds = {
            revision: {unit: [one[unit] for one in runs if one] for unit in ("cpu_s", "wall_s")}
            for revision, runs in found.items()
        }
        rows.append({"step": step, "seconds": seconds})
        print_row(step, [cell for each in seconds.values() for cell in map(median, each.values())])
    return rows


def median(values: Sequence[float]) -> str:
    return f"{np.median(values):.2f}" if values else "-"


def print_row(name: str, cells: Sequence[Any]) -> None:
    print(f"{name:32}", *(f"{cell:>14}" for cell in cells), flush=True)


def lines_of(checkout: Checkout) -> Mapping[str, int]:
    try:
        return checkout.report(_LINES)
    except subprocess.SubprocessError as error:
        print(f"StableHLO failed on {checkout.revision}: {error}", file=sys.stderr)
        return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--against", default="HEAD~1", help="revision to compare with (HEAD~1)")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each step (3)")
    parser.add_argument("--quick", action="store_true", help="leave the demo out")
    options = parser.parse_args()
    steps = [*STEPS, README, *([] if options.quick else [DEMO])]
    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    with checked_out(options.against) as other:
        checkouts = [other, Checkout(ROOT, f"{git('rev-parse', '--short', 'HEAD')}{changed}")]
        for checkout in checkouts:  # a new worktree has no bytecode yet
            folders = (str(checkout.folder / name) for name in ("nercc_jax", "models"))
            checkout.run(["-m", "compileall", "-q", *folders])
        names = [checkout.revision for checkout in checkouts]
        print_row("", [cell for name in names for cell in (name, "")])
        print_row("seconds", ["CPU", "wall"] * 2)
        rows = measure_all(checkouts, steps, options.repeats)
        lines = {checkout.revision: lines_of(checkout) for checkout in checkouts}
    print_row("\nlines of StableHLO", [name for name in names])
    for program in lines[names[-1]]:
        print_row(program, [lines[name].get(program, "-") for name in names])
    name = "first_calls-quick.json" if options.quick else "first_calls.json"
    summary = environment(PACKAGES) | {"before": names[0], "now": names[1]}
    write_json(RESULTS / name, {"environment": summary, "steps": rows, "stablehlo_lines": lines})


if __name__ == "__main__":
    main()
