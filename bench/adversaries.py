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

The liars of the first three are drawn at random. The rate: a smooth function of one number, A = N^a
neighbours that answer an end of the range, all placements of twenty; mean square and sup norm.

`liars`: the worst answers of A of N = 100 workers, found by gradient ascent through the decoder.
Where they lie: neighbours on the line, workers spread evenly, or random ones. What they answer: the
end of the range (for networks the labels moved on by one), or the worst that projected gradient
ascent finds for the decoder at hand, from three starts. The error is the root mean square, and the
largest deviation (sup norm), over data points and outputs of a group, by the function's root mean
square; means over groups. For images, also the labels that differ. Source of the question: Moradi
and Akbarinodehi, "Adversarial Robustness of Nonparametric Regression"; the smoothing rule is that
of arXiv 2502.08058.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
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
EXPONENTS = (0.3, 0.4, 0.5, 0.6)
RATE_DATA = 64
RATE_CONSTANTS = tuple(10.0**p for p in np.arange(-4, 1.5, 0.5))


@dataclasses.dataclass(frozen=True)
class Size:
    """Data points, sets of adversaries a cell, numbers of adversaries, and the rate's N."""

    points: int = 1000
    sets: int = 20
    adversaries: tuple[int, ...] = (2, 5, 10)
    workers: tuple[int, ...] = (64, 128, 256, 512, 1024)


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


def run(
    report: Report, only: tuple[str, ...] = (*(each.name for each in SETTINGS), "rate")
) -> None:
    """Measure every method under every attack, and the rate.

    Options:
        only: Parts.
    """
    size = Size()
    if report.quick:
        size = Size(points=100, sets=2, adversaries=(5,), workers=(32, 64))
    for setting in SETTINGS:
        if setting.name in only:
            part = run_setting(report, setting, size)
            report.add(parts={setting.name: part})
            show({key: row[key] for key in ("method", "attack", "adversaries")}
                 | {key: row[key]["mean"] for key in ("mse", "disagreement")}
                 for row in part["rows"])  # fmt: skip
    if "rate" in only:
        report.add(rate=rate(report, size))


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


def rate(report: Report, size: Size) -> dict[str, Any]:
    """Return the error against N at A = N^a, of a smooth function whose truth is known."""
    middle = size.workers[len(size.workers) // 2]
    tried = {
        c: np.mean(rate_errors(middle, round(middle**0.5), "smooth", c)["mse"])
        for c in RATE_CONSTANTS
    }
    constant, points = min(tried, key=lambda c: tried[c]), []
    for num_workers in size.workers:
        for exponent in EXPONENTS:
            count = round(num_workers**exponent)
            about = {"num_workers": num_workers, "exponent": exponent, "adversaries": count}
            for method in ("plain", "smooth", "reject"):
                errors = rate_errors(num_workers, count, method, constant)
                largest = {name: float(each.max()) for name, each in errors.items()}
                found = {k: dataclasses.asdict(Estimate.over(e)) for k, e in errors.items()}
                points.append(about | {"method": method, "largest": largest} | found)
        report.log(f"rate: N = {num_workers}")
    about = {"constant": constant, "num_data": RATE_DATA, "placements": 20}
    return about | {"points": points, "environment": environment()}


def rate_errors(
    num_workers: int, count: int, method: str, constant: float
) -> Mapping[str, np.ndarray]:
    """Return the squared error's mean and largest value for twenty placements of neighbours.

    All answer 1, the end of sin's range; the function is sin of three times a number from -1 to 1.
    """
    code = NeRCC(RATE_DATA, num_workers)
    y = np.asarray(jnp.sin(3 * code.encode(code.alpha[:, None])))
    own, lying = np.sin(3 * np.asarray(code.alpha))[:, None], np.stack([y] * 20)
    starts = np.linspace(0, num_workers - count, 20).round().astype(int)
    for each, start in zip(lying, starts, strict=True):
        each[start : start + count] = 1.0
    if method == "reject":
        predictions = np.asarray(_decode_each(code, lying, jnp.asarray(count))[0])
    else:
        used = smoothed(code, count, constant) if method == "smooth" else code
        predictions, _ = plain(used).decode(lying, count)
    squares = (predictions - own) ** 2
    return {"mse": squares.mean(axis=(1, 2)), "sup": squares.max(axis=(1, 2))}


# --- the worst answers

WORKERS, POINTS, IMAGES = 100, 8, 20
METHODS, PLACES = ("plain", "reject", "smooth"), ("neighbours", "spread", "random")
FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "sin 3t": lambda t: jnp.sin(3 * t),
    "|t|": jnp.abs,
    "tanh 20t": lambda t: jnp.tanh(20 * t),
}


class Case(NamedTuple):
    """A function's honest answers and own outputs in groups, and the range of honest answers."""

    name: str
    code: NeRCC
    answers: Float[Array, "groups num_workers m"]
    own: Float[Array, "groups num_data m"]
    limits: tuple[float, float]


def cases(groups: int, data_dir: Any) -> Iterator[Case]:
    """Yield functions of one number, in order along the line, and LeNet5's logits."""

    def case(name: str, model: Any, x: np.ndarray, limits: tuple[float, float]) -> Case:
        code = NeRCC(x.shape[1], WORKERS)
        answers, own = coded_answers(model, code, x), own_answers(model, x)
        return Case(name, code, jnp.asarray(answers), jnp.asarray(own), limits)

    x = np.random.default_rng(0).uniform(-1, 1, (groups, POINTS, 1)).astype(np.float32)
    x = np.sort(x, axis=1)[:, ::-1]
    for name, function in FUNCTIONS.items():
        own = function(jnp.linspace(-1, 1, 1000))
        yield case(name, function, x, (float(own.min()), float(own.max())))
    network = Network.load("lenet5-mnist", "logits")
    images, _ = network.images("test", data_dir, IMAGES * groups)
    largest = float(np.abs(in_batches(network, images)).max())
    yield case("LeNet5", network, groups_of(images, IMAGES), (-largest, largest))


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


@eqx.filter_jit
def worst(
    case: Case,
    liars: Bool[Array, "groups num_workers"],
    starts: Float[Array, "groups num_workers m"],
    most: Int[Array, ""],
    method: Any,
    goal: Int[Array, ""],
    steps: int,
) -> Float[Array, "groups 3"]:
    """Return each group's errors, where that of the goal is the largest that an ascent meets.

    Errors are the mean square, the largest deviation, and the share of other labels. Each step
    moves all lies by a share of the range along the sign of the gradient, within the range; the
    share falls from a half to a hundredth. Without steps the lies are the start.
    """
    code, everyone, (low, high) = case.code, jnp.ones(case.code.num_workers, bool), case.limits

    def of_group(answers: Array, own: Array, liars: Array, start: Array) -> Array:
        def error(lies: Array) -> tuple[Array, Array]:
            y = jnp.where(liars[:, None], lies, answers)
            if method == "reject":
                found, _ = robust_decode(code, y, everyone, max_adversaries=most)
                predictions = found.predictions
            else:
                used = smoothed(code, most) if method == "smooth" else code
                predictions = used.decoder_matrix(everyone) @ y
            off, other = predictions - own, predictions.argmax(axis=1) != own.argmax(axis=1)
            found = jnp.stack([jnp.mean(off**2), jnp.max(jnp.abs(off)), jnp.mean(other)])
            return found[goal], found

        def step(state: Any, share: Array) -> tuple[Any, None]:
            lies, best = state
            (_, found), slope = jax.value_and_grad(error, has_aux=True)(lies)
            best = jnp.where(found[goal] > best[goal], found, best)
            lies = lies + share * (high - low) * jnp.sign(slope)
            return (jnp.clip(lies, low, high), best), None

        if not steps:
            return error(start)[1]
        shares = jnp.geomspace(0.5, 0.01, steps)
        return jax.lax.scan(step, (start, jnp.full(3, -jnp.inf)), shares)[0][1]

    return jax.vmap(of_group)(case.answers, case.own, liars, starts)


def liars(report: Report) -> None:
    """Measure the errors of every method, place and number of liars."""
    size: dict[str, Any] = {"groups": 20, "liars": (2, 5, 10), "steps": 40}
    if report.quick:
        size = {"groups": 2, "liars": (5,), "steps": 3}
    rows: list[dict[str, Any]] = []
    for case in cases(size["groups"], report.data_dir):
        scale = float(jnp.sqrt(jnp.mean(case.own**2)))
        fixed = jnp.full_like(case.answers, case.limits[1])
        if case.answers.shape[2] > 1:
            fixed = jnp.roll(case.answers, 1, axis=2)
        noise = np.random.default_rng(1).uniform(*case.limits, case.answers.shape)
        starts = (case.answers, jnp.asarray(noise, fixed.dtype), fixed)
        for count, place in ((count, place) for count in size["liars"] for place in PLACES):
            who = jnp.asarray(liars_at(place, case.code, count, len(case.own)))
            for method in METHODS:
                options = jnp.asarray(count), method
                simple = np.asarray(worst(case, who, fixed, *options, jnp.asarray(0), 0))
                for goal, name in enumerate(("mean square", "sup norm")):
                    each = [
                        worst(case, who, start, *options, jnp.asarray(goal), size["steps"])
                        for start in starts
                    ]
                    found = np.stack(each)
                    best = found[:, :, goal].argmax(axis=0)
                    found = found[best, np.arange(len(best))]
                    for kind, errors in (("simple", simple), ("worst", found)):
                        values = np.sqrt(errors[:, 0]) if goal == 0 else errors[:, 1]
                        mean = dataclasses.asdict(Estimate.over((values / scale).tolist()))
                        about = {"function": case.name, "liars": count, "place": place}
                        about |= {"method": method, "answers": kind, "error": name}
                        rows.append(about | {"labels": float(errors[:, 2].mean())} | mean)
        report.log(case.name)
        report.write({"environment": environment(), "size": size, "rows": rows})
    columns = ("function", "liars", "place", "method", "answers", "error", "mean")
    show({key: row[key] for key in columns} for row in rows)
