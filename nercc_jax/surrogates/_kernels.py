"""Covariance functions for regression over inputs.

This is our own code, since tinygp 0.3 and GPJax 1.0 factorize the whole window whenever they
condition, and have no mask and no ring of rows; what would be left of them is these formulas.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int

from ..codes._products import multiply

Shape: TypeAlias = Literal["squared_exponential", "matern32", "matern52"]
SHAPES: tuple[str, ...] = get_args(Shape)


class Kernel(eqx.Module):
    """A covariance function of features, in units of the process's variance.

        k(a, b) = shape(|a - b|) + linear (a . b),   features less `centre`, over `unit` and width

    `fit_learner` tunes the widths, `linear` and `noise`.

    Attributes:
        shape: "squared_exponential" (exp(-r^2/2)), "matern32" or "matern52".
        groups: Which of the widths each feature has.
        centre: What is subtracted from the features.
        unit: The distance in each feature that a width of 1 means.
        widths: The widths of the groups of features, in their units.
        linear: The weight of a straight line; 0 for none.
        noise: The variance of what the kernel does not explain.
    """

    shape: Shape = eqx.field(static=True)
    groups: Int[Array, " features"]
    centre: Float[Array, " features"]
    unit: Float[Array, " features"]
    widths: Float[Array, " widths"]
    linear: Float[Array, ""]
    noise: Float[Array, ""]

    def __init__(
        self,
        shape: Shape = "matern52",
        *,
        centre: Float[ArrayLike, " features"],
        unit: Float[ArrayLike, " features"] | float = 1.0,
        widths: Float[ArrayLike, " widths"] | Sequence[float] = (1.0,),
        groups: Int[ArrayLike, " features"] | Sequence[int] | None = None,
        linear: Float[ArrayLike, ""] = 0.0,
        noise: Float[ArrayLike, ""] = 1e-4,
    ):
        """Make a kernel.

        Without `groups` all features share one width, or each has its own where there are as many.

        Raises:
            ValueError: The shape is unknown, groups do not fit, units, widths or noise are not
                positive, or `linear` is negative.
        """
        self.shape = check_shape(shape)
        self.centre = jnp.asarray(centre, float)
        self.unit = jnp.broadcast_to(jnp.asarray(unit, float), self.centre.shape)
        self.widths = jnp.asarray(widths, float)
        features, number = len(self.centre), len(self.widths)
        if groups is None:
            groups = np.arange(features) if number == features else np.zeros(features, int)
        self.groups = jnp.asarray(groups, int)
        self.linear, self.noise = jnp.asarray(linear, float), jnp.asarray(noise, float)
        if self.groups.shape != (features,):
            raise ValueError(
                f"groups must name a width for each of {features} features, not {groups}"
            )
        if not isinstance(self.groups, Tracer) and features:
            least, most = int(np.min(self.groups)), int(np.max(self.groups))
            if least < 0 or most >= number:
                raise ValueError(
                    f"groups name widths {least} to {most}, of which there are {number}"
                )
        for name in ("unit", "widths", "noise"):
            _check(name, getattr(self, name), "positive", lambda value: value > 0)
        _check("linear", self.linear, "0 or positive", lambda value: value >= 0)

    def __call__(
        self, a: Float[Array, "p features"], b: Float[Array, "q features"]
    ) -> Float[Array, "p q"]:
        """Return the covariances of outputs at a with those at b, without noise."""
        a, b = self._scaled(a), self._scaled(b)
        product = multiply(a, b.T)
        square = jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1) - 2 * product
        return _SHAPES[self.shape](jnp.maximum(square, 0)) + self.linear * product

    def variance(self, a: Float[Array, "p features"]) -> Float[Array, " p"]:
        """Return the variances of outputs at a, without noise."""
        return 1 + self.linear * jnp.sum(self._scaled(a) ** 2, axis=1)

    def _scaled(self, a: Float[Array, "p features"]) -> Float[Array, "p features"]:
        return (a - self.centre) / (self.unit * self.widths[self.groups])


def wide_kernel(
    shape: Shape, centre: Float[Array, " features"], unit: Float[Array, " features"]
) -> Kernel:
    """Return a kernel to start from, with one width, the square root of the number of features."""
    return Kernel(shape, centre=centre, unit=unit, widths=[float(np.sqrt(max(len(centre), 1)))])


def check_shape(shape: Shape) -> Shape:
    """Return the shape; raise ValueError for an unknown one."""
    if shape not in SHAPES:
        raise ValueError(f"a kernel's shape must be one of {', '.join(SHAPES)}, not {shape!r}")
    return shape


def _check(name: str, value: Array, wanted: str, sound: Callable[[np.ndarray], np.ndarray]) -> None:
    if isinstance(value, Tracer):
        return
    numbers = np.asarray(value)
    if not np.all(sound(numbers) & np.isfinite(numbers)):
        raise ValueError(f"{name} must be {wanted} and finite, not {value}")


def safe_sqrt(square: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the square root, which is 0 below 0 and has a derivative of 0 there."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def _matern32(square: Array) -> Array:
    r = safe_sqrt(3 * square)
    return (1 + r) * jnp.exp(-r)


def _matern52(square: Array) -> Array:
    r = safe_sqrt(5 * square)
    return (1 + r + r**2 / 3) * jnp.exp(-r)


_SHAPES: dict[str, Callable[[Array], Array]] = {
    "squared_exponential": lambda square: jnp.exp(-square / 2),
    "matern32": _matern32,
    "matern52": _matern52,
}
