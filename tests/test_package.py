"""What holds for the package as a whole."""

import subprocess
import sys

import pytest

import nercc_jax


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
        "typer",
        "datasets",
        "torch",
        "ray",
        "nercc_models",
    }
    assert not optional & set(loaded.stdout.split())
