"""Decay of the squared error with N where each worker straggles independently (arXiv 2502.00645).

    python bench/independent.py [--quick] [--data-dir FOLDER] [--output FOLDER]

K = 8 data points a group, N from 256 to 4,096 workers, each of which straggles with probability p.
Four smooth functions in float64, and the logits of LeNet5. Writes independent.json, which
docs/results.md shows.

- All N are multiples of 2K, so that data points lie alike between their nearest workers
  (`_convergence.py` says why that matters).
- Straggler sets are the same for all codes and functions. Matrices are made on the host, in
  float64; their product with the answers is the prediction.
- A slope is that of the least-squares line through log mean error against log N. Its 95 % interval
  is a bootstrap: groups are drawn again (the same at all N), and straggler sets at each N.
- NeRCC is untuned, and with lambda_dec = 0, which interpolates. BSCC has natural ends here, for
  which there are matrices on the host; near a data point, far from the ends, that is the same.
- The theory's rates are slopes, too: log(N) is a power of N over a range of N.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _report import environment, write_json
from _settings import PACKAGES
from jaxtyping import Bool, Float
from rich.progress import track

from nercc_jax import AbstractCode, Berrut, IndependentStragglers, NeRCC
from nercc_jax.codes import BerrutSpline
from nercc_models import load_data, load_model

HERE = Path(__file__).parent
_NUM_DATA = 8
_SHARES = (0.05, 0.2)
_ROUNDS = 1000  # of the bootstrap
_FLOOR = {"float64": 1e-26, "float32": 1e-11}  # of the mean square: rounding is not fitted
# By (N, p): what is proved is at most a constant times this.
RATES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "log^3 N^-3": lambda n, p: (np.log(n) / -np.log(p)) ** 3 / n**3,
    "log^4 N^-2": lambda n, p: (np.log(n) / -np.log(p)) ** 4 / n**2,
}

Errors = Float[np.ndarray, "sets groups"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The amount that is measured."""

    num_workers: tuple[int, ...]
    sets: int
    groups: int
    image_groups: int


FULL = Plan((256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096), sets=200, groups=32, image_groups=4)
QUICK = Plan((256, 512, 1024), sets=20, groups=8, image_groups=1)


@dataclasses.dataclass(frozen=True)
class Function:
    """A function of a batch with its data points in groups, (groups, K, ...)."""

    name: str
    call: Callable[[np.ndarray], np.ndarray]
    x: np.ndarray
    dtype: str


def scalar_functions(groups: int) -> Iterator[Function]:
    """Return smooth functions of one number or five, with data points at random."""
    rng = np.random.default_rng(0)
    inner, outer = rng.normal(size=(5, 16)), rng.normal(size=(16, 3)) / 4
    made = {
        "t sin t": (1, 5.0, lambda t: t * np.sin(t)),
        "1 / (1 + t^2)": (1, 5.0, lambda t: 1 / (1 + t**2)),
        "exp(sin 2t)": (1, 3.0, lambda t: np.exp(np.sin(2 * t))),
        "tanh network": (5, 1.0, lambda x: np.tanh(x @ inner) @ outer),
    }
    for name, (size, reach, call) in made.items():
        x = rng.uniform(-reach, reach, (groups, _NUM_DATA, size))
        yield Function(name, call, x, "float64")


def network_function(groups: int, data_dir: Path) -> Function:
    """Return the logits of the shipped LeNet5 on test images."""
    model = load_model("lenet5-mnist")
    images = load_data("mnist", "test", data_dir=data_dir).shuffled(0)
    x = np.asarray(model.preprocess(images.take(slice(groups * _NUM_DATA)).images))
    run = jax.jit(lambda batch: model(batch))

    def call(batch: np.ndarray) -> np.ndarray:
        return np.concatenate([np.asarray(run(jnp.asarray(batch[i : i + 256], jnp.float32)))
                               for i in range(0, len(batch), 256)])  # fmt: skip

    return Function("LeNet5", call, x.reshape(groups, _NUM_DATA, *x.shape[1:]), "float32")


def codes_of(num_workers: int) -> dict[str, AbstractCode]:
    """Return the codes by name, their numbers on the host in float64."""
    with jax.enable_x64(True):
        codes: dict[str, AbstractCode] = {
            "BACC": Berrut(_NUM_DATA, num_workers),
            "BSCC": BerrutSpline(_NUM_DATA, num_workers, ends="natural"),
            "NeRCC": NeRCC(_NUM_DATA, num_workers),
            "NeRCC, lambda_dec = 0": NeRCC(_NUM_DATA, num_workers, lambda_dec=0.0),
        }
        return {name: jax.tree.map(np.asarray, code) for name, code in codes.items()}


def straggler_sets(
    share: float, num_workers: int, count: int
) -> Bool[np.ndarray, "sets num_workers"]:
    """Return straggler sets of independent workers."""
    key = jax.random.fold_in(jax.random.key(round(1000 * share)), num_workers)
    law = IndependentStragglers(share)
    draw = jax.vmap(lambda key: law.available(key, num_workers))
    return np.asarray(draw(jax.random.split(key, count)))


def answers_of(code: AbstractCode, function: Function) -> Float[np.ndarray, "groups n m"]:
    """Return all workers' answers."""
    encoder = code.encoder_on_host()
    assert encoder is not None
    coded = np.einsum("nk,gk...->gn...", encoder, function.x)
    flat = function.call(coded.reshape(-1, *coded.shape[2:]))
    return np.asarray(flat, np.float64).reshape(*coded.shape[:2], -1)


def decoding_errors(
    code: AbstractCode, masks: np.ndarray, answers: Mapping[str, np.ndarray], exact: Mapping
) -> dict[str, Errors]:
    """Return the mean squared error of each group under each straggler set, by function."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in answers}
    for mask in masks:
        made = code.decoder_on_host(mask)
        assert made is not None
        for name, y in answers.items():
            decoded = np.einsum("kn,gnm->gkm", made[0], y)
            found[name].append(np.mean((decoded - exact[name]) ** 2, axis=(1, 2)))
    return {name: np.stack(errors) for name, errors in found.items()}


def slope_of(
    sizes: Sequence[int] | np.ndarray, means: Float[np.ndarray, "rounds sizes"]
) -> np.ndarray:
    """Return the slopes of log mean error against log N."""
    x = np.log(sizes)
    weights = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
    return np.log(means) @ weights


def bootstrap(errors: Sequence[Errors]) -> Float[np.ndarray, "rounds sizes"]:
    """Return mean errors of groups and straggler sets drawn again."""
    rng, groups = np.random.default_rng(0), errors[0].shape[1]
    rounds = []
    for _ in range(_ROUNDS):
        chosen = rng.integers(groups, size=groups)
        by_set = (each[:, chosen].mean(axis=1) for each in errors)
        rounds.append([each[rng.integers(len(each), size=len(each))].mean() for each in by_set])
    return np.array(rounds)


def curve_of(sizes: Sequence[int], errors: Sequence[Errors], share: float, floor: float) -> Any:
    """Return the points of a curve, its slope with an interval, and the slopes of the rates."""
    again = bootstrap(errors)
    means = np.array([each.mean() for each in errors])
    low, high = np.quantile(again, (0.025, 0.975), axis=0)
    used = means > floor
    n = np.array(sizes)[used]
    slopes = slope_of(n, again[:, used])
    return {
        "points": [
            {
                "num_workers": size,
                "mean": mean,
                "low": a,
                "high": b,
                "median": float(np.median(each.mean(axis=1))),
            }
            for size, mean, a, b, each in zip(sizes, means, low, high, errors, strict=True)
        ],
        "slope": float(slope_of(n, means[None, used])[0]),
        "interval": np.quantile(slopes, (0.025, 0.975)).tolist(),
        "fitted": n.tolist(),
        "rates": {
            name: float(slope_of(n, rate(n, share)[None])[0]) for name, rate in RATES.items()
        },
    }


def measure(plan: Plan, data_dir: Path) -> list[dict[str, Any]]:
    """Return all curves: by share, code and function."""
    functions = [*scalar_functions(plan.groups), network_function(plan.image_groups, data_dir)]
    exact = {
        f.name: f.call(f.x.reshape(-1, *f.x.shape[2:])).reshape(*f.x.shape[:2], -1)
        for f in functions
    }
    found: dict[tuple[float, str, str], list[Errors]] = {}
    for size in track(plan.num_workers, description="numbers of workers"):
        for code_name, code in codes_of(size).items():
            answers = {f.name: answers_of(code, f) for f in functions}
            for share in _SHARES:
                masks = straggler_sets(share, size, plan.sets)
                for name, errors in decoding_errors(code, masks, answers, exact).items():
                    found.setdefault((share, code_name, name), []).append(errors)
    curves = []
    for (share, code_name, name), errors in found.items():
        dtype = next(f.dtype for f in functions if f.name == name)
        floor = _FLOOR[dtype] * float(np.mean(exact[name] ** 2))
        facts = {"share": share, "code": code_name, "function": name, "dtype": dtype}
        curves.append(facts | curve_of(plan.num_workers, errors, share, floor))
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="few workers, sets and groups")
    parser.add_argument("--data-dir", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--output", type=Path, help="folder for independent.json")
    options = parser.parse_args()
    start, busy = time.perf_counter(), time.process_time()
    plan = QUICK if options.quick else FULL
    content: dict[str, Any] = {
        "environment": environment(PACKAGES),
        "plan": dataclasses.asdict(plan),
    }
    content |= {"num_data": _NUM_DATA, "shares": _SHARES, "curves": measure(plan, options.data_dir)}
    content |= {
        "seconds": round(time.perf_counter() - start),
        "cpu_seconds": round(time.process_time() - busy),
    }
    folder = options.output or HERE / "results"
    if options.quick and options.output is None:
        folder = Path("independent-quick")
    write_json(folder / "independent.json", content)
    for curve in content["curves"]:
        low, high = curve["interval"]
        name = f"{curve['share']:4} {curve['code']:22} {curve['function']:14}"
        print(f"{name} {curve['slope']:6.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
