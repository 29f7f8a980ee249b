"""Workers that lie: robust decoding beside plain decoding, copies with a median, and BACC.

`adversaries`: A of N workers return wrong answers within the range [low, high] of honest ones, the
same workers in all groups. Four attacks:

- **noise**: Gaussian, three times the root mean square of the outputs, added and clipped;
- **flip**: low + high - y, the sign flipped about the middle of the range;
- **worst**: each output moves toward that end of the range that does the most to what the plain
  decoder of that code makes of it, found by ascending the decoded error, by three strengths; each
  method is counted at the strength that hurts it most;
- **coalition**: neighbours on the line (copies of the same data points, for replication) all answer
  as the model would with its labels moved on by one: smooth, plausible, and agreed.

The liars of the first three are drawn at random. The smoothing rule is that of arXiv 2502.08058.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from report import Report, environment, show
from workloads import Network, Outputs, Setting, coded_answers, groups_of, in_batches, own_answers

from nercc_jax import AbstractCode, Berrut, NeRCC, Replication
from nercc_jax.evaluation import Estimate
from nercc_jax.inference import robust_decode

SETTINGS: dict[Setting, Outputs] = {
    Setting("lenet5-mnist", 100, 20): "logits",
    Setting("repvgg-cifar10", 100, 20): "probabilities",
}
STRENGTHS = (0.125, 0.25, 1.0)
ATTACKS = ("noise", "flip", "worst", "coalition")
RATE_CONSTANT = 4e-6  # of "smooth" for the networks, near the best of a grid
TOLD_WITHOUT = 10  # how many adversaries the decoder allows for where there are none


@dataclasses.dataclass(frozen=True)
class Size:
    """Data points, sets of adversaries a cell, and numbers of adversaries."""

    points: int = 1000
    sets: int = 20
    adversaries: tuple[int, ...] = (2, 5, 10)


class Method(NamedTuple):
    """A code, its plain decoder, and the way its answers are decoded, given how many may lie."""

    code: AbstractCode
    matrix: np.ndarray
    decode: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray | None]]


def decoder(code: AbstractCode) -> np.ndarray:
    """Return the plain decoder."""
    return np.asarray(code.decoder_matrix(np.ones(code.num_workers, bool)))


@eqx.filter_jit
def _decode_each(code, y, most):
    """Decode each group for itself; one compilation for any number of adversaries."""

    def decode(answers):
        everyone = jnp.ones(code.num_workers, bool)
        found, suspected = robust_decode(code, answers, everyone, max_adversaries=most)
        return found.predictions, suspected

    return jax.vmap(decode)(y)


def smoothed(code: NeRCC, most: Any, constant: float = RATE_CONSTANT) -> NeRCC:
    """Return the code with the published lambda_dec, if that is larger, for so many adversaries.

    Source: Moradi, Akbarinodehi and Maddah-Ali, arXiv 2502.08058.
    """
    lambda_ = constant * (most / code.num_workers) ** (8 / 5)
    return eqx.tree_at(lambda c: c.lambda_dec, code, jnp.maximum(code.lambda_dec, lambda_))


def smooth(code: NeRCC) -> Method:
    """Return the published decoder, which averages lies with their neighbours."""

    def decode(y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        nobody = np.zeros(y.shape[:2], bool)
        return decoder(smoothed(code, most)) @ y, nobody

    return Method(code, decoder(code), decode)


def robust(code: NeRCC, together: bool = False) -> Method:
    """Return robust decoding, of each group for itself or of all groups together."""

    def decode(y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray | None]:
        if together:
            found, suspected = robust_decode(
                code, np.moveaxis(y, 0, 1), np.ones(code.num_workers, bool), max_adversaries=most
            )
            suspected = np.broadcast_to(suspected, y.shape[:2])
            return np.moveaxis(np.asarray(found.predictions), 1, 0), suspected
        found = _decode_each(code, y, jnp.asarray(most))
        return np.asarray(found[0]), np.asarray(found[1])

    return Method(code, decoder(code), decode)


def plain(code: AbstractCode, width: int = 1) -> Method:
    """Return a code's own decoder, of medians of so many neighbours on the line."""
    matrix, order = decoder(code), places(code)

    def decode(y: np.ndarray, most: int) -> tuple[np.ndarray, None]:
        if width > 1:
            padded = np.pad(y[:, order], ((0, 0), (width // 2,) * 2, (0, 0)), mode="edge")
            windows = np.lib.stride_tricks.sliding_window_view(padded, width, axis=1)
            y = np.empty_like(y)
            y[:, order] = np.median(windows, axis=-1)
        return matrix @ y, None

    return Method(code, matrix, decode)


def held_by(code: AbstractCode) -> np.ndarray:
    """Return the data point that weighs most in each worker's: of copies, the data point itself."""
    return np.argmax(np.asarray(code.encoder_matrix()), axis=1)


def medians_of_copies(code: Replication) -> Method:
    holds = held_by(code)

    def decode(y: np.ndarray, most: int) -> tuple[np.ndarray, None]:
        parts = [np.median(y[:, holds == k], axis=1) for k in range(code.num_data)]
        return np.stack(parts, axis=1), None

    return Method(code, decoder(code), decode)


def places(code: Any) -> np.ndarray:
    """Return workers in the order of their places on the line."""
    where = held_by(code) if isinstance(code, Replication) else np.asarray(code.beta)
    return np.argsort(where, kind="stable")


def methods(setting: Setting) -> dict[str, Method]:
    nercc, bacc = NeRCC(*setting.shape), Berrut(*setting.shape)
    return {
        "NeRCC": plain(nercc),
        "NeRCC, reject": robust(nercc),
        "NeRCC, reject, groups together": robust(nercc, together=True),
        "NeRCC, smooth": smooth(nercc),
        "repeated NeRCC, reject": robust(NeRCC(*setting.shape, points="repeated")),
        "replication, median": medians_of_copies(Replication(*setting.shape)),
        "BACC": plain(bacc),
        "BACC, median of 5 neighbours": plain(bacc, 5),
    }


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
    (low, high), workers = limits, method.code.num_workers
    if kind == "coalition":
        start = random.integers(workers - count + 1)
        liars = places(method.code)[start : start + count]
    else:
        liars = random.choice(workers, count, replace=False)
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
        # The ends at which |matrix (end - said)|^2 is (locally) largest are its gradient's signs,
        # until they stay. The square is convex, so an end is never worse than the inside.
        matrix = method.matrix[:, liars]
        gram, end = matrix.T @ matrix, np.where(random.random(said.shape) < 0.5, *limits)
        for _ in range(20):
            end = np.where(gram @ (end - said) >= 0, high, low)
        said = said + strength * (end - said)
    y[:, liars] = said
    return y, liars


def run(report: Report, only: tuple[str, ...] = tuple(each.name for each in SETTINGS)) -> None:
    """Measure every method under every attack.

    Options:
        only: Parts.
    """
    size = Size()
    if report.quick:
        size = Size(points=100, sets=2, adversaries=(5,))
    for setting in SETTINGS:
        if setting.name in only:
            part = run_setting(report, setting, size)
            report.add(parts={setting.name: part})
            show({key: row[key] for key in ("method", "attack", "adversaries")}
                 | {key: row[key]["mean"] for key in ("mse", "disagreement")}
                 for row in part["rows"])  # fmt: skip


def run_setting(report: Report, setting: Setting, size: Size) -> dict[str, Any]:
    """Return rows of estimates over sets of adversaries."""
    start, outputs = time.perf_counter(), SETTINGS[setting]
    network = Network.load(setting.model, outputs)
    groups = groups_of(network.images("test", report.data_dir, size.points)[0], setting.num_data)
    own, answers = own_answers(network, groups), {}
    train, _ = network.images("train", report.data_dir, 1000)
    largest = float(np.abs(in_batches(network, train)).max())
    limits = (0.0, 1.0) if outputs == "probabilities" else (-largest, largest)
    rows: list[dict[str, Any]] = []
    for name, method in methods(setting).items():
        if id(method.code) not in answers:
            answers[id(method.code)] = coded_answers(network, method.code, groups), method.code
        honest, _ = answers[id(method.code)]
        clean = [score(method, honest, own, np.arange(0), TOLD_WITHOUT)] * 2
        rows.append({"method": name, "attack": "none", "adversaries": 0, **estimates(clean)})
        for count, kind in ((count, kind) for count in size.adversaries for kind in ATTACKS):
            tried = []
            for strength in STRENGTHS if kind == "worst" else (1.0,):
                scores = []
                for seed in range(size.sets):
                    y, liars = attack(kind, strength, honest, method, count, limits, seed)
                    scores.append(score(method, y, own, liars, count))
                tried.append({"strength": strength, **estimates(scores)})
            worst = max(tried, key=lambda row: row["mse"]["mean"])
            about = {"method": name, "attack": kind, "adversaries": count}
            rows.append(about | worst | {"all": tried})
        report.log(f"{setting.name} {name}")
    return {
        "outputs": outputs,
        "size": dataclasses.asdict(size),
        "limits": limits,
        "environment": environment(),
        "seconds": round(time.perf_counter() - start, 1),
        "num_data_points": own.shape[0] * own.shape[1],
        "rows": rows,
    }


def score(
    method: Method, y: np.ndarray, own: np.ndarray, liars: np.ndarray, most: int
) -> dict[str, float]:
    predictions, suspected = method.decode(y.astype(np.float32), most)
    found = {
        "mse": float(np.mean((predictions - own) ** 2)),
        "disagreement": float(np.mean(predictions.argmax(-1) != own.argmax(-1))),
    }
    if suspected is not None:
        guilty = np.isin(np.arange(y.shape[1]), liars)
        found["caught"] = float(suspected[:, guilty].mean()) if len(liars) else float("nan")
        found["falsely"] = float(suspected[:, ~guilty].sum(axis=1).mean())
    return found


def estimates(scores: list[dict[str, float]]) -> dict[str, Any]:
    return {m: dataclasses.asdict(Estimate.over([s[m] for s in scores])) for m in scores[0]}
