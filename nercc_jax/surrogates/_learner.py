"""A learner from past answers: a Gaussian process on a window of pairs (input, answer).

With the window's features H and residuals r = y - m(x) of its answers, the prediction at x is

    mean(x) = m(x) + c + k(x, H) A^-1 (r - c),   A = k(H, H) + noise,
    variance(x) = scale^2 spread^2 (k(x, x) + noise - k(x, H) A^-1 k(H, x)),

a Gaussian process's posterior, with m the prior mean and c the mean residual. spread^2 is the
variance of the residuals, and `scale` is what leave-one-out errors ask for (`tune_learner`). The
equations are solved for the points and not for the outputs, of which there may be thousands.

Source: Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", section 2.2.
"""

from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Shaped

from ..codes._checks import check_count
from ..codes._products import multiply
from ..codes._trees import Form, check_floats, join
from ._interface import (
    AbstractGroupPrior,
    AbstractLearner,
    SurrogatePredictions,
    outputs_of_groups,
)
from ._kernels import Kernel, Shape, safe_sqrt, wide_kernel
from ._pairs import (
    Function,
    features_of,
    length_of,
    next_rows,
    one_row,
    pairs_of,
    prior_of_groups,
    write_rows,
)
from ._surrogate import trust
from ._whitening import cholesky_factor, condition, replace_rows, sound_or_anew, soundly_whitened

# Beyond this share of the window a new factor is cheaper than replacing its rows.
_MANY = 0.25
# By how much of its right side a solution may miss it before a factor whose rows were replaced is
# made anew. Its error grows from one replacement to the next, to tenfold at once: near 0.01 two
# labels in three were wrong, near 0.001 one in four (a smooth function of four numbers, noise 1e-4,
# 32 rows at once).
_WORN = 2e-5
# By how much a solution may miss the answers themselves, in units of the noise's deviation. What it
# misses is what predictions are off by: up to 0.6, errors of Lotka-Volterra's equations and of an
# epidemic were at most 1.02 times those of exact solutions, 2.0 times near 9, 6.6 times near 28,
# where the error above was 1.9e-5 (160 replacements of 32 rows).
_MISSED = 0.5
_MIXED = 8  # mixtures of the outputs that this is looked at for

L = TypeVar("L", bound="Learner")


class GaussianGroupPrior(AbstractGroupPrior):
    """A Gaussian process on groups' data points and coded data points, in this order.

    Attributes:
        mean: The means, given the window.
        covariance: The covariances within each group, in units of the process's variance.
        noise: The variance of the noise, in the same units.
        unit: The process's standard deviation in units of the outputs; infinite where it is
            unknown.
        form: The structure of the outputs.
    """

    mean: Float[Array, "groups points m"]
    covariance: Float[Array, "groups points points"]
    noise: Float[Array, " groups"]
    unit: Float[Array, " groups"]
    form: Form = eqx.field(static=True)

    def condition(
        self,
        y: Float[Array, "groups num_workers m"],
        responded: Bool[Array, "groups num_workers"],
    ) -> SurrogatePredictions:
        known, white = jax.vmap(_whiten_group)(self.covariance, self.noise, responded)
        mean, variance = jax.vmap(_posterior)(
            self.mean, self.covariance, self.noise, known, white, y, responded
        )
        num_data = mean.shape[1] - y.shape[1]
        deviation = self.unit[:, None] * safe_sqrt(variance[:, :num_data])
        return SurrogatePredictions(mean[:, :num_data], mean[:, num_data:], deviation)


def _whiten_group(
    covariance: Float[Array, "points points"],
    noise: Float[Array, ""],
    responded: Bool[Array, " num_workers"],
) -> tuple[Float[Array, "num_workers points"], Float[Array, "num_workers num_workers"]]:
    """Return L^-1 C and L^-1, with L the factor of the answers' covariances.

    C are the covariances of the answers that came with all points of the group.
    """
    num_workers = len(responded)
    cross = jnp.where(responded[:, None], covariance[-num_workers:], 0)
    own = jnp.where(responded, cross[:, -num_workers:], 0) + jnp.diag(
        jnp.where(responded, noise, 1)
    )
    factor, _ = cholesky_factor(own)
    right = jnp.concatenate([cross, jnp.eye(num_workers, dtype=cross.dtype)], axis=1)
    both = jax.lax.linalg.triangular_solve(factor, right, left_side=True, lower=True)
    return both[:, : len(covariance)], both[:, len(covariance) :]


def _posterior(
    mean: Float[Array, "points m"],
    covariance: Float[Array, "points points"],
    noise: Float[Array, ""],
    known: Float[Array, "num_workers points"],
    white: Float[Array, "num_workers num_workers"],
    y: Float[Array, "num_workers m"],
    responded: Bool[Array, " num_workers"],
) -> tuple[Float[Array, "points m"], Float[Array, " points"]]:
    """Return one group's posterior mean and variance, noise included."""
    residual = jnp.where(responded[:, None], y.astype(mean.dtype) - mean[-len(responded) :], 0)
    variance = jnp.maximum(jnp.diagonal(covariance) - jnp.sum(known**2, axis=0), 0) + noise
    return mean + multiply(known.T, multiply(white, residual)), variance


class Learner(AbstractLearner):
    """A Gaussian process on past answers: a pytree of bounded size that forgets the oldest pairs.

    `update` and `predict` are pure, and may be jitted, vmapped and differentiated.

    >>> import jax.numpy as jnp
    >>> from nercc_jax.surrogates import init_learner
    >>> x = jnp.linspace(-1, 1, 20)[:, None]
    >>> learner = init_learner(x, jnp.sin(3 * x), capacity=64)
    >>> learner = learner.update(x + 0.05, jnp.sin(3 * (x + 0.05)))
    >>> mean, deviation = learner.predict(jnp.array([[0.33]]))
    >>> mean.shape, deviation.shape
    ((1, 1), (1,))

    Attributes:
        features: A function of a batch that returns what inputs are compared by (a projection, a
            student's inner layer); None for the inputs' own floats.
        prior: A function of a batch that returns the mean before any answer (a student); None for
            none. The mean residual is subtracted in addition.
        kernel: The covariance function; `fit_learner` tunes it.
        scale: The factor of deviations; `fit_learner` tunes it.
        theta: See `AbstractSurrogate`.
        kappa: See `AbstractSurrogate`. Default: infinite, the learner alone, which knows the
            group's answers, too.
        inputs: Features of the window's pairs.
        residuals: Answers of the window's pairs less the prior.
        priors: The prior's outputs at the window's pairs, if there is a prior.
        filled: Which rows of the window hold a pair.
        place: The row that is written next.
        covariance: The covariances of the window's pairs.
        whitening: Their whitening matrix (`_whitening.py`).
        jitter: What was added to the noise so that float32 could solve.
        error: By how much of its right side a solution missed it before it was refined, when last
            measured. Above 2e-5 the factor is made again.
        form: The structure of the outputs.
        version: The model version of the answers. Answers of another one are refused.
    """

    features: Function | None
    prior: Function | None
    kernel: Kernel
    scale: Float[Array, ""]
    theta: Float[Array, ""]
    kappa: Float[Array, ""]
    inputs: Float[Array, "capacity features"]
    residuals: Float[Array, "capacity m"]
    priors: Float[Array, "capacity m"] | None
    filled: Bool[Array, " capacity"]
    place: Int[Array, ""]
    covariance: Float[Array, "capacity capacity"]
    whitening: Float[Array, "capacity capacity"]
    jitter: Float[Array, ""]
    error: Float[Array, ""]
    form: Form = eqx.field(static=True)
    version: str = eqx.field(static=True)

    def __init__(
        self,
        kernel: Kernel,
        form: Form,
        *,
        capacity: int = 1024,
        features: Function | None = None,
        prior: Function | None = None,
        theta: Float[ArrayLike, ""] = 1.0,
        kappa: Float[ArrayLike, ""] = np.inf,
        version: str = "",
    ):
        """Make an empty learner; `init_learner` finds kernel and form from the first pairs.

        Raises:
            ValueError: The capacity is no positive integer.
        """
        capacity = check_count("capacity", capacity)
        self.features, self.prior, self.kernel = features, prior, kernel
        self.form, self.version = form, str(version)
        self.theta, self.kappa = trust(theta, kappa)
        dtype = kernel.centre.dtype
        outputs = jnp.result_type(jnp.float32, *form.dtypes)
        self.scale = jnp.ones((), dtype)
        self.inputs = jnp.zeros((capacity, len(kernel.centre)), dtype)
        self.residuals = jnp.zeros((capacity, form.size), outputs)
        self.priors = None if prior is None else jnp.zeros_like(self.residuals)
        self.filled, self.place = jnp.zeros(capacity, bool), jnp.zeros((), jnp.int32)
        self.covariance = self.whitening = jnp.eye(capacity, dtype=dtype)
        self.jitter = self.error = jnp.zeros((), dtype)

    @property
    def capacity(self) -> int:
        """Return the most pairs that the window holds."""
        return len(self.filled)

    @property
    def size(self) -> Int[Array, ""]:
        """Return the number of pairs in the window."""
        return jnp.sum(self.filled)

    def update(
        self: L,
        x: PyTree[Shaped[Array, "pairs ..."]],
        y: PyTree[Float[Array, "pairs ..."]],
        observed: Bool[Array, " pairs"] | None = None,
        *,
        version: str | None = None,
    ) -> L:
        """Return the learner that knows these pairs, too; see `AbstractLearner.update`.

        For answers of another version of the model, `restart` first.
        """
        if version is not None and version != self.version:
            raise ValueError(
                f"these are answers of version {version!r}; the learner knows version "
                f"{self.version!r}: start anew with `learner.restart({version!r})`"
            )
        x, y = jax.tree.map(jnp.asarray, (x, y))
        learned, places = self._with_pairs(x, y, observed)
        if len(places) > _MANY * self.capacity:
            return learned.refactorized()
        return learned._replaced(places)

    def predict(
        self, x: PyTree[Shaped[ArrayLike, "points ..."]]
    ) -> tuple[PyTree[Float[Array, "points ..."]], Float[Array, " points"]]:
        """Return the mean, in the structure of the model's outputs, and each point's deviation.

        The deviation is a standard deviation of an answer (noise included) in units of the outputs:
        the root mean square over all of them. It is infinite where the window is empty; the mean is
        then the prior's, or 0.
        """
        x = jax.tree.map(jnp.asarray, x)
        z = features_of(self.features, x)
        mean, covariance = self.window_posterior(z[:, None])
        variance = jnp.maximum(covariance[:, 0, 0], 0) + self.kernel.noise
        mean = mean[:, 0]
        if self.prior is not None:
            mean = mean + join(self.prior(x), 1)[0]
        return self.form.split(mean), self.deviation_of(variance)

    def group_prior(
        self,
        x: PyTree[Shaped[Array, "groups num_data ..."]],
        coded: PyTree[Shaped[Array, "groups num_workers ..."]],
        own: PyTree[Float[Array, "groups num_data ..."]] | None = None,
    ) -> GaussianGroupPrior:
        # Means by themselves do not do: data points go with their group's answers.
        x, coded = jax.tree.map(jnp.asarray, (x, coded))
        together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), x, coded)
        z = outputs_of_groups(lambda points: features_of(self.features, points), together)
        mean, covariance = self.window_posterior(z)
        if self.prior is not None:
            mean = mean + prior_of_groups(self.prior, together, self.form)
        groups = len(z)
        noise, unit = self.kernel.noise, self.deviation_of(jnp.ones(()))
        noise, unit = (jnp.broadcast_to(each, (groups,)) for each in (noise, unit))
        return GaussianGroupPrior(
            mean=mean, covariance=covariance, noise=noise, unit=unit, form=self.form
        )

    @eqx.filter_jit
    def window_posterior(
        self, z: Float[Array, "groups points features"]
    ) -> tuple[Float[Array, "groups points m"], Float[Array, "groups points points"]]:
        """Return the posterior of points in groups, given the window.

        Args:
            z: The points' features.

        Returns:
            The residuals' means, and their covariances within each group, without noise and in
                units of the process's variance.
        """
        groups, points, features = z.shape
        cross = self.kernel(z.reshape(-1, features), self.inputs) * self.filled
        weights, known = condition(
            self.covariance, jax.lax.stop_gradient(self.whitening), cross, groups
        )
        total = jnp.sum(weights, axis=1)[:, None]  # unfilled rows have none
        mean = multiply(weights, self.residuals) + (1 - total) * self._centre()
        covariance = jax.vmap(self.kernel)(z, z) - known
        return mean.reshape(groups, points, -1), covariance

    @eqx.filter_jit
    def left_out(self) -> tuple[Float[Array, "capacity m"], Float[Array, " capacity"]]:
        """Return the errors of predicting each pair of the window from the others, and deviations.

        The factor that is there gives all of them at once, as in `leave_one_out`.
        """
        weights, _ = self.mean_weights()
        precision = jnp.sum(jax.lax.stop_gradient(self.whitening) ** 2, axis=0)
        return -weights / precision[:, None], self.deviation_of(1 / precision)

    def mean_weights(self) -> tuple[Float[Array, "capacity m"], Float[Array, " m"]]:
        """Return the weights of covariances with the window's pairs in a mean, and its constant."""
        centred, whitening = self._centred(), jax.lax.stop_gradient(self.whitening)
        weights, _ = condition(self.covariance, whitening, centred.T, centred.shape[1])
        return weights.T, self._centre()

    def spread(self) -> Float[Array, ""]:
        """Return the residuals' standard deviation over window and outputs; NaN for none."""
        square = self._centred() ** 2
        count = self.size * self.residuals.shape[1]
        return jnp.where(self.size > 0, safe_sqrt(jnp.sum(square) / jnp.maximum(count, 1)), jnp.nan)

    def deviation_of(self, variance: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return a standard deviation in units of the outputs, from the process's variance."""
        return jnp.where(self.size > 0, self.scale * self.spread() * safe_sqrt(variance), jnp.inf)

    def with_kernel(self: L, kernel: Kernel, scale: Float[ArrayLike, ""] = 1.0) -> L:
        """Return the same window with another kernel."""
        numbers = kernel, jnp.asarray(scale, self.scale.dtype)
        changed = eqx.tree_at(lambda learner: (learner.kernel, learner.scale), self, numbers)
        return changed.refactorized()

    def restart(self: L, version: str) -> L:
        """Return an empty learner with the same settings, for another version of the model."""
        fresh = type(self)(
            self.kernel,
            self.form,
            capacity=self.capacity,
            features=self.features,
            prior=self.prior,
            theta=self.theta,
            kappa=self.kappa,
            version=version,
        )
        return eqx.tree_at(lambda learner: learner.scale, fresh, self.scale)

    def refactorized(self: L) -> L:
        """Return the same learner with its covariances and their factor computed again."""
        return self._with_factor(*_factored(self.kernel, self.inputs, self.filled))

    def _with_pairs(
        self: L, x: PyTree, y: PyTree, observed: Bool[Array, " pairs"] | None = None
    ) -> tuple[L, Int[Array, " b"]]:
        """Return the learner with these pairs but the old factor, and their rows."""
        z, r, priors, known = pairs_of(self.features, self.prior, self.form, x, y, observed)
        if z.shape[1:] != self.inputs.shape[1:]:
            raise ValueError(
                f"x have {z.shape[1]} features; the learner knows {self.inputs.shape[1]}"
            )
        places, count, source = next_rows(known, self.place, self.capacity)
        fresh = jnp.arange(len(places)) < count
        rows = (places, fresh, source)
        inputs, residuals = write_rows(self.inputs, z, *rows), write_rows(self.residuals, r, *rows)
        filled = self.filled.at[places].max(fresh)
        learned = eqx.tree_at(
            lambda learner: (learner.inputs, learner.residuals, learner.filled, learner.place),
            self,
            (inputs, residuals, filled, (self.place + count) % self.capacity),
        )
        if priors is not None and self.priors is not None:
            known = write_rows(self.priors, priors, *rows)
            learned = eqx.tree_at(lambda learner: learner.priors, learned, known)
        return learned, places

    def _replaced(self: L, places: Int[Array, " b"]) -> L:
        """Return the learner with covariances and factor updated for the written rows."""
        known = self.filled[:, None] & self.filled[places]
        own = jnp.arange(self.capacity)[:, None] == places
        new = self.inputs[places]
        columns = jnp.where(known, self.kernel(self.inputs, new), 0)
        diagonal = jnp.where(
            self.filled[places], self.kernel.variance(new) + self.kernel.noise + self.jitter, 1
        )
        columns = jnp.where(own, diagonal, columns)
        whitening, more = replace_rows(
            jax.lax.stop_gradient(self.whitening), jax.lax.stop_gradient(columns), places
        )
        covariance = self.covariance.at[:, places].set(columns).at[places].set(columns.T)
        whitening, jitter, error = sound_or_anew(
            *jax.lax.stop_gradient((covariance, whitening, self.jitter)),
            (more == 0) & self._solves(*jax.lax.stop_gradient((covariance, whitening))),
            _WORN,
        )
        own = jnp.arange(self.capacity)
        covariance = covariance.at[own, own].add(jax.lax.stop_gradient(jitter - self.jitter))
        return self._with_factor(covariance, whitening, jitter, error)

    def _solves(
        self,
        covariance: Float[Array, "capacity capacity"],
        whitening: Float[Array, "capacity capacity"],
    ) -> Bool[Array, ""]:
        """Return whether solutions for the answers miss them by less than their noise."""
        answers = jax.lax.stop_gradient(self._centred())
        if answers.shape[1] > _MIXED:
            draws = np.random.default_rng(0).normal(size=(answers.shape[1], _MIXED))
            answers = multiply(answers, jnp.asarray(draws, answers.dtype))
        weights, _ = condition(covariance, whitening, answers.T, answers.shape[1])
        missed = jnp.linalg.norm(answers.T - multiply(weights, covariance))
        noise = jax.lax.stop_gradient(self.kernel.noise + self.jitter)
        return missed <= _MISSED * jnp.sqrt(noise) * jnp.linalg.norm(answers)

    def _with_factor(self: L, *numbers: Array) -> L:
        return eqx.tree_at(
            lambda one: (one.covariance, one.whitening, one.jitter, one.error), self, numbers
        )

    def _centred(self) -> Float[Array, "capacity m"]:
        """Return the residuals less their mean; 0 where the window holds no pair."""
        return jnp.where(self.filled[:, None], self.residuals - self._centre(), 0)

    def _centre(self) -> Float[Array, " m"]:
        """Return the mean residual; 0 for none."""
        return jnp.sum(self.residuals, axis=0, where=self.filled[:, None]) / jnp.maximum(
            self.size, 1
        )


def init_learner(
    x: PyTree[Shaped[ArrayLike, "pairs ..."]],
    y: PyTree[Float[ArrayLike, "pairs ..."]],
    *,
    capacity: int = 1024,
    features: Function | None = None,
    prior: Function | None = None,
    kernel: Kernel | Shape = "matern52",
    version: str = "",
) -> Learner:
    """Make a learner of these pairs, with a kernel that is not tuned; `fit_learner` tunes it, too.

    Args:
        x: Inputs. There may be none (`x[:0]`); then they give the shapes.
        y: Answers. Pairs that are not finite are left out.
        capacity: The most pairs that the learner holds; then the oldest are replaced.
        features: A function of a batch that returns what inputs are compared by. Default: their
            floats.
        prior: A function of a batch that returns the mean before any answer. Default: none.
        kernel: A kernel, or a shape. By shape, it is centred on the pairs, its units are the
            features' spreads, and its one width is the square root of their number.
        version: The model version of the answers.

    Raises:
        ValueError: The capacity is no positive integer, x and y have different lengths, outputs are
            no floats, the prior has other outputs, or the kernel is for other features.
    """
    x, y = jax.tree.map(jnp.asarray, (x, y))
    check_floats("y", y)
    pairs = length_of("y", y)
    if length_of("x", x) != pairs:
        raise ValueError(f"x are {length_of('x', x)} data points, y {pairs} answers")
    form = join(one_row(y), 1)[1]
    z = features_of(features, x if pairs else one_row(x))[:pairs]
    kernel = kernel if isinstance(kernel, Kernel) else first_kernel(kernel, z)
    if kernel.centre.shape != z.shape[1:]:
        raise ValueError(f"the kernel is for {len(kernel.centre)} features, not {z.shape[1]}")
    learner = Learner(
        kernel, form, capacity=capacity, features=features, prior=prior, version=version
    )
    if not pairs:
        return learner
    return eqx.filter_jit(Learner._with_pairs)(learner, x, y)[0].refactorized()


@eqx.filter_jit
def _factored(
    kernel: Kernel, inputs: Float[Array, "capacity features"], filled: Bool[Array, " capacity"]
) -> tuple[Array, Array, Array, Array]:
    """Return a window's covariances, their whitening matrix, jitter and error."""
    both = filled[:, None] & filled
    diagonal = jnp.where(filled, kernel.variance(inputs) + kernel.noise, 1)
    eye = jnp.eye(len(filled), dtype=bool)
    covariance = jnp.where(eye, diagonal, jnp.where(both, kernel(inputs, inputs), 0))
    whitening, jitter, error = soundly_whitened(jax.lax.stop_gradient(covariance))
    return covariance + jitter * eye, whitening, jitter, error


def first_kernel(shape: Shape, z: Float[Array, "pairs features"]) -> Kernel:
    """Return a kernel to start from: centred on the features, in units of their spreads."""
    features = z.shape[1]
    finite = jnp.all(jnp.isfinite(z), axis=1)
    count = jnp.maximum(jnp.sum(finite), 1)
    z = jnp.where(finite[:, None], z, 0)
    centre = jnp.sum(z, axis=0) / count
    spread = jnp.sqrt(jnp.sum(jnp.where(finite[:, None], (z - centre) ** 2, 0), axis=0) / count)
    typical = jnp.sqrt(jnp.mean(spread**2)) if features else jnp.ones(())
    # A feature that hardly varies here may vary later: its unit is not 0.
    unit = jnp.where(typical > 0, jnp.maximum(spread, 1e-3 * typical), 1)
    return wide_kernel(shape, centre, unit)
