"""Codes, inference, evaluation and tuning, pinned from outside by numbers that others computed.

Oracles are values.json (see `pinned_values.py`), NumPy in float64, and enumeration of stragglers.
Programs, orders of sums and draws of random numbers may change; what is compared may not.
"""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import matrices
import numpy as np
import pytest
from jax.sharding import Mesh
from pinned_values import CODES, VALUES, K, N, answers, masks

from nercc_jax import Berrut, ExactStragglers, NeRCC, coded_inference, evaluate, tune
from nercc_jax.codes import decode_groups
from nercc_jax.tuning import Descent, Sampling, learn_decoder

PINNED = json.loads(VALUES.read_text())["codes"]
WEIGHTS = np.random.default_rng(0).normal(size=(5, 3))
PRECISIONS = {"float32": 3e-5, "float64": 1e-11}
ONE_LOST = ~np.eye(N, dtype=bool)


def model(x, weights=WEIGHTS):
    return jnp.tanh(x @ jnp.asarray(weights, x.dtype))


def data(count, seed=1):
    """Data points along a curve, as smooth codes want them, with a little noise."""
    random = np.random.default_rng(seed)
    along = np.linspace(-1, 1, count)[:, None] * np.linspace(-1, 1, 5)
    return along + 0.1 * random.normal(size=(count, 5))


def mean_square_error(code, x, sets=ONE_LOST):
    """Of groups in order, over these straggler sets: both matrices by the textbook."""
    groups = x.reshape(-1, K, 5)
    coded = np.tanh(matrices.encoder_matrix(code) @ groups @ WEIGHTS)
    decoders = np.stack([matrices.decoder_matrix(code, mask) for mask in sets])
    return float(np.mean((decoders[:, None] @ coded - np.tanh(groups @ WEIGHTS)) ** 2))


def assert_decoded(name, found, recovered, precision):
    """The same predictions are lost, and others right by the decoder's largest row sum."""
    expected = np.array(PINNED[name]["decoded"], float)
    np.testing.assert_array_equal(recovered, ~np.isnan(expected))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    # In float64 not-a-knot ends are off by 2e-10 today, where SciPy's are right to the last digit.
    eps = 1e-9 if (name, precision) == ("berrut spline", "float64") else PRECISIONS[precision]
    scale = eps * np.maximum(PINNED[name]["scales"], 1)[:, None]
    off = np.nan_to_num((found - expected) / scale)
    assert np.abs(off).max() <= 1, f"mask {np.abs(off).max(axis=1).argmax()}: {np.abs(off).max()}"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CODES)
def test_a_code_has_its_points_and_matrices_and_decodes_thirty_masks(name, precision):
    """On the host mask by mask, in one program, and as matrices. A straggler's NaN reaches none."""
    with jax.enable_x64(precision == "float64"):
        code, pinned, eps = CODES[name](), PINNED[name], PRECISIONS[precision]
        for points in ("alpha", "beta"):
            np.testing.assert_allclose(getattr(code, points, []), pinned[points], atol=eps)
        np.testing.assert_allclose(code.encoder_matrix(), pinned["encoder"], atol=eps)
        sets, y = masks(code.num_workers), answers(code.num_workers)
        given = jnp.asarray(np.where(sets, y, np.nan)[..., None], float)
        found = np.full((len(sets), code.num_data), np.nan)
        for place, (group, mask) in enumerate(zip(given, sets, strict=True)):
            if None not in pinned["decoded"][place] or any(pinned["decoded"][place]):
                found[place] = code.decode(group, mask)[:, 0]
            else:
                with pytest.raises(ValueError, match="no prediction can be recovered"):
                    code.decode(group, mask)
        assert_decoded(name, found, ~np.isnan(found), precision)
        together = eqx.filter_jit(decode_groups)(code, given, jnp.asarray(sets))
        found = np.asarray(together.predictions, float)[..., 0]
        assert_decoded(name, found, together.recovered, precision)
        decoders = np.stack([code.decoder_matrix(mask) for mask in sets])
        assert not decoders[np.broadcast_to(~sets[:, None], decoders.shape)].any()
        lost = np.where(decoders.any(axis=2), 0, np.nan)
        assert_decoded(name, decoders @ y + lost, lost == 0, precision)


@pytest.mark.parametrize("mesh", [None, (4, 2)], ids=["one device", "4 x 2 mesh"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("make", "lambdas"),
    [(NeRCC, {"lambda_enc": 1e-4, "lambda_dec": 1e-3}), (Berrut, {})],
    ids=["NeRCC", "Berrut"],
)
def test_coded_inference_has_the_plain_values_and_gradients(make, lambdas, precision, mesh):
    """Values, and gradients in x, weights and lambdas: NumPy's, and finite differences of those."""
    with jax.enable_x64(True):
        exact = make(K, N, **lambdas)
    sets = np.stack([np.arange(N) != 3, np.arange(N) % 4 > 0])
    x, pull = data(2 * K).reshape(2, K, 5), np.random.default_rng(2).normal(size=(2, K, 3))

    def plain(code):
        decoders = np.stack([matrices.decoder_matrix(code, mask) for mask in sets])
        encoder = matrices.encoder_matrix(code)
        y = np.tanh(encoder @ x @ WEIGHTS)
        inner = np.swapaxes(decoders, 1, 2) @ pull * (1 - y**2)
        of_weights = np.einsum("gni,gno->io", encoder @ x, inner)
        return decoders @ y, encoder.T @ inner @ WEIGHTS.T, of_weights

    expected, of_x, of_weights = plain(exact)
    grid = None if mesh is None else Mesh(np.array(jax.devices()).reshape(mesh), ("workers", "b"))
    with jax.enable_x64(precision == "float64"):
        code, eps = make(K, N, **lambdas), PRECISIONS[precision]
        given = [jnp.asarray(each, float) for each in (x, WEIGHTS, pull)]
        found = coded_inference(model, code, mesh=grid, axis=grid and "workers")(
            given[0], sets, given[1]
        )
        np.testing.assert_allclose(found, expected, atol=10 * eps)

        @eqx.filter_jit
        @eqx.filter_grad
        def gradients(inputs):
            code, x, weights = inputs
            infer = coded_inference(model, code, mesh=grid, axis=grid and "workers")
            return jnp.sum(given[2] * infer(x, sets, weights))

        of_code, *others = gradients((code, *given[:2]))
        for got, wanted in zip(others, (of_x, of_weights), strict=True):
            np.testing.assert_allclose(got, wanted, atol=100 * eps)
        for name, value in lambdas.items():
            step = 1e-4
            with jax.enable_x64(True):
                ends = [make(K, N, **lambdas | {name: value * (1 + s)}) for s in (step, -step)]
            rise = np.subtract(*[np.sum(pull * plain(end)[0]) for end in ends])
            # The differences' own error is 1e-8 of the gradient; float32 loses a few digits more.
            rtol = 1e-6 if precision == "float64" else 1e-2
            found = getattr(of_code, name)
            np.testing.assert_allclose(found, rise / (2 * step * value), rtol=rtol)


def test_evaluate_agrees_with_plain_numpy():
    """Without stragglers all numbers; with one, what is estimated from sets drawn by any generator.

    An implementation may draw other sets: the mean of 100 differs from that of the 11 there are by
    less than twice the 95 % interval, but for one seed in ten thousand.
    """
    x = np.random.default_rng(3).permutation(data(12 * K))
    with jax.enable_x64(True):
        codes = {"nercc": NeRCC(K, N), "berrut": Berrut(K, N)}
        laws = {"none": ExactStragglers(0), "one": ExactStragglers(1)}
        rows = evaluate(model, codes, x, laws, key=jax.random.key(0), num_sets=100)
        found = {(row.code, row.stragglers): row for row in rows}
        for name, code in codes.items():
            row = found[name, "none"]
            expected = mean_square_error(code, x, np.ones((1, N), bool))
            assert row.mse.mean == pytest.approx(expected, rel=1e-6)
            assert row.rmse.mean == pytest.approx(np.sqrt(3 * expected), rel=1e-6)
            assert (row.lost.mean, row.num_data_points, row.accuracy) == (0, 48, None)
            row, expected = found[name, "one"], mean_square_error(code, x)
            assert abs(row.mse.mean - expected) < min(2 * row.mse.half_width, 0.5 * expected)
        groups = x.reshape(-1, K, 5)
        labels = np.tanh(groups @ WEIGHTS).argmax(axis=2)
        own = np.tanh(matrices.encoder_matrix(codes["nercc"]) @ groups @ WEIGHTS)
        kept = matrices.decoder_matrix(codes["nercc"], np.ones(N, bool)) @ own
        share = np.mean(kept.argmax(axis=2) == labels)
        assert found["nercc", "none"].rel_acc.mean == pytest.approx(share)
        assert 0 < rows.gain("nercc", "berrut").mean < 1


def test_tune_lowers_the_error_that_enumeration_finds():
    """From a poor start to less than half of its error, on data that tuned nothing.

    Another optimizer, or other draws, may end elsewhere: of the way down 30 steps do most.
    """
    start = NeRCC(K, N, lambda_enc=1e-2, lambda_dec=1e-1)
    seen = []
    tuned = tune(
        model, start, data(40 * K).astype(np.float32), {"one": ExactStragglers(1)},
        key=jax.random.key(0), sampling=Sampling(held_out_sets=8), descent=Descent(steps=30),
        on_step=lambda step, code: seen.append(step.step),
    )  # fmt: skip
    fresh = data(10 * K, seed=9)
    assert mean_square_error(tuned.code, fresh) < 0.5 * mean_square_error(start, fresh)
    assert 0 < tuned.objective < 0.7
    assert 0 < tuned.code.lambda_dec < 1e-1
    assert (tuned.rejected, tuned.code.num_workers) == (0, N)
    assert seen == [step.step for step in tuned.history]
    assert tuned.history[0].held_out == pytest.approx(1, abs=0.01)


def test_learn_decoder_beats_the_spline_and_keeps_constants():
    """Thirty masks as by the normal equations of its own moments; errors on fresh data, 30 % lower.

    The noise that answers are taken to have, and the groups that are drawn, may differ.
    """
    start = NeRCC(K, N)
    x = data(64 * K).astype(np.float32)
    x = np.random.default_rng(3).permutation(x)
    learned = learn_decoder(model, start, x, key=jax.random.key(0), num_groups=100)
    for mask in masks(N)[masks(N).any(axis=1)]:
        decoder = np.asarray(learned.decoder_matrix(mask), float)
        scale = np.abs(decoder).sum(axis=1).max()
        np.testing.assert_allclose(decoder.sum(axis=1), 1, atol=1e-4 * scale)
        np.testing.assert_allclose(decoder, matrices.decoder_matrix(learned, mask), atol=2e-3)
    np.testing.assert_array_equal(learned.encoder_matrix(), start.encoder_matrix())
    fresh = np.random.default_rng(4).permutation(data(16 * K, seed=9))
    assert mean_square_error(learned, fresh) < 0.7 * mean_square_error(start, fresh)
