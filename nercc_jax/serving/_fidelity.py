"""How far decoded answers may be from the model's own: expected before, and audited afterwards."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import ArrayLike, Bool, Float

from ..evaluation import batched, cut_groups
from ..inference import Conditions, Model, cast_model, current_conditions, run_workers
from ._coder import Coder
from ._query_doubt import QueryDoubt, unknown
from ._rehearsal import DRAWS, Rehearsal

# Groups that a forecast rests on, of each size; those of smaller ones that calibration makes; and
# fewer than which it tells nothing.
_GROUPS, _SHORT, _LEAST = 256, 128, 32
# Rehearsals with each group that comes, while there are any to be made, and of how many groups.
_AT_ONCE, _FEW = 2, 32
_MASKS = 4096  # sets of workers whose error is remembered
_AUDITS = 1000  # decoded queries that the running audit looks at


@dataclasses.dataclass(frozen=True)
class Audit:
    """Decoded queries whose own worker answered later: how many, and how they compare.

    `disagreement` is the share whose label differed, NaN where there is none.
    """

    number: int
    disagreement: float


class Expected(NamedTuple):
    """What is to be expected of each query of a group; NaN where it is not known.

    `disagreement` and `error` as in a `Reply`; `fresh`: nothing came since that would tell more.
    """

    disagreement: Float[np.ndarray, " queries"]
    error: Float[np.ndarray, " queries"]
    fresh: bool


class Fidelity:
    """The error to expect of each query of a group: before it is decoded, and with what came of it.

    Before, given how many queries there are and who answered (`expect`), it is the mean over
    calibration groups decoded from the same workers. Afterwards, a query's own margin and deviation
    tell more (`doubt`; see `_rehearsal.py`). The groups come from data given beforehand, and from
    traffic: a group all of whose coded data points were answered, the queries themselves among
    them, shows what decoding from fewer would have made of it. The oldest is replaced.

    One thread at a time may teach it (`calibrate`, `learn`, `foresee`), which takes its time, or by
    steps of a few milliseconds (`learn_by_steps`, `foresee_by_steps`) between which it may rest;
    all may read what it knew last (`hungry`, `doubt`, `expect`), which takes none.
    """

    def __init__(self, coder: Coder):
        self._coder = coder
        self.conditions = Conditions()  # of the calibration
        self._width = _GROUPS  # that a step looks at, at most
        self._lessons = {
            few: _Lessons(coder, Rehearsal(coder, few) if coder.doubts and few > 1 else None)
            for few in range(1, coder.num_data + 1)
        }
        self._audits: collections.deque[bool] = collections.deque(maxlen=_AUDITS)

    def calibrate(
        self,
        model: Model | Sequence[Model],
        x: Float[ArrayLike, "points ..."],
        *,
        worker_dtype: DTypeLike | None = None,
    ) -> None:
        """Runs the model on unlabelled data points, coded and uncoded, in groups of every size.

        `worker_dtype` as the pool's workers have it, for both: a query's own answer is a worker's.
        The batcher warns of a pool whose `conditions` are others.

        Raises: ValueError where x fills no group, or is no floats or not finite.
        """
        models = cast_model((model,) if callable(model) else tuple(model), worker_dtype)
        self.conditions = current_conditions(worker_dtype)
        run = eqx.filter_jit(run_workers)
        for few in range(2, self._coder.num_data + 1):
            number = _GROUPS if few == self._coder.num_data else _SHORT
            groups = cut_groups(x, few)[:number]
            coded = self._coder.encode(groups, np.arange(self._coder.num_workers)).swapaxes(0, 1)
            answers = np.asarray(run(models, self._coder.code, jnp.asarray(coded)))
            points = groups.reshape(-1, *groups.shape[2:])
            originals = np.asarray(batched(models[0], min(64, len(points)))(points))
            lessons, originals = self._lessons[few], originals.reshape(len(groups), few, -1)
            for group, own in zip(answers, originals, strict=True):
                lessons.add(group.reshape(len(group), -1), self._coder.by_place(own))
            lessons.rehearse(DRAWS)
            for mask in self._one_missing(few) if lessons.known >= _LEAST else ():
                _do(lessons.foresee(mask, _GROUPS))

    def _one_missing(self, few: int) -> list[Bool[np.ndarray, " num_workers"]]:
        """The answers to a group of so many when one query has none of its own: the usual sets."""
        layout = self._coder.layout(few)
        sent = np.zeros(self._coder.num_workers, bool)
        sent[np.concatenate([*self._coder.first[:few], layout.extras]).astype(int)] = True
        masks = [sent]
        for own in layout.own:
            masks.append(sent.copy())
            masks[-1][own] = False
        return [mask for mask in masks if mask.any()]

    def compile(self, outputs: Sequence[int], width: int) -> None:
        """Compiles for a model's outputs, so that no query waits for that.

        `width`: the rows of a group that are decoded at once, at most. Lessons go by the same
        program, so many groups at a step: then a step is no longer than a decoding, and there is
        nothing more to compile, which would hold up whoever asks meanwhile.
        """
        self._width = width
        if not self._coder.guesses:
            return  # nothing is ever decoded
        zeros = np.zeros((1, self._coder.num_workers, int(np.prod(outputs))), np.float32)
        everyone = np.ones(self._coder.num_workers, bool)
        self._coder.compare(zeros, zeros[:, : self._coder.num_data], everyone, width)
        self._coder.agree(zeros[0, 0], zeros[0, 0])

    def state(self) -> dict[str, np.ndarray]:
        """All that calibration told, by name."""
        lessons = self._lessons.items()
        return {f"{few} {name}": x for few, each in lessons for name, x in each.state().items()}

    def restore(self, state: Mapping[str, np.ndarray], conditions: Conditions) -> None:
        """Takes the `state` of one that was calibrated for the same code under these conditions."""
        self.conditions = conditions
        for few, lessons in self._lessons.items():
            own = {name.partition(" ")[2]: x for name, x in state.items() if _size(name) == few}
            if own:
                lessons.restore(own)

    def hungry(self, queries: int) -> bool:
        """Whether groups of so many queries are wanted: nothing can be told of them yet."""
        if queries == 1 or not self._coder.guesses:
            return False
        return not self._lessons[queries].enough

    def learn(
        self,
        answers: Float[np.ndarray, "num_workers ..."],
        originals: Float[np.ndarray, "queries ..."],
    ) -> None:
        """Takes a group: all workers' answers, and the model's own to the queries."""
        _do(self.learn_by_steps(answers, originals))

    def learn_by_steps(
        self,
        answers: Float[np.ndarray, "num_workers ..."],
        originals: Float[np.ndarray, "queries ..."],
    ) -> Iterator[None]:
        """`learn`, a step each time that it is asked for the next."""
        answers = answers.reshape(len(answers), -1)
        originals = originals.reshape(len(originals), -1)
        lessons = self._lessons[len(originals)]
        lessons.add(answers, self._coder.by_place(originals))
        return lessons.rehearse_a_little(self._width)

    def doubt(self, queries: int) -> QueryDoubt:
        """How far decoded queries are to be doubted, in groups of so many.

        For codes that have a doubt (`Coder.doubts`), once enough is known; until then it is NaN.
        """
        return self._lessons[queries].doubt

    def foresee(self, queries: int, mask: Bool[np.ndarray, " num_workers"]) -> None:
        """Finds what is to be expected of groups of so many, decoded from these workers."""
        _do(self.foresee_by_steps(queries, mask))

    def foresee_by_steps(
        self, queries: int, mask: Bool[np.ndarray, " num_workers"]
    ) -> Iterator[None]:
        """`foresee`, a step each time that it is asked for the next."""
        if self._lessons[queries].known >= _LEAST and mask.any():
            yield from self._lessons[queries].foresee(mask, self._width)

    def expect(self, queries: int, mask: Bool[np.ndarray, " num_workers"]) -> Expected:
        """What was found of that last, if anything."""
        nothing = np.full(queries, np.nan)
        if self._lessons[queries].known < _LEAST or not mask.any():
            return Expected(nothing, nothing, True)
        found = self._lessons[queries].expected.get(mask.tobytes())
        if found is None:
            return Expected(nothing, nothing, False)
        disagreement, error = (self._coder.in_order(part)[:queries] for part in found[:2])
        return Expected(disagreement, error, found[2] == self._lessons[queries].forecasts)

    def known(self) -> tuple[int, int]:
        """How many full groups it has seen, and from how many on it tells something."""
        return min(self._lessons[self._coder.num_data].known, _GROUPS), _LEAST

    def audit(self, decoded: np.ndarray, own: np.ndarray) -> bool:
        """Takes a decoded answer and the model's own that came late; whether the labels agree."""
        agree = bool(self._coder.agree(decoded.ravel(), own.ravel()))
        self._audits.append(not agree)
        return agree

    def audited(self) -> Audit:
        """The last audits."""
        audits = list(self._audits)
        return Audit(len(audits), float(np.mean(audits)) if audits else np.nan)


class _Lessons:
    """Groups of one size: the last `_GROUPS` of them."""

    def __init__(self, coder: Coder, rehearsal: Rehearsal | None):
        self._coder, self.rehearsal = coder, rehearsal
        self.known = self._turn = 0
        self.doubt = unknown()
        self._due, self._left = _LEAST, 0  # groups at the next doubt, and rehearsals until then
        self._fresh = 0  # groups that came since then
        self._answers: np.ndarray | None = None
        self._originals: np.ndarray | None = None
        self.forecasts = 0  # how often what is expected began to be found anew
        # By mask: disagreement and error by place, and since when (`forecasts`). Least recently
        # made first; each is put in as a whole, so that others may read meanwhile.
        self.expected: dict[bytes, tuple[np.ndarray, np.ndarray, int]] = {}

    def add(self, answers: np.ndarray, originals: np.ndarray) -> None:
        if self._answers is None or self._originals is None:
            self._answers = np.zeros((_GROUPS, *answers.shape), np.float32)
            self._originals = np.zeros((_GROUPS, *originals.shape), np.float32)
        slot = self.known % _GROUPS
        self._answers[slot], self._originals[slot] = answers, originals
        self.known += 1
        self._fresh += 1

    def state(self) -> dict[str, np.ndarray]:
        if self._answers is None or self._originals is None:
            return {}
        known = min(self.known, _GROUPS)
        return {
            "answers": self._answers[:known],
            "originals": self._originals[:known],
            "masks": np.array([np.frombuffer(mask, bool) for mask in self.expected]),
            "disagreement": np.array([each[0] for each in self.expected.values()]),
            "error": np.array([each[1] for each in self.expected.values()]),
            **{name: np.asarray(part) for name, part in vars(self.doubt).items()},
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        for answers, originals in zip(state["answers"], state["originals"], strict=True):
            self.add(answers, originals)
        tables = (state[name] for name in ("masks", "disagreement", "error"))
        for mask, disagreement, error in zip(*tables, strict=True):
            self.expected[mask.tobytes()] = disagreement, error, self.forecasts
        self.doubt = QueryDoubt(
            state["weights"], state["wrong"], state["last"], int(state["number"])
        )
        self._due = self.known + _GROUPS

    @property
    def enough(self) -> bool:
        """Whether there is enough to tell something of each query."""
        return self.known >= _LEAST and (self.rehearsal is None or self.doubt.number > 0)

    def groups(self, number: int = _GROUPS) -> tuple[np.ndarray, np.ndarray]:
        """The next so many, in turn; fewer come several times, that programs are compiled once."""
        assert self._answers is not None
        assert self._originals is not None
        chosen = (self._turn + np.arange(number)) % min(self.known, _GROUPS)
        self._turn = (self._turn + number) % _GROUPS
        return self._answers[chosen], self._originals[chosen]

    def rehearse(self, draws: int) -> None:
        """Finds the doubt at once, if enough is known."""
        if self.rehearsal is None or self.known < _LEAST:
            return
        known = min(self.known, _GROUPS)
        for _ in range(draws):
            _do(self.rehearsal.draw(*self.groups(), known, _GROUPS))
        self.doubt = self.rehearsal.calibrate(known)
        self._due = self.known + _GROUPS

    def rehearse_a_little(self, width: int) -> Iterator[None]:
        """Finds the doubt anew as groups come, a part with each, step by step.

        At first whenever their number has doubled.
        """
        if self.rehearsal is None:
            return
        if not self._left and self.known > self._due - DRAWS // _AT_ONCE:
            self._left = DRAWS
        if not self._left:
            return
        self._left -= _AT_ONCE
        known = min(self.known, _GROUPS)
        for _ in range(_AT_ONCE):
            yield from self.rehearsal.draw(*self.groups(_FEW), min(known, _FEW), width)
        if not self._left:
            self.doubt = self.rehearsal.calibrate(known)
            self._due = self.known + known

    def foresee(self, mask: np.ndarray, width: int) -> Iterator[None]:
        assert self._answers is not None
        assert self._originals is not None
        if not self.forecasts or self._fresh >= _GROUPS:
            self.forecasts += 1
            self._fresh = 0
        number = min(self.known, _GROUPS)
        square, wrong = np.zeros((2, self._coder.num_data))
        recovered = np.ones(self._coder.num_data, bool)
        for begin in range(0, number, width):
            some = slice(begin, min(begin + width, number))
            own = self._originals[some]
            found, same = self._coder.compare(self._answers[some], own, mask, width)
            recovered = found.recovered  # it is the mask that tells
            square += np.sum((found.predictions - own) ** 2, axis=(0, 2), dtype=float)
            wrong += np.sum(~(recovered & same), axis=0)
            yield
        error = np.where(recovered, np.sqrt(square / number), np.nan)
        # Jeffreys' estimate: none wrong among n does not say that none ever will be.
        disagreement = (wrong + 0.5) / (number + 1)
        while len(self.expected) >= _MASKS:
            del self.expected[next(iter(self.expected))]
        self.expected[mask.tobytes()] = disagreement, error, self.forecasts


def _do(steps: Iterable[None]) -> None:
    """Takes all of them at once."""
    for _ in steps:
        pass


def _size(name: str) -> int:
    """Of the groups that a part of a state is about."""
    return int(name.partition(" ")[0])
