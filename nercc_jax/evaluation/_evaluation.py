"""The comparison of codes on the same data points, stragglers and metrics."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree, Shaped

from ..arrays import check_count, native
from ..codes import AbstractCode
from ..codes.trees import leaves_of
from ..inference.models import Model
from ..stragglers import AbstractStragglers
from .answers import Answers, batched, coded_outputs, cut_groups, own_outputs
from .tables import text_table

SHARES = ("rel_acc", "accuracy", "lost")  # metrics between 0 and 1
_METRICS = ("mse", "rmse", *SHARES)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and the half width of its 95 % interval (Student's t).

    With few groups of skewed errors the interval is a little short: in 150 draws of 10 groups and
    10 straggler sets, the interval contained the true MSE in 93 %, the true RMSE in 91 %, and the
    true share in 93 % by `interval(share=True)` (in 90 % by the half width alone).

    The half width is NaN for a single straggler set, which has no spread.
    """

    mean: float
    half_width: float

    @classmethod
    def over(cls, values: Sequence[float] | Float[np.ndarray, "sets *groups"]) -> "Estimate":
        """Return the estimate from one value for each straggler set, or for each set and group.

        Sets and groups are both drawn at random, and every group meets every set. So the variance
        is that of two crossed factors, with Satterthwaite's degrees of freedom (Searle, Casella and
        McCulloch, Variance Components, 1992, section 4.3).
        """
        table = np.asarray(values, float)
        table = table.reshape(len(table), -1)
        mean = table.mean()
        if len(table) < 2:
            return cls(float(mean), float("nan"))
        from scipy.special import stdtrit  # late: a fifth of a worker's import time

        of_sets, of_groups = table.mean(axis=1) - mean, table.mean(axis=0) - mean
        rest = table - mean - of_sets[:, None] - of_groups
        freedom = np.maximum(np.array(table.shape) - 1, 1)  # a single group, with 1, adds 0
        squares = np.array([np.sum(of_sets**2), np.sum(of_groups**2)]) / freedom / table.shape
        common = np.sum(rest**2) / freedom.prod() / table.size  # a part of both
        variance = max(squares.sum() - common, squares.max())
        if variance == 0:
            return cls(float(mean), 0.0)
        degrees = squares.sum() ** 2 / np.sum(squares**2 / freedom)
        return cls(float(mean), float(stdtrit(degrees, 0.975) * np.sqrt(variance)))

    def interval(self, *, share: bool = False) -> tuple[float, float]:
        """Return the ends of the 95 % interval; NaN for a single set.

        For a `share` the interval is Wilson's, within [0, 1], for as many independent trials as
        would have this half width.
        """
        mean, half = self.mean, self.half_width
        spread = mean * (1 - mean)
        if not share:
            return mean - half, mean + half
        if not half > 0 or not spread > 0:
            return max(mean - half, 0.0), min(mean + half, 1.0)
        ratio = half**2 / spread  # z^2 / n in Wilson's formula
        centre = (mean + ratio / 2) / (1 + ratio)
        reach = np.sqrt(half**2 + ratio**2 / 4) / (1 + ratio)
        return float(max(centre - reach, 0.0)), float(min(centre + reach, 1.0))

    def percent(self) -> str:
        """Return a share in %, with the ends of its interval unless these are the same number."""
        low, high = (100 * end for end in self.interval(share=True))
        mean = f"{100 * self.mean:.1f}"
        if not high - low >= 0.1:
            return mean
        digits = 0 if high - low >= 3 else 1
        return f"{mean} {low:.{digits}f}–{high:.{digits}f}"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The metrics of one code under one law of stragglers.

    u_k are the decoded and f_k the model's own outputs (m numbers each) for the K data points of a
    group. Means and intervals are over all groups and straggler sets (with one group, over sets).

    Attributes:
        code: The name of the code.
        stragglers: The name of the law.
        mse: Mean of (u - f)^2 over data points and outputs.
        rmse: Root of the mean squared L2 norm, sqrt(mean |u_k - f_k|^2).
        rel_acc: Share of data points with argmax u_k = argmax f_k, along the last axis of outputs;
            if there are several labels, with all equal. NaN where an output is a single number.
        accuracy: The same for the true labels; None without labels.
        lost: Share of data points that were not recovered. They count as wrong in `rel_acc` and
            `accuracy`, and are left out of the three errors.
        num_data_points: The number of data points.
        num_sets: The number of straggler sets.
    """

    code: str
    stragglers: str
    mse: Estimate
    rmse: Estimate
    rel_acc: Estimate
    accuracy: Estimate | None
    lost: Estimate
    num_data_points: int
    num_sets: int


class Evaluations(list[Evaluation]):
    """The result of `evaluate`: a list of rows that can be printed as a table and plotted."""

    def __init__(
        self,
        rows: Iterable[Evaluation] = (),
        errors: Mapping[tuple[str, str], Float[np.ndarray, "sets groups"]] | None = None,
    ):
        """Make a result of rows, and the values whose mean is each code's MSE under each law."""
        super().__init__(rows)
        self._errors = errors or {}

    def gain(
        self, code: str, rival: str | Sequence[str], stragglers: str | None = None
    ) -> Estimate:
        """Return by which share a code's RMSE is below a rival's, with its interval.

        The comparison is paired: both met the same straggler sets and groups.

        Args:
            code: The code's name.
            rival: The rival's name, or several: under each law the one with the lowest error is
                taken.
            stragglers: A law's name. Default: the mean of the gains under all laws.

        Raises:
            ValueError: A name is unknown, or the share is undefined: the rival is exact, or
                recovers nothing.
        """
        rivals = [rival] if isinstance(rival, str) else list(rival)
        laws = list(dict.fromkeys(law for _, law in self._errors))
        names = {name for name, _ in self._errors}
        if unknown := {code, *rivals} - names:
            raise ValueError(f"there are no rows of {sorted(unknown)}, only of {sorted(names)}")
        if stragglers is not None and stragglers not in laws:
            raise ValueError(f"there are no rows under {stragglers!r}, only under {laws}")
        gains = []
        for law in laws if stragglers is None else [stragglers]:
            errors = (self._errors[name, law] for name in rivals)
            best = min(errors, key=lambda each: np.nan_to_num(each.mean(), nan=np.inf))
            if not best.mean() > 0:
                found = "is exact" if best.mean() == 0 else "recovers nothing"
                raise ValueError(f"under {law}, there is no share: the best of {rivals} {found}")
            gains.append(1 - _root(_ratio(self._errors[code, law], best)))
        return Estimate.over(np.mean(gains, axis=0))

    def records(self) -> list[dict[str, Any]]:
        """Return one flat dict for each row: `mse`, `mse_low`, `mse_high`, and so on."""
        records = []
        for row in self:
            record: dict[str, Any] = {"code": row.code, "stragglers": row.stragglers}
            for metric in _METRICS:
                estimate = getattr(row, metric)
                if estimate is not None:
                    low, high = estimate.interval(share=metric in SHARES)
                    record |= {metric: estimate.mean, f"{metric}_low": low, f"{metric}_high": high}
            record |= {"num_data_points": row.num_data_points, "num_sets": row.num_sets}
            records.append(record)
        return records

    def plot(self, metrics: Sequence[str] = ("mse", "rel_acc"), title: str = "") -> Any:
        """Return a matplotlib figure with a panel for each metric and a curve for each code.

        Laws whose names are numbers of stragglers are placed at them, others side by side.

        Raises:
            ImportError: There is no matplotlib (the extra `demo`).
        """
        from .pictures import straggler_figure

        panels = {metric: (metric, metric not in SHARES) for metric in metrics}
        return straggler_figure(self, panels, title)

    def table(self, metric: str, codes: Sequence[str] | None = None) -> str:
        """Return a metric as a table with a row for each law, and a column for each code.

        Shares are in %, with the ends of their intervals. A star marks the best code of a row; for
        errors, which leave lost predictions out, only codes that lost none are considered.

        Args:
            metric: The name of a field of `Evaluation`.
            codes: The codes' names. Default: all.
        """
        names, share = codes or dict.fromkeys(row.code for row in self), metric in SHARES
        by_name, lines = {(row.stragglers, row.code): row for row in self}, [("S", *names)]
        for law in dict.fromkeys(row.stragglers for row in self):
            scores, texts = [], []
            for row in (by_name.get((law, name)) for name in names):
                each = getattr(row, metric, None) or Estimate(np.nan, np.nan)
                score = each.mean if share and metric != "lost" else -each.mean
                loses = row is not None and row.lost.mean > 0 and not share
                scores.append(np.nan if loses else score)
                text = each.percent() if share else f"{each.mean:.3g} ±{each.half_width:.2g}"
                texts.append("-" if np.isnan(each.mean) else text)
            best = np.nanmax([-np.inf, *scores])
            stars = ("*" * bool(score == best) for score in scores)
            lines.append((law, *map("".join, zip(texts, stars, strict=True))))
        return text_table(lines, left=0)

    def __str__(self) -> str:
        """Return the tables of MSE and of labels kept, where outputs have labels."""
        metrics = ["mse"] + ["rel_acc"] * any(np.isfinite(row.rel_acc.mean) for row in self)
        return "\n\n".join(f"{metric}\n{self.table(metric)}" for metric in metrics)


def evaluate(
    model: Model,
    codes: Mapping[str, AbstractCode],
    x: PyTree[Shaped[ArrayLike, "points ..."]],
    stragglers: Mapping[str, AbstractStragglers],
    *,
    key: PRNGKeyArray,
    num_sets: int = 20,
    labels: PyTree[Int[ArrayLike, "points ..."]] | None = None,
    workers: Mapping[str, Model | Sequence[Model]] | None = None,
    batch_size: int = 256,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Evaluations:
    """Evaluate codes by name under laws of stragglers by name.

    A straggler set is one mask for all groups, the same for all codes. The model runs once on each
    data point and coded data point. Intervals are over straggler sets and groups of data points.

    Args:
        model: A function of a batch, (B, ...) to (B, outputs...); outputs may be pytrees.
        codes: Codes with the same K and N, by name.
        x: Data points, in the order in which they are cut into groups of K. A remainder is left out
            (`num_data_points` of the rows).
        stragglers: Laws of stragglers, by name.
        key: Random key of the straggler sets.
        num_sets: Straggler sets for each law.
        labels: The true labels, with a part for each part of the outputs.
        workers: By the code's name, the models that its workers run, if these are not the model
            alone: all models of a code whose workers run several (`worker_models`), the served one
            first; or the model in fewer bits (`cast_model`), or with noise on its answers.
        batch_size: The number of data points in a call of the model.
        progress: A wrapper of the sequence of (law, set) pairs, for a progress bar.

    Returns:
        A list with an `Evaluation` for each law and code. It is printed as a table, and has
        `records`, `plot(metrics, title)`, which returns a figure, and `gain(code, rival)`, the
        share by which a code's error is lower.

    Raises:
        ValueError: The codes differ in K or N, there are fewer than K data points, data points or
            outputs are not finite floats, shapes do not agree, a model is in training mode, the
            number of models is not the one that a code's workers run, or labels are given for
            outputs that are single numbers.
    """
    for name, named in {"codes": codes, "stragglers": stragglers}.items():
        if not isinstance(named, Mapping) or not named:
            raise ValueError(f"{name} are one or more by name, {{'name': ...}}, not {named!r}")
    sizes = {name: (code.num_data, code.num_workers) for name, code in codes.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"codes to compare must have the same (num_data, num_workers): {sizes}")
    if unknown := (workers or {}).keys() - codes.keys():
        raise ValueError(f"workers names {sorted(unknown)}; the codes are {list(codes)}")
    num_sets = check_count("num_sets", num_sets)
    groups = cut_groups(x, next(iter(codes.values())).num_data)
    points, used = len(jax.tree.leaves(x)[0]), np.prod(jax.tree.leaves(groups)[0].shape[:2])
    for label, leaf in [] if labels is None else leaves_of("labels", labels):
        if np.shape(leaf)[:1] != (points,):
            raise ValueError(f"{label} have shape {np.shape(leaf)}; x has {points} data points")
    targets = jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf)[:used]), native(labels, "labels")
    )

    recorded, run = {}, batched(model, batch_size)
    own, form = own_outputs(run, groups)
    classes = all(shape and shape[-1] > 1 for shape in form.shapes)  # not a single number
    if labels is not None and not classes:
        raise ValueError("labels need outputs with a score for each class, not a single number")
    for name, code in codes.items():
        theirs: Any = (workers or {}).get(name, model)
        theirs = (theirs,) if callable(theirs) else theirs
        runs = [run if each is model else batched(each, batch_size) for each in theirs]
        known = own if runs[:1] == [run] else None
        coded = coded_outputs(runs, code, groups, batch_size, known)
        if coded.shape[2] != (size := own.shape[2]):
            raise ValueError(
                f"the workers' answers ({name}) hold {coded.shape[2]}, not {size} numbers"
            )
        recorded[name] = Answers(code, jnp.asarray(coded), jnp.asarray(own), form)
    first = next(iter(recorded.values()))
    groups, num_data, num_outputs = first.own.shape
    pairs = [(law, index) for law in stragglers for index in range(num_sets)]
    sums: dict[tuple[str, str], list[dict[str, Array]]] = {}
    for law, index in progress(pairs):
        place = list(stragglers).index(law)
        draw = jax.random.fold_in(jax.random.fold_in(key, place), index)
        available = stragglers[law].available(draw, first.code.num_workers)
        for name, answers in recorded.items():
            found = _sums_of(answers, answers.decode(available), targets)
            sums.setdefault((name, law), []).append(found)
    rows, errors = [], {}
    for law in stragglers:
        for name in recorded:
            table = _values(sums[name, law], num_data, num_outputs)
            if not classes:
                table["rel_acc"] = np.full_like(table["rel_acc"], np.nan)
            estimates: Any = {metric: Estimate.over(each) for metric, each in table.items()}
            estimates = {"accuracy": None, "num_sets": num_sets} | estimates
            rows.append(Evaluation(name, law, num_data_points=groups * num_data, **estimates))
            errors[name, law] = table["mse"]
    return Evaluations(rows, errors)


_sums_of = eqx.filter_jit(Answers.sums_of)


def _values(
    sums: Sequence[Mapping[str, Float[Array, " groups"]]], num_data: int, num_outputs: int
) -> dict[str, Float[np.ndarray, "sets groups"]]:
    """Return values whose mean is the metric, and whose spread is the metric's, for each metric."""
    tables = {name: np.array([each[name] for each in sums], float) for name in sums[0]}
    count = tables.pop("recovered")
    squares = _ratio(tables.pop("squares"), count)
    return {
        "mse": squares / num_outputs,
        "rmse": _root(squares),
        "lost": 1 - count / num_data,
        **{metric: table / num_data for metric, table in tables.items()},
    }


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return values whose mean is the ratio of the sums, with its spread (delta method)."""
    if not count.any():
        return np.full(total.shape, np.nan)  # there is nothing to compare
    mean = total.sum() / count.sum()
    return mean + (total - mean * count) / count.mean()


def _root(values: np.ndarray) -> np.ndarray:
    """Return values whose mean is the root of these values' mean, with its spread."""
    root = np.sqrt(values.mean())
    return root + (values - root**2) / (2 * root) if root else values
