"""The `nercc` command in this process, as its entry point runs it."""

import io
import os
import re
import sys
import types
from collections.abc import Mapping
from unittest import mock

from nercc_jax.cli import main


def invoke(*arguments: str, env: Mapping[str, str] | None = None) -> types.SimpleNamespace:
    """What `nercc` with these arguments prints (`output`), its `exit_code`, and its `exception`."""
    shown, argv = io.StringIO(), ["nercc", *arguments]
    code, error = 0, None
    with (
        mock.patch.multiple(sys, argv=argv, stdout=shown, stderr=shown),
        mock.patch.dict(os.environ, {"COLUMNS": "200"} | dict(env or {})),
        mock.patch.object(os, "_exit", sys.exit),  # where a thread of other tests is still at work
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException as raised:  # as a traceback would end it
            code, error = 1, raised
    return types.SimpleNamespace(exit_code=code, output=shown.getvalue(), exception=error)


def run_command(*arguments: str) -> tuple[int, str]:
    """The exit code of `nercc` with these arguments, and what it prints."""
    found = invoke(*arguments)
    if found.exception is not None:
        raise found.exception
    return found.exit_code, found.output


def options_of(command: str) -> set[str]:
    """The names in the first column of its `--help`."""
    found = re.findall(r"^[│ *]*((?:--[\w-]+[, ]+)+)", run_command(command, "--help")[1], re.M)
    return set(re.findall(r"--[\w-]+", " ".join(found)))
