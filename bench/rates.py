"""Decay of the squared error with the number of workers N, against the proven bounds.

`convergence` (a part of `paper`): K data points a group, three functions: f(t) = t sin t of one
number, in float64 because float32's rounding would soon hide the error; the logits of LeNet5, in
float32; the same for dithered images. Three codes: NeRCC with lambda_enc = 0, BACC on its authors'
points and on ApproxIFER's. Two laws of stragglers: a fixed number, and a fixed share of N; each
with many random sets, the same for all codes. Answers with and without noise.

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

`independent` (arXiv 2502.00645): N from 256 to 4,096 workers, each of which straggles with
probability p; four smooth functions in float64, and the logits of LeNet5. Matrices are made on the
host, in float64; their product with the answers is the prediction. A slope's 95 % interval is a
bootstrap: groups are drawn again (the same at all N), and straggler sets at each N. NeRCC is
untuned, and with lambda_dec = 0, which interpolates. BSCC has natural ends here, for which there
are matrices on the host; near a data point, far from the ends, that is the same. The theory's rates
are slopes, too: log(N) is a power of N over a range of N.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from report import Report, environment, show
from workloads import coded_answers, in_batches, own_answers

from nercc_jax import AbstractCode, Berrut, IndependentStragglers, NeRCC
from nercc_jax.codes import BerrutSpline
from nercc_jax.evaluation import Estimate
from nercc_models import load_data, load_model

NUM_DATA = 8
Numbers = Float[np.ndarray, " n"]
Errors = Float[np.ndarray, "sets groups"]


def slopes_of(sizes: Any, means: Float[np.ndarray, "*rounds sizes"]) -> Float[Any, "*rounds"]:
    """Return the slopes of the least-squares lines through log mean error against log N."""
    return np.log(means) @ weights_of(sizes)


def weights_of(sizes: Any) -> Numbers:
    x = np.log(sizes)
    return (x - x.mean()) / np.sum((x - x.mean()) ** 2)


# --- convergence

SEED = 0
FIXED, SHARE = 3, 0.15  # stragglers, or their share of the workers
NOISE = 0.1  # standard deviation of the answers' noise, by the root mean square of the outputs
DITHER = 0.02  # standard deviation of the noise on images, by the range of grey
LAMBDAS = (0.0, *(10.0 ** (half / 2) for half in range(-26, -1)))
# A mean square error below (so many roundings of the outputs' root mean square)^2 is not fitted.
ROUNDINGS = 100
FIXED_LAW, SHARE_LAW = f"S = {FIXED}", f"S = {100 * SHARE:g} % of N"
LAWS: dict[str, Callable[[int], int]] = {
    FIXED_LAW: lambda num_workers: FIXED,
    SHARE_LAW: lambda num_workers: round(SHARE * num_workers),
}
APPROXIFER = "BACC, ApproxIFER's points"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The amount that is measured; choosing lambda_dec takes as many groups and sets again."""

    first: int = 20
    last: int = 2000
    count: int = 9
    sets: int = 48
    scalar_groups: int = 64
    image_groups: int = 8

    @property
    def num_workers(self) -> tuple[int, ...]:
        """Numbers of workers, equal mod 2K, on a log scale."""
        steps = (np.geomspace(self.first, self.last, self.count) - self.first) / (2 * NUM_DATA)
        return tuple(int(self.first + 2 * NUM_DATA * n) for n in np.unique(np.round(steps)))


QUICK = Plan(last=200, count=3, sets=8, scalar_groups=16, image_groups=2)


@dataclasses.dataclass(frozen=True)
class Bound:
    """An upper bound on the expected squared error, up to a constant: `growth` of (N, S)."""

    formula: str
    source: str
    codes: tuple[str, ...]
    noisy: bool
    laws: tuple[str, ...]
    growth: Callable[[Numbers, Numbers], Numbers]


_ANY, _BACC = "arXiv 2406.00300", "Jahani-Nezhad and Maddah-Ali 2022"
_INDEPENDENT, _BOTH = "arXiv 2502.00645", ("BACC", APPROXIFER)
BOUNDS = (
    Bound("S^3 N^-3", _ANY, ("NeRCC",), False, (*LAWS,), lambda n, s: s**3 / n**3),
    Bound("S^(8/5) N^(-3/5)", _ANY, ("NeRCC",), True, (*LAWS,), lambda n, s: s**1.6 / n**0.6),
    Bound("S^4 N^-2", _BACC, _BOTH, False, (*LAWS,), lambda n, s: s**4 / n**2),
    # The bounds above hold for the worst set of S; these for workers that straggle independently,
    # with a probability that is our share. The base of the logarithm is a constant factor. The
    # paper's abstract names the codes in the other order; each bound is the one above with the
    # longest run of stragglers, which is like log N, in the place of S.
    Bound("log(N)^3 N^-3", _INDEPENDENT, ("NeRCC",), False, (SHARE_LAW,),
          lambda n, s: np.log(n) ** 3 / n**3),
    Bound("log(N)^4 N^-2", _INDEPENDENT, _BOTH, False, (SHARE_LAW,),
          lambda n, s: np.log(n) ** 4 / n**2),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Subject:
    """A function of a batch, with data points in groups; `facts` describe it in words.

    The data points of convergence have an axis before: to choose lambda_dec on, and to report.
    `smooth` tells whether it has the bounded second derivative that the bounds assume.
    """

    name: str
    model: Callable[[Any], Any]
    x: np.ndarray
    dtype: str
    smooth: bool = True
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)


def lenet5(groups: int, data_dir: Path | None) -> tuple[Subject, str | None]:
    """Return the shipped model on test images, and why they are not MNIST where they are not."""
    name, instead = "lenet5-mnist", None
    try:
        images = load_data("mnist", "test", data_dir=data_dir)
    except (OSError, ImportError) as error:
        name, instead = "lenet5-digits", str(error).split("\n", 1)[0]
        images = load_data("digits", "test")
    model, chosen = load_model(name), images.shuffled(SEED).take(slice(groups * NUM_DATA))
    x = np.asarray(model.preprocess(chosen.images))
    facts = {"model": name, "data": f"{chosen.name} (test)", "outputs": "logits"}
    x = x.reshape(groups, NUM_DATA, *x.shape[1:])
    return Subject("LeNet5", model, x, "float32", False, facts), instead  # ReLU and max pooling


def converge(report: Report) -> dict[str, Any]:
    """Return all points, slopes and verdicts; without MNIST LeNet5 runs on digits."""
    plan = QUICK if report.quick else Plan()
    random = np.random.default_rng(SEED)
    t = random.uniform(-5, 5, size=(2, plan.scalar_groups, NUM_DATA, 1))
    plain, instead = lenet5(2 * plan.image_groups, report.data_dir)
    plain = dataclasses.replace(plain, x=plain.x.reshape(2, -1, *plain.x.shape[1:]))
    noise = DITHER * np.random.default_rng(SEED).standard_normal(plain.x.shape, dtype=np.float32)
    dithered = dict(plain.facts) | {"dither": f"{100 * DITHER:g} % of the range of grey"}
    subjects = (
        Subject("t sin t", lambda t: t * jnp.sin(t), t, "float64",
                facts={"x": "uniform on [-5, 5]"}),
        plain,
        dataclasses.replace(plain, name="LeNet5 (dithered)", x=plain.x + noise, facts=dithered),
    )  # fmt: skip
    functions, curves = {}, []
    for subject in subjects:
        start = time.perf_counter()
        with jax.enable_x64(subject.dtype == "float64"):
            exact = np.stack([own_answers(subject.model, x) for x in subject.x])
            rms = float(np.sqrt(np.mean(exact[1] ** 2)))
            points: dict[tuple, list[dict[str, Any]]] = {}
            for num_workers in plan.num_workers:
                report.log(f"convergence: {subject.name}, N = {num_workers}")
                for case, point in measure_at(subject, exact, rms, num_workers, plan.sets):
                    points.setdefault(case, []).append(point)
        floor = float((ROUNDINGS * np.finfo(exact.dtype).eps * rms) ** 2)
        facts = {"smooth": subject.smooth, "floor": floor}
        curves += [
            {"function": subject.name, "law": law, "noise": noise, "code": code} | facts
            | curve_of(code, law, noise, found, floor)
            for (law, noise, code), found in points.items()
        ]  # fmt: skip
        functions[subject.name] = {
            "dtype": subject.dtype,
            "smooth": subject.smooth,
            "num_groups": subject.x.shape[1],
            "output_rms": rms,
            "facts": dict(subject.facts),
            "seconds": time.perf_counter() - start,
        }
    settings = {
        "quick": report.quick,
        "instead_of_mnist_because": instead,
        "seed": SEED,
        "num_data": NUM_DATA,
        "num_workers": plan.num_workers,
        "straggler_sets": plan.sets,
        "laws": {law: [number(n) for n in plan.num_workers] for law, number in LAWS.items()},
        "noise_by_output_rms": [0.0, NOISE],
        "lambda_enc": 0.0,
        "lambda_dec_grid": LAMBDAS,
        "floor_roundings": ROUNDINGS,
    }
    show(
        {key: curve[key] for key in ("function", "law", "noise", "code")}
        | {"slope": (curve["large"] or {}).get("slope")}
        for curve in curves
    )
    return {"settings": settings, "functions": functions, "curves": curves}


def convergence(report: Report) -> None:
    """Measure slopes of the error where a number or a share of the workers straggles."""
    report.write(converge(report) | {"environment": environment()})


@eqx.filter_jit
def scores(code, answers, exact, masks):
    """Return the noiseless squared error under each set, and what noise of variance 1 adds."""
    decoders = jax.vmap(code.decoder_matrix)(masks)
    decoded = jnp.einsum("skn,gnm->sgkm", decoders, answers, precision=jax.lax.Precision.HIGHEST)
    squared = jnp.mean((decoded - exact) ** 2, axis=(1, 2, 3))
    return squared, jnp.mean(jnp.sum(decoders**2, axis=2), axis=1)


def measure_at(
    subject: Subject, exact: np.ndarray, rms: float, num_workers: int, sets: int
) -> Iterator[tuple[tuple[str, float, str], dict[str, Any]]]:
    """Yield one point of every curve of a function: by law, noise and code."""

    def nercc(lambda_dec: float) -> NeRCC:
        return NeRCC(NUM_DATA, num_workers, lambda_enc=0.0, lambda_dec=lambda_dec)

    # The encoder is the same for every lambda_dec.
    choosing_answers, answers = (coded_answers(subject.model, nercc(0.0), x) for x in subject.x)
    rivals = {
        "BACC": Berrut(NUM_DATA, num_workers),
        APPROXIFER: Berrut(NUM_DATA, num_workers, points="approxifer"),
    }
    rival_answers = {
        name: coded_answers(subject.model, code, subject.x[1]) for name, code in rivals.items()
    }
    for place, (law, number) in enumerate(LAWS.items()):
        # Drawn with NumPy, so that float32 and float64 see the same.
        random, stragglers = np.random.default_rng((SEED, place, num_workers)), number(num_workers)
        workers = np.broadcast_to(np.arange(num_workers), (2, sets, num_workers))
        choosing, reporting = random.permuted(workers, axis=2) >= stragglers

        tried = {
            each: scores(nercc(each), choosing_answers, exact[0], choosing) for each in LAMBDAS
        }
        reported = {
            name: scores(code, rival_answers[name], exact[1], reporting)
            for name, code in rivals.items()
        }
        for noise in (0.0, NOISE):

            def errors(score: Any, noise: float = noise) -> Numbers:
                squared, gain = (np.asarray(each, np.float64) for each in score)
                return squared + (noise * rms) ** 2 * gain

            best = min(LAMBDAS, key=lambda each: errors(tried[each]).mean())
            found = {"NeRCC": scores(nercc(best), answers, exact[1], reporting)} | reported
            for name, score in found.items():
                point = {"num_workers": num_workers, "stragglers": stragglers}
                point |= dataclasses.asdict(Estimate.over(errors(score).tolist()))
                yield (law, noise, name), point | ({"lambda_dec": best} if name == "NeRCC" else {})


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
    weights = weights_of(np.exp(x))
    slope = float(slopes_of(np.exp(x), mean))
    residual = np.log(mean) - np.mean(np.log(mean)) - slope * (x - x.mean())
    scatter = np.sqrt(np.sum(residual**2) / (len(x) - 2) * np.sum(weights**2))
    # A 95 % half width is about two standard errors.
    relative = np.array([point["half_width"] for point in points]) / 2 / mean
    spread = np.sqrt(np.sum((weights * relative) ** 2))
    ends = {"first": points[0]["num_workers"], "last": points[-1]["num_workers"]}
    error = {"slope": slope, "standard_error": float(max(scatter, spread))}
    return error | ends | {"num_points": len(points)}


def curve_of(
    code: str, law: str, noise: float, points: list[dict[str, Any]], floor: float
) -> dict[str, Any]:
    """Return points, slopes and verdicts of one curve.

    A rate is a promise for large N, and at few workers the code does not yet resolve the function
    at all: bounds are judged by the larger half of N. One is confirmed where the error falls as
    fast as promised, within two standard errors.
    """
    above = [point for point in points if point["mean"] > floor]
    large = above[-max(3, (len(above) + 1) // 2) :]
    fit, bounds = fit_slope(large), []
    n, s = (np.array([p[key] for p in large], float) for key in ("num_workers", "stragglers"))
    for bound in BOUNDS:
        if fit and code in bound.codes and law in bound.laws and bound.noisy == (noise > 0):
            slope = float(slopes_of(n, bound.growth(n, s)))
            confirmed = fit["slope"] <= slope + 2 * fit["standard_error"]
            about = {"formula": bound.formula, "source": bound.source}
            bounds.append(about | {"slope": slope, "confirmed": confirmed})
    return {"points": points, "all": fit_slope(above), "large": fit, "bounds": bounds}


# --- independent stragglers

SHARES = (0.05, 0.2)
FLOOR = {"float64": 1e-26, "float32": 1e-11}  # of the mean square: rounding is not fitted
# By (N, p): what is proved is at most a constant times this.
RATES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "log^3 N^-3": lambda n, p: (np.log(n) / -np.log(p)) ** 3 / n**3,
    "log^4 N^-2": lambda n, p: (np.log(n) / -np.log(p)) ** 4 / n**2,
}


def scalar_functions(groups: int) -> Iterator[Subject]:
    """Yield smooth functions of one number or five, with data points at random."""
    rng = np.random.default_rng(0)
    inner, outer = rng.normal(size=(5, 16)), rng.normal(size=(16, 3)) / 4
    made: dict[str, Any] = {
        "t sin t": (1, 5.0, lambda t: t * np.sin(t)),
        "1 / (1 + t^2)": (1, 5.0, lambda t: 1 / (1 + t**2)),
        "exp(sin 2t)": (1, 3.0, lambda t: np.exp(np.sin(2 * t))),
        "tanh network": (5, 1.0, lambda x: np.tanh(x @ inner) @ outer),
    }
    for name, (size, reach, call) in made.items():
        x = rng.uniform(-reach, reach, (groups, NUM_DATA, size))
        yield Subject(name, call, x, "float64")


def codes_of(num_workers: int) -> dict[str, AbstractCode]:
    """Return the codes by name, their numbers on the host in float64."""
    with jax.enable_x64(True):
        codes: dict[str, AbstractCode] = {
            "BACC": Berrut(NUM_DATA, num_workers),
            "BSCC": BerrutSpline(NUM_DATA, num_workers, ends="natural"),
            "NeRCC": NeRCC(NUM_DATA, num_workers),
            "NeRCC, lambda_dec = 0": NeRCC(NUM_DATA, num_workers, lambda_dec=0.0),
        }
        return {name: jax.tree.map(np.asarray, code) for name, code in codes.items()}


def independent_sets(share: float, workers: int, count: int) -> Bool[np.ndarray, "sets workers"]:
    """Return straggler sets of independent workers."""
    key = jax.random.fold_in(jax.random.key(round(1000 * share)), workers)
    draw = jax.vmap(lambda key: IndependentStragglers(share).available(key, workers))
    return np.asarray(draw(jax.random.split(key, count)))


def answers_of(subject: Subject, code: Any = None) -> np.ndarray:
    """Return all workers' answers, or without a code the function's own."""
    encoder = np.eye(NUM_DATA) if code is None else code.encoder_on_host()
    coded = np.einsum("nk,gk...->gn...", encoder, subject.x)
    flat = subject.model(coded.reshape(-1, *coded.shape[2:]))
    return np.asarray(flat, np.float64).reshape(*coded.shape[:2], -1)


def decoding_errors(
    code: Any,
    masks: np.ndarray,
    answers: Mapping[str, np.ndarray],
    exact: Mapping[str, np.ndarray],
) -> dict[str, Errors]:
    """Return the mean squared error of each group under each straggler set, by function."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in answers}
    for mask in masks:
        decoder = code.decoder_on_host(mask)
        for name, y in answers.items():
            decoded = np.einsum("kn,gnm->gkm", decoder, y)
            found[name].append(np.mean((decoded - exact[name]) ** 2, axis=(1, 2)))
    return {name: np.stack(errors) for name, errors in found.items()}


def independent_curve(
    sizes: Sequence[int], errors: Sequence[Errors], share: float, floor: float, rounds: int = 1000
) -> Any:
    """Return the points of a curve, its slope with an interval, and the slopes of the rates."""
    rng, groups, again = np.random.default_rng(0), errors[0].shape[1], []
    for _ in range(rounds):
        chosen = rng.integers(groups, size=groups)
        by_set = (each[:, chosen].mean(axis=1) for each in errors)
        again.append([each[rng.integers(len(each), size=len(each))].mean() for each in by_set])
    means, again = np.array([each.mean() for each in errors]), np.array(again)
    low, high = np.quantile(again, (0.025, 0.975), axis=0)
    used = means > floor
    n = np.array(sizes)[used]
    return {
        "points": [
            {"num_workers": size, "mean": mean, "low": a, "high": b,
             "median": float(np.median(each.mean(axis=1)))}
            for size, mean, a, b, each in zip(sizes, means, low, high, errors, strict=True)
        ],
        "slope": float(slopes_of(n, means[used])),
        "interval": np.quantile(slopes_of(n, again[:, used]), (0.025, 0.975)).tolist(),
        "fitted": n.tolist(),
        "rates": {name: float(slopes_of(n, rate(n, share))) for name, rate in RATES.items()},
    }  # fmt: skip


def independent(report: Report) -> None:
    """Measure slopes where each worker straggles independently, by share, code and function."""
    start, busy = time.perf_counter(), time.process_time()
    sizes = (256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
    sets, groups, image_groups = 200, 32, 4
    if report.quick:
        sizes, sets, groups, image_groups = (256, 512, 1024), 20, 8, 1
    network, _ = lenet5(image_groups, report.data_dir)
    float32 = dataclasses.replace(
        network, model=lambda x: in_batches(network.model, np.asarray(x, np.float32))
    )
    functions = [*scalar_functions(groups), float32]
    exact = {each.name: answers_of(each) for each in functions}
    found: dict[tuple[float, str, str], list[Errors]] = {}
    for size in sizes:
        report.log(f"N = {size}")
        for code_name, code in codes_of(size).items():
            answers = {each.name: answers_of(each, code) for each in functions}
            for share in SHARES:
                masks = independent_sets(share, size, sets)
                for name, errors in decoding_errors(code, masks, answers, exact).items():
                    found.setdefault((share, code_name, name), []).append(errors)
    curves, dtypes = [], {each.name: each.dtype for each in functions}
    for (share, code_name, name), errors in found.items():
        floor = FLOOR[dtypes[name]] * float(np.mean(exact[name] ** 2))
        facts = {"share": share, "code": code_name, "function": name, "dtype": dtypes[name]}
        curves.append(facts | independent_curve(sizes, errors, share, floor))
    plan = {"num_workers": sizes, "sets": sets, "groups": groups, "image_groups": image_groups}
    content = {"environment": environment(), "plan": plan, "num_data": NUM_DATA}
    spent = {"seconds": round(time.perf_counter() - start)}
    spent |= {"cpu_seconds": round(time.process_time() - busy)}
    report.write(content | {"shares": SHARES, "curves": curves} | spent)
    show({key: curve[key] for key in ("share", "code", "function", "slope", "interval")}
         for curve in curves)  # fmt: skip
