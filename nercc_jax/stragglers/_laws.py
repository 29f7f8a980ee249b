"""Stragglers: laws of the sets of workers that do not answer in time, and of latencies.

Everything is a small Equinox module with one sampling method; batch it with `jax.vmap` over keys.
Latencies are in seconds.
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

from ..arrays import check_count, check_positive


def _number(value: Any) -> int:
    """Return a number of workers, checked to be an integer from 0."""
    return check_count("a number of workers", value, least=0)


class AbstractStragglers(eqx.Module):
    """A law of the set of workers that answer in time."""

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
    """Stragglers are exactly `number` random workers; all sets are equally likely."""

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
    """Each worker straggles with the same `probability`, independently of the others."""

    probability: float = eqx.field(converter=float, static=True)

    def __check_init__(self):
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], not {self.probability}")

    def available(self, key: PRNGKeyArray, num_workers: int) -> Bool[Array, " num_workers"]:
        return jax.random.uniform(key, (num_workers,)) >= self.probability


class ContiguousStragglers(AbstractStragglers):
    """Stragglers are `number` workers with neighbouring indices at a random place: a failed rack.

    If workers are numbered in the order of their regression points, as in the Chebyshev layout,
    this is the worst case for an interpolating code.
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
        together. `plan` draws for any number of workers; a `Fault` refuses laws whose draws depend
        on their place.
        """


class ExponentialLatency(AbstractLatency):
    """A base time `shift` plus an exponential delay of mean `scale`, in seconds."""

    scale: float
    shift: float = 0.0

    def __check_init__(self):
        check_positive(scale=self.scale)
        if not self.shift >= 0:
            raise ValueError(f"shift must be 0 or positive, in seconds, not {self.shift}")

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        return self.shift + self.scale * jax.random.exponential(key, shape)


class LogNormalLatency(AbstractLatency):
    """A log-normal law: `median` in seconds, `sigma` the standard deviation of the logarithm."""

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
            ValueError: A line is not a number; the message names the file.
            OSError: As `open` does.
        """
        try:
            values = np.loadtxt(path, ndmin=1)
        except ValueError as error:
            raise ValueError(f"{path}: a latency trace has one number a line; {error}") from None
        return cls(values)

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        return jax.random.choice(key, self.latencies, shape)


def latency_law(text: str) -> AbstractLatency:
    """Return the latency law that a text names, in the format of `nercc plan --latency`.

    Args:
        text: `lognormal:MEDIAN:SIGMA`, `exponential:MEAN[:SHIFT]` or `pareto:MINIMUM:SHAPE`, in
            seconds; `stragglers:SECONDS:SHARE:FACTOR`, where a SHARE of the calls takes FACTOR
            times as long; or `trace:FILE` (`TraceLatency.from_file`).

    Raises:
        ValueError: There is no such law, or a number is out of range.
        OSError: As `open` does.

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
            # Spread by 5 %, since calls of real workers never take equal times.
            usual = seconds * np.linspace(0.95, 1.05, 100)
            late = np.arange(100)[:, None] < round(100 * share)
            return TraceLatency(np.where(late, factor * usual, usual).ravel())
    raise ValueError(
        "a law of latency is lognormal:MEDIAN:SIGMA, exponential:MEAN[:SHIFT], "
        f"pareto:MINIMUM:SHAPE, stragglers:SECONDS:SHARE:FACTOR or trace:FILE, not {text!r}"
    )


class WaitFor(AbstractStragglers):
    """Stragglers of the rule "decode when `number` workers have answered", under a latency law."""

    latency: AbstractLatency
    number: int = eqx.field(converter=_number, static=True)

    def available(self, key: PRNGKeyArray, num_workers: int) -> Bool[Array, " num_workers"]:
        return self.outcome(self.latency.sample(key, (num_workers,)))[0]

    def outcome(
        self, latencies: Float[Array, " num_workers"]
    ) -> tuple[Bool[Array, " num_workers"], Float[Array, ""]]:
        """Return the mask of the first `number` answers, and the seconds until the last of them."""
        _check_fits(self.number, latencies.shape[0])
        rank = jnp.argsort(jnp.argsort(latencies))
        mask = rank < self.number
        return mask, jnp.max(jnp.where(mask, latencies, 0))


def straggler_sets(
    law: AbstractStragglers, key: PRNGKeyArray, num_workers: int, at_most: int
) -> Bool[Array, "sets num_workers"]:
    """Return masks that represent a law: all of them if they are few, else `at_most` draws."""
    masks = law.every_set(num_workers, at_most)
    if masks is not None:
        return jnp.asarray(masks)
    return jax.vmap(lambda k: law.available(k, num_workers))(jax.random.split(key, at_most))


def _check_fits(number: int, num_workers: int) -> None:
    if number > num_workers:
        raise ValueError(f"{number} of {num_workers} workers: there are not that many")
