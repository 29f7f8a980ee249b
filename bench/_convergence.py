"""How the squared error falls with the number of workers N, beside the proven bounds.

    python bench/_convergence.py [--quick] [--data-dir FOLDER] [--output FOLDER]

`bench/paper.py` calls `measure`, `picture` and `section`; the command is for trying them alone.

K data points a group, three functions: f(t) = t sin t of one number, in float64 because float32's
rounding would soon hide the error; the logits of LeNet5, in float32; the same for dithered images.
Three codes: NeRCC with lambda_enc = 0, BACC on its authors' points and on ApproxIFER's. Two laws of
stragglers: a fixed number, and a fixed share of N; each with many random sets, the same for all
codes. Answers with and without noise.

- The theory's lambda_dec depends on N and S, so one constant would not show the rate: it is the
  best of a grid, chosen for each N, law and noise on groups and straggler sets of its own.
- Decoding is linear, so noise of standard deviation sigma, independent from answer to answer, adds
  sigma^2 sum_n D_kn^2 to the expected squared error of data point k. That expectation is taken
  exactly, and no noise is drawn.
- How far a data point lies from its nearest workers, by their distance, depends on N mod 2K in both
  layouts (at some N a worker holds the data point itself), and the error with it. So all N are
  alike mod 2K.
- A slope is that of the least-squares line through log error against log N. A bound's slope is the
  same fit to the bound at the same N, with the S that straggled.
- Why dithered images: LeNet5 is piecewise linear along the coded path, and where kinks fall by
  chance, one lies within a gap of a data point with a chance like 1/N and costs 1/N^2. But in an
  image's constant areas max pooling ties, and each data point gets a kink of its own. A little
  noise on the images breaks the ties, and shows what they cost.
"""

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullFormatter, NullLocator
except ModuleNotFoundError as error:
    sys.exit(
        f"bench/_convergence.py needs {error.name}, which is missing: pip install 'nercc-jax[demo]'"
    )

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _report import write_json
from jaxtyping import Array, Bool, Float

from nercc_jax import AbstractCode, Berrut, NeRCC
from nercc_jax.codes import encode_groups
from nercc_jax.evaluation import Estimate, system_look
from nercc_models import Data, load_data, load_model

_SEED = 0
_NUM_DATA = 8
_FIXED = 3  # stragglers
_SHARE = 0.15  # of the workers
_NOISE = 0.1  # standard deviation of the answers' noise, by the root mean square of the outputs
_INTERVAL = (-5.0, 5.0)  # of the data points of t sin t
_DITHER = 0.02  # standard deviation of the noise on images, by the range of grey
_LAMBDAS = (0.0, *(10.0 ** (half / 2) for half in range(-26, -1)))
# A mean square error below (so many roundings of the outputs' root mean square)^2 is not fitted.
_ROUNDINGS = 100
_BATCH = 512
_FLAT = 0.1  # a bound whose slope is above minus this promises no convergence


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured. Groups and sets are those of the report; choosing lambda_dec takes as
    many again."""

    num_workers: tuple[int, ...]
    sets: int
    scalar_groups: int
    image_groups: int


def _alike(first: int, last: int, count: int) -> tuple[int, ...]:
    """Numbers of workers from `first` to about `last`, evenly on a log scale, alike mod 2K."""
    period = 2 * _NUM_DATA
    steps = np.round((np.geomspace(first, last, count) - first) / period).astype(int)
    return tuple(int(n) for n in first + period * np.unique(steps))


FULL = Plan(_alike(20, 2000, 9), sets=48, scalar_groups=64, image_groups=8)
QUICK = Plan(_alike(20, 200, 3), sets=8, scalar_groups=16, image_groups=2)


# --- what the theory promises


_ANY = "arXiv 2406.00300"
_BACC_ANY = "Jahani-Nezhad and Maddah-Ali 2022"
_INDEPENDENT = "arXiv 2502.00645"
_NERCC, _BACC, _APPROXIFER = "NeRCC", "BACC", "BACC, ApproxIFER's points"

Numbers = Float[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Law:
    """So many random workers straggle of N, every set alike likely."""

    name: str
    number: Callable[[int], int]


_FIXED_LAW = Law(f"S = {_FIXED}", lambda num_workers: _FIXED)
_SHARE_LAW = Law(f"S = {100 * _SHARE:g} % of N", lambda num_workers: round(_SHARE * num_workers))
LAWS = (_FIXED_LAW, _SHARE_LAW)


@dataclasses.dataclass(frozen=True)
class Bound:
    """An upper bound on the expected squared error, up to a constant: `growth` of (N, S)."""

    formula: str
    source: str
    codes: tuple[str, ...]
    noisy: bool
    laws: tuple[Law, ...]
    growth: Callable[[Numbers, Numbers], Numbers]


BOUNDS = (
    Bound("S^3 N^-3", _ANY, (_NERCC,), False, LAWS, lambda n, s: s**3 / n**3),
    Bound("S^(8/5) N^(-3/5)", _ANY, (_NERCC,), True, LAWS, lambda n, s: s**1.6 / n**0.6),
    Bound("S^4 N^-2", _BACC_ANY, (_BACC, _APPROXIFER), False, LAWS, lambda n, s: s**4 / n**2),
    # The bounds above hold for the worst set of S; these for workers that straggle independently,
    # with a probability that is our share. The base of the logarithm is a constant factor. The
    # paper's abstract names the codes in the other order; each bound is the one above with the
    # longest run of stragglers, which is like log N, in the place of S.
    Bound(
        "log(N)^3 N^-3",
        _INDEPENDENT,
        (_NERCC,),
        False,
        (_SHARE_LAW,),
        lambda n, s: np.log(n) ** 3 / n**3,
    ),
    Bound(
        "log(N)^4 N^-2",
        _INDEPENDENT,
        (_BACC, _APPROXIFER),
        False,
        (_SHARE_LAW,),
        lambda n, s: np.log(n) ** 4 / n**2,
    ),
)


# --- what is computed


@dataclasses.dataclass(frozen=True)
class Subject:
    """A function with its data: `x` are (2, groups, K, ...), to choose lambda_dec on and to report.

    `model` maps a batch to (batch, outputs). `wide` asks for float64. `smooth` tells whether it has
    the bounded second derivative that the bounds assume. `facts` describe it in words.
    """

    name: str
    model: Callable[[Array], Array]
    x: np.ndarray
    wide: bool
    smooth: bool
    facts: dict[str, str]

    @property
    def dtype(self) -> str:
        return "float64" if self.wide else "float32"


_PLAIN, _DITHERED = "LeNet5", "LeNet5 (dithered)"


def _scalar(groups: int) -> Subject:
    shape = (2, groups, _NUM_DATA, 1)
    x = np.random.default_rng(_SEED).uniform(*_INTERVAL, size=shape)
    facts = {"x": f"uniform on [{_INTERVAL[0]:g}, {_INTERVAL[1]:g}]"}
    return Subject("t sin t", lambda t: t * jnp.sin(t), x, wide=True, smooth=True, facts=facts)


def _lenet5(groups: int, name: str, images: Data) -> tuple[Subject, Subject]:
    """The shipped model on images as they are, and on dithered ones."""
    model = load_model(name)
    chosen = images.shuffled(_SEED).take(slice(2 * groups * _NUM_DATA))
    x = np.asarray(model.preprocess(chosen.images))
    x = x.reshape(2, groups, _NUM_DATA, *x.shape[1:])
    noise = _DITHER * np.random.default_rng(_SEED).standard_normal(x.shape, dtype=x.dtype)
    facts = {"model": name, "data": f"{chosen.name} (test)", "outputs": "logits"}
    dithered = facts | {"dither": f"{100 * _DITHER:g} % of the range of grey"}
    # ReLU and max pooling: piecewise linear.
    return (
        Subject(_PLAIN, model, x, wide=False, smooth=False, facts=facts),
        Subject(_DITHERED, model, x + noise, wide=False, smooth=False, facts=dithered),
    )


def _images(data_dir: Path | None) -> tuple[str, Data, str | None]:
    """The model's name, its data set, and why it is not MNIST where it is not."""
    if data_dir is None:
        instead = "no data folder was given"
    else:
        try:
            return "lenet5-mnist", load_data("mnist", "test", data_dir=data_dir), None
        except (FileNotFoundError, ImportError) as error:
            instead = str(error).split("\n", 1)[0]
    return "lenet5-digits", load_data("digits", "test"), instead


def _run(model: Callable[[Array], Array], x: np.ndarray) -> np.ndarray:
    """The model over a batch of any size, in batches of one shape: one compilation for all N."""
    padded = np.concatenate([x, np.broadcast_to(x[-1:], (-len(x) % _BATCH, *x.shape[1:]))])
    parts = [_call(model, padded[i : i + _BATCH]) for i in range(0, len(padded), _BATCH)]
    return np.concatenate(parts)[: len(x)]


@eqx.filter_jit
def _call(model, x):
    return model(x)


def _outputs(subject: Subject) -> Float[np.ndarray, "2 groups num_data outputs"]:
    """The function's own outputs on the data points."""
    x = subject.x
    return _run(subject.model, x.reshape(-1, *x.shape[3:])).reshape(*x.shape[:3], -1)


def _answers(
    subject: Subject, code: AbstractCode
) -> Float[np.ndarray, "2 groups num_workers outputs"]:
    """All workers' answers: they do not depend on who straggles."""
    x = subject.x
    coded = np.asarray(_encode(code, jnp.asarray(x.reshape(-1, *x.shape[2:]))))
    y = _run(subject.model, coded.reshape(-1, *coded.shape[2:]))
    return y.reshape(*x.shape[:2], code.num_workers, -1)


_encode = eqx.filter_jit(encode_groups)


@dataclasses.dataclass(frozen=True)
class Score:
    """For each straggler set: the noiseless mean squared error, and the variance that noise of unit
    variance adds to it."""

    squared: Numbers
    gain: Numbers

    def error(self, noise_sd: float) -> Numbers:
        """The expected squared error with noise of this standard deviation."""
        return self.squared + noise_sd**2 * self.gain


def score(
    code: AbstractCode,
    answers: Float[np.ndarray, "groups num_workers outputs"],
    exact: Float[np.ndarray, "groups num_data outputs"],
    masks: Bool[np.ndarray, "sets num_workers"],
) -> Score:
    """Decodes all groups with every straggler set."""
    return Score(*(np.asarray(part, np.float64) for part in _score(code, answers, exact, masks)))


@eqx.filter_jit
def _score(code, answers, exact, masks):
    decoders = jax.vmap(code.decoder_matrix)(masks)
    decoded = jnp.einsum("skn,gnm->sgkm", decoders, answers, precision=jax.lax.Precision.HIGHEST)
    squared = jnp.mean((decoded - exact) ** 2, axis=(1, 2, 3))
    return squared, jnp.mean(jnp.sum(decoders**2, axis=2), axis=1)


def _masks(law: Law, num_workers: int, sets: int) -> Bool[np.ndarray, "2 sets num_workers"]:
    """Straggler sets to choose lambda_dec on, and those to report.

    Drawn with NumPy, so that float32 and float64 see the same.
    """
    rng = np.random.default_rng((_SEED, LAWS.index(law), num_workers))
    workers = np.broadcast_to(np.arange(num_workers), (2, sets, num_workers))
    return rng.permuted(workers, axis=2) >= law.number(num_workers)


def _nercc(num_workers: int, lambda_dec: float) -> NeRCC:
    return NeRCC(_NUM_DATA, num_workers, lambda_enc=0.0, lambda_dec=lambda_dec)


@dataclasses.dataclass(frozen=True)
class Case:
    """What makes one curve."""

    function: str
    law: str
    noise: float
    code: str


def _measure_at(
    subject: Subject,
    exact: np.ndarray,
    noise_sds: Mapping[float, float],
    num_workers: int,
    sets: int,
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """One point of every curve of a function."""
    # The encoder is the same for every lambda_dec.
    nercc_answers = _answers(subject, _nercc(num_workers, 0.0))
    rivals: dict[str, AbstractCode] = {
        _BACC: Berrut(_NUM_DATA, num_workers),
        _APPROXIFER: Berrut(_NUM_DATA, num_workers, points="approxifer"),
    }
    rival_answers = {name: _answers(subject, code)[1] for name, code in rivals.items()}
    for law in LAWS:
        choosing, reporting = _masks(law, num_workers, sets)
        stragglers = law.number(num_workers)
        tried = {
            lambda_: score(_nercc(num_workers, lambda_), nercc_answers[0], exact[0], choosing)
            for lambda_ in _LAMBDAS
        }
        scores = {
            name: score(code, rival_answers[name], exact[1], reporting)
            for name, code in rivals.items()
        }
        for noise, noise_sd in noise_sds.items():
            best = min(tried, key=lambda lambda_: np.mean(tried[lambda_].error(noise_sd)))
            code = _nercc(num_workers, best)
            scores[_NERCC] = score(code, nercc_answers[1], exact[1], reporting)
            for name in (_NERCC, *rivals):
                estimate = Estimate.over(scores[name].error(noise_sd).tolist())
                point = {"num_workers": num_workers, "stragglers": stragglers}
                point |= dataclasses.asdict(estimate)
                point |= {"lambda_dec": best} if name == _NERCC else {}
                yield Case(subject.name, law.name, noise, name), point


# --- slopes


def fit_slope(points: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The least-squares line through log mean against log N; None for fewer than three points.

    Its standard error is the larger of two: what the scatter about the line tells, curvature
    included, and what the spread over straggler sets does (a chance fit of few points knows little
    of it).
    """
    if len(points) < 3:
        return None
    x = np.log([point["num_workers"] for point in points])
    mean = np.array([point["mean"] for point in points])
    weights = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
    slope = float(weights @ np.log(mean))
    residual = np.log(mean) - np.mean(np.log(mean)) - slope * (x - x.mean())
    scatter = np.sqrt(np.sum(residual**2) / (len(x) - 2) * np.sum(weights**2))
    # A 95 % half width is about two standard errors.
    relative = np.array([point["half_width"] for point in points]) / 2 / mean
    spread = np.sqrt(np.sum((weights * relative) ** 2))
    return {
        "slope": slope,
        "standard_error": float(max(scatter, spread)),
        "first": points[0]["num_workers"],
        "last": points[-1]["num_workers"],
        "num_points": len(points),
    }


def bound_slope(bound: Bound, points: Sequence[Mapping[str, Any]]) -> float:
    """The slope of the bound at these N and S, fitted as the measured one is."""
    x = np.log([point["num_workers"] for point in points])
    n, s = (
        np.array([point[name] for point in points], float) for name in ("num_workers", "stragglers")
    )
    return float(np.polyfit(x, np.log(bound.growth(n, s)), 1)[0])


def _curve(case: Case, points: list[dict[str, Any]], floor: float, smooth: bool) -> dict[str, Any]:
    """Points, slopes and verdicts of one curve.

    A rate is a promise for large N, and at few workers the code does not yet resolve the function
    at all: bounds are judged by the larger half of N.
    """
    above = [point for point in points if point["mean"] > floor]
    large = above[-max(3, (len(above) + 1) // 2) :]
    fits = {"all": fit_slope(above), "large": fit_slope(large)}
    applicable = [
        bound
        for bound in BOUNDS
        if case.code in bound.codes
        and bound.noisy == (case.noise > 0)
        and case.law in [law.name for law in bound.laws]
        and fits["large"] is not None
    ]
    bounds = [
        {
            "formula": bound.formula,
            "source": bound.source,
            "slope": bound_slope(bound, large),
            "confirmed": _confirmed(fits["large"], bound_slope(bound, large)),
        }
        for bound in applicable
    ]
    facts = {"smooth": smooth, "floor": floor}
    return {**dataclasses.asdict(case), **facts, "points": points, **fits, "bounds": bounds}


def _confirmed(fit: Mapping[str, Any] | None, promised: float) -> bool:
    """Whether the error falls as fast as promised, within two standard errors."""
    return fit is not None and fit["slope"] <= promised + 2 * fit["standard_error"]


# --- the three parts that bench/paper.py calls


def measure(
    quick: bool, data_dir: Path | None, progress: Callable[[str], object]
) -> dict[str, Any]:
    """All points, slopes and verdicts, ready for JSON.

    `data_dir` holds MNIST as `load_data` wants it; without it LeNet5 runs on scikit-learn's digits,
    and the results say why. `progress` is told a line a step.
    """
    plan = QUICK if quick else FULL
    name, images, instead = _images(data_dir)
    subjects = (_scalar(plan.scalar_groups), *_lenet5(plan.image_groups, name, images))
    functions, curves = {}, []
    for subject in subjects:
        start = time.perf_counter()
        with jax.enable_x64(subject.wide):
            found = _curves_of(subject, plan, progress)
        curves += found["curves"]
        functions[subject.name] = {
            "dtype": subject.dtype,
            "smooth": subject.smooth,
            "num_groups": subject.x.shape[1],
            "output_rms": found["output_rms"],
            "facts": subject.facts,
            "seconds": time.perf_counter() - start,
        }
    settings = {
        "quick": quick,
        "instead_of_mnist_because": instead,
        "seed": _SEED,
        "num_data": _NUM_DATA,
        "num_workers": plan.num_workers,
        "straggler_sets": plan.sets,
        "laws": {law.name: [law.number(n) for n in plan.num_workers] for law in LAWS},
        "noise_by_output_rms": [0.0, _NOISE],
        "lambda_enc": 0.0,
        "lambda_dec_grid": _LAMBDAS,
        "floor_roundings": _ROUNDINGS,
    }
    return {"settings": settings, "functions": functions, "curves": curves}


def _curves_of(subject: Subject, plan: Plan, progress: Callable[[str], object]) -> dict[str, Any]:
    exact = _outputs(subject)
    output_rms = float(np.sqrt(np.mean(exact[1] ** 2)))
    noise_sds = {noise: noise * output_rms for noise in (0.0, _NOISE)}
    floor = float((_ROUNDINGS * np.finfo(exact.dtype).eps * output_rms) ** 2)
    points: dict[Case, list[dict[str, Any]]] = {}
    for num_workers in plan.num_workers:
        progress(f"convergence: {subject.name}, N = {num_workers}")
        for case, point in _measure_at(subject, exact, noise_sds, num_workers, plan.sets):
            points.setdefault(case, []).append(point)
    curves = [_curve(case, found, floor, subject.smooth) for case, found in points.items()]
    return {"output_rms": output_rms, "curves": curves}


_LOOKS = {
    code: system_look(alike)
    for code, alike in ((_NERCC, "NeRCC"), (_BACC, "BACC"), (_APPROXIFER, "ApproxIFER"))
}
_DASHES = {_ANY: (0, (6, 3)), _BACC_ANY: (0, (6, 3)), _INDEPENDENT: (0, (1, 2))}


def picture(results: Mapping[str, Any], path: Path) -> None:
    """Error against N, a panel for each function, straggler law and noise; bounds as thin lines."""
    curves = results["curves"]
    rows = list(dict.fromkeys(curve["function"] for curve in curves))
    columns = list(dict.fromkeys((curve["noise"], curve["law"]) for curve in curves))
    figure, axes = plt.subplots(
        *(len(rows), len(columns)),
        figsize=(3.4 * len(columns), 3.3 * len(rows) + 0.7),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for (row, function), (column, (noise, law)) in itertools.product(
        enumerate(rows), enumerate(columns)
    ):
        panel = axes[row, column]
        shown = [
            curve
            for curve in curves
            if (curve["function"], curve["noise"], curve["law"]) == (function, noise, law)
        ]
        _draw(panel, shown)
        told = f"noise {100 * noise:g} %" if noise else "no noise"
        panel.set_title(f"{function}, {law}, {told}", fontsize=9)
    for panel in axes[-1]:
        panel.set_xlabel("workers N")
    for panel in axes[:, 0]:
        panel.set_ylabel("expected squared error")
    _legend(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw(panel: Any, curves: Sequence[Mapping[str, Any]]) -> None:
    drawn = set()
    for curve in curves:
        n, mean, half_width = (
            np.array([point[name] for point in curve["points"]])
            for name in ("num_workers", "mean", "half_width")
        )
        # A log axis has no room for an interval that reaches zero.
        down = np.minimum(half_width, 0.9 * mean)
        panel.errorbar(
            *(n, mean, (down, half_width)),
            ms=4,
            lw=1.2,
            elinewidth=0.8,
            **_LOOKS[curve["code"]],
        )
    panel.set(xscale="log", yscale="log")
    low, high = panel.get_ylim()
    for curve in curves:
        for bound in curve["bounds"]:
            # BACC's two layouts share their bounds: one line does.
            if bound["formula"] not in drawn:
                drawn.add(bound["formula"])
                _draw_bound(panel, curve, bound)
    if any(low < curve["floor"] for curve in curves):
        panel.axhline(curves[0]["floor"], color="grey", lw=0.8, ls=":")
    panel.set_ylim(low, high)
    # Every N is an odd number to read off a log axis: every other one is written out.
    shown = [point["num_workers"] for point in curves[0]["points"]]
    panel.set_xticks(shown[::2], [f"{n:,}" for n in shown[::2]])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25)


def _draw_bound(panel: Any, curve: Mapping[str, Any], bound: Mapping[str, Any]) -> None:
    """A line of the bound's slope through the first of the larger half of N."""
    points = [p for p in curve["points"] if p["num_workers"] >= curve["large"]["first"]]
    n = np.array([point["num_workers"] for point in points], float)
    line = points[0]["mean"] * (n / n[0]) ** bound["slope"]
    panel.plot(n, line, lw=0.9, ls=_DASHES[bound["source"]], color=_LOOKS[curve["code"]]["color"])


def _legend(figure: Any) -> None:
    lines = [Line2D([], [], ms=4, label=code, **look) for code, look in _LOOKS.items()]
    lines += [
        Line2D([], [], color="black", lw=0.9, ls=_DASHES[_ANY], label="bound's slope, any S"),
        Line2D(
            *([], []),
            color="black",
            lw=0.9,
            ls=_DASHES[_INDEPENDENT],
            label="bound's slope, independent stragglers",
        ),
    ]
    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), frameon=False)


def section(results: Mapping[str, Any]) -> str:
    """The markdown section: how it was measured, slopes beside bounds, and what they say."""
    curves = results["curves"]
    told = [
        *_told_bounds(curves),
        *_told_without_bound(curves),
        *_told_dither(curves),
        *_told_codes(curves),
        *_told_limits(results),
    ]
    return "\n".join(
        ["## Convergence", "", _told_settings(results), "", *_table(curves), ""]
        + [f"- {sentence}" for sentence in told]
        + [""]
    )


def _told_settings(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    first, *_, last = settings["num_workers"]
    functions = "; ".join(
        f"{name}: {facts['num_groups']} groups, {facts['dtype']}, "
        + ", ".join(f"{key} {value}" for key, value in facts["facts"].items())
        for name, facts in results["functions"].items()
    )
    noise = max(settings["noise_by_output_rms"])
    return (
        f"Expected squared error of K = {settings['num_data']} predictions against N, from "
        f"{first:,} to {last:,} workers at {len(settings['num_workers'])} values, "
        f"{settings['straggler_sets']} straggler sets each, the same for all codes ({functions}). "
        f"With noise: of standard deviation {100 * noise:g} % of the outputs' root mean square on "
        "every answer. NeRCC interpolates in encoding; its `lambda_dec` is the best of a grid, "
        "chosen for each N on other groups and straggler sets. Slopes are of log error against "
        "log N, ± one standard error; intervals are over straggler sets, for these groups. Bounds "
        "are judged by the larger half of N: `confirmed` is a slope at most two standard errors "
        "above the bound's, which is fitted at the same N and S."
    )


def _table(curves: Sequence[Mapping[str, Any]]) -> list[str]:
    names = ("function", "stragglers", "noise", "code", "slope, all N", "slope, large N", "from N")
    names += ("bound", "its slope", "verdict", "error at the largest N")
    rows = [names, ("---",) * len(names)]
    for curve in curves:
        large, last = curve["large"], curve["points"][-1]
        bounds = curve["bounds"]
        rows.append(
            (
                curve["function"],
                curve["law"],
                f"{100 * curve['noise']:g} %",
                curve["code"],
                _slope(curve["all"]),
                _slope(large),
                f"{large['first']:,}" if large else "-",
                "<br>".join(f"`{bound['formula']}`" for bound in bounds) or "none published",
                "<br>".join(_signed(bound["slope"]) for bound in bounds) or "-",
                "<br>".join(_verdict(bound) for bound in bounds) or "-",
                f"{last['mean']:.2g} ± {last['half_width']:.1g}",
            )
        )
    return [f"| {' | '.join(row)} |" for row in rows]


def _slope(fit: Mapping[str, Any] | None) -> str:
    return f"{_signed(fit['slope'])} ± {fit['standard_error']:.2f}" if fit else "-"


def _signed(value: float) -> str:
    """Two digits with the sign, and no minus before a zero."""
    return f"{round(value, 2) + 0.0:+.2f}"


def _verdict(bound: Mapping[str, Any]) -> str:
    if not bound["confirmed"]:
        return "**violated**"
    return "confirmed" if _falls(bound) else "confirmed (says nothing)"


def _falls(bound: Mapping[str, Any]) -> bool:
    """Whether the bound promises an error that falls with N; S rounds, so not quite zero."""
    return bound["slope"] < -_FLAT


def _told_bounds(curves: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for (formula, source), pairs in _by_bound(curves).items():
        useful = [(curve, bound) for curve, bound in pairs if _falls(bound)]
        empty = [(curve, bound) for curve, bound in pairs if not _falls(bound)]
        sentences = []
        if useful:
            met = [curve for curve, bound in useful if bound["confirmed"]]
            margins = _range([bound["slope"] - c["large"]["slope"] for c, bound in useful])
            sentences.append(
                f"confirmed in {len(met)} of {len(useful)} cases where it falls with N (the "
                f"error's slope is steeper by {margins})"
            )
        for curve, bound in useful + empty:
            if not bound["confirmed"]:
                why = "" if curve["smooth"] else " (a function less smooth than the proof assumes)"
                sentences.append(
                    f"violated for {_name(curve)}: slope {_slope(curve['large'])} against "
                    f"{_signed(bound['slope'])}{why}"
                )
        if empty:
            slopes = _range([curve["large"]["slope"] for curve, _ in empty])
            sentences.append(
                f"it does not fall with N in {len(empty)} cases and promises nothing there; the "
                f"error's own slope is {slopes}"
            )
        yield f"`{formula}` ({source}): {'; '.join(sentences)}."


def _by_bound(
    curves: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str], list[tuple[Mapping[str, Any], Mapping[str, Any]]]]:
    grouped: dict[tuple[str, str], list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for curve in curves:
        for bound in curve["bounds"]:
            grouped.setdefault((bound["formula"], bound["source"]), []).append((curve, bound))
    return grouped


def _told_without_bound(curves: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    without = [curve for curve in curves if not curve["bounds"] and curve["large"]]
    for code, noisy in dict.fromkeys((curve["code"], curve["noise"] > 0) for curve in without):
        slopes = [
            curve["large"]["slope"]
            for curve in without
            if (curve["code"], curve["noise"] > 0) == (code, noisy)
        ]
        kind = "with noise" if noisy else "without noise"
        yield f"{code} {kind}: the papers give no bound; measured slope {_range(slopes)}."


def _told_dither(curves: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the ties in the images' constant areas cost NeRCC without noise."""
    found = {
        (curve["function"], curve["law"]): curve
        for curve in curves
        if curve["code"] == _NERCC and not curve["noise"] and curve["large"]
    }
    pairs = [
        f"{law}: slope {_slope(curve['large'])} against {_slope(dithered['large'])}, "
        f"error {curve['points'][-1]['mean']:.2g} against {dithered['points'][-1]['mean']:.2g}"
        for (name, law), curve in found.items()
        if name == _PLAIN and (dithered := found.get((_DITHERED, law)))
    ]
    if pairs:
        yield (
            "Where an image is constant max pooling ties, which can put a kink of the logits at "
            f"the data point itself; dithered images have no ties. NeRCC without noise, {_PLAIN} "
            f"against {_DITHERED}, at large N: {'; '.join(pairs)}."
        )


def _told_codes(curves: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """NeRCC's error beside the better of its rivals', at the largest N."""
    for noise in dict.fromkeys(curve["noise"] for curve in curves):
        panels: dict[str, dict[str, float]] = {}
        for curve in curves:
            if curve["noise"] == noise:
                errors = panels.setdefault(f"{curve['function']}, {curve['law']}", {})
                errors[curve["code"]] = curve["points"][-1]["mean"]
        ratios = {
            name: errors[_NERCC] / min(e for code, e in errors.items() if code != _NERCC)
            for name, errors in panels.items()
        }
        better = sum(ratio < 1 for ratio in ratios.values())
        listed = ", ".join(f"{name}: {ratio:.2g}" for name, ratio in ratios.items())
        kind = f"{100 * noise:g} % noise" if noise else "no noise"
        yield (
            f"At the largest N with {kind}, NeRCC's error is below the better BACC's in {better} "
            f"of {len(ratios)} cases; NeRCC's by BACC's is {listed}."
        )


def _told_limits(results: Mapping[str, Any]) -> Iterator[str]:
    curves, settings = results["curves"], results["settings"]
    rough = [name for name, facts in results["functions"].items() if not facts["smooth"]]
    if rough:
        yield (
            "The bounds assume a bounded second derivative, which LeNet5 (ReLU and max pooling) "
            f"does not have: the rows of {' and '.join(rough)} test more than was proved."
        )
    if any(bound["source"] == _INDEPENDENT for curve in curves for bound in curve["bounds"]):
        yield (
            f"The bounds of {_INDEPENDENT} are for workers that straggle independently; measured "
            "is an exact share, drawn at random."
        )
    low = sum(point["mean"] <= curve["floor"] for curve in curves for point in curve["points"])
    if low:
        yield f"{low} points lie below the numeric floor and are not fitted."
    largest = max(settings["lambda_dec_grid"])
    edge = sum(p.get("lambda_dec") == largest for curve in curves for p in curve["points"])
    if edge:
        yield f"The chosen `lambda_dec` is the grid's largest at {edge} points."
    if instead := settings["instead_of_mnist_because"]:
        yield f"LeNet5 ran on scikit-learn's digits instead of MNIST: {instead}"


def _name(curve: Mapping[str, Any]) -> str:
    noise = f", {100 * curve['noise']:g} % noise" if curve["noise"] else ""
    return f"{curve['code']} on {curve['function']}, {curve['law']}{noise}"


def _range(values: Sequence[float]) -> str:
    low, high = _signed(min(values)), _signed(max(values))
    return low if low == high else f"{low} to {high}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="few workers, sets and groups")
    parser.add_argument("--data-dir", type=Path, help="the folder with mnist")
    parser.add_argument("--output", type=Path, help="folder for convergence.json and .png")
    arguments = parser.parse_args()
    start = time.perf_counter()

    def log(step: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {step}", flush=True)

    results = measure(arguments.quick, arguments.data_dir, log)
    log("done")
    print(section(results))
    if arguments.output is not None:
        write_json(arguments.output / "convergence.json", results)
        picture(results, arguments.output / "convergence.png")


if __name__ == "__main__":
    main()
