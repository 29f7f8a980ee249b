"""Transformations on transformations, while stragglers hold anything at all.

For every code and way of inference: gradient over vmap, vmap over gradients, derivatives of
gradients, scan, checkpoint, jit of all, each compiled once and run with NaN, infinities and 1e30 in
the stragglers' places. The oracle is the product of NumPy's matrices with cleaned answers, and
central differences of it.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from nercc_jax import (
    AbstractCode,
    Berrut,
    Lagrange,
    NeRCC,
    Parity,
    Replication,
    Scheme,
    Uncoded,
    coded_inference,
)
from nercc_jax.codes import BerrutSpline
from nercc_jax.surrogates import Surrogate

BAD = (np.nan, np.inf, -np.inf, 1e30)
CODES = {
    "nercc": lambda: NeRCC(3, 6),
    "nercc-exact": lambda: NeRCC(3, 6, lambda_dec=1e-3, points="interleaved", exact=True),
    "berrut": lambda: Berrut(3, 6),
    "berrut-spline": lambda: BerrutSpline(3, 6, lambda_dec=1e-4),
    "lagrange": lambda: Lagrange(2, 6, degree=2),
    "parity": lambda: Parity(4, 6),
    "replication": lambda: Replication(3, 6),
    "uncoded": lambda: Uncoded(3),
}
MASKS = np.array([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]], bool)


def spoil(y, masks, bad):
    return jnp.where(jnp.asarray(masks)[..., None], y, jnp.asarray(bad, y.dtype))


def one(code: AbstractCode, y, mask):
    decoded = code.try_decode(y, mask)
    return jnp.sum(jnp.where(decoded.recovered[:, None], jnp.sin(decoded.predictions), 0))


def several(code, y, masks):
    return jnp.sum(jax.vmap(one, (None, 0, 0))(code, y, masks))


@eqx.filter_jit
def compositions(code, y, masks, direction, every_way):
    """First derivatives in code and answers in several ways, and the second along a direction."""
    leaves, rest = eqx.partition(code, eqx.is_inexact_array)

    def total(leaves, y):
        return several(eqx.combine(leaves, rest), y, masks)

    def alone(leaves, y, mask):
        return one(eqx.combine(leaves, rest), y, mask)

    gradient = jax.grad(total, (0, 1))
    whole, along = jax.jvp(gradient, (leaves, y), direction)  # compiled once, not twice
    if not every_way:
        return {"gradient over vmap": whole}, along
    each = jax.vmap(jax.grad(alone, (0, 1)), (None, 0, 0))(leaves, y, masks)

    def step(state, row):
        here = jax.grad(alone)(leaves, *row)
        return jax.tree.map(jnp.add, state, here), None

    zeros = jax.tree.map(jnp.zeros_like, leaves)
    return {
        "gradient over vmap": whole,
        "vmap over gradients": (jax.tree.map(lambda leaf: jnp.sum(leaf, 0), each[0]), each[1]),
        "checkpoint": jax.grad(jax.checkpoint(total), (0, 1))(leaves, y),
        "scan": (jax.lax.scan(step, zeros, (y, masks))[0], whole[1]),
    }, along


def close(got, wanted, tolerance):
    """Leaf by leaf, relative to the leaf's largest entry."""
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        scale = max(float(np.max(np.abs(theirs), initial=0)), 1e-3)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * n.endswith("exact")) for n in CODES]
)
def test_codes(name):
    code = CODES[name]()
    masks = MASKS[:, : code.num_workers]
    y = jnp.asarray(np.random.default_rng(0).normal(size=(2, code.num_workers, 2)), float)
    leaves = eqx.filter(code, eqx.is_inexact_array)
    direction = (jax.tree.map(lambda leaf: 0.01 * jnp.ones_like(leaf), leaves), jnp.ones_like(y))
    # These programs differ from NeRCC's in the matrix only, which all four ways share.
    every_way = name not in ("nercc-exact", "berrut-spline")
    ways, along = compositions(code, spoil(y, masks, 0), masks, direction, every_way)
    for got in ways.values():
        close(got, ways["gradient over vmap"], 2e-4)  # other programs round otherwise
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((ways, along)))
    for bad in BAD:
        spoilt, spoilt_along = compositions(code, spoil(y, masks, bad), masks, direction, every_way)
        close(spoilt, ways, 1e-5)
        close(spoilt_along, along, 1e-5)
    # Stragglers have no influence, and answers that of the matrix.
    slope = np.asarray(ways["gradient over vmap"][1])
    np.testing.assert_array_equal(slope[~masks], 0)
    for answers, mask, got in zip(np.asarray(y, np.float64), masks, slope, strict=True):
        matrix = np.asarray(code.decoder_matrix(mask), np.float64)
        clean = np.where(mask[:, None], answers, 0)
        kept = np.asarray(code.recovered(mask))[:, None]
        expected = matrix.T @ np.where(kept, np.cos(matrix @ clean), 0)
        np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nercc", "berrut"])  # an exact code jumps where a beta moves
def test_derivatives_in_the_codes_numbers_are_central_differences(name):
    with jax.enable_x64(True):
        code = CODES[name]()
        y = jnp.asarray(np.random.default_rng(0).normal(size=(2, code.num_workers, 2)))
        leaves, rest = eqx.partition(code, eqx.is_inexact_array)
        flat, back = ravel_pytree(leaves)
        # Of one way: `test_codes` holds the others to it.
        gradient = eqx.filter_jit(eqx.filter_grad(several))
        slopes = gradient(code, spoil(y, MASKS, np.nan), MASKS)
        slope, _ = ravel_pytree(eqx.filter(slopes, eqx.is_inexact_array))
        matrices = jax.jit(
            lambda flat: jax.vmap(eqx.combine(back(flat), rest).decoder_matrix)(MASKS)
        )

        def plain(flat):
            clean = np.where(MASKS[..., None], y, 0)
            return np.sum(np.sin(np.asarray(matrices(jnp.asarray(flat))) @ clean))

        for place, value in enumerate(np.asarray(flat)):
            width = 1e-6 * max(abs(float(value)), 1e-4)
            up, down = (np.array(flat) for _ in range(2))
            up[place] += width
            down[place] -= width
            if abs(value) in (0.0, 1.0):
                continue  # an end of the range, where there is one side only
            expected = (plain(up) - plain(down)) / (2 * width)
            np.testing.assert_allclose(slope[place], expected, rtol=1e-4, atol=1e-5)


def net(x, w):
    return jnp.tanh(x @ w)


def mesh():
    return jax.make_mesh((4,), ("workers",), axis_types=(jax.sharding.AxisType.Auto,))


WAYS = {
    "code": lambda mesh: lambda code: coded_inference(net, code, mesh=mesh),
    "scheme": lambda mesh: (
        lambda code: coded_inference(
            net, Scheme(code, Surrogate(lambda x: 0.5 * x[:, :2])), grouped=True, mesh=mesh
        )
    ),
}


@functools.cache
def by_hand(way):
    """Gradients in code, data points and model for a mask, from what the way promises to be."""

    @eqx.filter_jit
    @eqx.filter_grad
    def gradients(args, mask):
        code, x, w = args

        def of_group(x):
            y = net(code.encode(x), w)
            if way == "code":
                return code.decode(y, mask)
            cheap = 0.5 * code.encode(x)[:, :2]
            return 0.5 * x[:, :2] + code.decode(y - cheap, mask)

        return jnp.sum(jnp.sin(jax.vmap(of_group)(x)))

    return gradients


@pytest.mark.slow
@pytest.mark.parametrize(("way", "sharded"), [("code", True), ("scheme", False)])
def test_inference(way, sharded):
    """Gradients in model, code and data points, over masks, jitted, with workers whose answers are
    not finite, against the same by hand."""
    code = NeRCC(3, 6, lambda_dec=1e-3)
    make = WAYS[way](mesh() if sharded else None)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4)), float)
    w = jnp.asarray(np.random.default_rng(2).normal(size=(4, 2)), float)

    def loss(code, x, w, mask):
        return jnp.sum(jnp.sin(make(code)(x, mask, w)))

    first, second = (by_hand(way)((code, x, w), mask) for mask in MASKS)

    @eqx.filter_jit
    @eqx.filter_grad
    def over_masks(args):
        return jnp.sum(jax.vmap(lambda mask: loss(*args, mask))(jnp.asarray(MASKS)))

    close(over_masks((code, x, w)), jax.tree.map(jnp.add, first, second), 1e-4)
    # Outside jit too, in what is closed over as well.
    close(jax.grad(lambda w: loss(code, x, w, MASKS[0]))(w), first[2], 1e-4)
    if way == "code":
        tuned = jax.grad(lambda dec: loss(code.replace(lambda_dec=dec), x, w, MASKS[0]))
        close(tuned(code.lambda_dec), first[0].lambda_dec, 1e-3)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_worker_that_breaks_reaches_no_gradient(sharded):
    """One worker's coded data point makes the model overflow; it is as if it had straggled."""
    code = NeRCC(3, 6, lambda_dec=1e-3)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 4)), float)
    w = jnp.asarray(np.random.default_rng(2).normal(size=(4, 2)), float)
    first = float(jnp.max(jnp.abs(code.encode(x[0])[0])))

    def fragile(batch, w, bad):
        broken = jnp.all(jnp.abs(batch) <= first, axis=1) & (jnp.abs(batch).max(axis=1) == first)
        return jnp.where(broken[:, None] & bad, jnp.nan, net(batch, w))

    infer = coded_inference(fragile, code, mesh=mesh() if sharded else None)

    def loss(w, mask, bad):
        return jnp.sum(jnp.sin(infer(x, mask, w, bad)))

    gradient = jax.jit(jax.grad(loss))
    everyone, others = np.ones(6, bool), np.arange(6) > 0
    got = gradient(w, everyone, jnp.asarray(True))
    assert np.isfinite(got).all()
    close(got, gradient(w, others, jnp.asarray(False)), 1e-5)


def test_a_scheme_is_jitted_as_it_is():
    infer = coded_inference(lambda x: jnp.sin(x), Scheme(NeRCC(3, 6), order="pixels"))
    x = jnp.linspace(0, 1, 12)[:, None]
    close(jax.jit(infer)(x, MASKS[0]), infer(x, MASKS[0]), 1e-6)
