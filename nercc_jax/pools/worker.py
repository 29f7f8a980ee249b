"""The code that runs in a worker's thread or process."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ..codes.kept import x64_enabled
from ..codes.trees import is_float
from ..codes.workers import call_model
from ..inference import cast_model
from ..inference.models import (
    CastModel,
    Model,
    cast_floats,
    check_model,
    matmul_precision,
)
from ._faults import InjectedError, StruckCall, WorkerFaults

Device: TypeAlias = Any  # `jax.Device`, which pyright does not take for a type

# Example batches for which programs are compiled: one, several of different shapes, or none.
Examples: TypeAlias = PyTree | Sequence[PyTree] | None

_NO_MESH = Mesh(np.empty((), object), ())

# Seconds that a worker hangs: longer than any pool waits, and short enough for `threading`.
_FOREVER = 1e6


@contextlib.contextmanager
def no_mesh() -> Iterator[None]:
    """Leave any mesh that the caller has set (`jax.set_mesh`).

    A pool places each of its arrays on a single device, not on the mesh.
    """
    with jax.set_mesh(_NO_MESH):
        yield


def off_meshes(tree: PyTree) -> PyTree:
    """Return the tree, with each array on a mesh moved to one of the mesh's devices."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or not isinstance(leaf.sharding, NamedSharding):
            return leaf
        first = min(leaf.sharding.addressable_devices, key=lambda device: device.id)
        return jax.device_put(leaf, SingleDeviceSharding(first))

    return jax.tree.map(move, tree)


class Program:
    """The models of a worker, the served one first, with their arrays on one device.

    `compiled=False` calls them without `jax.jit`, for a model that is not a JAX function, such as a
    remote endpoint. The precision (x64, and that of matrix products) is that of the thread that
    creates the program, whichever thread calls it.
    """

    def __init__(self, models: tuple[Model, ...], device: Device, compiled: bool):
        self._device, first = device, models[0]
        self._dtype = first.dtype if isinstance(first, CastModel) else None
        self._x64, self._products = x64_enabled(), matmul_precision()
        self._calls = [_on_device(model, device) if compiled else model for model in models]

    @contextlib.contextmanager
    def at_home(self) -> Iterator[None]:
        """Set the program's device and precision in this thread; calls are made inside.

        A worker's thread never leaves the context, since entering and leaving it takes a tenth of a
        small model's time.
        """
        with (
            no_mesh(),
            jax.enable_x64(self._x64),
            jax.default_matmul_precision(self._products),
            jax.default_device(self._device),
        ):
            yield

    def __call__(self, kind: int, batch: PyTree) -> PyTree[np.ndarray]:
        """Return model `kind`'s outputs on the host, in float32 or wider; only inside `at_home`."""
        answer = self._calls[kind](cast_floats(batch, self._dtype))
        # Most answers are one array, for which a type test is faster than `jax.tree.map`.
        one = isinstance(answer, jax.Array)
        return _on_host(answer) if one else jax.tree.map(_on_host, answer)


def _on_host(array: Any) -> np.ndarray:
    """Return a NumPy array, with short floats as float32: bfloat16 is not a float to NumPy."""
    array = np.asarray(array)
    short = array.dtype.itemsize < 4 and is_float(array)
    return array.astype(np.float32) if short else array


@no_mesh()
def _on_device(model: Model, device: Device) -> Callable[[PyTree], Any]:
    """Return a model as a compiled function, whose arrays are on the device."""
    arrays, rest = eqx.partition(model, eqx.is_array)
    # With a bare device, an array of an explicit mesh would keep that mesh in its type.
    arrays = jax.device_put(arrays, SingleDeviceSharding(device))
    # Flattened once: flattening a model in Python takes as long as a small model's run.
    leaves, structure = jax.tree.flatten(arrays)

    @jax.jit
    def call(leaves: list[Any], batch: PyTree) -> Any:
        return call_model(eqx.combine(jax.tree.unflatten(structure, leaves), rest), batch)

    return functools.partial(call, leaves)


def as_models(
    model: Model | Sequence[Model], worker_dtype: DTypeLike | None = None
) -> tuple[Model, ...]:
    """Return one or several models, the served one first, as a tuple cast to the workers' dtype.

    Raises ValueError if there is no model, or one is in training mode or cannot be cast.
    """
    check_model(model)
    models = (model,) if callable(model) else tuple(model)
    return cast_model(models, worker_dtype)


def warm_up(programs: Sequence[Program], num_models: int, example: Examples) -> None:
    """Compile all models for batches of the examples' shapes, without injected faults.

    Raises RuntimeError if a model does not run on an example.
    """
    examples = () if example is None else example
    if not isinstance(examples, Sequence):
        examples = (examples,)
    for batch in examples:
        try:
            for program in programs:
                with program.at_home():
                    for kind in range(num_models):
                        program(kind, jax.tree.map(np.asarray, batch))
        except Exception as error:
            shape = ", ".join(str(np.shape(leaf)) for leaf in jax.tree.leaves(batch))
            raise RuntimeError(
                f"the model does not run on a batch of shape {shape}: {error}"
            ) from error


class Worker:
    """A program with injected faults, to be called inside `Program.at_home`.

    `wait(seconds)` sleeps, or returns early if the worker is ended; `die()` ends the worker's
    thread or process.
    """

    def __init__(
        self,
        program: Program,
        faults: WorkerFaults,
        die: Callable[[], Any],
        wait: Callable[[float], Any] = time.sleep,
    ):
        self._program, self.faults = program, faults
        self._previous: dict[int, PyTree] = {}  # the latest answer of each model
        self._die, self._wait = die, wait

    def __call__(self, kind: int, batch: PyTree) -> PyTree[np.ndarray]:
        struck = self.faults.strike(batch)
        if "death" in struck.kinds:
            self._die()
        if "hang" in struck.kinds:
            self._wait(_FOREVER)
        if struck.seconds > 0:
            self._wait(min(struck.seconds, _FOREVER))
        return self.answer(struck, kind, batch)

    def answer(self, struck: StruckCall, kind: int, batch: PyTree) -> PyTree[np.ndarray]:
        """Answer a batch, unless a fault of the call prevents it."""
        if "error" in struck.kinds:
            raise InjectedError("injected on purpose")
        y = self._program(kind, batch)
        previous, self._previous[kind] = self._previous.get(kind, y), y
        if "swap" in struck.kinds:
            number = len(jax.tree.leaves(y)[0])
            places = np.arange(number)
            if number > 1:
                places = np.roll(places, self.faults.swap_random.integers(1, number))
            else:
                y, places = previous, np.array([-1])
            y = jax.tree.map(lambda leaf: leaf[places], y)
        nan = "nan" in struck.kinds
        return jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), y) if nan else y
