"""The results of tuning.py as a markdown section and a picture: all sentences from the numbers."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from _settings import Setting
from matplotlib.ticker import FormatStrFormatter

from nercc_jax.evaluation import system_look

FORMS = ("published", "ours")  # of the code that the grid is over
KINDS = ("lambdas", "points")  # of gradient tuning
BACKWARD = 2  # evaluations that a gradient counts as, beside the one it differentiates
SHARE = 0.1  # of the plain grid's evaluations that a gradient run may take
_WITHIN = 1.01  # times the grid's best is as good as the grid
_CUT = 3.0  # times the grid's best is where its colours end


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A setting's numbers as the criterion asks for them, by form of the grid and kind of tuning.

    `objectives` are the best and worst seed's, `shares` the evaluations by those of the plain and
    the frugal grid, `seconds` with and without compilation.
    """

    name: str
    grids: dict[str, float]
    objectives: dict[str, tuple[float, float]]
    shares: dict[str, tuple[float, float]]
    seconds: dict[str, tuple[float, float]]

    def ratio(self, kind: str, form: str) -> float:
        """The worst seed's objective by the grid's best."""
        return self.objectives[kind][1] / self.grids[form]

    def slower(self, kind: str, compiled: bool) -> float:
        """The gradient's time by the frugal grid's."""
        return self.seconds[kind][compiled] / self.seconds["grid"][compiled]


def outcome_of(part: Mapping[str, Any]) -> Outcome:
    """Of one setting's results."""
    runs, evaluations = part["gradient"], part["evaluations"]
    found = {kind: [run["objective"] for run in runs[kind]] for kind in KINDS}
    counted = {kind: max(run["counted"] for run in runs[kind]) for kind in KINDS}
    # The first grid compiled what the second one, of the same program, found compiled.
    timed = {"grid": part["grids"][FORMS[0]]} | {kind: runs[kind][0] for kind in KINDS}
    return Outcome(
        name=Setting(**part["setting"]).words,
        grids={form: part["grids"][form]["objective"] for form in FORMS},
        objectives={kind: (min(found[kind]), max(found[kind])) for kind in KINDS},
        shares={
            kind: (n / evaluations["plain grid"], n / evaluations["frugal grid"])
            for kind, n in counted.items()
        },
        seconds={k: (t["seconds"], t["seconds"] - t["compile_seconds"]) for k, t in timed.items()},
    )


HEAD = ("model (N, K)", "grid, published", "grid, ours", "gradient", "by the grids")
HEAD += ("with points", "by the grids", "evaluations, % of the plain / frugal grid")
HEAD += ("seconds: grid, gradient, with points",)


def row(outcome: Outcome) -> tuple[str, ...]:
    """A setting's line of the table under `HEAD`."""
    grids = [f"{outcome.grids[form]:.4f}" for form in FORMS]
    gradient = []
    for kind in KINDS:
        # One number where there is one seed.
        ends = dict.fromkeys(f"{value:.4f}" for value in outcome.objectives[kind])
        ratios = (f"{outcome.ratio(kind, form):.3f}" for form in FORMS)
        gradient += [" to ".join(ends), " / ".join(ratios)]
    shares = (f"{100 * a:.1f} / {100 * b:.0f}" for a, b in outcome.shares.values())
    seconds = (f"{cold:.0f} ({warm:.0f})" for cold, warm in outcome.seconds.values())
    return (outcome.name, *grids, *gradient, "; ".join(shares), ", ".join(seconds))


def section(results: Mapping[str, Any]) -> str:
    """The markdown section: how it was measured, the table, and what the numbers say."""
    outcomes = [outcome_of(part) for part in results["parts"].values()]
    table = [HEAD, ("---",) * len(HEAD), *map(row, outcomes)]
    lines = ["## Gradient tuning against a grid", "", _told_settings(results), ""]
    lines += [f"| {' | '.join(row)} |" for row in table]
    lines += ["", *(f"- {sentence}" for sentence in _told(outcomes))]
    if missing := ", ".join(Setting(**setting).words for setting in results["not_measured"]):
        lines.append(f"- Not measured: {missing}.")
    return "\n".join([*lines, ""])


def _told_settings(results: Mapping[str, Any]) -> str:
    parts = list(results["parts"].values())
    outputs, images, laws, sets, steps, cells, seeds = (
        _listed(of(part) for part in parts)
        for of in (
            lambda part: part["outputs"],
            lambda part: part["size"]["images"],
            lambda part: len(part["stragglers"]),
            lambda part: part["straggler_sets"],
            lambda part: part["steps"],
            lambda part: len(part["lambdas"]),
            lambda part: part["size"]["seeds"],
        )
    )
    return (
        f"NeRCC on {outputs}; the objective on {images} test images, for {laws} numbers of "
        f"stragglers from none to N - K, each counting alike, with at most {sets} sets each; 1 is "
        f"the untuned code. The grid has {cells} values of each lambda, and its best is picked on "
        "those test images, which flatters it; gradient tuning sees as many training images, "
        f"without labels, in at most {steps} steps. Seeds of it: {seeds}. Ratios are the worst "
        "seed's, by the best of the published form's grid / of our form's. A gradient counts as "
        f"{1 + BACKWARD} evaluations. The plain grid computes answers for every cell; the frugal "
        "grid reuses them over `lambda_dec`, and is what was timed. In brackets: seconds without "
        "compilation."
    )


def _told(outcomes: Sequence[Outcome]) -> Iterator[str]:
    count = len(outcomes)
    for form, which in zip(FORMS, ("the published form", "our form"), strict=True):
        ratios = {o.name: o.ratio("lambdas", form) for o in outcomes}
        missed = ", ".join(name for name, ratio in ratios.items() if not ratio <= _WITHIN)
        met = sum(ratio <= _WITHIN for ratio in ratios.values())
        worst = max(ratios, key=lambda name: ratios[name])
        yield (
            f"Without the points, gradient tuning is within {_WITHIN} times the best of {which}'s "
            f"grid in {met} of {count} settings (worst: {ratios[worst]:.3f}, {worst})"
            + (f"; not in {missed}." if missed else ".")
        )
    plain, frugal = zip(*(share for o in outcomes for share in o.shares.values()), strict=True)
    yield (
        f"It takes {_range([100 * s for s in plain])} % of the plain grid's model "
        f"evaluations, at most {100 * SHARE:g} % in {sum(s <= SHARE for s in plain)} of "
        f"{len(plain)} cases; of the frugal grid's, {_range([100 * s for s in frugal])} %."
    )
    gains = {o.name: 1 - o.objectives["points"][1] / o.objectives["lambdas"][1] for o in outcomes}
    yield (
        "Tuning the points as well lowers the objective further in "
        f"{sum(gain > 0 for gain in gains.values())} of {count} settings: "
        + ", ".join(f"{name} by {100 * gain:.1f} %" for name, gain in gains.items())
        + "."
    )
    cold, warm = ([o.slower("lambdas", compiled) for o in outcomes] for compiled in (False, True))
    yield (
        f"Time without the points: {_range(cold)} times the frugal grid's, {_range(warm)} times "
        "without compilation, on a machine with other load."
    )


def _range(values: Sequence[float]) -> str:
    low, high = (f"{value:.3g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _listed(values: Iterable[Any]) -> str:
    return " or ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in sorted(set(values)))


def picture(results: Mapping[str, Any], path: Path) -> None:
    """Every setting's objectives, and below the grids of our form with the gradient's way, the
    objective cut at so many times its least."""
    parts = list(results["parts"].values())
    size = (2.9 * max(3, len(parts)), 7.2)
    figure = plt.figure(figsize=size, layout="constrained")
    plan = figure.add_gridspec(2, len(parts), height_ratios=(1.25, 1))
    _draw_objectives(figure.add_subplot(plan[0, :]), parts)
    for column, part in enumerate(parts):
        panel = figure.add_subplot(plan[1, column])
        shades = _draw_landscape(panel, part)
        bar = figure.colorbar(shades, ax=panel, location="bottom", shrink=0.9)
        bar.set_label("log10 objective", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# What is compared, and as what it is drawn.
_MARKS = {
    "grid, published form": "NeRCC published",
    "grid, our form": "NeRCC",
    "gradient": "NeRCC tuned, lambdas only",
    "gradient, with points": "NeRCC tuned",
}


def _draw_objectives(panel: Any, parts: Sequence[Mapping[str, Any]]) -> None:
    for offset, (label, alike) in enumerate(_MARKS.items()):
        for place, part in enumerate(parts):
            grids = [[part["grids"][form]] for form in FORMS]
            runs = (grids + [part["gradient"][kind] for kind in KINDS])[offset]
            values, at = [run["objective"] for run in runs], place + 0.16 * (offset - 1.5)
            told = {"label": label} if place == 0 else {}
            look = system_look(alike) | {"linestyle": "none"}
            panel.plot([at] * len(values), values, ms=7, **look, **told)
    panel.axhline(1, color="#555555", lw=0.9, ls="--", label="untuned")
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(FormatStrFormatter("%.2g"))
    panel.yaxis.set_minor_formatter(FormatStrFormatter("%.2g"))
    panel.set_xticks(range(len(parts)), [Setting(**part["setting"]).words for part in parts])
    panel.set_ylabel("objective / the untuned code's")
    panel.set_title(
        "On test images, by (N, K); a point is a seed, the grids' best is picked on those images",
        fontsize=10,
    )
    panel.grid(axis="y", which="both", alpha=0.25)
    panel.legend(fontsize=9, ncols=5, loc="upper left", bbox_to_anchor=(0, -0.07), frameon=False)


def _draw_landscape(panel: Any, part: Mapping[str, Any]) -> Any:
    heights = np.asarray(part["grids"]["ours"]["heights"])
    lambdas = np.asarray(part["lambdas"])
    # Zero gets the place of one more step down.
    lambdas[0] = lambdas[1] ** 2 / lambdas[2]
    shown = np.log10(np.minimum(heights, _CUT * np.nanmin(heights)))
    shades = panel.pcolormesh(lambdas, lambdas, shown.T, cmap="viridis_r", shading="nearest")
    run = part["gradient"]["lambdas"][0]
    way = np.clip(np.asarray(run["path"]).T, lambdas[0], 1)
    panel.plot(*way, color="black", lw=1.2)
    end = np.clip([run["lambda_enc"], run["lambda_dec"]], lambdas[0], 1)
    panel.plot(*end, marker="*", color="#d55e00", ms=11)
    panel.set(xscale="log", yscale="log", xlabel="lambda_enc", ylabel="lambda_dec")
    name = Setting(**part["setting"]).words
    panel.set_title(f"{name}: descent, ★ its end", fontsize=8)
    panel.tick_params(labelsize=7)
    return shades
