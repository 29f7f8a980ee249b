"""What coding by regression is not for, measured: privacy, gradients of training, embeddings.

    python bench/unsuited.py [--quick] [--data-dir FOLDER]

Privacy: LeNet5 (MNIST), K = 20 images on 100 workers, with T more data points of Gaussian noise,
spread among the images' alphas. What a worker learns of a pixel is bounded by the capacity of the
Gaussian channel, log2(1 + signal / noise) / 2 bits, for pixels and noise of the same standard
deviation times sigma.

Gradients: (24, 20), two stragglers, an MLP on scikit-learn's digits. A data point is a part of a
batch, images and one-hot labels; a worker returns the loss's gradient for the coded part. The
relative error is that of the mean gradient over the batch, beside dropping what stragglers hold and
four copies; gradient coding (Tandon et al. 2017) with three parts a worker is exact.

Embeddings: the 84 activations before LeNet5's last layer, coded and decoded (100, 20): which share
of the ten nearest of 5,000 images is found by the decoded embedding (recall@10). Means and 95 %
intervals over groups, or batches, each with stragglers of its own. Writes results/unsuited.json.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _functions_cases import Embedding
from _functions_systems import recall
from _report import environment, write_json
from _settings import PACKAGES
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float

from nercc_jax import Berrut, NeRCC
from nercc_jax.cli._workload import load_worker_model
from nercc_jax.codes import AbstractCode, decode_groups, encode_groups
from nercc_jax.evaluation import Estimate
from nercc_models.data import load_data

RESULTS = Path(__file__).parent / "results"
POINTS, WORKERS, GALLERY = 20, 100, 5000
PARTS, PART_WORKERS, PART_STRAGGLERS, PART_SIZE = 20, 24, 2, 8


def masks(
    seed: int, groups: int, workers: int, stragglers: int
) -> Bool[np.ndarray, "groups workers"]:
    """Return a set of stragglers for each group."""
    ranks = np.random.default_rng(seed).random((groups, workers)).argsort(axis=1).argsort(axis=1)
    return ranks >= stragglers


def through(
    code: AbstractCode, function: Callable[[Array], Array], x: Array, stragglers: int
) -> Float[Array, "groups num_data m"]:
    """Return the decoded outputs of a function for groups of data points."""
    available = masks(1, len(x), code.num_workers, stragglers)
    groups = [_of_group(code, function, *each) for each in zip(x, available, strict=True)]
    return jnp.stack(groups)


@eqx.filter_jit
def _of_group(
    code: AbstractCode, function: Callable[[Array], Array], x: Array, available: Array
) -> Array:
    answers = function(encode_groups(code, x[None])[0])
    return decode_groups(code, answers[None], available[None]).predictions[0]


def _estimate(values: Any) -> dict[str, float]:
    found = Estimate.over(np.asarray(values, float).tolist())
    return {"mean": found.mean, "half_width": found.half_width}


def privacy(groups: int, data_dir: Path | None) -> Iterator[dict[str, Any]]:
    """Yield what workers learn, and the labels that are kept, by T and sigma."""
    network = load_worker_model("lenet5-mnist", "logits")
    images, _ = network.images("test", data_dir, POINTS * groups, 0)
    x, deviation = images.reshape(groups, POINTS, *images.shape[1:]), float(images.std())
    own = jnp.stack([network(jnp.asarray(each)) for each in x]).argmax(axis=-1)
    for count in (0, 1, 5, 20):
        code = NeRCC(POINTS + count, WORKERS)
        places = (POINTS + count) * (np.arange(count) + 0.5) / max(count, 1)
        noisy = np.zeros(POINTS + count, bool)
        noisy[places.astype(int)] = True
        matrix = np.asarray(code.encoder_matrix(), float)
        signal, noise = (np.sum(matrix[:, part] ** 2, axis=1) for part in (~noisy, noisy))
        for sigma in (1.0, 10.0) if count else (0.0,):
            points = np.empty((groups, POINTS + count, *x.shape[2:]), np.float32)
            drawn = np.random.default_rng(0).normal(size=(groups, count, *x.shape[2:]))
            points[:, ~noisy], points[:, noisy] = x, sigma * deviation * drawn
            bits = None
            if count:
                by_worker = np.log2(1 + signal / (sigma**2 * noise)) / 2
                bits = {"worst": float(by_worker.max()), "median": float(np.median(by_worker))}
            for stragglers in (0, 20):
                decoded = through(code, network, jnp.asarray(points), stragglers)
                kept = decoded[:, ~noisy].argmax(axis=-1) == own
                yield {
                    "noise_points": count,
                    "sigma": sigma,
                    "stragglers": stragglers,
                    "bits": bits,
                    "labels_kept": _estimate(kept.mean(axis=1)),
                }


def _digits_gradient() -> tuple[Callable[[Any, Array, Array], Array], Any, Array, Array]:
    """Return the gradient of an MLP's loss as a vector, fresh weights, images and labels."""
    data = load_data("digits", "train")
    x = jnp.asarray(data.images.reshape(len(data), -1) / 16, jnp.float32)
    labels = jax.nn.one_hot(data.labels, 10)
    network = eqx.nn.MLP(64, 10, 64, 1, key=jax.random.key(0))

    def gradient(network: Any, x: Array, labels: Array) -> Array:
        def loss(network: Any) -> Array:
            return optax.softmax_cross_entropy(jax.vmap(network)(x), labels).mean()

        return _flat(eqx.filter_grad(loss)(network))[0]

    return gradient, network, x, labels


def _flat(network: Any) -> tuple[Array, Callable[[Array], Any]]:
    """Return a network's arrays as a vector, and the network of such a vector."""
    arrays, rest = eqx.partition(network, eqx.is_array)
    flat, shape = ravel_pytree(arrays)
    return flat, lambda flat: eqx.combine(shape(flat), rest)


def _gradients_of(gradient: Callable[..., Array], network: Any, parts: Array) -> Array:
    return jax.vmap(lambda part: gradient(network, part[:, :64], part[:, 64:]))(parts)


def gradients(batches: int) -> Iterator[dict[str, Any]]:
    """Yield relative errors of a batch's mean gradient, before training and after 100 steps."""
    gradient, network, x, labels = _digits_gradient()
    random, size = np.random.default_rng(0), PARTS * PART_SIZE
    optimiser = optax.adam(1e-3)
    flat, network_of = _flat(network)
    state = optimiser.init(flat)

    @jax.jit
    def step(flat: Array, state: Any, x: Array, labels: Array) -> tuple[Array, Any]:
        updates, state = optimiser.update(gradient(network_of(flat), x, labels), state, flat)
        moved: Any = optax.apply_updates(flat, updates)
        return moved, state

    for steps in (0, 100):
        for _ in range(steps):
            chosen = random.permutation(len(x))[:size]
            flat, state = step(flat, state, x[chosen], labels[chosen])
        chosen = np.stack([random.permutation(len(x))[:size] for _ in range(batches)])
        parts = np.asarray(jnp.concatenate([x, labels], axis=1))[chosen]
        parts = jnp.asarray(parts.reshape(batches, PARTS, PART_SIZE, -1))

        of_parts = eqx.Partial(_gradients_of, gradient, network_of(flat))
        own = eqx.filter_jit(eqx.filter_vmap(of_parts))(parts)
        whole = own.mean(axis=1)
        came = masks(2, batches, PART_WORKERS, PART_STRAGGLERS)
        # Twenty workers have a part each, and four a copy of one of the first four.
        copies = came[:, :PARTS].copy()
        copies[:, : PART_WORKERS - PARTS] |= came[:, PARTS:]
        found = {
            "NeRCC": through(NeRCC(PARTS, PART_WORKERS), of_parts, parts, PART_STRAGGLERS),
            "BACC": through(Berrut(PARTS, PART_WORKERS), of_parts, parts, PART_STRAGGLERS),
        }
        means = {name: each.mean(axis=1) for name, each in found.items()}
        for name, kept in (("without stragglers' parts", came[:, :PARTS]), ("copies", copies)):
            kept = jnp.asarray(kept, own.dtype)
            means[name] = jnp.einsum("bp,bpm->bm", kept, own) / kept.sum(axis=1)[:, None]
        for name, mean in means.items():
            error = jnp.linalg.norm(mean - whole, axis=1) / jnp.linalg.norm(whole, axis=1)
            yield {"steps": steps, "system": name, "relative_error": _estimate(error)}


def embeddings(groups: int, data_dir: Path | None) -> Iterator[dict[str, Any]]:
    """Yield recall@10 of decoded embeddings, and of the label by the decoded logits beside it."""
    network = load_worker_model("lenet5-mnist", "logits")
    images, _ = network.images("test", data_dir, POINTS * groups + GALLERY, 0)
    embed = Embedding(network.network, "fc3", images.shape[1:])
    gallery = eqx.filter_jit(embed)(jnp.asarray(images[POINTS * groups :]))
    x = jnp.asarray(images[: POINTS * groups].reshape(groups, POINTS, *images.shape[1:]))

    functions: tuple[Any, ...] = embed, network
    own, labels = (jnp.stack([eqx.filter_jit(each)(group) for group in x]) for each in functions)
    for name, code in (("NeRCC", NeRCC(POINTS, WORKERS)), ("BACC", Berrut(POINTS, WORKERS))):
        for stragglers in (0, 10, 20, 40):
            decoded = through(code, embed, x, stragglers)
            hits = [recall(*pair, gallery) for pair in zip(decoded[:, None], own, strict=True)]
            logits = through(code, network, x, stragglers)
            kept = (logits.argmax(axis=-1) == labels.argmax(axis=-1)).mean(axis=1)
            yield {
                "system": name,
                "stragglers": stragglers,
                "recall": _estimate(hits),
                "labels_kept": _estimate(kept),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="few groups and batches")
    parser.add_argument("--data-dir", type=Path, default=None)
    options = parser.parse_args()
    number = 4 if options.quick else 50
    about = {"environment": environment(PACKAGES), "groups": number}
    found = {
        "privacy": list(privacy(number, options.data_dir)),
        "gradients": list(gradients(number)),
        "embeddings": list(embeddings(number, options.data_dir)),
    }
    write_json(RESULTS / f"unsuited{'-quick' * options.quick}.json", about | found)
    for part, rows in found.items():
        for row in rows:
            print(part, row)


if __name__ == "__main__":
    main()
