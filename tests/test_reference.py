"""The API reference has every public name, once."""

import importlib
import inspect
from pathlib import Path

import pytest
from conftest import require
from test_architecture import ROOMS

DOCS = Path(__file__).parents[1] / "docs"
ROOMS_OF_USERS = [room for room in ROOMS if room not in ("cli", "arrays")]
MODULES = (*(f"nercc_jax.{room}" for room in ROOMS_OF_USERS), "nercc_models")


@pytest.fixture
def entries(monkeypatch):
    """The site's own reading of a page: names by module."""
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("_site.entries")


def public(module):
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    ]
    return sorted(names)


def test_every_public_name_has_its_entry_once(entries):
    found: dict[str, list[str]] = {}
    for page in (DOCS / "api").glob("*.md"):
        for module, names in entries.entries_of(page.read_text()).items():
            found[module] = found.get(module, []) + names
    assert sorted(found) == sorted(MODULES)
    for module, names in found.items():
        assert sorted(names) == public(importlib.import_module(module)), module


def test_every_entry_has_an_example_or_leads_to_one(entries):
    """Its own, one of the guide's, or those of what it works with, each of which leads to one."""
    require("starlette", "serve")
    led = entries.users_of(DOCS)
    for module in MODULES:
        found = importlib.import_module(module)
        for name in public(found):
            assert entries.shown(DOCS, name, getattr(found, name)) or led.get(name), (module, name)
