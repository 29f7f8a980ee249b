"""Data points and answers that are pytrees: one matrix, one mask, every way of running.

Each way is held against the same model on plain vectors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrices import decoded_by_hand

from nercc_jax import (
    Berrut,
    DevicePool,
    ExactStragglers,
    NeRCC,
    Replication,
    Scheme,
    calibrate_error_probability,
    coded_inference,
    evaluate,
    nested_objective,
    pool_inference,
    reexecute,
)
from nercc_jax.evaluation import record_answers
from nercc_jax.inference import robust_decode
from nercc_jax.surrogates import Surrogate

K, N, GROUPS = 3, 6, 2
MASK = np.arange(N) != 2
CODE = Berrut(K, N)
random = np.random.default_rng(0)
X = {
    "image": random.normal(size=(GROUPS, K, 2, 2)).astype("float32"),
    "meta": random.normal(size=(GROUPS, K, 3)).astype("float32"),
}
FLAT = np.concatenate([X["image"].reshape(GROUPS, K, 4), X["meta"]], axis=-1)


def heads(batch):
    """A dict of heads, one of them a matrix."""
    image = batch["image"].reshape(-1, 4)
    return {
        "label": jnp.sin(image) + batch["meta"][:, :1],
        "box": jnp.tanh(batch["image"]),
    }


def vectors(batch):
    """The same on vectors."""
    label = jnp.sin(batch[:, :4]) + batch[:, 4:5]
    return jnp.concatenate([jnp.tanh(batch[:, :4]), label], axis=-1)


def expected(code, mask):
    """Predictions (box, then label) of the textbook's matrices, in float64."""
    return decoded_by_hand(code, vectors, FLAT, [mask])[0]


def as_vectors(tree):
    flat = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    lead = flat[0].ndim - 2  # of the box
    return np.concatenate([leaf.reshape(*leaf.shape[:lead], -1) for leaf in flat], axis=-1)


def points(x=X):
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), x)


def mesh():
    return jax.make_mesh((4,), ("workers",), axis_types=(jax.sharding.AxisType.Auto,))


def in_pool():
    with DevicePool(heads, N) as pool:
        result = pool_inference(pool, Replication(K, N), with_status=True)(X)
    assert set(result.answers.values) == {"label", "box"}
    return result.decoded.predictions


PLAIN = NeRCC(K, N, lambda_dec=0.0)
WAYS = {
    "code": (lambda: coded_inference(heads, CODE)(X, MASK), CODE, MASK),
    "mesh": (lambda: coded_inference(heads, CODE, mesh=mesh())(X, MASK), CODE, MASK),
    "jit": (lambda: jax.jit(coded_inference(heads, CODE))(X, MASK), CODE, MASK),
    "pool": (in_pool, Replication(K, N), np.ones(N, bool)),
    "scheme": (
        lambda: coded_inference(heads, Scheme(PLAIN), grouped=True)(X, MASK), PLAIN, MASK,
    ),
    "scheme on a mesh": (
        lambda: coded_inference(heads, Scheme(PLAIN), grouped=True, mesh=mesh())(X, MASK),
        PLAIN, MASK,
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way(way):
    run, *used = WAYS[way]
    got = run()
    assert got["label"].shape == (GROUPS, K, 4)
    assert got["box"].shape == (GROUPS, K, 2, 2)
    np.testing.assert_allclose(as_vectors(got), expected(*used), atol=2e-5)


def test_one_mask_counts_for_all_leaves():
    """What breaks in one head makes a straggler in all."""
    y = {"a": jnp.ones((N, 2)), "b": jnp.ones((N, 3, 1)).at[4, 1, 0].set(jnp.nan)}
    decoded = CODE.try_decode(y, np.ones(N, bool))
    assert np.flatnonzero(~decoded.responded).tolist() == [4]
    assert np.isfinite(decoded.predictions["a"]).all()
    half = CODE.try_decode({"a": jnp.ones((N, 2), jnp.bfloat16), "b": jnp.ones((N, 1))}, MASK)
    assert half.predictions["a"].dtype == half.predictions["b"].dtype == jnp.float32


def test_what_cannot_be_mixed(untyped):
    differs = {**X, "task": np.arange(GROUPS * K).reshape(GROUPS, K)}
    message = r"x\['task'\] is int(32|64): .*code their embeddings, and .* a further argument"
    whole = coded_inference(heads, CODE)
    for infer in (whole, jax.jit(whole), coded_inference(heads, CODE, mesh=mesh())):
        with pytest.raises(ValueError, match=message):
            infer(differs, MASK)
    with pytest.raises(ValueError, match=message):
        CODE.encode(jax.tree.map(lambda leaf: leaf[0], differs))


def test_shapes_that_do_not_fit(untyped):
    with pytest.raises(ValueError, match=r"x\['meta'\] of shape \(2, 2, 3\)"):
        coded_inference(heads, CODE)({**X, "meta": X["meta"][:, :2]}, MASK)
    with pytest.raises(
        ValueError, match=r"y\['b'\] has shape \(5,\); its first axis must be the 6"
    ):
        CODE.decode({"a": np.ones(N), "b": np.ones(5)}, MASK)
    with pytest.raises(ValueError, match="holds no array"):
        CODE.encode({})


def test_evaluation_and_the_objective():
    one = jax.tree.map(lambda leaf: np.concatenate([leaf[:1]] * 4), X)
    laws = {"one": ExactStragglers(1)}
    key = jax.random.key(0)
    tree = evaluate(heads, {"c": CODE}, points(one), laws, key=key, num_sets=3)[0]
    flat = np.concatenate([FLAT[:1]] * 4).reshape(-1, 7)
    plain = evaluate(vectors, {"c": CODE}, flat, laws, key=key, num_sets=3)[0]
    for metric in ("mse", "rmse", "lost"):
        np.testing.assert_allclose(
            getattr(tree, metric).mean, getattr(plain, metric).mean, rtol=1e-4
        )
    forecast = record_answers(heads, CODE, points(one))
    np.testing.assert_allclose(forecast.losses(jnp.asarray(MASK[None]), "mse")[0], nested_objective(
        heads, CODE, one, MASK[None]), rtol=1e-4)  # fmt: skip
    # A data point keeps its labels if it keeps them all: along the last axis of every head.
    own = heads(jax.tree.map(jnp.asarray, points(one)))
    decoded = coded_inference(heads, CODE)(one, MASK)
    same = [
        (np.argmax(np.asarray(decoded[name]).reshape(own[name].shape), -1)
         == np.argmax(own[name], -1)).reshape(len(flat), -1).all(axis=1)
        for name in own
    ]  # fmt: skip
    wrong = nested_objective(heads, CODE, one, MASK[None], criterion="disagreement")
    np.testing.assert_allclose(wrong, 1 - np.mean(np.logical_and(*same)), atol=1e-6)
    labels = {name: np.argmax(own[name], -1) for name in own}
    row = evaluate(heads, {"c": CODE}, points(one), laws, key=key, num_sets=3, labels=labels)[0]
    assert row.accuracy.mean == row.rel_acc.mean


def test_a_scheme_with_all_that_it_may_have():
    one = jax.tree.map(lambda leaf: np.concatenate([leaf[:1]] * 20), X)
    code = NeRCC(K, N, points="repeated")
    surrogate = Surrogate(lambda b: jax.tree.map(lambda leaf: 0.9 * leaf, heads(b)), kappa=1.0)
    laws, key = {"two": ExactStragglers(2)}, jax.random.key(0)
    error_probability = calibrate_error_probability(
        heads, Scheme(code, surrogate), points(one), laws, key=key
    )
    scheme = Scheme(code, surrogate, error_probability, order="pixels")
    mask = np.arange(N) > 1
    assessed = coded_inference(heads, scheme, with_status=True)(points(one), mask)
    own = heads(jax.tree.map(jnp.asarray, points(one)))
    sure = np.asarray(assessed.error_probability) == 0
    assert 0 < sure.sum() < len(sure)
    got = assessed.predictions
    for name in own:
        np.testing.assert_allclose(np.asarray(got[name])[sure], own[name][sure], atol=1e-5)
    again = reexecute(heads, points(one), assessed)
    for name in own:
        np.testing.assert_allclose(again.predictions[name], own[name], atol=1e-5)


def test_lies_are_found_in_any_head():
    code = NeRCC(8, 32)
    t = np.linspace(-1, 1, 8, dtype="float32")[:, None]
    coded = code.encode(t)
    y = {"a": jnp.sin(2 * coded), "b": jnp.cos(coded)[:, None]}
    y["b"] = y["b"].at[7].add(5.0)
    found, suspected = robust_decode(code, y, np.ones(32, bool), max_adversaries=2)
    assert np.flatnonzero(suspected).tolist() == [7]
    np.testing.assert_allclose(found.predictions["b"][:, 0], np.cos(t), atol=1e-3)
