"""What the demo's picture must not do: bars beyond 0 and 1, names of curves that are not there."""

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest
from conftest import require

from nercc_jax.evaluation import Estimate, Evaluation, Evaluations

LAWS = ("0", "2", "4")
MSE = {"NeRCC": (0.1, 0.2, 0.4), "BACC": (0.2, 0.3, 0.5), "LCC": (3.0, 1e5, 1e7)}
MSE |= {"replication": (0.0, 0.0, 0.0)}
SHARES = {"NeRCC": (1.0, 0.99, 0.8), "BACC": (1.0, 0.98, 0.79), "LCC": (0.9, 0.5, 0.02)}
SHARES |= {"replication": (1.0, 0.995, 0.81)}


def rows():
    def estimate(mean):
        return Estimate(mean, 0.1 * mean + 0.05)

    return [
        Evaluation(
            code, law, estimate(MSE[code][i]), estimate(0.0),
            estimate(SHARES[code][i]), None, estimate(0.0), 8, 4,
        )
        for i, law in enumerate(LAWS)
        for code in MSE
    ]  # fmt: skip


@pytest.fixture
def draw():
    require("matplotlib", "demo")
    require("rich", "demo")
    import matplotlib.pyplot as plt

    def curves(metric):
        return Evaluations(rows()).plot([metric]).axes[0]

    yield curves
    plt.close("all")


def names(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_intervals_of_shares_stay_within_0_and_1(draw):
    axis = draw("rel_acc")
    ends = np.concatenate([path.vertices[:, 1] for c in axis.collections for path in c.get_paths()])
    assert len(ends) == 2 * len(LAWS) * len(SHARES)
    assert ends.min() >= 0
    assert ends.max() <= 1
    assert names(axis) == [*SHARES]


def test_only_curves_that_are_there_are_named_and_one_that_explodes_hides_no_other(draw):
    axis = draw("mse")
    assert names(axis) == ["NeRCC", "BACC", "LCC"]
    assert "replication" in axis.get_title(loc="left")
    assert 0.5 < axis.get_ylim()[1] < 1e5


def test_a_table_is_printed():
    """A row for each law, a column for each code; a cell that was not evaluated has a dash."""
    found = Evaluations(rows()[:1] + rows()[4:6])
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
    row, codes = rows()[0], [f"code {number}" for number in range(9)]
    laws = "2 of 20", "heavy tail", "inf"  # any names
    many = [dataclasses.replace(row, code=c, stragglers=law) for c in codes for law in laws]
    figure = Evaluations(many).plot()
    assert [len(names(axis)) for axis in figure.axes] == [7, 2, 7, 2]
    for axis in figure.axes:
        assert [text.get_text() for text in axis.get_xticklabels()] == list(laws)
    legends = [axis.get_legend().get_texts() for axis in figure.axes]
    letters = [text.get_fontsize() for texts in legends for text in texts]
    assert min(letters) / 72 * 390 / figure.get_size_inches()[0] > 9.5
