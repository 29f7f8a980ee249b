"""What takes long when a server starts is told to the log: when it begins, and how long it took."""

import contextlib
import logging
import time
from collections.abc import Iterator

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def phase(what: str, model: str) -> Iterator[None]:
    """Logs `what` before its block, and its seconds after it."""
    begin = time.monotonic()
    _LOG.info(what, extra={"model": model})
    yield
    seconds = round(time.monotonic() - begin, 3)
    _LOG.info("%s: done", what, extra={"model": model, "seconds": seconds})
