"""Every figure in the prose of every page is that of its result, or a setting that is named here.

Tables are made of the results by cog. A page's own sentences with figures are made here of the same
results, and looked for; what is left of its text must hold no digit.
"""

import functools
import inspect
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import bench_modules, require

from nercc_jax.risk import RiskMonitor

from nercc_jax.risk import _evidence, accuracy  # isort: skip

HERE = Path(__file__).parents[1]
# Names, sources and sizes with digits that are no figures.
NAMES = r"LeNet5|CIFAR-10|H100|v5e|bfloat16|float\d+|of 32 x 32|(?:arXiv )?\d{4}\.\d{5}"
NAMES += r"|\([A-Z]\w+(?: et al\.)? (?:and \w+ )?\d{4}\)|Green and Silverman 1994, section 2"
NAMES += r"|(?:et al\.|Maddah-Ali|NeurIPS|NSDI) \d{4}|95 % (?:bootstrap )?intervals"
NAMES += r"|224 x 224(?: x 3)?|Apache-2\.0|Python 3\.\d+(?: (?:to 3\.\d+|or newer))?"
NAMES += r"|p\d+(?:\.\d+)?|\(V2\)|\(\d+, \d+(?:, \d+)?\)|[A-Z] = \d+(?: and [A-Z] = \d+)*"


def text_of(path):
    """Return a page's text, with that of its further tables in `bench/results`."""
    pages = HERE / path, HERE / "bench" / "results" / Path(path).name
    return "\n".join(page.read_text() for page in pages if page.exists())


def prose_of(path):
    """Return a page's text without its code, its links' targets, and what its blocks write."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text_of(path), flags=re.DOTALL)
    made = r"<!-- \[\[\[cog\n.*?\[\[\[end\]\]\] -->"
    text = re.sub(made, "", text, flags=re.DOTALL)
    text = re.sub(r"^ *\d+\. ", "", text, flags=re.MULTILINE)
    text = re.sub(r"^(```|:::).*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\{\w+\}`[^`]*`|\]\([^)]*\)|<http[^>]*>|`[^`]*`", "", text)
    return " ".join(text.split())


def named(name, *cells):
    """Return a row of a table that is in the prose, as the prose has it."""
    return f"| {' | '.join((name, *cells))} |".replace("|  |", "| |")


@functools.cache
def read(name):
    return json.loads((HERE / f"bench/results/{name}.json").read_text())


def span(numbers, form):
    """Return the least and the largest number."""
    return f"{min(numbers):{form}} to {max(numbers):{form}}"


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


def servers():
    rows, p99 = served(0.05)
    code, copies = "coded (8, 4)", "replication (2, 1)"
    late = read("serving")["straggle_s"] / read("serving")["service_s"]
    assert (rows[code]["straggler_rate"], late) == (0.05, 10)
    both = f"p99 is {p99['uncoded']} ms without a code and {p99[code]} ms with one."
    yield "README.md", f"with 5 % of the calls late by ten service times, {both}"
    yield "README.md", f"take as many calls as the code and give {p99[copies]} ms"
    yield "README.md", f"takes half the calls and gives {p99['hedged']} ms"
    ends = [rows[name]["intervals_ms"]["p99"] for name in (code, copies)]
    assert max(low for low, _ in ends) < min(high for _, high in ends)
    yield "docs/serving.md", "at as many calls; their intervals overlap"
    plain, ours = shares_of_bare()
    cells = f"{plain:.2f} of a bare handler's throughput", f"{ours:.2f} coded"
    yield "docs/which.md", named("few stragglers", "nothing", *cells)
    cells = f"p99 {p99[copies]} ms", f"{p99['uncoded']} ms uncoded, {p99[code]} ms coded"
    yield "docs/which.md", named("classifier, workers to spare", "two copies", *cells)
    calls = [f"{rows[name]['calls_per_query']:.2f}" for name in (copies, code)]
    code = f"the code (8, 4) takes {calls[1]}, where 5 %"
    yield "docs/which.md", f"take {calls[0]} calls a query, {code}"


def tails():
    cells = read("tails")["services"]
    found: dict[tuple[str, str], list[float]] = {}  # within 1.1 calls, by work and law
    for name, cell in cells.items():
        work, law, system = name.split("/")
        if (work == "any model" and "picked" not in system) or system == "picked, 1.1 calls":
            calls = cell["p999_ms"][0] if cell["calls"] < 1.105 else np.inf
            found.setdefault((work, law), []).append(calls)
    ours = {place: tails for place, tails in found.items() if place[0] != "any model"}
    won = sum(tails[0] < min(found["any model", law]) for (_, law), tails in ours.items())
    kept = 100 * min(c["right"] for name, c in cells.items() if name.endswith("/picked, 1.1 calls"))
    best = f"the shortest p99.9 in {won} of {len(ours)} simulated cells, and keeps {kept:.1f} % of"
    yield "README.md", "at most 1.1 calls a query, a server that answers late queries with a"
    yield "README.md", f"{best} the labels or more"
    best = f"the shortest tail within 1.1 calls a query in {won} of {len(ours)} cells"
    yield "docs/which.md", best

    def row(place, system):
        cell = cells[f"{place}/{system}"]
        tail = cell["p999_ms"][0] / 50  # in medians of a service time
        return f"{tail:.2f}", f"{cell['calls']:.2f}", f"{100 * cell['right']:.2f}"

    picked, hedged = "picked, 1.1 calls", "least loaded, hedged, 1.1 calls"
    even, rack = "5 %, constant", "slow rack, lognormal 0.2"
    for law, name in (
        (even, "classifier, past answers"),
        (rack, "the same, with slow racks"),
    ):
        (tail, *_), (other, *_) = row(f"lenet5/{law}", picked), row(f"any model/{law}", hedged)
        row_cells = f"p99.9 {tail} medians", f"{other} tuned hedging"
        yield "docs/which.md", named(name, "", *row_cells)
    _, calls, right = row(f"lenet5/{even}", picked)
    words = f"For LeNet5 it takes {calls} calls a query, and {right} % of the labels are"
    yield "docs/which.md", words
    tail, calls, _ = row(f"any model/{even}", "two at once, 1.2 x median")
    yield "docs/which.md", f"two copies at once have {tail} medians at {calls} calls, and are exact"
    right = row(f"lenet5/{rack}", picked)[2]
    yield "docs/which.md", f"lognormal service times (sigma 0.2), {right} % of the labels are the"
    parity = [
        read("tails")["paper"][f"lenet5/5 %/{name}"] for name in ("ParM, k = 2", "NeRCC (6, 4)")
    ]
    kept = [f"{cell['p999_by_p50'][0]:.2f}" for cell in parity]
    right = [f"{100 * cell['right']:.2f} %" for cell in parity]
    row_cells = f"p99.9 {kept[0]} medians, {right[0]} of labels", f"{kept[1]}, {right[1]} NeRCC"
    yield "docs/which.md", named("classifier, a parity model", "ParM", *row_cells)
    (calls,) = {f"{cell['calls']:.2f}" for cell in parity}
    yield "docs/which.md", f"Both take {calls} calls a query"


def loads_of_tails():
    require("aiohttp", "serve-test")  # by the bench that loads servers
    with bench_modules(systems="tails_systems", tails="tails", serving="serving") as bench:
        waits, tuning = bench.systems.TRIGGERS, bench.tails.TUNING
        threshold, wanted = bench.systems.THRESHOLD, bench.systems.WANTED["15 %"]
    about, minutes = read("tails")["about"], read("serving_minutes")
    workers, median = minutes["workers"]["workers"], 1e3 * about["load"]["base"]
    hedged = read("tails")["paper"]["vit/5 %/picked, 1.35 calls"]["p99_by_p50"][0]
    runs = [run for cell in read("tails")["services"].values() for run in cell["seeds"].values()]
    assert {run["queries"] for run in runs if "p9999_ms" in run} == {100_000}
    (row,) = minutes["rows"]
    assert row["queries"] == minutes["rate"] * minutes["seconds"] == 60 * 600
    for sentence in (
        f"exceeds the budget and the server mostly hedges: p99 is {hedged:.1f} medians.",
        f"({tuning:,} queries of another seed): hedging after {waits[0]} to {waits[-1]:g} median",
        f"Rivals hedge after as little as {waits[0]} median service times",
        f"10 ms beyond the median, here {(median + 10) / median:g} median service times",
        f"or {threshold} times the running median",
        f"takes longer than {threshold} times the median",
        f"{100 * wanted} % where 15 % do (one per cent of all)",
        f"with {workers} workers that are threads and sleep (50 ms a call, half a second more for",
        f"5 %): LeNet5, MNIST's test images, {minutes['rate']:g} queries a second",
    ):
        yield "docs/tails.md", sentence


def dependent():
    found, real = read("dependent"), read("dependent_server")["after"]
    assert {cell["queries"] for cells in found["after"].values() for cell in cells} == {5000}
    assert {cell["queries"] for cells in real.values() for cell in cells} == {4000}
    assert max(c["worst_beyond"] for cells in real.values() for c in cells) < 3
    assert {each["days"] for each in found["monitor"]} == {1000}
    beyond = []  # wrong answers over those allowed, of all runs of a case
    for case, cells in found["after"].items():
        allowed = 0.05 if case.startswith(("digits", "MNIST")) else 0.1
        beyond.append(sum(cell["wrong"] - allowed * cell["approximate"] for cell in cells))
    worst = max(cell["worst_beyond"] for cells in found["after"].values() for cell in cells)
    needed = [f"{np.ceil(np.log(0.25) / np.log(1 - share)):.0f}" for share in (0.1, 0.05, 0.01)]
    slow = [case for case in real if case.startswith("smallest")]
    of_slow = (np.sum([c["of_slow"] for c in real[case]], axis=0) for case in slow)
    shares = span([100 * wrong / number for number, wrong in of_slow], ".0f")
    by_query = [*slow, "half from the hardest 12 %, 0.5 s"]
    first, other = (
        span([c["load_average"] for case in cases for c in real[case]], ".0f")
        for cases in (by_query, [case for case in real if case not in by_query])
    )
    for sentence in (
        f"in {np.sum(np.array(beyond) <= 0)} of {len(beyond)} cases, and missed it by at most "
        f"{np.ceil(max(beyond)):.0f} answers in the others",
        f"up to {np.ceil(worst):.0f} more answers were wrong than allowed",
        "the number of approximate answers in a run of 5,000 queries",
        "{} for a share of 0.1, {} for 0.05, {} for 0.01".format(*needed),
        "with clients of HTTP: 4,000 queries a run",
        f"the smallest margins are slow, {shares} % of these are wrong",
        f"a load of {first} where slowness depends on the query, {other} elsewhere",
    ):
        yield "docs/dependent.md", sentence


def codes():
    """NeRCC against BACC, BSCC, ParM and copies."""
    cells = paper_cells()
    each = [*itertools.chain(*cells)]

    def gains(some, kind, *rivals):
        errors = [{code: row["mse"]["mean"] for code, row in cell.items()} for cell in some]
        pairs = [(e[f"NeRCC {kind}"], min(e[name] for name in rivals)) for e in errors]
        # An exact rival, as BACC with tuned points where nobody straggles, leaves nothing to gain.
        return np.array([100 * (1 - np.sqrt(a / b)) for a, b in pairs if b > 1e-9])

    bacc = "BACC", "ApproxIFER"
    ends, below = {}, {}
    for kind in ("learned", "tuned", "published"):
        ends[kind] = span([gains(some, kind, *bacc).mean() for some in cells], ".0f")
        below[kind] = np.sum(gains(each, kind, *bacc) > 0)
    learned, tuned = (gains(each, kind, "BACC tuned").mean() for kind in ("learned", "tuned"))
    assert below["learned"] == len(each)
    yield "README.md", f"has a lower error than BACC, an earlier code, in all {len(each)} cells"
    yield "docs/which.md", f"below BACC's in all {len(each)} cells"
    results = f"in all {len(each)} cells, by {ends['learned']} % of the RMSE on average."
    tuned_spline = f"has a lower error in {below['tuned']} cells, by {ends['tuned']} %."
    yield "docs/results.md", f"{results} NeRCC with a tuned spline {tuned_spline}"
    yield "docs/results.md", f"two constant lambdas, gains {ends['published']} %."
    points = f"the spline gains {tuned:.0f} %, the learned decoder {learned:.0f} %"
    yield "docs/results.md", f"Over BACC with tuned points, {points}."
    rivals = read("rivals")["laws"]
    gain = {code: f"{100 * row['gain']['mean']:.0f} %" for code, row in rivals["40"].items()}
    assert all(rivals["40"][f"{code} tuned"]["gain"]["low"] < 0 for code in ("BACC", "BSCC"))
    assert rivals["0"]["BACC tuned"]["rmse"]["mean"] == 0
    below = f"{gain['BACC']} below BACC's and {gain['BSCC']} below BSCC's"
    yield "docs/results.md", f"with 40 stragglers, tuned NeRCC's RMSE is {below}, but only"
    yield "docs/results.md", "With none, BACC tuned is exact."
    yield "docs/results.md", f"{gain['BACC tuned']} below that of BACC tuned as long"
    yield "docs/results.md", f"{gain['BSCC tuned']} below that of BSCC tuned, within the intervals"

    won, lower = compared_with_learned("ParM")
    parity = f"in {won.count(1)} of its {len(won)} cells"
    for path in ("README.md", "docs/which.md"):
        yield path, f"keeps more {parity}, and fewer in {won.count(-1)}"
    fewer = (
        f"and fewer in {won.count(-1)}; its error on the data points that it does not lose is "
        f"lower in {lower}."
    )
    yield "docs/results.md", f"{parity}, beyond both intervals, {fewer}"
    won, _ = compared_with_learned("replication")
    both = f"beyond both intervals, and fewer in {won.count(-1)}"
    for path, of in (
        ("README.md", "these cells"),
        ("docs/which.md", "these cells"),
        ("docs/results.md", f"the {len(won)} cells"),
    ):
        yield path, f"in {won.count(1)} of {of}, {both}"
    (lost,) = (
        row
        for row in read("paper")["parts"]["lenet5-mnist:100:20"]["logits"]["rows"]
        if (row["code"], row["stragglers"]) == ("NeRCC untuned", "80")
    )
    assert lost["lost"]["mean"] == 0
    wrong = f"{100 * (1 - lost['rel_acc']['mean']):.0f} % of the labels are not the model's"
    words = "With 80 of 100 workers lost, every prediction of LeNet5 for 20 images is recovered"
    yield "docs/concepts.md", f"{words}, but {wrong}"


def paper_cells():
    """Return the rows by code of each cell of the paper's comparison, by model and outputs."""
    cells: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for name, part in read("paper")["parts"].items():
        for outputs in ("probabilities", "logits"):
            for row in part[outputs]["rows"]:
                cell = cells.setdefault((part["setting"]["model"], outputs), {})
                cell.setdefault(f"{name} {row['stragglers']}", {})[row["code"]] = row
    return [[*some.values()] for some in cells.values()]


def compared_with_learned(rival):
    """Return in which cells a code keeps clearly more labels, or fewer; and has a lower error."""
    won, lower = [], []
    for cell in itertools.chain(*paper_cells()):
        if rival in cell:
            other, ours = (cell[code] for code in (rival, "NeRCC learned"))
            gap = other["rel_acc"]["mean"] - ours["rel_acc"]["mean"]
            both = np.hypot(*(each["rel_acc"]["half_width"] for each in (other, ours)))
            won.append(np.sign(gap) * (abs(gap) > both))
            lower.append(other["mse"]["mean"] < ours["mse"]["mean"])
    return won, sum(lower)


def slopes():
    (found,) = (
        curve["large"]["slope"]
        for curve in read("paper")["convergence"]["curves"]
        if (curve["function"], curve["law"], curve["noise"], curve["code"])
        == ("LeNet5", "S = 3", 0, "NeRCC")
    )
    yield "docs/theory.md", f"its slope without noise is {found:.1f}, the bound's -3"
    sizes = read("independent")["plan"]["num_workers"]
    yield "docs/results.md", f"Slopes for N from {sizes[0]} to {sizes[-1]:,}"
    rows: dict[tuple[str, float], dict[str, float]] = {}
    for curve in read("independent")["curves"]:
        place = rows.setdefault((curve["function"], curve["share"]), {})
        place[curve["code"]] = curve["points"][-1]["mean"]
    smooth = {place: row for place, row in rows.items() if place[0] != "LeNet5"}
    below = sum(row["BSCC"] < row["NeRCC"] for row in smooth.values())
    assert (below, len(smooth)) == (5, 8)
    yield "docs/results.md", f"At N = {sizes[-1]:,} BSCC's error is below NeRCC's in five of the"


def schemes():
    """What order, layout and student bring, against copies."""
    few, below, student = [], [], []
    for recorded in read("beyond").values():
        share = recorded["student"]
        student.append(100 * share["multiplications"] / share["base_multiplications"])
        for cell in recorded["cells"].values():
            assert (cell["size"]["points"], cell["size"]["sets"]) == (1024, 20)
            rows = {(r["mode"], r["order"]): r for r in cell["rows"]}
            ours = rows["with surrogate", "surrogate, buffer 1024"]
            published, plain, rescued = (
                rows[mode, "no order"]
                for mode in ("published", "replication", "replication, else surrogate")
            )
            few.append(
                ours["disagreement"]
                <= min(published["disagreement"] / 5, plain["disagreement"] / 2)
            )
            gap = rescued["disagreement"] - ours["disagreement"]
            below.append(gap > np.hypot(rescued["half_width"], ours["half_width"]))
    assert all(few)
    assert all(abs(share - 6.5) < 0.4 for share in student)
    yield "README.md", f"fewer wrong labels than plain copies in all {len(few)} cells. It has fewer"
    yield "README.md", f"with the same student in {sum(below) or 'none'} of them, beyond both"
    yield "docs/beyond.md", f"at most half of replication's, in all {len(few)} cells"
    yield (
        "docs/beyond.md",
        f"beyond both intervals in {sum(below) or 'none'} of the {len(few)} cells",
    )
    yield "docs/beyond.md", "1,024 test images and 20 straggler sets a cell"
    plain = [
        {row["mode"]: row["disagreement"] for row in cell["rows"] if row["order"] == "no order"}
        for cell in read("beyond")["lenet5-mnist"]["cells"].values()
    ]
    more = sum(rows["search"] > rows["repeated"] for rows in plain)
    yield "docs/beyond.md", f"has more of them than *repeated* in {more} of {len(plain)} cells"
    yield "docs/beyond.md", "approximate answers where 0.5 % may."
    yield "docs/beyond.md", "A student has some 6.5 % of its model's multiplications"

    def lost(model, mode, order="no order"):
        rows = read("beyond")[model]["cells"]["(24, 20, 2)"]["rows"]
        (row,) = (row for row in rows if (row["mode"], row["order"]) == (mode, order))
        return 100 * row["disagreement"]

    models = "lenet5-mnist", "repvgg-cifar10", "vit-cifar10"
    published = sorted(lost(model, "published") for model in models)
    (copies,) = {f"{lost(model, 'replication'):.1f}" for model in models}
    few, *others = (lost(model, "with surrogate", "surrogate, buffer 1024") for model in models)
    assert all(lost(model, "replication, else surrogate") < max(few, *others) for model in models)
    lose = f"plain copies lose {copies} % of the labels, NeRCC as published {published[0]:.1f} to"
    yield "docs/which.md", f"With 20 queries on 24 workers, 2 of them stragglers, {lose}"
    yield "docs/which.md", f"{published[-1]:.0f} %. With repeated points"
    lose = f"NeRCC loses {few:.2f} % of LeNet5's labels and at most {max(others):.1f} % of RepVGG's"
    yield "docs/which.md", lose


def copies_by_doubt():
    ratios = []
    for model in ("repvgg-cifar10", "vit-cifar10"):
        for cell in read("beyond")[model].get("copies", {}).values():
            assert 2 * cell["size"]["points"] == 4000  # of two parts
            rows = {row["mode"]: row for row in cell["rows"]}
            wrong = {mode: row["disagreement"] for mode, row in rows.items()}
            ratios.append(rows["copies by the student's doubt"]["ratio"])
            assert wrong.pop("NeRCC, learned decoder") > wrong["copies, learned decoder"]
            *others, with_student, by_doubt = wrong.values()
            assert by_doubt < 0.65 * with_student
            assert with_student < min(others) / 2
    found = span(ratios, ".2f")
    yield "docs/beyond.md", "4,000 test images, of which none trained the student"
    leave = f"over all {len(ratios)} cells, these copies leave {found} times as many wrong labels"
    yield "docs/beyond.md", f"On CIFAR-10, {leave} as copies with the same student"
    yield "docs/which.md", f"leave {found} times as many wrong labels on CIFAR-10"
    cells = f"{found} of the wrong labels", "copies with the student"
    yield (
        "docs/which.md",
        named("classifier, a student, groups", "copies where it is unsure", *cells),
    )


def error_probabilities():
    rows = [
        (model, row)
        for model, recorded in read("beyond").items()
        for cell in recorded.get("promises", {}).values()
        for row in cell["rows"]
        if "promised" in row
    ]
    given = [row for _, row in rows if row.get("wrong_of_given")]
    assert all(row["wrong_of_given"][0] <= row["promised"] for row in given)
    silent = sum("given" in row for _, row in rows) - len(given)
    yield "docs/which.md", f"Of {len(rows)} cases it gave nothing out in {silent}, and kept its"
    assert len(rows) == len(given) + silent
    yield "docs/which.md", f"promise in all {len(given)} in which it gave something out."

    def again(model, promised):
        found = [
            100 * row["again"]
            for name, row in rows
            if (name, row["promised"]) == (model, promised) and row["mode"].startswith("with")
        ]
        return found, span(found, ".1f" if max(found) < 2 else ".0f")

    own = [again(each, 0.005) for each in ("lenet5-mnist", "repvgg-cifar10", "vit-cifar10")]
    assert own[1][1] == own[2][1]
    assert not any(
        row["given"] for name, row in rows if row["promised"] == 0.005 and name != "lenet5-mnist"
    )
    yield (
        "docs/beyond.md",
        f"Where 0.5 % may differ, the model answers {own[0][1]} % of all queries",
    )
    yield "docs/beyond.md", f"and all that are lost ({own[1][1]} %) for RepVGG and ViT; where 5 %"
    repvgg, vit = (again(each, 0.05)[1] for each in ("repvgg-cifar10", "vit-cifar10"))
    yield "docs/beyond.md", f"{repvgg} % for RepVGG and {vit} % for ViT. Without a student"


def functions():
    entries = read("functions")

    def ratios(cell, rival):
        for name, entry in entries.items():
            systems, picked = entry["cells"][cell]["systems"], entry["cells"][cell]["picked"]
            cheap = ", with a cheap model" * picked.endswith(", with a cheap model")
            other = "learner, no redundancy" + cheap if rival == "alone" else rival
            pairs = zip(systems[picked]["rmse"], systems[other]["rmse"], strict=False)
            yield name, np.exp(np.mean([np.log(one / two) for one, two in pairs]))

    (history,) = {entry["size"]["history"] for entry in entries.values()}
    nearest, published = (
        dict(ratios("(24, 20, 2)", rival))
        for rival in ("copies, else the nearest", "NeRCC, published")
    )
    last = [f"{each.pop('CIFAR-10'):.2f}" for each in (nearest, published)]
    nearest, published = (span(each.values(), ".2f") for each in (nearest, published))
    less = span([100 * (1 - share) for _, share in ratios("(30, 20, 5)", "alone")], ".0f")
    picked = [entry["cells"]["(24, 20, 2)"]["picked"] for entry in entries.values()]
    assert all(name.startswith("learner, copies of the most uncertain") for name in picked)
    assert len(picked) == 8
    for sentence in (
        "copies of the most uncertain rows were picked for all eight functions",
        f"After {history} past answers a *learner*",
        f"{nearest} of the error of copies whose lost rows get the nearest row's answer "
        f"({last[0]} on CIFAR-10)",
        f"{published} of published NeRCC's ({last[1]})",
        f"redundancy takes away {less} % of",
        f"By the chance of which {history} pairs calibrate, the share varies by "
        f"{100 * np.sqrt(0.9 * 0.1 / history):.1f} points",
    ):
        yield "docs/functions.md", sentence
    sweep = entries["Lotka-Volterra"]["sweep"]
    errors = [f"{np.mean(sweep['rmse'][name]):.4f}" for name in (sweep["picked"], "fixed points")]
    cells = f"error {errors[0]}", f"{errors[1]} with a code"
    yield "docs/which.md", named("a sweep of one parameter", "[SciPy's spline", *cells)


def rows_of_simulators():
    slow = read("rows")
    assert {(cell["rows"], cell["function"] == "") for cell in slow["cells"]} == {(3000, False)}
    about = f"3,000 rows of {slow['seconds']} s, {slow['workers']} workers, a tolerance of"
    yield "docs/functions.md", f"{about} {100 * slow['tolerance']:g} % of the outputs' spread"
    yield "docs/functions.md", f"{100 * slow['coverage']:g} % bars. The twelfth with the largest"
    spot = read("spot")
    by_executor = [cell["within"] / cell["executor"] for cell in spot["cells"]]
    least = np.floor(10 * min(by_executor)) / 10
    yield "docs/functions.md", f"has at least {least:g} times as many rows within the tolerance"
    curves = [cell for cell in read("row_curves")["cells"] if cell["share"] == 0.1]
    most = max(100 * cell["chosen"]["computed"] / 3000 for cell in curves)
    held = span([100 * c["chosen"]["held"] / c["chosen"]["predicted"] for c in curves], ".0f")
    few = f"less than {np.ceil(most):.0f} % of the rows are computed, and {held} % of the bars hold"
    yield "docs/functions.md", f"At 10 % {few}"
    plain = {cell["function"]: cell["gp"] for cell in curves if cell["gp"]}
    assert len(plain) == 4
    rows = {}
    for share in (0.1, 0.3, 0.03):
        some = [cell for cell in read("row_curves")["cells"] if cell["share"] == share]
        orders = ("chosen", "random")
        rows[share] = [np.mean([cell[each]["computed"] for cell in some]) for each in orders]
    assert rows[0.1][0] < rows[0.1][1]
    assert rows[0.3][0] >= rows[0.3][1]
    assert rows[0.03][0] >= 0.9 * 3000
    few = "fewer rows than a random one in the mean, at 30 % no fewer; 3 % needs nearly all"
    yield "docs/functions.md", few

    slow, spot = (
        [cell for cell in each["cells"] if cell["function"] == "Lotka-Volterra"]
        for each in (slow, spot)
    )
    slow = [cell for cell in slow if cell["law"] == "by row"]
    spot = [cell for cell in spot if cell["workers"] == 12]
    own, executor = (
        f"{np.mean([c[key] for c in slow]):.1f} s" for key in ("seconds", "executor_s")
    )
    yield "docs/which.md", named("rows of a simulator", "[", own, f"{executor} executor")
    own, executor = (f"{np.mean([c[key] for c in spot]):,.0f}" for key in ("within", "executor"))
    cells = f"{own} of 3,000 rows", f"{executor} executor"
    yield "docs/which.md", named("rows on spot nodes", "", *cells)


def ensembles():
    cells = read("ensembles")["cells"]

    def held(law, way, statistic):
        each = [c["ways"][way][statistic]["held"] for c in cells if c["law"] == law]
        return 100 * np.mean(each)

    laws, statistics = {cell["law"] for cell in cells}, ("mean", "quantile", "probability")
    ours = span([held(law, "ours", each) for law in laws for each in statistics], ".0f")
    medians = [each["median"] for cell in cells for each in cell["computed"].values()]
    assert (read("ensembles")["rows"], read("ensembles")["coverage"]) == (1000, 0.9)
    yield "docs/ensembles.md", f"The 90 % intervals held in {ours} % of the cases"
    yield "docs/ensembles.md", f"{span(medians, '.0f')} of the rows were computed (medians)"
    yield "docs/ensembles.md", "90 % intervals that contained the true value of all 1,000 rows"
    mean = [held("leaning", way, "mean") for way in ("ours", "dropped")]
    cells = f"{mean[0]:.0f} % of intervals hold", f"{mean[1]:.0f} % if late rows are dropped"
    yield "docs/which.md", named("statistics of an ensemble", "[", *cells)


def hedged_calls():
    runs = read("hedging")["cases"]["one"]
    tails = (np.mean([run[name]["p99_medians"] for run in runs]) for name in ("hedge", "none"))
    cells = f"p99 {next(tails):.2f} medians", f"{next(tails):.2f} without"
    yield "docs/which.md", named("calls of any kind", "[", *cells)
    yield "docs/hedging.md", f"{read('hedging')['rate']:g} requests a second come at random times"


def liars():
    losses: dict[str, list[float]] = {}
    for part in read("adversaries")["parts"].values():
        rows = {(r["method"], r["attack"], r["adversaries"]): r for r in part["rows"]}
        for method, attack, count in rows:
            if attack != "none":
                off = 100 * rows[method, attack, count]["disagreement"]["mean"]
                losses.setdefault(method, []).append(off)
    ours, theirs, plain = (
        np.array(losses[name])
        for name in ("repeated NeRCC, reject", "replication, median", "NeRCC, reject")
    )
    first = len(ours) // 2  # LeNet5
    for path, number in (("docs/which.md", first), ("docs/adversaries.md", len(ours))):
        gap = (theirs - ours)[:number]
        same, more, fewer = (np.sum(each) for each in (abs(gap) < 1e-7, gap > 1e-7, gap < -1e-7))
        if path == "docs/which.md":
            cells = f"more labels in {more} of {number} cells", "copies with a median"
            use = "[rejection, repeated points"
            yield path, named("workers that may lie", use, *cells)
            kept = f"in {same} of {number} cells, fewer in {fewer} and more in {more}."
            yield path, f"rejection keeps as many labels {kept}"
        else:
            assert fewer == 0
            kept = f"as many labels as copies with a median in {same} of {number} cells, and up to"
            yield path, f"{kept} {gap.max():.1f} points more in {more}"
            yield path, f"on the paper's points it loses {min(plain):.1f} to {max(plain):.0f} %"


def wrong_answers():
    runs, rows = read("wrong_answers")["runs"], read("wrong_answers")["rows"]
    assert ({run["rows"] for run in runs}, len({run["seed"] for run in runs})) == ({2000}, 5)
    assert len({row["seed"] for row in rows}) == 3
    yield "docs/wrong-answers.md", "Means of five seeds, 2,000 rows a run"
    calls = {
        work: np.mean(
            [
                run["computed_rows"] / run["rows"]
                for run in runs
                if (run["work"], run["faults"]) == (work, "none") and run["rate"] is not None
            ]
        )
        for work in {run["work"] for run in runs}
    }
    least, most = (f"{each(calls.values()):.3f}" for each in (min, max))
    yield "docs/wrong-answers.md", f"a row takes {least} or {most} calls"
    prices = [
        np.median([b["per_second"] / a["per_second"] for a, b in zip(*pair, strict=True)])
        for row in read("serving_checks")["rows"]
        if row["loop"] == "closed"
        for name in ("learner", "student")
        if name in row["servers"]
        for pair in [(row["servers"][name], row["servers"][f"{name}, checks"])]
    ]
    yield "docs/wrong-answers.md", f"answers {span(prices, '.2f')} times as many requests a second"


def models():
    """Small forms beside the names of the paper's: their sizes and accuracies, from their cards."""
    small = [
        json.loads((HERE / f"models/weights/{name}.json").read_text())
        for name in ("repvgg-cifar10", "vit-cifar10")
    ]
    sizes = "{:.2f} and {:.2f} million parameters".format(
        *(card["num_parameters"] / 1e6 for card in small)
    )
    right = "{:.1f} and {:.1f} % accuracy on CIFAR-10's test images".format(
        *(100 * card["score"]["accuracy"] for card in small)
    )
    for path in ("README.md", "docs/results.md"):
        yield path, f"{sizes}, {right}"
    yield "docs/which.md", sizes


def devices():
    launches = {
        name: found["launches"] for name, found in read("compiled-cuda")["programs"].items()
    }
    number = launches["try_decode (20, 8)"]
    assert abs(number - 90) <= 5
    assert abs(2.5e-3 * number - 0.2) < 0.05
    ratios = [
        part["by"]["bare, N"]
        for run in read("accelerator")["runs"].values()
        for case in run["cases"].values()
        if case["subject"].startswith(("RepVGG", "ViT"))
        for name, part in case["parts"].items()
        if name.startswith("mask")
    ]
    assert len(ratios) == 4
    path = "docs/accelerators.md"
    yield path, "decoding 8 predictions from 20 workers takes about 90 kernel launches, some 0.2 ms"
    yield path, f"within {np.ceil(100 * (max(ratios) - 1)):.0f} % for RepVGG and a ViT"


def clusters():
    rows = [row for run in read("cluster").values() for row in run["rows"]]
    assert {(row["queries"], row["errors"], row["exact"]) for row in rows} == {(300, 0, 1)}
    assert {run["rate"] for run in read("cluster").values()} == {20}
    p99 = {row["stretch"]: [] for row in rows}
    for row in rows:
        p99[row["stretch"]].append(f"{row['p99_ms']:.0f}")
    killed, (before, _) = " and ".join(p99["a node is killed"]), p99["undisturbed"]
    yield "docs/cluster.md", f"p99 was {killed} ms while a node was killed ({before} before)"
    yield "docs/cluster.md", "20 queries a second. [Both tables"
    yield "docs/cluster.md", "20 queries a second, 300 for each row"


def minutes():
    """How long the benches took whose results have it."""
    paper = read("paper")["parts"].values()
    seconds = {
        "paper": sum(p[kind]["seconds"] for p in paper for kind in ("probabilities", "logits")),
        "rivals": read("rivals")["seconds"],
        "independent": read("independent")["seconds"],
        "beyond": sum(
            cell.get("seconds", 0)
            for recorded in read("beyond").values()
            for part in ("cells", "promises", "learners", "copies")
            for cell in recorded.get(part, {}).values()
        ),
        "functions": sum(
            cell.get("seconds", 0)
            for entry in read("functions").values()
            for cell in entry["cells"].values()
        ),
        "adversaries": sum(part["seconds"] for part in read("adversaries")["parts"].values()),
    }
    # The longest first, since what is found is taken out, and "(3" is in "(324".
    for each in sorted({f"({each / 60:.0f}" for each in seconds.values()}, key=len, reverse=True):
        yield "docs/reproduce.md", each


CLAIMS = (
    servers, tails, dependent, codes, slopes, schemes, copies_by_doubt, error_probabilities,
    functions, rows_of_simulators, ensembles, hedged_calls, liars, wrong_answers, models, devices,
    clusters, minutes,
)  # fmt: skip
# Figures that were not measured: sizes, options, constants.
SETTINGS = {
    "docs/accelerators.md": (
        "2.5 µs a launch, and 10 µs for a predicate", "Values below 1 are noise",
    ),
    "docs/adversaries.md": (
        "every output is moved by 1/8, 1/4 or all", "lambda_dec = c (A / N)^(8/5), with c = 4e-6",
        "of a grid on 500 of these images",
    ),
    "docs/beyond.md": (
        "three times, each under 20 straggler sets", "answers to 1,000 images, by 64 principal",
        "0.5 or 5 % may differ", "*5% again*: the model answers the 5 % with the largest",
    ),
    "docs/changelog.md": ("## 0.1.0, not released yet",),
    "docs/cluster.md": (
        "a worker has 0.5 CPUs", "| 0 | every", "| 1 | nothing", "| 2 | an option", "| 3 | a part",
        "| 130 | Ctrl-C |", ", 60 s | it is replaced", "by Ray after some 60 s",
        "| 2 to 4 s; about 6 s |", "not back in 60 s", "and stops with exit code 3.",
    ),
    "docs/ensembles.md": (
        "over 3,000 simulations", "(default 0.9)", "In one call of 100",
    ),
    "docs/functions.md": (
        "takes 1 s more", "within their 90 % bars", "recall@10", "One parameter in 20 steps",
        "8 % of the calls take 0.5 s more", "15 rows a task",
    ),
    "docs/hedging.md": ("After 20 requests", "every 500 requests"),
    "docs/install.md": (
        "JAX 0.10 or newer", "on 3.11, and the newest on 3.13 or newer",
    ),
    "docs/own-models.md": ("RepVGG A0 to B3",),
    "docs/quickstart.md": ("so all 20 answers", "needs 14 answers"),
    "docs/reproduce.md": ("on 5,000 of the 10,000 test images", ", 1, 2 "),
    "docs/results.md": (
        "claims up to 23 %", "(decoded - the model's own)^2", "(5 and 8 epochs)",
        "train for 500 and more", "lambda_dec > 0 help?",
        "lambda_dec = 0 that lambda_dec > 0 saves",
        "log^3(N) N^-3 for BACC and log^4(N) N^-2", "five deals of 448 images", "2,000 sets each",
        "NeRCC has = 0", "a 13 x 13 grid",
    ),
    "docs/run.md": ("exit code 3", "of 90 % of the predicted rows"),
    "docs/schemes.md": (
        "by 500 random features", "by their 64 pixels", "goes where 1 minus the student's",
    ),
    "docs/serve.md": (
        "at port 8001", "-1: not known yet",
        "picks its settings within 1.1 calls a query", "400 bad input", "413 too large",
        "scores of labels | (0.05)", "in a share (0.9) of the cases", "429 the queue",
        "502 the model", "503 starting", "504 the deadline",
    ),
    "docs/serving.md": (
        "stretches of 100 queries", "requests of 16 queries",
        "(0.05) is a bound", "fails with a probability of 0.25", "0 decodes none, 1 all",
        "at K = 4, N = 8",
    ),
    "docs/theory.md": (
        "in [-1, 1]", "below 1e-5 for every lambda, for n up to 200 and with 60 % of the answers",
        "sum to more than 32",
    ),
    "docs/which.md": (
        "1,347 digits are too few to guarantee that at most 0.5 %",
        "a tolerance of 10 % of the outputs' spread",
        "90 % intervals of a mean", "fails with a probability of 0.25",
    ),
    "docs/wrong-answers.md": ("three seeds, 3,000 answers each",),
    "docs/tails.md": (
        "*two at once* are within 1.1 calls a query", "lognormal (sigma 0.2)",
        "after 1.2 median service times, has no limit", "where 5 % straggle, at the usual load",
        "stretches of 100 queries", "95th or 90th percentile (and 10 ms)",
        "10 % of the labels of queries whose worker straggles", "of all where 5 % straggle",
    ),
    "docs/dependent.md": (
        "fails with a probability of 0.25", "from the 12 % with the largest peaks",
        "10 % were allowed (5 % of decoded ones)",
        "a false one in 50,000 answers", "(Clopper and Pearson 1934)",
        "The latest 1,024 count, and the latest 100", "20 for a tolerance",
        "the 5 % are those with the largest", "A query takes 50 ms if nothing is slow",
        "one in 50,000 answers in the mean",
        "a day of 1,000 answers has one with a probability of at most 2 %",
        "after 1,000 answers of which seven tenths", "means of 200 runs",
    ),
}  # fmt: skip
PAGES = ["README.md", *sorted(str(page.relative_to(HERE)) for page in HERE.glob("docs/*.md"))]


@functools.cache
def claims():
    """Return the sentences of all pages that the results make."""
    return [claim for each in CLAIMS for claim in each()]


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


@pytest.mark.parametrize("path", PAGES)
def test_every_figure_of_a_page_is_known(path):
    known = [sentence for page, sentence in claims() if page == path]
    if path == "docs/tails.md":
        known += [sentence for _, sentence in loads_of_tails()]
    text = prose_of(path)
    for sentence in (*known, *SETTINGS.get(path, ())):
        assert sentence in text, sentence
        text = text.replace(sentence, "")
    assert re.findall(r".{0,40}\d[\d,.]*.{0,20}", re.sub(NAMES, "", text)) == []


def test_settings_that_pages_name():
    bound = inspect.signature(accuracy.within_bound)
    assert bound.parameters["failure"].default == 0.25
    assert (_evidence._ROWS, _evidence._RECENT, _evidence._BARS) == (1024, 100, 20)
    assert inspect.signature(RiskMonitor.__init__).parameters["false_alarms"].default == 1 / 50_000
    require("pydantic_settings", "serve")
    from nercc_jax.serving import ModelSettings

    assert ModelSettings(outputs="logits").policy().max_disagreement == 0.05
