"""Fine-tuning: the loss against a plain loop in NumPy; what is trained, allowed and refused."""

import functools
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import scipy.special
from flax import nnx

import nercc_jax as nj
from nercc_jax.tuning import Descent, Sampling, Target, fine_tune
from nercc_jax.tuning._fine_tune import _free, _Goal, _with

K, N, INPUTS, OUTPUTS = 3, 6, 4, 3
RANDOM = np.random.default_rng(5)
FIRST = RANDOM.normal(size=(INPUTS, 16)) * 1.5
SECOND = RANDOM.normal(size=(16, OUTPUTS))
TRUTH = RANDOM.normal(size=(INPUTS, OUTPUTS))


def corners(count, seed):
    """Data points near the corners of a cube: what a model does between them is free."""
    draw = np.random.default_rng(seed)
    signs = draw.choice([-1.0, 1.0], size=(count, INPUTS))
    return signs + 0.05 * draw.normal(size=signs.shape)


X = corners(150, 3).astype("float32")
SPLINES = nj.NeRCC(K, N, lambda_enc=0.0, lambda_dec=0.0)
CODE = nj.Berrut(K, N)  # where the code is not the subject: it compiles in a fifth of the time
NOBODY, ONE = nj.ExactStragglers(0), nj.ExactStragglers(1)


class Network(eqx.Module):
    """Two layers; `steps` counts something that is not to be trained."""

    first: jax.Array
    second: jax.Array
    steps: jax.Array
    slope: float = eqx.field(static=True, default=1.0)

    def __call__(self, batch):
        return jnp.tanh(self.slope * batch @ self.first) @ self.second


def network(dtype="float32"):
    return Network(jnp.asarray(FIRST, dtype), jnp.asarray(SECOND, dtype), jnp.array(7))


def numpy_network(x, first=FIRST, second=SECOND):
    return np.tanh(x @ first) @ second


def labels_of(x):
    return np.argmax(numpy_network(x), axis=1)


HELD_OUT = 0.2  # 30 of 150 data points
QUICK = Sampling(groups_per_step=4, sets_per_step=3, held_out_share=HELD_OUT, held_out_sets=4)


def quick(steps=20, check_every=10, learning_rate=3e-4):
    return Descent(steps, learning_rate, check_every, stop_after=None)


def looks(seen):
    """A callback that keeps the steps that were judged, with their models."""

    def on_step(step, model):
        if step.held_out is not None:
            seen.append((step, model))

    return on_step


@functools.cache
def tuned():
    """One run that the tests look at, and what its caller saw."""
    seen = []
    result = fine_tune(
        network(), SPLINES, X, ONE, key=jax.random.key(1), target=Target(tolerance=0.1),
        sampling=Sampling(groups_per_step=4, held_out_share=HELD_OUT, held_out_sets=8),
        descent=quick(150, 50, 1e-2), on_step=looks(seen),
    )  # fmt: skip
    return result, seen


# -- The loss --------------------------------------------------------------------------------------


@functools.cache
def _spline_matrix(t, at, lambda_):
    columns = [oracle.smoothing_spline(t, unit, lambda_, at) for unit in np.eye(len(t))]
    return np.array(columns, float).T


def spline_matrix(t, at, lambda_):
    """The smoothing matrix, column by column, in 50 digits."""
    return _spline_matrix(tuple(t), tuple(at), lambda_)


def coded_outputs(code, x, available, model):
    """A group's decoded predictions by the oracle's splines."""
    alpha, beta = (np.asarray(points, np.float64) for points in (code.alpha, code.beta))
    answers = model(spline_matrix(alpha, beta, 0.0) @ x)[available]
    return spline_matrix(beta[available], alpha, float(code.lambda_dec)) @ answers


def _goal(criterion="mse", order=None, buffer_size=None, augment=None, sets=1):
    target = Target(fidelity=0.7, label_weight=0.3, label_criterion=lambda y, label: -y[label])
    sampling = Sampling(2, sets, order=order, buffer_size=buffer_size, augment=augment)
    return _Goal(criterion, target, sampling)


@pytest.mark.parametrize(("criterion", "labelled"), [("mse", False), ("cross_entropy", True)])
def test_the_objective_is_coded_error_and_fidelity_and_labels(criterion, labelled, dtype, key):
    code = nj.NeRCC(K, N, lambda_enc=0.0, lambda_dec=1e-3)
    x = X[: 2 * K].astype(dtype).reshape(2, K, INPUTS)
    labels = np.arange(2 * K) % OUTPUTS
    moved = eqx.tree_at(lambda m: m.second, network(dtype), jnp.asarray(SECOND.T[::-1].T, dtype))
    goal = _goal(criterion=criterion, sets=20)
    reported = goal(
        moved, network(dtype), code, ONE, jnp.asarray(x),
        jnp.asarray(labels).reshape(2, K) if labelled else None, key,
    )  # fmt: skip

    def point_loss(decoded, original):
        if criterion == "mse":
            return np.mean((decoded - original) ** 2, axis=-1)
        p, q = scipy.special.softmax(original, -1), scipy.special.softmax(decoded, -1)
        return scipy.special.rel_entr(p, q).sum(-1)

    g = functools.partial(numpy_network, second=SECOND.T[::-1].T)
    x = x.astype(float)
    masks = ~np.eye(N, dtype=bool)  # all sets of one straggler, as 20 would do
    coded = [
        point_loss(coded_outputs(code, group, mask, g), numpy_network(group))
        for group, mask in itertools.product(x, masks)
    ]
    kept = point_loss(g(x), numpy_network(x))
    wanted = np.mean(coded) + 0.7 * np.mean(kept)
    if labelled:
        wanted -= 0.3 * np.mean(g(x.reshape(-1, INPUTS))[np.arange(2 * K), labels])
    assert reported.dtype == dtype
    tolerance = {"float32": 2e-4, "float64": 1e-9}[dtype]
    assert float(reported) == pytest.approx(wanted, rel=tolerance)


def test_the_gradient_in_the_parameters_is_that_of_finite_differences(key):
    with jax.enable_x64(True):
        code = nj.NeRCC(K, N, lambda_enc=0.0, lambda_dec=1e-3)
        x, model = jnp.asarray(X[:K], float)[None], network("float64")
        goal = _goal(sets=20)
        free = _free(model)

        @jax.jit
        def loss(parameters):
            moved = _with(model, free, parameters)
            return goal(moved, network("float64"), code, ONE, x, jnp.array([[0, 1, 2]]), key)

        here = [1.1 * jnp.asarray(FIRST), 0.9 * jnp.asarray(SECOND)]
        slopes = jax.jit(jax.grad(loss))(here)
        for seed in range(3):
            draw = np.random.default_rng(seed)
            way = [jnp.asarray(draw.normal(size=p.shape)) for p in here]
            along = [
                loss([p + sign * 1e-5 * w for p, w in zip(here, way, strict=True)])
                for sign in (1, -1)
            ]
            slope = sum(jnp.sum(s * w) for s, w in zip(slopes, way, strict=True))
            assert float(slope) == pytest.approx(float(along[0] - along[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("buffer", [None, 4 * K, 1000])
def test_ordered_buffers_are_cut_into_neighbours(buffer, key):
    """With points on a line and all of them in the buffer, groups are runs of the line."""
    x = jnp.asarray(np.random.default_rng(0).permutation(8 * K), float)[:, None]
    sampling = Sampling(order=lambda batch: jnp.argsort(batch[:, 0]), buffer_size=buffer)
    groups, labels = sampling.draw(K, x, 2 * x[:, 0].astype(int), key)
    assert groups.shape == (2, K, 1)
    np.testing.assert_array_equal(labels, 2 * groups[..., 0])
    flat = np.asarray(groups)[..., 0]
    assert len(np.unique(flat)) == 2 * K
    assert (np.diff(flat, axis=1) > 0).all()
    if buffer == 1000:
        np.testing.assert_array_equal(np.diff(flat, axis=1), 1)
        np.testing.assert_array_equal(flat[:, 0] % K, 0)


@pytest.mark.slow
def test_augmentation_changes_what_both_models_see(key):
    x = jnp.asarray(X[: 4 * K])
    sampling, plain = Sampling(augment=lambda batch, key: batch + 10), Sampling()
    np.testing.assert_allclose(
        sampling.draw(K, x, None, key)[0], plain.draw(K, x, None, key)[0] + 10
    )


# -- What it finds ---------------------------------------------------------------------------------


def test_coded_predictions_come_nearer_and_clean_ones_stay():
    """On data points that it has not seen, by the oracle's splines."""
    result, _ = tuned()
    assert result.objective < 0.85
    first, second = (np.asarray(w, float) for w in (result.model.first, result.model.second))
    g = functools.partial(numpy_network, first=first, second=second)
    groups = corners(40 * K, 9).reshape(40, K, INPUTS)
    errors = [
        [
            np.mean((coded_outputs(SPLINES, x, np.arange(N) != gone, m) - numpy_network(x)) ** 2)
            for x, gone in zip(groups, itertools.cycle(range(N)), strict=False)
        ]
        for m in (numpy_network, g)
    ]
    assert np.mean(errors[1]) < 0.9 * np.mean(errors[0])
    fresh = groups.reshape(-1, INPUTS)
    assert np.mean(labels_of(fresh) == np.argmax(g(fresh), axis=1)) > 0.8


def test_the_result_is_the_best_of_the_allowed_looks():
    result, seen = tuned()
    judged = [step for step in result.history if step.held_out is not None]
    assert [step.step for step in judged] == [0, 50, 100, 150]
    assert [step for step, _ in seen] == judged
    assert (judged[0].held_out, judged[0].agreement) == (pytest.approx(1, rel=1e-5), 1.0)
    allowed = [step for step in judged if step.agreement >= 0.9]
    assert result.objective == min(step.held_out for step in allowed)
    place = [step.held_out for step in judged].index(result.objective)
    np.testing.assert_array_equal(result.model.first, seen[place][1].first)
    assert result.agreement == judged[place].agreement
    assert [step.objective is None for step in result.history] == 150 * [False] + [True]
    # Four groups a step; ten held out, judged before the first step and at four looks.
    assert result.differentiated == 150 * 4 * (K + N)
    assert result.evaluations == 150 * 4 * (2 * K + N) + 30 + 10 * (K + N) + 4 * (30 + 10 * N)
    assert result.accuracy is result.original_accuracy is None


def test_a_model_that_has_changed_too_much_is_not_taken():
    seen = []
    result = fine_tune(
        network(), CODE, X, ONE, key=jax.random.key(0), sampling=QUICK,
        target=Target(fidelity=0.0, tolerance=0.0), descent=quick(learning_rate=0.5),
        on_step=looks(seen),
    )  # fmt: skip
    assert min(step.agreement for step, _ in seen) < 1
    assert result.agreement == 1
    taken = [step for step, _ in seen if step.agreement == 1]
    assert result.objective == min(step.held_out for step in taken)


@pytest.mark.slow
def test_with_labels_accuracy_decides_and_rises():
    """A model that knows little, and labels that a better one gave."""
    labels, seen = np.argmax(X @ TRUTH, axis=1), []
    result = fine_tune(
        network(), CODE, X, ONE, key=jax.random.key(0), labels=labels, criterion="cross_entropy",
        target=Target(label_weight=3.0, tolerance=0.0), sampling=QUICK,
        descent=quick(60, learning_rate=2e-2), on_step=looks(seen),
    )  # fmt: skip
    assert result.original_accuracy is not None
    assert result.accuracy >= result.original_accuracy
    last = result.history[-1]
    assert last.accuracy > result.original_accuracy + 0.2
    assert last.agreement < 0.9  # which labels excuse
    choice = np.argmax(np.asarray(seen[-1][1](jnp.asarray(X))), axis=1)
    assert np.mean(choice == labels) > np.mean(labels_of(X) == labels) + 0.2


@pytest.mark.slow
def test_going_on_keeps_the_first_models_outputs_as_the_target():
    """From a spoilt model back to the original, which the fidelity term alone wants."""
    spoilt = eqx.tree_at(lambda m: m.second, network(), jnp.asarray(1.3 * SECOND, "float32"))
    result = fine_tune(
        spoilt, CODE, X, ONE, key=jax.random.key(0), sampling=QUICK,
        target=Target(original=network(), fidelity=100.0), descent=quick(60, learning_rate=1e-2),
    )  # fmt: skip
    before, after = (np.mean((m(X) - numpy_network(X)) ** 2) for m in (spoilt, result.model))
    assert after < 0.2 * before
    assert result.history[0].held_out > 1.02


@pytest.mark.slow
def test_codes_take_turns_with_laws_of_their_own(key):
    """One code meets stragglers, the other none; and each compiles once."""
    traces = []

    class Counted(Network):
        def __call__(self, batch):
            traces.append(batch.shape[0])
            return super().__call__(batch)

    model = Counted(jnp.asarray(FIRST, "float32"), jnp.asarray(SECOND, "float32"), jnp.array(0))
    codes = [nj.Berrut(2, 5), nj.Berrut(3, 7)]
    result = fine_tune(
        model, codes, X, [ONE, NOBODY], key=key, target=Target(tolerance=1.0), sampling=QUICK,
        descent=quick(40, 40, 1e-2),
    )  # fmt: skip
    assert result.objective < 1
    assert {4 * 5, 4 * 7, 4 * 2, 4 * 3} <= set(traces)
    assert len(traces) < 60  # 40 steps would make 120 of their own
    assert result.differentiated == 20 * 4 * (2 + 5) + 20 * 4 * (3 + 7)


@pytest.mark.slow
def test_one_seed_gives_one_model_to_the_last_bit():
    runs: list[Any] = []
    for seed in (3, 3, 4):
        fine_tune(
            network(), CODE, X, ONE, key=jax.random.key(seed), target=Target(tolerance=1.0),
            sampling=QUICK, descent=quick(2, 2, 1e-2), on_step=looks(runs),
        )  # fmt: skip
    after = [np.asarray(model.first).tobytes() for _, model in runs[1::2]]
    assert after[0] == after[1] != after[2]
    np.testing.assert_array_equal(runs[0][1].first, network().first)


# -- What is trained -------------------------------------------------------------------------------


class Normed(nnx.Module):
    """A layer, a batch norm with running statistics, a layer."""

    def __init__(self):
        self.first = nnx.Linear(INPUTS, 8, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(1))
        self.second = nnx.Linear(8, OUTPUTS, rngs=nnx.Rngs(2))

    def __call__(self, batch):
        return self.second(jnp.tanh(self.norm(self.first(batch))))


def test_running_statistics_stay(key):
    model = Normed()
    model.norm.mean.set_value(jnp.full(8, 0.3))
    model.eval()
    seen = []
    fine_tune(
        model, CODE, X, ONE, key=key, sampling=QUICK, descent=quick(learning_rate=1e-2),
        on_step=looks(seen),
    )  # fmt: skip
    norm, after = model.norm, seen[-1][1].norm
    np.testing.assert_array_equal(after.mean[...], norm.mean[...])
    np.testing.assert_array_equal(after.var[...], norm.var[...])
    assert np.all(np.asarray(after.scale[...]) != np.asarray(norm.scale[...]))
    np.testing.assert_array_equal(norm.mean[...], np.full(8, 0.3, "float32"))


def test_integers_stay():
    result, _ = tuned()
    assert int(result.model.steps) == 7
    assert np.all(np.asarray(result.model.first) != np.asarray(network().first))


def test_batch_statistics_are_refused(key):
    model = Normed()
    model.train()
    with pytest.raises(ValueError, match=r"in training mode: its BatchNorm at norm"):
        fine_tune(model, CODE, X, ONE, key=key, sampling=QUICK)

    class Centred(Network):
        """No layer says so, but answers depend on each other."""

        def __call__(self, batch):
            return super().__call__(batch - jnp.mean(batch, axis=0))

    hidden = Centred(jnp.asarray(FIRST, "float32"), jnp.asarray(SECOND, "float32"), jnp.array(0))
    with pytest.raises(ValueError, match=r"depends on the others of its batch.*evaluation mode"):
        fine_tune(hidden, CODE, X, ONE, key=key, sampling=QUICK)


def test_steps_that_are_not_finite_change_nothing_and_are_reported():
    """One data point breaks the model where it is mixed with others."""

    class Fragile(Network):
        def __call__(self, batch):
            broken = jnp.max(jnp.abs(batch), axis=1, keepdims=True) > 8
            return jnp.where(broken, jnp.nan, super().__call__(batch))

    model = Fragile(jnp.asarray(FIRST, "float32"), jnp.asarray(SECOND, "float32"), jnp.array(0))
    key = jax.random.key(0)
    order = np.asarray(jax.random.permutation(jax.random.split(key, 3)[0], len(X)))
    x = X.copy()
    x[order[60]] = 50  # one that is not held out
    seen = []
    with pytest.warns(RuntimeWarning, match=r"\d+ of 20 steps were rejected"):
        result = fine_tune(
            model, CODE, x, ONE, key=key, target=Target(tolerance=1.0), sampling=QUICK,
            descent=quick(20, 1, 1e-2), on_step=looks(seen),
        )  # fmt: skip
    assert 0 < result.rejected < 20
    assert result.objective < 1
    for (before, model), (_, later) in itertools.pairwise(seen):
        same = np.array_equal(model.first, later.first)
        assert same == before.rejected
        assert np.isfinite(before.objective) != before.rejected
        assert np.isfinite(later.first).all()


# -- Errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "change", "message"),
    [
        (X[:5], {}, r"x has shape \(5, 4\): tuning needs two groups of 3"),
        (np.full_like(X, np.inf), {}, "are not finite"),
        (X.astype(int), {}, "x is int"),
        (X, {"labels": np.zeros(3, int)}, r"labels have shape \(3,\); x has 150"),
        (X, {"criterion": "brier"}, "criterion must be one of mse, .* or a function"),
    ],
)
def test_bad_arguments(x, change, message, key, untyped):
    with pytest.raises(ValueError, match=message):
        fine_tune(network(), CODE, x, ONE, key=key, sampling=QUICK, **change)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"fidelity": -1.0}, "fidelity must be 0 or positive, and finite, not -1.0"),
        ({"label_weight": np.inf}, "label_weight must be 0 or positive, and finite"),
        ({"weight_decay": -1e-4}, "weight_decay must be 0 or positive"),
        ({"tolerance": np.nan}, "tolerance must be 0 or positive"),
    ],
)
def test_bad_targets(numbers, message, untyped):
    with pytest.raises(ValueError, match=message):
        Target(**numbers)


def test_codes_and_laws_must_pair(key):
    for codes, laws in (([], ONE), ([CODE, CODE], [ONE]), (CODE, [ONE, ONE])):
        with pytest.raises(ValueError, match=r"codes came with \d laws of stragglers"):
            fine_tune(network(), codes, X, laws, key=key, sampling=QUICK)
    with pytest.raises(ValueError, match="Parity has workers that run other models"):
        fine_tune(network(), nj.Parity(2, 3), X, ONE, key=key, sampling=QUICK)


def test_models_that_cannot_be_tuned(key):
    with pytest.raises(ValueError, match="function has no array to train: give a pytree"):
        fine_tune(lambda x: jnp.tanh(x), CODE, X, ONE, key=key, sampling=QUICK)
    broken = eqx.tree_at(lambda m: m.second, network(), jnp.full((16, OUTPUTS), jnp.nan))
    with pytest.raises(ValueError, match="own outputs must be finite"):
        fine_tune(broken, CODE, X, ONE, key=key, sampling=QUICK)
    with pytest.raises(ValueError, match="leave out laws under which nobody answers"):
        fine_tune(network(), CODE, X, nj.ExactStragglers(N), key=key, sampling=QUICK)
