"""Codes, inference, evaluation and tuning, pinned from outside by numbers that others computed.

Oracles are values.json (see `pinned_values.py`), NumPy in float64, and enumeration of stragglers.
Programs, orders of sums and draws of random numbers may change; what is compared may not.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import matrices
import numpy as np
import pytest
from jax.sharding import Mesh
from pinned_values import CODES, PINNED, K, N, answers, masks

from nercc_jax import Berrut, ExactStragglers, NeRCC, coded_inference, evaluate, tune
from nercc_jax.codes import decode_groups
from nercc_jax.tuning import Descent, Sampling, learn_decoder

WEIGHTS = np.random.default_rng(0).normal(size=(5, 3))
PRECISIONS = {"float32": 3e-5, "float64": 1e-11}
EVERYONE, ONE_LOST = np.ones((1, N), bool), ~np.eye(N, dtype=bool)
INFERRED = {NeRCC: {"lambda_enc": 1e-4, "lambda_dec": 1e-3}, Berrut: {}}


def model(x, weights=WEIGHTS):
    return jnp.tanh(x @ jnp.asarray(weights, x.dtype))


def data(groups, seed=1, dtype="float64"):
    """Noisy data points along a line, in any order."""
    random, along = np.random.default_rng(seed), np.linspace(-1, 1, groups * K)
    x = np.outer(along, np.linspace(-1, 1, 5)) + 0.1 * random.normal(size=(groups * K, 5))
    return random.permutation(x).astype(dtype)


def mean_square_error(code, x, sets=ONE_LOST):
    """Of groups in order, over these straggler sets: both matrices by the textbook."""
    coded = np.tanh(matrices.encoder_matrix(code) @ x.reshape(-1, K, 5) @ WEIGHTS)
    decoders = np.stack([matrices.decoder_matrix(code, mask) for mask in sets])[:, None]
    return float(np.mean((decoders @ coded - np.tanh(x.reshape(-1, K, 5) @ WEIGHTS)) ** 2))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CODES)
def test_a_code_has_its_points_and_matrices_and_decodes_thirty_masks(name, precision):
    """Mask by mask on the host, all in one program, and as matrices; a straggler's NaN in none."""
    eps, pinned = PRECISIONS[precision], PINNED["codes"][name]
    expected = np.array(pinned["decoded"], float)  # NaN where lost
    # In float64 not-a-knot ends are off by 2e-10 today, where SciPy's are right to the last digit.
    scale = 1e-9 if (name, precision) == ("berrut spline", "float64") else eps
    scales = scale * np.maximum(pinned["scales"], 1)[:, None]
    with jax.enable_x64(precision == "float64"):
        code = CODES[name]()
        for points in ("alpha", "beta"):
            np.testing.assert_allclose(getattr(code, points, []), pinned[points], atol=eps)
        np.testing.assert_allclose(code.encoder_matrix(), pinned["encoder"], atol=eps)
        sets, y = masks(code.num_workers), answers(code.num_workers)
        given, by_mask = jnp.asarray(np.where(sets, y, np.nan)[..., None], float), 0 * expected
        for place, (group, mask) in enumerate(zip(given, sets, strict=True)):
            if np.isnan(expected[place]).all():
                with pytest.raises(ValueError, match="no prediction can be recovered"):
                    code.decode(group, mask)
            else:
                by_mask[place] = code.decode(group, mask)[:, 0]
        together = eqx.filter_jit(decode_groups)(code, given, jnp.asarray(sets))
        decoders = np.stack([code.decoder_matrix(mask) for mask in sets])
    np.testing.assert_array_equal(together.recovered, ~np.isnan(expected))
    assert not decoders[np.broadcast_to(~sets[:, None], decoders.shape)].any()
    products = decoders @ y + np.where(decoders.any(axis=2), 0, np.nan)
    for found in (by_mask, np.asarray(together.predictions)[..., 0], products):
        np.testing.assert_allclose(found / scales, expected / scales, rtol=0, atol=1)


@pytest.mark.parametrize("mesh", [None, (4, 2)], ids=["one device", "4 x 2 mesh"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("make", INFERRED, ids=lambda make: make.__name__)
def test_coded_inference_has_the_plain_values_and_gradients(make, precision, mesh):
    """Values, and gradients in x, weights and lambdas: NumPy's, and finite differences of those."""
    sets, lambdas = np.stack([np.arange(N) != 3, np.arange(N) % 4 > 0]), INFERRED[make]
    x, pull = data(2).reshape(2, K, 5), np.random.default_rng(2).normal(size=(2, K, 3))

    def plain(**changed):
        with jax.enable_x64(True):
            code = make(K, N, **lambdas | changed)
        decoders = np.stack([matrices.decoder_matrix(code, mask) for mask in sets])
        encoder = matrices.encoder_matrix(code)
        y = np.tanh(encoder @ x @ WEIGHTS)
        inner = np.swapaxes(decoders, 1, 2) @ pull * (1 - y**2)
        of_weights = np.einsum("gni,gno->io", encoder @ x, inner)
        return decoders @ y, encoder.T @ inner @ WEIGHTS.T, of_weights

    grid = mesh and Mesh(np.array(jax.devices()).reshape(mesh), ("workers", "others"))
    with jax.enable_x64(precision == "float64"):
        given = [jnp.asarray(each, float) for each in (x, WEIGHTS)]

        def total(inputs):
            code, x, weights = inputs
            infer = coded_inference(model, code, mesh=grid, axis=grid and "workers")
            found = infer(x, sets, weights)
            return jnp.sum(jnp.asarray(pull, float) * found), found

        differentiate = eqx.filter_jit(eqx.filter_value_and_grad(total, has_aux=True))
        (_, found), (of_code, *others) = differentiate((make(K, N, **lambdas), *given))
    for got, wanted, factor in zip((found, *others), plain(), (10, 100, 100), strict=True):
        np.testing.assert_allclose(got, wanted, atol=factor * PRECISIONS[precision])
    for name, value in lambdas.items():
        ends = [plain(**{name: value * scale})[0] for scale in (1 + 1e-4, 1 - 1e-4)]
        slope = np.sum(pull * (ends[0] - ends[1])) / (2e-4 * value)
        # The differences' own error is 1e-8 of the slope; float32 loses some digits more.
        rtol = 1e-6 if precision == "float64" else 1e-2
        np.testing.assert_allclose(getattr(of_code, name), slope, rtol=rtol)


def test_evaluate_agrees_with_plain_numpy():
    """Whatever sets are drawn, the mean of 100 is within two intervals of that of all eleven."""
    x, laws = data(12), {"none": ExactStragglers(0), "one": ExactStragglers(1)}
    with jax.enable_x64(True):
        codes = {"nercc": NeRCC(K, N), "berrut": Berrut(K, N)}
        rows = evaluate(model, codes, x, laws, key=jax.random.key(0), num_sets=100)
        for row in rows:
            alone = row.stragglers == "none"
            expected = mean_square_error(codes[row.code], x, EVERYONE if alone else ONE_LOST)
            near = 1e-6 * expected if alone else min(2 * row.mse.half_width, 0.5 * expected)
            assert row.mse.mean == pytest.approx(expected, abs=near)
            assert row.rmse.mean == pytest.approx(np.sqrt(3 * row.mse.mean), rel=0.1)
            assert (row.lost.mean, row.num_data_points, row.num_sets) == (0, 48, 100)
            assert 0.5 < row.rel_acc.mean <= 1
    assert 0 < rows.gain("nercc", "berrut").mean < 1


def test_tune_lowers_the_error_that_enumeration_finds():
    """By half, on other data; another optimizer or other draws may end anywhere below that."""
    start, laws = NeRCC(K, N, lambda_enc=1e-2, lambda_dec=1e-1), {"one": ExactStragglers(1)}
    few = {"sampling": Sampling(held_out_sets=8), "descent": Descent(steps=30)}
    tuned = tune(model, start, data(40, dtype="float32"), laws, key=jax.random.key(0), **few)
    errors = [mean_square_error(code, data(10, seed=9)) for code in (start, tuned.code)]
    assert errors[1] < 0.5 * errors[0]
    assert 0 < tuned.objective < 0.7
    assert tuned.history[0].held_out > tuned.objective, "of the start, a worker on each data point"
    assert (tuned.rejected, len(tuned.history)) == (0, 31)


def test_learn_decoder_beats_the_spline_and_keeps_constants():
    """By 30 % on other data, and by the normal equations of its moments, whose draws may differ."""
    start, x = NeRCC(K, N), data(64, dtype="float32")
    learned = learn_decoder(model, start, x, key=jax.random.key(0), num_groups=100)
    np.testing.assert_array_equal(learned.encoder_matrix(), start.encoder_matrix())
    for mask in masks(N)[masks(N).any(axis=1)]:
        decoder = np.asarray(learned.decoder_matrix(mask), float)
        np.testing.assert_allclose(decoder.sum(axis=1), 1, atol=1e-3)
        np.testing.assert_allclose(decoder, matrices.decoder_matrix(learned, mask), atol=2e-3)
    errors = [mean_square_error(code, data(16, seed=9)) for code in (start, learned)]
    assert errors[1] < 0.7 * errors[0]
