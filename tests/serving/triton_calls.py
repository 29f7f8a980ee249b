"""Calls of Triton's clients, for a process of their own.

Their messages have the names of kserve's, and no process can have both.
"""

import concurrent.futures
import contextlib
import multiprocessing
from typing import Any

import numpy as np


@contextlib.contextmanager
def in_a_process(seconds: float):
    """Give a function that calls another in a process that has not imported kserve."""
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=fresh) as process:
        yield lambda *call, **options: process.submit(*call, **options).result(seconds)


def infer(
    face: str,
    address: str,
    model: str,
    x: np.ndarray,
    *,
    binary: bool = True,
    name: str = "input",
    datatype: str = "FP32",
    outputs: dict[str, bool] | None = None,
    client: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """An answer's id, outputs, and which of them were binary; or its error. `client` are the
    client's own options, TLS for example."""
    library = _library(face)
    tensor = library.InferInput(name, list(x.shape), datatype)
    more = {"binary_data": binary} if face == "http" else {}
    tensor.set_data_from_numpy(x, **more)
    asked = None
    if outputs is not None:
        asked = [
            library.InferRequestedOutput(name, **({"binary_data": raw} if face == "http" else {}))
            for name, raw in outputs.items()
        ]
    with library.InferenceServerClient(address, **client or {}) as connected:
        try:
            answer = connected.infer(model, [tensor], outputs=asked, **options)
        except library.InferenceServerException as error:
            return {"status": error.status(), "message": error.message()}
    response = answer.get_response(**({"as_json": True} if face == "grpc" else {}))
    return {
        "id": response["id"],
        "version": response["model_version"],
        "outputs": {each["name"]: answer.as_numpy(each["name"]) for each in response["outputs"]},
        "in_json": [each["name"] for each in response["outputs"] if "data" in each],
    }


def ask(
    face: str,
    address: str,
    method: str,
    *arguments: Any,
    client: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """What another method of the client says."""
    library = _library(face)
    with library.InferenceServerClient(address, **client or {}) as connected:
        if face == "grpc" and method.startswith("get"):
            options["as_json"] = True
        return getattr(connected, method)(*arguments, **options)


def _library(face: str) -> Any:
    if face == "http":
        import tritonclient.http as library
    else:
        import tritonclient.grpc as library
    return library
