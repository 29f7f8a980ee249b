"""The programs that are compiled for accelerators: what users run, at the sizes of real use.

An array among a program's arguments stands for its shape: codes and weights are arguments, as in
the library's own jitted functions, and nothing is computed with them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from nercc_jax import Berrut, NeRCC, nested_objective
from nercc_jax.codes import AbstractCode, decode_groups, encode_groups
from nercc_jax.codes._decoding import Matrices
from nercc_jax.codes._kept import CachedMatrices
from nercc_jax.inference import order_points
from nercc_jax.inference._coded import _run, _run_on_mesh
from nercc_jax.inference._spmd import WORKERS, Placed, place_inputs
from nercc_jax.splines import smoothing_spline
from nercc_models.lenet5 import INPUT_SHAPE, LeNet5

_CLASSES = 10
_FEATURES = 128
_BUFFER = 1024
_OBJECTIVE_GROUPS, _OBJECTIVE_SETS = 4, 8
_IMAGE = 3 * 32 * 32


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and arguments with its shapes. With a `mesh` they lie on all its devices."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    mesh: Mesh | None = None


Devices: TypeAlias = Sequence[Any]


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def flags(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, bool)


def given(code: AbstractCode, sets: int) -> Matrices:
    """Return a decoder's matrices that were made before the program runs."""
    decoder = floats(sets, code.num_data, code.num_workers)
    return Matrices(decoder, flags(sets, code.num_data))  # pyright: ignore[reportArgumentType]


def encoder(code: AbstractCode) -> Any:
    return floats(code.num_workers, code.num_data)


def decode(code: AbstractCode, _: Devices) -> Program:
    return Program(
        lambda code, y, mask: code.try_decode(y, mask),
        (code, floats(code.num_workers, _CLASSES), flags(code.num_workers)),
    )


def decode_many(code: AbstractCode, groups: int, known: bool, _: Devices) -> Program:
    """Decode groups with a mask each, as coded inference does."""
    answers = floats(groups, code.num_workers, _CLASSES)
    masks = flags(groups, code.num_workers)
    return Program(decode_groups, (code, answers, masks, given(code, 1) if known else None))


def encode(code: AbstractCode, known: bool, _: Devices) -> Program:
    x = floats(1, code.num_data, _IMAGE)
    return Program(encode_groups, (code, x, encoder(code) if known else None))


def infer(code: AbstractCode, groups: int, known: bool, _: Devices) -> Program:
    """Run LeNet5 behind a code whose encoder is made once; `known`: the decoder, too."""
    matrices = CachedMatrices(encoder(code), given(code, 1) if known else None)

    def run(model, code, x, masks, known):
        return _run(model, code, x, masks, (), True, known)

    images, masks = floats(groups, code.num_data, *INPUT_SHAPE), flags(groups, code.num_workers)
    model = LeNet5(_CLASSES, rngs=nnx.Rngs(0))
    return Program(run, (model, code, images, masks, matrices))


def infer_on_mesh(code: AbstractCode, groups: int, devices: Devices) -> Program:
    """Run LeNet5 over four devices, with a mask given in jit."""
    mesh = Mesh(np.array(devices[:4]), (WORKERS,))
    slots = floats(-(-code.num_workers // 4) * 4, code.num_data)
    placed = Placed(LeNet5(_CLASSES, rngs=nnx.Rngs(0)), code, slots, mesh, WORKERS)

    def run(placed, x, masks):
        inputs, shape = place_inputs(placed, x, masks, ())
        return _run_on_mesh(placed, *inputs, True, shape)

    images, masks = floats(groups, code.num_data, *INPUT_SHAPE), flags(groups, code.num_workers)
    return Program(run, (placed, images, masks), mesh=mesh)


def variance(code: AbstractCode, _: Devices) -> Program:
    return Program(
        lambda code, mask: code.posterior_variance(mask), (code, flags(code.num_workers))
    )


def spline(knots: int, _: Devices) -> Program:
    return Program(smoothing_spline, (floats(knots), floats(knots, 1), floats()))


def order(buffers: int, _: Devices) -> Program:
    return Program(
        lambda x: order_points(x, 8, features=x, buffer_size=_BUFFER),
        (floats(buffers * _BUFFER, _FEATURES),),
    )


def objective(code: AbstractCode, _: Devices) -> Program:
    """Return the slope of the tuning objective in the code's numbers."""

    def loss(code, x, masks):
        return nested_objective(jnp.tanh, code, x, masks)

    x = floats(_OBJECTIVE_GROUPS, code.num_data, _CLASSES)
    masks = flags(_OBJECTIVE_SETS, code.num_workers)
    return Program(jax.grad(loss, allow_int=True), (code, x, masks))


_code = functools.cache(lambda num_workers, num_data: NeRCC(num_data, num_workers))


def _of(make: Callable[..., Program], num_workers: int, num_data: int, *rest: Any):
    return lambda devices: make(_code(num_workers, num_data), *rest, devices)


# By the name in compiled_budget.json; sizes are (N, K).
PROGRAMS: dict[str, Callable[[Devices], Program]] = {
    "try_decode (20, 8)": _of(decode, 20, 8),
    "try_decode (20, 8) x 64 groups": _of(decode_many, 20, 8, 64, False),
    "try_decode (20, 8), matrix given": _of(decode_many, 20, 8, 1, True),
    "try_decode (100, 20)": _of(decode, 100, 20),
    "try_decode (100, 20) x 64 groups": _of(decode_many, 100, 20, 64, False),
    "try_decode (20, 8), Berrut": lambda devices: decode(Berrut(8, 20), devices),
    "encode (20, 8)": _of(encode, 20, 8, False),
    "encode (20, 8), matrix given": _of(encode, 20, 8, True),
    "LeNet5 (20, 8), mask traced": _of(infer, 20, 8, 1, False),
    "LeNet5 (20, 8) x 64 groups, mask traced": _of(infer, 20, 8, 64, False),
    "LeNet5 (20, 8), mask known": _of(infer, 20, 8, 1, True),
    "LeNet5 (20, 8) x 64 groups, mask known": _of(infer, 20, 8, 64, True),
    "LeNet5 (20, 8) x 64 groups, 4 devices": _of(infer_on_mesh, 20, 8, 64),
    "posterior_variance (20, 8)": _of(variance, 20, 8),
    "smoothing_spline 10,000": functools.partial(spline, 10_000),
    "smoothing_spline 1,000,000": functools.partial(spline, 1_000_000),
    "order_points 1,024": functools.partial(order, 1),
    "order_points 16 x 1,024": functools.partial(order, 16),
    "nested_objective (20, 8), gradient": _of(objective, 20, 8),
}

# Left out of a quick check: what takes the compiler longest, and smaller ones of them show as well.
SLOW = {
    "try_decode (20, 8) x 64 groups",
    "try_decode (20, 8), matrix given",
    "try_decode (100, 20)",
    "try_decode (100, 20) x 64 groups",
    "LeNet5 (20, 8), mask traced",
    "LeNet5 (20, 8) x 64 groups, mask traced",
    "LeNet5 (20, 8) x 64 groups, mask known",
    "LeNet5 (20, 8) x 64 groups, 4 devices",
    "smoothing_spline 10,000",
    "smoothing_spline 1,000,000",
    "order_points 16 x 1,024",
    "nested_objective (20, 8), gradient",
}
