"""Stragglers: sets of workers that do not answer in time, and the latencies behind them.

Everything is a small Equinox module with one sampling method; batch it with `jax.vmap` over keys.
Latencies are in seconds, whatever the unit of the numbers given.
"""

import abc
import itertools
import math
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ..codes._checks import check_count, check_positive


def _number(value: Any) -> int:
    """Return a number of workers."""
    return check_count("a number of workers", value, least=0)


class AbstractStragglers(eqx.Module):
    """A law of which workers answer in time."""

    @abc.abstractmethod
    def available(self, key: PRNGKeyArray, num_workers: int) -> Bool[Array, " num_workers"]:
        """Return one draw of the mask of workers that answered.

        Raises:
            ValueError: N is too small.
        """

    def every_set(
        self, num_workers: int, at_most: int
    ) -> Bool[np.ndarray, "sets num_workers"] | None:
        """Return all masks if they are equally likely and no more than `at_most`, else None."""
        return None


class ExactStragglers(AbstractStragglers):
    """Exactly `number` workers at random, every set alike likely."""

    number: int = eqx.field(converter=_number, static=True)

    def available(self, key: PRNGKeyArray, num_workers: int) -> Bool[Array, " num_workers"]:
        _check_fits(self.number, num_workers)
        return jax.random.permutation(key, num_workers) >= self.number

    def every_set(
        self, num_workers: int, at_most: int
    ) -> Bool[np.ndarray, "sets num_workers"] | None:
        _check_fits(self.number, num_workers)
        count = math.comb(num_workers, self.number)
        if count > at_most:
            return None
        masks, sets = np.ones((count, num_workers), bool), range(num_workers)
        for mask, gone in zip(masks, itertools.combinations(sets, self.number), strict=True):
            mask[list(gone)] = False
        return masks


class IndependentStragglers(AbstractStragglers):
    """Each worker with the same `probability`, independent of the others."""

    probability: float = eqx.field(converter=float, static=True)

    def __check_init__(self):
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], not {self.probability}")

    def available(self, key: PRNGKeyArray, num_workers: int) -> Bool[Array, " num_workers"]:
        return jax.random.uniform(key, (num_workers,)) >= self.probability


class ContiguousStragglers(AbstractStragglers):
    """A block of `number` workers with neighbouring indices, at a random place: a rack that fails.

    Where workers are numbered along the line, as in the Chebyshev layout, it is the worst case for
    an interpolating code.
    """

    number: int = eqx.field(converter=_number, static=True)

    def available(self, key: PRNGKeyArray, num_workers: int) -> Bool[Array, " num_workers"]:
        _check_fits(self.number, num_workers)
        start = jax.random.randint(key, (), 0, num_workers - self.number + 1)
        place = jnp.arange(num_workers) - start
        return (place < 0) | (place >= self.number)

    def every_set(
        self, num_workers: int, at_most: int
    ) -> Bool[np.ndarray, "sets num_workers"] | None:
        _check_fits(self.number, num_workers)
        place = np.arange(num_workers) - np.arange(num_workers - self.number + 1)[:, None]
        masks = (place < 0) | (place >= self.number)
        return masks if len(masks) <= at_most else None


class AbstractLatency(eqx.Module):
    """A law of the time a worker takes to answer."""

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Return latencies in seconds.

        The last axis of `shape` is workers: a law may differ between them, or slow some of them
        together. `plan` draws for any number of workers; `Faults` refuses laws that are not the
        same, and independent, for all workers.
        """


def draws_alike(law: AbstractLatency) -> bool:
    """Return whether a law's draws are independent of their place, for every shape.

    Draws in rows are then those in a line with the same key, whichever of the functions in
    `jax.random` draws them. Rows of a prime number of workers are cut by racks of any size, and
    there are enough of them that a rare event is among them.
    """
    rows, workers = 256, 257
    try:
        line = np.asarray(law.sample(jax.random.key(0), (rows * workers,)))
        drawn = np.asarray(law.sample(jax.random.key(0), (rows, workers)))
    except (TypeError, ValueError):
        return False
    alike = drawn.shape == (rows, workers) and line.shape == (rows * workers,)
    return alike and np.allclose(line, drawn.ravel(), rtol=1e-4, equal_nan=True)


class ExponentialLatency(AbstractLatency):
    """`shift` + an exponential of mean `scale`, in seconds: a base time and a memoryless delay."""

    scale: float
    shift: float = 0.0

    def __check_init__(self):
        check_positive(scale=self.scale)
        if not self.shift >= 0:
            raise ValueError(f"shift must be 0 or positive, in seconds, not {self.shift}")

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        return self.shift + self.scale * jax.random.exponential(key, shape)


class LogNormalLatency(AbstractLatency):
    """exp of a normal law: `median` in seconds, `sigma` the deviation of the logarithm."""

    median: float
    sigma: float

    def __check_init__(self):
        check_positive(median=self.median, sigma=self.sigma)

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        return self.median * jnp.exp(self.sigma * jax.random.normal(key, shape))


class ParetoLatency(AbstractLatency):
    """A heavy tail: P(latency > t) = (minimum / t)^shape for t above `minimum` seconds."""

    minimum: float
    shape: float

    def __check_init__(self):
        check_positive(minimum=self.minimum, shape=self.shape)

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        return self.minimum * jax.random.pareto(key, self.shape, shape)


class TraceLatency(AbstractLatency):
    """Latencies drawn, with replacement, from measured ones in seconds."""

    latencies: Float[Array, " samples"] = eqx.field(
        converter=lambda values: jnp.asarray(values, float)
    )

    def __check_init__(self):
        values = np.asarray(self.latencies)
        if values.ndim != 1 or values.size == 0 or not np.all(np.isfinite(values) & (values >= 0)):
            raise ValueError(
                "a latency trace is a vector of finite, non-negative seconds, not empty: "
                f"got shape {values.shape}"
            )

    @classmethod
    def from_file(cls, path: str | Path) -> "TraceLatency":
        """Read a text file with one latency in seconds a line; '#' starts a comment.

        Raises:
            ValueError: A line is no number; the message names the file.
            OSError: As `open`.
        """
        try:
            values = np.loadtxt(path, ndmin=1)
        except ValueError as error:
            raise ValueError(f"{path}: a latency trace has one number a line; {error}") from None
        return cls(values)

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        return jax.random.choice(key, self.latencies, shape)


def latency_law(text: str) -> AbstractLatency:
    """Return the law of latency that a text names, as `nercc plan --latency` takes it.

    Args:
        text: `lognormal:MEDIAN:SIGMA`, `exponential:MEAN[:SHIFT]` or `pareto:MINIMUM:SHAPE`, in
            seconds; `stragglers:SECONDS:SHARE:FACTOR`, where a share of the calls takes several
            times as long; or `trace:FILE`, as `TraceLatency.from_file`.

    Raises:
        ValueError: There is no such law.
        OSError: As `open`.

    Example:
        >>> latency_law("lognormal:0.05:0.6")
        LogNormalLatency(median=0.05, sigma=0.6)
    """
    name, _, rest = text.partition(":")
    if name == "trace" and rest:
        return TraceLatency.from_file(rest)
    try:
        numbers = [float(number) for number in rest.split(":")]
    except ValueError:
        numbers = []
    match name, numbers:
        case "lognormal", [median, sigma]:
            return LogNormalLatency(median, sigma)
        case "exponential", [_] | [_, _]:
            return ExponentialLatency(*numbers)
        case "pareto", [minimum, shape]:
            return ParetoLatency(minimum, shape)
        case "stragglers", [seconds, share, factor]:
            if not (seconds > 0 and 0 <= share <= 1 and factor > 0):
                raise ValueError(
                    "seconds and factor must be positive, and the share between 0 and 1"
                )
            # No two calls take the same time, and no rule may rely on equal times.
            usual = seconds * np.linspace(0.95, 1.05, 100)
            late = np.arange(100)[:, None] < round(100 * share)
            return TraceLatency(np.where(late, factor * usual, usual).ravel())
    raise ValueError(
        "a law of latency is lognormal:MEDIAN:SIGMA, exponential:MEAN[:SHIFT], "
        f"pareto:MINIMUM:SHAPE, stragglers:SECONDS:SHARE:FACTOR or trace:FILE, not {text!r}"
    )


class RowLatency(eqx.Module):
    """A law of the time that a row takes, where slow rows differ from others by a score.

    A share `rate` of all rows straggles and takes a draw of `delay` more than a draw of `base`. A
    share `leaning` of these stragglers comes from the `hardest` share of rows, those with the
    largest scores (cost, stiffness, norm, negative margin); the others come from all rows alike.
    `RowLatency.independent`, `.leaning_to` and `.extreme` name three cases.

    Args:
        base: The latency of every row.
        delay: The latency that a straggling row has in addition.
        rate: The share of rows that straggle, in the mean.
        leaning: The share of stragglers that come from the hardest rows: 0 for independence.
        hardest: The share of rows that count as hardest.

    Raises:
        ValueError: A share is outside [0, 1], or the hardest rows are too few for their stragglers.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from nercc_jax.stragglers import RowLatency, TraceLatency
        >>> law = RowLatency.extreme(TraceLatency([0.1]), TraceLatency([1.0]), rate=0.25)
        >>> law.straggles(jax.random.key(0), jnp.array([3.0, 1.0, 9.0, 2.0])).tolist()
        [False, False, True, False]
    """

    base: AbstractLatency
    delay: AbstractLatency
    rate: float = eqx.field(converter=float, static=True)
    leaning: float = eqx.field(converter=float, static=True, default=0.0)
    hardest: float = eqx.field(converter=float, static=True, default=1.0)

    def __check_init__(self):
        for name in ("rate", "leaning", "hardest"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        others = self.rate * (1 - self.leaning)
        if self.rate * self.leaning > self.hardest * (1 - others) + 1e-9:  # rounding
            raise ValueError(
                f"the hardest {self.hardest:g} of the rows are too few for a share "
                f"{self.leaning:g} of the stragglers, which are {self.rate:g} of all rows"
            )

    @classmethod
    def independent(
        cls, base: AbstractLatency, delay: AbstractLatency, rate: float
    ) -> "RowLatency":
        """Return the law under which every row straggles alike."""
        return cls(base, delay, rate)

    @classmethod
    def leaning_to(
        cls,
        base: AbstractLatency,
        delay: AbstractLatency,
        rate: float,
        *,
        leaning: float = 0.5,
        hardest: float = 0.12,
    ) -> "RowLatency":
        """Return the law under which a share of the stragglers comes from the hardest rows."""
        return cls(base, delay, rate, leaning, hardest)

    @classmethod
    def extreme(cls, base: AbstractLatency, delay: AbstractLatency, rate: float) -> "RowLatency":
        """Return the law under which the hardest rows straggle, and no others."""
        return cls(base, delay, rate, 1.0, rate)

    def probabilities(self) -> tuple[float, float]:
        """Return the probability of straggling of the hardest rows, and of all others."""
        others = self.rate * (1 - self.leaning)
        if self.leaning == 0 or self.rate == 0:
            return others, others
        return min(others + self.rate * self.leaning / self.hardest, 1.0), others

    def straggles(self, key: PRNGKeyArray, scores: Float[Array, " rows"]) -> Bool[Array, " rows"]:
        """Draw which rows straggle, given their scores; the hardest are those among these rows."""
        number = jnp.round(self.hardest * scores.shape[0])
        rank = jnp.argsort(jnp.argsort(-scores))
        hard, other = self.probabilities()
        probability = jnp.where(rank < number, hard, other)
        return jax.random.uniform(key, scores.shape) < probability

    def sample(self, key: PRNGKeyArray, scores: Float[Array, " rows"]) -> Float[Array, " rows"]:
        """Draw each row's latency in seconds, given their scores."""
        of_base, of_delay, of_rows = jax.random.split(key, 3)
        late = self.straggles(of_rows, scores)
        delay = self.delay.sample(of_delay, scores.shape)
        return self.base.sample(of_base, scores.shape) + jnp.where(late, delay, 0)


class AbstractWaiting(AbstractStragglers):
    """A rule of waiting: which answers are there, of those that a law of latency draws."""

    latency: eqx.AbstractVar[AbstractLatency]

    @abc.abstractmethod
    def outcome(self, latencies: Float[Array, " num_workers"]) -> tuple[Any, ...]:
        """Return the mask of answers, and the seconds waited, given all workers' latencies."""

    def available(self, key: PRNGKeyArray, num_workers: int) -> Bool[Array, " num_workers"]:
        return self.outcome(self.latency.sample(key, (num_workers,)))[0]


class WaitFor(AbstractWaiting):
    """The rule "decode when `number` workers have answered"."""

    latency: AbstractLatency
    number: int = eqx.field(converter=_number, static=True)

    def outcome(
        self, latencies: Float[Array, " num_workers"]
    ) -> tuple[Bool[Array, " num_workers"], Float[Array, ""]]:
        """Return the mask of the first `number` answers, and the seconds until they are in."""
        _check_fits(self.number, latencies.shape[0])
        rank = jnp.argsort(jnp.argsort(latencies))
        mask = rank < self.number
        return mask, jnp.max(jnp.where(mask, latencies, 0))


class WaitUntil(AbstractWaiting):
    """The rule "decode after `deadline` seconds, or as soon as all workers have answered"."""

    latency: AbstractLatency
    deadline: float

    def __check_init__(self):
        if not self.deadline > 0:  # infinite: until all have answered
            raise ValueError(f"deadline must be positive, not {self.deadline}")

    def outcome(
        self, latencies: Float[Array, " num_workers"]
    ) -> tuple[Bool[Array, " num_workers"], Float[Array, ""]]:
        """Return the mask of the answers within the deadline, and the seconds waited."""
        return latencies <= self.deadline, jnp.minimum(self.deadline, jnp.max(latencies))


def straggler_sets(
    law: AbstractStragglers, key: PRNGKeyArray, num_workers: int, at_most: int
) -> Bool[Array, "sets num_workers"]:
    """Return masks whose mean stands for the law's: all if they are few, else `at_most` draws."""
    masks = law.every_set(num_workers, at_most)
    if masks is not None:
        return jnp.asarray(masks)
    return jax.vmap(lambda k: law.available(k, num_workers))(jax.random.split(key, at_most))


def _check_fits(number: int, num_workers: int) -> None:
    if number > num_workers:
        raise ValueError(f"{number} of {num_workers} workers: there are not that many")
