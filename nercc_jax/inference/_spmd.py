"""Coded inference as one SPMD program over a mesh of devices.

Workers are the places of work on one axis of the mesh. Devices take equally many: with N = 20
on 8 devices each has 3 slots, and the slots left over repeat workers, whose second answer nobody
needs.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Shaped

from ..codes import AbstractCode, Decoded
from ..codes._decoding import Matrices, decode_vectors
from ..codes._groups import encode_leaf
from ..codes._kept import encoder_of
from ..codes._trees import any_tracer, join
from ._conditions import cast_floats, worker_dtype_of
from ._workers import Model, run_models

WORKERS = "workers"  # the axis of that name is taken, unless another one is named
_REPLICATED = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Slots:
    """The worker of each slot of all devices, device after device.

    `kinds` tells the models of one device's slots, the same on all: an SPMD program runs the same
    models everywhere, so the workers of each kind are spread over all devices.
    """

    worker: Int[np.ndarray, " slots"]
    kinds: Int[np.ndarray, " slots_of_one"]

    @property
    def of_worker(self) -> Int[np.ndarray, " num_workers"]:
        """Return the first slot of each worker."""
        return np.unique(self.worker, return_index=True)[1]


def slots(kinds: Int[np.ndarray, " num_workers"], devices: int) -> Slots:
    """Spread workers over devices, in order, those of each kind by themselves."""
    of_device, of_slot = [], []
    for kind in range(int(kinds.max()) + 1):
        workers = np.flatnonzero(kinds == kind)
        each = -(-workers.size // devices)
        of_device.append(np.resize(workers, (devices, each)))  # repeats from the first on
        of_slot.append(np.full(each, kind))
    return Slots(np.concatenate(of_device, axis=1).ravel(), np.concatenate(of_slot))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placed:
    """Models and a code whose arrays lie on a mesh, and the encoder (slots, K): a row a slot.

    No Equinox module: those warn of fields like `jax.vmap(model)`.
    """

    model: Any
    code: AbstractCode
    encoder: Any  # an array; other leaves when the tree is mapped or partitioned
    mesh: Mesh = dataclasses.field(metadata={"static": True})
    axis: str = dataclasses.field(metadata={"static": True})

    @property
    def devices(self) -> int:
        return self.mesh.shape[self.axis]

    def by(self, dimension: int) -> PartitionSpec:
        """Return the sharding of arrays with this dimension spread over the workers' axis."""
        return PartitionSpec(*(None,) * dimension, self.axis)

    @property
    def slots(self) -> Slots:
        return slots(self.code.worker_models, self.devices)


def place(
    model: Model | Sequence[Model], code: AbstractCode, mesh: Mesh, axis: str | None = None
) -> Placed:
    """Put the arrays of models and code on the mesh, to spread workers over this axis of it.

    Arrays that lie on exactly its devices keep their sharding; others are replicated. Without an
    `axis` it is the one named `workers`, or the only one.

    Raises:
        ValueError: The mesh has no such axis.
    """
    axis = _axis_of(mesh, axis)
    # Axes of every type become automatic: models need not know that they are sharded.
    mesh = Mesh(mesh.devices, mesh.axis_names)
    workers = slots(code.worker_models, mesh.shape[axis]).worker
    encoder = put(encoder_of(code)[workers], NamedSharding(mesh, _REPLICATED))
    return Placed(on_mesh(model, mesh), on_mesh(code, mesh), encoder, mesh, axis)


def _axis_of(mesh: Mesh, axis: str | None) -> str:
    if axis is None:
        axis = str(mesh.axis_names[0]) if len(mesh.axis_names) == 1 else WORKERS
    if axis not in mesh.axis_names:
        raise ValueError(
            f"the mesh has the axes {mesh.axis_names}, and none named {axis!r}: say by axis= over "
            "which of them workers are spread"
        )
    return axis


def on_mesh(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return the tree on the mesh's devices, replicated unless its arrays lie there already."""
    devices = tuple(mesh.devices.flat)

    def move(leaf):
        if not isinstance(leaf, jax.Array | np.ndarray) or isinstance(leaf, Tracer):
            return leaf
        lies = _automatically(leaf)
        if lies is not None and tuple(lies.mesh.devices.flat) == devices:  # pyright: ignore[reportOptionalMemberAccess]
            return put(leaf, lies)
        return put(leaf, NamedSharding(mesh, _REPLICATED))

    return jax.tree.map(move, tree)


def _automatically(leaf: Any) -> NamedSharding | None:
    """Return an array's sharding on its mesh, with automatic axes; None if it lies on none."""
    here = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
    sharding = leaf.sharding if here else None
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return None
    return NamedSharding(Mesh(sharding.mesh.devices, sharding.mesh.axis_names), sharding.spec)


def put(value: ArrayLike, sharding: Sharding) -> Array:
    """Return the array on devices of all processes, which all call this with the same value."""
    if isinstance(value, Tracer):
        return value
    everywhere = isinstance(value, jax.Array) and not value.is_fully_addressable
    if jax.process_count() == 1 or everywhere:
        return jax.device_put(value, sharding)
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(value), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


def place_inputs(
    placed: Placed,
    x: PyTree,
    available: ArrayLike,
    args: PyTree,
    given: Matrices | None = None,
    *,
    share: bool = True,
) -> tuple[tuple[PyTree, Array, PyTree, Matrices | None], tuple[int, ...] | None]:
    """Return groups of data points, masks, arguments and decoders' matrices on the mesh.

    Of d coordinates, all are K d numbers for each further device to receive, and then it encodes
    for its own workers. Shares are K d / D for each of D devices, which encode their share for all
    workers and exchange those: N d / D more. Where that is less, and x is one array, x becomes
    vectors in shares, and the data points' shape is returned, too.
    """
    # Of Explicit axes it would have to be said how what is made of x here lies.
    x = jax.tree.map(lambda leaf: put(leaf, lies) if (lies := _automatically(leaf)) else leaf, x)
    code, leaves, shape = placed.code, jax.tree.leaves(x), None
    if share and len(leaves) == 1 and code.num_data * (placed.devices - 1) > code.num_workers:
        shape = leaves[0].shape[2:]
        x = jax.tree.map(
            lambda leaf: _padded(leaf.reshape(*leaf.shape[:2], -1), 2, placed.devices), x
        )
    by = NamedSharding(placed.mesh, _REPLICATED if shape is None else placed.by(2))
    x = jax.tree.map(lambda leaf: put(leaf, by), x)
    available = put(available, NamedSharding(placed.mesh, _REPLICATED))
    return (x, available, *on_mesh((args, given), placed.mesh)), shape


def enter(placed: Placed, inputs: PyTree) -> contextlib.AbstractContextManager:
    """Make the mesh the context's: another one of the caller's would not do for arrays on this one.

    This does nothing where JAX traces any of the inputs: then the context is no longer ours to set.
    """
    return contextlib.nullcontext() if any_tracer(placed, inputs) else jax.set_mesh(placed.mesh)


def spmd_decoded(
    placed: Placed,
    x: PyTree,
    available: Array,
    args: tuple,
    shape: tuple[int, ...] | None,
    given: Matrices | None,
) -> Decoded:
    """Coded inference on groups, for inputs of `place_inputs`; the result is on all devices."""
    y = work(placed, x, args, shape)
    flat, form = join(y, 2)
    decode = _decode_by_group if flat.shape[0] >= placed.devices else _decode_by_coordinate
    decoded = _everywhere(placed, decode(placed, flat, available, given))
    decoded = jax.tree.map(lambda leaf: leaf[: flat.shape[0]], decoded)
    predictions = form.split(decoded.predictions[..., : flat.shape[2]])
    return Decoded(predictions, decoded.responded, decoded.recovered)


def spmd_answers(
    placed: Placed,
    x: PyTree[Shaped[Array, "groups num_data ..."]],
    args: tuple,
    encoders: Float[Array, "groups num_workers num_data"] | None = None,
) -> PyTree[Float[Array, "groups num_workers ..."]]:
    """Return all workers' answers to groups, on all devices; `encoders` are the groups' own."""
    y = work(placed, _everywhere(placed, x), args, encoders=encoders)
    first = placed.slots.of_worker
    return _everywhere(placed, jax.tree.map(lambda leaf: leaf[:, first], y))


def _everywhere(placed: Placed, tree: PyTree) -> PyTree:
    return jax.lax.with_sharding_constraint(tree, NamedSharding(placed.mesh, _REPLICATED))


def work(
    placed: Placed,
    x: PyTree,
    args: tuple,
    shape: tuple[int, ...] | None = None,
    encoders: Float[Array, "groups num_workers num_data"] | None = None,
) -> PyTree[Float[Array, "groups slots ..."]]:
    """Return the answers of all slots, on their devices, to groups of data points.

    x is (groups, K, ...), replicated, and nothing moves; or it is vectors, a share of their
    coordinates on each device, of data points of that `shape`. `encoders` are the groups' own.
    """
    kinds, dtype = placed.slots.kinds, worker_dtype_of(placed.model)
    arrays, static = eqx.partition((placed.model, args), eqx.is_array)

    def of_device(arrays, encoder, x):
        model, args = eqx.combine(arrays, static)
        coded = jax.tree.map(lambda leaf: encode_leaf(encoder, leaf), x)
        coded = cast_floats(coded, dtype)  # before it is sent
        if shape is not None:
            coded = jax.tree.map(exchanged, coded)
        return run_models(model, kinds, coded, *args)

    def exchanged(coded):
        assert shape is not None
        coded = jax.lax.all_to_all(coded, placed.axis, split_axis=1, concat_axis=2, tiled=True)
        return coded[..., : math.prod(shape)].reshape(*coded.shape[:2], *shape)

    encoder, by = placed.encoder, placed.by(0)
    if encoders is not None:
        encoder, by = encoders[:, placed.slots.worker], placed.by(1)
    inputs = (by, _REPLICATED) if shape is None else (_REPLICATED, placed.by(2))
    mapped = _on_each_device(placed, of_device, (_REPLICATED, *inputs), placed.by(1))
    try:
        return mapped(arrays, encoder, x)
    except NotImplementedError as error:
        if "Closing over" not in str(error):
            raise
        raise ValueError(
            "the model closes over arrays that are sharded on Explicit axes, as jax.vmap(module) "
            "or a lambda does, and JAX cannot pass them to the devices: give it as a pytree, "
            "eqx.filter_vmap(module) or jax.tree_util.Partial(function, arrays)"
        ) from error


# Decoding is shared as well: gathering all N answers on each device and decoding them everywhere
# moves N m numbers to each, exchanging shares and gathering predictions (N + K) m / D + K m. Eight
# CPU devices on two cores, N = 20, K = 8, in ms, gathered / by coordinate / by group: 1 group of 10
# coordinates 2.1 / 2.7 / 3.0; 64 of 10 7.6 / 7.4 / 4.1; 64 of 1,000 144 / 25 / 10; 1 of 150,528
# 158 / 23 / 190. By group, the decoder's matrices are shared too, and it needs a group a device. By
# coordinate there are fewer groups than devices, and each device makes the matrices of traced masks
# for itself: one device would take as long while others wait, and then have to send them. (Those of
# known masks are made once, on the host: `given`.)


def _decode_by_group(
    placed: Placed, flat: Array, available: Array, given: Matrices | None
) -> Decoded:
    arrays, static = eqx.partition(placed.code, eqx.is_array)
    first = placed.slots.of_worker

    def of_device(arrays, flat, available, given):
        flat = jax.lax.all_to_all(flat, placed.axis, split_axis=0, concat_axis=1, tiled=True)
        return decode_vectors(eqx.combine(arrays, static), flat[:, first], available, given)

    def padded(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: _padded(leaf, 0, placed.devices), tree)

    by_group = given is not None and len(given.recovered) > 1
    flat, available, given = padded(flat), padded(available), padded(given) if by_group else given
    by = placed.by(0)
    inputs = (_REPLICATED, placed.by(1), by, by if by_group else _REPLICATED)
    return _on_each_device(placed, of_device, inputs, by)(arrays, flat, available, given)


def _decode_by_coordinate(
    placed: Placed, flat: Array, available: Array, given: Matrices | None
) -> Decoded:
    arrays, static = eqx.partition(placed.code, eqx.is_array)
    first = placed.slots.of_worker

    def of_device(arrays, flat, available, given):
        # What is broken in one coordinate is so in all: no device sees those of the others.
        finite = jnp.all(jnp.isfinite(flat), axis=-1)
        flat = jnp.where(finite[..., None], flat, jnp.nan)
        flat = jax.lax.all_to_all(flat, placed.axis, split_axis=2, concat_axis=1, tiled=True)
        code = eqx.combine(arrays, static)
        decoded = decode_vectors(code, flat[:, first], available, given)
        return decoded.predictions, decoded.responded, decoded.recovered

    flat = _padded(flat, 2, placed.devices)
    inputs = (_REPLICATED, placed.by(1), _REPLICATED, _REPLICATED)
    outputs = (placed.by(2), _REPLICATED, _REPLICATED)
    decode = _on_each_device(placed, of_device, inputs, outputs)
    return Decoded(*decode(arrays, flat, available, given))


def _on_each_device(placed: Placed, function: Callable, inputs: Any, outputs: Any) -> Callable:
    """Manual over the workers' axis; other axes of the mesh remain the compiler's."""
    return jax.shard_map(
        function,
        mesh=placed.mesh,
        in_specs=inputs,
        out_specs=outputs,
        axis_names={placed.axis},
        # The check refuses what models and decoders may hold: scans that start from constants,
        # `eqx.error_if`.
        check_vma=False,
    )


def _padded(array: Any, axis: int, devices: int) -> Any:
    """Repeat the last entry along the axis until devices have equal shares."""
    missing = -array.shape[axis] % devices
    if not missing:
        return array
    numpy = jnp if isinstance(array, jax.Array) else np
    return numpy.pad(array, [(0, missing * (i == axis)) for i in range(array.ndim)], mode="edge")
