"""Matrices that are made once: that it shows nowhere.

Where a program is compiled around them the code is BACC's, whose own is small.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jaxtyping import Array

from nercc_jax import AbstractCode, Berrut, NeRCC, Uncoded, coded_inference
from nercc_jax.codes import BerrutSpline

MASK = np.array([1, 1, 0, 1, 1, 1], bool)
OTHER = np.array([0, 1, 1, 1, 1, 1], bool)
X = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")


def infer(code, **options):
    return coded_inference(jnp.sin, code, **options)


@eqx.filter_jit
def in_program(code, mask):
    return code.encoder_matrix(), code.decoder_matrix(jnp.asarray(mask))


def matrices(code, mask):
    return tuple(np.asarray(each) for each in in_program(code, mask))


def by_hand(code, mask, x=X):
    encoder, decoder = matrices(code, mask)
    return decoder.astype(float) @ np.sin(encoder.astype(float) @ x)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 9])
def test_groups_with_sets_of_their_own(count):
    """Few different sets are looked up, many are made at once in the program: all the same."""
    code = Berrut(3, 6)
    masks = ~np.eye(6, dtype=bool)[np.arange(9) % count % 6]
    masks[8] &= OTHER if count == 9 else True
    x = np.random.default_rng(1).normal(size=(9, 3, 4)).astype("float32")
    got = infer(code)(x, masks)
    wanted = [by_hand(code, mask, group) for mask, group in zip(masks, x, strict=True)]
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("way", ["eager", "jit", "vmap", "grad", "scan", "checkpoint", "code"])
def test_whatever_is_traced(way):
    code = Berrut(3, 6)
    run = infer(code)
    if way == "grad":
        got = jax.grad(lambda x: jnp.sum(run(x, MASK)))(jnp.asarray(X))
        encoder, decoder = matrices(code, MASK)
        wanted = encoder.T @ (decoder.sum(0)[:, None] * np.cos(encoder @ X))
    else:
        ways = {
            "eager": lambda: run(X, MASK),
            "jit": lambda: jax.jit(lambda x: run(x, MASK))(X),
            "vmap": lambda: jax.vmap(lambda x: run(x, MASK))(X[None])[0],
            "scan": lambda: jax.lax.scan(lambda _, x: (None, run(x, MASK)), None, X[None])[1][0],
            "checkpoint": lambda: jax.checkpoint(lambda x: run(x, MASK))(X),
            "code": lambda: eqx.filter_jit(lambda code: infer(code)(X, MASK))(code),
        }
        got, wanted = ways[way](), by_hand(code, MASK)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_under_the_callers_mesh(kind):
    code = Berrut(3, 6)
    mesh = jax.make_mesh((4,), ("workers",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(infer(code)(X, MASK), by_hand(code, MASK), atol=1e-5)
        jitted = jax.jit(lambda x: infer(code)(x, OTHER))
        np.testing.assert_allclose(jitted(X), by_hand(code, OTHER), atol=1e-5)
    for groups in (1, 5):  # decoded by coordinate, and by group
        x, masks = np.stack([X] * groups), np.stack([MASK, OTHER] * 3)[:groups]
        wanted = [by_hand(code, mask) for mask in masks]
        got = infer(code, mesh=mesh)(x, masks)
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("mesh", [False, True])
def test_a_broken_answer_still_makes_a_straggler(mesh):
    """The matrix that was looked up is not for those who responded then."""
    code = Berrut(3, 6)
    mesh = jax.make_mesh((4,), ("workers",)) if mesh else None

    def model(x):  # worker 3's first coordinate alone, or NaN wherever it is
        broken = jnp.all(jnp.abs(x - code.encode(X)[3]) < 1e-6, axis=-1)
        return jnp.sin(x).at[:, 0].set(jnp.where(broken, jnp.nan, jnp.sin(x[:, 0])))

    decoded = coded_inference(model, code, mesh=mesh, with_status=True)(X, MASK)
    np.testing.assert_array_equal(decoded.responded, MASK & (np.arange(6) != 3))
    wanted = by_hand(code, np.asarray(decoded.responded))
    np.testing.assert_allclose(decoded.predictions, wanted, atol=1e-5)


def test_what_is_lost_is_so_whatever_is_looked_up():
    code = Uncoded(3)
    for _ in range(2):
        decoded = infer(code, with_status=True)(X, np.array([1, 0, 1], bool))
        np.testing.assert_array_equal(decoded.recovered, [True, False, True])
        np.testing.assert_array_equal(np.isnan(decoded.predictions).all(1), ~decoded.recovered)


def test_codes_with_other_numbers_share_nothing():
    code = NeRCC(3, 6, lambda_dec=1e-3)
    y = np.random.default_rng(0).normal(size=(6, 2)).astype("float32")
    for each in (code, code.replace(lambda_dec=1.0), Berrut(3, 6)):
        wanted = np.asarray(each.decoder_matrix(MASK), float) @ y
        np.testing.assert_allclose(each.decode(y, MASK), wanted, atol=1e-5)


@pytest.mark.parametrize("wide", [False, True])
def test_precision_is_the_callers(wide):
    with jax.enable_x64(wide):
        code = NeRCC(3, 6)
        got = infer(code)(X.astype(float) if wide else X, MASK)
        assert got.dtype == (np.float64 if wide else np.float32)
        np.testing.assert_allclose(got, by_hand(code, MASK), atol=1e-12 if wide else 1e-5)


class Drawn(AbstractCode):
    """Random combinations, drawn from a key that is a leaf."""

    num_data: int = eqx.field(static=True)
    num_workers: int = eqx.field(static=True)
    key: Array

    def encoder_matrix(self):
        return jax.random.normal(self.key, (self.num_workers, self.num_data))

    def decoder_matrix(self, available):
        return jnp.linalg.pinv(jnp.where(jnp.asarray(available)[:, None], self.encoder_matrix(), 0))

    def recovered(self, available):
        return jnp.broadcast_to(jnp.sum(available) >= self.num_data, (self.num_data,))


def test_a_users_code_with_a_key():
    code = Drawn(3, 6, jax.random.key(0))
    np.testing.assert_allclose(code.decode(code.encode(X), MASK), X, atol=1e-4)
    assert repr(code).startswith("Drawn(num_data=3, num_workers=6, key=")


def test_what_a_code_raises_comes_through(untyped):
    class Broken(Drawn):
        def decoder_matrix(self, available):
            raise ArithmeticError("no such matrix")

    with pytest.raises(ArithmeticError, match="no such matrix"):
        Broken(3, 6, jax.random.key(0)).decode(np.ones((6, 1), "float32"), MASK)


def compiled_by(run):
    """The number of programs that are compiled, or read from the cache on disk, in a call."""
    names = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: names.append(name))
    try:
        run()
    finally:
        jax.monitoring.clear_event_listeners()
    return sum(name.endswith("backend_compile_duration") for name in names)


@pytest.mark.parametrize("make", [NeRCC, BerrutSpline, Berrut], ids=lambda make: make.__name__)
def test_matrices_of_what_is_known_are_the_hosts(make):
    """Each call outside a program compiled the regression anew: 1.4 s for (20, 8)."""
    code, masks = make(5, 11), np.random.default_rng(0).random((3, 11)) < 0.8
    assert not compiled_by(lambda: [code.encoder_matrix(), *map(code.decoder_matrix, masks)])
