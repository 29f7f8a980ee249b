"""Worst-case liars: answers found by gradient ascent through the decoder, beside fixed lies.

    python bench/liars.py [--quick] [--data-dir FOLDER] [--output FOLDER]

A of N = 100 workers answer anything within the range of honest answers. Where they lie: neighbours
on the line, workers spread evenly, or random ones. What they answer: the end of the range (for
networks the labels moved on by one), or the worst that projected gradient ascent finds for the
decoder at hand, through `robust_decode` where that decodes. The error is the mean square and the
largest deviation (sup norm) over data points and outputs of a group, by the function's root mean
square; intervals are over groups. Writes liars.json.

Source of the question: Moradi and Akbarinodehi, "Adversarial Robustness of Nonparametric
Regression"; arXiv 2502.08058.
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
from jaxtyping import Array, Float

from nercc_jax import NeRCC
from nercc_jax.cli._workload import load_worker_model
from nercc_jax.codes import encode_groups
from nercc_jax.evaluation import Estimate
from nercc_jax.inference import robust_decode

HERE = Path(__file__).parent
_NUM_WORKERS = 100
_METHODS = ("plain", "reject", "smooth")
_PLACES = ("neighbours", "spread", "random")


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
    """Return sin(3t) of one number, and LeNet5's logits."""
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (groups, 8, 1)))
    x = jnp.sort(x, axis=1)[:, ::-1]
    code = NeRCC(8, _NUM_WORKERS)
    yield _case("sin 3t", lambda t: jnp.sin(3 * t), code, x, (-1.0, 1.0))
    network = load_worker_model("lenet5-mnist", "logits")
    images, _ = network.images("test", data_dir, 20 * groups, 0)
    x = jnp.asarray(images.reshape(groups, 20, *images.shape[1:]))
    largest = float(jnp.abs(network(jnp.asarray(images))).max())
    yield _case("LeNet5", network, NeRCC(20, _NUM_WORKERS), x, (-largest, largest))


def _case(name: str, model: Callable, code: NeRCC, x: Array, limits: tuple[float, float]) -> Case:
    coded = jax.jit(encode_groups)(code, x)
    run = eqx.filter_jit(lambda batch: model(batch))
    answers, own = (
        jnp.stack([run(group).reshape(len(group), -1) for group in each]) for each in (coded, x)
    )
    return Case(name, code, answers, own, limits)


def places_of(kind: str, code: NeRCC, count: int, groups: int) -> np.ndarray:
    """Return each group's liars, (groups, count)."""
    order, random = np.argsort(np.asarray(code.beta)), np.random.default_rng(count)
    if kind == "random":
        return np.stack([random.permutation(len(order))[:count] for _ in range(groups)])
    if kind == "spread":
        step = len(order) // count
        starts = random.integers(step, size=groups)
        return np.stack([order[start + step * np.arange(count)] for start in starts])
    starts = random.integers(len(order) - count + 1, size=groups)
    return np.stack([order[start : start + count] for start in starts])


def _decode(code: NeRCC, y: Array, most: Array, method: str) -> Array:
    everyone = jnp.ones(code.num_workers, bool)
    if method == "plain":
        return code.decoder_matrix(everyone) @ y
    found = robust_decode(code, y, everyone, max_adversaries=most, method=method)  # pyright: ignore[reportArgumentType]
    return found.decoded.predictions


def _errors(code: NeRCC, y: Array, own: Array, most: Array, method: str) -> tuple[Array, Array]:
    """Return mean square and largest deviation of one group."""
    off = _decode(code, y, most, method) - own
    return jnp.mean(off**2), jnp.max(jnp.abs(off))


@eqx.filter_jit
def worst_answers(
    code: NeRCC,
    answers: Float[Array, "groups num_workers m"],
    own: Float[Array, "groups num_data m"],
    liars: Array,
    start: Float[Array, "groups count m"],
    limits: Float[Array, "2"],
    method: str,
    goal: int,
    steps: int,
) -> tuple[Float[Array, " groups"], Float[Array, " groups"]]:
    """Return both errors of each group at the largest of one that an ascent from `start` meets.

    Each step moves all lies by a share of the range along the sign of the gradient, within the
    range; the share falls from a half to a hundredth.
    """
    most = jnp.asarray(liars.shape[1])

    def of_group(answers: Array, own: Array, liars: Array, start: Array) -> tuple[Array, Array]:
        def error(lies: Array) -> tuple[Array, tuple[Array, Array]]:
            both = _errors(code, answers.at[liars].set(lies), own, most, method)
            return both[goal], both

        def step(state: Any, share: Array) -> tuple[Any, None]:
            lies, best = state
            (_, both), slope = jax.value_and_grad(error, has_aux=True)(lies)
            best = jax.tree.map(
                lambda new, old: jnp.where(both[goal] > best[goal], new, old), both, best
            )
            lies = lies + share * (limits[1] - limits[0]) * jnp.sign(slope)
            return (jnp.clip(lies, limits[0], limits[1]), best), None

        shares = jnp.geomspace(0.5, 0.01, steps)
        nothing = (jnp.asarray(-jnp.inf), jnp.asarray(-jnp.inf))
        (_, best), _ = jax.lax.scan(step, (start, nothing), shares)
        return best

    return jax.vmap(of_group)(answers, own, liars, start)


def rows_of(case: Case, size: Size) -> Iterator[dict[str, Any]]:
    """Return the errors of every method, place and number of liars."""
    groups, limits = len(case.own), jnp.asarray(case.limits)
    scale = float(jnp.sqrt(jnp.mean(case.own**2)))
    random = np.random.default_rng(1)
    for count in size.liars:
        for place in _PLACES:
            liars = jnp.asarray(places_of(place, case.code, count, groups))
            honest = jnp.take_along_axis(case.answers, liars[..., None], axis=1)
            fixed = jnp.full_like(honest, case.limits[1])
            fixed = fixed if honest.shape[2] == 1 else jnp.roll(honest, 1, axis=2)
            noise = jnp.asarray(random.uniform(*case.limits, honest.shape), honest.dtype)
            starts = {"own answers": honest, "random": noise, "fixed": fixed}
            for method in _METHODS:

                def ascend(start: Array, goal: int, steps: int, method=method, liars=liars) -> Any:
                    args = case.code, case.answers, case.own, liars, start, limits
                    return np.asarray(worst_answers(*args, method, goal, steps))

                for goal, name in enumerate(("mean square", "sup norm")):
                    plain = ascend(fixed, goal, 1)[goal]
                    worst = np.max(
                        [ascend(s, goal, size.steps)[goal] for s in starts.values()], axis=0
                    )
                    for kind, errors in (("fixed", plain), ("worst", worst)):
                        values = (np.sqrt(errors) if goal == 0 else errors) / scale
                        yield {
                            "function": case.name, "liars": count, "place": place,
                            "method": method, "answers": kind, "error": name,
                            **dataclasses.asdict(Estimate.over(values.tolist())),
                        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="few groups, liars and steps")
    parser.add_argument("--data-dir", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--output", type=Path, help="folder for liars.json")
    options = parser.parse_args()
    size = Size(4, (5,), 5) if options.quick else Size()
    start, rows = time.perf_counter(), []
    for case in cases(size.groups, options.data_dir):
        for row in rows_of(case, size):
            rows.append(row)
        print(f"{case.name}: {time.perf_counter() - start:.0f} s", flush=True)
    content = {"environment": environment(PACKAGES), "size": dataclasses.asdict(size)}
    own = Path("liars-quick") if options.quick else HERE / "results"
    write_json((options.output or own) / "liars.json", content | {"rows": rows})


if __name__ == "__main__":
    main()
