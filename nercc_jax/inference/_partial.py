"""Partial results of one SPMD program: decode from the devices that are done, wait for no other."""

import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from ..codes import AbstractCode, Decoded, decode_groups
from ..codes._decoding import Matrices
from ..codes._kept import known_decoders
from ._conditions import cast_model
from ._groups import group_points
from ._models import check_model
from ._spmd import Placed, place, put, work
from ._workers import Model

_POLL_SECONDS = 2e-4  # models take milliseconds, a look at a device's answer some microseconds


def partial_inference(
    model: Model | Sequence[Model],
    code: AbstractCode,
    mesh: Mesh,
    *,
    axis: str | None = None,
    grouped: bool | None = None,
    max_behind: int = 2,
    worker_dtype: DTypeLike | None = None,
) -> Callable[..., Decoded]:
    """Return a function `infer(x, *, number=None, deadline) -> Decoded` for slow devices.

    Workers are spread over an axis of the mesh, as by `coded_inference(..., mesh=mesh)`, but the
    program that encodes and runs the model moves nothing between them, so each device is done when
    it is done. `infer` decodes as soon as the answers of `number` workers (default: all N) are
    there, or `deadline` seconds after the call from those that are there by then. A device's
    answers come all at once: those of all its workers for all groups. `responded` are the workers
    that were used; one whose answer is not finite is a straggler. x is (K, ...) or (groups, K,
    ...), floats, or a pytree of such. A group with a data point that is not finite is NaN, and not
    `recovered`. Decoding runs on a CPU device outside the mesh where there is one, else on a device
    that has answered.

    A running XLA program cannot be cancelled: what is left behind runs to its end, and the next
    program queues behind it (of CPU devices, all wait until it is done on all). Compiling, on the
    first call for a shape, takes from the deadline: warm up with a long one. One caller at a time:
    it is not thread-safe.

    Args:
        model: As in `coded_inference`.
        code: The code.
        mesh: The mesh.
        axis: As in `coded_inference`.
        grouped: As in `coded_inference`.
        max_behind: A call waits until no device has more than this many of this function's programs
            unfinished.
        worker_dtype: As in `coded_inference`.

    Raises:
        ValueError: Several processes run (they would have to wait for each other), the mesh has no
            such axis, the model is in training mode, an argument is out of range, or `number`
            answers recover nothing.
        TimeoutError: Devices have too much to do until the deadline, or what answered by then
            recovers nothing.
    """
    if jax.process_count() > 1:
        raise ValueError(f"partial results are for one process, not {jax.process_count()}")
    if max_behind < 0:
        raise ValueError(f"max_behind must be 0 or more, not {max_behind}")
    check_model(model)
    placed = place(cast_model(model, worker_dtype), code, mesh, axis)
    program = _program(placed)
    # On the host: wherever decoding runs, it must not touch a slow device.
    code = jax.tree.map(np.asarray, code)
    unfinished: list[Array] = []

    def infer(x: PyTree, *, number: int | None = None, deadline: float) -> Decoded:
        start = time.monotonic()
        number = code.num_workers if number is None else number
        if not 1 <= number <= code.num_workers:
            raise ValueError(f"number must be 1 to {code.num_workers} workers, not {number}")
        if not deadline > 0:
            raise ValueError(f"deadline must be a positive number of seconds, not {deadline}")
        x, many = group_points(code, x, grouped)

        if not _wait(lambda: not _behind(unfinished, max_behind), start + deadline):
            busy = sorted(device.id for device in _behind(unfinished, max_behind))
            raise TimeoutError(
                f"devices {busy} still have more than {max_behind} earlier programs to finish "
                f"after {deadline} s"
            )
        with jax.set_mesh(placed.mesh):
            by = NamedSharding(placed.mesh, PartitionSpec())
            y = program(jax.tree.map(lambda leaf: put(leaf, by), x))
        unfinished.append(jax.tree.leaves(y)[0])  # a device's outputs are all there at once

        arrivals = _Arrivals(placed, y)
        enough = _wait(lambda: arrivals.look().sum() >= number, start + deadline)
        there = arrivals.look()
        answered = f"{there.sum()} of {code.num_workers} workers answered within {deadline} s"
        if not there.any():
            raise TimeoutError(answered)
        given = known_decoders(code, there)
        with jax.set_mesh(Mesh([_decoding_device(placed.mesh, arrivals)], ("decoding",))):
            decoded = _decode(code, arrivals.answers(), there, many, given)
            # Nothing is recovered from broken data points either: then that is the result.
            if not np.any(decoded.recovered) and not np.any(
                eqx.filter_jit(type(code).recovered)(code, there)
            ):
                error = ValueError if enough else TimeoutError
                raise error(f"{answered}, from which no prediction can be recovered")
        return decoded

    return infer


class _Arrivals:
    """The answers of a program that have come back; never touches a shard that is not ready."""

    def __init__(self, placed: Placed, y: PyTree[Float[Array, "groups slots ..."]]):
        leaves, self._structure = jax.tree.flatten(y)
        workers = placed.code.num_workers
        self._forms = [
            ((leaf.shape[0], workers, *leaf.shape[2:]), np.dtype(leaf.dtype)) for leaf in leaves
        ]
        self._num_workers = workers
        self._waiting = [
            (placed.slots.worker[shards[0].index[1]], [shard.data for shard in shards])
            for shards in zip(*(leaf.addressable_shards for leaf in leaves), strict=True)
        ]
        self._ready: list[tuple[np.ndarray, list[Array]]] = []

    def look(self) -> Bool[np.ndarray, " num_workers"]:
        """Whose answers are there."""
        ready = [all(part.is_ready() for part in parts) for _, parts in self._waiting]
        self._ready += [one for one, is_ready in zip(self._waiting, ready, strict=True) if is_ready]
        self._waiting = [
            one for one, is_ready in zip(self._waiting, ready, strict=True) if not is_ready
        ]
        there = np.zeros(self._num_workers, bool)
        for workers, _ in self._ready:
            there[workers] = True
        return there

    def answers(self) -> PyTree[Float[np.ndarray, "groups num_workers ..."]]:
        """Return the answers that were there at the last look, zeros elsewhere."""
        leaves = [np.zeros(shape, dtype) for shape, dtype in self._forms]
        for workers, parts in self._ready:
            for leaf, part in zip(leaves, parts, strict=True):
                leaf[:, workers] = part
        return jax.tree.unflatten(self._structure, leaves)

    @property
    def device(self) -> Any:
        """Return the first device that is done: decoding is compiled for each device."""
        return min((next(iter(parts[0].devices())) for _, parts in self._ready), key=lambda d: d.id)


def _wait(condition: Callable[[], Any], until: float) -> bool:
    """Return whether the condition came true in time."""
    while not condition():
        if time.monotonic() >= until:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _behind(unfinished: list[Array], most: int) -> list[Any]:
    """Return the devices with more than `most` programs unfinished; forget what is finished."""
    unfinished[:] = [y for y in unfinished if not y.is_ready()]  # pyright: ignore
    shards = [shard for y in unfinished for shard in y.addressable_shards]
    counts = Counter(shard.device for shard in shards if not shard.data.is_ready())
    return [device for device, count in counts.items() if count > most]


def _decoding_device(mesh: Mesh, arrivals: _Arrivals) -> Any:
    try:
        cpus = jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        cpus = []
    return next((cpu for cpu in cpus if cpu not in mesh.devices.flat), arrivals.device)


def _program(placed: Placed) -> Callable[[PyTree], PyTree[Float[Array, "groups slots ..."]]]:
    """Encode and run the model; return at once, which `eqx.filter_jit` would not."""
    arrays, static = eqx.partition(placed, eqx.is_array)
    # Only along the workers' axis: each device of a worker gets the whole of its answers.
    shares = NamedSharding(placed.mesh, placed.by(1))
    run = jax.jit(lambda arrays, x: work(eqx.combine(arrays, static), x, ()), out_shardings=shares)
    return functools.partial(run, arrays)


@eqx.filter_jit
def _decode(
    code: AbstractCode, y: PyTree, there: ArrayLike, grouped: bool, given: Matrices | None
) -> Decoded:
    y = jax.tree.map(jnp.asarray, y)
    groups = len(jax.tree.leaves(y)[0])
    masks = jnp.broadcast_to(there, (groups, code.num_workers))
    decoded = decode_groups(code, y, masks, given)
    return decoded if grouped else jax.tree.map(lambda leaf: leaf[0], decoded)
