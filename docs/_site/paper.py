"""The results of `bench/run.py paper`, by setting, and as cells of (N, K), outputs and S."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nercc_jax.evaluation import Estimate, Evaluation
from nercc_jax.evaluation.pictures import straggler_figure
from nercc_models import list_parity_models, parity_card

from .looks import system_look
from .results import load, percent, plus_minus, strong

PAPER, MODERN = load("paper"), load("rivals")
PARTS: Mapping[str, Any] = PAPER["parts"]
# Average gains over BACC in the follow-up (arXiv 2406.00300): RMSE in %, RelAcc in points.
PUBLISHED = {"lenet5": ("LeNet5", 15, 2), "repvgg": ("RepVGG", 17, 5), "vit": ("ViT", 9, 4)}
OUTPUTS, RIVALS = ("probabilities", "logits"), ("BACC", "ApproxIFER")
FOR_NOISE = "NeRCC, lambda_dec for this noise"
KINDS = ("learned", "tuned", "untuned", "published")


def where(part: Mapping[str, Any]) -> str:
    """Return the model and its (N, K)."""
    setting = part["setting"]
    return f"{setting['model']} ({setting['num_workers']}, {setting['num_data']})"


def by_pair(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Evaluation]:
    """Return rows by code and number of stragglers."""
    # Rows had a third error once.
    made: list[Any] = [{k: Estimate(**v) if isinstance(v, dict) else v for k, v in row.items()
                        if k != "mean_l2"} for row in rows]  # fmt: skip
    return {(row["code"], row["stragglers"]): Evaluation(**row) for row in made}


def laws(rows: Mapping[tuple[str, str], Any]) -> list[str]:
    """Return the numbers of stragglers."""
    return list(dict.fromkeys(s for _, s in rows))


def each_output() -> Iterator[tuple[Mapping[str, Any], str, Mapping[str, Any]]]:
    """Yield part, kind of outputs, and what was measured of it."""
    for part in PARTS.values():
        for outputs in OUTPUTS:
            yield part, outputs, part[outputs]


def all_cells() -> Iterator[dict[str, Any]]:
    """Yield the mean squared errors (RelAcc) of every cell."""
    for part, outputs, found in each_output():
        rows = by_pair(found["rows"])
        for s in laws(rows):
            rival = min((rows[name, s] for name in RIVALS), key=lambda row: row.mse.mean)
            cell = {"family": part["setting"]["model"].split("-")[0], "where": where(part)}
            cell |= {"outputs": outputs, "S": int(s), "rival": rival.mse.mean}
            cell |= {"rival rel_acc": rival.rel_acc.mean}
            ours, copies = (rows[name, s].rel_acc for name in ("NeRCC learned", "replication"))
            both = np.hypot(copies.half_width, ours.half_width)
            cell["copies win"] = copies.mean - ours.mean, both
            for name in ("BACC tuned", "BACC learned", "BSCC", "BSCC tuned", "SBACC"):
                cell[name] = rows[name, s].mse.mean
            for kind in KINDS:
                row = rows[f"NeRCC {kind}", s]
                cell |= {kind: row.mse.mean, f"{kind} rel_acc": row.rel_acc.mean}
            yield cell


CELLS = list(all_cells())
FIRST = PARTS["lenet5-mnist:100:20"]


def gain(cells: Sequence[Mapping[str, Any]], kind: str, rival: str = "rival") -> float:
    """Return the mean share of a rival's RMSE that is saved, in per cent.

    Where the rival is exact, as SBACC is if all answer and N / K is odd, there is no share.
    """
    some = [cell for cell in cells if cell[rival] > 1e-9]
    return float(np.mean([100 * (1 - np.sqrt(cell[kind] / cell[rival])) for cell in some]))


def gains() -> Iterator[dict[str, str]]:
    """Yield the mean gains over the better BACC of each model and kind of outputs."""
    for family, (name, rmse, labels) in PUBLISHED.items():
        for outputs in OUTPUTS:
            some = [c for c in CELLS if (c["family"], c["outputs"]) == (family, outputs)]
            ours = [mean_gain(family, outputs, kind) for kind in KINDS]
            points = [
                f"{np.mean([100 * (c[f'{k} rel_acc'] - c['rival rel_acc']) for c in some]):+.1f}"
                for k in KINDS[:3]
            ]
            yield {
                "": name, "outputs": outputs, "RMSE: learned, %": strong(ours[0]), "tuned": ours[1],
                "untuned": ours[2], "published form": ours[3], "the follow-up's": str(rmse),
                "RelAcc: learned": strong(points[0]), "RelAcc: tuned": points[1],
                "RelAcc: untuned": points[2], "RelAcc: the follow-up's": f"+{labels}",
            }  # fmt: skip


def mean_gain(family: str, outputs: str, kind: str) -> str:
    """Return the mean over cells, in per cent; settings are taken to err together."""
    parts = [part for part in PARTS.values() if part["setting"]["model"].startswith(family)]
    found = [part[outputs]["gains"][f"NeRCC {kind}"] for part in parts]
    weights = [len(each) - 1 for each in found]  # one is the mean
    mean, half = (
        100 * np.average([each["mean"][end] for each in found], weights=weights)
        for end in ("mean", "half_width")
    )
    return plus_minus(mean, half, ".0f")


def above_zero(kind: str, over: str = "gains") -> int:
    """Return in how many cells the interval of the gain, over the better BACC, is above zero."""
    return sum(
        each["mean"] > each["half_width"]
        for _, _, found in each_output()
        for law, each in found[over][f"NeRCC {kind}"].items()
        if law != "mean"
    )


def seeds() -> Iterator[dict[str, str]]:
    """Yield the mean gains with each tuning seed, in per cent."""
    for part, outputs, found in each_output():
        if "seeds" in found:
            yield {"": where(part), "outputs": outputs} | {
                kind: ", ".join(f"{100 * each['mean']:.1f}" for each in of)
                for kind, of in found["seeds"].items()
            }


def gains_of(found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the gains over the better BACC at every number of stragglers, in per cent."""
    for s in next(iter(found["gains"].values())):
        yield {"S": s} | {name: saved(of[s]) for name, of in found["gains"].items()}


def saved(gain: Mapping[str, float]) -> str:
    """Return a gain in per cent, with its interval."""
    return plus_minus(100 * gain["mean"], 100 * gain["half_width"], ".1f")


def over_tuned() -> Iterator[dict[str, str]]:
    """Yield the mean gains over BACC with tuned points, and RelAcc at the largest S."""
    for part, outputs, found in each_output():
        rows, row = by_pair(found["rows"]), {"": where(part), "outputs": outputs}
        for kind in KINDS[:3]:
            row[f"RMSE: {kind}, %"] = saved(found["gains over BACC tuned"][f"NeRCC {kind}"]["mean"])
        for name in ("NeRCC learned", "NeRCC tuned", "BACC tuned"):
            kept = rows[name, laws(rows)[-1]].rel_acc
            row[f"RelAcc: {name}, %"] = percent(kept.mean, kept.half_width)
        yield row


def against_copies() -> Iterator[dict[str, str]]:
    """Yield where copies keep more labels than a learned decoder, and where fewer.

    Differences that the intervals of both allow to be none are left out.
    """
    for part, outputs, _ in each_output():
        some = [c for c in CELLS if (c["where"], c["outputs"]) == (where(part), outputs)]
        row = {"": where(part), "outputs": outputs}
        for name, sign in (("replication wins", 1), ("NeRCC wins", -1)):
            each = ((c["S"], sign * c["copies win"][0], c["copies win"][1]) for c in some)
            won = {s: 100 * gap for s, gap, half in each if gap > half}
            row[f"{name} at S"] = ", ".join(map(str, won))
            row[f"{name}, by at most"] = f"{max(won.values()):.1f} points" if won else ""
        yield row


def noise() -> Iterator[dict[str, str]]:
    """Yield what lambda_dec > 0 saves of the RMSE, in per cent, when answers are noisy."""
    for part, outputs, found in each_output():
        for level, entry in found["noise"].items():
            yield {
                "": where(part), "outputs": outputs,
                "noise": level if level == "bfloat16" else f"{level} rms",
                "as tuned": saved(entry["gains"]["NeRCC tuned"]["mean"]),
                "for this noise": saved(entry["gains"][FOR_NOISE]["mean"]),
                "its factor": f"{entry['lambda_factor']:g}",
                "its gain over BACC": saved(entry["gains over BACC"]["mean"]),
            }  # fmt: skip


def better_with_noise(sign: int, *levels: str) -> int:
    """Return in how many cases the interval of what lambda_dec > 0 saves has this sign."""
    pairs = (pair for *_, found in each_output() for pair in found["noise"].items())
    gains = [of["gains"][FOR_NOISE]["mean"] for level, of in pairs if level in (levels or [level])]
    return sum(sign * each["mean"] > each["half_width"] for each in gains)


def curves() -> Any:
    """Return a picture of error and RelAcc against the number of stragglers, of five codes."""
    shown = ("NeRCC learned", "NeRCC tuned", "NeRCC published", "BACC", "replication")
    rows = [row for row in by_pair(FIRST["logits"]["rows"]).values() if row.code in shown]
    panels = {"mse": ("MSE of logits", True), "rel_acc": ("labels kept (RelAcc)", False)}
    return straggler_figure(rows, panels, where(FIRST), system_look)


def modern(metric: str, unit: float = 100) -> Iterator[dict[str, str]]:
    """Yield a metric of modern rivals, with its interval, by code and number of stragglers."""
    for name in MODERN["laws"]["0"]:
        row = {"code": name}
        for s, rows in MODERN["laws"].items():
            found = rows[name][metric]
            if found["mean"] is not None:  # no gain over what is exact
                mean, low, high = (unit * found[end] for end in ("mean", "low", "high"))
                row[f"S = {s}"] = f"{mean:.3g} [{low:.3g},\u00a0{high:.3g}]"
        yield row


def parity() -> Iterator[dict[str, Any]]:
    """Yield ParM beside NeRCC, BACC and replication, where it has a k."""
    for part, outputs, found in each_output():
        rows, setting = by_pair(found["rows"]), part["setting"]
        k = setting["num_data"] // (setting["num_workers"] - setting["num_data"])
        for s in laws(rows):
            if ("ParM", s) in rows:
                kept = {
                    n: rows[n, s].rel_acc for n in ("ParM", "NeRCC tuned", "BACC", "replication")
                }
                yield (
                    {"": where(part), "k": k, "outputs": outputs, "S": s}
                    | {
                        f"RelAcc: {n}": percent(each.mean, each.half_width)
                        for n, each in kept.items()
                    }
                    | {f"MSE: {n}": f"{rows[n, s].mse.mean:.3g}" for n in ("ParM", "NeRCC tuned")}
                )


def parity_models() -> Iterator[dict[str, Any]]:
    """Yield how well each parity model does by itself."""
    for base, k, outputs in list_parity_models():
        card = parity_card(base, k, outputs)
        yield {
            "model": base,
            "k": k,
            "outputs": outputs,
            "labels of the model, %": f"{100 * card['score']['agreement']:.1f}",
            "images": card["score"]["total"],
            "epochs": len(card["history"]),
            "training loss": f"{card['history'][-1]['loss']:.3g}",
        }


def tuning() -> Iterator[dict[str, str]]:
    """Yield the objective after gradient tuning and after grids, and what each took."""
    for part in load("tuning")["parts"].values():
        grids, runs, spent = part["grids"], part["gradient"], part["evaluations"]
        worst = {kind: max(run["objective"] for run in runs[kind]) for kind in runs}
        counted = [max(run["counted"] for run in runs[kind]) for kind in ("lambdas", "points")]
        timed = (grids["published"], runs["lambdas"][0], runs["points"][0])
        yield {
            "": where(part),
            **{f"grid, {f} form": f"{grids[f]['objective']:.4f}" for f in ("published", "ours")},
            "gradient": f"{worst['lambdas']:.4f}",
            "with points": f"{worst['points']:.4f}",
            "evaluations, % of plain grid": " / ".join(
                f"{100 * n / spent['plain grid']:.1f}" for n in counted
            ),
            "of frugal grid": " / ".join(f"{100 * n / spent['frugal grid']:.0f}" for n in counted),
            "seconds: grid, gradient, with points": ", ".join(
                f"{each['seconds']:.0f}" for each in timed
            ),
        }


def tuned_digits() -> Iterator[dict[str, str]]:
    """Yield held-out errors of `tune` on digits, seed by seed, and what it took."""
    found = load("tuning")["digits"]
    runs = [("untuned", {"rmse": found["untuned"]})]
    for kind, words in (("lambdas", "lambdas only"), ("points", "with points (the default)")):
        runs += [(f"{words}, seed {seed}", run) for seed, run in enumerate(found[kind])]
    for name, run in runs:
        errors = zip(found["stragglers"], run["rmse"], strict=True)
        seconds = f"{run['cpu_seconds']:.0f}" if "cpu_seconds" in run else ""
        yield {"": name, **{f"S = {s}": f"{e:.4f}" for s, e in errors}, "CPU seconds": seconds}


def errors(found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the mean squared error of each code at every number of stragglers."""
    rows = by_pair(found["rows"])
    for s in laws(rows):
        yield {"S": s} | {
            c: plus_minus(rows[c, s].mse.mean, rows[c, s].mse.half_width, ".3g")
            for c in dict.fromkeys(code for code, _ in rows)
            if c not in ("LCC", "replication")
        }


def labels(found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the labels that each code keeps at every number of stragglers, in per cent."""
    rows = by_pair(found["rows"])
    for s in laws(rows):
        yield {"S": s} | {
            c: percent(rows[c, s].rel_acc.mean, rows[c, s].rel_acc.half_width)
            for c in dict.fromkeys(code for code, _ in rows)
            if c != "LCC"
        }


def counted() -> Iterator[str]:
    """Yield in how many cells NeRCC is below BACC, and where it is not."""
    below = {kind: sum(c[kind] < c["rival"] for c in CELLS) for kind in KINDS}
    both, most = (sum(c[k] < c["BACC tuned"] for c in CELLS) for k in ("tuned", "learned"))
    exact = sum(c["BACC tuned"] <= 1e-9 for c in CELLS)
    yield (
        f"NeRCC's MSE is below BACC's in **{below['learned']} of {len(CELLS)} cells** with a "
        f"learned decoder, in {below['tuned']} with a tuned spline, in {below['untuned']} untuned, "
        f"and in {below['published']} in the published form. It is below that of BACC with tuned "
        f"points (not published, and exact in {exact} of the cells without a straggler) in {most} "
        f"cells with a learned decoder and in {both} with a tuned spline."
    )
    over = ("gains", "gains over BACC tuned")
    learned, tuned = ([above_zero(kind, of) for of in over] for kind in ("learned", "tuned"))
    yield (
        "The interval of the gain over the better BACC lies above zero in "
        f"{learned[0]} cells learned and {tuned[0]} tuned; over BACC with tuned points in "
        f"{learned[1]} and {tuned[1]}."
    )
    for cell in CELLS:
        if cell["tuned"] >= cell["rival"]:
            yield (
                f"Tuned NeRCC's exception is {cell['where']}, {cell['outputs']}, S = {cell['S']}: "
                f"its MSE is {cell['tuned']:.3g}, BACC's {cell['rival']:.3g}, untuned NeRCC's "
                f"{cell['untuned']:.3g}. One code is tuned for all S."
            )


def earliest() -> Mapping[str, Any]:
    """Return where and when the oldest part was measured."""
    return min((part["environment"] for part in PARTS.values()), key=lambda each: each["date"])


def setting() -> str:
    """Return the numbers of images and straggler sets."""
    counts = {row["num_data_points"] for part in PARTS.values() for row in part["logits"]["rows"]}
    return (
        f"{min(counts):,} to {max(counts):,} test images, {FIRST['size']['sets']} straggler sets "
        "for each cell. [Every setting, three tuning seeds, and what was measured "
        "later](../bench/results/results.md)."
    )


def newer() -> str:
    """Return which parts are newer than others."""
    days = {where(part): part["environment"]["date"][:10] for part in PARTS.values()}
    later = [name for name, day in days.items() if day > earliest()["date"][:10]]
    return f"Tuned and measured later than the others, on {max(days.values())}: {', '.join(later)}."


def learned() -> Iterator[str]:
    """Yield what a learned decoder saves, and on which images it was tried further."""
    yield (
        f"It lowers tuned NeRCC's RMSE by {gain(CELLS, 'learned', 'tuned'):.0f} %, on average over "
        f"{len(CELLS)} cells. The encoder matters, too: BACC's with a learned decoder gains "
        f"{gain(CELLS, 'BACC learned'):.0f} % over BACC, NeRCC's {gain(CELLS, 'learned'):.0f} %."
    )
    yield (
        "On images unlike those it was learned from (RMSE, LeNet5's probabilities at (100, 20), "
        f"{MODERN['unlike']['images']:,} of MNIST, {MODERN['size']['seeds']} seeds):"
    )


def unlike() -> Iterator[dict[str, str]]:
    """Yield errors on images unlike those that a decoder was learned from."""
    for name, of in MODERN["unlike"]["rmse"].items():
        for s, codes in of.items():
            yield {"images": name, "S": s} | {code: f"{rmse:.3f}" for code, rmse in codes.items()}


def over_each() -> str:
    """Return NeRCC's mean gain over each rival, as a list."""
    lines = []
    for rival in ("rival", "BACC tuned", "SBACC", "BSCC", "BSCC tuned"):
        name = rival.replace("rival", "the better BACC")
        below = [sum(cell[kind] < cell[rival] for cell in CELLS) for kind in ("tuned", "untuned")]
        lines.append(
            f"- Over {name}, NeRCC's mean gain in RMSE is {gain(CELLS, 'tuned', rival):.0f} % "
            f"tuned, {gain(CELLS, 'untuned', rival):.0f} % untuned; its error is below in "
            f"{below[0]} and {below[1]} of {len(CELLS)} cells."
        )
    return "\n".join(lines)


def modern_setting() -> str:
    """Return how modern rivals were compared."""
    size = MODERN["size"]
    return (
        f"RMSE of LeNet5's probabilities at (100, 20), {20 * size['groups']:,} test images, "
        f"{size['sets']} straggler sets, {size['seeds']} tuning seeds; 95 % intervals by bootstrap "
        "over all three."
    )


def with_noise() -> str:
    """Return how often lambda_dec > 0 helps where answers are noisy."""
    number, better = len(list(noise())), better_with_noise
    return (
        "Chosen for the noise, lambda_dec > 0 saves something beyond the interval in "
        f"{better(1)} of {number} cases, and costs something in {better(-1)}. With noise of 0.3 "
        f"rms it saves in {better(1, '0.3')} of {number // 4}."
    )
