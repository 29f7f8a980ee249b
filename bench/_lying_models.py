"""Models that lie: each wraps a model, runs as well as that does, and returns wrong answers.

Flipped bits of a parameter or of an intermediate result, and parameters of an earlier training.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, Shaped

BitField: TypeAlias = Literal["any", "exponent"]

_JIT = ("pjit", "jit")  # operations that contain a program, by the names of JAX's versions


def flip_bit(
    x: Shaped[np.ndarray, "..."], bits: BitField, random: np.random.Generator
) -> Shaped[np.ndarray, "..."]:
    """Return floats with one random bit of a random element flipped; "any" has the sign, too."""
    flipped = np.array(x)
    words = flipped.reshape(-1).view(f"u{x.dtype.itemsize}")
    bit = random.choice(_range_of_bits(x.dtype, bits))
    words[random.integers(words.size)] ^= words.dtype.type(1) << words.dtype.type(bit)
    return flipped


def flip_weight(model: PyTree, seed: Sequence[int]) -> PyTree:
    """Return the model with an exponent's bit of one parameter flipped, each as likely."""
    random = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(model)
    sizes = np.array([leaf.size if _is_parameter(leaf) else 0 for leaf in leaves], float)
    place = int(random.choice(len(leaves), p=sizes / sizes.sum()))
    leaves[place] = flip_bit(np.asarray(leaves[place]), "exponent", random)
    return jax.tree.unflatten(structure, leaves)


def stale(model: PyTree, size: float, seed: Sequence[int]) -> PyTree:
    """Return the model with noisy parameters, as those of an earlier training are different.

    The noise is Gaussian, with this multiple of each array's root mean square as deviation.
    """
    random = np.random.default_rng(seed)

    def change(leaf: Any) -> Any:
        if not _is_parameter(leaf):
            return leaf
        value = np.asarray(leaf, np.float64)
        noise = size * np.sqrt(np.mean(value**2)) * random.normal(size=value.shape)
        return np.asarray(value + noise).astype(leaf.dtype)

    return jax.tree.map(change, model)


def flip_activation(
    model: Callable[..., PyTree], bits: BitField, seed: Sequence[int]
) -> Callable[..., PyTree]:
    """Return the model, compiled, each call of which flips a bit of some intermediate result."""
    random = np.random.default_rng(seed)

    @jax.jit
    def run(numbers: Any, *args: PyTree) -> PyTree:
        program, shape = jax.make_jaxpr(model, return_shape=True)(*args)
        results = itertools.count()
        which = numbers[0] % max(_count_results(program.jaxpr), 1)

        def flip(x: Any) -> Any:
            field = _range_of_bits(x.dtype, bits)
            unsigned = jnp.dtype(f"u{x.dtype.itemsize}")
            words = jax.lax.bitcast_convert_type(x, unsigned).reshape(-1)
            bit = (field.start + numbers[2] % len(field)).astype(unsigned)
            place = numbers[1] % words.size
            words = words.at[place].set(words[place] ^ (jnp.ones((), unsigned) << bit))
            flipped = jax.lax.bitcast_convert_type(words.reshape(x.shape), x.dtype)
            return jnp.where(which == next(results), flipped, x)

        found = _evaluate(program, jax.tree.leaves(args), flip)
        return jax.tree.unflatten(jax.tree.structure(shape), found)

    return lambda *args: run(random.integers(2**32, size=3, dtype=np.uint32), *args)


def _range_of_bits(dtype: Any, bits: BitField) -> range:
    info = jnp.finfo(dtype)  # NumPy's does not know bfloat16
    return range(info.nmant if bits == "exponent" else 0, info.bits - (bits == "exponent"))


def _is_parameter(leaf: Any) -> bool:
    array = isinstance(leaf, np.ndarray | jax.Array)
    return array and leaf.size > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _count_results(jaxpr: Any) -> int:
    """Return how many results `_evaluate` shows."""
    inner = [eqn.params["jaxpr"].jaxpr for eqn in jaxpr.eqns if eqn.primitive.name in _JIT]
    return sum(map(_is_result, jaxpr.eqns)) + sum(map(_count_results, inner))


def _is_result(eqn: Any) -> bool:
    first = eqn.outvars[0].aval if eqn.outvars else None
    floats = first is not None and jnp.issubdtype(first.dtype, jnp.floating) and first.size > 0
    return floats and eqn.primitive.name not in _JIT


def _evaluate(program: Any, args: Sequence[Any], change: Callable[[Any], Any]) -> list[Any]:
    """Run a program operation by operation, and change the float results of each."""
    values = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    values |= zip(program.jaxpr.invars, args, strict=True)

    def read(name: Any) -> Any:
        return name.val if isinstance(name, jax.extend.core.Literal) else values[name]

    for eqn in program.jaxpr.eqns:
        inputs = [read(name) for name in eqn.invars]
        if eqn.primitive.name in _JIT:
            found = _evaluate(eqn.params["jaxpr"], inputs, change)
        else:
            functions, params = (), eqn.primitive.get_bind_params(eqn.params)
            if isinstance(params, tuple):  # in some versions of JAX
                functions, params = params
            found = eqn.primitive.bind(*functions, *inputs, **params)
            found = list(found) if eqn.primitive.multiple_results else [found]
        if _is_result(eqn):
            found[0] = change(found[0])
        values |= zip(eqn.outvars, found, strict=True)
    return [read(name) for name in program.jaxpr.outvars]
