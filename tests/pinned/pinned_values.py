"""Codes, masks and answers that are pinned, and the script that computes values.json from them.

`PYTHONPATH=tests python tests/pinned/pinned_values.py` writes it again: all by the textbook, from a
code's points and lambdas in float64; splines are solved in 150 digits (`matrices.py`).
"""

import json
from pathlib import Path

import jax
import matrices
import numpy as np
from commands import options_of

from nercc_jax import Berrut, Lagrange, NeRCC, Parity, Replication, Uncoded
from nercc_jax.codes import BerrutSpline

VALUES = Path(__file__).with_name("values.json")
PINNED = json.loads(VALUES.read_text())
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


def masks(num_workers: int) -> np.ndarray:
    """(30, num_workers): everyone, nobody, one, two neighbours, all but one, and 24 by chance."""
    n, found = np.arange(num_workers), np.random.default_rng(num_workers).random((30, num_workers))
    found[:6] = [n >= 0, n < 0, n < 1, n // 2 == 1, n > 0, n < num_workers - 1]
    return np.concatenate([found[:6] > 0.5, found[6:] < np.linspace(0.4, 0.9, 24)[:, None]])


def answers(num_workers: int) -> np.ndarray:
    """Every worker's answer: bounded, and on no smooth curve."""
    return np.cos(1.0 + np.arange(num_workers) ** 2)


def pinned_code(code) -> dict:
    """By the textbook: the regression points, the encoder, and 30 decodes of the answers above."""
    decoders = np.stack([matrices.decoder_matrix(code, mask) for mask in masks(code.num_workers)])
    scales = np.abs(decoders).sum(axis=2).max(axis=1)
    decoded = np.round(decoders @ answers(code.num_workers), 15)
    points = [getattr(code, name, np.zeros(0)) for name in ("alpha", "beta")]
    exact = zip(("alpha", "beta", "encoder"), [*points, matrices.encoder_matrix(code)], strict=True)
    pinned = {name: np.round(np.asarray(each, float), 15).tolist() for name, each in exact}
    decoded = np.where(decoders.any(axis=2), decoded, None).tolist()
    return pinned | {"decoded": decoded, "scales": [float(f"{scale:.3g}") for scale in scales]}


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    pinned = {
        "codes": {name: pinned_code(make()) for name, make in CODES.items()},
        "options": {command: sorted(options_of(command)) for command in PINNED["options"]},
    }
    VALUES.write_text(json.dumps(pinned).replace('], "', '],\n"').replace("]], ", "]],\n") + "\n")
