"""The search for a layout: against brute force, and as the command runs it."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrices import errors_of_sets

import nercc_jax as nj
from nercc_jax import search_layout
from nercc_jax.codes import regression_points
from nercc_jax.stragglers import straggler_sets
from nercc_jax.tuning import Descent, LayoutTuning, Sampling
from nercc_jax.tuning._sampling import split_points

K, N = 4, 8
LAWS = {"1": nj.ExactStragglers(1), "3": nj.ExactStragglers(3)}
RNG = np.random.default_rng(0)
FIRST, SECOND = (RNG.normal(size=size).astype("float32") for size in ((3, 8), (8, 4)))
DATA = RNG.normal(size=(64, 3)).astype("float32")
LAYOUTS = ("chebyshev", "interleaved", "repeated", "systematic:0.5")
HALF = Sampling(held_out_share=0.5, held_out_sets=12)
OPTIONS = {"layouts": LAYOUTS, "sampling": HALF}
PLAIN = LayoutTuning(best=0)


def model(x):
    return jnp.tanh(2 * x @ FIRST) @ SECOND


@pytest.fixture(scope="module")
def reported():
    """What the search below says of itself as it goes."""
    return []


@pytest.fixture(scope="module")
def search(reported):
    return search_layout(
        model, DATA, K, N, LAWS, key=jax.random.key(1), on_stage=reported.append,
        tuning=LayoutTuning(best=1, descent=Descent(steps=10, check_every=5)), **OPTIONS,
    )  # fmt: skip


def held_out(key):
    """The groups and straggler sets that the search decides on."""
    groups = split_points(DATA, K, HALF, jax.random.fold_in(key, 0))[1].reshape(-1, K, 3)
    keys = (jax.random.fold_in(jax.random.fold_in(key, 2), place) for place in range(len(LAWS)))
    masks = [straggler_sets(law, key, N, 12) for law, key in zip(LAWS.values(), keys, strict=True)]
    law = np.repeat(np.arange(len(masks)), [len(sets) for sets in masks])
    return groups, np.concatenate(masks), law


def disagreement(code, groups, masks, law):
    """Set by set, from the code's matrices; what is lost is wrong."""
    own = np.stack([model(group) for group in groups])
    answers = np.stack([model(code.encode(group)) for group in groups])
    matrix = eqx.filter_jit(lambda code, mask: code.decoder_matrix(mask))
    wrong = []
    for mask in masks:
        decoded = np.asarray(matrix(code, mask), np.float64) @ answers
        same = (decoded.argmax(-1) == own.argmax(-1)) & np.asarray(code.recovered(mask))
        wrong.append(1 - same.mean())
    return np.mean([np.mean(np.array(wrong)[law == place]) for place in np.unique(law)])


def test_candidates_are_scored_as_brute_force_does(search):
    held = held_out(jax.random.key(1))
    chosen = {(c.layout, c.tuned, c.code.exact): c for c in search.candidates}
    assert len(chosen) == 4 * 2, "smoothed and exact, but for chebyshev; and one tuned"
    for candidate in list(chosen.values())[::3]:
        expected = disagreement(candidate.code, *held)
        # A label or two may hang on a rounding.
        assert candidate.disagreement == pytest.approx(expected, abs=2 / 32 / 24)
        assert candidate.objective == candidate.disagreement


def test_nothing_plain_is_better_nor_is_replication(search):
    best = search.candidates[0]
    objectives = [c.objective for c in search.candidates]
    assert objectives == sorted(objectives)
    assert {c.layout for c in search.candidates} == set(LAYOUTS)
    assert search.code is best.code
    lost = disagreement(nj.Replication(K, N), *held_out(jax.random.key(1)))
    repeated = min(c.objective for c in search.candidates if c.layout == "repeated")
    assert best.objective <= repeated <= lost
    assert lost > 0


def test_the_best_of_each_layout_comes_once(search):
    shown = search.best_of_layouts
    assert shown[0] is search.candidates[0]
    assert sorted(c.layout for c in shown if not c.tuned) == sorted(LAYOUTS)
    for one in shown:
        same = [c for c in search.candidates if (c.layout, c.tuned) == (one.layout, one.tuned)]
        assert one.objective == min(c.objective for c in same)


def test_the_best_layout_is_tuned(search, reported):
    (tuned,) = (c for c in search.candidates if c.tuned)
    number = len(search.candidates)
    assert reported == [
        f"judging {number - 1} untuned codes",
        f"tuning {tuned.layout}",
        f"judging {number} codes on held-out groups",
    ]
    assert tuned.code.num_workers == N


def test_a_coded_data_point_is_computed_once():
    """Interleaved and mixed points share the alphas, and those are the data points themselves."""
    calls = []

    def counted(x):
        jax.debug.callback(lambda batch: calls.append(len(batch)), x)
        return model(x)

    layouts = ("interleaved", "mixed:0.5", "repeated", "mixed:1")
    search = search_layout(
        counted, DATA, K, N, LAWS, key=jax.random.key(0), layouts=layouts, tuning=PLAIN,
        sampling=HALF, batch_size=4,
    )  # fmt: skip
    jax.effects_barrier()
    betas = [regression_points(K, N, name)[1] for name in layouts]
    distinct = len(np.unique(np.round(np.concatenate(betas), 6)))
    assert distinct < N + 4
    groups = 8 + 8
    assert search.evaluations == groups * distinct
    # Batches of one size: what fills them up counts here, less than a batch a call.
    assert search.evaluations <= sum(calls) < search.evaluations + 4 * 2 * groups
    assert {c.layout for c in search.candidates} == {"interleaved", "mixed:0.5", "repeated"}, "once"


@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
def test_errors_count_relative_to_the_first_layout(dtype):
    """Of cross-entropy; the mean squared error is searched with below, and in float32."""
    search = search_layout(
        model, DATA.astype(dtype), K, N, LAWS, key=jax.random.key(0), criterion="cross_entropy",
        tuning=PLAIN, **OPTIONS | {"layouts": LAYOUTS[:2]},
    )  # fmt: skip
    plain = nj.NeRCC(K, N)
    (first,) = (
        c
        for c in search.candidates
        if c.layout == "chebyshev" and float(c.code.lambda_dec) == float(plain.lambda_dec)
    )
    assert first.objective == pytest.approx(1, rel=1e-5)
    groups, masks, law = held_out(jax.random.key(0))
    best = search.candidates[0]
    errors = eqx.filter_jit(errors_of_sets)
    one, other = (
        np.asarray(errors(model, code, groups.astype(dtype), masks, criterion="cross_entropy"))
        for code in (best.code, plain)
    )
    ratios = [np.mean(one[law == place]) / np.mean(other[law == place]) for place in (0, 1)]
    assert best.objective == pytest.approx(np.mean(ratios), rel=1e-3)


@pytest.mark.slow
def test_one_key_gives_one_code():
    def run(seed):
        return search_layout(
            model, DATA, K, N, LAWS, key=jax.random.key(seed), tuning=PLAIN, **OPTIONS
        )

    one, again, other = run(0), run(0), run(3)
    scores = [[c.disagreement for c in r.candidates] for r in (one, again, other)]
    assert scores[0] == scores[1] != scores[2]
    for mine, theirs in zip(jax.tree.leaves(one.code), jax.tree.leaves(again.code), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.slow
def test_groups_stay_together():
    """As in the tests of tuning: what mixes two groups breaks the model."""
    x = np.concatenate([np.repeat(np.arange(16.0), K)[:, None], DATA], axis=1).astype("float32")

    def fragile(x):
        whole = jnp.abs(x[:, :1] - jnp.round(x[:, :1])) < 1e-3
        return jnp.where(whole, model(x[:, 1:]), jnp.nan)

    options = {"key": jax.random.key(0), "tuning": PLAIN, **OPTIONS, "layouts": LAYOUTS[:2]}
    search = search_layout(
        fragile, x, K, N, LAWS, **options | {"sampling": dataclasses.replace(HALF, grouped=True)}
    )
    assert all(np.isfinite(c.objective) for c in search.candidates)
    with pytest.raises(ValueError, match="finite answers on coded data points"):
        search_layout(fragile, x, K, N, LAWS, **options)


def test_one_worker_will_do():
    """Of few workers more, the command's search below has five for three."""
    laws = {"some": nj.IndependentStragglers(0.3)}
    search = search_layout(
        model, DATA[:24], 1, 1, laws, key=jax.random.key(0), tuning=PLAIN,
        sampling=dataclasses.replace(HALF, held_out_sets=6),
    )  # fmt: skip
    assert all(0 <= c.objective <= 1 for c in search.candidates)
    assert {c.layout for c in search.candidates} == {"chebyshev"}, "the same are tried once"
    assert (search.code.num_data, search.code.num_workers) == (1, 1)


@pytest.mark.slow
def test_where_the_best_code_errs_by_rounding_nothing_is_tuned():
    """With all answers interpolation is exact, and there is nothing to be relative to."""
    search = search_layout(
        model, DATA, K, N, {"0": nj.ExactStragglers(0)}, key=jax.random.key(0), criterion="mse",
        tuning=LayoutTuning(best=1), layouts=("repeated",),
    )  # fmt: skip
    assert float(search.code.lambda_dec) == 0 or search.code.exact
    assert search.candidates[0].objective < 1e-3 * search.candidates[-1].objective
    assert not any(c.tuned for c in search.candidates)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"criterion": "accuracy"}, "criterion must be one of mse, .*, not 'accuracy'"),
        ({"layouts": ()}, "there are no layouts to search"),
        ({"layouts": ("chebychev",)}, "points must be one of chebyshev"),
        ({"num_workers": 3}, "4 data points need at least 4 workers, not 3"),
        ({"stragglers": {}}, "there are no laws of stragglers"),
        ({"x": DATA[:7]}, "two groups of 4 data points"),
        ({"follow": ("pixels",)}, "follow has 'inputs' or functions, not 'pixels'"),
    ],
)
def test_errors(change, message, untyped):
    arguments = {
        "x": DATA, "num_data": K, "num_workers": N, "stragglers": LAWS, "key": jax.random.key(0)
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        search_layout(model, **arguments | change)


# -- The command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "exact"),
    [("chebyshev", False), ("systematic:0.5", False), ("systematic:1", True), ("mixed:0.5", True)],
)
def test_the_command_starts_exact_where_every_data_point_has_a_worker(layout, exact):
    from nercc_jax.cli._tune import start_code  # late, as matplotlib takes a second to import

    start = start_code(4, 10, layout)
    assert start.exact is exact
    assert np.isin(start.alpha, start.beta).all() == exact


SWEEP = Sampling(held_out_share=0.5, held_out_sets=8, grouped=True)


def bend(x):
    return jnp.concatenate([jnp.sin(3 * x[:, :1]), jnp.cos(2 * x[:, :1])], axis=1)


@pytest.fixture(scope="module")
def sweeps():
    """Groups along one parameter in uneven steps; and in even ones, beside a number that jumps."""
    random = np.random.default_rng(4)
    uneven = np.sort(random.uniform(-1, 1, (8, 8)), axis=1) ** 3
    even = np.broadcast_to(np.linspace(-1, 1, 8), (8, 8))
    jumping = np.stack([even, 5 * random.normal(size=(8, 8)) ** 3], axis=-1)
    return {
        "uneven": uneven.reshape(-1, 1).astype("float32"),
        "jumping": jumping.reshape(-1, 2).astype("float32"),
    }


@pytest.mark.parametrize(("data", "helps"), [("uneven", True), ("jumping", False)])
def test_points_follow_the_data_where_that_is_measured_to_help(sweeps, data, helps):
    found = search_layout(
        bend, sweeps[data], 8, 10, {"2": nj.ExactStragglers(2)}, key=jax.random.key(0),
        layouts=("interleaved",), criterion="mse", tuning=PLAIN, sampling=SWEEP,
        follow=("inputs",),
    )  # fmt: skip
    best = {follow: min(c.objective for c in found.candidates if c.follow == follow)
            for follow in (None, "inputs")}  # fmt: skip
    assert found.follow == ("inputs" if helps else None)
    assert (best["inputs"] < 0.75 * best[None]) == helps
    assert (best["inputs"] > best[None]) != helps
    assert len(found.best_of_layouts) == 2
