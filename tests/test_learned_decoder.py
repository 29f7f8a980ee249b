"""A decoder learned from recorded answers: the best matrix, as far as the answers tell."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matrices
import numpy as np
import pytest

from nercc_jax import Berrut, NeRCC, Replication, coded_inference
from nercc_jax.codes import LearnedDecoder
from nercc_jax.evaluation import record_answers
from nercc_jax.inference import order_points
from nercc_jax.tuning import learn_decoder

K, N, OUTPUTS = 6, 15, 5
WEIGHTS = np.random.default_rng(4).normal(size=(12, OUTPUTS)).astype("float32")
X = np.random.default_rng(5).normal(size=(1200, 12)).astype("float32")
KEY = jax.random.key(6)
MASKS = [np.random.default_rng(s).permutation(N) >= s for s in (0, 2, 5, 9)]


def model(x):
    return jnp.tanh(x @ WEIGHTS)


def test_a_model_that_is_always_zero_has_a_decoder():
    code = learn_decoder(lambda x: jnp.zeros((len(x), 2)), NeRCC(K, N), X[:60], key=KEY)
    for value in (0, 1):
        answers = np.full((N, 2), value, "float32")
        decoded = code.try_decode(answers, MASKS[2]).predictions
        np.testing.assert_allclose(decoded, value, atol=1e-5)


@pytest.fixture(scope="module")
def learned():
    return learn_decoder(model, NeRCC(K, N), X[:600], key=KEY)


def errors(code, x=X[600:]):
    """Mean squared errors of the predictions of data points that it has not seen, by mask."""
    answers = record_answers(model, code, x)
    return np.asarray(answers.losses(jnp.stack(MASKS), "mse"))


def test_it_errs_less_than_the_spline_with_any_encoder(learned):
    for spline, found in (
        (NeRCC(K, N), learned),
        (Berrut(K, N), learn_decoder(model, Berrut(K, N), X[:600], key=KEY)),
    ):
        np.testing.assert_array_equal(found.encoder, spline.encoder_matrix())
        assert (errors(found) < 0.9 * errors(spline)).all()


def test_no_other_matrix_fits_the_recorded_answers_better(learned):
    """Of those with rows of sum 1, by least squares on the answers themselves."""
    rng = np.random.default_rng(7)
    drawn = np.concatenate([rng.permutation(600).reshape(-1, K) for _ in range(4)])
    answers = record_answers(model, learned, X[drawn.ravel()])
    y, own = np.asarray(answers.coded, float), np.asarray(answers.own, float)
    for mask in MASKS:
        first, *rest = np.flatnonzero(mask)
        # Sum 1: the differences from one answer are combined freely.
        known = np.moveaxis(y[:, rest] - y[:, [first]], 1, -1).reshape(-1, len(rest))
        wanted = np.moveaxis(own - y[:, [first]], 1, -1).reshape(-1, K)
        best = np.linalg.lstsq(known, wanted, rcond=None)[1] / len(known)
        matrix = np.asarray(learned.decoder_matrix(mask), float)
        error = np.mean((np.einsum("kn,gnm->gkm", matrix, y) - own) ** 2, axis=(0, 2))
        # It was learned from other groups of the same data points, and a little from the prior.
        assert (error < 1.25 * best).all()
        unit = np.abs(learned.root).max() ** 2
        expected = np.asarray(learned.posterior_variance(mask)) * unit
        np.testing.assert_allclose(expected.sum(), best.sum(), rtol=0.25)


def test_two_workers_that_hardly_ever_differ_are_not_told_apart(monkeypatch):
    """Their difference tells nothing of most groups, and is wild in a few."""
    beta = jnp.linspace(-1, 1, 10).at[4].set(1 / 9 - 3e-4)  # 1/9 is the fifth's
    code = eqx.tree_at(lambda code: code.beta, NeRCC(6, 10), beta)

    def largest():
        found = learn_decoder(lambda x: jax.nn.softmax(20 * x @ WEIGHTS), code, X[:600], key=KEY)
        return np.abs(found.decoder_matrix(np.arange(10) != 2)).max()

    assert largest() < 1.5
    monkeypatch.setattr("nercc_jax.tuning._learn_decoder._NOISES", (0.0,))
    assert largest() > 4


@pytest.mark.parametrize("groups", [1, 5])
def test_few_groups_leave_about_the_spline(groups):
    """The smooth path stands in for what was not recorded: without it, errors were 40 times."""
    code = NeRCC(K, N)
    few = learn_decoder(model, code, X[:600], key=KEY, num_groups=groups)
    assert (errors(few) < 1.7 * errors(code)).all()


def test_the_draw_depends_on_the_key_alone_however_much_is_held_at_a_time(learned, monkeypatch):
    again = learn_decoder(model, NeRCC(K, N), X[:600], key=KEY, batch_size=50)
    np.testing.assert_allclose(again.root, learned.root, atol=2e-6)
    other = learn_decoder(model, NeRCC(K, N), X[:600], key=jax.random.key(8))
    assert np.abs(other.root - learned.root).max() > 1e-3
    monkeypatch.setattr("nercc_jax.tuning._learn_decoder._AT_ONCE", (K + N) * 12 * 7)
    again = learn_decoder(model, NeRCC(K, N), X[:600], key=KEY)
    np.testing.assert_allclose(np.abs(again.root), np.abs(learned.root), atol=2e-6)


def test_float32_keeps_its_digits_where_few_straggle(learned):
    """The moments' condition is a million; their root's is a thousand."""
    y = np.asarray(record_answers(model, learned, X[:60]).coded)
    for mask in MASKS:
        exact = matrices.decoder_matrix(learned, mask)
        wanted = np.einsum("kn,gnm->gkm", exact, y.astype(float))
        by_program = jax.jit(LearnedDecoder.decoder_matrix)(learned, jnp.asarray(mask))
        got = np.einsum("kn,gnm->gkm", np.asarray(by_program, float), y)
        np.testing.assert_allclose(got, wanted, atol=5e-5)


@pytest.mark.parametrize("unit", [1e-25, 1e25])
def test_units_do_not_matter(learned, unit):
    """Also where float32 holds no squares."""
    code = learn_decoder(lambda x: unit * model(x), NeRCC(K, N), X[:600], key=KEY)
    decode = jax.jit(LearnedDecoder.decoder_matrix)
    for mask in MASKS:
        wanted, got = (decode(each, jnp.asarray(mask)) for each in (learned, code))
        np.testing.assert_allclose(got, wanted, atol=1e-3)


def test_how_sure_it_is(learned):
    """Deviations are of this group, not of all; host and program agree."""
    infer = coded_inference(model, learned)
    y = np.asarray(model(learned.encode(X[600 : 600 + K])))
    for mask in MASKS:
        predictions, deviation = learned.decode(y, mask, return_uncertainty=True)
        np.testing.assert_allclose(predictions, infer(X[600 : 600 + K], mask), atol=1e-5)
        variance, root = jax.tree.map(np.asarray, learned).variances_on_host(mask)
        white = np.einsum("in,nm->im", root, np.where(mask[:, None], y, 0))
        scale = np.sum(np.mean(white**2, axis=1))
        np.testing.assert_allclose(deviation, np.sqrt(variance * scale), rtol=0.02)
        np.testing.assert_allclose(
            learned.process_variance(jnp.asarray(y), jnp.asarray(mask)), scale, rtol=0.02
        )
        # Three times the path, three times the deviation; what all have in common is nothing.
        _, wider = learned.decode(3 * y + 40, mask, return_uncertainty=True)
        np.testing.assert_allclose(wider, 3 * deviation, rtol=0.02)
    one = np.arange(N) == 3
    predictions, deviation = learned.decode(y, one, return_uncertainty=True)
    np.testing.assert_allclose(predictions, np.tile(y[3], (K, 1)), rtol=1e-5)
    assert np.isinf(deviation).all()


def test_data_points_are_pytrees_and_workers_images():
    def both(x) -> Any:
        return {"a": model(x["image"].reshape(len(x["image"]), -1)), "b": x["scale"][:, None]}

    x = {"image": X[:60].reshape(60, 3, 4), "scale": X[:60, 0]}
    code = learn_decoder(both, NeRCC(3, 8), x, key=KEY, num_groups=10)
    group = jax.tree.map(lambda leaf: leaf[:3], x)
    predicted = coded_inference(both, code)(group, np.arange(8) != 1)
    assert predicted["a"].shape == (3, OUTPUTS)


def in_order(x, size=K):
    return order_points(x, K, buffer_size=size)


@pytest.mark.parametrize("code", [NeRCC(K, N, points="interleaved"), Replication(K, 9)], ids=type)
def test_a_decoder_learned_in_the_order_that_is_served_errs_less(code):
    """Along one curve neighbours tell much, and groups at random little."""
    rng = np.random.default_rng(8)
    angle = rng.uniform(0, 6, size=(1200, 1))
    x = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype("float32")

    def curve(x):
        return jnp.sin(jnp.concatenate([2 * x, x[:, :1] * x[:, 1:]], axis=1))

    served = x[600:][np.asarray(in_order(x[600:], 24))]
    masks = jnp.stack([rng.permutation(code.num_workers) >= 4 for _ in range(40)])
    losses = []
    for order in (None, lambda x: in_order(x, 24)):
        learned = learn_decoder(curve, code, x[:600], key=KEY, order=order)
        answers = record_answers(curve, learned, served)
        assert np.isfinite(answers.decode_sets(masks).predictions).all(), "lost copies, too"
        losses.append(float(jnp.mean(answers.losses(masks, "mse"))))
    assert losses[1] < 0.8 * losses[0]
