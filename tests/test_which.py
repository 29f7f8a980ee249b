"""The figures of docs/which.md are those of the results that it links to."""

import json
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def page():
    return " ".join((HERE / "docs/which.md").read_text().split())


def read(name):
    return json.loads((HERE / f"bench/results/{name}.json").read_text())


def test_of_servers(page):
    price = next(
        row
        for row in read("serving_price")["rows"]
        if (row["model"], row["loop"], row["clients"]) == ("lenet5-digits", "closed", 8)
    )
    bare, uncoded, coded = (
        np.array(price["rates"][name]) for name in ("bare", "uncoded", "coded (8, 4)")
    )
    plain, ours = np.median(uncoded / bare), np.median(coded / bare)  # round by round
    sentence = f"{plain:.2f} of a bare handler's requests a second uncoded, {ours:.2f} coded"
    assert f"{sentence}, LeNet5 with 8 clients" in page
    rows = {r["system"]: r for r in read("serving")["rows"] if r["straggler_rate"] == 0.05}
    hedged, plain, copies = (rows[name] for name in ("hedged", "uncoded", "replication (2, 1)"))
    assert f"p99 of {hedged['p99_ms']:.0f} ms against {plain['p99_ms']:.0f} uncoded" in page
    sentence = f"{copies['p99_ms']:.0f} ms at the same, at {copies['calls_per_query']:.2f} calls a"
    assert sentence in page


def test_of_what_is_known(page):
    tails, text = read("tails"), " ".join(page.split())

    def figures(ground, place, system):
        cell = tails[ground][f"{place}/{system}"]
        tail, calls = cell["p999_by_p50"][0], cell["calls"]
        return f"{tail:.2f}", f"{calls:.2f}", f"{100 * cell['right']:.2f}"

    def varied(place, system):
        cell = tails["services"][f"{place}/{system}"]
        tail = cell["p999_ms"][0] / 50  # in medians of a service time
        return f"{tail:.2f}", f"{cell['calls']:.2f}", f"{100 * cell['right']:.2f}"

    def pair(work, system):
        return [varied(f"{work}/5 %, {each}", system) for each in ("constant", "lognormal 0.2")]

    ours, most = "picked, 1.1 calls", "picked, 1.35 calls"
    (tail, calls, right), (other, more, _) = pair("lenet5", ours)
    assert f"p99.9 is {tail} times the median service time at {calls} calls a query" in text
    assert f"{right} % of the labels the model's own, and {other} times at {more} where" in text
    hedged = "least loaded, hedged, {:g} calls".format
    for words, rival in (
        ("copies at once after 1.2 medians have", "two at once, 1.2 x median"),
        ("hedging that is tuned for just this traffic has", hedged(1.1)),
    ):
        (tail, calls, right), (other, more, _) = pair("any model", rival)
        assert f"{words} {tail} at {calls} calls and {other} at {more}" in text
        assert right == "100.00"
    for system in (("any model", hedged(1.35)), ("repvgg", most)):
        (tail, calls, _), (other, more, _) = pair(*system)
        assert f"for up to 1.35 calls, {tail} at {calls} and {other} at {more}" in text
    (tail, calls, _), (other, more, _) = pair("repvgg", ours)
    assert f"RepVGG's student has {tail} at {calls} and {other} at {more};" in text
    (parm, work, right), (nercc, _, kept) = (
        figures("paper", "lenet5/5 %", system) for system in ("ParM, k = 2", "NeRCC (6, 4)")
    )
    assert f"p99.9 of {parm} times the median at {work} calls a query, {right} % of" in text
    assert f"NeRCC (6, 4) has {nercc} with {kept} %" in text
    rack = "slow rack, lognormal 0.2"
    tail, calls, right = varied(f"lenet5/{rack}", ours)
    assert f"p99.9 is {tail} times the median service time at {calls} calls, {right} % of" in text
    (tail, calls, _), (other, more, _) = (
        varied(f"any model/{rack}", system)
        for system in (hedged(1.1), "Prequal, hedged, 1.1 calls")
    )
    assert f"tuned hedging has {tail} at {calls}, hedged Prequal {other} at {more} (" in text


def test_of_codes_and_copies(page):
    models = {"LeNet5": "lenet5-mnist", "RepVGG": "repvgg-cifar10", "ViT": "vit-cifar10"}
    beyond = read("beyond")
    last, none = "surrogate, buffer 1024", "no order"
    for words, mode, order in (
        ("as published", "published", none),
        ("plain copies", "replication", none),
        ("repeated points, ordered, with a student", "with surrogate", last),
        ("the same, the least certain 5 % run again", "with surrogate, 5% again", last),
        ("plain copies, lost ones answered by the student", "replication, else surrogate", none),
    ):
        row = page.partition(f"| {words} |")[2].split("|")[:3]
        for cell, model in zip(row, models.values(), strict=True):
            found = next(
                100 * each["disagreement"]
                for each in beyond[model]["cells"]["(24, 20, 2)"]["rows"]
                if (each["mode"], each["order"]) == (mode, order)
            )
            digits = len(cell.strip(" %").partition(".")[2])
            assert cell.strip() == f"{found:.{digits}f} %", (words, model)


def test_of_plans(page):
    sure, code = read("plan").values()
    seen, promised = (f"{sure[key]['p99_ms']:.0f}" for key in ("seen", "promised"))
    assert f"had a p99 of {seen} ms, of {promised} promised" in page
    seen, promised = (f"{code[key]['p99_ms']:.0f}" for key in ("seen", "promised"))
    assert f"with {seen} ms of {promised} promised" in page
    wrong, half = 100 * code["seen"]["disagreement"], 100 * code["seen"]["half_width"]
    most = 100 * code["promised"]["most_disagreement"]
    assert f"{wrong:.1f} ± {half:.1f} % of the labels of new digits differed" in page
    assert f"it had promised {most:.1f} %" in page


def test_of_bacc(page):
    cells, fewer = {}, []
    for part in read("paper")["parts"].values():
        for outputs in ("probabilities", "logits"):
            rows = {(r["code"], r["stragglers"]): r for r in part[outputs]["rows"]}
            errors = {}
            for (code, law), row in rows.items():
                errors.setdefault(law, {})[code] = row["mse"]["mean"]
            cells.setdefault((part["setting"]["model"], outputs), []).extend(errors.values())
            last = list(errors)[-1]
            kept = (rows[code, last]["rel_acc"]["mean"] for code in ("BACC tuned", "NeRCC tuned"))
            fewer.append(100 * np.subtract(*kept))
    each = [errors for some in cells.values() for errors in some]

    def gains(some, kind, *rivals):
        ratios = [e[f"NeRCC {kind}"] / min(e[name] for name in rivals) for e in some]
        return 100 * (1 - np.sqrt(ratios))

    bacc = "BACC", "ApproxIFER"
    ends = {}
    for kind in ("learned", "tuned", "published"):
        means = [gains(some, kind, *bacc).mean() for some in cells.values()]
        ends[kind] = f"{min(means):.0f} to {max(means):.0f} %"
    below = {kind: np.sum(gains(each, kind, *bacc) > 0) for kind in ends}
    assert f"below BACC's in all {below['learned']} cells, by {ends['learned']} in RMSE" in page
    assert f"below BACC's in {below['tuned']} of {len(each)} cells, by {ends['tuned']}; the" in page
    assert f"form gains {ends['published']}." in page
    learned, tuned = (gains(each, kind, "BACC tuned").mean() for kind in ("learned", "tuned"))
    assert f"the learned decoder gains {learned:.0f} %, the spline {tuned:.0f} %" in page
    assert f"up to {max(fewer):.1f} points fewer labels" in page
    results = " ".join((HERE / "docs/results.md").read_text().split())
    assert f"in all {below['learned']} cells, by {ends['learned']} of the RMSE" in results
    assert f"spline in {below['tuned']}, by {ends['tuned']}." in results
    assert f"constant lambdas, gains {ends['published']}." in results
    assert f"the spline gains {tuned:.0f} %, the learned decoder {learned:.0f} %" in results


def test_of_bscc(page):
    laws = read("rivals")["laws"]
    none = {code: f"{100 * row['gain']['mean']:.0f} %" for code, row in laws["0"].items()}
    results = " ".join((HERE / "docs/results.md").read_text().split())
    assert (
        f"falls from {none['BACC']} over BACC to {none['BSCC']} over BSCC and "
        f"{none['BSCC tuned']} over BSCC tuned" in results
    )
    gains = [
        f"{100 * laws[s][code]['gain']['mean']:.0f} %"
        for s, code in (("0", "BSCC tuned"), ("0", "BACC"), ("40", "BSCC tuned"))
    ]
    less, bacc, many = gains
    assert f"the spline gains less: {less} with no straggler, where it gains {bacc} on" in page
    assert f"BACC, and {many} with 40 of 100" in page


def test_of_error_probabilities(page):
    rows = [
        row
        for model in read("beyond").values()
        for cell in model.get("promises", {}).values()
        for row in cell["rows"]
        if row.get("wrong_of_given")
    ]
    kept = sum(row["wrong_of_given"][0] <= row["promised"] for row in rows)
    assert kept == len(rows)
    assert f"in all {kept} cases measured" in page


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


def test_of_what_it_is_not_for(page):
    found = read("unsuited")
    assert f"intervals over {found['groups']} groups" in page

    def row(part, *columns, **wanted):
        row = next(each for each in found[part] if wanted.items() <= each.items())
        ends = ([100 * row[name][end] for end in ("mean", "half_width")] for name in columns)
        return row, " | ".join(f"{mean:.1f} ± {half:.1f} %" for mean, half in ends)

    for words, count, sigma in (("5, as strong", 5, 1.0), ("20, ten times as strong", 20, 10.0)):
        some = {"noise_points": count, "sigma": sigma, "stragglers": 0}
        private, kept = row("privacy", "labels_kept", **some)
        bits = " | ".join(f"{private['bits'][who]:.1f}" for who in ("worst", "median"))
        assert f"| {bits} | {kept} |" in page.partition(f"| {words}")[2][:60]
    systems = ("NeRCC", "BACC", "without stragglers' parts", "copies")
    off = [row("gradients", "relative_error", steps=100, system=each)[1] for each in systems]
    assert f"| {' | '.join(systems)} | |---|---|---|---| | {' | '.join(off)} |" in page
    for stragglers in (0, 40):
        both = "embeddings", "recall", "labels_kept"
        kept = row(*both, system="NeRCC", stragglers=stragglers)[1]
        assert f"| {stragglers} | {kept} |" in page
