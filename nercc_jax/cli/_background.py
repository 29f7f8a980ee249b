"""Work beside a command, in the middle of which its process may end."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

_NAME = "nercc-background"

R = TypeVar("R")


def in_background(work: Callable[..., Any], *arguments: Any) -> threading.Thread:
    """Begins it on a thread that nobody waits for."""
    thread = threading.Thread(target=work, args=arguments, name=_NAME, daemon=True)
    thread.start()
    return thread


def beside(work: Callable[[], R]) -> Callable[[], R]:
    """Begins it on such a thread. Returns what waits for its result, and raises what it raised."""
    results: list[R] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = in_background(run)

    def wait() -> R:
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    return wait


def at_work() -> bool:
    """Whether there is such a thread that has not ended."""
    return any(each.name == _NAME for each in threading.enumerate())
