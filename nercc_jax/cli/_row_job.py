"""What `nercc run --inputs` does: rows of a function, each computed or known well enough."""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..codes import NeRCC
from ..pools import AbstractPool, AbstractRound, ComputedRows, Goal, PoolReport, RowCoder
from ..schemes import FittedScheme
from ._result_parts import Parts
from ._row_results import RowResults
from ._row_tutor import Tutor, load_lesson, save_lesson
from ._run_job import LAST_WORDS, deaths_told, pool_numbers
from ._run_pool import ATTEMPTS

_ROUND = 2.0  # seconds of a round in which all rows are computed
_CALL = 0.25  # seconds of a call, where rows are so quick that some go together
# Of the time that is left, that workers may wait for what is being learned.
_PATIENCE = 0.1
_LEARNER = "learner"  # what the manifest calls its file


@dataclasses.dataclass(frozen=True)
class RowJob:
    """Inputs of a function, and how they are gone over.

    `order` is of the rows: at random, so that the first to be computed are like the others. `size`
    is how many rows a call has, None where it is to be found.
    """

    x: Float[np.ndarray, "rows ..."]
    order: Int[np.ndarray, " rows"]
    code: NeRCC
    goal: Goal
    wait_for: int
    size: int | None
    deadline: float

    @classmethod
    def shuffled(cls, x: np.ndarray, seed: int, *others: Any) -> "RowJob":
        return cls(x, np.random.default_rng(seed).permutation(len(x)), *others)

    @property
    def first(self) -> int:
        """How many rows are computed before anything is learned: a tenth, within limits."""
        return min(max(len(self.x) // 10, 100), 256)

    @property
    def at_most(self) -> float:
        """The share of rows that are decoded, at most."""
        workers = self.code.num_workers
        return max(workers - self.wait_for, 1) / workers

    def features(self) -> Float[np.ndarray, "rows inputs"]:
        """What a learner knows rows by: their inputs in units of their spread, which float32 can
        tell apart wherever they lie."""
        x = self.x.reshape(len(self.x), -1).astype(np.float64)
        spread = x.std(axis=0)
        return ((x - x.mean(axis=0)) / np.where(spread > 0, spread, 1)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _Flying:
    """Rows on their way, since when, in calls of so many, and how large a score may be: None where
    all are computed."""

    round: AbstractRound
    rows: Int[np.ndarray, " rows"]
    size: int
    limit: float | None
    seconds: float
    begin: float = dataclasses.field(default_factory=time.monotonic)


class RowRun:
    """The run itself: `rounds` carries it out, and each field says what it has met so far."""

    def __init__(self, pool: AbstractPool, job: RowJob, results: RowResults, parts: Parts):
        self._pool, self._job, self._results, self._parts = pool, job, results, parts
        self._features = job.features()
        self._fresh = job.order[~results.done[job.order]].tolist()
        self._again: list[int] = []  # that were not answered, or are too uncertain
        self._alone: list[int] = []  # that were in a call that raised
        self._silent = np.zeros(len(job.x), int)  # rounds in which nobody computed a row in time
        self.lost: dict[int, str] = {}
        self._size, self._speed = job.size, 0.0
        self._learned: FittedScheme | None = None
        self._coder: RowCoder | None = None
        self._limit = 0.0
        self._tutor = Tutor(job.code, job.goal, job.first, job.at_most)
        self.begin, self.earlier = time.monotonic(), int(results.done.sum())
        if (kept := parts.kept(_LEARNER)) is not None:
            self._tutor.resume(lesson := load_lesson(kept, job.code))
            self._adopt(lesson)

    @property
    def waiting(self) -> int:
        return len(self._results) - int(self._results.done.sum()) - len(self.lost)

    @property
    def speed(self) -> float:
        """Rows a second."""
        done = int(self._results.done.sum()) - self.earlier
        return done / max(time.monotonic() - self.begin, 1e-9)

    @property
    def learned(self) -> FittedScheme | None:
        """What is known of the function."""
        return self._learned

    @property
    def known(self) -> float:
        """The share of rows that it tells well enough."""
        return 0.0 if self._learned is None else self._tutor.known(self._learned)

    def rounds(self) -> Iterator[None]:
        """Goes on until no row waits; one step for each round whose rows are in the results.

        While a round's answers are decoded the next one is with the workers. Raises: ValueError
        where the function raises on all of the first rows, or gives what the goal cannot judge.
        """
        flying: _Flying | None = None
        while True:
            alone = flying is not None and self._results.predictions is None
            coming = None if alone else self._next()
            if flying is not None:
                self._settle(flying)
                yield
            elif coming is None:
                return
            if (flying := coming) is not None:
                flying.round.wait(flying.seconds)

    def _next(self) -> _Flying | None:
        """The next rows, on their way; None where none waits."""
        self._learn()
        size, workers = self._size or 1, self._pool.num_workers
        if self._alone:
            return self._compute(_cut(self._alone, 4 * workers), 1)
        if len(self._again) >= workers * size or not self._fresh:
            return self._compute(_cut(self._again, len(self._again)), size)
        if self._coder is not None and self._size is not None:
            return self._decode(self._coder, size)
        number = max(int(self._speed * _ROUND), workers * size)
        if self._results.predictions is None:
            number = self._job.first
        return self._compute(_cut(self._fresh, number), size)

    def _compute(self, rows: np.ndarray, size: int) -> _Flying | None:
        if not len(rows):
            return None
        calls = math.ceil(len(rows) / size)
        seconds = self._job.deadline * math.ceil(calls / self._pool.num_workers)
        sent = ComputedRows(self._pool, self._job.x[rows], size)
        return _Flying(sent, rows, size, None, seconds)

    def _decode(self, coder: RowCoder, size: int) -> _Flying:
        groups = size, self._job.code.num_data
        rows = _cut(self._fresh, math.prod(groups))
        # The last groups are filled with their own rows once more: further copies.
        rows = np.resize(rows, math.prod(groups))
        x, features = (each[rows] for each in (self._job.x, self._features))
        grouped = (each.reshape(*groups, *each.shape[1:]) for each in (x, features))
        return _Flying(coder.start(*grouped), rows, size, self._limit, self._job.deadline)

    def _settle(self, flying: _Flying) -> None:
        """Takes a round's rows into the results, and sees to those that are not good enough."""
        found, rows = flying.round.take(), flying.rows
        computed = flying.limit is None
        done = self._results.add(rows, found, flying.limit or 0.0)
        self._parts.add(done.tolist())
        left = np.setdiff1d(rows, done)
        raised = {int(rows[place]): why for place, why in found.raised.items()}
        if computed and not len(done) and self._results.predictions is None and raised:
            why = next(iter(raised.values()))
            raise RuntimeError(f"the function raises on all of the first {len(rows)} rows: {why}")
        if computed:
            seconds = time.monotonic() - flying.begin
            self._speed = max(len(done) / seconds, self._speed / 2)
            if self._size is None and len(done):
                self._size = self._rows_of_call(seconds, len(done))
        for row in left.tolist():
            if row in raised and flying.size > 1:
                self._alone.append(row)
            elif row in raised:
                self.lost[row] = raised[row]
            else:
                self._silent[row] += computed
                if self._silent[row] < ATTEMPTS:
                    self._again.append(row)
                else:
                    self.lost[row] = f"no answer within {self._job.deadline:g} s"

    def _rows_of_call(self, seconds: float, rows: int) -> int:
        """As many as take a call long enough, but not so many that few calls are left."""
        each = seconds * self._pool.num_workers / rows
        most = len(self._fresh) // (8 * self._job.code.num_data)
        return max(1, min(round(_CALL / max(each, 1e-9)), most))

    def _learn(self) -> None:
        """Has the tutor learn what there is, and takes what it has learned."""
        if self._results.predictions is None or self._job.goal.tolerance == 0:
            return
        if self._job.goal.max_disagreement is not None and self._results.vectors.shape[1] < 2:
            raise ValueError(
                "--max-disagreement is for labels, the largest of several outputs; this function "
                "gives one number: say --tolerance"
            )
        known = self._results.learnable
        if len(self._fresh) > self._job.first // 2:
            seconds = _PATIENCE * self.waiting / self._speed if self._speed > 0 else 0.0
            self._tutor.teach(len(known), lambda number: self._pairs(known, number), seconds)
        if (lesson := self._tutor.look()) is not None:
            name = f"learner-{lesson.pairs:06d}.safetensors"
            self._parts.keep(_LEARNER, name, lambda path: save_lesson(path, lesson))
            self._adopt(lesson)

    def _adopt(self, lesson: FittedScheme) -> None:
        self._learned, self._limit = lesson, self._tutor.limit(lesson)
        job, useful = self._job, self._tutor.useful(lesson)
        self._coder = None
        if useful:
            self._coder = RowCoder(self._pool, lesson.scheme, job.goal, job.wait_for)

    def _pairs(self, known: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
        """So many of these rows, at random, with their values."""
        rows = np.random.default_rng(len(known)).permutation(known)[:number]
        return self._features[rows], self._results.vectors[rows]


def _cut(rows: list[int], number: int) -> Int[np.ndarray, " few"]:
    """The first so many, which are taken off the list."""
    taken = np.asarray(rows[:number], int)
    del rows[:number]
    return taken


def run_rows(
    console: Console, pool: AbstractPool, run: RowRun, results: RowResults, parts: Parts
) -> str | None:
    """Carries it out, and says why it ended before its time, if it did."""
    stopped = None
    columns = (BarColumn(bar_width=12), TextColumn("{task.fields[seen]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(results), seen="computing the first rows ...")
        try:
            for _ in run.rounds():
                done = int(results.done.sum())
                progress.update(task, completed=done, seen=_seen(run, results))
                if pool.ends_at - time.monotonic() < LAST_WORDS:
                    stopped = "stopped before Ray ends this process, whose head is gone"
                    break
        except KeyboardInterrupt:
            stopped = "interrupted"
        finally:
            parts.flush(complete=bool(results.done.all()))
    return stopped


def _seen(run: RowRun, results: RowResults) -> str:
    exact, done = int(results.exact.sum()), int(results.done.sum())
    told = f"exact {exact:,}, decoded {done - exact:,}, waiting {run.waiting:,}"
    if run.lost:
        told += f", lost {len(run.lost):,}"
    return f"{told}; {run.speed:,.1f} rows/s"


def numbers_of(run: RowRun, job: RowJob, results: RowResults, report: PoolReport) -> dict[str, Any]:
    """What the run has met, by name."""
    exact, done = results.exact, results.done
    decoded, bars = done & ~exact, job.goal.tolerance is not None
    return {
        "rows_done": int(done.sum()),
        "seconds": time.monotonic() - run.begin,
        "rows_per_second": run.speed,
        "computed": int(exact.sum()),
        "not_finite": int(np.sum(~np.isfinite(results.vectors[exact]).all(axis=1))),
        "decoded": int(decoded.sum()),
        "largest_bar": float(results.score[decoded].max()) if bars and decoded.any() else None,
        "learned_from": None if run.learned is None else run.learned.pairs,
        "known_share": run.known,
        **pool_numbers(report),
        "lost": len(run.lost),
    }


def told(
    numbers: dict[str, Any], run: RowRun, job: RowJob, results: RowResults, report: PoolReport
) -> Iterator[tuple[str, str]]:
    """The same for a person."""
    done = f"{numbers['rows_done']:,} of {len(results):,}, {numbers['seconds']:.1f} s"
    yield "rows", f"{done}, {numbers['rows_per_second']:,.1f} rows/s"
    yield "computed", f"{numbers['computed']:,}"
    if odd := numbers["not_finite"]:
        yield "of them not finite", f"{odd:,}, as the function gave them"
    bar = numbers["largest_bar"]
    largest = "" if bar is None else f", the largest error bar {bar:.3g}"
    yield "decoded", f"{numbers['decoded']:,}{largest}"
    yield "learner", _learner_told(run, job, results)
    yield "late answers", f"{report.late:,}"
    yield "errors", f"{report.errors:,}"
    yield "deaths", deaths_told(report)
    yield "lost", f"{len(run.lost):,}"


def _learner_told(run: RowRun, job: RowJob, results: RowResults) -> str:
    if run.learned is None:
        return "none: all was computed before anything was learned"
    told = f"of {run.learned.pairs:,} rows; it knows {100 * run.known:.0f} % of others well enough"
    if job.goal.tolerance is not None:
        known = results.vectors[results.learnable]
        spread = float(np.sqrt(np.mean(np.var(known, axis=0))))
        share = f" ({100 * job.goal.tolerance / spread:.2g} % of the spread)" if spread > 0 else ""
        told += f": within {job.goal.tolerance:g}{share}"
    return told
