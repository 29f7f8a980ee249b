"""Cases that accelerator.py times: encoding, decoding, coded inference, order, splines, tuning."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nercc_jax import ExactStragglers, NeRCC, coded_inference, tune
from nercc_jax.codes import AbstractCode, decode_groups, encode_groups
from nercc_jax.codes._decoding import Matrices
from nercc_jax.inference import order_points
from nercc_jax.splines import smoothing_spline
from nercc_jax.tuning import Descent, Sampling
from nercc_models import repvgg_cifar, vit_base_patch16_224, vit_small_cifar, vit_tiny_patch16_224
from nercc_models.lenet5 import INPUT_SHAPE, LeNet5
from nercc_models.repvgg import CIFAR_SHAPE, repvgg

_SEED = 20240204
_LARGE = (224, 224, 3)
_FEATURES, _BUFFER = 128, 1024
_TUNED_GROUPS, _TUNING_STEPS = 16, 23
_UNSTEADY_STEPS = 3  # the first ones compile
_LOST = 3  # stragglers of each set


@dataclasses.dataclass(frozen=True)
class Part:
    """Something to time: a function that is compiled for its arguments.

    `flops` are the operations that its mathematics needs; `precise`: of products at full precision.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    flops: float = 0.0
    precise: bool = False


@dataclasses.dataclass(frozen=True)
class Steps:
    """Something that keeps its own time: seconds of each of its steps."""

    run: Callable[[], Sequence[float]]
    flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Case:
    """Parts that are timed in turn, the cheapest first, so that what is too large shows early.

    `moved` are the bytes that its data take at least, known before anything is made.
    """

    kind: str
    subject: str
    groups: int
    dtype: str
    moved: float
    build: Callable[[], Mapping[str, Part] | Steps]

    @property
    def name(self) -> str:
        groups = f" x {self.groups} groups" if self.groups > 1 else ""
        return f"{self.kind}: {self.subject}{groups}, {self.dtype}"

    @property
    def family(self) -> str:
        """Return the name without the number of groups."""
        return f"{self.kind}: {self.subject}, {self.dtype}"


# --- the table

MODELS: Mapping[str, tuple[Callable[[], nnx.Module], tuple[int, ...]]] = {
    "LeNet5": (lambda: LeNet5(10, rngs=nnx.Rngs(0)), INPUT_SHAPE),
    "RepVGG, 32 x 32": (lambda: repvgg_cifar(deploy=True, rngs=nnx.Rngs(0)), CIFAR_SHAPE),
    "RepVGG-A0, 224 x 224": (lambda: repvgg("a0", deploy=True, rngs=nnx.Rngs(0)), _LARGE),
    "ViT, 32 x 32": (lambda: vit_small_cifar(rngs=nnx.Rngs(0)), CIFAR_SHAPE),
    "ViT-Ti/16, 224 x 224": (lambda: vit_tiny_patch16_224(rngs=nnx.Rngs(0)), _LARGE),
    "ViT-B/16, 224 x 224": (lambda: vit_base_patch16_224(rngs=nnx.Rngs(0)), _LARGE),
}
# (N, K, numbers a data point), and (N, K, numbers an answer).
ENCODED = ((20, 8, 3_072), (20, 8, 150_528))
DECODED = ((20, 8, 10), (100, 20, 1_000))
INFERRED = (20, 8)
ORDERED = (1, 16)  # buffers
KNOTS = (10_000, 1_000_000)


def cases(groups: Sequence[int], dtypes: Sequence[str]) -> Iterator[Case]:
    """Return all cases, larger numbers of groups after smaller ones."""
    for dtype in dtypes:
        size = jnp.dtype(dtype).itemsize
        for n, k, width in ENCODED:
            for count in groups:
                build = functools.partial(_encode, n, k, width, count, dtype)
                moved = float(count * (n + k) * width * size)
                yield Case("encode", f"({n}, {k}), {width:,} numbers", count, dtype, moved, build)
        for n, k, width in DECODED:
            for count in groups:
                build = functools.partial(_decode, n, k, width, count, dtype)
                moved = float(count * (n + k) * width * size)
                yield Case("decode", f"({n}, {k}), {width:,} numbers", count, dtype, moved, build)
        for model, (_, shape) in MODELS.items():
            n, k = INFERRED
            for count in groups:
                build = functools.partial(_infer, model, n, k, count, dtype)
                moved = float(count * (n + k) * np.prod(shape) * 4)
                yield Case("inference", f"{model} ({n}, {k})", count, dtype, moved, build)
    for buffers in ORDERED:
        build, moved = functools.partial(_order, buffers), float(buffers * _BUFFER * _FEATURES * 4)
        subject = f"{buffers} x {_BUFFER:,} data points, {_FEATURES} features"
        yield Case("order", subject, 1, "float32", moved, build)
    for knots in KNOTS:
        build = functools.partial(_spline, knots)
        yield Case("spline", f"{knots:,} knots", 1, "float32", 24.0 * knots, build)
    yield Case("tuning", f"LeNet5 {INFERRED}, one step", 1, "float32", 0.0, _tuning_step)


# --- what runs


@functools.cache
def _code(num_workers: int, num_data: int) -> NeRCC:
    return NeRCC(num_data, num_workers)


def _encode(n: int, k: int, width: int, groups: int, dtype: str) -> dict[str, Part]:
    code = _code(n, k)
    x = _data(dtype, groups, k, width)
    matrix = code.encoder_matrix()
    flops = 2.0 * n * k * width * groups
    bare = Part(_product, (matrix.astype(dtype), x), flops)
    return {"product": bare, "encode": Part(encode_groups, (code, x, matrix), flops, True)}


def _product(matrix: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.matmul(matrix, x)


def _decode(n: int, k: int, width: int, groups: int, dtype: str) -> dict[str, Part]:
    """Given is one mask's matrix for all groups, traced a mask for each."""
    code = _code(n, k)
    y = _data(dtype, groups, n, width)
    masks = _masks(groups, n)
    same = jnp.broadcast_to(masks[0], masks.shape)
    matrices = jax.jit(_matrices)(code, masks[0])
    flops = 2.0 * n * k * width * groups
    return {
        "product": Part(_product, (matrices.decoder[0].astype(dtype), y), flops),
        "mask given": Part(decode_groups, (code, y, same, matrices), flops, True),
        "mask traced": Part(decode_groups, (code, y, masks), flops, True),
    }


def _matrices(code: AbstractCode, mask: jax.Array) -> Matrices:
    return Matrices(code.decoder_matrix(mask)[None], code.recovered(mask)[None])


@functools.cache
def _model(name: str, dtype: str) -> Any:
    """Return a model of random weights as a function of float32 images, in `dtype` inside."""
    make, _ = MODELS[name]
    model: Any = make()
    model.eval()
    if dtype == "float32":
        return jax.tree_util.Partial(_call, model)
    lower = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    return jax.tree_util.Partial(_call_in_bfloat16, lower)


def _call(model: Any, images: jax.Array) -> jax.Array:
    return model(images)


def _call_in_bfloat16(model: Any, images: jax.Array) -> jax.Array:
    return model(images.astype(jnp.bfloat16)).astype(jnp.float32)


def _infer(name: str, n: int, k: int, groups: int, dtype: str) -> dict[str, Part]:
    """Return the bare model on K and on N images, and coded inference."""
    code, model, (_, shape) = _code(n, k), _model(name, dtype), MODELS[name]
    x = _data("float32", groups, k, *shape)
    masks = _masks(groups, n)
    known = np.broadcast_to(np.asarray(masks[0]), masks.shape)

    def bare(points: int) -> Part:
        images = _data("float32", groups * points, *shape)
        return Part(_bare, (model, images), model_flops(model, images))

    def given(model: Any, x: jax.Array) -> jax.Array:
        return coded_inference(model, code, grouped=True)(x, known)

    def traced(model: Any, x: jax.Array, masks: jax.Array) -> jax.Array:
        return coded_inference(model, code, grouped=True)(x, masks)

    workers = bare(n)
    outputs = jax.eval_shape(model, workers.arguments[1]).shape[-1]
    flops = workers.flops + 2.0 * n * k * groups * (np.prod(shape) + outputs)
    return {
        "bare, K": bare(k),
        "bare, N": workers,
        "mask given": Part(given, (model, x), flops),
        "mask traced": Part(traced, (model, x, masks), flops),
    }


def _bare(model: Any, images: jax.Array) -> jax.Array:
    return model(images)


def model_flops(model: Any, images: Any) -> float:
    """Return the operations that XLA counts before it compiles; models have no loops."""
    counted: Any = jax.jit(_bare).lower(model, images).cost_analysis()
    return float((counted or {}).get("flops", 0.0))


def _order(buffers: int) -> dict[str, Part]:
    x = _data("float32", buffers * _BUFFER, _FEATURES)
    # All distances; the path through them takes steps, not operations.
    flops = 2.0 * buffers * _BUFFER**2 * _FEATURES

    def order(x: jax.Array) -> jax.Array:
        return order_points(x, 8, features=x, buffer_size=_BUFFER)

    return {"order": Part(order, (x,), flops, True)}


def _spline(knots: int) -> dict[str, Part]:
    t = np.linspace(-1, 1, knots, dtype=np.float32)
    y = np.sin(5 * t)[:, None]
    return {"spline": Part(smoothing_spline, (t, y, np.float32(1e-12)), precise=True)}


def _tuning_step() -> Steps:
    """Return the case of one step of `tune` of LeNet5's lambdas."""
    n, k = INFERRED
    model, sampling = _model("LeNet5", "float32"), Sampling()
    per_step = sampling.groups_per_step
    one = model_flops(model, jax.ShapeDtypeStruct((1, *INPUT_SHAPE), jnp.float32))

    def run() -> list[float]:
        times: list[float] = []
        x = _data("float32", _TUNED_GROUPS * k, *INPUT_SHAPE)
        descent = Descent(steps=_TUNING_STEPS, check_every=10 * _TUNING_STEPS, stop_after=None)
        law = {"few": ExactStragglers(_LOST)}
        tune(
            model,
            _code(n, k),
            x,
            law,
            key=jax.random.key(0),
            sampling=sampling,
            descent=descent,
            on_step=lambda step, code: times.append(time.perf_counter()),
        )
        # The last entry is a judgement.
        return [float(s) for s in np.diff(times[_UNSTEADY_STEPS:-1])]

    # Forward on the data points and the coded ones, and back to the latter.
    return Steps(run, one * per_step * (k + 2 * n))


def _data(dtype: str, *shape: int) -> jax.Array:
    made = jax.random.normal(jax.random.key(_SEED), shape, jnp.float32)
    return jax.block_until_ready(made.astype(dtype))


def _masks(groups: int, num_workers: int) -> jax.Array:
    """Return a straggler set for each group."""
    ranks = np.random.default_rng(_SEED).random((groups, num_workers)).argsort(1).argsort(1)
    return jnp.asarray(ranks >= _LOST)
