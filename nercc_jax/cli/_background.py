"""Work beside a command, in the middle of which its process may end."""

import threading
from collections.abc import Callable
from typing import Any

_NAME = "nercc-background"


def in_background(work: Callable[..., Any], *arguments: Any) -> threading.Thread:
    """Begins it on a thread that nobody waits for."""
    thread = threading.Thread(target=work, args=arguments, name=_NAME, daemon=True)
    thread.start()
    return thread


def at_work() -> bool:
    """Whether there is such a thread that has not ended."""
    return any(each.name == _NAME for each in threading.enumerate())
