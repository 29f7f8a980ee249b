"""From settings to served models: shipped models, your own, and their codes."""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from prometheus_client import CollectorRegistry

import nercc_models

from ..codes import AbstractCode, Berrut, BerrutSpline, NeRCC, Replication, Uncoded, load_code
from ..codes._kept import x64_enabled
from ..inference.models import current_conditions
from ..serving import Predictor, Servable, make_servable
from ..serving._metrics import Metrics
from ..serving._served_model import ServedModel, log_phase
from ..serving._settings import ModelSettings
from ..serving.protocol._servable import FLOAT
from ._command import of_option
from ._options import Options, Returned
from ._own_models import (
    example_inputs,
    find_score,
    find_surrogate,
    is_own,
    is_shipped,
    load_callable,
)
from ._workload import find_model, load_plain_code, read_named_inputs

# Codes tuned for shipped models by `nercc tune --layout interleaved`.
_CODES = Path(__file__).parent / "codes"
UNCODED = Uncoded(1)
# Packages whose version may matter to a calibration; of ours, every line does.
_VERSIONS = ("jax", "jaxlib", "numpy", "flax", "scikit-learn")


class StartFailed(RuntimeError):
    """The workers of a model did not start."""


def starts_of(
    chosen: Sequence[ModelSettings],
    registry: CollectorRegistry,
    join: Callable[[], Any] = lambda: None,
) -> dict[str, Callable[[], ServedModel]]:
    """Return functions that start each model with its workers, by name.

    A start raises ValueError for settings that do not fit, `StartFailed`, and what `join` raises,
    which is called before a model whose workers are Ray actors.

    Raises:
        ValueError: for mistakes that are found without loading a model.
    """
    metrics = Metrics(registry)
    for settings in chosen:
        check_files(settings)
    return {
        settings.key: functools.partial(_start, settings, code_of(settings), metrics, join)
        for settings in chosen
    }


def start_models(
    chosen: Sequence[ModelSettings], registry: CollectorRegistry
) -> dict[str, ServedModel]:
    """Start all models, and return them by name. If one does not start, the others are closed.

    Raises:
        ValueError: for settings that do not fit.
        StartFailed: where workers do not start.
    """
    served: dict[str, ServedModel] = {}
    with contextlib.ExitStack() as undo:
        for name, start in starts_of(chosen, registry).items():
            served[name] = start()
            undo.callback(served[name].close, 0.0)
        undo.pop_all()
    return served


def check_loadable(settings: ModelSettings) -> None:
    """Check all that needs no workers. Raises ValueError where something does not fit."""
    check_files(settings)
    _loaded(settings, code_of(settings))


def check_files(settings: ModelSettings) -> None:
    """Raise ValueError where there is no such model or file, without loading any."""
    with of_option(settings.served_name):
        Options(str(settings.model), settings.weights, settings.inputs)


def _loaded(
    settings: ModelSettings, code: AbstractCode
) -> tuple[Servable, AbstractCode, Predictor | None]:
    servable = servable_of(settings)
    return servable, fitting_code(code, settings, servable), predictor_of(settings, servable)


def _start(
    settings: ModelSettings, code: AbstractCode, metrics: Metrics, join: Callable[[], Any]
) -> ServedModel:
    name = settings.served_name
    if is_shipped(str(settings.model)) and settings.outputs is None and settings.tolerance is None:
        settings = settings.model_copy(update={"outputs": "logits"})  # they are classifiers
    if settings.pool == "ray":
        with log_phase("joining Ray", name):
            join()
    with log_phase("loading", name):
        servable, code, predictor = _loaded(settings, code)
    score = find_score(settings.straggler_score)
    try:
        cache = calibration_file(settings, code)
        return ServedModel(servable, code, settings, metrics, cache, predictor, score)
    except RuntimeError as error:
        raise StartFailed(f"the workers of {name} did not start: {error}") from error


def _returned(settings: ModelSettings) -> Returned:
    """Return the outputs of a shipped model as its workers return them, and as files name them."""
    return "probabilities" if settings.outputs == "probabilities" else "logits"


def servable_of(settings: ModelSettings) -> Servable:
    name = str(settings.model)
    model: Any = find_model(name, settings.weights, _returned(settings))
    inputs: Any = None  # unlabelled ones, or a function that returns them
    if settings.inputs is not None:
        inputs = read_named_inputs(settings.inputs)
    elif is_shipped(name) and model.network.data == "digits":  # which come with a package
        inputs = lambda: model.images("train", None, 1024, 0)[0]  # noqa: E731
    elif is_own(name):
        inputs = example_inputs(name)
        if settings.preprocess is None and inputs is not None:  # else as clients send them
            inputs = jax.tree.map(lambda x: np.asarray(x, np.float32), inputs)
    shape = settings.input_shape or getattr(model, "input_shape", None)
    if shape is None and isinstance(inputs, dict):
        shape = {name: each.shape[1:] for name, each in inputs.items()}
    elif shape is None and inputs is not None:
        shape = inputs.shape[1:]
    if shape is None:
        raise ValueError(f"{name}: say the shape of one query with --input-shape, or give --inputs")
    prepare = settings.preprocess
    output_name = _returned(settings) if is_shipped(name) else "output"
    return make_servable(
        settings.served_name,
        model,
        shape,
        datatype=settings.input_datatype or getattr(model, "input_datatype", FLOAT),
        output_name=settings.output_name or output_name,
        calibration=inputs,
        preprocess=None if prepare is None else load_callable(prepare, None, "--preprocess"),
        version=str(settings.version),
    )


def predictor_of(settings: ModelSettings, servable: Servable) -> Predictor | None:
    """Return the predictor that the setting `surrogate` names; None for none.

    Raises ValueError where there is no such surrogate, or nothing can be predicted.
    """
    asked, name = settings.surrogate, servable.name
    if asked in (None, "none"):
        if settings.redundancy == "uncertain":
            raise ValueError(f"{name}: redundancy 'uncertain' needs a surrogate")
        return None
    if servable.uncodable is not None:
        raise ValueError(f"{name} cannot have a surrogate: {servable.uncodable}")
    if asked == "learn":
        return Predictor()
    try:
        found = find_surrogate(asked, str(settings.model), _returned(settings))
    except ValueError as error:
        raise ValueError(f"{name}: {error}; or learn, or none") from error
    return Predictor(servable.on_rows(found))


def fitting_code(code: AbstractCode, settings: ModelSettings, servable: Servable) -> AbstractCode:
    """Return the code, or `UNCODED` where the model cannot be coded and no code was asked for.

    Raises ValueError where one was.
    """
    if servable.uncodable is None or code.num_data == 1:
        return code
    if settings.code is None and settings.scheme is None:
        return UNCODED
    asked = f"scheme {settings.scheme!r}" if settings.code is None else f"code {settings.code}"
    raise ValueError(
        f"{servable.name} cannot have {asked}: {servable.uncodable}. Say scheme = 'uncoded' (or "
        "'replication') for it, or nothing; or serve what follows its embedding, which takes floats"
    )


def code_of(settings: ModelSettings) -> AbstractCode:
    """Return the code that the settings name; for a shipped model a tuned one, if there is one."""
    k, n = settings.num_data, settings.num_workers
    if settings.code is not None:
        return load_plain_code(settings.code, f"--code {settings.code}")
    if settings.scheme == "uncoded":
        return UNCODED
    if settings.scheme == "replication":
        return Replication(1, max(n // k, 1))  # each query by itself: no group to wait for
    if settings.scheme == "berrut":
        return Berrut(k, n, points=settings.points)
    if settings.scheme == "berrut-spline":
        return BerrutSpline(k, n, points=settings.points)
    tuned = _CODES / f"{settings.model}-{n}-{k}-{_returned(settings)}.json"
    if settings.points == "interleaved" and tuned.exists():
        return load_code(tuned)
    own = settings.points in ("interleaved", "repeated")
    return NeRCC(k, n, points=settings.points, lambda_dec=0.0 if own else None)


def calibration_file(settings: ModelSettings, code: AbstractCode) -> Path | None:
    """Return the cache file of a shipped model's calibration, beside the compiled programs.

    It is named after all that the calibration depends on: the model, its code, how it runs, and our
    sources. None where those programs are not kept, for a model of your own, whose name does not
    say what it computes, and for a tolerance.
    """
    folder, model = os.environ.get("JAX_COMPILATION_CACHE_DIR"), str(settings.model)
    values = settings.policy().tolerance is not None
    if values or not folder or "://" in folder or ":" in model:
        return None
    leaves, structure = jax.tree.flatten(code)
    conditions = current_conditions(settings.worker_dtype), x64_enabled(), structure
    versions = [importlib.metadata.version(name) for name in _VERSIONS]
    digest = hashlib.sha256(repr((_returned(settings), *conditions, *versions)).encode())
    for leaf in leaves:
        digest.update(np.asarray(leaf).tobytes())
    for source in (Path(__file__).parents[1], Path(str(nercc_models.__file__)).parent):
        for path in (*sorted(source.rglob("*.py")), *sorted(source.glob(f"weights/{model}.*"))):
            digest.update(path.read_bytes())
    return Path(folder) / "calibrations" / f"{model}-{digest.hexdigest()[:32]}.npz"
