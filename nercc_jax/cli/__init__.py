"""The `nercc` command. One file a command; the only place that knows nercc_jax and the models."""

import os
import sys

_EXTRA = ("matplotlib", "rich", "safetensors", "sklearn", "typer")
_INTERRUPTED = 130  # exit code after Ctrl-C


def main() -> None:
    """Runs `nercc`, or says what to install."""
    try:
        from ._app import app
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        sys.exit(f"nercc needs {error.name}, which is missing: pip install 'nercc-jax[demo]'")
    try:
        app()
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            # Python's own end would crash where JAX was interrupted while compiling (0.10).
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_INTERRUPTED)
        raise
