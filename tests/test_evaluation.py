"""Evaluation against a plain NumPy account of the same definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from matrices import decoded_by_hand

from nercc_jax import (
    Berrut,
    ExactStragglers,
    IndependentStragglers,
    NeRCC,
    Parity,
    Replication,
    evaluate,
)
from nercc_jax.evaluation import Estimate, Evaluation, Evaluations

WEIGHTS = np.random.default_rng(5).normal(size=(3, 4)).astype("float32")
CODES = {"NeRCC": NeRCC(5, 12), "BACC": Berrut(5, 12), "copies": Replication(5, 12)}
LAWS = {"some": ExactStragglers(4), "many": ExactStragglers(9)}


def model(x):
    return jnp.tanh(x @ WEIGHTS)


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(33, 3)).astype("float32")


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
