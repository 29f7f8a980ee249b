"""The worst answers of liars, found by gradient ascent through the decoder, beside simple lies.

    python bench/liars.py [--quick] [--data-dir FOLDER]

A of N = 100 workers answer anything within the range of honest answers. Where they lie: neighbours
on the line, workers spread evenly, or random ones. What they answer: the end of the range (for
networks the labels moved on by one), or the worst that projected gradient ascent finds for the
decoder at hand, from three starts. The error is the root mean square, and the largest deviation
(sup norm), over data points and outputs of a group, by the function's root mean square; means over
groups. For images, also the labels that differ. Writes results/liars.json.

Source of the question: Moradi and Akbarinodehi, "Adversarial Robustness of Nonparametric
Regression"; the smoothing rule is that of arXiv 2502.08058.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _report import environment, write_json
from _settings import PACKAGES
from jaxtyping import Array, Bool, Float, Int

from nercc_jax import NeRCC
from nercc_jax.cli._workload import load_worker_model
from nercc_jax.codes import encode_groups
from nercc_jax.evaluation import Estimate
from nercc_jax.inference import robust_decode

RESULTS = Path(__file__).parent / "results"
WORKERS, POINTS, IMAGES = 100, 8, 20
METHODS = ("plain", "reject", "smooth")
PLACES = ("neighbours", "spread", "random")
FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "sin 3t": lambda t: jnp.sin(3 * t),
    "|t|": jnp.abs,
    "tanh 20t": lambda t: jnp.tanh(20 * t),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """The amount that is measured: groups, numbers of liars, steps of the ascent."""

    groups: int = 20
    liars: tuple[int, ...] = (2, 5, 10)
    steps: int = 40


@dataclasses.dataclass(frozen=True)
class Case:
    """A function's honest answers and own outputs in groups, and the range of honest answers."""

    name: str
    code: NeRCC
    answers: Float[Array, "groups num_workers m"]
    own: Float[Array, "groups num_data m"]
    limits: tuple[float, float]


def cases(groups: int, data_dir: Path) -> Iterator[Case]:
    """Yield functions of one number, in order along the line, and LeNet5's logits."""
    x = np.sort(np.random.default_rng(0).uniform(-1, 1, (groups, POINTS, 1)), axis=1)[:, ::-1]
    for name, function in FUNCTIONS.items():
        own = function(jnp.linspace(-1, 1, 1000))
        limits = float(own.min()), float(own.max())
        yield _case(name, function, NeRCC(POINTS, WORKERS), jnp.asarray(x), limits)
    network = load_worker_model("lenet5-mnist", "logits")
    images, _ = network.images("test", data_dir, IMAGES * groups, 0)
    x = jnp.asarray(images.reshape(groups, IMAGES, *images.shape[1:]))
    largest = float(jnp.abs(network(jnp.asarray(images))).max())
    yield _case("LeNet5", network, NeRCC(IMAGES, WORKERS), x, (-largest, largest))


def _case(name: str, model: Callable, code: NeRCC, x: Array, limits: tuple[float, float]) -> Case:
    run = eqx.filter_jit(lambda batch: model(batch))
    answers, own = (
        jnp.stack([run(group).reshape(len(group), -1) for group in each])
        for each in (jax.jit(encode_groups)(code, x), x)
    )
    return Case(name, code, answers, own, limits)


def liars_at(kind: str, code: NeRCC, count: int, groups: int) -> Bool[np.ndarray, "groups N"]:
    """Return which workers lie, in each group."""
    order, random = np.argsort(np.asarray(code.beta)), np.random.default_rng(count)
    liars = np.zeros((groups, len(order)), bool)
    for group in liars:
        if kind == "random":
            group[random.permutation(len(order))[:count]] = True
        elif kind == "spread":
            step = len(order) // count
            group[order[random.integers(step) + step * np.arange(count)]] = True
        else:
            start = random.integers(len(order) - count + 1)
            group[order[start : start + count]] = True
    return liars


def decode(code: NeRCC, y: Array, most: Array, method: str) -> Array:
    """Return predictions by the plain decoder, or by `robust_decode`."""
    everyone = jnp.ones(code.num_workers, bool)
    if method == "plain":
        return code.decoder_matrix(everyone) @ y
    found = robust_decode(code, y, everyone, max_adversaries=most, method=method)  # pyright: ignore[reportArgumentType]
    return found.decoded.predictions


def errors(code: NeRCC, y: Array, own: Array, most: Array, method: str) -> Float[Array, "3"]:
    """Return mean square, largest deviation, and the share of other labels, of one group."""
    predictions = decode(code, y, most, method)
    off = predictions - own
    other = predictions.argmax(axis=1) != own.argmax(axis=1)
    return jnp.stack([jnp.mean(off**2), jnp.max(jnp.abs(off)), jnp.mean(other)])


@eqx.filter_jit
def worst(
    case: tuple[NeRCC, Array, Array],
    liars: Bool[Array, "groups num_workers"],
    starts: Float[Array, "groups num_workers m"],
    limits: Float[Array, "2"],
    most: Int[Array, ""],
    method: str,
    goal: Int[Array, ""],
    steps: int,
) -> Float[Array, "groups 3"]:
    """Return each group's errors, where that of the goal is the largest that an ascent meets.

    Each step moves all lies by a share of the range along the sign of the gradient, within the
    range; the share falls from a half to a hundredth. Without steps the lies are the start.
    """
    code = case[0]

    def of_group(answers: Array, own: Array, liars: Array, start: Array) -> Array:
        def error(lies: Array) -> tuple[Array, Array]:
            found = errors(code, jnp.where(liars[:, None], lies, answers), own, most, method)
            return found[goal], found

        def step(state: Any, share: Array) -> tuple[Any, None]:
            lies, best = state
            (_, found), slope = jax.value_and_grad(error, has_aux=True)(lies)
            best = jnp.where(found[goal] > best[goal], found, best)
            lies = lies + share * (limits[1] - limits[0]) * jnp.sign(slope)
            return (jnp.clip(lies, limits[0], limits[1]), best), None

        if not steps:
            return error(start)[1]
        shares = jnp.geomspace(0.5, 0.01, steps)
        return jax.lax.scan(step, (start, jnp.full(3, -jnp.inf)), shares)[0][1]

    return jax.vmap(of_group)(*case[1:], liars, starts)


def rows_of(case: Case, size: Size) -> Iterator[dict[str, Any]]:
    """Yield the errors of every method, place and number of liars."""
    limits, scale = jnp.asarray(case.limits), float(jnp.sqrt(jnp.mean(case.own**2)))
    fixed = jnp.full_like(case.answers, case.limits[1])
    if case.answers.shape[2] > 1:
        fixed = jnp.roll(case.answers, 1, axis=2)
    noise = np.random.default_rng(1).uniform(*case.limits, case.answers.shape)
    starts = (case.answers, jnp.asarray(noise, fixed.dtype), fixed)
    parts = case.code, case.answers, case.own
    for count in size.liars:
        most = jnp.asarray(count)
        for place in PLACES:
            liars = jnp.asarray(liars_at(place, case.code, count, len(case.own)))
            for method in METHODS:
                options = limits, most, method
                simple = np.asarray(worst(parts, liars, fixed, *options, jnp.asarray(0), 0))
                for goal, name in enumerate(("mean square", "sup norm")):
                    found = np.stack(
                        [worst(parts, liars, start, *options, jnp.asarray(goal), size.steps)
                         for start in starts]
                    )  # fmt: skip
                    best = found[:, :, goal].argmax(axis=0)
                    found = found[best, np.arange(len(best))]
                    for kind, each in (("simple", simple), ("worst", found)):
                        values = np.sqrt(each[:, 0]) if goal == 0 else each[:, 1]
                        yield {
                            "function": case.name, "liars": count, "place": place,
                            "method": method, "answers": kind, "error": name,
                            "labels": float(each[:, 2].mean()),
                            **dataclasses.asdict(Estimate.over((values / scale).tolist())),
                        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="few groups, liars and steps")
    parser.add_argument("--data-dir", type=Path, default=None)
    options = parser.parse_args()
    size = Size(4, (5,), 5) if options.quick else Size()
    path = RESULTS / ("liars-quick.json" if options.quick else "liars.json")
    start, rows = time.perf_counter(), []
    for case in cases(size.groups, options.data_dir):
        rows += rows_of(case, size)
        print(f"{case.name}: {time.perf_counter() - start:.0f} s", flush=True)
        about = {"environment": environment(PACKAGES), "size": dataclasses.asdict(size)}
        write_json(path, about | {"rows": rows})


if __name__ == "__main__":
    main()
