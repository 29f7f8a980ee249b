"""Gradient descent on the nested objective, through encoder, model and decoder."""

import dataclasses
import functools
import itertools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray, PyTree, Shaped

from ..arrays import check_fields, check_not_negative, check_positive
from ..codes import AbstractCode
from ..codes.trees import groups_of, join, to_device
from ..evaluation.criteria import Criterion
from ..evaluation.objective import draw_sets, make_trial
from ..inference.models import Model, check_model
from ..stragglers import AbstractStragglers
from ._parameters import Code, Parameters, parametrize
from ._sampling import Sampling, split_points


@dataclasses.dataclass(frozen=True)
class Descent:
    """The length and speed of a descent, and how often it is judged.

    Attributes:
        steps: The most gradient steps.
        learning_rate: The highest learning rate of Adam; it falls to zero along a cosine.
        points_rate: The regression points' learning rate, relative to `learning_rate`: a shift of
            0.1 moves a point by a tenth of a gap, where a logarithm of 0.1 changes a lambda by a
            tenth.
        check_every: Steps between judgements on the held-out part; the last step is judged, too.
        tolerance: The descent has converged if the best judgement of its last quarter is at most
            this share below the best one before.

    Raises:
        ValueError: A number is out of range.
    """

    steps: int = 400
    learning_rate: float = 0.3
    points_rate: float = 0.1
    check_every: int = 10
    tolerance: float = 0.01

    def __post_init__(self):
        check_positive(learning_rate=self.learning_rate, points_rate=self.points_rate)
        check_not_negative(tolerance=self.tolerance)
        check_fields(self, "steps", "check_every")


@dataclasses.dataclass(frozen=True)
class TuningStep:
    """One step: its number, and the objective on the groups it drew.

    `start` is the number of the start of its descent. `held_out` is the objective on the held-out
    groups, in steps that judged it; the last entry only judges. A `rejected` step had an objective
    or a gradient that was not finite, and changed nothing.
    """

    start: int
    step: int
    objective: float | None
    held_out: float | None
    rejected: bool


@dataclasses.dataclass(frozen=True)
class Tuned(Generic[Code]):
    """The result of `tune`: the code with the best objective on the held-out groups.

    Attributes:
        code: The code.
        objective: Its objective relative to the starting code's, which is 1.
        converged: Whether the best judgement on the held-out groups in the last quarter of its
            descent was at most `Descent.tolerance` below the best one before. (A learning rate that
            falls to zero also ends all progress: compare with more steps.)
        history: The entries of all steps, start after start.
        start: The number of the start of the descent that found the code.
        seconds: The time that tuning took.
    """

    code: Code
    objective: float
    converged: bool
    history: tuple[TuningStep, ...]
    start: int
    seconds: float

    @property
    def rejected(self) -> int:
        """Return the number of rejected steps."""
        return sum(step.rejected for step in self.history)


def tune(
    model: Model,
    code: Code | Sequence[Code],
    x: PyTree[Shaped[ArrayLike, "points ..."]],
    stragglers: Mapping[str, AbstractStragglers],
    *,
    key: PRNGKeyArray,
    points: bool = True,
    optimizer: optax.GradientTransformation | Literal["adam", "lbfgs"] = "adam",
    criterion: Criterion = "mse",
    sampling: Sampling = Sampling(),  # noqa: B008
    descent: Descent = Descent(),
    on_step: Callable[[TuningStep, Code], None] = lambda step, code: None,
) -> Tuned[Code]:
    """Tune a code by gradient descent on the nested objective; it needs no labels.

    One code is tuned for all laws together, on its error under each relative to the starting code's
    (`make_trial`). The tuned numbers are `lambda_enc`, `lambda_dec` and `end_penalty`, as
    logarithms, and `gap_exponent`; with `points`, also the regression points, whose order stays.
    Codes with only some of these numbers are tuned in those, and a code of your own in the fields
    that it declares by `eqx.field(metadata={"tune": "log"})`, for positive numbers, or "plain". A
    step whose objective or gradient is not finite is rejected; a RuntimeWarning counts them. The
    same `key` gives the same result.

    The objective has many local minima, and the start of the points decides in which one a descent
    ends. With `points`, the worker nearest to each data point is first moved onto its point; if you
    give a sequence of codes, each starts from its own points. Every start costs a descent, and all
    of them share one compilation. Laws under which the first code makes no error (such as no
    stragglers for an `exact` code) are left out.

    Args:
        model: A differentiable function of a batch, (B, ...) to (B, outputs...).
        code: The code to tune; or a sequence of starts with the same K and N, where errors are
            relative to the first.
        x: Unlabelled data points. On some, which are held out, the code is judged; each step draws
            its groups of K from the others (`Sampling`).
        stragglers: Laws by name.
        key: Random key.
        points: Whether the regression points are tuned. With False, only the lambdas are, as in the
            paper, and `end_penalty` and `gap_exponent`.
        optimizer: "adam" (with the rates of `descent`); any optax transformation, for all
            parameters; or "lbfgs", which descends more precisely on one draw of four times the
            groups and twice the sets of a step: start it from a code that another has found.
        criterion: As in `nested_objective`. Labels may gain more from "mse": LeNet5 on digits, (N,
            K, S) = (30, 20, 5), 60 steps from one key, 400 straggler sets, kept 93.8 % of them with
            interleaved points (92.3 % untuned) and 90.9 % with repeated ones (91.2 %), and by
            "cross_entropy" 91.6 and 82.6 %, each within 2.5 % (95 %).
        sampling: The groups and sets that a step draws, and the held-out part.
        descent: Length, speed and judgements; its learning rate is for the logarithms of the
            lambdas.
        on_step: Called with each entry of the history, and the code before that step.

    Returns:
        The code with the best held-out objective, the starting ones included.

    Raises:
        ValueError: There are too few data points, they are not finite, numbers are out of range,
            the model is in training mode, starts differ in more than their numbers, or the code has
            nothing to tune or makes no error; and as `make_trial`.

    Source: arXiv 2402.04377, which tunes the lambdas on this objective.
    """
    begun = time.perf_counter()
    check_model(model)
    if isinstance(optimizer, str) and optimizer not in ("adam", "lbfgs"):
        raise ValueError(
            f"optimizer must be 'adam', 'lbfgs' or an optax transformation, not {optimizer!r}"
        )
    alone = isinstance(code, AbstractCode)
    codes = (code,) if alone else tuple(code)
    if not codes:
        raise ValueError("there is no code to start from")
    first = codes[0]
    codes = (_on_data_points(first),) if alone and points else codes
    parametrized = [parametrize(each, points=points) for each in codes]
    # All that is no array is in the program, which all starts share.
    if not eqx.tree_equal(*[eqx.filter(each, eqx.is_array, inverse=True) for each in parametrized]):
        raise ValueError("several starts must be codes of one kind, with the same K and N")
    k = first.num_data
    training, held = split_points(x, k, sampling, jax.random.fold_in(key, 0))
    training, held = to_device(training), groups_of(held, k)
    key_held, key_steps = jax.random.split(jax.random.fold_in(key, 1))
    trial = make_trial(
        model, first, held, stragglers, key=key_held, num_sets=sampling.held_out_sets,
        criterion=criterion,
    )  # fmt: skip
    # An error below this share of the outputs' variance is rounding, and gives no unit.
    own = join(trial.originals, 2)[0]
    errs = trial.scales > 1e-9 * jnp.var(own, axis=(0, 1)).mean()
    if not errs.any():
        raise ValueError("there is nothing to gain: the starting code makes no error")
    trial = eqx.tree_at(lambda t: t.scales, trial, jnp.where(errs, trial.scales, jnp.inf))

    best, lowest, winner = first, 1.0, 0
    history: list[TuningStep] = []

    def visit(
        start: int, parameters: Parameters, step: int, objective: float | None, rejected: bool
    ) -> None:
        """Record a step, and judge the code before it in every `check_every`-th step."""
        nonlocal best, lowest, winner
        here, held_out = parametrized[start][1](parameters), None
        if step % descent.check_every == 0 or objective is None:
            held_out = float(trial.errors(model, here)[1])
            if held_out < lowest:
                best, lowest, winner = here, held_out, start
        history.append(TuningStep(start, step, objective, held_out, rejected))
        on_step(history[-1], here)

    if optimizer == "lbfgs":
        groups, sets = 4 * sampling.groups_per_step, 2 * sampling.sets_per_step
        sampling = dataclasses.replace(sampling, groups_per_step=groups, sets_per_step=sets)
    # `eqx.filter_jit` would keep the programs until the process ends, and those of some forty
    # descents map more pieces of memory than a process may have.
    given = [(rebuild, model, training, trial) for _, rebuild in parametrized]
    starts, rests = zip(*[eqx.partition(each, eqx.is_array) for each in given], strict=True)
    objective = functools.partial(_objective, sampling, stragglers, rests[0])
    if optimizer == "lbfgs":
        descend = _descent_by_lbfgs(objective, descent)
    else:
        chosen: Any = optimizer
        if optimizer == "adam":
            rates, most = {"numbers": 1.0, "shifts": descent.points_rate}, descent.learning_rate
            adams: Any = {
                kind: optax.adam(optax.cosine_decay_schedule(rate * most, descent.steps))
                for kind, rate in rates.items()
            }
            free = parametrized[0][0]
            kinds = {n: "shifts" if n.endswith("_shifts") else "numbers" for n in free}
            chosen = optax.partition(adams, kinds)
        descend = _descent_by_steps(objective, chosen, descent)
    for start, (parameters, _) in enumerate(parametrized):
        descend(parameters, starts[start], key_steps, functools.partial(visit, start))
    taken = [each for each in history if each.objective is not None]
    if rejected := sum(each.rejected for each in taken):
        warnings.warn(
            f"{rejected} of {len(taken)} steps were rejected: their objective or gradient was not "
            "finite",
            RuntimeWarning,
            stacklevel=2,
        )
    # Whether the last quarter of the judgements improved the objective only a little.
    judged = [(each.start, each.held_out) for each in history if each.held_out is not None]
    seen = np.nan_to_num([height for start, height in judged if start == winner], nan=np.inf)
    before = np.min(seen[: len(seen) - max(len(seen) // 4, 1)], initial=np.inf)
    converged = np.isfinite(before) and before - np.min(seen) <= descent.tolerance * before
    return Tuned(
        code=best,
        objective=lowest,
        converged=bool(converged),
        history=tuple(history),
        start=winner,
        seconds=time.perf_counter() - begun,
    )


def _on_data_points(code: Code) -> Code:
    """Return a code with a worker on each data point, if it has points and enough workers."""
    alpha, beta = (getattr(code, name, None) for name in ("alpha", "beta"))
    if alpha is None or beta is None or code.num_workers < code.num_data:
        return code
    angles = [np.arccos(np.asarray(each, np.float64)) for each in (alpha, beta)]
    distances = np.abs(angles[0][:, None] - angles[1])
    moved = np.array(beta)
    for _ in range(code.num_data):
        data_point, worker = np.unravel_index(np.argmin(distances), distances.shape)
        moved[worker] = alpha[data_point]
        distances[data_point], distances[:, worker] = np.inf, np.inf
    return eqx.tree_at(lambda c: c.beta, code, jnp.asarray(moved))


def _objective(
    sampling: Sampling,
    stragglers: Mapping[str, AbstractStragglers],
    rest: PyTree,
    parameters: Parameters,
    arrays: PyTree,
    key: PRNGKeyArray,
) -> Float[Array, ""]:
    """Return the objective on groups and straggler sets that are drawn by a key."""
    rebuild, model, training, trial = eqx.combine(arrays, rest)
    key_groups, key_sets = jax.random.split(key)
    code = rebuild(parameters)
    chosen = sampling.draw(code.num_data, training, key_groups)
    available, law = draw_sets(stragglers, key_sets, code.num_workers, sampling.sets_per_step)
    fresh = dataclasses.replace(trial, x=chosen, originals=None, available=available, law=law)
    return fresh.errors(model, code)[1]


def _descent_by_steps(
    objective: Callable[..., Float[Array, ""]],
    optimizer: optax.GradientTransformation,
    descent: Descent,
) -> Callable[..., None]:
    """Return a descent that draws each step's objective; all starts share a program.

    It calls `note` with the parameters, the number and the objective of each step, and whether the
    step is rejected.
    """
    # A step whose objective or gradient is not finite changes nothing.
    optimizer = optax.apply_if_finite(optimizer, max_consecutive_errors=descent.steps)

    @jax.jit
    def step(
        parameters: Parameters, state: Any, arrays: PyTree, key: PRNGKeyArray, number: Array
    ) -> tuple[Float[Array, ""], Bool[Array, ""], Parameters, Any]:
        drawn = jax.random.fold_in(key, number)
        value, slopes = jax.value_and_grad(objective)(parameters, arrays, drawn)
        # If the objective is not finite, no parameter may move, whatever its gradient.
        slopes = jax.tree.map(lambda slope: jnp.where(jnp.isfinite(value), slope, jnp.nan), slopes)
        finite = [jnp.all(jnp.isfinite(slope)) for slope in jax.tree.leaves(slopes)]
        updates, state = optimizer.update(slopes, state, parameters)
        return value, jnp.all(jnp.stack(finite)), optax.apply_updates(parameters, updates), state

    def descend(
        parameters: Parameters, arrays: PyTree, key: PRNGKeyArray, note: Callable[..., None]
    ) -> None:
        state = optimizer.init(parameters)
        for number in range(descent.steps):
            value, sound, after, state = step(parameters, state, arrays, key, jnp.asarray(number))
            note(parameters, number, float(value), not sound)
            parameters = after
        note(parameters, descent.steps, None, False)

    return descend


def _descent_by_lbfgs(
    objective: Callable[..., Float[Array, ""]], descent: Descent
) -> Callable[..., None]:
    """Return a descent on one draw by SciPy's L-BFGS-B: see `_descent_by_steps`.

    Its line search is on the host, and compiles once. (That of `optax.lbfgs` takes two minutes.)
    """
    value_and_grad = jax.jit(jax.value_and_grad(objective))

    def descend(
        parameters: Parameters, arrays: PyTree, key: PRNGKeyArray, note: Callable[..., None]
    ) -> None:
        import scipy.optimize  # installed with JAX

        flat, unravel = ravel_pytree(parameters)
        start, taken = np.asarray(flat, np.float64), itertools.count(1)

        def on_host(z: Float[np.ndarray, " numbers"]) -> tuple[float, np.ndarray]:
            here = unravel(jnp.asarray(z, flat.dtype))
            value, slopes = value_and_grad(here, arrays, key)
            slopes = np.asarray(ravel_pytree(slopes)[0], np.float64)
            sound = np.isfinite(float(value)) and np.isfinite(slopes).all()
            # The line search turns back from a value that is not finite.
            return (float(value), slopes) if sound else (np.finfo(float).max, np.zeros_like(slopes))

        def after(intermediate_result: Any) -> None:
            here, step = unravel(jnp.asarray(intermediate_result.x, flat.dtype)), next(taken)
            value = float(intermediate_result.fun) if step < descent.steps else None
            note(here, step, value, False)

        known = on_host(start)
        note(parameters, 0, known[0], False)
        found = scipy.optimize.minimize(
            lambda z: known if np.array_equal(z, start) else on_host(z),  # it begins with the start
            start, jac=True, method="L-BFGS-B", callback=after, options={"maxiter": descent.steps},
        )  # fmt: skip
        if found.nit < descent.steps:  # it found no way down
            note(unravel(jnp.asarray(found.x, flat.dtype)), found.nit + 1, None, False)

    return descend
