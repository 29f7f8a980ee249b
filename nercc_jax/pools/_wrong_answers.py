"""Wrong answers on purpose: a worker that is healthy, and whose answers are not the model's.

Some faults change the answer of a call, others the parameters that it is computed with, or a result
on the way. All follow from the seed of `Faults`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, Shaped

WrongKind: TypeAlias = Literal[
    "swap", "repeat", "bias", "flip_answer", "stale", "flip_weight", "flip_activation"
]
# The kinds that change parameters, and those that change models, instead of answers.
WEIGHT_KINDS: frozenset[str] = frozenset({"stale", "flip_weight"})
MODEL_KINDS = WEIGHT_KINDS | {"flip_activation"}
WRONG_KINDS: frozenset[str] = frozenset(get_args(WrongKind))

BitField: TypeAlias = Literal["any", "exponent", "mantissa"]

_JIT = ("pjit", "jit")  # operations that contain a program, by the names of JAX's versions

# Of "bias", what is added to each output; of "stale", the standard deviation of the noise, as a
# multiple of a parameter's root mean square.
SIZES: Mapping[str, float] = {"bias": 1.0, "stale": 0.3}


class WrongAnswers:
    """Changes the answers of one worker as its faults say, one call after the other."""

    def __init__(self, random: np.random.Generator):
        """Start before the first call; `random` chooses rows and bits."""
        self._random = random
        self._computed: dict[int, PyTree] = {}  # the previous answer of each model
        self._given: dict[int, PyTree] = {}  # as it was given

    def change(
        self, model: int, answer: PyTree[np.ndarray], faults: Sequence[Any]
    ) -> PyTree[np.ndarray]:
        """Return the answer that is given instead of what a model, by number, has computed.

        The faults are those that struck the call (`Fault`). Leaves share the axis of rows.
        """
        given = answer
        for fault in faults:
            if fault.kind == "swap":
                given = self._swap(given, self._computed.get(model))
            elif fault.kind == "repeat":
                places = np.arange(len(jax.tree.leaves(given)[0]))  # previous rows, in turn
                given = jax.tree.map(
                    lambda leaf, places=places: leaf[places % len(leaf)],
                    self._given.get(model, given),
                )
            elif fault.kind == "bias":
                size = np.float32(SIZES["bias"] if fault.size is None else fault.size)
                given = jax.tree.map(lambda leaf, size=size: leaf + size, given)
            elif fault.kind == "flip_answer":
                given = flip_bit_of_tree(given, fault.bits, self._random)
        self._computed[model], self._given[model] = answer, given
        return given

    def _swap(self, answer: PyTree, previous: PyTree | None) -> PyTree:
        """Return the rows in another order; of a single row, the previous call's last row."""
        number = len(jax.tree.leaves(answer)[0])
        if number > 1:
            places = np.roll(np.arange(number), self._random.integers(1, number))
            return jax.tree.map(lambda leaf: leaf[places], answer)
        return answer if previous is None else jax.tree.map(lambda leaf: leaf[-1:], previous)


def flip_bit(
    x: Shaped[np.ndarray, "..."], bits: BitField, random: np.random.Generator
) -> Shaped[np.ndarray, "..."]:
    """Return floats with one random bit of a random element flipped; "any" has the sign, too."""
    flipped = np.array(x)
    words = flipped.reshape(-1).view(f"u{x.dtype.itemsize}")
    bit = random.choice(_bit_fields(x.dtype)[bits])
    words[random.integers(words.size)] ^= words.dtype.type(1) << words.dtype.type(bit)
    return flipped


def _bit_fields(dtype: Any) -> dict[BitField, range]:
    info = jnp.finfo(dtype)  # NumPy's does not know bfloat16
    exponent = range(info.nmant, info.bits - 1)
    return {"any": range(info.bits), "exponent": exponent, "mantissa": range(info.nmant)}


def flip_bit_of_tree(tree: PyTree, bits: BitField, random: np.random.Generator) -> PyTree:
    """Return a tree with one bit of its floats flipped, each element as likely as another."""
    leaves, structure = jax.tree.flatten(tree)
    sizes = np.array([leaf.size if is_parameter(leaf) else 0 for leaf in leaves], float)
    place = int(random.choice(len(leaves), p=sizes / sizes.sum()))
    leaves[place] = flip_bit(np.asarray(leaves[place]), bits, random)
    return jax.tree.unflatten(structure, leaves)


def stale(tree: PyTree, size: float, random: np.random.Generator) -> PyTree:
    """Return parameters with Gaussian noise, as those of an earlier training are different.

    Its standard deviation is this multiple of each array's root mean square.
    """

    def change(leaf: Any) -> Any:
        if not is_parameter(leaf):
            return leaf
        value = np.asarray(leaf, np.float64)
        noise = size * np.sqrt(np.mean(value**2)) * random.normal(size=value.shape)
        return np.asarray(value + noise).astype(leaf.dtype)

    return jax.tree.map(change, tree)


def is_parameter(leaf: Any) -> bool:
    """Return whether a leaf of a tree is an array of floats that is not empty."""
    array = isinstance(leaf, np.ndarray | jax.Array)
    return array and leaf.size > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)


@dataclasses.dataclass(frozen=True)
class WeightChange:
    """A change of a model's parameters by a fault of `WEIGHT_KINDS`, the same each time."""

    fault: Any
    seed: tuple[int, ...]

    def __call__(self, tree: PyTree) -> PyTree:
        random = np.random.default_rng(self.seed)
        if self.fault.kind == "stale":
            size = SIZES["stale"] if self.fault.size is None else self.fault.size
            return stale(tree, size, random)
        return flip_bit_of_tree(tree, self.fault.bits, random)


@dataclasses.dataclass(frozen=True)
class ActivationFlip:
    """A change of a model of JAX arrays: each call has a bit of an intermediate result flipped."""

    fault: Any
    seed: tuple[int, ...]

    def __call__(self, model: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """Return the model after the change, compiled."""
        random, flipped = np.random.default_rng(self.seed), self._flipped(model)
        return lambda *args: flipped(random.integers(2**32, size=3, dtype=np.uint32), *args)

    def _flipped(self, model: Callable[..., PyTree]) -> Callable[..., PyTree]:
        @jax.jit
        def run(numbers: Any, *args: PyTree) -> PyTree:
            program, shape = jax.make_jaxpr(model, return_shape=True)(*args)
            results = itertools.count()
            which = numbers[0] % max(_count_results(program.jaxpr), 1)

            def flip(x: Any) -> Any:
                return jnp.where(which == next(results), self._flip_bit(x, numbers[1:]), x)

            found = _evaluate(program, jax.tree.leaves(args), flip)
            return jax.tree.unflatten(jax.tree.structure(shape), found)

        return run

    def _flip_bit(self, x: Any, numbers: Any) -> Any:
        fields = _bit_fields(x.dtype)[self.fault.bits]
        unsigned = jnp.dtype(f"u{x.dtype.itemsize}")
        words = jax.lax.bitcast_convert_type(x, unsigned).reshape(-1)
        bit = (fields.start + numbers[1] % len(fields)).astype(unsigned)
        place = numbers[0] % words.size
        words = words.at[place].set(words[place] ^ (jnp.ones((), unsigned) << bit))
        return jax.lax.bitcast_convert_type(words.reshape(x.shape), x.dtype)


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


ModelChange: TypeAlias = WeightChange | ActivationFlip


def check_faults(models: Sequence[Any], faults: Sequence[Any]) -> None:
    """Raise ValueError if a fault would change the parameters of a model that shows none."""
    kinds = sorted({fault.kind for fault in faults} & WEIGHT_KINDS)
    for model in models if kinds else ():
        if not any(map(is_parameter, jax.tree.leaves(model))):
            raise ValueError(
                f'a fault "{kinds[0]}" changes the parameters of a model that is a pytree with '
                f"arrays, such as an Equinox module: {model!r} has none"
            )
