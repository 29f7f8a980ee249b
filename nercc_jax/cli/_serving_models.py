"""Served models from settings: shipped models or your own, with their codes and surrogates."""

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from prometheus_client import CollectorRegistry

import nercc_models

from ..codes import AbstractCode, Berrut, BerrutSpline, NeRCC, Replication, Uncoded, load_code
from ..serving import Metrics, ModelSettings, Predictor, Servable, ServedModel, make_servable
from ._command import of_option
from ._options import HUB, Options, Returned
from ._workload import callable_of, faults_of, load_plain_code, model_of, surrogate_of

# Codes tuned for shipped models by `nercc tune --layout interleaved`.
_CODES = Path(__file__).parent / "codes"
UNCODED = Uncoded(1)
_LOG = logging.getLogger(__name__)


class StartFailed(RuntimeError):
    """The workers of a model did not start."""


def starts_of(
    chosen: Sequence[ModelSettings],
    registry: CollectorRegistry,
    join: Callable[[], Any] = lambda: None,
) -> dict[str, Callable[[], ServedModel]]:
    """Return functions that start each model with its workers, by name.

    `join` is called before the start of a model whose workers are Ray actors. A start raises
    ValueError for settings that do not fit, `StartFailed`, and the errors of `join`.

    Raises:
        ValueError: for mistakes that are found without loading a model.
    """
    metrics = Metrics(registry)

    def start(settings: ModelSettings, code: AbstractCode) -> ServedModel:
        name = settings.served_name
        if settings.pool == "ray":
            _LOG.info("joining Ray", extra={"model": name})
            join()
        _LOG.info("loading", extra={"model": name})
        servable, code, predictor = load_parts(settings, code)
        if ":" not in str(settings.model) and settings.outputs is settings.tolerance is None:
            settings = settings.model_copy(update={"outputs": "logits"})  # shipped: classifiers
        settings = settings.model_copy(update={"faults": faults_of(settings.faults)})
        try:
            return ServedModel(servable, code, settings, metrics, predictor)
        except RuntimeError as error:
            raise StartFailed(f"the workers of {name} did not start: {error}") from error

    return {each.served_name: functools.partial(start, each, code_of(each)) for each in chosen}


def load_parts(
    settings: ModelSettings, code: AbstractCode | None = None
) -> tuple[Servable, AbstractCode, Predictor | None]:
    """Return a model, its code and its predictor: the parts that need no workers.

    The code is `UNCODED` if the model cannot be coded, and the settings name no code. The model has
    unlabelled inputs for calibration, if there are any.

    Raises:
        ValueError: if a setting does not fit the model.
    """
    code = code_of(settings) if code is None else code
    asked, name, prepare = str(settings.model), settings.served_name, settings.preprocess
    # The kind of outputs that the model returns, which file names of codes contain.
    returned: Returned = "probabilities" if settings.outputs == "probabilities" else "logits"
    model: Any = model_of(asked, settings.weights, returned)
    shipped = ":" not in asked
    inputs: Any = None
    if settings.inputs is not None:
        with of_option(f"--inputs {settings.inputs}"):
            if settings.inputs.suffix == ".npz":  # by name, for a model with several inputs
                with np.load(settings.inputs, allow_pickle=False) as arrays:
                    inputs = dict(arrays)
            else:
                inputs = nercc_models.load_inputs(settings.inputs)[0]
    elif shipped and model.data == "digits":  # the digits come with scikit-learn
        inputs = lambda: model.images("train", None, 1024, 0)[0]  # noqa: E731
    elif not shipped and not asked.startswith(HUB):
        with of_option(f"--model {asked}"):
            inputs = nercc_models.example_inputs(asked)
    if inputs is not None and not callable(inputs) and (settings.inputs is not None or not prepare):
        inputs = jax.tree.map(lambda x: np.asarray(x, np.float32), inputs)  # else clients' dtype
    shape = settings.input_shape or getattr(model, "input_shape", None)
    if shape is None and inputs is not None:
        shape = jax.tree.map(lambda x: x.shape[1:], inputs)
    if shape is None:
        raise ValueError(
            f"{asked}: say the shape of one query with --input-shape, or give --inputs"
        )
    servable = make_servable(
        name,
        model,
        shape,
        datatype=settings.input_datatype or getattr(model, "input_datatype", "FP32"),
        output_name=returned if shipped else "output",
        calibration=inputs,  # pyright: ignore[reportArgumentType]
        preprocess=None if prepare is None else callable_of("--preprocess", prepare),
        version=str(settings.version),
    )
    uncodable = servable.uncodable
    if uncodable is not None and code.num_data > 1:
        if settings.code is not None or settings.scheme is not None:
            raise ValueError(
                f"{name} cannot have {settings.code or settings.scheme}: {uncodable}. Say scheme = "
                "'uncoded' (or 'replication'), or serve what follows its embedding, which takes "
                "floats"
            )
        code = UNCODED
    surrogate = settings.surrogate
    if surrogate in (None, "none"):
        if settings.redundancy == "uncertain":
            raise ValueError(f"{name}: redundancy 'uncertain' needs a surrogate")
        return servable, code, None
    if uncodable is not None:
        raise ValueError(f"{name} cannot have a surrogate: {uncodable}")
    if surrogate == "learn":
        return servable, code, Predictor()
    try:
        found = surrogate_of(surrogate, asked, returned)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; or learn, or none") from error
    return servable, code, Predictor(servable.on_rows(found))


def code_of(settings: ModelSettings) -> AbstractCode:
    """Return the code that the settings name; for a shipped model a tuned one, if there is one.

    Raises ValueError if there is no such model, file or code, without loading any model.
    """
    with of_option(settings.served_name):
        Options(str(settings.model), settings.weights, settings.inputs, pool=settings.pool)
    k, n, points = settings.num_data, settings.num_workers, settings.points
    if settings.code is not None:
        return load_plain_code(settings.code, f"--code {settings.code}")
    if settings.scheme == "uncoded":
        return UNCODED
    if settings.scheme == "replication":
        return Replication(1, max(n // k, 1))  # K = 1: no query waits for a group
    if settings.scheme in ("berrut", "berrut-spline"):
        kind = Berrut if settings.scheme == "berrut" else BerrutSpline
        return kind(k, n, points=points)
    returned = "probabilities" if settings.outputs == "probabilities" else "logits"
    tuned = _CODES / f"{settings.model}-{n}-{k}-{returned}.json"
    if points == "interleaved" and tuned.exists():
        return load_code(tuned)
    return NeRCC(k, n, points=points, lambda_dec=0.0)
