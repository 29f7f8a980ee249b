"""What holds for the package as a whole."""

import importlib.metadata
import json
import re
import runpy
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

import nercc_jax
from nercc_models.cards import DATA_TERMS


@pytest.mark.parametrize("name", nercc_jax.__all__)
def test_public_names_are_documented(name):
    thing = getattr(nercc_jax, name)
    assert thing.__doc__
    assert thing.__doc__.strip()
    if isinstance(thing, type):
        for method, value in vars(thing).items():
            if callable(value) and not method.startswith("_"):
                documented = [getattr(base, method, None) for base in thing.__mro__]
                assert any(d is not None and d.__doc__ for d in documented), f"{name}.{method}"


def test_importing_needs_only_the_core():
    """Neither models nor plots nor SciPy's interpolation are loaded by `import nercc_jax`."""
    code = "import sys, nercc_jax; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    optional = {
        "matplotlib",
        "rich",
        "sklearn",
        "datasets",
        "torch",
        "ray",
        "nercc_models",
    }
    assert not optional & set(loaded.stdout.split())


ROOT = Path(__file__).parents[1]


def test_the_version_is_reported_by_all():
    done = subprocess.run(
        [Path(sys.executable).with_name("nercc"), "--version"], capture_output=True, text=True
    )
    versions = {done.stdout.split()[-1], importlib.metadata.version("nercc-jax")}
    assert versions == {nercc_jax.__version__}


def test_every_package_is_shipped():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = [path.parent for path in (ROOT / "nercc_jax").rglob("__init__.py")]
    names = {".".join(path.relative_to(ROOT).parts) for path in found}
    assert set(packages["packages"]) == {"nercc_models", *names}


def test_what_comes_from_others_is_named():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license-files"] == ["LICENSE", "NOTICE"]
    weights = ROOT / "models" / "weights"
    cards = {path.stem: json.loads(path.read_text()) for path in weights.glob("*.json")}
    assert cards.keys() == {path.stem for path in weights.glob("*.safetensors")}
    for name, card in cards.items():
        assert card["license"] == project["license"], name
        assert card["data_terms"] == DATA_TERMS[card["data"]], name
    notice = " ".join((ROOT / "NOTICE").read_text().split())
    for terms in DATA_TERMS.values():
        assert terms.partition("; ")[2] in notice
    for word in ("bench/h100_sxm.txtpb", "openxla/xla", "open_inference.proto", "2402.04377"):
        assert word in notice
    assert "The OpenXLA Authors" in (ROOT / "bench" / "h100_sxm.txtpb").read_text()


@pytest.mark.parametrize("home", [None, "https://example.org/them/it"])
def test_readme_has_no_link_that_leads_nowhere(home, monkeypatch):
    """On PyPI, and wherever else it is read without the folder it lies in."""
    metadata = {}
    fake = types.SimpleNamespace(setup=lambda **given: metadata.update(given))
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    for name, value in (("NERCC_HOME", home), ("NERCC_TAG", "v1")):
        monkeypatch.delenv(name, raising=False)
        if home is not None:
            monkeypatch.setenv(name, value)
    runpy.run_path(str(ROOT / "setup.py"))
    text = metadata["long_description"]
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)
    assert "```bash\n" in text
    if home is not None:
        assert f"]({home}/raw/v1/docs/how-it-works.png)" in text
        assert metadata["project_urls"]["Documentation"] == "https://them.github.io/it"
        kept = {link.removeprefix(f"{home}/blob/v1/") for link in links if "/blob/" in link}
        assert all((ROOT / link).exists() for link in kept)


@pytest.mark.parametrize("script", ["smoke", "run"])
def test_ci_names_tests_that_there_are(script):
    words = re.findall(r"tests/[\w/.-]+\.py(?:::\w+)?", (ROOT / ".ci" / script).read_text())
    assert words
    for word in words:
        path, _, name = word.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text() if name else (ROOT / path).is_file(), (
            word
        )
