"""Workloads of several benchmarks: networks with images, settings, grids, recorded answers."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nercc_jax import AbstractCode, ExactStragglers, NeRCC, coded_inference
from nercc_jax.codes import encode_groups
from nercc_jax.evaluation import Answers
from nercc_jax.stragglers import straggler_sets
from nercc_models import load_data, load_model, load_student

Outputs: TypeAlias = Literal["probabilities", "logits"]
OUTPUTS: tuple[Outputs, ...] = ("probabilities", "logits")

# Zero and twelve more for both lambdas, as one would search them without gradients.
GRID = np.concatenate([[0.0], np.logspace(-12, 0, 12)])
NUMBERS = ("lambda_enc", "lambda_dec", "gap_exponent", "end_penalty")  # NeRCC's scalar leaves


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model at (N, K)."""

    model: str
    num_workers: int
    num_data: int

    @property
    def name(self) -> str:
        """Return the setting as an option and a key."""
        return f"{self.model}:{self.num_workers}:{self.num_data}"

    @property
    def shape(self) -> tuple[int, int]:
        """Return K and N, as codes take them."""
        return self.num_data, self.num_workers

    def laws(self, count: int) -> dict[str, ExactStragglers]:
        """Return `count` numbers of stragglers from 0 to N - K, evenly spread, by name."""
        spread = np.linspace(0, self.num_workers - self.num_data, count)
        return {str(s): ExactStragglers(s) for s in sorted({round(float(s)) for s in spread})}


PAPER = (
    Setting("lenet5-mnist", 100, 20),
    Setting("lenet5-mnist", 100, 60),
    Setting("repvgg-cifar10", 60, 20),
    Setting("repvgg-cifar10", 30, 20),
    Setting("vit-cifar10", 20, 8),
    Setting("vit-cifar10", 60, 20),
)

# Where ParM has k = 2, 3, 4.
PARM = tuple(Setting("lenet5-mnist", num_workers, 12) for num_workers in (18, 16, 15))


class Network(eqx.Module):
    """A network as workers run it: its logits, or their softmax."""

    network: Any
    outputs: Outputs = eqx.field(static=True)

    @classmethod
    def load(cls, name: str, outputs: Outputs, student: bool = False) -> "Network":
        """Return a shipped model, or its student."""
        return cls((load_student if student else load_model)(name), outputs)

    def __call__(self, batch: Array) -> Array:
        logits = self.network(batch)
        return jax.nn.softmax(logits) if self.outputs == "probabilities" else logits

    def images(
        self, split: str, data_dir: Path | None, count: int, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return at most `count` preprocessed images of the network's data set, and labels."""
        data = load_data(self.network.data, split, data_dir=data_dir)
        chosen = np.random.default_rng(seed).permutation(len(data.labels))[:count]
        return np.asarray(self.network.preprocess(data.images[chosen])), data.labels[chosen]


def in_batches(model: Callable[..., Any], x: np.ndarray | Array, size: int = 256) -> np.ndarray:
    """Return a model's answers to any number of rows, by one compiled program."""
    x, rows = np.asarray(x), len(x)
    filled = x[np.minimum(np.arange(rows + -rows % size), rows - 1)]
    parts = [_call(model, jnp.asarray(filled[i : i + size])) for i in range(0, rows, size)]
    return np.concatenate([np.asarray(part) for part in parts])[:rows]


@eqx.filter_jit
def _call(model: Callable[..., Any], x: Array) -> Array:
    return model(x)


def groups_of(x: np.ndarray, num_data: int) -> np.ndarray:
    """Return data points in groups of K; a remainder is left out."""
    whole = len(x) // num_data
    return x[: whole * num_data].reshape(whole, num_data, *x.shape[1:])


def own_answers(model: Callable[..., Any], groups: np.ndarray) -> Float[np.ndarray, "groups K m"]:
    """Return the model's answers to the data points themselves."""
    y = in_batches(model, groups.reshape(-1, *groups.shape[2:]))
    return y.reshape(*groups.shape[:2], -1)


def coded_answers(
    model: Callable[..., Any], code: AbstractCode, groups: np.ndarray
) -> Float[np.ndarray, "groups N m"]:
    """Return all workers' answers, which do not depend on who straggles."""
    return own_answers(model, np.asarray(_encode(code, jnp.asarray(groups))))


_encode = eqx.filter_jit(encode_groups)


class Recorded:
    """A model's answers to rows, each computed once: most are copies, in all cells."""

    def __init__(self, model: Callable[..., Any]):
        self.model = model
        self._said: dict[bytes, np.ndarray] = {}

    def __call__(self, x: Any, lead: int = 1) -> np.ndarray:
        """Return the answers to data points that have so many axes before their own."""
        x = np.asarray(x)
        rows = x.reshape(-1, *x.shape[lead:])
        names = [hashlib.sha256(row.tobytes()).digest() for row in rows]
        new = {n: row for n, row in zip(names, rows, strict=True) if n not in self._said}
        if new:
            found = in_batches(self.model, np.stack(list(new.values())))
            self._said.update(zip(new, found, strict=True))
        return np.stack([self._said[name] for name in names]).reshape(*x.shape[:lead], -1)

    def coded(self, code: AbstractCode, groups: np.ndarray) -> Float[np.ndarray, "groups N m"]:
        """Return all workers' answers."""
        return self(_encode(code, jnp.asarray(groups)), 2)

    def assess(self, scheme: Any, x: np.ndarray, masks: Any) -> Any:
        """Return a scheme's assessed predictions under each straggler set.

        Args:
            scheme: A scheme.
            x: Data points, whole groups of K.
            masks: Straggler sets, for all groups (sets, N) or for each (sets, groups, N).
        """
        _, coded = _encode_by(scheme, jnp.asarray(x))
        return _assess(scheme, jnp.asarray(x), jnp.asarray(self(coded, 2)), jnp.asarray(masks))


_encode_by = eqx.filter_jit(lambda scheme, x: scheme.encode(x, None))


class Answered(eqx.Module):
    """A model that has answered what it is asked: so one run serves all straggler sets."""

    answers: Float[Array, "rows m"]

    def __call__(self, batch: Array) -> Array:
        return self.answers


@eqx.filter_jit
def _assess(scheme: Any, x: Array, answers: Float[Array, "groups N m"], masks: Array) -> Any:
    model = Answered(answers.reshape(-1, answers.shape[-1]))
    infer = coded_inference(model, scheme, with_status=True)
    return jax.lax.map(lambda mask: infer(x, jnp.broadcast_to(mask, answers.shape[:2])), masks)


class Yardstick:
    """Data points and straggler sets on which codes are compared.

    Of a code it gives the power mean over laws of the error relative to that of the first code, so
    that no law is drowned by another; 1 for the first code.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        first: AbstractCode,
        groups: np.ndarray,
        laws: Mapping[str, ExactStragglers],
        *,
        key: Array,
        num_sets: int = 32,
        power: float = 1.0,
    ):
        keys = jax.random.split(key, len(laws))
        sets = [
            np.asarray(straggler_sets(law, each, first.num_workers, num_sets))
            for law, each in zip(laws.values(), keys, strict=True)
        ]
        self.model, self.groups, self.power = model, groups, power
        self.own = jnp.asarray(own_answers(model, groups))
        self._masks = jnp.asarray(np.concatenate(sets))
        self._ends = np.cumsum([len(each) for each in sets])[:-1]
        self._scales = self._errors(first, self.answers(first))

    def answers(self, code: AbstractCode) -> Array:
        """Return all workers' answers."""
        return jnp.asarray(coded_answers(self.model, code, self.groups))

    def _errors(self, code: AbstractCode, coded: Array) -> np.ndarray:
        losses = np.asarray(_losses(Answers(code, coded, self.own), self._masks))
        return np.array([np.nanmean(each) for each in np.split(losses, self._ends)])

    def objective(self, code: AbstractCode, coded: Array | None = None) -> float:
        """Return a code's objective; its workers' answers may be known."""
        coded = self.answers(code) if coded is None else coded
        relative = self._errors(code, coded) / np.maximum(self._scales, 1e-30)
        return float(np.mean(relative**self.power) ** (1 / self.power))

    def landscape(self, code: NeRCC) -> np.ndarray:
        """Return the objective for all pairs of `GRID`; answers do not depend on lambda_dec."""
        heights = []
        for enc in GRID:
            here = eqx.tree_at(lambda c: c.lambda_enc, code, jnp.asarray(enc, float))
            coded = self.answers(here)
            both = [eqx.tree_at(lambda c: c.lambda_dec, here, jnp.asarray(d, float)) for d in GRID]
            heights.append([self.objective(each, coded) for each in both])
        return np.array(heights)


@eqx.filter_jit
def _losses(answers: Answers, masks: Array) -> Array:
    return answers.losses(masks, "mse")
