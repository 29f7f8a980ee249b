"""A server from Python: what `nercc serve` does, for a model and a code that you have at hand."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from ..codes import AbstractCode, NeRCC, Uncoded
from ..inference import Model
from ._metrics import Metrics
from ._served_model import ServedModel
from ._settings import ModelSettings, ServerSettings
from .adapt._predictor import Predictor
from .protocol._servable import Servable, make_servable
from .transport._server import Server


def make_server(
    model: Model | Servable,
    code: AbstractCode | None = None,
    shape: Sequence[int] | None = None,
    *,
    name: str = "model",
    calibration: np.ndarray | Callable[[], np.ndarray] | None = None,
    predictor: Predictor | None = None,
    settings: ModelSettings | None = None,
    server_settings: ServerSettings | None = None,
) -> Server:
    """Return a server of one model, which does not listen yet.

    `serve` runs it; as a context manager it serves from a thread:

        >>> import json
        >>> import urllib.request
        >>> import jax.numpy as jnp
        >>> from nercc_jax import NeRCC
        >>> from nercc_jax.serving import ServerSettings, make_server
        >>> free_port = ServerSettings(http_port=0, grpc_port=None)
        >>> code = NeRCC(2, 4, points="interleaved")
        >>> with make_server(jnp.tanh, code, (3,), server_settings=free_port) as server:
        ...     x = {"name": "input", "datatype": "FP32", "shape": [1, 3], "data": [0.0, 0.5, 1.0]}
        ...     response = urllib.request.urlopen(
        ...         f"http://127.0.0.1:{server.http_port}/v2/models/model/infer",
        ...         json.dumps({"inputs": [x]}).encode(),
        ...     )
        ...     print([round(y, 2) for y in json.load(response)["outputs"][0]["data"]])
        [0.0, 0.46, 0.76]

    Args:
        model: a callable on a batch, or the result of `make_servable`.
        code: the code of its queries; by default NeRCC with K and N from `settings`, or none where
            inputs or outputs cannot be coded.
        shape: the shape of one query without the batch axis; not for a `Servable`.
        name: the name that clients use; not for a `Servable`.
        calibration: unlabelled inputs, (points, *shape), or a function that returns them, from
            which the error of decoded answers is estimated; by default from the traffic.
        predictor: a surrogate that answers stragglers' queries.
        settings: the model's settings, such as workers and batching.
        server_settings: the server's settings, such as ports and limits.

    Raises:
        ValueError: for a model without a shape, or that cannot be served (`make_servable`).
    """
    if not isinstance(model, Servable):
        if shape is None:
            raise ValueError("give the shape of one query, without the batch axis")
        model = make_servable(name, model, shape, calibration=calibration)
    settings = settings or ModelSettings()
    if code is None and model.uncodable is None:
        code = NeRCC(settings.num_data, settings.num_workers, points="interleaved", lambda_dec=0.0)
    code = code or Uncoded(1)
    if "num_workers" not in settings.model_fields_set:
        settings = ModelSettings(num_workers=code.num_workers).over(settings)
    registry = CollectorRegistry()
    start = functools.partial(
        ServedModel, model, code, settings, Metrics(registry), predictor=predictor
    )
    return Server({model.name: start}, server_settings, registry)


def serve(
    model: Model | Servable,
    code: AbstractCode | None = None,
    shape: Sequence[int] | None = None,
    **options: Any,
) -> None:
    """Serve a model behind a code until SIGTERM or SIGINT, as `nercc serve` does.

    Args:
        model: a callable on a batch, or the result of `make_servable`.
        code: the code of its queries; by default NeRCC.
        shape: the shape of one query without the batch axis.
        **options: further arguments of `make_server`.

    Raises:
        OSError: where a port is taken.
        ValueError: as `make_server`.
        RuntimeError: where the workers do not start.
    """
    make_server(model, code, shape, **options).run()
