"""Covariance functions for regression over inputs, and the features by which inputs are compared.

This is our own code, since tinygp 0.3 and GPJax 1.0 factorize the whole window for each
conditioning, and have no mask and no window of rows; only these formulas could be reused.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import equinox as eqx
import jax
import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Int, PyTree, Shaped

from ..arrays import check_count, namespace, product, root_mean_square, safe_sqrt, working_dtype
from ..codes.trees import is_float, join, leaves_of

Function: TypeAlias = Callable[[PyTree], PyTree]
Shape: TypeAlias = Literal["squared_exponential", "matern52"]


class Kernel(eqx.Module):
    """A covariance function of features, in units of the process's variance.

        k(a, b) = shape(|a - b|) + linear (a . b),   features minus `centre`, over `unit` and width

    `fit_learner` tunes the widths, `linear` and `noise`.

    Attributes:
        shape: "squared_exponential" (exp(-r^2/2)) or "matern52".
        groups: For each feature, the index of its width.
        centre: The centre of the features, which is subtracted.
        unit: For each feature, the distance that equals a width of 1.
        widths: The widths of the groups of features, in their units.
        linear: The weight of a straight line; 0 for none.
        noise: The variance that the kernel does not explain.
    """

    shape: Shape = eqx.field(static=True)
    groups: Int[Any, " features"]
    centre: Float[Any, " features"]
    unit: Float[Any, " features"]
    widths: Float[Any, " widths"]
    linear: Float[Any, ""]
    noise: Float[Any, ""]

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
        """Create a kernel.

        Without `groups`, each feature has its own width if there are as many, else all share one.

        Raises:
            ValueError: The shape is unknown, groups do not fit, units, widths or noise are not
                positive, or `linear` is negative.
        """
        self.shape, own = check_shape(shape), jax.dtypes.canonicalize_dtype(float)
        self.centre, self.widths = np.asarray(centre, own), np.asarray(widths, own)
        self.linear, self.noise = np.asarray(linear, own), np.asarray(noise, own)
        self.unit = np.broadcast_to(np.asarray(unit, own), self.centre.shape)
        features, number = len(self.centre), len(self.widths)
        if groups is None:
            groups = np.arange(features) if number == features else np.zeros(features, int)
        self.groups = np.asarray(groups, jax.dtypes.canonicalize_dtype(int))
        if self.groups.shape != (features,):
            raise ValueError(
                f"groups must name a width for each of {features} features, not {groups}"
            )
        if not np.isin(self.groups, range(number)).all():
            raise ValueError(f"groups name widths {groups}, of which there are {number}")
        for name in ("unit", "widths", "noise", "linear"):
            value, zero = getattr(self, name), name == "linear"
            wanted = "0 or positive" if zero else "positive"
            if not np.all((value >= 0 if zero else value > 0) & np.isfinite(value)):
                raise ValueError(f"{name} must be {wanted} and finite, not {value}")

    def __call__(
        self, a: Float[Any, "*groups p features"], b: Float[Any, "*groups q features"]
    ) -> Float[Any, "*groups p q"]:
        """Return the covariances of outputs at a with those at b, without noise.

        With NumPy arrays, this is computed in float64.
        """
        a, b = self.scaled(a), self.scaled(b)
        xp = namespace(a, b)
        inner = product(a, xp.swapaxes(b, -1, -2))
        square = xp.sum(a**2, axis=-1)[..., :, None] + xp.sum(b**2, axis=-1)[..., None, :]
        return covariances(self.shape, xp.maximum(square - 2 * inner, 0)) + self.linear * inner

    def scaled(self, a: Float[Any, "*groups p features"]) -> Float[Any, "*groups p features"]:
        """Return features in units of the kernel's widths."""
        if namespace(a, self.centre) is np:
            a = a.astype(np.float64)
        return (a - self.centre) / (self.unit * self.widths[self.groups])

    def same(self, a: Float[Any, "p features"], b: Float[Any, "q features"]) -> Bool[Any, "p q"]:
        """Return which inputs differ by at most 1e-5 of the kernel's widths: only by rounding.

        Otherwise a kernel would be tested on copies of its own pairs that float32 has rounded.

        Distances from matrix products, as in covariances, are not exactly 0 in float32. So inputs
        are compared coordinate by coordinate; those with more than eight, along eight random
        directions.
        """
        a, b = self.scaled(a), self.scaled(b)
        features = a.shape[1]
        if features > 8:
            draws = np.random.default_rng(0).normal(size=(features, 8)) / np.sqrt(features)
            draws = draws.astype(a.dtype)
            a, b = product(a, draws), product(b, draws)
        xp = namespace(a, b)
        alike = xp.ones((len(a), len(b)), bool)
        for one, other in zip(a.T, b.T, strict=True):
            alike &= xp.abs(one[:, None] - other) <= 1e-5
        return alike


def first_kernel(shape: Shape, z: Float[Any, "pairs features"]) -> Kernel:
    """Return a kernel to start from, with one width: the square root of the number of features.

    Its centre is the mean of the features, and its units are their spreads.
    """
    z, features = np.asarray(z), z.shape[1]
    finite = np.all(np.isfinite(z), axis=1)[:, None]
    centre = np.sum(z, axis=0, where=finite) / np.maximum(np.sum(finite), 1)
    spread = root_mean_square(z - centre, 0, finite)
    typical = root_mean_square(spread) if features else np.ones(())
    # A feature that hardly varies here may vary later: its unit is not 0.
    unit = np.where(typical > 0, np.maximum(spread, 1e-3 * typical), 1)
    return Kernel(shape, centre=centre, unit=unit, widths=[float(np.sqrt(max(features, 1)))])


def check_shape(shape: Shape) -> Shape:
    """Return the shape; raise ValueError for an unknown one."""
    if shape not in get_args(Shape):
        known = ", ".join(get_args(Shape))
        raise ValueError(f"a kernel's shape must be one of {known}, not {shape!r}")
    return shape


def covariances(shape: Shape, square: Float[Any, "..."]) -> Float[Any, "..."]:
    """Return a kernel's shape at squared distances in units of its widths."""
    xp = namespace(square)
    if shape == "squared_exponential":
        return xp.exp(-square / 2)
    root = np.sqrt if xp is np else safe_sqrt  # whose derivative at 0 is finite
    r = root(5 * square)
    return (1 + r + r**2 / 3) * xp.exp(-r)


class Projection(eqx.Module):
    """An orthogonal projection of data points, as `features` of a learner.

    Attributes:
        centre: The centre, which is subtracted from the data points.
        directions: Orthonormal directions.
    """

    centre: Float[Any, " floats"]
    directions: Float[Any, "floats features"]

    def __call__(self, x: PyTree[Shaped[Any, "points ..."]]) -> Float[Any, "points features"]:
        return product(features_of(None, x) - self.centre, self.directions)


def principal_components(
    x: PyTree[Shaped[ArrayLike, "points ..."]], number: int = 64
) -> Projection:
    """Return the projection on the directions in which data points differ most.

    Args:
        x: Data points; leaves that are not floats are ignored.
        number: The number of directions; there may be fewer.

    Raises:
        ValueError: There is no float, fewer than two data points, or the number is not positive.
    """
    number = check_count("number", number)
    floats = np.asarray(features_of(None, jax.tree.map(np.asarray, x)), np.float64)
    check_count("data points", len(floats), 2)
    centre = floats.mean(axis=0)
    _, sizes, directions = np.linalg.svd(floats - centre, full_matrices=False)
    directions = directions[:number][sizes[:number] > 1e-5 * sizes[0]].T
    return Projection(centre.astype(np.float32), directions.astype(np.float32))


_run = eqx.filter_jit(lambda function, x: function(x))


def called(function: Function, x: PyTree) -> PyTree:
    """Return a user's function of a batch; for NumPy arrays, it is called inside `jax.jit`."""
    on_host = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(x))
    if isinstance(function, Projection) or not on_host:
        return function(x)
    return jax.tree.map(np.asarray, _run(function, x))


def features_of(
    features: Function | None, x: PyTree[Shaped[Any, "points ..."]]
) -> Float[Any, "points d"]:
    """Return the features of data points as vectors; without a function, their own floats."""
    found = x if features is None else called(features, x)
    floats = [leaf for leaf in jax.tree.leaves(found) if is_float(leaf)]
    if not floats:
        raise ValueError("there is no float among the data points to learn by: give `features`")
    vectors = join(floats, 1)[0]
    return vectors.astype(working_dtype(vectors.dtype))


def length_of(name: str, tree: PyTree) -> int:
    """Return the number of rows of all leaves; raise ValueError if they differ."""
    lengths = {leaf.shape[:1] for _, leaf in leaves_of(name, tree)}
    if len(lengths) != 1 or () in lengths:
        shapes = ", ".join(f"{label} {leaf.shape}" for label, leaf in leaves_of(name, tree))
        raise ValueError(f"{name} must have as many rows in every part: {shapes}")
    return lengths.pop()[0]
