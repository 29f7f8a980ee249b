"""Cheap models that stand beside the one that is served or planned for, by name."""

from collections.abc import Callable
from typing import Any

from ._own_models import load_callable


def find_surrogate(asked: str, model: str, outputs: str) -> Callable[..., Any]:
    """`student`, the shipped one of a model; a file of `nercc distill`; or module:function.

    Raises: ValueError where there is none.
    """
    if ":" in asked:
        return load_callable(asked, None, "--surrogate")
    if asked != "student" and not asked.endswith(".safetensors"):
        raise ValueError(
            f"--surrogate: {asked!r} is no surrogate: there are student, .safetensors files of "
            "`nercc distill` and module:function"
        )
    if outputs != "logits":
        raise ValueError(f"--surrogate {asked}: students give logits, and the model {outputs}")
    from nercc_models import load_student, load_student_file

    try:
        return load_student(model) if asked == "student" else load_student_file(asked)
    except FileNotFoundError as error:
        raise ValueError(f"--surrogate {asked}: {error}") from error
