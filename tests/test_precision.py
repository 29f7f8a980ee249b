"""What accelerators would do to the numbers, read from the programs that are sent to them.

A TPU rounds the factors of a float32 product to bfloat16, and a GPU may round them to TF32, unless
the product asks for full precision. Lowering needs no device.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nercc_jax import Berrut, Lagrange, NeRCC, Parity, Replication, Uncoded, coded_inference
from nercc_jax.evaluation import nested_objective
from nercc_jax.inference import robust_decode
from nercc_jax.splines import (
    posterior_variance,
    process_variance,
    smoothing_matrix,
    smoothing_spline,
)

T, AT, X, Y = jnp.linspace(-1, 1, 9), jnp.linspace(-1, 1, 4), jnp.ones((4, 3)), jnp.ones((9, 3))
CODES = {
    "nercc": NeRCC(4, 9),
    "nercc-exact": NeRCC(4, 9, points="interleaved", exact=True),
    "berrut": Berrut(4, 9),
    "lagrange": Lagrange(4, 9, degree=2),
    "parity": Parity(4, 6),
    "replication": Replication(4, 9),
    "uncoded": Uncoded(4),
}


def decoding(code):
    y, mask = jnp.ones((code.num_workers, 3)), jnp.ones(code.num_workers, bool)
    return lambda code, y, mask: code.try_decode(y, mask), (code, y, mask)


def objective(code):
    """Its gradient has those of encoding and of decoding, in the code and in the answers."""
    x, masks = jnp.ones((2, 4, 3)), jnp.ones((3, code.num_workers), bool)

    def error(code):
        return nested_objective(jnp.sin, code, x, masks)

    return jax.grad(error, allow_int=True), (code,)


PROGRAMS = {
    "values": (lambda t, y: smoothing_spline(t, y, 1e-3).evaluate(AT), (T, Y)),
    "matrix": (lambda t: smoothing_matrix(t, AT, 1e-3), (T,)),
    "posterior variance": (lambda t: posterior_variance(t, AT, 1e-3), (T,)),
    "process variance": (lambda t, y: process_variance(t, y, 1e-3), (T, Y)),
    "variances": (
        lambda y: CODES["nercc"].decode(y, jnp.ones(9, bool), return_uncertainty=True),
        (Y,),
    ),
    "robust": (
        lambda y: robust_decode(CODES["nercc"], y, np.ones(9, bool), max_adversaries=1),
        (Y,),
    ),
    "inference": (
        lambda x: coded_inference(jnp.sin, CODES["nercc"])(x, np.ones(9, bool)),
        (jnp.ones((4, 3)),),
    ),
    "objective's gradient": objective(CODES["nercc"]),
    **{
        f"encode, {name}": (lambda x, c=c: c.encode(x), (jnp.ones((4, 3)),))
        for name, c in CODES.items()
    },
    **{f"decode, {name}": decoding(code) for name, code in CODES.items()},
}


def lowered(program, arguments, platform="tpu"):
    return jax.jit(program).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_products_are_at_full_precision(name, platform):
    program, arguments = PROGRAMS[name]
    text = lowered(program, arguments, platform)
    products = [
        line for line in text.splitlines() if re.search(r"stablehlo\.dot(_general)?\b", line)
    ]
    rounded = [line for line in products if "[HIGHEST, HIGHEST]" not in line]
    assert not rounded
    assert "convolution" not in text
    assert "f64" not in text
    assert "callback" not in text


def test_a_plain_product_would_be_found():
    text = lowered(lambda a, b: a @ b, (jnp.ones((2, 3)), jnp.ones((3, 4))))
    assert "stablehlo.dot" in text
    assert "HIGHEST" not in text
