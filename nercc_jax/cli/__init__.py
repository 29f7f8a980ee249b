"""The `nercc` command. One file a command; the only place that knows nercc_jax and the models."""

import sys

_EXTRA = ("matplotlib", "rich", "safetensors", "sklearn", "typer")


def main() -> None:
    """Runs `nercc`, or says what to install."""
    try:
        from ._app import app
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        sys.exit(f"nercc needs {error.name}, which is missing: pip install 'nercc-jax[demo]'")
    app()
