"""Docstrings and names that a stranger understands, and examples that run."""

import ast
import doctest
import importlib
import inspect
import io
import pkgutil
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import blocks
from test_architecture import ROOMS

ROOT = Path(__file__).parents[1]
FOLDERS = ("nercc_jax", "models", "bench")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]

# Public names that are defined twice in nercc_jax, each with its reason.
TWICE: dict[str, str] = {}
# Words of a language that only its authors spoke; each has a standard term now.
GONE = {
    *("AbstractCrew", "Books", "Desk", "Doubt", "Exam", "Foreseen", "Guess", "Known", "Lesson"),
    *("Moves", "Outbox", "Packed", "Parcel", "Plane", "QueryDoubt", "Rescue", "Seat", "Study"),
    *("Tutor", "Whereabouts", "alike_beside", "alike_only", "conclude", "curious", "heard"),
    *("hungry", "judge", "patience", "told"),
}
FRAGMENT = re.compile(r"(What|Who|Whether|How|Of|Which|Such|By|That)\b")
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def definitions(tree: ast.AST) -> Iterator[Definition]:
    for node in ast.walk(tree):
        if isinstance(node, Definition):
            yield node


TREES = {path: ast.parse(path.read_text()) for path in FILES}


def test_docstrings_are_sentences():
    total, fragments = 0, []
    for path, tree in TREES.items():
        for node in (tree, *definitions(tree)):
            if text := ast.get_docstring(node):
                total += 1
                if FRAGMENT.match(text):
                    fragments.append(f"{label(path)}: {text.splitlines()[0]}")
    assert total > 1500
    assert len(fragments) < total / 100, fragments


def test_a_public_name_has_one_meaning():
    places: dict[str, list[str]] = {}
    for path, tree in TREES.items():
        if path.is_relative_to(ROOT / "nercc_jax"):
            for node in tree.body:
                if isinstance(node, Definition) and not node.name.startswith("_"):
                    places.setdefault(node.name, []).append(label(path))
    twice = {name: where for name, where in places.items() if len(set(where)) > 1}
    assert twice.keys() == TWICE.keys(), twice


def test_documented_arguments_are_the_functions_own():
    for path, node in ((path, node) for path, tree in TREES.items() for node in definitions(tree)):
        documented = section(ast.get_docstring(node) or "", "Args")
        if isinstance(node, ast.ClassDef) or documented is None:
            continue
        given = node.args
        own = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        own += [f"*{given.vararg.arg}"] if given.vararg else []
        own += [f"**{given.kwarg.arg}"] if given.kwarg else []
        assert {*documented} == {*own} - {"self", "cls"}, f"{label(path)}: {node.name}"


def section(docstring: str, title: str) -> list[str] | None:
    """Return the names that a section of a docstring explains; None without the section."""
    found = re.search(rf"^{title}:\n((?:    .*\n|\n)*)", docstring + "\n", re.MULTILINE)
    if found is None:
        return None
    return re.findall(r"^    (\*{0,2}\w+)(?: \([^)]*\))?:", found[1], re.MULTILINE)


def test_words_that_are_gone_stay_gone():
    for path in FILES:
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        words = {token.string for token in tokens if token.type == tokenize.NAME}
        assert not words & GONE, label(path)


# -- Every example in a docstring runs, and prints what it says ------------------------------------


# What needs an extra is imported by its own tests.
WITH_EXTRAS = {"serving", "cli"}


def examples():
    for room in sorted({*ROOMS} - WITH_EXTRAS):
        package = importlib.import_module(f"nercc_jax.{room}")
        for found in pkgutil.iter_modules(package.__path__, f"nercc_jax.{room}."):
            module = importlib.import_module(found.name)
            for example in doctest.DocTestFinder(exclude_empty=True).find(module, found.name):
                if example.examples or "```python" in (example.docstring or ""):
                    yield pytest.param(example, id=example.name.removeprefix("nercc_jax."))


@pytest.mark.parametrize("example", [*examples()])
def test_it_runs(example):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report = []
    runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)
    text = inspect.cleandoc(example.docstring)
    for block in blocks(text, "python"):
        exec(compile(block, example.name, "exec"), {})


def test_what_people_start_with_has_examples():
    found = {param.id.rpartition(".")[2] for param in examples()}
    assert found >= {"AbstractCode", "coded_inference", "Scheme", "parametrize"}
