"""The `nercc` command: one file a command. Only this room knows both nercc_jax and the models."""

import os
import sys

from ._process import at_work, missing_extra

_INTERRUPTED = (130, 143)  # exit codes after Ctrl-C and SIGTERM


def main() -> None:
    """Run `nercc`, or print what to install."""
    try:
        from ._app import app
    except ModuleNotFoundError as error:
        message = missing_extra(error)
        if message is None:
            raise
        sys.exit(message)
    try:
        app()
    except SystemExit as end:
        if end.code in _INTERRUPTED or at_work():
            # Python's own end would crash where JAX is interrupted while compiling (0.10).
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code or 0)  # pyright: ignore[reportArgumentType]
        raise
