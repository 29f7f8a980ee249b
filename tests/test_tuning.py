"""Tuning: free parameters and back, and the errors."""

import dataclasses
import gc
import itertools

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from matrices import LAYOUTS, decoder_matrix, encoder_matrix

import nercc_jax as nj
from nercc_jax import parametrize
from nercc_jax.evaluation.objective import make_trial
from nercc_jax.tuning import Descent, Sampling
from nercc_jax.tuning._sampling import split_points

K, N = 3, 6

# -- Parameters ------------------------------------------------------------------------------------

# Ends, twins, an alpha that is a beta, and no order.
POINTS = (np.array([0.6, -0.8, 0.1]), np.array([0.2, 1.0, -0.5, 0.2, -1.0, 0.1]))


@pytest.mark.parametrize("layout", [*LAYOUTS, "own"])
def test_parameters_start_at_the_code(layout, dtype):
    code = nj.NeRCC(
        K,
        N,
        lambda_enc=3e-9,
        lambda_dec=2e-5,
        gap_exponent=-1.25,
        end_penalty=70.0,
        points=POINTS if layout == "own" else layout,
    )
    free, rebuild = parametrize(code, points=True)
    assert free.keys() == {
        "log_lambda_enc",
        "log_lambda_dec",
        "log_end_penalty",
        "gap_exponent",
        "alpha_shifts",
        "beta_shifts",
    }
    again = rebuild(free)
    assert jax.tree.structure(again) == jax.tree.structure(code)
    # A logarithm of 20 has an absolute rounding of 20 eps, which exp makes a relative one.
    for name in ("lambda_enc", "lambda_dec", "end_penalty"):
        rounding = 50 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(getattr(again, name), getattr(code, name), rtol=rounding)
    assert float(again.gap_exponent) == -1.25
    for name in ("alpha", "beta"):
        assert getattr(again, name).dtype == dtype
        np.testing.assert_allclose(getattr(again, name), getattr(code, name), atol=1e-6)
    for step in (-30, 30):  # as long as a step may be, no lambda becomes negative, or zero
        moved = rebuild(free | {name: free[name] + step for name in free if name[:3] == "log"})
        assert min(moved.lambda_enc, moved.lambda_dec, moved.end_penalty) > 0
    fixed, rebuild = parametrize(code, points=False)
    np.testing.assert_array_equal(rebuild(fixed).beta, code.beta)
    assert fixed.keys() == {n for n in free if not n.endswith("_shifts")}


class PointsAlone(nj.AbstractCode):
    """An own code whose only fields are its points."""

    alpha: jax.Array
    beta: jax.Array
    num_data = property(lambda self: len(self.alpha))
    num_workers = property(lambda self: len(self.beta))

    def encoder_matrix(self):
        return jnp.eye(self.num_workers, self.num_data)

    def decoder_matrix(self, available):
        return self.encoder_matrix().T * available

    def recovered(self, available):
        return available[: self.num_data]


def test_points_may_be_all_that_is_free():
    code = PointsAlone(*(jnp.asarray(each, jnp.float32) for each in POINTS))
    assert parametrize(code, points=True)[0].keys() == {"alpha_shifts", "beta_shifts"}


@pytest.mark.parametrize("lambda_", [0.0, 1.0, 1e6, np.inf])
def test_no_smoothing_and_far_too_much_start_from_hardly_any(lambda_):
    """From 1e6 the objective is flat, and tuning stayed there."""
    code = nj.NeRCC(K, N, lambda_enc=lambda_, lambda_dec=lambda_, end_penalty=0.0)
    free, _ = parametrize(code, points=False)
    for name, points in (("log_lambda_enc", code.alpha), ("log_lambda_dec", code.beta)):
        least = 4 * np.log(oracle.mean_gap(np.asarray(points)) / 30)
        np.testing.assert_allclose(free[name], least, rtol=1e-5)
    assert float(free["log_end_penalty"]) == 0


SHIFTS = st.floats(-2, 2, width=32)


@hypothesis.given(
    st.lists(SHIFTS, min_size=3, max_size=3), st.lists(SHIFTS, min_size=2, max_size=2)
)
@hypothesis.settings(max_examples=25)
def test_points_keep_their_order_their_twins_and_their_ends(alpha_shifts, beta_shifts):
    with jax.enable_x64(True):
        code = nj.NeRCC(K, N, points=POINTS)
        free, rebuild = parametrize(code, points=True)
        shifts = {"alpha_shifts": np.array(alpha_shifts), "beta_shifts": np.array(beta_shifts)}
        # Of the betas, 0.2 with its twin and -0.5 move: not the ends, nor the one on an alpha.
        moved = rebuild(
            {name: value.at[: len(shifts[name])].set(shifts[name]) if name in shifts else value
             for name, value in free.items()}
        )  # fmt: skip
        more = free | {"beta_shifts": free["beta_shifts"].at[2:].set(1.0)}
        np.testing.assert_array_equal(rebuild(more).beta, rebuild(free).beta)
        alpha, beta = np.asarray(moved.alpha), np.asarray(moved.beta)
        # Gaps of angles before and after a point grow and shrink by the exponential of its shift.
        order, gone = np.argsort(-POINTS[0]), np.append(alpha_shifts, 0)
        gaps = np.diff(np.concatenate([[0], np.arccos(POINTS[0])[order], [np.pi]]))
        gaps *= np.exp(np.diff(gone, prepend=0))
        angles = np.pi * np.cumsum(gaps)[:-1] / gaps.sum()
        np.testing.assert_allclose(alpha[order], np.cos(angles), atol=1e-12)
        assert (np.diff(alpha[order]) < 0).all()
        assert beta[1] == 1
        np.testing.assert_allclose(beta[4], -1, atol=1e-12)
        assert beta[0] == beta[3], "twins"
        assert beta[5] == alpha[2], "it follows"
        assert -1 < beta[2] < beta[0] < 1


FREE_BETAS = {"interleaved": 3, "mixed:0.4": 2, "repeated": 0}


@pytest.mark.parametrize("layout", FREE_BETAS)
def test_betas_follow_their_alphas(layout):
    code = nj.NeRCC(K, N, points=layout)
    free, rebuild = parametrize(code, points=True)
    shifts = jnp.array([0.3, -0.2, 0.5])
    both = {"alpha_shifts": shifts, "beta_shifts": jnp.resize(shifts, N)}
    moved, slopes = rebuild(free | both), jax.jacfwd(lambda b: rebuild(free | b).beta)(both)
    moving = np.any(np.asarray(slopes["beta_shifts"]) != 0, axis=0)
    assert np.sum(moving) == FREE_BETAS[layout]
    assert np.abs(moved.alpha - code.alpha).min() > 1e-3
    same = np.asarray(code.beta)[:, None] == np.asarray(code.alpha)
    assert same.any(axis=0).all()
    np.testing.assert_array_equal(np.asarray(moved.beta)[:, None] == np.asarray(moved.alpha), same)


def test_an_exact_code_keeps_sending_data_points_as_they_are():
    for exact, lambda_enc in ((True, 0.0), (True, 1e-6), (False, 0.0)):
        code = nj.NeRCC(K, N, points="interleaved", exact=exact, lambda_enc=lambda_enc)
        free, rebuild = parametrize(code, points=False)
        kept = exact and lambda_enc == 0
        assert ("log_lambda_enc" in free) is not kept
        assert (float(rebuild(free).lambda_enc) == 0) is kept


def test_slopes_where_points_coincide():
    """Of the objective in all free parameters: as finite differences have them."""
    with jax.enable_x64(True):
        code = nj.NeRCC(K, N, points="mixed:0.4", exact=True, lambda_dec=1e-3, end_penalty=5.0)
        free, rebuild = parametrize(code, points=True)
        x = np.random.default_rng(2).normal(size=(2, K, 2))
        masks = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1], [1, 0, 1, 0, 1, 0]], bool)

        @jax.jit
        def objective(free):
            return nj.nested_objective(lambda x: jnp.sin(3 * x), rebuild(free), x, masks)

        free |= {n: free[n] + jnp.linspace(0.1, 0.3, free[n].size) for n in free if "shifts" in n}
        for name, slope in jax.grad(objective)(free).items():
            for i in range(slope.size):
                step = 1e-5 * np.eye(slope.size)[i].reshape(slope.shape)
                two = [float(objective(free | {name: free[name] + s})) for s in (-step, step)]
                difference = (two[1] - two[0]) / 2e-5
                expected = np.asarray(slope).reshape(-1)[i]
                np.testing.assert_allclose(difference, expected, rtol=1e-4, atol=1e-7)


def own_code(**metadata):
    """A code with one number, as someone declares it."""

    class Own(nj.Uncoded):
        width: jax.Array = eqx.field(default=2.0, converter=jnp.asarray, metadata=metadata)

    return Own(K)


@pytest.mark.parametrize(("scale", "name"), [("log", "log_width"), ("plain", "width")])
def test_a_code_of_ones_own_declares_what_can_be_tuned(scale, name):
    free, rebuild = parametrize(own_code(tune=scale))
    assert free.keys() == {name}
    assert float(rebuild(free).width) == pytest.approx(2.0)
    moved = rebuild({name: free[name] + 1}).width
    assert float(moved) == pytest.approx(2 * np.e if scale == "log" else 3.0)


def test_a_code_of_ones_own_that_declares_nothing_is_told_how():
    with pytest.raises(ValueError, match=r"nothing to tune: declare a number by eqx\.field"):
        parametrize(own_code())
    with pytest.raises(ValueError, match="width: 'tune' is 'log' or 'plain', not 'linear'"):
        parametrize(own_code(tune="linear"))


# -- Trials ----------------------------------------------------------------------------------------

LAWS = {"0": nj.ExactStragglers(0), "2": nj.ExactStragglers(2)}
WEIGHTS = np.random.default_rng(0).normal(size=(2, 3)).astype("float32")
DATA = np.random.default_rng(1).normal(size=(60, 2)).astype("float32")


def model(x):
    return jnp.tanh(3 * x @ WEIGHTS)


@pytest.fixture(scope="module")
def start():
    return nj.NeRCC(K, N)


def test_the_objective_is_the_mean_of_relative_errors(start):
    """Against errors by hand, in float64; a law with few sets gives all of them."""
    groups = DATA[:12].reshape(4, K, 2)
    trial = make_trial(model, start, groups, LAWS, key=jax.random.key(0), num_sets=5)
    # One set of no stragglers, five drawn of the fifteen of two.
    np.testing.assert_array_equal(trial.law, [0, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(trial.available.sum(axis=1), [N] + 5 * [N - 2])
    x, weights = groups.astype(float), WEIGHTS.astype(float)

    def plain(code, available=trial.available):
        own, y = (np.tanh(3 * points @ weights) for points in (x, encoder_matrix(code) @ x))
        errors = [np.mean((decoder_matrix(code, m) @ y - own) ** 2) for m in available]
        return np.array([errors[0], np.mean(errors[1:])])

    other, numbers = nj.NeRCC(K, N, lambda_dec=1e-2), [jnp.asarray(1e-4), jnp.asarray(1e-6)]
    cell = eqx.tree_at(lambda c: [c.lambda_enc, c.lambda_dec], start, numbers)
    for code in (start, other, cell):
        errors, value = trial.errors(model, code)
        np.testing.assert_allclose(errors, plain(code), rtol=1e-4)
        assert float(value) == pytest.approx(np.mean(plain(code) / plain(start)), rel=1e-4)
    # A set that recovers nothing is left out, not counted as without an error.
    lost = eqx.tree_at(lambda trial: trial.available, trial, trial.available.at[2].set(False))
    expected = plain(start, np.delete(trial.available, 2, axis=0))
    np.testing.assert_allclose(lost.errors(model, start)[0], expected, rtol=1e-4)


def test_a_trial_names_the_laws_under_which_a_start_has_no_finite_error(start):
    groups, laws = DATA[:12].reshape(4, K, 2), LAWS | {"all": nj.ExactStragglers(N)}
    for served, broken in ((model, "{'all': nan}"), (lambda x: 3e25 * x, "'2': inf, 'all': nan}")):
        with pytest.raises(ValueError, match=f"starting code's errors are .*{broken}: leave out"):
            make_trial(served, start, groups, laws, key=jax.random.key(0), num_sets=5)


# -- Tuning ----------------------------------------------------------------------------------------

SAMPLING = Sampling(groups_per_step=2, sets_per_step=5, held_out_sets=10)
OPTIONS = {"sampling": SAMPLING, "descent": Descent(steps=12, check_every=4)}


@pytest.fixture(scope="module")
def runs(start):
    """With and without points, and what the model and the caller saw of the first."""
    traces, steps = [], []

    def counted(x):
        traces.append(x.shape)
        return model(x)

    key = jax.random.key(3)
    moved = nj.tune(
        counted, (start,), DATA, LAWS, key=key,
        on_step=lambda step, code: steps.append((step, code)), **OPTIONS,
    )  # fmt: skip
    number = len(traces)
    fixed = nj.tune(model, start, DATA, LAWS, key=key, points=False, **OPTIONS)
    return moved, fixed, number, steps


def test_tuning_lowers_the_error_and_points_lower_it_further(runs, start):
    moved, fixed, _, _ = runs
    assert moved.objective < fixed.objective < 1
    np.testing.assert_array_equal(fixed.code.beta, start.beta)
    assert np.max(np.abs(moved.code.beta - start.beta)) > 1e-2
    assert float(fixed.code.lambda_dec) != float(start.lambda_dec)
    groups = np.random.default_rng(7).normal(size=(20, K, 2)).astype("float32")
    trial = make_trial(model, start, groups, LAWS, key=jax.random.key(9), num_sets=15)
    assert float(trial.errors(model, moved.code)[1]) < 0.97, "on other data, too"
    for tuned in (moved, fixed):
        held_out = [step.held_out for step in tuned.history if step.held_out is not None]
        assert tuned.objective == min(1.0, *held_out)
        assert tuned.rejected == 0


def test_every_step_is_reported_and_counted(runs):
    moved, _, _, reported = runs
    steps = [step for step, _ in reported]
    assert list(moved.history) == steps
    best = min((step.held_out, n) for n, step in enumerate(steps) if step.held_out is not None)[1]
    started_from = jax.tree.leaves(reported[best][1])
    assert all(map(np.array_equal, started_from, jax.tree.leaves(moved.code)))
    assert len({float(code.lambda_dec) for _, code in reported}) == len(steps)
    assert [step.step for step in steps] == list(range(13))
    assert [step.step for step in steps if step.held_out is not None] == [0, 4, 8, 12]
    assert [step.objective is None for step in steps] == 12 * [False] + [True]


def test_all_steps_share_one_compilation(runs):
    # The model is traced for originals, scales, judging and the step, each once, and again inside
    # transformations of those; a trace a step would be twelve more.
    assert runs[2] <= 8


def test_one_seed_gives_one_code_to_the_last_bit_and_no_programs_are_left(runs, start):
    """Some 40 descents in one process had as many programs as there is memory mapped for."""
    programs = jax.devices()[0].client.live_executables
    gc.collect()
    before = len(programs())
    again = nj.tune(model, (start,), DATA, LAWS, key=jax.random.key(3), **OPTIONS)
    gc.collect()
    assert len(programs()) <= before
    assert jax.tree.structure(again.code) == jax.tree.structure(runs[0].code)
    for one, other in zip(jax.tree.leaves(again.code), jax.tree.leaves(runs[0].code), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    other = nj.tune(
        model, (start,), DATA, LAWS, key=jax.random.key(4), sampling=SAMPLING,
        descent=Descent(steps=4, check_every=4),
    )  # fmt: skip
    assert not np.array_equal(other.code.beta, again.code.beta)


def test_a_code_begins_with_workers_on_its_data_points_and_starts_as_they_are(key):
    seen = []
    code, few = nj.NeRCC(K, N), {"sampling": SAMPLING, "descent": Descent(steps=3)}
    few |= {"key": key, "on_step": lambda step, code: seen.append(np.asarray(code.beta))}
    nj.tune(model, code, DATA, LAWS, **few)
    assert np.sum(np.abs(seen[0] - code.beta) > 1e-3) == K
    assert set(np.asarray(code.alpha)) <= set(seen[0])
    nj.tune(model, code, DATA, LAWS, points=False, **few)
    np.testing.assert_array_equal(seen[4], code.beta)
    # Of several starts the best counts.
    starts = (code, nj.NeRCC(K, N, points="interleaved"))
    tuned = nj.tune(model, starts, DATA, LAWS, **few)
    for place, start in zip((8, 12), starts, strict=True):
        np.testing.assert_allclose(seen[place], start.beta, atol=1e-6)
    assert [step.step for step in tuned.history] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert tuned.objective <= nj.tune(model, starts[:1], DATA, LAWS, **few).objective


def test_any_optimizer_and_lbfgs_lower_the_error_from_the_same_start(start, untyped):
    options = {"key": jax.random.key(3), "sampling": SAMPLING}
    slow = optax.chain(optax.clip(1.0), optax.sgd(0.1))
    by_sgd = nj.tune(
        model, (start,), DATA, LAWS, optimizer=slow, descent=Descent(steps=12), **options
    )
    assert by_sgd.objective < 1
    better = nj.tune(
        model, (start,), DATA, LAWS, optimizer="lbfgs", descent=Descent(steps=12), **options
    )
    assert better.objective < by_sgd.objective
    values = [step.objective for step in better.history if step.objective is not None]
    assert len(values) >= len(better.history) - 1, "all but the last step have an objective"
    assert values == sorted(values, reverse=True), "one draw, on which each step goes down"


def test_convergence_is_judged_on_the_held_out_groups(start):
    options = {"key": jax.random.key(3), "sampling": SAMPLING}
    still = Descent(steps=16, check_every=2, learning_rate=1e-9)
    assert nj.tune(model, (start,), DATA, LAWS, descent=still, **options).converged
    options |= {"optimizer": optax.adam(0.02), "descent": Descent(steps=16, check_every=2)}
    assert not nj.tune(model, (start,), DATA, LAWS, **options).converged, "it is on its way"


def test_laws_without_an_error_are_left_out(key):
    code = nj.NeRCC(K, N, points="repeated", lambda_dec=0.0, exact=True)
    few = {"key": key, "sampling": SAMPLING, "descent": Descent(steps=3)}
    tuned = nj.tune(model, code, DATA, LAWS, **few)
    assert tuned.history[0].held_out == pytest.approx(1, abs=1e-3)


def test_steps_that_are_not_finite_change_nothing_and_are_reported():
    """One training point breaks the model, so the steps that draw it are rejected."""
    code, key = nj.Berrut(K, N), jax.random.key(0)
    training = split_points(DATA, K, Sampling(), jax.random.fold_in(key, 0))[0]
    x = np.where((training[:1] == DATA).all(axis=1, keepdims=True), np.float32(50), DATA)

    def fragile(x):
        return jnp.where(jnp.max(jnp.abs(x), axis=1, keepdims=True) > 8, jnp.nan, model(x))

    shifts = []
    with pytest.warns(RuntimeWarning, match=r"\d+ of 30 steps were rejected"):
        tuned = nj.tune(
            fragile, (code,), x, LAWS, key=key, sampling=SAMPLING,
            descent=Descent(steps=30, check_every=1),
            on_step=lambda step, code: shifts.append(step),
        )  # fmt: skip
    assert 0 < tuned.rejected < 30
    assert tuned.objective < 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tuned.code))
    for before, after in itertools.pairwise(shifts):
        if before.rejected:
            assert after.held_out == before.held_out
            assert not np.isfinite(before.objective)
        else:
            assert after.held_out != before.held_out


@pytest.mark.slow
def test_tuning_by_groups_never_mixes_them(key):
    """All points of a group share a whole number; a mixture of groups shows and breaks the model.

    Rows of the encoder sum to one, so within a group the number stays.
    """
    x = np.concatenate([np.repeat(np.arange(20.0), K)[:, None], DATA], axis=1).astype("float32")

    def fragile(x):
        whole = jnp.abs(x[:, :1] - jnp.round(x[:, :1])) < 1e-3
        return jnp.where(whole, model(x[:, 1:]), jnp.nan)

    options = OPTIONS | {"key": key, "points": True}
    grouped = {"sampling": dataclasses.replace(SAMPLING, grouped=True)}
    tuned = nj.tune(fragile, nj.Berrut(K, N), x, LAWS, **options | grouped)
    assert tuned.rejected == 0
    assert len(tuned.history) == 13
    with pytest.raises(ValueError, match="finite answers on coded data points"):
        nj.tune(fragile, nj.Berrut(K, N), x, LAWS, **options)


@pytest.mark.parametrize("code", [nj.Berrut(K, N), nj.Lagrange(K, N)], ids=["berrut", "lagrange"])
def test_of_codes_without_numbers_points_are_tuned(code):
    assert parametrize(code, points=True)[0].keys() == {"alpha_shifts", "beta_shifts"}
