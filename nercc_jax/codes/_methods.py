"""Methods of codes that JAX's transformations take as they take functions."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


class BoundMethod(eqx.Module):
    """A method bound to a code: a pytree, as Equinox's are, and with a hash.

    `jax.jit(code.decode)` looks a function up by hash and equality. Those of Equinox's methods
    compare arrays by JAX, which is an error within a trace, and arrays have no hash. Here numbers
    that are known count by value, so that equal codes share a program, and traced ones by identity.
    """

    function: Callable[..., Any] = eqx.field(static=True)
    code: Any

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.function(self.code, *args, **options)

    @property
    def __name__(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.function.__name__

    @property
    def __doc__(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.function.__doc__

    def __hash__(self) -> int:
        return hash(self._identity())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BoundMethod) and self._identity() == other._identity()

    def _identity(self) -> tuple[Any, ...]:
        leaves, structure = jax.tree.flatten(self.code)
        return self.function, structure, *map(_identity_of, leaves)


def _identity_of(leaf: Any) -> Any:
    if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array | np.ndarray):
        return id(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return id(leaf)
    known = np.asarray(leaf)
    return known.shape, known.dtype.str, known.tobytes()


class transformable:
    """A method that JAX's transformations take when it is bound to a code: see `BoundMethod`."""

    def __init__(self, method: Callable[..., Any]):
        self.method = method

    def __get__(self, code: Any, _: type | None = None) -> Any:
        return self.method if code is None else BoundMethod(self.method, code)
