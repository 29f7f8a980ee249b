"""The workers of coded inference as one SPMD program over a mesh of devices.

Workers are slots along one axis of the mesh. Every device has the same number of slots: with N = 20
on 8 devices each has 3, and the slots left over repeat workers, whose second answers are unused.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Shaped

from ..codes import AbstractCode, Decoded, encode_groups
from ..codes.decoding import decode_vectors
from ..codes.kept import CachedMatrices, Matrices, encoder_of
from ..codes.trees import join
from ..codes.workers import run_workers
from .models import Model

_REPLICATED = PartitionSpec()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placed:
    """Models and a code whose arrays lie on a mesh; `place` makes one.

    It is not an Equinox module, since those warn of fields like `jax.vmap(model)`.

    Attributes:
        model: The models.
        coder: The code, or a scheme with its code.
        encoder: The encoder's matrix, with a row for each slot.
        mesh: The mesh, with automatic axes: models need not know that they are sharded.
        axis: The axis over which workers are spread.
        worker: The worker of each slot of all devices, device after device.
        kinds: The model of each slot of a device, the same on all devices: an SPMD program runs the
            same models everywhere, so the workers of each kind are spread over all devices.
    """

    model: Any
    coder: Any
    encoder: Any  # an array; other leaves when the tree is mapped or partitioned
    mesh: Mesh = dataclasses.field(metadata={"static": True})
    axis: str = dataclasses.field(metadata={"static": True})
    worker: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    kinds: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def by(self, dimension: int) -> PartitionSpec:
        """Return the sharding of arrays whose given dimension is spread over the workers' axis."""
        return PartitionSpec(*(None,) * dimension, self.axis)

    def inputs(
        self, x: PyTree, available: ArrayLike, args: tuple, known: CachedMatrices
    ) -> tuple[PyTree, Array, tuple, CachedMatrices]:
        """Return groups of data points, masks, arguments and known matrices on the mesh."""
        everywhere = NamedSharding(self.mesh, _REPLICATED)
        x = jax.tree.map(lambda leaf: put(leaf, everywhere), x)
        return x, put(available, everywhere), *_on_mesh((args, known), self.mesh)

    def answer(
        self,
        x: PyTree[Shaped[Array, "groups num_data ..."]],
        args: tuple,
        encoders: Float[Array, "groups num_workers num_data"] | None = None,
    ) -> PyTree[Float[Array, "groups slots ..."]]:
        """Return the answers of all slots, on their devices, to groups of data points.

        Each device has all data points, and encodes for its own workers. `encoders` are matrices
        for the groups, if they differ.
        """
        kinds = np.array(self.kinds)
        arrays, static = eqx.partition((self.model, args), eqx.is_array)

        def of_device(arrays, encoder, x):
            model, args = eqx.combine(arrays, static)
            return run_workers(model, kinds, encode_groups(None, x, encoder), *args)

        encoder, by = self.encoder, self.by(0)
        if encoders is not None:
            encoder, by = encoders[:, np.array(self.worker)], self.by(1)
        mapped = self._on_each_device(of_device, (_REPLICATED, by, _REPLICATED), self.by(1))
        try:
            return mapped(arrays, encoder, self.gather(x))
        except NotImplementedError as error:
            if "Closing over" not in str(error):
                raise
            raise ValueError(
                "the model closes over arrays that are sharded on Explicit axes, as "
                "jax.vmap(module) or a lambda does, and JAX cannot pass them to the devices: give "
                "it as a pytree, eqx.filter_vmap(module) or jax.tree_util.Partial(function, arrays)"
            ) from error

    def of_workers(
        self, y: PyTree[Float[Array, "groups slots ..."]]
    ) -> PyTree[Float[Array, "groups num_workers ..."]]:
        """Return the answers of all workers on all devices."""
        first = np.unique(self.worker, return_index=True)[1]
        return self.gather(jax.tree.map(lambda leaf: leaf[:, first], y))

    def gather(self, tree: PyTree) -> PyTree:
        """Return the arrays on all devices."""
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, _REPLICATED))

    def decode(
        self,
        y: PyTree[Float[Array, "groups slots ..."]],
        available: Bool[Array, "groups num_workers"],
        given: Matrices | None,
    ) -> Decoded:
        """Return predictions of groups, on all devices, from the answers of all slots.

        D devices share the decoding. To gather all N answers on each device and decode them there
        would move N m numbers to each; to exchange shares and gather predictions moves
        (N + K) m / D + K m. On eight CPU devices on two cores, N = 20, K = 8, in ms, gathered /
        shared by coordinate / shared by group: 1 group of 10 coordinates 2.1 / 2.7 / 3.0; 64 of 10
        7.6 / 7.4 / 4.1; 64 of 1,000 144 / 25 / 10; 1 of 150,528 158 / 23 / 190. Sharing by group
        shares the decoder's matrices, too, and needs a group for each device. With fewer groups
        decoding is shared by coordinate, and each device makes the matrices of traced masks for
        itself: if one device made them, the others would wait as long, and then receive them.
        (The matrices of known masks are made once, on the host: `given`.)
        """
        arrays, static = eqx.partition(self.coder, eqx.is_array)
        first = np.unique(self.worker, return_index=True)[1]
        flat, form = join(y, 2)
        (groups, _, size), devices = flat.shape, self.mesh.shape[self.axis]
        by_group = groups >= devices
        shared = 0 if by_group else 2

        def of_device(arrays, flat, available, given):
            if not by_group:
                # A value that is not finite spoils its answer's other coordinates, which lie on
                # other devices.
                finite = jnp.all(jnp.isfinite(flat), axis=-1)
                flat = jnp.where(finite[..., None], flat, jnp.nan)
            flat = jax.lax.all_to_all(flat, self.axis, split_axis=shared, concat_axis=1, tiled=True)
            code = eqx.combine(arrays, static)
            decoded = decode_vectors(code, flat[:, first], available, given)
            return decoded.predictions, decoded.responded, decoded.recovered

        of_groups = of_given = _REPLICATED
        flat = _padded(flat, shared, devices)
        if by_group:
            of_groups, available = self.by(0), _padded(available, 0, devices)
            if given is not None and len(given.recovered) > 1:
                of_given = self.by(0)
                given = jax.tree.map(lambda leaf: _padded(leaf, 0, devices), given)
        inputs = (_REPLICATED, self.by(1), of_groups, of_given)
        outputs = (self.by(shared), of_groups, of_groups)
        decode = self._on_each_device(of_device, inputs, outputs)
        predictions, responded, recovered = self.gather(decode(arrays, flat, available, given))
        predictions = form.split(predictions[:groups, :, :size])
        return Decoded(predictions, responded[:groups], recovered[:groups])

    def _on_each_device(self, function: Callable, inputs: Any, outputs: Any) -> Callable:
        """Return it mapped over the workers' axis; the compiler keeps the mesh's other axes."""
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=inputs,
            out_specs=outputs,
            axis_names={self.axis},
            # The check refuses scans that start from constants and `eqx.error_if`, which models and
            # decoders may contain.
            check_vma=False,
        )


def place(
    model: Model | Sequence[Model],
    coder: Any,
    code: AbstractCode,
    mesh: Mesh,
    axis: str | None = None,
) -> Placed:
    """Put the arrays of models and of a code or scheme on the mesh, to spread workers over an axis.

    Arrays that lie on exactly the mesh's devices keep their sharding; others are replicated. By
    default the axis is the one named `workers`, or the only one.

    Raises:
        ValueError: The mesh has no such axis.
    """
    if axis is None:
        axis = str(mesh.axis_names[0]) if len(mesh.axis_names) == 1 else "workers"
    if axis not in mesh.axis_names:
        raise ValueError(
            f"the mesh has the axes {mesh.axis_names}, and none named {axis!r}: say by axis= over "
            "which of them workers are spread"
        )
    mesh = Mesh(mesh.devices, mesh.axis_names)  # with automatic axes, of whatever type they were

    # Workers in order, kind by kind; slots left over repeat the first workers.
    models, devices = code.worker_models, mesh.shape[axis]
    of_device, kinds = [], []
    for kind in range(int(models.max()) + 1):
        workers = np.flatnonzero(models == kind)
        each = -(-workers.size // devices)
        of_device.append(np.resize(workers, (devices, each)))
        kinds += [kind] * each
    worker = np.concatenate(of_device, axis=1).ravel()
    encoder = put(encoder_of(code)[worker], NamedSharding(mesh, _REPLICATED))
    model, coder = _on_mesh(model, mesh), _on_mesh(coder, mesh)
    return Placed(model, coder, encoder, mesh, axis, tuple(worker.tolist()), tuple(kinds))


def put(value: ArrayLike, sharding: Sharding) -> Array:
    """Return the array on the devices of all processes; all must call this with the same value."""
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


def _on_mesh(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return the tree on the mesh's devices, replicated unless its arrays lie there already."""
    leaves, structure = jax.tree.flatten(tree)
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array | np.ndarray) and not isinstance(leaf, Tracer):
            lies: Any = getattr(leaf, "sharding", None)
            own: Any = getattr(lies, "mesh", None)
            there = isinstance(own, Mesh) and tuple(own.devices.flat) == tuple(mesh.devices.flat)
            # With automatic axes.
            own, spec = (own, lies.spec) if there else (mesh, _REPLICATED)
            leaves[number] = put(leaf, NamedSharding(Mesh(own.devices, own.axis_names), spec))
    return jax.tree.unflatten(structure, leaves)


def _padded(array: Any, axis: int, devices: int) -> Any:
    """Repeat the last entry along the axis until devices have equal shares."""
    missing = -array.shape[axis] % devices
    if not missing:
        return array
    numpy = jnp if isinstance(array, jax.Array) else np
    return numpy.pad(array, [(0, missing * (i == axis)) for i in range(array.ndim)], mode="edge")
