"""The `nercc` command in this process, as its entry point runs it."""

import io
import os
import re
import sys
from unittest import mock

import pytest

from nercc_jax.cli import main


def run_command(*arguments: str) -> tuple[int, str]:
    """The exit code of `nercc` with these arguments, and what it prints."""
    shown, argv = io.StringIO(), ["nercc", "--no-compilation-cache", *arguments]
    with (
        mock.patch.multiple(sys, argv=argv, stdout=shown, stderr=shown),
        mock.patch.dict(os.environ, COLUMNS="200"),
        mock.patch.object(os, "_exit", sys.exit),  # where a thread of other tests is still at work
        pytest.raises(SystemExit) as end,
    ):
        main()
    return int(end.value.code or 0), shown.getvalue()


def options_of(command: str) -> set[str]:
    """The names in the first column of its `--help`."""
    found = re.findall(r"^[│ *]*((?:--[\w-]+[, ]+)+)", run_command(command, "--help")[1], re.M)
    return set(re.findall(r"--[\w-]+", " ".join(found)))
