"""Time encoding and decoding against SciPy, csaps and the bare matrix product.

    python bench/coding.py [--quick] [--output FOLDER]

Runs on the CPU in float32. All contenders compute the same thing, which is checked first:

- ours: the jitted public path (`code.encode`, `code.try_decode`; for many groups `encode_groups`
  and `decode_groups` as `coded_inference` calls them), the code, the data and the mask being its
  arguments. So each call builds the matrix, decodes, checks the answers for values that are not
  finite, and each decoding call has a straggler set that it has not seen. As "matrix kept", with
  the matrix of a straggler set that was seen before, as every call outside jit looks it up.
- product: the bare `jnp.matmul` of the same shapes, jitted, with a matrix made beforehand.
- SciPy: `make_smoothing_spline`, fitted to the answers that came and evaluated at alpha, all
  coordinates at once; on sorted float64 copies of the data made beforehand (it would convert).
- csaps: `CubicSmoothingSpline`, likewise.

SciPy minimises sum (y - f)^2 + lam integral f''^2, csaps p sum (y - f)^2 + (1 - p) integral f''^2:
lam = n lambda and p = 1 / (1 + n lambda). Both continue beyond the outermost knot by their cubic,
where ours and the paper's natural spline is a straight line; there they are evaluated as such.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    import csaps
    from rich.console import Console
    from rich.table import Table
    from scipy.interpolate import make_smoothing_spline
except ModuleNotFoundError as error:
    sys.exit(f"bench/coding.py needs {error.name}, missing: pip install '.[bench,demo]' in a clone")

import jax
import jax.numpy as jnp
import numpy as np
from _report import (
    CompileCounter,
    Contender,
    Timing,
    affordable,
    clock,
    environment,
    interleaved,
    warmed,
    write_json,
)

from nercc_jax import NeRCC
from nercc_jax.codes import decode_groups, encode_groups
from nercc_jax.codes._decoding import Matrices, is_steady
from nercc_jax.splines import smoothing_spline

_SEED = 20240204
_NEW_SETS = 50
_KNOTS = (1_000, 10_000, 100_000)
_KNOT_COORDINATES = (1, 64)
_GRADIENT_KNOTS = (20, 100, 10_000)
_PACKAGES = ("nercc-jax", "jax", "jaxlib", "equinox", "numpy", "scipy", "csaps")
_BROKEN = "one answer NaN"
# Larger differences, relative to the largest value, would mean that not the same thing is timed.
_AGREEMENT = 1e-3

Evaluate = Callable[..., np.ndarray]
Fit = Callable[[np.ndarray, np.ndarray, float], Evaluate]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the issue's list; a mask for each group has this many stragglers."""

    num_data: int
    num_workers: int
    coordinates: int
    groups: int
    stragglers: int

    @property
    def name(self) -> str:
        groups = f" x {self.groups} groups" if self.groups > 1 else ""
        return f"({self.num_data}, {self.num_workers}, {self.coordinates}){groups}"

    def code(self) -> NeRCC:
        """Return the default decoder; encoding smooths, so that rivals cannot just interpolate."""
        lambda_ = (9.0 * self.num_data) ** -4
        return NeRCC(self.num_data, self.num_workers, lambda_enc=lambda_, lambda_dec=lambda_)

    def masks(self, rng: np.random.Generator) -> np.ndarray:
        """Return one new straggler set for each group: (groups, num_workers)."""
        ranks = rng.random((self.groups, self.num_workers)).argsort(axis=1).argsort(axis=1)
        return ranks >= self.stragglers


SETTINGS = (
    Setting(8, 20, 150_528, 1, 3),
    Setting(20, 60, 3_072, 1, 20),
    Setting(20, 100, 1_000, 64, 30),
)


@dataclasses.dataclass(frozen=True)
class Task:
    """One direction of one setting, with everything that computes it.

    `agree` maps each contender to its result for the same input, for the check. `parts` are further
    things worth knowing: what the call's pieces take, and calls that users make; they are timed in
    turn with ours and the product, `rare` ones in turn with the rivals.
    """

    setting: Setting
    direction: str
    ours: Contender
    product: Contender
    rivals: dict[str, Contender]
    parts: dict[str, Contender]
    rare: dict[str, Contender]
    agree: dict[str, Callable[[], np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A task's timings. `ours_beside` ran in turn with the rivals, `ours` with the product."""

    task: Task
    differences: dict[str, float]
    compile_s: float
    recompilations: int
    ours: Timing
    product: Timing
    parts: dict[str, Timing]
    ours_beside: Timing
    rivals: dict[str, Timing]


# --- the rivals


def _fit_scipy(t: np.ndarray, y: np.ndarray, lambda_: float) -> Evaluate:
    spline = make_smoothing_spline(t, y, lam=len(t) * lambda_)
    return lambda at, nu=0: spline(at, nu=nu)


def _fit_csaps(t: np.ndarray, y: np.ndarray, lambda_: float) -> Evaluate:
    smooth = 1 / (1 + len(t) * lambda_)
    # Its columns are the coordinates inside; it is fastest given them so.
    spline = csaps.CubicSmoothingSpline(t, y.T, smooth=smooth)
    return lambda at, nu=0: np.moveaxis(spline(at, nu=nu), -1, 0)


_RIVALS: dict[str, Fit] = {"SciPy": _fit_scipy, "csaps": _fit_csaps}


def _evaluate_natural(spline: Evaluate, t: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Evaluate the spline at `at`, continued in straight lines."""
    inside = np.clip(at, t[0], t[-1])
    values = spline(inside)
    outside = np.flatnonzero(at != inside)
    if outside.size:
        slopes = spline(inside[outside], 1)
        values[outside] += (at - inside)[outside, None] * slopes
    return values


def _rival(fit: Fit, problems: Sequence[tuple[np.ndarray, np.ndarray]], at, lambda_) -> Contender:
    """Fit each problem (sorted points, observations) and evaluate it at `at`."""

    def call():
        return [_evaluate_natural(fit(t, y, lambda_), t, at) for t, y in problems]

    return Contender(call)


# --- the tasks


def encode_task(setting: Setting, rng: np.random.Generator) -> Task:
    code = setting.code()
    x = _data(rng, setting.groups, setting.num_data, setting.coordinates)
    order = np.argsort(np.asarray(code.alpha))
    t = np.asarray(code.alpha, np.float64)[order]
    # All groups share the encoder, so the rivals get them as further coordinates of one fit.
    flat = np.ascontiguousarray(np.moveaxis(np.asarray(x, np.float64), 0, 1)[order])
    flat = flat.reshape(setting.num_data, -1)
    rivals = {
        name: _rival(fit, [(t, flat)], np.asarray(code.beta, np.float64), float(code.lambda_enc))
        for name, fit in _RIVALS.items()
    }

    if setting.groups == 1:
        x = x[0]
        ours = jax.jit(lambda code, x: code.encode(x))
    else:
        ours = jax.jit(encode_groups)
    matmul = jax.jit(jnp.matmul)
    build = jax.jit(lambda code: code.encoder_matrix())
    matrix = build(code)

    def ungroup(result: list[np.ndarray]) -> np.ndarray:
        grouped = result[0].reshape(setting.num_workers, setting.groups, -1)
        return np.moveaxis(grouped, 1, 0)

    agree = {"ours": lambda: _grouped(setting, ours(code, x))}
    agree |= {"product": lambda: _grouped(setting, matmul(matrix, x))}
    agree |= {name: lambda c=c: ungroup(c.call()) for name, c in rivals.items()}
    parts = {"matrix": Contender(lambda: _wait(build(code)))}
    if setting.groups == 1:
        parts["eager call"] = Contender(lambda x: _wait(code.encode(x)), _fresh(x))
    return Task(
        setting,
        "encode",
        Contender(lambda x: _wait(ours(code, x)), _fresh(x)),
        Contender(lambda x: _wait(matmul(matrix, x)), _fresh(x)),
        rivals,
        parts,
        {},
        agree,
    )


def decode_task(setting: Setting, rng: np.random.Generator) -> Task:
    code = setting.code()
    y = _data(rng, setting.groups, setting.num_workers, setting.coordinates)
    masks = setting.masks(rng)
    rivals = {
        name: _rival(
            fit,
            list(_surviving(np.asarray(code.beta), np.asarray(y), masks)),
            np.asarray(code.alpha, np.float64),
            float(code.lambda_dec),
        )
        for name, fit in _RIVALS.items()
    }

    ours, matrices, unchecked = _jitted_decoder(setting.groups)
    available = jnp.asarray(masks)
    given = jax.jit(jax.vmap(lambda mask: (code.decoder_matrix(mask), code.recovered(mask))))
    kept = functools.partial(jax.jit(decode_groups), code, available=available)
    kept = functools.partial(kept, given=Matrices(*_wait(given(available))))
    whole = y
    if setting.groups == 1:
        y, available = y[0], available[0]
    matmul = jax.jit(jnp.matmul)
    matrix = _wait(matrices(code, available))

    agree = {"ours": lambda: _grouped(setting, ours(code, y, available).predictions)}
    # A straggler's value meets a zero in the product, so finite ones do not change it.
    agree |= {"product": lambda: _grouped(setting, matmul(matrix, y))}
    agree |= {name: lambda c=c: np.stack(c.call()) for name, c in rivals.items()}
    new_sets = _new_sets(setting, rng)
    broken = y.at[(0,) * (y.ndim - 2) + (int(np.flatnonzero(masks[0])[0]), 0)].set(jnp.nan)
    parts = {
        "matrix": Contender(lambda m: _wait(matrices(code, m)), lambda: (next(new_sets),)),
        "matrix, product": Contender(
            lambda y, m: _wait(unchecked(code, y, m)), lambda: (_copy(y), next(new_sets))
        ),
        "matrix kept": Contender(lambda y: _wait(kept(y=y)), _fresh(whole)),
    }
    each = jax.jit(jax.vmap(code.try_decode)) if setting.groups > 1 else code.decode
    parts["jax.vmap" if setting.groups > 1 else "eager call"] = Contender(
        lambda y, m: _wait(each(y, m)), lambda: (_copy(y), next(new_sets))
    )
    return Task(
        setting,
        "decode",
        Contender(lambda y, m: _wait(ours(code, y, m)), lambda: (_copy(y), next(new_sets))),
        Contender(lambda y: _wait(matmul(matrix, y)), _fresh(y)),
        rivals,
        parts,
        {_BROKEN: Contender(lambda y: _wait(ours(code, y, available)), _fresh(broken))},
        agree,
    )


def _jitted_decoder(groups: int) -> tuple[Callable[..., Any], ...]:
    """Return functions for `Decoded`, for the matrix, and for the product with that."""
    if groups == 1:
        matrices = jax.jit(lambda code, available: code.decoder_matrix(available))
        decode = jax.jit(lambda code, y, available: code.try_decode(y, available))
    else:
        matrices = jax.jit(lambda code, available: jax.vmap(code.decoder_matrix)(available))
        decode = jax.jit(decode_groups)

    @jax.jit
    def unchecked(code, y, available):
        # With a leading axis for one group too, as in the library: XLA compiles that differently.
        y = y if groups > 1 else y[None]
        masks = available if groups > 1 else available[None]
        return jnp.matmul(jax.vmap(code.decoder_matrix)(masks), y)

    return decode, matrices, unchecked


def _surviving(
    beta: np.ndarray, y: np.ndarray, masks: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Return each group's answering workers, sorted along the line, in float64."""
    order = np.argsort(beta)
    for answers, mask in zip(y, masks, strict=True):
        kept = order[mask[order]]
        yield beta[kept].astype(np.float64), np.ascontiguousarray(answers[kept], np.float64)


def _new_sets(setting: Setting, rng: np.random.Generator) -> Iterator[jax.Array]:
    """Yield straggler sets without end, ready on the device."""
    while True:
        masks = setting.masks(rng)
        yield _wait(jnp.asarray(masks[0] if setting.groups == 1 else masks))


def _data(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, dtype=np.float32))


def _grouped(setting: Setting, result: jax.Array) -> np.ndarray:
    return np.asarray(result if setting.groups > 1 else result[None])


def _copy(x: jax.Array) -> jax.Array:
    return _wait(jnp.array(x, copy=True))


def _fresh(x: jax.Array) -> Callable[[], tuple[jax.Array]]:
    return lambda: (_copy(x),)


def _wait(result: Any) -> Any:
    return jax.block_until_ready(result)


# --- measuring


def measure(task: Task, counter: CompileCounter, repeats: int, slow_s: float) -> Measured:
    """Check that all agree, then time them; the first calls of ours compile."""
    _wait(task.product.call(*task.product.prepare()))
    arguments = task.ours.prepare()
    before = counter.seconds
    task.ours.call(*arguments)
    compile_s = counter.seconds - before

    differences = _check(task)
    for part in (task.parts | task.rare).values():
        part.call(*part.prepare())
    before = counter.compilations
    # At least _NEW_SETS calls, and each decoding call gets a straggler set of its own.
    close = {"ours": task.ours, "product": task.product} | task.parts
    close = interleaved({name: warmed(one) for name, one in close.items()}, repeats)
    for _ in range(_NEW_SETS - repeats):
        clock(task.ours)
    slow = {"ours": task.ours} | task.rivals | task.rare
    slow = {name: warmed(one) for name, one in slow.items()}
    beside = interleaved(slow, affordable(slow, slow_s, 51))
    return Measured(
        task,
        differences,
        compile_s,
        counter.compilations - before,
        close["ours"],
        close["product"],
        {name: close[name] for name in task.parts} | {name: beside[name] for name in task.rare},
        beside["ours"],
        {name: beside[name] for name in task.rivals},
    )


def _check(task: Task) -> dict[str, float]:
    """Return each contender's largest difference from SciPy (float64), over its largest value."""
    exact = task.agree["SciPy"]()
    others = {name: result() for name, result in task.agree.items() if name != "SciPy"}
    differences = {
        name: float(np.max(np.abs(value - exact)) / np.max(np.abs(exact)))
        for name, value in others.items()
    }
    _demand_agreement(f"{task.direction} {task.setting.name}", differences)
    return differences


def _demand_agreement(what: str, differences: dict[str, float]) -> None:
    for name, difference in differences.items():
        if not difference <= _AGREEMENT:
            sys.exit(
                f"{what}: {name} differs from SciPy by {difference:.1e} of the largest value, more "
                f"than {_AGREEMENT:.0e}; they do not compute the same thing, so nothing was timed"
            )


def careful_share(setting: Setting, sets: int) -> float:
    """Return the share of decoding calls that take the careful way with finite answers."""
    code, rng = setting.code(), np.random.default_rng(_SEED)
    steady = jax.jit(lambda masks: is_steady(jax.vmap(code.decoder_matrix)(masks)))
    return float(np.mean([not steady(setting.masks(rng)) for _ in range(sets)]))


@dataclasses.dataclass(frozen=True)
class Linear:
    """The O(n) form at one number of knots and coordinates."""

    knots: int
    coordinates: int
    difference: float
    ours: Timing
    scipy: Timing

    @property
    def ours_ns(self) -> float:
        return 1e9 * self.ours.median / self.knots

    @property
    def scipy_ns(self) -> float:
        return 1e9 * self.scipy.median / self.knots


def measure_linear(coordinates: int, repeats: int, slow_s: float) -> list[Linear]:
    """Time fits at all numbers of knots, in turn, so that drift cannot pass for growth."""
    fits = {knots: _linear_fits(knots, coordinates) for knots in _KNOTS}
    differences = {}
    for knots, (ours, scipy) in fits.items():
        exact = scipy.call()
        found = np.max(np.abs(np.asarray(ours.call(*ours.prepare())) - exact))
        differences[knots] = float(found / np.max(np.abs(exact)))
        _demand_agreement(f"{knots} knots, {coordinates} coordinates", {"ours": differences[knots]})
    timed = interleaved({str(knots): warmed(fits[knots][0]) for knots in _KNOTS}, repeats)
    slow = {str(knots): fits[knots][1] for knots in _KNOTS}
    beside = interleaved(slow, affordable(slow, slow_s, repeats))
    return [
        Linear(knots, coordinates, differences[knots], timed[str(knots)], beside[str(knots)])
        for knots in _KNOTS
    ]


def _linear_fits(knots: int, coordinates: int) -> tuple[Contender, Contender]:
    """Return our fit and SciPy's of a noisy wave on evenly spaced knots."""
    rng = np.random.default_rng(_SEED)
    t = jnp.linspace(-1, 1, knots, dtype=jnp.float32)
    noise = 0.1 * rng.standard_normal((knots, coordinates), dtype=np.float32)
    y = jnp.asarray(np.sin(20 * np.asarray(t))[:, None] + noise)
    # n lambda = (20 h)^4 / h: a weight of 1 per knot is 1 / h per unit of length.
    gap = 2 / (knots - 1)
    lambda_ = jnp.float32((20 * gap) ** 4 / gap / knots)
    t64, y64 = np.asarray(t, np.float64), np.asarray(y, np.float64)

    def fit_scipy():
        return make_smoothing_spline(t64, y64, lam=knots * float(lambda_))(t64)

    ours = Contender(lambda y: _wait(smoothing_spline(t, y, lambda_).values), _fresh(y))
    return ours, Contender(fit_scipy)


@dataclasses.dataclass(frozen=True)
class Gradient:
    """A smoothing spline's value, and its value and gradient in log lambda, at one number of knots.

    First calls are in CPU seconds, tracing and compiling included.
    """

    knots: int
    first_gradient_s: float
    first_hessian_s: float | None  # of the fewest knots only
    forward: Timing
    gradient: Timing


def measure_gradients(repeats: int) -> list[Gradient]:
    """Time the spline of a wave on Chebyshev points, forward and with its gradient, in turn."""
    found = []
    for knots in _GRADIENT_KNOTS:
        t = jnp.cos((2 * jnp.arange(knots) + 1) * jnp.pi / (2 * knots))
        y, log_lambda = jnp.sin(5 * t), jnp.log(1e-3)

        # The data are arguments, or XLA would work out at compile time what depends on them only.
        def loss(log_lambda: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
            return smoothing_spline(t, y, jnp.exp(log_lambda)).values @ jnp.cos(7 * t)

        forward, gradient = jax.jit(loss), jax.jit(jax.value_and_grad(loss))
        given, start = (log_lambda, t, y), time.process_time()
        _wait(gradient(*given))
        first, hessian = time.process_time() - start, None
        if knots == _GRADIENT_KNOTS[0]:
            start = time.process_time()
            _wait(jax.jit(jax.hessian(loss))(*given))
            hessian = time.process_time() - start
        calls = {
            name: warmed(Contender(lambda f=f, given=given: _wait(f(*given))))
            for name, f in (("forward", forward), ("gradient", gradient))
        }
        timed = interleaved(calls, repeats)
        found.append(Gradient(knots, first, hessian, timed["forward"], timed["gradient"]))
    return found


def gradient_lines() -> int:
    """Return the lines of StableHLO of a decode's gradient in the code and the answers."""
    code = SETTINGS[0].code()
    y, mask = jnp.ones((code.num_workers, 10)), jnp.ones(code.num_workers, bool)

    def loss(code: NeRCC, y: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.sum(code.decode(y, mask) ** 2)

    lowered = jax.jit(jax.grad(loss, allow_int=True)).lower(code, y, mask)
    return len(lowered.as_text().splitlines())


# --- telling


@dataclasses.dataclass(frozen=True)
class Target:
    """An aim, and what was measured."""

    text: str
    measured: float
    met: bool


def targets(
    measured: Sequence[Measured], linear: Sequence[Linear], gradients: Sequence[Gradient]
) -> list[Target]:
    found = []
    for one in measured:
        what = f"{one.task.direction} {one.task.setting.name}"
        if one.task.setting.coordinates == SETTINGS[0].coordinates:
            faster = one.rivals["SciPy"].ratio(one.ours_beside)
            found.append(Target(f"{what}: SciPy / ours >= 30", faster, faster >= 30))
            slower = one.ours.ratio(one.product)
            found.append(Target(f"{what}: ours / product <= 1.5", slower, slower <= 1.5))
        if one.task.direction == "decode" and one.task.setting.groups > 1:
            slower = one.parts["matrix kept"].ratio(one.product)
            found.append(Target(f"{what}: matrix kept / product <= 1.3", slower, slower <= 1.3))
    compilations = sum(one.recompilations for one in measured)
    text = f"compilations for {_NEW_SETS} or more new straggler sets each == 0"
    found.append(Target(text, compilations, compilations == 0))
    for coordinates, factor in _spreads(linear).items():
        text = f"O(n) form, coordinates: {coordinates}; slowest / fastest ns per knot <= 2"
        found.append(Target(text, factor, factor <= 2))
    for one in gradients:
        factor = one.gradient.ratio(one.forward)
        text = f"value and gradient / value, {one.knots:,} knots <= 1.3"
        found.append(Target(text, factor, factor <= 1.3))
        if (hessian := one.first_hessian_s) is not None:
            found.append(Target("first Hessian, CPU s <= 4", hessian, hessian <= 4))
    return found


def _spreads(linear: Sequence[Linear]) -> dict[int, float]:
    """Return for each number of coordinates the largest time per knot over the smallest."""
    factors = {}
    for coordinates in dict.fromkeys(one.coordinates for one in linear):
        per_knot = [one.ours_ns for one in linear if one.coordinates == coordinates]
        factors[coordinates] = max(per_knot) / min(per_knot)
    return factors


def code_table(measured: Sequence[Measured]) -> Table:
    table = Table(
        title="Encode and decode, ms (medians); (K, N, coordinates)",
        caption="x: median ratio of neighbouring calls; diff: from SciPy, by its largest value",
    )
    table.add_column("task")
    for name in ("ours", "product", "ours/\nproduct", "SciPy", "SciPy/\nours", "csaps"):
        table.add_column(name, justify="right")
    for name in ("csaps/\nours", "compile\ns", "diff\nours", "diff\ncsaps"):
        table.add_column(name, justify="right")
    for one in measured:
        scipy, csaps_ = one.rivals["SciPy"], one.rivals["csaps"]
        table.add_row(
            f"{one.task.direction} {one.task.setting.name}",
            _ms(one.ours),
            _ms(one.product),
            f"{one.ours.ratio(one.product):.2f}x",
            _ms(scipy),
            f"{scipy.ratio(one.ours_beside):.0f}x",
            _ms(csaps_),
            f"{csaps_.ratio(one.ours_beside):.0f}x",
            f"{one.compile_s:.2f}",
            f"{one.differences['ours']:.0e}",
            f"{one.differences['csaps']:.0e}",
        )
    return table


def detail_table(measured: Sequence[Measured], careful: dict[str, float]) -> Table:
    table = Table(
        title="Where the time goes, ms (medians)",
        caption="careful: share of calls whose decoder amplifies too much for a product",
    )
    table.add_column("task")
    names = (
        "product",
        "matrix",
        "matrix,\nproduct",
        "ours",
        "ours\np90",
        "matrix\nkept",
        "eager\ncall",
        "jax.vmap",
    )
    for name in (*names, "one answer\nNaN", "careful", "compilations\nafter"):
        table.add_column(name, justify="right")
    for one in measured:
        decodes = one.task.direction == "decode"
        table.add_row(
            f"{one.task.direction} {one.task.setting.name}",
            _ms(one.product),
            *(_ms(one.parts.get(name)) for name in ("matrix", "matrix, product")),
            _ms(one.ours),
            f"{1e3 * one.ours.quantile(0.9):.3g}",
            *map(_ms, map(one.parts.get, ("matrix kept", "eager call", "jax.vmap", _BROKEN))),
            f"{100 * careful[one.task.setting.name]:.0f} %" if decodes else "-",
            str(one.recompilations),
        )
    return table


def linear_table(linear: Sequence[Linear]) -> Table:
    table = Table(title="smoothing_spline(t, y, lambda).values, ns per knot (medians)")
    for name in ("knots", "coordinates", "ours", "SciPy", "SciPy/ours", "diff"):
        table.add_column(name, justify="right")
    for one in linear:
        table.add_row(
            f"{one.knots:,}",
            str(one.coordinates),
            f"{one.ours_ns:.0f}",
            f"{one.scipy_ns:.0f}",
            f"{one.scipy_ns / one.ours_ns:.1f}x",
            f"{one.difference:.0e}",
        )
    return table


def gradient_table(gradients: Sequence[Gradient]) -> Table:
    table = Table(title="smoothing_spline in log lambda, ms (medians)")
    for name in ("knots", "value", "value and gradient", "ratio", "first, CPU s"):
        table.add_column(name, justify="right")
    for one in gradients:
        ratio, first = one.gradient.ratio(one.forward), f"{one.first_gradient_s:.2f}"
        row = f"{one.knots:,}", _ms(one.forward), _ms(one.gradient), f"{ratio:.2f}x", first
        table.add_row(*row)
    return table


def target_table(found: Sequence[Target]) -> Table:
    table = Table(title="Targets")
    table.add_column("target")
    table.add_column("measured", justify="right")
    table.add_column("met")
    for one in found:
        met = "[green]yes[/green]" if one.met else "[bold red]no[/bold red]"
        table.add_row(one.text, f"{one.measured:.3g}", met)
    return table


def _ms(timing: Timing | None) -> str:
    return "-" if timing is None else f"{1e3 * timing.median:.3g}"


def as_json(
    measured: Sequence[Measured],
    linear: Sequence[Linear],
    gradients: Sequence[Gradient],
    careful: dict[str, float],
) -> dict[str, Any]:
    """Return all medians and ratios."""
    return {
        "tasks": [
            {
                **dataclasses.asdict(one.task.setting),
                "direction": one.task.direction,
                "difference_from_scipy": one.differences,
                "compile_s": one.compile_s,
                "compilations_after": one.recompilations,
                "ours": one.ours.summary(),
                "product": one.product.summary(),
                "parts": {name: timing.summary() for name, timing in one.parts.items()},
                "rivals": {name: timing.summary() for name, timing in one.rivals.items()},
                "ours_beside_rivals": one.ours_beside.summary(),
                "ours_by_product": one.ours.ratio(one.product),
                "rivals_by_ours": {n: r.ratio(one.ours_beside) for n, r in one.rivals.items()},
            }
            for one in measured
        ],
        "careful_share": careful,
        "linear": [
            {
                "knots": one.knots,
                "coordinates": one.coordinates,
                "difference_from_scipy": one.difference,
                "ours": one.ours.summary(),
                "scipy": one.scipy.summary(),
                "ours_ns_per_knot": one.ours_ns,
                "scipy_ns_per_knot": one.scipy_ns,
            }
            for one in linear
        ],
        "gradients": [
            {
                "knots": one.knots,
                "first_gradient_s": one.first_gradient_s,
                "first_hessian_s": one.first_hessian_s,
                "forward": one.forward.summary(),
                "gradient": one.gradient.summary(),
                "gradient_by_forward": one.gradient.ratio(one.forward),
            }
            for one in gradients
        ],
        "decode_gradient_lines": gradient_lines(),
        "spread_over_knots": {str(key): value for key, value in _spreads(linear).items()},
        "targets": [dataclasses.asdict(one) for one in targets(measured, linear, gradients)],
    }


def compare_ratios(measured: Sequence[Measured], path: Path) -> dict[str, dict[str, float]]:
    """Compare ours over the product with the smallest ratio of runs so far, and keep the smaller.

    A ratio of neighbouring calls depends little on the machine, so that a slower path shows.
    """
    stored = json.loads(path.read_text()).get("ratios", {}) if path.exists() else {}
    found = {}
    for one in measured:
        name, ratio = f"{one.task.direction} {one.task.setting.name}", one.ours.ratio(one.product)
        before = stored.get(name, {}).get("smallest", ratio)
        found[name] = {"now": ratio, "smallest": min(ratio, before)}
        verdict = "SLOWER by more than 15 %" if ratio > 1.15 * before else "as before"
        print(f"{name}: ours / product {ratio:.2f}, {before:.2f} at best before: {verdict}")
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="few repeats; writes no results")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for coding.json (default: results beside this script)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", False)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    start = environment(_PACKAGES)
    repeats, slow_s = (9, 1.0) if arguments.quick else (101, 8.0)
    counter = CompileCounter()

    measured = []
    for setting in SETTINGS:
        for make in (encode_task, decode_task):
            task = make(setting, np.random.default_rng(_SEED))
            console.log(f"{task.direction} {setting.name}")
            measured.append(measure(task, counter, repeats, slow_s))
    careful = {s.name: careful_share(s, 10 if arguments.quick else _NEW_SETS) for s in SETTINGS}
    linear = []
    for coordinates in _KNOT_COORDINATES:
        console.log(f"O(n) form, coordinates: {coordinates}")
        linear += measure_linear(coordinates, min(repeats, 25), slow_s)

    console.log("gradients in lambda")
    gradients = measure_gradients(min(repeats, 51))

    tables = code_table(measured), detail_table(measured, careful), linear_table(linear)
    found = targets(measured, linear, gradients)
    for table in (*tables, gradient_table(gradients), target_table(found)):
        console.print(table)
    versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
    machine = f"{start['cpu']}, {start['cores']} cores, float32, Python {start['python']}"
    folder = arguments.output or Path(__file__).parent / "results"
    ratios = compare_ratios(measured, folder / "coding.json")
    loads = f"load average {start['load_average'][0]:.1f} before, {os.getloadavg()[0]:.1f} after"
    console.print(f"{machine}; {versions}; {loads}")
    if arguments.quick and arguments.output is None:
        return
    content = as_json(measured, linear, gradients, careful) | {"ratios": ratios}
    after = {"load_average_after": list(os.getloadavg()), "dtype": "float32"}
    write_json(folder / "coding.json", {"environment": start | after, **content})
    console.print(f"wrote {folder / 'coding.json'}")


if __name__ == "__main__":
    main()
