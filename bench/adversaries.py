"""Workers that lie: robust decoding beside plain decoding, copies with a median, and BACC.

    python bench/adversaries.py [--quick] [--only lenet5-mnist:100:20] [--data-dir FOLDER]

A of N workers return wrong answers within the range [low, high] of honest ones, the same workers in
all groups. Four attacks:

- **noise**: Gaussian, three times the root mean square of the outputs, added and clipped;
- **flip**: low + high - y, the sign flipped about the middle of the range;
- **worst**: each output moves toward that end of the range that does the most to what the plain
  decoder of that code makes of it, found by ascending the decoded error, by three strengths; each
  method is counted at the strength that hurts it most;
- **coalition**: neighbours on the line (copies of the same data points, for replication) all answer
  as the model would with its labels moved on by one: smooth, plausible, and agreed.

The liars of the first three are drawn at random. The rate: a smooth function of one number, A = N^a
neighbours that answer an end of the range, all placements of twenty; mean square and sup norm.

Writes `results/adversaries.json`, which docs/adversaries.md shows. `--only` runs one part, whose
results replace those in the file.
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
from _report import add_json, environment
from _settings import PACKAGES, Setting

from nercc_jax import AbstractCode, Berrut, NeRCC, Replication
from nercc_jax.cli._options import Outputs
from nercc_jax.cli._workload import load_worker_model
from nercc_jax.codes._points import copies
from nercc_jax.evaluation import Estimate
from nercc_jax.evaluation._answers import Recorder, batched, cut_groups
from nercc_jax.inference import robust_decode
from nercc_jax.inference._robust import RobustMethod

HERE = Path(__file__).parent
RESULTS = HERE / "results"

SETTINGS: dict[Setting, Outputs] = {
    Setting("lenet5-mnist", 100, 20): "logits",
    Setting("repvgg-cifar10", 100, 20): "probabilities",
}
STRENGTHS = (0.125, 0.25, 1.0)
ATTACKS = ("noise", "flip", "worst", "coalition")
RATE_CONSTANT = jnp.asarray(4e-6)  # of "smooth" for the networks, near the best of a grid
TOLD_WITHOUT = 10  # how many adversaries the decoder allows for where there are none


@dataclasses.dataclass(frozen=True)
class Size:
    """Data points, sets of adversaries a cell, numbers of adversaries, and the rate's N."""

    points: int = 1000
    sets: int = 20
    adversaries: tuple[int, ...] = (2, 5, 10)
    workers: tuple[int, ...] = (64, 128, 256, 512, 1024)


FULL = Size()
QUICK = Size(points=100, sets=3, adversaries=(5,), workers=(32, 64, 128))
EXPONENTS = (0.3, 0.4, 0.5, 0.6)
RATE_DATA = 64
RATE_CONSTANTS = tuple(10.0**p for p in np.arange(-4, 1.5, 0.5))


@dataclasses.dataclass(frozen=True)
class Method:
    """A code and the way its answers (groups, N, m) are decoded, given how many may lie.

    `matrix` is its plain decoder.
    """

    code: AbstractCode
    matrix: np.ndarray
    decode: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray | None]]


@eqx.filter_jit
def _decode_each(code, y, most, method, constant):
    """Decode each group for itself; one compilation for any number of adversaries."""

    def decode(answers):
        got = robust_decode(
            code, answers, jnp.ones(code.num_workers, bool), max_adversaries=most, method=method,
            rate_constant=constant,
        )  # fmt: skip
        return got.decoded.predictions, got.suspected

    return jax.vmap(decode)(y)


def robust(code: NeRCC, method: RobustMethod, together: bool = False) -> Method:
    """Return robust decoding, of each group for itself or of all groups together."""
    everyone = np.ones(code.num_workers, bool)

    def decode(y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray | None]:
        if together:
            got = robust_decode(
                code, np.moveaxis(y, 0, 1), everyone,
                max_adversaries=most, method=method,
            )  # fmt: skip
            suspected = np.broadcast_to(got.suspected, y.shape[:2])
            return np.moveaxis(np.asarray(got.decoded.predictions), 1, 0), suspected
        predictions, suspected = _decode_each(code, y, jnp.asarray(most), method, RATE_CONSTANT)
        return np.asarray(predictions), np.asarray(suspected)

    return Method(code, decoder(code), decode)


def plain(code: AbstractCode, before: Callable[[np.ndarray], np.ndarray] | None = None) -> Method:
    """Return the code's own decoder on all answers."""
    matrix = decoder(code)

    def decode(y: np.ndarray, most: int) -> tuple[np.ndarray, None]:
        return matrix @ (y if before is None else before(y)), None

    return Method(code, decoder(code), decode)


def decoder(code: AbstractCode) -> np.ndarray:
    return np.asarray(code.decoder_matrix(np.ones(code.num_workers, bool)))


def medians_of_copies(code: Replication) -> Method:
    holds = copies(code.num_data, code.num_workers)

    def decode(y: np.ndarray, most: int) -> tuple[np.ndarray, None]:
        parts = [np.median(y[:, holds == k], axis=1) for k in range(code.num_data)]
        return np.stack(parts, axis=1), None

    return Method(code, decoder(code), decode)


def running_median(beta: np.ndarray, width: int = 5) -> Callable[[np.ndarray], np.ndarray]:
    """Return each answer by the median of it and its neighbours on the line."""
    order = np.argsort(beta)

    def smooth(y: np.ndarray) -> np.ndarray:
        padded = np.pad(y[:, order], ((0, 0), (width // 2, width // 2), (0, 0)), mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, width, axis=1)
        summary = np.empty_like(y)
        summary[:, order] = np.median(windows, axis=-1)
        return summary

    return smooth


def methods(setting: Setting) -> dict[str, Method]:
    shape = (setting.num_data, setting.num_workers)
    nercc, repeated = NeRCC(*shape), NeRCC(*shape, points="repeated")
    bacc = Berrut(*shape)
    return {
        "NeRCC": plain(nercc),
        "NeRCC, reject": robust(nercc, "reject"),
        "NeRCC, reject, groups together": robust(nercc, "reject", together=True),
        "NeRCC, smooth": robust(nercc, "smooth"),
        "repeated NeRCC, reject": robust(repeated, "reject"),
        "replication, median": medians_of_copies(Replication(*shape)),
        "BACC": plain(bacc),
        "BACC, median of 5 neighbours": plain(bacc, running_median(np.asarray(bacc.beta))),
    }


def places(code: AbstractCode) -> np.ndarray:
    """Return workers in the order of their places on the line."""
    if isinstance(code, Replication):
        return np.argsort(copies(code.num_data, code.num_workers), kind="stable")
    return np.argsort(np.asarray(code.beta), kind="stable")  # pyright: ignore[reportAttributeAccessIssue]


def attack(
    kind: str,
    strength: float,
    y: np.ndarray,
    method: Method,
    count: int,
    limits: tuple[float, float],
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the answers with `count` liars among the workers, and the liars."""
    random = np.random.default_rng([seed, count, ATTACKS.index(kind)])
    low, high = limits
    code = method.code
    if kind == "coalition":
        start = random.integers(code.num_workers - count + 1)
        liars = places(code)[start : start + count]
    else:
        liars = random.choice(code.num_workers, count, replace=False)
    y = y.copy()
    said = y[:, liars]
    if kind == "noise":
        rms = np.sqrt(np.mean(y**2))
        said = np.clip(said + 3 * rms * random.normal(size=said.shape), low, high)
    elif kind == "flip":
        said = low + high - said
    elif kind == "coalition":
        said = np.roll(said, 1, axis=-1)
    else:
        end = worst_ends(method.matrix[:, liars], said, limits, random)
        said = said + strength * (end - said)
    y[:, liars] = said
    return y, liars


def worst_ends(
    matrix: np.ndarray, said: np.ndarray, limits: tuple[float, float], random
) -> np.ndarray:
    """Return the ends of the range at which |matrix (end - said)|^2 is (locally) largest.

    They are its gradient's signs, until they stay. The square is convex, so an end is never worse
    than the inside.
    """
    gram = matrix.T @ matrix
    end = np.where(random.random(said.shape) < 0.5, *limits)
    for _ in range(20):
        end = np.where(gram @ (end - said) >= 0, limits[1], limits[0])
    return end


def run_setting(setting: Setting, size: Size, data_dir: Path) -> dict[str, Any]:
    """Every method under every attack: rows of estimates over sets of adversaries."""
    start = time.perf_counter()
    network = load_worker_model(setting.model, SETTINGS[setting])
    images, _ = network.images("test", data_dir, size.points, 0)
    train, _ = network.images("train", data_dir, 1000, 0)
    run = batched(network, 256)
    groups = cut_groups(images, setting.num_data)
    recorder = Recorder(run, groups, 256)
    own = recorder.own
    largest = float(np.abs(run(train)).max())
    limits = (0.0, 1.0) if SETTINGS[setting] == "probabilities" else (-largest, largest)
    compared = methods(setting)
    answers: dict[int, np.ndarray] = {}
    for method in compared.values():
        if id(method.code) not in answers:
            answers[id(method.code)] = np.asarray(recorder.of(method.code).coded)
    rows = []
    for name, method in compared.items():
        honest = answers[id(method.code)]
        rows += list(_rows(name, method, honest, own, limits, size))
        print(f"{setting.name} {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return {
        "outputs": SETTINGS[setting],
        "size": dataclasses.asdict(size),
        "limits": limits,
        "environment": environment(PACKAGES),
        "seconds": round(time.perf_counter() - start, 1),
        "num_data_points": own.shape[0] * own.shape[1],
        "rows": rows,
    }


def _rows(
    name: str,
    method: Method,
    honest: np.ndarray,
    own: np.ndarray,
    limits: tuple[float, float],
    size: Size,
) -> Iterator[dict[str, Any]]:
    clean = [_score(method, honest, own, np.arange(0), TOLD_WITHOUT)] * 2
    yield {"method": name, "attack": "none", "adversaries": 0, **_estimates(clean)}
    for count in size.adversaries:
        for kind in ATTACKS:
            strengths = STRENGTHS if kind == "worst" else (1.0,)
            tried = []
            for strength in strengths:
                scores = [
                    _score(method, *_swap(attack(kind, strength, honest, method, count,
                                                 limits, seed), own), count)
                    for seed in range(size.sets)
                ]  # fmt: skip
                tried.append({"strength": strength, **_estimates(scores)})
            worst = max(tried, key=lambda row: row["mse"]["mean"])
            yield {"method": name, "attack": kind, "adversaries": count, **worst, "all": tried}


def _swap(lying: tuple[np.ndarray, np.ndarray], own: np.ndarray):
    return lying[0], own, lying[1]


def _score(
    method: Method, y: np.ndarray, own: np.ndarray, liars: np.ndarray, most: int
) -> dict[str, float]:
    predictions, suspected = method.decode(y.astype(np.float32), most)
    score = {
        "mse": float(np.mean((predictions - own) ** 2)),
        "disagreement": float(np.mean(predictions.argmax(-1) != own.argmax(-1))),
    }
    if suspected is not None:
        guilty = np.zeros(y.shape[1], bool)
        guilty[liars] = True
        score["caught"] = float(suspected[:, guilty].mean()) if len(liars) else float("nan")
        score["falsely"] = float(suspected[:, ~guilty].sum(axis=1).mean())
    return score


def _estimates(scores: list[dict[str, float]]) -> dict[str, Any]:
    return {m: dataclasses.asdict(Estimate.over([s[m] for s in scores])) for m in scores[0]}


def rate(size: Size) -> dict[str, Any]:
    """Error against N at A = N^a, of a smooth function whose truth is known."""
    middle = size.workers[len(size.workers) // 2]
    tried = {
        c: np.mean(_rate_errors(middle, round(middle**0.5), "smooth", c)["mse"])
        for c in RATE_CONSTANTS
    }
    constant = min(tried, key=lambda c: tried[c])
    points = []
    for num_workers in size.workers:
        for exponent in EXPONENTS:
            count = round(num_workers**exponent)
            for method in ("plain", "smooth", "reject"):
                errors = _rate_errors(num_workers, count, method, constant)
                points.append(
                    {"num_workers": num_workers, "exponent": exponent, "adversaries": count,
                     "method": method, "largest": {k: float(e.max()) for k, e in errors.items()}}
                    | {k: dataclasses.asdict(Estimate.over(e)) for k, e in errors.items()}
                )  # fmt: skip
        print(f"rate: N = {num_workers}", flush=True)
    return {
        "constant": constant,
        "num_data": RATE_DATA,
        "placements": 20,
        "points": points,
        "environment": environment(PACKAGES),
    }


def _rate_errors(
    num_workers: int, count: int, method: Any, constant: float
) -> dict[str, np.ndarray]:
    """Return the squared error's mean and largest value for twenty placements of neighbours.

    All answer 1, the end of sin's range; the function is sin of three times a number from -1 to 1.
    """
    code = NeRCC(RATE_DATA, num_workers)
    y = np.asarray(jnp.sin(3 * code.encode(code.alpha[:, None])))
    own = np.sin(3 * np.asarray(code.alpha))[:, None]
    placements = []
    for start in np.linspace(0, num_workers - count, 20).round().astype(int):
        lying = y.copy()
        lying[start : start + count] = 1.0
        placements.append(lying)
    lying = np.stack(placements)
    if method == "plain":
        predictions = decoder(code) @ lying
    else:
        predictions = np.asarray(
            _decode_each(code, lying, jnp.asarray(count), method, jnp.asarray(constant))[0]
        )
    squares = (predictions - own) ** 2
    return {"mse": squares.mean(axis=(1, 2)), "sup": squares.max(axis=(1, 2))}


def main() -> None:
    options = _parse()
    path = RESULTS / ("adversaries-quick.json" if options.quick else "adversaries.json")
    size = QUICK if options.quick else FULL
    for setting in SETTINGS:
        if options.only in (None, setting.name):
            add_json(path, {"parts": {setting.name: run_setting(setting, size, options.data_dir)}})
    if options.only in (None, "rate"):
        add_json(path, {"rate": rate(size)})
    print(f"results: {path}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Workers that lie: robust decoding measured.")
    parser.add_argument("--quick", action="store_true", help="a small version of everything")
    parser.add_argument("--only", choices=[*(s.name for s in SETTINGS), "rate"], help="one part")
    parser.add_argument("--data-dir", type=Path, default=HERE.parent.parent / "shared" / "data")
    return parser.parse_args()


if __name__ == "__main__":
    main()
