"""Codes, masks and answers that are pinned, and the script that computes values.json from them.

`PYTHONPATH=tests python tests/pinned/pinned_values.py` writes it again: all by the textbook, from a
code's points and lambdas in float64; splines are solved in 150 digits (`matrices.py`).
"""

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from nercc_jax import Berrut, Lagrange, NeRCC, Parity, Replication, Uncoded
from nercc_jax.cli import main
from nercc_jax.codes import BerrutSpline

VALUES, TABLES = (Path(__file__).with_name(f"{name}.json") for name in ("values", "tables"))
TABLES = json.loads(TABLES.read_text())  # by hand: names, choices and statuses
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
    shown, code = io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["nercc", "--no-compilation-cache", *arguments]),
        mock.patch.dict(os.environ, COLUMNS="200"),
        mock.patch.object(os, "_exit", sys.exit),  # where a thread of other tests is still at work
        contextlib.redirect_stdout(shown),
        contextlib.redirect_stderr(shown),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return code, shown.getvalue()


def options_of(command: str) -> set[str]:
    """The names in the first column of its `--help`."""
    lines = run_command(command, "--help")[1].splitlines()
    heads = [re.match(r"[│ *]*((?:--[\w-]+[, ]+)+)", line) for line in lines]
    return {name for head in heads if head for name in re.findall(r"--[\w-]+", head[1])}


def pinned_code(code) -> dict:
    """By the textbook: the regression points, the encoder, and 30 decodes of the answers above."""
    import matrices

    y, found, scales = answers(code.num_workers), [], []
    for mask in masks(code.num_workers):
        decoder = matrices.decoder_matrix(code, mask)
        lost = ~decoder.any(axis=1)
        found.append(np.where(lost, None, np.round(decoder @ y, 15)).tolist())
        scales.append(float(f"{np.abs(decoder).sum(axis=1).max():.3g}"))
    points = {name: getattr(code, name, np.zeros(0)) for name in ("alpha", "beta")}
    exact = points | {"encoder": matrices.encoder_matrix(code)}
    shown = {name: np.round(np.asarray(each, float), 15).tolist() for name, each in exact.items()}
    return shown | {"decoded": found, "scales": scales}


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    pinned = {
        "codes": {name: pinned_code(make()) for name, make in CODES.items()},
        "options": {command: sorted(options_of(command)) for command in COMMANDS},
    }
    lines = json.dumps(pinned, ensure_ascii=False).replace('], "', '],\n"').replace("]], ", "]],\n")
    VALUES.write_text(lines + "\n")
