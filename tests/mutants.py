"""The power of the tests: how many random faults in `nercc_jax` they find.

    .venv/bin/python tests/mutants.py --number 200 --seed 0

All tests, slow ones too, run once with coverage, on a copy of the tree; it says which tests execute
a line. A mutant is one change of one expression, drawn at random from all rooms. Tests that execute
its line run on a copy, first the quickest ones, then those that execute the fewest lines of the
package, then others of their files: what tests share, a fixture or a traced program, is executed in
the first of them only. A mutant that none fails on has survived. Tests that fail on the copy as it
is are left out. What happens in other processes only, such as in servers and Ray workers, is not
seen by coverage: such mutants are counted apart. The result is bench/results/mutants.json.
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


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """Yield a copy of the files that git knows."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    with tempfile.TemporaryDirectory() as room:
        for name in filter(None, listed.stdout.split("\0")):
            (path := Path(room) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, path, follow_symlinks=False)
        yield Path(room)


def run_tests(room: Path, words: list[str], limit: float | None = None) -> tuple[int, str]:
    """Run tests on a copy of the tree; return pytest's exit code and output."""
    environment = os.environ | {"PYTHONPATH": str(room), "COVERAGE_FILE": str(FOLDER / "coverage")}
    cache = ["-o", f"cache_dir={FOLDER / 'cache'}"]
    command = [sys.executable, "-m", "pytest", "-q", *cache, "-m", "slow or not slow", *words]
    done = subprocess.run(
        command, cwd=room, env=environment, capture_output=True, text=True, timeout=limit,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def measure_coverage(files: list[str]) -> None:
    """Run all tests, or some files, and keep which of them execute each line."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    words = ["-n", "2", "--cov=nercc_jax", "--cov-context=test", "--cov-report=", "--durations=0"]
    with copied() as room:
        _, told = run_tests(room, [*words, *files])
    (FOLDER / "tests.log").write_text(f"{room}\n{told}")


class Tests(NamedTuple):
    """What the run with coverage says of tests: by file and line, their seconds, lines, failures.

    A test without seconds took less than pytest shows, 5 ms.
    """

    by_line: dict[str, dict[int, list[str]]]
    seconds: dict[str, float]
    lines: collections.Counter[str]
    failed: set[str]

    @classmethod
    def read(cls) -> "Tests":
        room, *log = (FOLDER / "tests.log").read_text().splitlines()
        data = coverage.CoverageData(str(FOLDER / "coverage"))
        data.read()
        by_line = {
            str(Path(file).relative_to(room)): data.contexts_by_lineno(file)
            for file in data.measured_files()
        }
        seconds, lines = collections.defaultdict[str, float](float), collections.Counter[str]()
        for line in log:
            parts = line.split(maxsplit=2)
            if len(parts) == 3 and parts[1] in ("call", "setup") and parts[0].endswith("s"):
                with contextlib.suppress(ValueError):
                    seconds[parts[2]] += float(parts[0][:-1])
        for contexts in (each for of_file in by_line.values() for each in of_file.values()):
            lines.update({context.partition("|")[0] for context in contexts})
        failed = {line.split()[1] for line in log if line.startswith(("FAILED ", "ERROR tests"))}
        return cls(by_line, dict(seconds), lines, failed)

    def of(self, mutant: Mutant, first: int, budget: float) -> list[str]:
        """Return the tests to run: the `first` quickest, then the most specific, in a time.

        Others of their files follow, as many as another such time allows.
        """
        contexts = self.by_line.get(mutant.file, {}).get(mutant.line, [])
        names = {context.partition("|")[0] for context in contexts} - self.failed - {""}
        quickest = sorted(names, key=lambda name: (self.seconds.get(name, 0.0), name))
        files = {name.partition("::")[0] for name in names}
        others = {name for name in self.lines if name.partition("::")[0] in files}
        chosen = quickest[:first]
        for further in (quickest[first:], others - names - self.failed):
            spent = 0.0
            for name in sorted(further, key=lambda name: (self.lines[name], name)):
                if spent + self.seconds.get(name, 0.0) <= budget:
                    chosen.append(name)
                    spent += self.seconds.get(name, 0.0)
        return chosen


def verdict(mutant: Mutant, tests: list[str], limit: float) -> dict[str, object]:
    """Run a mutant's tests on a copy of the tree; return what became of it."""
    told = {
        "file": mutant.file, "line": mutant.line, "before": mutant.before, "after": mutant.after,
        "tests": len(tests),
    }  # fmt: skip
    if not tests:
        return told | {"end": "not executed in the tests' process"}
    with copied() as room:
        source, after = (path := room / mutant.file).read_bytes(), mutant.after.encode()
        path.write_bytes(source[: mutant.begin] + after + source[mutant.end :])
        try:
            code, shown = run_tests(room, ["-x", "-n", "0", "--tb=line", *tests], limit)
        except subprocess.TimeoutExpired:
            return told | {"end": "killed", "by": f"no end within {limit:g} s"}
    if code == 0:
        return told | {"end": "survived"}
    failed = [line for line in shown.splitlines() if line.startswith(("FAILED ", "ERROR tests"))]
    return told | {"end": "killed", "by": (failed or ["collection"])[0][:160]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--number", type=int, default=200, help="mutants (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="at the same time (default: 2)")
    parser.add_argument("--rooms", nargs="+", help="of the mutants (default: all)")
    parser.add_argument("--files", nargs="+", default=[], help="of tests (default: all)")
    parser.add_argument("--tests", type=int, default=40, help="the quickest of each mutant")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of further tests")
    parser.add_argument("--seconds", type=float, default=400.0, help="of all tests of a mutant")
    parser.add_argument("--known", action="store_true", help="coverage is there from before")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "mutants.json")
    options = parser.parse_args()

    from report import environment  # of bench/; late: it imports JAX

    if not options.known:
        measure_coverage(options.files)
    known, files = Tests.read(), sorted((ROOT / "nercc_jax").rglob("*.py"))
    if options.rooms:
        files = [file for file in files if file.relative_to(ROOT).parts[1] in options.rooms]
    everything = [mutant for file in files for mutant in mutants_of(file)]
    drawn = random.Random(options.seed).sample(everything, options.number)

    def run(mutant: Mutant) -> dict[str, object]:
        return verdict(mutant, known.of(mutant, options.tests, options.budget), options.seconds)

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
