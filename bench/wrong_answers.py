"""Find answers that are wrong, by what a surrogate predicts.

A learner takes 2,000 of the model's right answers as they come, of which it keeps 1,024, and the
check is calibrated on those that came last, each before it is learned. 3,000 others are judged: as
they are, which gives the false alarms, and with faults, none of which calibration saw. The rivals
have the same right answers: an output-only check, which does not know the query, and for networks
their students. Of a classifier, faults that change the label count; of a function, those that
change an answer by a tenth of the outputs' deviation. Models that lie have flipped bits of a
parameter or of an intermediate result, or parameters of an earlier training.

`--runs` measures `run_rows(check_answers=)` instead, on the functions: of eight workers one swaps
all answers, and one some, in a run over 2,000 rows. What counts is the rows that are wrong in the
end.
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, Shaped
from report import Report, environment, show
from simulators import EXPENSIVE, load
from workloads import in_batches

from nercc_jax.pools import DevicePool, Fault, Faults
from nercc_jax.risk.votes import fit_answer_check
from nercc_jax.rows import run_rows
from nercc_jax.surrogates import LearnerTuning, fit_learner, principal_components, tune_learner
from nercc_models import load_data, load_model, load_student

PAST, JUDGED, WORKERS = 2000, 3000, 8
RATES = (0.01, 0.015, 0.02, 0.03)
IMAGES = ("lenet5-mnist", "repvgg-cifar10")
STALE, DRAWS = (0.1, 0.2, 0.3, 0.5), 5
SECONDS = 0.005  # of a row, in runs over rows
# As on a server: answers that a learner takes at once, and that it starts from; validation answers
# of a calibration; and principal components.
BATCH, FIRST, VALIDATION, FEATURES = 32, 256, 2048, 64
Check: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Work:
    """A model, its inputs, and whether its answers are labels."""

    name: str
    x: np.ndarray
    model: Callable[[Any], Any]
    labels: bool
    student: Callable[[Any], Any] | None = None

    @classmethod
    def load(cls, name: str, data_dir: Path | None) -> "Work":
        """Return a shipped model on its test images, or a function."""
        if name in EXPENSIVE:
            case = load(name)
            return cls(name, case.inputs(True, 0, PAST + JUDGED), case.function, False)
        network = load_model(name)
        x = network.preprocess(load_data(network.data, "test", data_dir=data_dir).images)
        return cls(name, np.asarray(x, np.float32), network, True, load_student(name))

    def answers(
        self, rows: np.ndarray | slice, model: Callable[[Any], Any] | None = None
    ) -> np.ndarray:
        """Return the answers of the model, or of a changed one, to some inputs."""
        found = in_batches(self.model if model is None else model, self.x[rows], 500)
        return found.astype(np.float32)

    def matters(self, wrong: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return which wrong answers count."""
        if self.labels:
            return wrong.argmax(axis=1) != right.argmax(axis=1)
        return np.sqrt(np.mean((wrong - right) ** 2, axis=1)) > 0.1 * right.std()


def run(report: Report, seeds: int = 3, runs: bool = False) -> None:
    """Judge the checks of all works, or runs over rows.

    Options:
        seeds: Of the answers that are learned and judged, and of faults.
        runs: Runs over rows alone.
    """
    logging.disable(logging.WARNING)  # one for each worker that is fenced
    kept, first, judged = report.read(), 0, JUDGED
    names = EXPENSIVE if runs else (*IMAGES, *EXPENSIVE)
    if report.quick:
        names, seeds, first, judged = names[:1], 1, 100, 300
    rows: list[dict[str, Any]] = []
    for name, seed in ((name, seed) for name in names for seed in range(first, first + seeds)):
        work = Work.load(name, report.data_dir)
        rows += runs_of(work, seed) if runs else evaluate(work, seed, judged)
        news = {"environment": environment(), "rows": rows}
        report.write(kept | ({"runs_environment": environment(), "runs": rows} if runs else news))
        report.log(f"{name}, seed {seed}")
    show(rows if runs else summary(rows))


# --- models that lie

BitField: TypeAlias = Literal["any", "exponent"]
_JIT = ("pjit", "jit")  # operations that contain a program, by the names of JAX's versions


def flip_bit(
    x: Shaped[np.ndarray, "..."], bits: BitField, random: np.random.Generator
) -> Shaped[np.ndarray, "..."]:
    """Return floats with one random bit of a random element flipped; "any" has the sign, too."""
    flipped = np.array(x)
    words = flipped.reshape(-1).view(f"u{x.dtype.itemsize}")
    bit = random.choice(_range_of_bits(x.dtype, bits))
    words[random.integers(words.size)] ^= words.dtype.type(1) << words.dtype.type(bit)
    return flipped


def flip_weight(model: PyTree, seed: Sequence[int]) -> PyTree:
    """Return the model with an exponent's bit of one parameter flipped, each as likely."""
    random = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(model)
    sizes = np.array([leaf.size if _is_parameter(leaf) else 0 for leaf in leaves], float)
    place = int(random.choice(len(leaves), p=sizes / sizes.sum()))
    leaves[place] = flip_bit(np.asarray(leaves[place]), "exponent", random)
    return jax.tree.unflatten(structure, leaves)


def stale(model: PyTree, size: float, seed: Sequence[int]) -> PyTree:
    """Return the model with noisy parameters, as those of an earlier training are different.

    The noise is Gaussian, with this multiple of each array's root mean square as deviation.
    """
    random = np.random.default_rng(seed)

    def change(leaf: Any) -> Any:
        if not _is_parameter(leaf):
            return leaf
        value = np.asarray(leaf, np.float64)
        noise = size * np.sqrt(np.mean(value**2)) * random.normal(size=value.shape)
        return np.asarray(value + noise).astype(leaf.dtype)

    return jax.tree.map(change, model)


def flip_activation(
    model: Callable[..., PyTree], bits: BitField, seed: Sequence[int]
) -> Callable[..., PyTree]:
    """Return the model, compiled, each call of which flips a bit of some intermediate result."""
    random = np.random.default_rng(seed)

    @jax.jit
    def run(numbers: Any, *args: PyTree) -> PyTree:
        program, shape = jax.make_jaxpr(model, return_shape=True)(*args)
        results = itertools.count()
        which = numbers[0] % max(_count_results(program.jaxpr), 1)

        def flip(x: Any) -> Any:
            field = _range_of_bits(x.dtype, bits)
            unsigned = jnp.dtype(f"u{x.dtype.itemsize}")
            words = jax.lax.bitcast_convert_type(x, unsigned).reshape(-1)
            bit = (field.start + numbers[2] % len(field)).astype(unsigned)
            place = numbers[1] % words.size
            words = words.at[place].set(words[place] ^ (jnp.ones((), unsigned) << bit))
            flipped = jax.lax.bitcast_convert_type(words.reshape(x.shape), x.dtype)
            return jnp.where(which == next(results), flipped, x)

        found = _evaluate(program, jax.tree.leaves(args), flip)
        return jax.tree.unflatten(jax.tree.structure(shape), found)

    return lambda *args: run(random.integers(2**32, size=3, dtype=np.uint32), *args)


def _range_of_bits(dtype: Any, bits: BitField) -> range:
    info = jnp.finfo(dtype)  # NumPy's does not know bfloat16
    return range(info.nmant if bits == "exponent" else 0, info.bits - (bits == "exponent"))


def _is_parameter(leaf: Any) -> bool:
    array = isinstance(leaf, np.ndarray | jax.Array)
    return array and leaf.size > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _count_results(jaxpr: Any) -> int:
    """Return how many results `_evaluate` shows."""
    inner = [eqn.params["jaxpr"].jaxpr for eqn in jaxpr.eqns if eqn.primitive.name in _JIT]
    return sum(map(_is_result, jaxpr.eqns)) + sum(map(_count_results, inner))


def _is_result(eqn: Any) -> bool:
    first = eqn.outvars[0].aval if eqn.outvars else None
    floats = first is not None and jnp.issubdtype(first.dtype, jnp.floating) and first.size > 0
    return floats and eqn.primitive.name not in _JIT


def _evaluate(program: Any, args: Sequence[Any], change: Callable[[Any], Any]) -> list[Any]:
    """Run a program operation by operation, and change the float results of each."""
    values = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    values |= zip(program.jaxpr.invars, args, strict=True)

    def read(name: Any) -> Any:
        return name.val if isinstance(name, jax.extend.core.Literal) else values[name]

    for eqn in program.jaxpr.eqns:
        inputs = [read(name) for name in eqn.invars]
        if eqn.primitive.name in _JIT:
            found = _evaluate(eqn.params["jaxpr"], inputs, change)
        else:
            functions, params = (), eqn.primitive.get_bind_params(eqn.params)
            if isinstance(params, tuple):  # in some versions of JAX
                functions, params = params
            found = eqn.primitive.bind(*functions, *inputs, **params)
            found = list(found) if eqn.primitive.multiple_results else [found]
        if _is_result(eqn):
            found[0] = change(found[0])
        values |= zip(eqn.outvars, found, strict=True)
    return [read(name) for name in program.jaxpr.outvars]


# --- checks


def faulty(work: Work, right: np.ndarray, order: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return wrong answers to the judged queries, by fault."""
    found = {
        "swapped": np.concatenate([right[:1], right[:-1]]),  # each by the one before
        "stuck": np.repeat(right[:1], len(right), axis=0),
    }
    kinds: dict[str, BitField] = {"flipped bit": "any", "flipped exponent bit": "exponent"}
    for name, bits in kinds.items():
        random = np.random.default_rng([seed, 1])
        flipped = [flip_bit(row, bits, random) for row in right]
        found[f"{name} of the answer"] = np.stack(flipped)
    if work.labels:
        flipped = flip_activation(work.model, "exponent", (seed, 3))
        each = [flipped(work.x[place : place + 1]) for place in order.tolist()]
        found["flipped exponent bit of an activation"] = np.concatenate(each).astype(np.float32)
        found |= {
            f"stale weights {size:g}/{draw}": work.answers(
                order, stale(work.model, size, (seed, draw))
            )
            for draw in range(DRAWS)
            for size in STALE
        }
        for draw in range(DRAWS):
            changed = flip_weight(work.model, (seed, draw))
            found[f"flipped exponent bit of a weight/{draw}"] = work.answers(order, changed)
    return found


def online(work: Work, student: Any, x: np.ndarray, right: np.ndarray) -> dict[float, Check]:
    """Return checks by rate, calibrated on a surrogate's predictions of the latest answers.

    A learner predicts each batch of answers before it learns them, as on a server.
    """
    seen, learner = [], None
    for begin in range(0, len(x) - BATCH + 1, BATCH):
        here = slice(begin, begin + BATCH)
        if student is not None:
            mean = in_batches(student, x[here], BATCH)
            seen.append((mean, np.ones(BATCH, np.float32)))
        elif learner is None and begin + BATCH >= FIRST:
            first, flat = slice(0, begin + BATCH), x.reshape(len(x), -1)
            features = None
            if flat.shape[1] > FEATURES:
                features = principal_components(x[first], FEATURES)
            learner = fit_learner(
                x[first], right[first], capacity=1024, features=features, tuning=None
            )
            learner = tune_learner(learner, LearnerTuning(widths="one", rows=FIRST, steps=0))
        elif learner is not None:
            mean, deviation = map(np.asarray, learner.predict(x[here]))
            seen.append((mean, deviation))
            learner = learner.update(x[here], right[here])
    mean, deviation = (np.concatenate(part)[-VALIDATION:] for part in zip(*seen, strict=True))
    latest = right[: len(x) // BATCH * BATCH][-len(mean) :]

    def predict(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if student is not None:
            return in_batches(student, x, 500), np.ones(len(x), np.float32)
        assert learner is not None
        found = [learner.predict(x[i : i + 500]) for i in range(0, len(x), 500)]
        means, deviations = zip(*found, strict=True)
        return np.concatenate(means), np.concatenate(deviations)

    def check_at(rate: float) -> Check:
        check = fit_answer_check(mean, deviation, latest, rate, labels=work.labels, seed=0)
        return lambda x, own: check.suspicious(*predict(x), own)

    return {rate: check_at(rate) for rate in RATES}


def output_only(work: Work, rate: float, right: np.ndarray) -> Check:
    """Return a check that does not know the query, on as many answers as the others."""
    right = right[-len(right) // 2 :]

    def nothing(number: int) -> tuple[np.ndarray, np.ndarray]:
        mean = np.tile(right.mean(axis=0), (number, 1))
        return mean, np.full(number, right.std(), np.float32)

    check = fit_answer_check(*nothing(len(right)), right, rate, labels=work.labels, seed=0)
    return lambda x, own: check.suspicious(*nothing(len(x)), own)


def evaluate(work: Work, seed: int, number: int) -> list[dict[str, Any]]:
    """Return what each check finds of each fault at each rate."""
    order = np.random.default_rng([seed, 0]).permutation(len(work.x))[: PAST + number]
    past, judged = order[:PAST], order[PAST:]
    right, known = work.answers(judged), work.answers(past)
    wrong = faulty(work, right, judged, seed)
    checks = {
        "learner": online(work, None, work.x[past], known),
        "output only": {rate: output_only(work, rate, known) for rate in RATES},
    }
    if work.student is not None:
        checks["student"] = online(work, work.student, work.x[past], known)
    rows = []
    for rate in RATES:
        for name, by_rate in checks.items():
            check = by_rate[rate]
            flags = {kind: check(work.x[judged], each) for kind, each in wrong.items()}
            flags["none"] = check(work.x[judged], right)
            row = {"work": work.name, "seed": seed, "rate": rate, "check": name}
            row["false_alarms"] = float(np.mean(flags["none"]))
            row["found"] = {kind: counted(work, wrong[kind], right, flags[kind]) for kind in wrong}
            rows.append(row)
    return rows


def counted(work: Work, wrong: np.ndarray, right: np.ndarray, flags: np.ndarray) -> dict[str, int]:
    """Count faults that matter and those found, of answers that a pool does not refuse."""
    finite = np.isfinite(wrong).all(axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        count = finite & work.matters(wrong, right)
        differ = finite & (np.abs(wrong - right).max(axis=1) > 1e-3 * np.abs(right).max(axis=1))
    return {
        "matter": int(count.sum()),
        "found": int((count & flags).sum()),
        "differ": int(differ.sum()),
        "differ_found": int((differ & flags).sum()),
        "refused": int((~finite).sum()),
    }


def runs_of(work: Work, seed: int) -> Iterator[dict[str, Any]]:
    """Yield runs without faults and with wrong workers, with checks and without.

    They go over the first rows, on threads that wait for `SECONDS` a row; wrong rows count.
    """
    x, right = work.x[:PAST], work.answers(slice(0, PAST))
    table = {row.tobytes(): y for row, y in zip(x, right, strict=True)}
    swap, some = Fault("swap", workers=(2,)), Fault("swap", 0.1, workers=(5,))
    for name, struck in {"none": (), "one swaps, one sometimes": (swap, some)}.items():
        faults = Faults(struck, seed=seed)
        for rate in (None, 0.01):
            calls: list[int] = []

            def served(rows: np.ndarray, calls: list[int] = calls) -> np.ndarray:
                calls.append(len(rows))
                time.sleep(SECONDS * len(rows))
                return np.stack([table[row.tobytes()] for row in rows])

            def pool(
                function: Any, number: int, faults: Faults = faults, **more: Any
            ) -> DevicePool:
                return DevicePool(function, number, faults=faults, **more)

            options: dict[str, Any] = {"tolerance": 0.0, "check_answers": rate, "seed": seed}
            found = run_rows(served, x, pool, num_workers=WORKERS, **options)
            assert found.values is not None
            wrong = work.matters(found.values.reshape(right.shape), right)
            about = {"faults": name, "work": work.name, "seed": seed, "rate": rate, "rows": len(x)}
            about |= {key: found.summary.get(key) for key in ("suspicious", "corrected", "fenced")}
            yield about | {
                "unknown": found.summary["unknown"],
                "computed_rows": sum(calls),
                "wrong_rows": int(wrong[found.status == "computed"].sum()),
                "seconds": found.summary["seconds"],
            }


def summary(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a line for each work, check and rate: false alarms, and faults that were found."""
    for key in sorted({(row["work"], row["check"], row["rate"]) for row in rows}):
        some = [row for row in rows if (row["work"], row["check"], row["rate"]) == key]
        line: dict[str, Any] = {"work": key[0], "check": key[1], "rate": key[2]}
        line["false alarms, %"] = 100 * np.mean([row["false_alarms"] for row in some])
        for kind in dict.fromkeys(name.partition("/")[0] for name in some[0]["found"]):
            each = [row["found"][name] for row in some for name in row["found"]
                    if name.partition("/")[0] == kind]  # fmt: skip
            matter, found = (sum(one[what] for one in each) for what in ("matter", "found"))
            line[f"{kind}, %"] = 100 * found / max(matter, 1)
        yield line
