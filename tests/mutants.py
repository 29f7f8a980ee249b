"""The power of the tests: how many random faults in `nercc_jax` they find.

    .venv/bin/python tests/mutants.py --number 200 --seed 0

The default tests run once with coverage, which says which tests execute a line. A mutant is one
change of one expression, drawn at random from all rooms. The tests that execute its line run on a
copy of the tree, the quickest first, until one fails; a mutant that none fails on has survived.
What happens in other processes only, such as in servers and Ray workers, is not seen by coverage:
such mutants are counted apart. The result is bench/results/mutants.json.
"""

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import coverage

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
FOLDER = ROOT / "build" / "mutants"
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum",
         "maximum": "minimum", "zeros": "ones", "ones": "zeros"}  # fmt: skip


class Mutant(NamedTuple):
    """A change of the source of one expression or statement."""

    file: str
    line: int
    begin: int  # of the text that changes, in the file
    end: int
    before: str
    after: str


def changed(node: ast.AST) -> ast.AST | None:
    """Return a copy of a node with one change; None where there is none to make."""
    other = copy.deepcopy(node)
    match other:
        case ast.Compare(ops=[operator]) if type(operator) in COMPARISONS:
            other.ops = [COMPARISONS[type(operator)]()]
        case ast.BinOp() | ast.BoolOp() if type(other.op) in OPERATORS:
            other.op = OPERATORS[type(other.op)]()
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            other = other.operand
        case ast.Constant(value=bool(value)):
            other.value = not value
        case ast.Constant(value=int(value)):
            other.value = value + 1
        case ast.Constant(value=float(value)):
            other.value = 2 * value if value else 1.0
        case ast.Name(id=name) if name in NAMES:
            other.id = NAMES[name]
        case ast.Attribute(attr=name) if name in NAMES:
            other.attr = NAMES[name]
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            other = ast.Pass()
        case ast.IfExp():
            other.body, other.orelse = other.orelse, other.body
        case _:
            return None
    return other


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of functions' bodies that run: no annotations, defaults, messages or docs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in node.body:
                yield from _inside(statement)
        elif isinstance(node, ast.ClassDef):
            yield from executed(node)


def _inside(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "args") and not isinstance(
            node, ast.Call
        ):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _inside(child)


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Yield every mutant of a file."""
    text = path.read_text()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    source = text.encode()
    for node in executed(ast.parse(text)):
        if not isinstance(node, ast.expr | ast.stmt) or (other := changed(node)) is None:
            continue
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        after = ast.unparse(other)
        if isinstance(other, ast.expr):
            after = f"({after})"
        name = str(path.relative_to(ROOT))
        yield Mutant(name, node.lineno, begin, end, source[begin:end].decode(), after)


def measure_coverage(files: list[str]) -> None:
    """Run the default tests, or some files, and keep which of them execute each line."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    words = ["-q", "-n", "2", "-p", "no:randomly", "--cov=nercc_jax", "--cov-context=test"]
    environment = os.environ | {"COVERAGE_FILE": str(FOLDER / "coverage")}
    command = [sys.executable, "-m", "pytest", *words, "--cov-report=", "--durations=0", *files]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    (FOLDER / "tests.log").write_text(done.stdout)


def seconds_of_tests() -> dict[str, float]:
    """Return how long each test took when coverage was measured."""
    seconds = {}
    for line in (FOLDER / "tests.log").read_text().splitlines():
        parts = line.split(maxsplit=2)
        if len(parts) == 3 and parts[1] in ("call", "setup") and parts[0].endswith("s"):
            with contextlib.suppress(ValueError):
                seconds[parts[2]] = seconds.get(parts[2], 0.0) + float(parts[0][:-1])
    return seconds


def verdict(mutant: Mutant, tests: list[str], limit: float) -> dict[str, object]:
    """Run a mutant's tests on a copy of the tree; return what became of it."""
    told = {
        "file": mutant.file, "line": mutant.line, "before": mutant.before, "after": mutant.after,
        "tests": len(tests),
    }  # fmt: skip
    if not tests:
        return told | {"end": "not executed in the tests' process"}
    with tempfile.TemporaryDirectory() as room:
        for name in ("nercc_jax", "models", "tests", "bench", "docs"):
            ignored = shutil.ignore_patterns("__pycache__", "*.json", "measured")
            shutil.copytree(ROOT / name, Path(room) / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", room)
        path = Path(room) / mutant.file
        source = path.read_bytes()
        after = mutant.after.encode()
        path.write_bytes(source[: mutant.begin] + after + source[mutant.end :])
        environment = os.environ | {"PYTHONPATH": room}
        cache = ["-o", f"cache_dir={FOLDER / 'cache'}"]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", *cache, "--tb=line"]
        command += ["-m", "slow or not slow", *tests]
        try:
            done = subprocess.run(
                command, cwd=room, env=environment, capture_output=True, text=True,
                timeout=limit, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return told | {"end": "killed", "by": f"no end within {limit:g} s"}
    if done.returncode == 0:
        return told | {"end": "survived"}
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return told | {"end": "killed", "by": (failed or ["collection"])[0][:160]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--number", type=int, default=200, help="mutants (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="at the same time (default: 2)")
    parser.add_argument("--rooms", nargs="+", help="of the mutants (default: all)")
    parser.add_argument("--files", nargs="+", default=[], help="of tests (default: all)")
    parser.add_argument("--tests", type=int, default=40, help="of each mutant, at most")
    parser.add_argument("--seconds", type=float, default=240.0, help="of each mutant's tests")
    parser.add_argument("--known", action="store_true", help="coverage is there from before")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "mutants.json")
    options = parser.parse_args()

    from report import environment  # of bench/; late: it imports JAX

    if not options.known:
        measure_coverage(options.files)
    data = coverage.CoverageData(str(FOLDER / "coverage"))
    data.read()
    lines = {
        str(Path(file).relative_to(ROOT)): data.contexts_by_lineno(file)
        for file in data.measured_files()
    }
    seconds = seconds_of_tests()
    files = sorted((ROOT / "nercc_jax").rglob("*.py"))
    if options.rooms:
        files = [file for file in files if file.relative_to(ROOT).parts[1] in options.rooms]
    everything = [mutant for file in files for mutant in mutants_of(file)]
    drawn = random.Random(options.seed).sample(everything, options.number)

    def run(mutant: Mutant) -> dict[str, object]:
        contexts = lines.get(mutant.file, {}).get(mutant.line, [])
        names = {context.partition("|")[0] for context in contexts if context}
        tests = sorted(names, key=lambda name: (seconds.get(name, 60.0), name))
        return verdict(mutant, tests[: options.tests], options.seconds)

    counts: collections.Counter[object] = collections.Counter()
    result = {
        "environment": environment("pytest", "coverage"), "rooms": options.rooms or "all",
        "files": options.files or "all", "possible": len(everything), "seed": options.seed,
        "counts": counts, "mutants": [],
    }  # fmt: skip
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for number, end in enumerate(pool.map(run, drawn), 1):
            counts[end["end"]] += 1
            result["mutants"].append(end)
            print(f"{number:4} {end['end']:10} {end['file']}:{end['line']}", flush=True)
            # After each, so that a run that is stopped leaves the first ones, which are drawn, too.
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(dict(counts))


if __name__ == "__main__":
    main()
