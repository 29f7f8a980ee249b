"""Evaluation against a plain NumPy account of the same definitions."""

import dataclasses
import importlib
import itertools
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from conftest import require
from matrices import decoded_by_hand, errors_of_sets

from nercc_jax import (
    Berrut,
    ExactStragglers,
    IndependentStragglers,
    Lagrange,
    NeRCC,
    Parity,
    Replication,
    evaluate,
    nested_objective,
)
from nercc_jax.evaluation import Estimate, Evaluation, Evaluations, record_answers
from nercc_jax.stragglers import straggler_sets

WEIGHTS = np.random.default_rng(5).normal(size=(3, 4)).astype("float32")
CODES = {"NeRCC": NeRCC(5, 12), "BACC": Berrut(5, 12), "copies": Replication(5, 12)}
LAWS = {"some": ExactStragglers(4), "many": ExactStragglers(9)}


def model(x):
    return jnp.tanh(x @ WEIGHTS)


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(33, 3)).astype("float32")


def test_data_points_without_an_own_answer_are_named(x):
    def broken(x):
        return np.where(x[:, :1] > 9, np.nan, np.ones((1, 2), "float32"))

    x[[4, 17]] = 10
    with pytest.raises(ValueError, match=r"not for data points \[4, 17\]"):
        record_answers(broken, NeRCC(5, 12), x)


def test_metrics_are_what_they_say(x, key):
    labels = np.random.default_rng(1).integers(0, 4, 33)
    rows = evaluate(model, CODES, x, LAWS, key=key, num_sets=3, labels=labels, batch_size=7)
    assert [(r.stragglers, r.code) for r in rows] == [(law, code) for law in LAWS for code in CODES]
    groups, by_numpy = x[:30].reshape(6, 5, 3), lambda x: np.tanh(x @ WEIGHTS)
    own, labels = by_numpy(groups.astype(float)), labels[:30].reshape(6, 5)
    for row in rows:
        keys = jax.random.fold_in(key, list(LAWS).index(row.stragglers))
        draws = [jax.random.fold_in(keys, index) for index in range(3)]
        masks = [LAWS[row.stragglers].available(draw, 12) for draw in draws]
        decoded = decoded_by_hand(CODES[row.code], by_numpy, groups, masks)
        lost, found = np.isnan(decoded[..., 0]), np.nan_to_num(decoded).argmax(-1)
        squares = ((decoded - own) ** 2).sum(-1)
        expected = {
            "mse": np.nanmean((decoded - own) ** 2),
            "rmse": np.sqrt(np.nanmean(squares)),
            "rel_acc": (~lost & (found == own.argmax(-1))).mean(),
            "accuracy": (~lost & (found == labels)).mean(),
            "lost": lost.mean(),
        }
        for metric, mean in expected.items():
            np.testing.assert_allclose(getattr(row, metric).mean, mean, rtol=1e-4, atol=1e-6)
        assert (row.num_data_points, row.num_sets) == (30, 3)
    lost = {row.code: row.lost.mean for row in rows if row.stragglers == "many"}
    assert lost["copies"] > 0
    assert lost["NeRCC"] == lost["BACC"] == 0


def test_the_workers_models_are_given_by_the_codes_name(x, key):
    """A linear model is its own parity model: exact, except where two of a group are missing."""
    codes = {"ParM": Parity(4, 6), "copies": Replication(4, 6)}
    linear = lambda x: x @ WEIGHTS  # noqa: E731

    def first(count, further):
        laws, models = {"law": ExactStragglers(count)}, {"ParM": [linear, further]}
        return evaluate(linear, codes, x, laws, key=key, workers=models, batch_size=7)[0]

    one, two, off = first(1, linear), first(2, linear), first(1, lambda x: linear(x) + 1)
    assert one.code == two.code == "ParM"
    assert one.lost.mean == 0
    assert one.rel_acc.mean == 1
    assert one.mse.mean < 1e-10
    assert 0 < two.lost.mean < 1 / 2
    np.testing.assert_allclose(two.rel_acc.mean, 1 - two.lost.mean, rtol=1e-6)
    # By the share of data points that 20 sets of one straggler leave to a parity worker.
    keys = [jax.random.fold_in(jax.random.fold_in(key, 0), index) for index in range(20)]
    masks = np.stack([ExactStragglers(1).available(key, 6) for key in keys])
    np.testing.assert_allclose(off.mse.mean, (~masks[:, :4]).mean(), rtol=1e-4)


@pytest.mark.parametrize(
    "single", [lambda y: y[:, :1], lambda y: y[:, 0], lambda y: {"a": y[:, 0]}]
)
def test_a_single_number_has_no_label_that_could_be_kept(single, x, key):
    rows = evaluate(lambda x: single(model(x)), CODES, x, LAWS, key=key, num_sets=2)
    assert all(np.isnan(row.rel_acc.mean) for row in rows)
    assert rows[0].mse.mean > 0
    assert "rel_acc" not in str(rows)
    rows.plot()
    with pytest.raises(ValueError, match="labels need outputs with a score for each class"):
        evaluate(lambda x: single(model(x)), CODES, x, LAWS, key=key, labels=np.zeros(33, int))


def test_all_lost_is_reported(x, key):
    (row,) = evaluate(
        model, {"n": NeRCC(5, 12)}, x, {"all": ExactStragglers(12)}, key=key, num_sets=2
    )
    assert row.lost.mean == 1
    assert row.rel_acc.mean == 0
    assert np.isnan(row.mse.mean)
    assert row.accuracy is None


def test_same_key_same_numbers_and_progress(x, key):
    seen = []

    def progress(pairs):
        for pair in pairs:
            seen.append(pair)
            yield pair

    laws = {"p": IndependentStragglers(0.2)}
    one, other = (
        evaluate(model, CODES, x, laws, key=key, num_sets=4, progress=progress) for _ in "12"
    )
    assert one == other
    assert seen[:4] == [("p", i) for i in range(4)]
    assert one != evaluate(model, CODES, x, laws, key=jax.random.key(1), num_sets=4)


def test_one_set_has_no_spread(x, key):
    (row,) = evaluate(model, {"n": NeRCC(5, 12)}, x, {"1": ExactStragglers(1)}, key=key, num_sets=1)
    assert np.isnan(row.mse.half_width)
    assert Estimate.over([1.0, 1.0]).half_width == 0


@pytest.mark.parametrize(
    ("sets", "groups", "rest"), [(1, 1, 1), (0, 1, 0.1), (1, 0, 0.1), (0, 0, 1), (0.3, 1, 3)]
)
def test_an_estimate_covers_other_sets_and_other_groups(sets, groups, rest):
    """Of 95 % intervals of tables around zero, by sets, groups and both, so many hold it."""
    draw = np.random.default_rng(3).normal
    tables = (
        sets * draw(size=(500, 12, 1)) + groups * draw(size=(500, 1, 30))
        + rest * draw(size=(500, 12, 30))
    )  # fmt: skip
    found = [Estimate.over(table) for table in tables]
    assert 0.92 <= np.mean([abs(e.mean) <= e.half_width for e in found]) <= 0.985


def test_one_group_leaves_students_interval_over_sets():
    values = [0.3, 0.1, 0.4, 0.2]
    half = scipy.stats.t.ppf(0.975, 3) * scipy.stats.sem(values)
    for shape in ((4,), (4, 1)):
        assert Estimate.over(np.reshape(values, shape)).half_width == pytest.approx(half)


@pytest.fixture(scope="module")
def draws():
    """Tables (draws, sets, groups): a rival's squares, and lower ones like them."""
    rng = np.random.default_rng(1)
    hard = rng.gamma(2, size=(300, 30, 1)) * rng.gamma(2, size=(300, 1, 40))
    rival, mine = (hard * rng.gamma(4, size=(300, 30, 40)) for _ in "12")
    return rival, mine / 2


def test_a_gain_is_paired(draws):
    gains = []
    for rival, mine in zip(*draws, strict=True):
        both = {("mine", "1"): mine, ("rival", "1"): rival, ("poor", "1"): 3 * rival}
        rows = Evaluations([], both)
        gains.append(rows.gain("mine", "rival"))
        assert rows.gain("mine", ["poor", "rival"]) == rows.gain("mine", "rival", "1") == gains[-1]
    alone = [1 - np.sqrt(mine.mean() / rival.mean()) for rival, mine in zip(*draws, strict=True)]
    np.testing.assert_allclose([gain.mean for gain in gains], alone)
    half = np.mean([gain.half_width for gain in gains])
    assert half == pytest.approx(2 * np.std(alone), rel=0.15)


def test_a_rival_that_recovers_nothing_is_none():
    errors = {
        "mine": np.ones((3, 2)),
        "rival": np.full((3, 2), 4.0),
        "lost": np.full((3, 2), np.nan),
    }
    rows = Evaluations([], {(name, "1"): table for name, table in errors.items()})
    assert rows.gain("mine", ["lost", "rival"]).mean == 0.5
    with pytest.raises(ValueError, match="recovers nothing"):
        rows.gain("mine", "lost")


def test_gains_of_rows(x, key):
    """The mean over laws of what each saves over the better of two, by the rows themselves."""
    codes = CODES | {"BACC, other points": Berrut(5, 12, points="approxifer")}
    rows = evaluate(model, codes, x, LAWS, key=key, num_sets=3)
    mse = {(row.code, row.stragglers): row.mse.mean for row in rows}
    rivals = ("BACC", "BACC, other points")
    each = [1 - np.sqrt(mse["NeRCC", s] / min(mse[name, s] for name in rivals)) for s in LAWS]
    assert rows.gain("NeRCC", rivals).mean == pytest.approx(np.mean(each), rel=1e-5)
    assert rows.gain("NeRCC", rivals, "many").mean == pytest.approx(each[1], rel=1e-5)
    for names, message in (
        (("NeRC", "BACC"), r"no rows of \['NeRC'\], only of \['BACC', .*'copies'\]"),
        (("NeRCC", "BACC", "few"), r"no rows under 'few', only under \['some', 'many'\]"),
        (("NeRCC", "copies"), r"under some, there is no share: the best of \['copies'\] is exact"),
    ):
        with pytest.raises(ValueError, match=message):
            rows.gain(*names)


@pytest.mark.parametrize("values", [[1.0, 1.0, 0.2], [0.0, 0.0, 0.1], [0.5, 0.6, 0.4, 0.5]])
def test_shares_lie_within_their_bounds(values):
    """Wilson's interval by its formula, for n trials whose half width is z sqrt(p q / n)."""
    estimate = Estimate.over(values)
    low, high = estimate.interval(share=True)
    assert 0 <= low <= estimate.mean <= high <= 1
    p, z = estimate.mean, 1.96
    n = p * (1 - p) * z**2 / estimate.half_width**2
    centre, reach = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = np.array([centre - reach, centre + reach]) / (1 + z**2 / n)
    np.testing.assert_allclose((low, high), expected, rtol=1e-9, atol=1e-12)
    assert estimate.interval() == (p - estimate.half_width, p + estimate.half_width)


def test_rows_are_a_table_and_a_picture():
    pytest.importorskip("matplotlib").use("Agg")
    estimates = {name: Estimate(0.5, 0.7) for name in ("mse", "rmse", "rel_acc", "lost")}
    rows = Evaluations(
        Evaluation("a<b", law, **estimates, accuracy=None, num_data_points=8, num_sets=3)
        for law in ("0", "1")
    )
    records = rows.records()
    assert records[0]["mse_low"] == pytest.approx(-0.2)
    assert records[1]["rel_acc_low"] > 0
    assert "accuracy" not in records[0]
    assert [axis.get_ylabel() for axis in rows.plot().axes] == ["mse", "rel_acc"]


def test_a_picture_of_a_code_that_recovers_nothing_anywhere(x, key):
    pytest.importorskip("matplotlib").use("Agg")
    codes = {"a": NeRCC(5, 12), "b": Berrut(5, 12)}
    rows = evaluate(model, codes, x, {"12": ExactStragglers(12)}, key=key, num_sets=2)
    assert "all lost: a, b" in rows.plot(["mse"]).axes[0].get_title(loc="left")


@pytest.mark.slow
def test_intervals_of_few_groups_cover_about_what_they_say():
    """Of 10 groups and 10 sets: Student's intervals are a little short for skewed errors."""
    rng = np.random.default_rng(6)
    first, second = rng.normal(size=(5, 16)), rng.normal(size=(16, 3)) / 4
    model = lambda x: jnp.tanh(x @ first.astype(np.float32)) @ second.astype(np.float32)  # noqa: E731
    codes, law = {"nercc": NeRCC(4, 12)}, {"3": ExactStragglers(3)}
    x = rng.normal(size=(2000, 5)).astype(np.float32)
    (truth,) = evaluate(model, codes, x, law, key=jax.random.key(77), num_sets=100)
    covered = {"mse": 0, "rmse": 0, "rel_acc": 0}
    for draw in range(60):
        some = x[rng.choice(len(x), 40, replace=False)]
        (found,) = evaluate(model, codes, some, law, key=jax.random.key(draw), num_sets=10)
        for name in covered:
            low, high = getattr(found, name).interval(share=name == "rel_acc")
            covered[name] += low <= getattr(truth, name).mean <= high
    assert min(covered.values()) >= 0.85 * 60, covered


# -- Recorded answers under straggler sets, and the objective: by NumPy ----------------------------


K, N, GROUPS = 4, 6, 5
RECORDED = {
    "nercc": lambda: NeRCC(
        K, N, lambda_enc=1e-4, lambda_dec=1e-6, gap_exponent=2.0, end_penalty=5.0
    ),
    "berrut": lambda: Berrut(K, N),
    "lagrange": lambda: Lagrange(K, N),
    "copies": lambda: Replication(K, N),
    "parity": lambda: Parity(K, N),
}
FIRST = np.array([[0.4, -1.1, 0.7, 0.3], [-0.8, 0.5, 0.9, -0.6], [0.5, 0.2, -0.3, 0.8]])
SECOND = np.array([[1.2, 0.3, -0.7], [0.2, -1.4, 0.5], [-0.3, 0.8, 1.1], [0.6, 0.4, -0.9]])
MASKS = np.array(
    [
        [1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 0, 0],
    ],
    bool,
)  # fmt: skip


def logits(x, xp=jnp):
    return xp.tanh(x @ FIRST.astype(x.dtype)) @ SECOND.astype(x.dtype)


def broken_at_mixtures(x, xp=jnp):
    """NaN on some coded data points; data points themselves are of length 1."""
    return xp.where(xp.sum(x**2, axis=1, keepdims=True) < 0.5, xp.nan, logits(x, xp))


def parity_model(x, xp=jnp):
    return 1.1 * logits(x, xp) + 0.2


def models(code, served=logits):
    return (served, parity_model) if code.worker_models.max() else served


def unit_points(dtype="float32", points=22):
    """Five groups, and two data points that fill none."""
    x = np.random.default_rng(0).normal(size=(points, 3))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)


def by_hand(code, x, served=logits):
    """Predictions under each of the sets, and the model's own."""
    groups = x[: GROUPS * K].reshape(GROUPS, K, 3).astype(float)
    both = [lambda x, one=one: one(x, np) for one in (served, parity_model)]
    return decoded_by_hand(code, both, groups, MASKS), served(groups.reshape(-1, 3), np).reshape(
        GROUPS, K, 3
    )


def divergence(decoded, own):
    p, q = scipy.special.softmax(own, -1), scipy.special.softmax(decoded, -1)
    return scipy.special.rel_entr(p, q).sum(-1)


CRITERIA = {
    "mse": lambda decoded, own: ((decoded - own) ** 2).mean(-1),
    "cross_entropy": divergence,
    "disagreement": lambda decoded, own: 1.0 * (decoded.argmax(-1) != own.argmax(-1)),
    lambda decoded, own: jnp.max(jnp.abs(decoded - own)): (
        lambda decoded, own: np.abs(decoded - own).max(-1)
    ),
}


@pytest.mark.parametrize(
    ("name", "served"), [*((name, logits) for name in RECORDED), ("nercc", broken_at_mixtures)]
)
def test_they_tell_what_a_plain_loop_does(name, served, dtype):
    code, x = RECORDED[name](), unit_points(dtype)
    known = record_answers(models(code, served), code, x, batch_size=7)
    assert known.coded.shape == (GROUPS, N, 3), "a remainder is left out"
    assert known.coded.dtype == known.own.dtype == dtype
    wanted, own = by_hand(code, x, served)
    tolerance = {"float32": 2e-5, "float64": 1e-11}[dtype]
    close = {"rtol": tolerance, "atol": tolerance}
    np.testing.assert_allclose(known.own, own, **close)
    if served is broken_at_mixtures:
        broken = ~np.isfinite(known.coded).all(axis=2)
        assert broken.any()
        assert not broken.all(axis=1).any()
    lost = np.isnan(wanted).all(axis=-1)
    sets = known.decode_sets(jnp.asarray(MASKS))
    np.testing.assert_array_equal(sets.recovered, ~lost)
    np.testing.assert_allclose(sets.predictions, wanted, **close)
    groups = x[: GROUPS * K].reshape(GROUPS, K, 3)
    for criterion, loss in CRITERIA.items():
        losses = np.where(lost, np.nan, loss(np.nan_to_num(wanted), own))
        count = (~lost).sum(axis=(1, 2))
        expected = np.nansum(losses, axis=(1, 2)) / np.where(count, count, np.nan)
        found = known.losses(jnp.asarray(MASKS), criterion)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, **close)
        if criterion != "disagreement" and served is logits:
            found = errors_of_sets(models(code), code, groups, MASKS, criterion=criterion)
            np.testing.assert_allclose(found, np.nan_to_num(expected), **close)


# -- The objective: the mean over sets, and its gradients ------------------------------------------

objective = eqx.filter_jit(nested_objective)


def grouped(dtype="float32"):
    return unit_points(dtype)[: GROUPS * K].reshape(GROUPS, K, 3)


def test_the_objective_is_the_mean_over_the_sets_that_recover_anything(dtype, key):
    """So over all sets it is the expectation."""
    code, x = RECORDED["nercc"](), grouped(dtype)
    predictions, own = by_hand(code, unit_points(dtype))
    plain = [np.nanmean((each - own) ** 2) for each in predictions[:-1]]
    tolerance = {"float32": 2e-5, "float64": 1e-10}[dtype]
    np.testing.assert_allclose(objective(logits, code, x, MASKS), np.mean(plain), rtol=tolerance)
    assert float(objective(logits, code, x, np.zeros_like(MASKS))) == 0
    every = straggler_sets(ExactStragglers(2), key, N, 100)
    gone = itertools.combinations(range(N), 2)
    masks = np.stack([~np.isin(np.arange(N), each) for each in gone])
    assert {row.tobytes() for row in np.asarray(every)} == {row.tobytes() for row in masks}
    both = [lambda x: logits(x, np), lambda x: parity_model(x, np)]
    expected = np.mean((decoded_by_hand(code, both, x.astype(float), masks) - own) ** 2)
    np.testing.assert_allclose(objective(logits, code, x, every), expected, rtol=tolerance)


# -- Pictures: no bars beyond 0 and 1, no names of curves that are not there -----------------------


COUNTS = ("0", "2", "4")
MSE = {"NeRCC": (0.1, 0.2, 0.4), "BACC": (0.2, 0.3, 0.5), "LCC": (3.0, 1e5, 1e7)}
MSE |= {"replication": (0.0, 0.0, 0.0)}
SHARES = {"NeRCC": (1.0, 0.99, 0.8), "BACC": (1.0, 0.98, 0.79), "LCC": (0.9, 0.5, 0.02)}
SHARES |= {"replication": (1.0, 0.995, 0.81)}


def drawn_rows():
    def estimate(mean):
        return Estimate(mean, 0.1 * mean + 0.05)

    return [
        Evaluation(
            code, law, estimate(MSE[code][i]), estimate(0.0),
            estimate(SHARES[code][i]), None, estimate(0.0), 8, 4,
        )
        for i, law in enumerate(COUNTS)
        for code in MSE
    ]  # fmt: skip


@pytest.fixture
def draw():
    require("matplotlib", "demo")
    require("rich", "demo")
    import matplotlib.pyplot as plt

    def curves(metric):
        return Evaluations(drawn_rows()).plot([metric]).axes[0]

    yield curves
    plt.close("all")


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_intervals_of_shares_stay_within_0_and_1(draw):
    axis = draw("rel_acc")
    ends = np.concatenate([path.vertices[:, 1] for c in axis.collections for path in c.get_paths()])
    assert len(ends) == 2 * len(COUNTS) * len(SHARES)
    assert ends.min() >= 0
    assert ends.max() <= 1
    assert legend(axis) == [*SHARES]


def test_only_curves_that_are_there_are_named_and_one_that_explodes_hides_no_other(draw):
    axis = draw("mse")
    assert legend(axis) == ["NeRCC", "BACC", "LCC"]
    assert "replication" in axis.get_title(loc="left")
    assert 0.5 < axis.get_ylim()[1] < 1e5


def test_a_table_is_printed():
    """A row for each law, a column for each code; a cell that was not evaluated has a dash."""
    found = Evaluations(drawn_rows()[:1] + drawn_rows()[4:6])
    errors, shares = str(found).split("\n\n")
    assert errors.startswith("mse\n")
    assert shares.startswith("rel_acc\n")
    lines = errors.splitlines()[1:]
    assert len(lines) == 1 + len({row.stragglers for row in found})
    assert lines[0].split() == ["S", *dict.fromkeys(row.code for row in found)]
    assert sum("-" in line.split() for line in lines[1:]) > 0
    assert "-" in found.table("accuracy")
    assert str(Evaluations()) == "mse\nS"


@pytest.fixture
def looks(monkeypatch):
    """How the pages draw systems."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "docs"))
    return importlib.import_module("_site.looks")


def test_a_system_looks_the_same_under_all_its_names(looks):
    assert looks.system_look("BACC (12, 8)") == looks.system_look("BACC")
    two, four = (looks.system_look(f"ParM, k = {k}") for k in (2, 4))
    assert two == looks.system_look("ParM") != four
    assert looks.system_look("no system of ours")["color"] == "#000000"
    changed = looks.system_look("LCC")
    changed["color"] = "red"
    assert looks.system_look("LCC")["color"] != "red"
    together = "NeRCC published", "NeRCC tuned", "NeRCC learned", "BACC", "replication"
    each = [looks.system_look(code) for code in together]
    plain = [(look["marker"], look.get("linestyle"), look.get("markerfacecolor")) for look in each]
    assert len({*plain}) == len(together)


def test_pictures_are_one_column_of_panels_with_seven_curves_at_most(draw):
    """To be read on a telephone: names in ten pixels, and curves that differ without colours."""
    row, codes = drawn_rows()[0], [f"code {number}" for number in range(9)]
    laws = "2 of 20", "heavy tail", "inf"  # any names
    many = [dataclasses.replace(row, code=c, stragglers=law) for c in codes for law in laws]
    figure = Evaluations(many).plot()
    assert [len(legend(axis)) for axis in figure.axes] == [7, 2, 7, 2]
    for axis in figure.axes:
        assert [text.get_text() for text in axis.get_xticklabels()] == list(laws)
    legends = [axis.get_legend().get_texts() for axis in figure.axes]
    letters = [text.get_fontsize() for texts in legends for text in texts]
    assert min(letters) / 72 * 390 / figure.get_size_inches()[0] > 9.5
