"""Coding on a CPU beside the bare product, SciPy and csaps; gradients of the spline; first calls.

Timings are ratios of calls in turn, in float32: medians of one call's time over the other's, which
depend little on the machine. First calls compile, and are in CPU seconds of this machine. Of every
figure less is better, and each is compared with the stored one in `bench/results/coding.json`.

Contenders compute the same thing, which is checked first:

- product: `jnp.matmul` of the same shapes, jitted, with a matrix made beforehand.
- jit: the jitted method. Decoding gets a traced mask that it has not seen; encoding gets the code
  as an argument. So each call makes its matrix.
- eager: a call outside jit, with a mask of NumPy that it has not seen.
- matrix kept: the same with one mask, whose matrix is looked up, as encoding's always is.
- SciPy's `make_smoothing_spline` and csaps's `CubicSmoothingSpline`: fitted to sorted float64
  copies, made beforehand, of the answers that came, and evaluated at all coordinates at once.
"""

import functools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import csaps
import jax
import jax.numpy as jnp
import numpy as np
from jax import block_until_ready as ready
from measure import Contender, affordable, interleaved, warmed
from report import RESULTS, Report, environment, show
from scipy.interpolate import make_smoothing_spline

from nercc_jax import NeRCC, coded_inference
from nercc_jax.codes import decode_groups
from nercc_jax.splines import smoothing_spline

KNOTS = (20, 100, 10_000)
# What figures are held to, in addition to what is stored.
AT_MOST = {f"spline, n = {n:,}: value and gradient / value": 1.3 for n in KNOTS}
AT_MOST |= {"first Hessian of smoothing_spline": 4, "lines of a decode's gradient": 2000}
Task = tuple[dict[str, Contender], dict[str, Contender], dict[str, Any]]


def contender(function: Callable[..., Any], arguments: Callable[[], tuple[Any, ...]]) -> Contender:
    """Return calls of a function that wait for its result, on arguments that are there before."""
    return Contender(lambda *given: ready(function(*given)), lambda: ready(arguments()))


def rivals_of(t: Any, y: Any, at: Any, lambda_: Any) -> dict[str, Contender]:
    """Return the rivals' fits of (t, y), evaluated at `at`.

    SciPy minimises sum (y - f)^2 + lam integral f''^2, csaps p sum (y - f)^2 + (1 - p) integral
    f''^2: lam = n lambda, and p = 1 / (1 + n lambda). Both go on beyond the outermost knot by their
    cubic, where the natural spline is a straight line; there they are evaluated as such.
    """
    order, weight = np.argsort(t), len(t) * float(lambda_)
    t, y, at = (np.asarray(each, np.float64) for each in (t[order], y[order], at))
    inside = np.clip(at, t[0], t[-1])
    outside = np.flatnonzero(at != inside)

    def evaluated(fit: Callable[[], Any]) -> np.ndarray:
        spline = fit()
        values = spline(inside)
        if outside.size:
            values[outside] += (at - inside)[outside, None] * spline(inside[outside], nu=1)
        return values

    fits = {
        "SciPy": lambda: make_smoothing_spline(t, y, lam=weight),
        "csaps": lambda: csaps.CubicSmoothingSpline(t, y, smooth=1 / (1 + weight), axis=0),
    }
    return {name: Contender(functools.partial(evaluated, fit)) for name, fit in fits.items()}


def encoding(code: NeRCC, coordinates: int, random: np.random.Generator) -> Task:
    """Return contenders, rivals, and results for one input, which are the same but for rounding."""
    x = jnp.asarray(random.standard_normal((code.num_data, coordinates), np.float32))
    matrix, product, jit = code.encoder_matrix(), jax.jit(jnp.matmul), jax.jit(NeRCC.encode)
    contenders = {
        "product": contender(product, lambda: (matrix, x.copy())),
        "jit": contender(jit, lambda: (code, x.copy())),
        "matrix kept": contender(code.encode, lambda: (x.copy(),)),
    }
    found = {"product": product(matrix, x), "jit": jit(code, x), "matrix kept": code.encode(x)}
    rivals = rivals_of(code.alpha, x, code.beta, code.lambda_enc)
    return contenders, rivals, found | {name: rival.call() for name, rival in rivals.items()}


def decoding(
    code: NeRCC, groups: int, coordinates: int, stragglers: int, random: np.random.Generator
) -> Task:
    """Return the same for decoding; of several groups the first one's results, and no rivals."""
    many = (groups,) if groups > 1 else ()
    each: Callable[[Any], Any] = jax.vmap if many else lambda function: function
    y = jnp.asarray(random.standard_normal((*many, code.num_workers, coordinates), np.float32))

    def new() -> np.ndarray:
        ranks = random.random((*many, code.num_workers)).argsort(axis=-1).argsort(axis=-1)
        return ranks >= stragglers

    eager = (lambda y, mask: decode_groups(code, y, mask).predictions) if many else code.decode
    known, product, jit = new(), jax.jit(jnp.matmul), jax.jit(each(code.decode))
    matrices = each(code.decoder_matrix)(jnp.asarray(known))
    contenders = {
        "product": contender(product, lambda: (matrices, y.copy())),
        "jit": contender(jit, lambda: (y.copy(), jnp.asarray(new()))),
        "eager": contender(eager, lambda: (y.copy(), new())),
        "matrix kept": contender(eager, lambda: (y.copy(), known)),
    }
    found = {"product": product(matrices, y), "jit": jit(y, known), "eager": eager(y, known)}
    mask, answers = (known[0], y[0]) if many else (known, y)
    rivals = rivals_of(code.beta[mask], answers[mask], code.alpha, code.lambda_dec)
    found = {name: result[0] if many else result for name, result in found.items()}
    found |= {name: rival.call() for name, rival in rivals.items()}
    return contenders, {} if many else rivals, found


def spline_problem(knots: int) -> tuple[Callable[..., jax.Array], tuple[jax.Array, ...]]:
    """Return a loss of the smoothing spline in log lambda, and its arguments."""
    t = jnp.cos((2 * jnp.arange(knots) + 1) * jnp.pi / (2 * knots))

    # Data that are no arguments would let XLA compute at compile time what depends on them only.
    def loss(log_lambda: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        return smoothing_spline(t, y, jnp.exp(log_lambda)).values @ jnp.cos(7 * t)

    return loss, (jnp.log(1e-3), t, jnp.sin(5 * t))


def first_calls(repeats: int) -> dict[str, float]:
    """Return the CPU seconds of calls of (20, 8) that compile, medians; and the gradient's lines.

    JAX forgets all programs before each call, and compiles nothing by another's parts.
    """
    code, mask = NeRCC(8, 20), np.arange(20) != 2
    y, masks = jnp.ones((4, 20, 64)), jnp.asarray([mask] * 4)
    spline, given = spline_problem(KNOTS[0])

    def loss(code: NeRCC, y: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.sum(code.decode(y, mask) ** 2)

    gradient, infer = jax.jit(jax.grad(loss, allow_int=True)), coded_inference(jnp.tanh, code)
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "jit decode": (jax.jit(code.decode), (y[0], masks[0])),
        "gradient in the code": (gradient, (code, y[0], masks[0])),
        "vmapped groups": (jax.jit(jax.vmap(code.decode)), (y, masks)),
        "jitted inference with masks": (jax.jit(infer), (y[:, :8], masks)),
        "eager decode": (code.decode, (y[0], mask)),
        "gradient of smoothing_spline": (jax.jit(jax.grad(spline)), given),
        "Hessian of smoothing_spline": (jax.jit(jax.hessian(spline)), given),
    }
    found: dict[str, float] = {}
    for name, (call, arguments) in calls.items():
        seconds = []
        for _ in range(repeats):
            jax.clear_caches()
            start = time.process_time()
            ready(call(*arguments))
            seconds.append(time.process_time() - start)
        found[f"first {name}"] = float(np.median(seconds))
    lines = gradient.lower(code, y[0], masks[0]).as_text().splitlines()
    return found | {"lines of a decode's gradient": len(lines)}


def compared(now: Mapping[str, float], stored: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return a row for each figure; worse is over 5 % above the stored one, or above `AT_MOST`."""
    rows = []
    for name, value in now.items():
        change, most = value / stored.get(name, value) - 1, AT_MOST.get(name)
        worse = change > 0.05 or (most is not None and value > most)
        row = {"figure": name, "now": value, "stored": stored.get(name), "at most": most}
        row |= {"change": f"{100 * change:+.1f} %" if name in stored else "nothing stored"}
        rows.append(row | {"worse": "yes" if worse else ""})
    return rows


def run(report: Report, store: bool = False) -> int:
    """Measure all figures; return how many are worse than stored by over 5 %, and name them.

    Options:
        store: Compare later runs with this one; else with what is stored, where it is.
    """
    jax.config.update("jax_platforms", "cpu")
    if not report.quick:  # tests run the small version, and other tests may use the cache
        jax.config.update("jax_enable_compilation_cache", False)
    seconds, most, first = (0.3, 25, 1) if report.quick else (8.0, 501, 5)
    begin, random, timings = {"environment": environment("csaps")}, np.random.default_rng(0), []
    figures = first_calls(first)
    report.log("first calls")

    def time_in_turn(what: str, contenders: dict[str, Contender], *pairs: str) -> None:
        warm = warmed(contenders)
        found = interleaved(warm, affordable(warm, seconds, most))
        timings.append({"what": what} | {name: one.summary() for name, one in found.items()})
        for name, base in (pair.split(" / ") for pair in pairs):
            figures[f"{what}: {name} / {base}"] = found[name].ratio(found[base])

    # Encoding smooths, too, so that rivals cannot just interpolate.
    few = NeRCC(8, 20, lambda_enc=72.0**-4, lambda_dec=72.0**-4)
    many = NeRCC(20, 100, lambda_enc=180.0**-4, lambda_dec=180.0**-4)
    for what, (contenders, rivals, results) in {
        "encode (20, 8), 150,528": encoding(few, 150_528, random),
        "decode (20, 8), 150,528": decoding(few, 1, 150_528, 3, random),
        "decode 64 x (100, 20), 1,000": decoding(many, 64, 1_000, 30, random),
    }.items():
        exact = results.pop("SciPy")
        for name, result in results.items():
            difference = np.max(np.abs(result - exact)) / np.max(np.abs(exact))
            if not difference <= 1e-3:
                raise ValueError(f"{what}: {name} is off SciPy's by {difference:.1e}, not <= 1e-3")
        ours = sorted(contenders.keys() - {"product"})
        time_in_turn(what, contenders, *(f"{name} / product" for name in ours))
        if rivals:
            time_in_turn(what, rivals | {"jit": contenders["jit"]}, "jit / SciPy", "jit / csaps")
        report.log(what)
    for knots in KNOTS:
        what, (loss, given) = f"spline, n = {knots:,}", spline_problem(knots)
        calls = {"value": jax.jit(loss), "value and gradient": jax.jit(jax.value_and_grad(loss))}
        contenders = {name: contender(call, lambda g=given: g) for name, call in calls.items()}
        contenders["SciPy"] = rivals_of(given[1], given[2], given[1], 1e-3)["SciPy"]
        time_in_turn(what, contenders, "value and gradient / value", "value / SciPy")

    path = RESULTS / "coding.json"
    before = json.loads(path.read_text())["stored"] if path.exists() else {}
    rows = compared(figures, before)
    show(rows)
    for row in (worse := [row for row in rows if row["worse"]]):
        report.log(f"WORSE: {row['figure']} is {row['now']:.3g} ({row['change']})")
    kept = {} if store else {name: before[name] for name in before.keys() & figures.keys()}
    report.write({"figures": figures, "stored": figures | kept, "timings": timings} | begin)
    return 0 if report.quick else len(worse)  # a small version shows that it runs
