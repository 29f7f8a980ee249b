"""Decay of the squared error with the number of workers N, against the proven bounds.

    python bench/_convergence.py [--quick] [--data-dir FOLDER] [--output FOLDER]

`bench/paper.py` calls `measure`; the command is for trying it alone.

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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _report import write_json
from jaxtyping import Array, Bool, Float

from nercc_jax import AbstractCode, Berrut, NeRCC
from nercc_jax.codes import encode_groups
from nercc_jax.evaluation import Estimate
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


@dataclasses.dataclass(frozen=True)
class Plan:
    """The amount that is measured.

    Groups and sets are those of the report; choosing lambda_dec takes as many again.
    """

    num_workers: tuple[int, ...]
    sets: int
    scalar_groups: int
    image_groups: int


def _alike(first: int, last: int, count: int) -> tuple[int, ...]:
    """Return numbers of workers from `first` to about `last`, equal mod 2K, on a log scale."""
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
    """Return the shipped model on images as they are, and on dithered ones."""
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
    """Return the model's name, its data set, and why it is not MNIST where it is not."""
    if data_dir is None:
        instead = "no data folder was given"
    else:
        try:
            return "lenet5-mnist", load_data("mnist", "test", data_dir=data_dir), None
        except (FileNotFoundError, ImportError) as error:
            instead = str(error).split("\n", 1)[0]
    return "lenet5-digits", load_data("digits", "test"), instead


def _run(model: Callable[[Array], Array], x: np.ndarray) -> np.ndarray:
    """Run the model on a batch of any size, in batches of one shape."""
    padded = np.concatenate([x, np.broadcast_to(x[-1:], (-len(x) % _BATCH, *x.shape[1:]))])
    parts = [_call(model, padded[i : i + _BATCH]) for i in range(0, len(padded), _BATCH)]
    return np.concatenate(parts)[: len(x)]


@eqx.filter_jit
def _call(model, x):
    return model(x)


def _outputs(subject: Subject) -> Float[np.ndarray, "2 groups num_data outputs"]:
    """Return the function's own outputs on the data points."""
    x = subject.x
    return _run(subject.model, x.reshape(-1, *x.shape[3:])).reshape(*x.shape[:3], -1)


def _answers(
    subject: Subject, code: AbstractCode
) -> Float[np.ndarray, "2 groups num_workers outputs"]:
    """Return all workers' answers, which do not depend on who straggles."""
    x = subject.x
    coded = np.asarray(_encode(code, jnp.asarray(x.reshape(-1, *x.shape[2:]))))
    y = _run(subject.model, coded.reshape(-1, *coded.shape[2:]))
    return y.reshape(*x.shape[:2], code.num_workers, -1)


_encode = eqx.filter_jit(encode_groups)


@dataclasses.dataclass(frozen=True)
class Score:
    """Errors for each straggler set.

    They are the noiseless mean squared error, and the variance that noise of unit variance adds to
    it.
    """

    squared: Numbers
    gain: Numbers

    def error(self, noise_sd: float) -> Numbers:
        """Return the expected squared error with noise of this standard deviation."""
        return self.squared + noise_sd**2 * self.gain


def score(
    code: AbstractCode,
    answers: Float[np.ndarray, "groups num_workers outputs"],
    exact: Float[np.ndarray, "groups num_data outputs"],
    masks: Bool[np.ndarray, "sets num_workers"],
) -> Score:
    """Decode all groups with every straggler set."""
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
    """The function, law, noise and code of one curve."""

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
    """Return one point of every curve of a function."""
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
    """Fit the least-squares line through log mean against log N; None for fewer than three points.

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
    """Return the slope of the bound at these N and S, fitted as the measured one is."""
    x = np.log([point["num_workers"] for point in points])
    n, s = (
        np.array([point[name] for point in points], float) for name in ("num_workers", "stragglers")
    )
    return float(np.polyfit(x, np.log(bound.growth(n, s)), 1)[0])


def _curve(case: Case, points: list[dict[str, Any]], floor: float, smooth: bool) -> dict[str, Any]:
    """Return points, slopes and verdicts of one curve.

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
    """Return whether the error falls as fast as promised, within two standard errors."""
    return fit is not None and fit["slope"] <= promised + 2 * fit["standard_error"]


# --- the three parts that bench/paper.py calls


def measure(
    quick: bool, data_dir: Path | None, progress: Callable[[str], object]
) -> dict[str, Any]:
    """Return all points, slopes and verdicts, ready for JSON.

    `data_dir` holds MNIST as `load_data` wants it; without it LeNet5 runs on scikit-learn's digits,
    and the results say why. `progress` gets a line a step.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="few workers, sets and groups")
    parser.add_argument("--data-dir", type=Path, help="the folder with mnist")
    parser.add_argument("--output", type=Path, help="folder for convergence.json")
    arguments = parser.parse_args()
    start = time.perf_counter()

    def log(step: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {step}", flush=True)

    results = measure(arguments.quick, arguments.data_dir, log)
    log("done")
    if arguments.output is not None:
        write_json(arguments.output / "convergence.json", results)


if __name__ == "__main__":
    main()
