"""Every example in a docstring runs, and prints what it says."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
from pages import blocks
from test_architecture import ROOMS

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
