"""The figures of pages are those of the results."""

import functools
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import require

from nercc_jax.risk import RiskMonitor

from nercc_jax.risk import _accuracy, _evidence  # isort: skip

HERE = Path(__file__).parents[1]


def text_of(path):
    """Return a page's text, with that of its further tables in `bench/results`."""
    pages = HERE / path, HERE / "bench" / "results" / Path(path).name
    return "\n".join(page.read_text() for page in pages if page.exists())


def words_of(path):
    """Return a page's text on one line."""
    return " ".join(text_of(path).split())


@pytest.fixture(scope="module")
def page():
    return words_of("docs/which.md")


@functools.cache
def read(name):
    return json.loads((HERE / f"bench/results/{name}.json").read_text())


def served(rate):
    """Return what was measured of the servers, by system, and p99 as pages write it."""
    rows = {r["system"]: r for r in read("serving")["rows"] if r["straggler_rate"] == rate}
    return rows, {name: f"{row['p99_ms']:.0f}" for name, row in rows.items()}


def priced(model, loop):
    rows = (r for r in read("serving_price")["rows"] if (r["model"], r["loop"]) == (model, loop))
    return next(row for row in rows if row["clients"] == 8)


def shares_of_bare():
    """Return the requests a second, uncoded and coded, over a bare handler's in each round."""
    rates = {
        name: np.array(each) for name, each in priced("lenet5-digits", "closed")["rates"].items()
    }
    return [np.median(rates[name] / rates["bare"]) for name in ("uncoded", "coded (8, 4)")]


def test_tables_are_those_of_the_results():
    """And pages say by themselves what has changed since it was measured."""
    require("cogapp", "docs")
    pages = [str(page) for page in (*HERE.glob("docs/*.md"), *HERE.glob("bench/results/*.md"))]
    folders = [word for name in ("docs", "bench") for word in ("-I", str(HERE / name))]
    done = subprocess.run(
        [sys.executable, "-m", "cogapp", "--check", *folders, *pages],
        capture_output=True, text=True,
    )  # fmt: skip
    changed = [line for line in done.stdout.splitlines() if line.endswith("(changed)")]
    assert done.returncode == 0, f"run .ci/measured: {changed or done.stderr[-2000:]}"


def test_of_dependent_stragglers():
    real, page = read("dependent_server")["after"], words_of("docs/dependent.md")
    slow = [case for case in real if case.startswith("smallest")]
    shares = sorted(
        100 * wrong / number
        for number, wrong in (np.sum([c["of_slow"] for c in real[case]], axis=0) for case in slow)
    )
    sentence = f"the smallest margins are slow, {shares[0]:.0f} to {shares[-1]:.0f} % of these are "
    assert f"{sentence}wrong" in page
    by_query = [*slow, "half from the hardest 12 %, 0.5 s"]
    loads = [
        [c["load_average"] for case in cases for c in real[case]]
        for cases in (by_query, [case for case in real if case not in by_query])
    ]
    ends = (f"{min(each):.0f} to {max(each):.0f}" for each in loads)
    sentence = f"a load of {next(ends)} where slowness depends on the query, {next(ends)} elsewhere"
    assert sentence in page
    assert max(c["worst_beyond"] for cells in real.values() for c in cells) < 3


def test_settings_that_pages_name():
    bound = inspect.signature(_accuracy.within_bound)
    assert bound.parameters["failure"].default == 0.25
    assert (_evidence._ROWS, _evidence._RECENT, _evidence._BARS) == (1024, 100, 20)
    assert inspect.signature(RiskMonitor.__init__).parameters["false_alarms"].default == 1 / 50_000
    require("pydantic_settings", "serve")
    from nercc_jax.serving import ModelSettings

    assert ModelSettings(outputs="logits").policy().max_disagreement == 0.05


def test_of_servers_and_tails():
    readme, (_, p99) = words_of("README.md"), served(0.05)
    ours = f"p99 is {p99['coded (8, 4)']} ms instead of {p99['uncoded']}"
    assert f"the coded server's {ours}" in readme
    assert f"at as many calls, have {p99['replication (2, 1)']} ms" in readme
    assert f"hedging has {p99['hedged']} ms at half the calls" in readme

    tails: dict[tuple[str, str], list[float]] = {}  # within 1.1 calls, by work and law
    for name, cell in read("tails")["services"].items():
        work, law, system = name.split("/")
        if (work == "any model" and "picked" not in system) or system == "picked, 1.1 calls":
            found = tails.setdefault((work, law), [])
            found.append(cell["p999_ms"][0] if cell["calls"] < 1.105 else np.inf)
    ours = {place: found for place, found in tails.items() if place[0] != "any model"}
    won = sum(found[0] < min(tails["any model", law]) for (_, law), found in ours.items())
    kept = 100 * min(
        cell["right"]
        for name, cell in read("tails")["services"].items()
        if name.endswith("/picked, 1.1 calls")
    )
    sentence = f"the shortest p99.9 in {won} of {len(ours)} simulated cells, at {kept:.1f} % of the"
    assert f"{sentence} labels or more" in readme
    assert f"the shortest tail in {won} of {len(ours)} cells" in words_of("docs/which.md")


def compared_with_learned(rival):
    """Return in which cells a code keeps clearly more labels, or fewer; and has a lower error."""
    won, lower = [], []
    for part in read("paper")["parts"].values():
        for outputs in ("probabilities", "logits"):
            rows = {(r["code"], r["stragglers"]): r for r in part[outputs]["rows"]}
            for law in [law for code, law in rows if code == rival]:
                other, ours = (rows[code, law] for code in (rival, "NeRCC learned"))
                gap = other["rel_acc"]["mean"] - ours["rel_acc"]["mean"]
                both = np.hypot(*(each["rel_acc"]["half_width"] for each in (other, ours)))
                won.append(np.sign(gap) * (abs(gap) > both))
                lower.append(other["mse"]["mean"] < ours["mse"]["mean"])
    return won, sum(lower)


def test_of_codes_against_copies_and_parity_models():
    won, lower = compared_with_learned("ParM")
    cells = f"in {won.count(1)} of its {len(won)} cells"
    sentence = f"a second model that is trained for it, {cells}, and fewer in {won.count(-1)}"
    assert sentence in words_of("README.md")
    assert f"ParM {cells}, and fewer in {won.count(-1)}." in words_of("docs/which.md")
    text = words_of("docs/results.md")
    assert f"{cells}, beyond both intervals, and fewer in {won.count(-1)}; its error" in text
    assert f"of what it does not lose, is lower in {lower}." in text
    won, _ = compared_with_learned("replication")
    both = f"beyond both intervals, and fewer in {won.count(-1)}"
    for path, of in (
        ("README.md", "these"),
        ("docs/which.md", "them"),
        ("docs/results.md", f"the {len(won)} cells"),
    ):
        assert f"in {won.count(1)} of {of}, {both}" in words_of(path)
    lost = next(
        r
        for r in read("paper")["parts"]["lenet5-mnist:100:20"]["logits"]["rows"]
        if (r["code"], r["stragglers"]) == ("NeRCC untuned", "80")
    )
    assert lost["lost"]["mean"] == 0
    wrong = f"{100 * (1 - lost['rel_acc']['mean']):.0f} % of the labels are not the model's"
    assert wrong in words_of("docs/concepts.md")


def test_of_a_scheme_against_copies_with_its_student():
    few, below = [], []
    for recorded in read("beyond").values():
        for cell in recorded["cells"].values():
            rows = {(r["mode"], r["order"]): r for r in cell["rows"]}
            ours = rows["with surrogate", "surrogate, buffer 1024"]
            published, plain, student = (
                rows[mode, "no order"]
                for mode in ("published", "replication", "replication, else surrogate")
            )
            few.append(
                ours["disagreement"]
                <= min(published["disagreement"] / 5, plain["disagreement"] / 2)
            )
            gap = student["disagreement"] - ours["disagreement"]
            below.append(gap > np.hypot(student["half_width"], ours["half_width"]))
    assert all(few)
    sentence = f"than plain copies in all {len(few)} cells; than copies with the same student in"
    assert f"{sentence} {sum(below)}, beyond both intervals" in words_of("README.md")
    sentence = f"more than the scheme beyond both intervals in {sum(below)} of {len(few)} cells"
    assert sentence in words_of("docs/beyond.md")


def test_of_functions():
    page = words_of("docs/functions.md")

    def ratios(cell, rival):
        for name, entry in read("functions").items():
            systems, picked = entry["cells"][cell]["systems"], entry["cells"][cell]["picked"]
            cheap = ", with a cheap model"
            other = (
                "learner, no redundancy" + cheap * picked.endswith(cheap)
                if rival == "alone"
                else rival
            )
            pairs = zip(systems[picked]["rmse"], systems[other]["rmse"], strict=False)
            yield name, np.exp(np.mean([np.log(one / two) for one, two in pairs]))

    for rival, words in (
        (
            "copies, else the nearest",
            "{:.2f} to {:.2f} of the error of copies whose lost ones are answered by the nearest "
            "data point ({:.2f} on CIFAR-10)",
        ),
        ("NeRCC, published", "{:.2f} to {:.2f} of published NeRCC's ({:.2f})"),
    ):
        found = dict(ratios("(24, 20, 2)", rival))
        last = found.pop("CIFAR-10")
        assert words.format(min(found.values()), max(found.values()), last) in page
    less = [100 * (1 - share) for _, share in ratios("(30, 20, 5)", "alone")]
    assert f"redundancy takes away {min(less):.0f} to {max(less):.0f} % of" in page
    picked = [entry["cells"]["(24, 20, 2)"]["picked"] for entry in read("functions").values()]
    coded = [name for name in picked if not name.startswith("learner, copies")]
    assert coded == ["learner, interleaved"]
    assert "a code is part of the picked system for one function of eight" in page
    assert len(picked) == 8


def test_of_the_models():
    """Small forms beside the names of the paper's: their sizes and accuracies, from their cards."""
    small = [
        json.loads((HERE / f"models/weights/{name}.json").read_text())
        for name in ("repvgg-cifar10", "vit-cifar10")
    ]
    sizes = "{:.2f} and {:.2f} million parameters".format(
        *(c["num_parameters"] / 1e6 for c in small)
    )
    right = "{:.1f} and {:.1f} % of CIFAR-10's test images right".format(
        *(100 * c["score"]["accuracy"] for c in small)
    )
    for path in ("README.md", "docs/results.md"):
        assert f"{sizes}, {right}" in words_of(path)
    assert sizes in words_of("docs/which.md")


def workload(page, name):
    """Return the figure and the simplest alternative's of a row of the table of workloads."""
    return [cell.strip() for cell in page.partition(f"| {name} |")[2].split("|")[1:3]]


def test_of_workloads(page):
    """Each has one figure, and the simplest alternative's of the same measurement."""
    plain, ours = shares_of_bare()
    figure = f"{plain:.2f} of a bare handler's requests", f"{ours:.2f} coded"
    assert workload(page, "few stragglers") == [*figure]
    rows, p99 = served(0.05)
    figure = f"{p99['uncoded']} ms uncoded, {p99['coded (8, 4)']} ms coded"
    copies = workload(page, "classifier, workers to spare")
    assert copies == [f"p99 {p99['replication (2, 1)']} ms", figure]
    calls = [
        f"{rows[name]['calls_per_query']:.2f}" for name in ("replication (2, 1)", "coded (8, 4)")
    ]
    assert f"have {calls[0]} calls a query, the code (8, 4) {calls[1]}, where 5 %" in page
    runs = read("hedging")["cases"]["one"]
    hedged, none = (
        np.mean([run[name]["p99_medians"] for run in runs]) for name in ("hedge", "none")
    )
    assert workload(page, "calls of any kind") == [
        f"p99 {hedged:.2f} medians",
        f"{none:.2f} without",
    ]
    slow, spot = (
        [cell for cell in read(name)["cells"] if cell["function"] == "Lotka-Volterra"]
        for name in ("rows", "spot")
    )
    slow = [cell for cell in slow if cell["law"] == "by row"]
    spot = [cell for cell in spot if cell["workers"] == 12]
    seconds = (f"{np.mean([c[key] for c in slow]):.1f} s" for key in ("seconds", "executor_s"))
    assert workload(page, "rows of a simulator") == [next(seconds), f"{next(seconds)} executor"]
    number = (f"{np.mean([c[key] for c in spot]):,.0f}" for key in ("within", "executor"))
    figure = f"{next(number)} of 3,000 rows", f"{next(number)} executor"
    assert workload(page, "rows on spot nodes") == [*figure]
    sweep = read("functions")["Lotka-Volterra"]["sweep"]
    errors = [f"{np.mean(sweep['rmse'][name]):.4f}" for name in (sweep["picked"], "fixed points")]
    figure = f"error {errors[0]}", f"{errors[1]} a code"
    assert workload(page, "a sweep of one parameter") == [*figure]
    found = [cell["ways"] for cell in read("ensembles")["cells"] if cell["law"] == "leaning"]
    held = [100 * np.mean([ways[w]["mean"]["held"] for ways in found]) for w in ("ours", "dropped")]
    figure = f"{held[0]:.0f} % of intervals hold", f"{held[1]:.0f} % late rows dropped"
    assert workload(page, "statistics of an ensemble") == [*figure]


def test_of_tails(page):
    tails = read("tails")

    def row(place, system):
        cell = tails["services"][f"{place}/{system}"]
        tail = cell["p999_ms"][0] / 50  # in medians of a service time
        return f"{tail:.2f}", f"{cell['calls']:.2f}", f"{100 * cell['right']:.2f}"

    ours, hedged = "picked, 1.1 calls", "least loaded, hedged, 1.1 calls"
    even, rack = "5 %, constant", "slow rack, lognormal 0.2"
    tail, calls, right = row(f"lenet5/{even}", ours)
    other, _, _ = row(f"any model/{even}", hedged)
    figure = [f"p99.9 {tail} medians", f"{other} tuned hedging"]
    assert workload(page, "classifier, past answers") == figure
    sentence = f"p99.9 is {tail} times the median service time at {calls} calls a query, {right} %"
    assert sentence in page
    tail, calls, _ = row(f"any model/{even}", "two at once, 1.2 x median")
    assert f"copies at once have {tail} at {calls} calls, exact" in page
    tail, _, right = row(f"lenet5/{rack}", ours)
    other, _, _ = row(f"any model/{rack}", hedged)
    figure = [f"p99.9 {tail} medians", f"{other} tuned hedging"]
    assert workload(page, "the same, racks slow together") == figure
    assert f"(0.2), {right} % of the labels the model's own" in page
    cells = [tails["paper"][f"lenet5/5 %/{name}"] for name in ("ParM, k = 2", "NeRCC (6, 4)")]
    kept = [f"{cell['p999_by_p50'][0]:.2f}" for cell in cells]
    right = [f"{100 * cell['right']:.2f} %" for cell in cells]
    assert workload(page, "classifier, a parity model") == [
        f"p99.9 {kept[0]} medians, {right[0]} of labels",
        f"{kept[1]}, {right[1]} NeRCC",
    ]
    assert {f"{cell['calls']:.2f}" for cell in cells} == {"1.50"}


def test_of_copies_by_a_students_doubt(page):
    text, ratios = words_of("docs/beyond.md"), []
    for model in ("repvgg-cifar10", "vit-cifar10"):
        for cell in read("beyond")[model].get("copies", {}).values():
            rows = {row["mode"]: row for row in cell["rows"]}
            wrong = {mode: row["disagreement"] for mode, row in rows.items()}
            ratios.append(rows["copies by the student's doubt"]["ratio"])
            assert wrong.pop("NeRCC, learned decoder") > wrong["copies, learned decoder"]
            *others, with_student, by_doubt = wrong.values()
            assert by_doubt < 0.65 * with_student
            assert with_student < min(others) / 2
    words = f"{min(ratios):.2f} to {max(ratios):.2f} times"
    assert (
        f"{words} the wrong labels of copies with the same student in all {len(ratios)} cells"
        in text
    )
    assert f"{words} as many wrong labels on CIFAR-10" in page


def test_of_codes_and_copies(page):
    def lost(model, mode, order="no order"):
        rows = read("beyond")[model]["cells"]["(24, 20, 2)"]["rows"]
        return 100 * next(
            r["disagreement"] for r in rows if (r["mode"], r["order"]) == (mode, order)
        )

    models = "lenet5-mnist", "repvgg-cifar10", "vit-cifar10"
    published = sorted(lost(model, "published") for model in models)
    (copies,) = {f"{lost(model, 'replication'):.1f}" for model in models}
    few, *others = (lost(model, "with surrogate", "surrogate, buffer 1024") for model in models)
    words = f"plain copies lose {copies} % of the labels, NeRCC as published {published[0]:.1f} to"
    assert f"{words} {published[-1]:.0f} %" in page
    words = f"it loses {few:.2f} % of LeNet5's labels and at most {max(others):.1f} % of RepVGG's"
    assert words in page
    assert all(lost(model, "replication, else surrogate") < max(few, *others) for model in models)


def test_of_bacc(page):
    cells = {}
    for part in read("paper")["parts"].values():
        for outputs in ("probabilities", "logits"):
            rows = {(r["code"], r["stragglers"]): r for r in part[outputs]["rows"]}
            errors = {}
            for (code, law), row in rows.items():
                errors.setdefault(law, {})[code] = row["mse"]["mean"]
            cells.setdefault((part["setting"]["model"], outputs), []).extend(errors.values())
    each = [errors for some in cells.values() for errors in some]

    def gains(some, kind, *rivals):
        pairs = [(e[f"NeRCC {kind}"], min(e[name] for name in rivals)) for e in some]
        # An exact rival, as BACC with tuned points where nobody straggles, leaves nothing to gain.
        return np.array([100 * (1 - np.sqrt(a / b)) for a, b in pairs if b > 1e-9])

    bacc = "BACC", "ApproxIFER"
    ends = {}
    for kind in ("learned", "tuned", "published"):
        means = [gains(some, kind, *bacc).mean() for some in cells.values()]
        ends[kind] = f"{min(means):.0f} to {max(means):.0f} %"
    below = {kind: np.sum(gains(each, kind, *bacc) > 0) for kind in ends}
    assert f"below BACC's in all {below['learned']} cells" in page
    learned, tuned = (gains(each, kind, "BACC tuned").mean() for kind in ("learned", "tuned"))
    results = words_of("docs/results.md")
    assert f"in all {below['learned']} cells, by {ends['learned']} of the RMSE" in results
    assert f"spline in {below['tuned']}, by {ends['tuned']}." in results
    assert f"constant lambdas, gains {ends['published']}." in results
    assert f"the spline gains {tuned:.0f} %, the learned decoder {learned:.0f} %" in results


def test_of_bscc():
    laws = read("rivals")["laws"]
    none = {code: f"{100 * row['gain']['mean']:.0f} %" for code, row in laws["0"].items()}
    results = words_of("docs/results.md")
    assert (
        f"falls from {none['BACC']} over BACC to {none['BSCC']} over BSCC and "
        f"{none['BSCC tuned']} over BSCC tuned" in results
    )


def test_of_error_probabilities(page):
    rows = [
        row
        for model in read("beyond").values()
        for cell in model.get("promises", {}).values()
        for row in cell["rows"]
        if "promised" in row
    ]
    given = [row for row in rows if row.get("wrong_of_given")]
    assert all(row["wrong_of_given"][0] <= row["promised"] for row in given)
    silent = sum("given" in row for row in rows) - len(given)
    assert f"of {len(rows)} cases it gave nothing out in {silent}, and kept its promise" in page
    other = len(rows) - len(given) - silent
    assert f"in all {len(given)} in which it gave something out; {other}, of ViT, were not" in page


def test_of_liars(page):
    part = read("adversaries")["parts"]["lenet5-mnist:100:20"]
    rows = {(r["method"], r["attack"], r["adversaries"]): r for r in part["rows"]}
    ours, theirs = (
        np.array(
            [
                rows[method, attack, count]["disagreement"]["mean"]
                for attack in ("noise", "flip", "worst", "coalition")
                for count in part["size"]["adversaries"]
            ]
        )
        for method in ("repeated NeRCC, reject", "replication, median")
    )
    same = np.abs(ours - theirs) < 1e-9
    fewer, more = np.sum((ours > theirs) & ~same), np.sum((ours < theirs) & ~same)
    assert (
        f"keeps as many labels in {same.sum()} of {same.size} cells, fewer in {fewer}, more in "
        f"{more}" in page
    )
