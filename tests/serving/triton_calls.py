"""Calls of Triton's clients, for a process of their own.

Their messages have the names of kserve's, and no process can have both.
"""

from typing import Any

import numpy as np


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
    **options: Any,
) -> dict[str, Any]:
    """An answer's id, outputs, and which of them were binary; or its error."""
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
    with library.InferenceServerClient(address) as client:
        try:
            answer = client.infer(model, [tensor], outputs=asked, **options)
        except library.InferenceServerException as error:
            return {"status": error.status(), "message": error.message()}
    response = answer.get_response(**({"as_json": True} if face == "grpc" else {}))
    return {
        "id": response["id"],
        "version": response["model_version"],
        "outputs": {each["name"]: answer.as_numpy(each["name"]) for each in response["outputs"]},
        "in_json": [each["name"] for each in response["outputs"] if "data" in each],
    }


def ask(face: str, address: str, method: str, *arguments: Any) -> Any:
    """What another method of the client says."""
    library = _library(face)
    with library.InferenceServerClient(address) as client:
        call = getattr(client, method)
        if face == "grpc" and method.startswith("get"):
            return call(*arguments, as_json=True)
        return call(*arguments)


def _library(face: str) -> Any:
    if face == "http":
        import tritonclient.http as library
    else:
        import tritonclient.grpc as library
    return library
