"""Codes, masks and answers that are pinned, and the script that computes values.json from them.

`PYTHONPATH=tests python tests/pinned/pinned_values.py` writes it again: all by the textbook, from a
code's points and lambdas in float64; splines are solved in 150 digits (`matrices.py`).
"""

import io
import json
import os
import re
import sys
from pathlib import Path
from unittest import mock

import jax
import matrices
import numpy as np
import pytest

from nercc_jax import Berrut, Lagrange, NeRCC, Parity, Replication, Uncoded
from nercc_jax.cli import main
from nercc_jax.codes import BerrutSpline

VALUES = Path(__file__).with_name("values.json")
TABLES = json.loads(VALUES.with_name("tables.json").read_text())  # by hand: names and choices
K, N = 4, 11
CODES = {
    "nercc": lambda: NeRCC(K, N),
    "nercc interleaved": lambda: NeRCC(K, N, lambda_dec=0.0, points="interleaved"),
    "nercc repeated": lambda: NeRCC(K, N, points="repeated"),
    "nercc smooth": lambda: NeRCC(K, N, lambda_enc=1e-3, lambda_dec=1e-2, points="uniform"),
    "nercc exact": lambda: NeRCC(K, N, lambda_dec=1e-3, points="interleaved", exact=True),
    "berrut": lambda: Berrut(K, N),
    "berrut spline": lambda: BerrutSpline(K, N),
    "berrut spline smooth": lambda: BerrutSpline(K, N, lambda_dec=1e-3, ends="natural"),
    "lagrange": lambda: Lagrange(K, N, degree=2),
    "parity": lambda: Parity(6, 8),
    "replication": lambda: Replication(K, N),
    "uncoded": lambda: Uncoded(K),
}
COMMANDS = ("demo", "distill", "models", "new-model", "plan", "run", "tune", "serve")


def masks(num_workers: int) -> np.ndarray:
    """(30, num_workers): everyone, nobody, one, two neighbours, all but one, and 24 by chance."""
    n, found = np.arange(num_workers), np.random.default_rng(num_workers).random((30, num_workers))
    found[:6] = [n >= 0, n < 0, n < 1, n // 2 == 1, n > 0, n < num_workers - 1]
    return np.concatenate([found[:6] > 0.5, found[6:] < np.linspace(0.4, 0.9, 24)[:, None]])


def answers(num_workers: int) -> np.ndarray:
    """Every worker's answer: bounded, and on no smooth curve."""
    return np.cos(1.0 + np.arange(num_workers) ** 2)


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


def pinned_code(code) -> dict:
    """By the textbook: the regression points, the encoder, and 30 decodes of the answers above."""
    decoders = [matrices.decoder_matrix(code, mask) for mask in masks(code.num_workers)]
    found = [
        np.where(each.any(axis=1), np.round(each @ answers(code.num_workers), 15), None).tolist()
        for each in decoders
    ]
    scales = [float(f"{np.abs(decoder).sum(axis=1).max():.3g}") for decoder in decoders]
    exact = {name: getattr(code, name, np.zeros(0)) for name in ("alpha", "beta")}
    exact["encoder"] = matrices.encoder_matrix(code)
    shown = {name: np.round(np.asarray(each, float), 15).tolist() for name, each in exact.items()}
    return shown | {"decoded": found, "scales": scales}


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    pinned = {
        "codes": {name: pinned_code(make()) for name, make in CODES.items()},
        "options": {command: sorted(options_of(command)) for command in COMMANDS},
    }
    VALUES.write_text(json.dumps(pinned).replace('], "', '],\n"').replace("]], ", "]],\n") + "\n")
