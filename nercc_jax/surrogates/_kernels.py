"""Covariances of outputs by the distance of features, for regression over inputs.

Own code: tinygp 0.3 and GPJax 1.0 are kept well, but make the whole window's factor anew whenever
they condition, know no mask and no ring of rows, and what is left of them is these formulas.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int

from ..codes import multiply

Shape: TypeAlias = Literal["squared_exponential", "matern32", "matern52"]
SHAPES: tuple[str, ...] = get_args(Shape)


class Kernel(eqx.Module):
    """A covariance function of features, in units of the process's own variance:

        k(a, b) = shape(|a - b|) + linear (a . b),   features less `centre`, by `unit` and width

    `shape` is "squared_exponential" (exp(-r^2/2)), "matern32" or "matern52". `widths` are shared by
    the features of a group: `groups` says which of them each feature has; `unit` is what a width of
    1 means for it. `linear` weighs a straight line beside it, 0 for none. `noise` is the variance
    of what the kernel does not explain. Widths, `linear` and `noise` are what `fit_learner` tunes.
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
        """Without `groups` all features have one width, or each its own where there are as many.

        Raises: ValueError for an unknown shape, groups that do not fit, a unit, widths or a noise
        that are not positive, a negative `linear`.
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
        """The covariances of outputs at a with those at b, without noise."""
        a, b = self._scaled(a), self._scaled(b)
        product = multiply(a, b.T)
        square = jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1) - 2 * product
        return _SHAPES[self.shape](jnp.maximum(square, 0)) + self.linear * product

    def variance(self, a: Float[Array, "p features"]) -> Float[Array, " p"]:
        """The variance of outputs at a, without noise."""
        return 1 + self.linear * jnp.sum(self._scaled(a) ** 2, axis=1)

    def _scaled(self, a: Float[Array, "p features"]) -> Float[Array, "p features"]:
        return (a - self.centre) / (self.unit * self.widths[self.groups])


def wide_kernel(
    shape: Shape, centre: Float[Array, " features"], unit: Float[Array, " features"]
) -> Kernel:
    """A kernel before it is tuned: one width for all features, the square root of their number."""
    return Kernel(shape, centre=centre, unit=unit, widths=[float(np.sqrt(max(len(centre), 1)))])


def check_shape(shape: Shape) -> Shape:
    """The same. Raises: ValueError for an unknown one."""
    if shape not in SHAPES:
        raise ValueError(f"a kernel's shape must be one of {', '.join(SHAPES)}, not {shape!r}")
    return shape


def _check(name: str, value: Array, wanted: str, sound: Callable[[np.ndarray], np.ndarray]) -> None:
    if isinstance(value, Tracer):
        return
    numbers = np.asarray(value)
    if not np.all(sound(numbers) & np.isfinite(numbers)):
        raise ValueError(f"{name} must be {wanted} and finite, not {value}")


def root(square: Float[Array, "..."]) -> Float[Array, "..."]:
    """The square root, 0 below 0, with a derivative of 0 there instead of none."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def _matern32(square: Array) -> Array:
    r = root(3 * square)
    return (1 + r) * jnp.exp(-r)


def _matern52(square: Array) -> Array:
    r = root(5 * square)
    return (1 + r + r**2 / 3) * jnp.exp(-r)


_SHAPES: dict[str, Callable[[Array], Array]] = {
    "squared_exponential": lambda square: jnp.exp(-square / 2),
    "matern32": _matern32,
    "matern52": _matern52,
}
