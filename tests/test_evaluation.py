"""Evaluation against a plain NumPy account of the same definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from nercc_jax import (
    Berrut,
    ExactStragglers,
    IndependentStragglers,
    NeRCC,
    Parity,
    Replication,
    evaluate,
)
from nercc_jax.evaluation import Estimate, Evaluation
from nercc_jax.evaluation._evaluation import Evaluations

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
    original = np.asarray(model(x[:30]))
    for row in rows:
        law = list(LAWS).index(row.stragglers)
        values = {m: [] for m in ("mse", "rmse", "mean_l2", "rel_acc", "accuracy", "lost")}
        for index in range(3):
            draw = jax.random.fold_in(jax.random.fold_in(key, law), index)
            mask = LAWS[row.stragglers].available(draw, 12)
            code = CODES[row.code]
            parts = [code.try_decode(model(code.encode(g)), mask) for g in x[:30].reshape(6, 5, 3)]
            decoded = np.concatenate([p.predictions for p in parts])
            kept = np.concatenate([p.recovered for p in parts])
            error = (decoded - original)[kept]
            values["mse"].append((error**2).mean())
            values["rmse"].append(np.sqrt((error**2).sum(axis=1).mean()))
            values["mean_l2"].append(np.sqrt((error**2).sum(axis=1)).mean())
            right = np.zeros(30)
            right[kept] = decoded[kept].argmax(axis=1) == original[kept].argmax(axis=1)
            values["rel_acc"].append(right.mean())
            right[kept] = decoded[kept].argmax(axis=1) == labels[:30][kept]
            values["accuracy"].append(right.mean())
            values["lost"].append(1 - kept.mean())
        for metric, expected in values.items():
            got = getattr(row, metric)
            np.testing.assert_allclose(got.mean, np.mean(expected), rtol=1e-4, atol=1e-6)
            half = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(expected)
            np.testing.assert_allclose(got.half_width, half, rtol=1e-3, atol=1e-5)
        assert (row.num_data_points, row.num_sets) == (30, 3)
    lost = {row.code: row.lost.mean for row in rows if row.stragglers == "many"}
    assert lost["copies"] > 0
    assert lost["NeRCC"] == lost["BACC"] == 0


def test_further_models_are_given_by_the_codes_name(x, key):
    """A linear model is its own parity model: exact, except where two of a group are missing."""
    codes = {"ParM": Parity(4, 6), "copies": Replication(4, 6)}
    linear = lambda x: x @ WEIGHTS  # noqa: E731
    one, two = (
        evaluate(
            linear,
            codes,
            x,
            {"law": ExactStragglers(count)},
            key=key,
            further_models={"ParM": [linear]},
            batch_size=7,
        )[0]
        for count in (1, 2)
    )
    assert one.code == two.code == "ParM"
    assert one.lost.mean == 0
    assert one.rel_acc.mean == 1
    assert one.mse.mean < 1e-10
    assert 0 < two.lost.mean < 1 / 2
    np.testing.assert_allclose(two.rel_acc.mean, 1 - two.lost.mean, rtol=1e-6)
    (off,) = evaluate(
        linear,
        {"ParM": codes["ParM"]},
        x,
        {"law": ExactStragglers(1)},
        key=key,
        further_models={"ParM": [lambda x: linear(x) + 1]},
    )
    np.testing.assert_allclose(off.mse.mean, one_missing_share(key), rtol=1e-4)


def one_missing_share(key):
    """The mean share of data points that 20 sets of one straggler leave to a parity worker."""
    keys = [jax.random.fold_in(jax.random.fold_in(key, 0), index) for index in range(20)]
    masks = np.stack([ExactStragglers(1).available(key, 6) for key in keys])
    return (~masks[:, :4]).mean()


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
    ("change", "message"),
    [
        ({"codes": {"a": NeRCC(5, 12), "b": NeRCC(4, 12)}}, r"same \(num_data, num_workers\)"),
        ({"codes": {}}, "there are no codes"),
        ({"x": np.ones((4, 3), np.float32)}, "4 data points fill no group of 5"),
        ({"x": np.full((5, 3), np.nan, np.float32)}, "are not finite: take them out"),
        ({"num_sets": 0}, "num_sets must be a positive integer, not 0"),
        ({"labels": np.zeros(7)}, r"labels have shape \(7,\)"),
        ({"codes": {"p": Parity(4, 6)}}, "run 2 models, but 1 came"),
        ({"further_models": {"BACC": [model]}}, "run 1 model, but 2 came"),
        ({"further_models": {"ParM": [model]}}, r"further_models names \['ParM'\]; the codes are"),
        ({"model": lambda x: x * jnp.inf}, "own outputs must be finite"),
    ],
)
def test_errors(change, message, x, key, untyped):
    given = {"model": model, "codes": CODES, "x": x, "stragglers": LAWS, "key": key, **change}
    positional = [given.pop(name) for name in ("model", "codes", "x", "stragglers")]
    with pytest.raises(ValueError, match=message):
        evaluate(*positional, **given)


def test_a_channel_changes_what_the_decoder_gets(x, key):
    """Half precision and a shift of all answers, which codes whose rows sum to one pass on."""

    def shifted(answers, key):
        return answers.astype(jnp.bfloat16).astype(answers.dtype) + 3

    rows = evaluate(model, CODES, x, LAWS, key=key, num_sets=2, channel=shifted)
    plain = evaluate(model, CODES, x, LAWS, key=key, num_sets=2)
    copies = [(r, p) for r, p in zip(rows, plain, strict=True) if r.code == "copies"]
    for row, before in copies:
        assert before.mse.mean == pytest.approx(0, abs=1e-12)
        assert row.mse.mean == pytest.approx(9, rel=1e-2)
        assert row.rel_acc.mean > 0.9 * before.rel_acc.mean


def test_a_channel_has_a_key_of_its_own_for_every_set(x, key):
    def noisy(answers, key):
        return answers + jax.random.normal(key, answers.shape)

    rows = evaluate(
        model, {"copies": Replication(5, 12)}, x, {"all": ExactStragglers(0)}, key=key,
        num_sets=40, channel=noisy,
    )  # fmt: skip
    assert rows[0].mse.mean == pytest.approx(1, abs=0.1)
    assert rows[0].mse.half_width > 0


def test_a_channels_key_is_not_the_masks(x, key):
    """It spoils whom its key makes stragglers: who really is one would not respond anyway."""
    law = ExactStragglers(4)

    def spoilt(answers, key):
        return answers + jnp.where(law.available(key, 12), 0.0, 1.0)[:, None]

    (row,) = evaluate(
        model, {"copies": Replication(5, 12)}, x, {"4": law}, key=key, num_sets=60, channel=spoilt
    )
    assert row.mse.mean == pytest.approx(1 / 3, abs=0.1)


def test_a_channel_keeps_shapes(x, key):
    with pytest.raises(ValueError, match="the channel made"):
        evaluate(model, CODES, x, LAWS, key=key, channel=lambda answers, key: answers[:, :, :1])


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
    pandas, matplotlib = pytest.importorskip("pandas"), pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    estimates = {name: Estimate(0.5, 0.7) for name in ("mse", "rmse", "mean_l2", "rel_acc", "lost")}
    rows = Evaluations(
        Evaluation("a<b", law, **estimates, accuracy=None, num_data_points=8, num_sets=3)
        for law in ("0", "1")
    )
    frame = rows.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["mse_low"][0] == pytest.approx(-0.2)
    assert frame["rel_acc_low"][1] > 0
    assert "accuracy" not in frame
    html = rows._repr_html_()
    assert "<td>a&lt;b</td>" in html
    assert html.count("<tr>") == 3
    assert [axis.get_ylabel() for axis in rows.plot().axes] == ["mse", "rel_acc"]
