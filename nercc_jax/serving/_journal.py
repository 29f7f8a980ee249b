"""Requests are told of, if that is wished: some in the log, and those that are traced by spans."""

import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from ._record import Record, current
from ._telemetry import Telemetry

_LOG = logging.getLogger(__name__)


class Journal:
    """Opens a record for each request, and tells of it when it is closed. It never fails one."""

    def __init__(self, rate: float = 0.0, telemetry: Telemetry | None = None):
        """`rate`: the share of the requests that the log has a line of."""
        self._rate, self._telemetry = rate, telemetry

    def open(self, model: str, headers: Callable[[], Mapping[str, str]]) -> Record | None:
        """A request came, whose `headers()` may name a trace. None where nobody wants to know."""
        if not self._rate and self._telemetry is None:
            return None
        record = Record(model, random.random() < self._rate)
        try:
            if self._telemetry is not None:
                record.span = self._telemetry.begin(record, headers())
        except Exception:
            _LOG.exception("a request is not traced")
        current.set(record)
        return record

    def close(self, record: Record, outcome: str) -> None:
        """It has ended."""
        current.set(None)
        try:
            if record.logged:
                _LOG.info(
                    "answered" if outcome == "ok" else "not answered", extra=_line(record, outcome)
                )
            if self._telemetry is not None and record.span is not None:
                self._telemetry.end(record, outcome)
        except Exception:
            _LOG.exception("a request is not told of")


def _line(record: Record, outcome: str) -> dict[str, Any]:
    queued = record.queue_seconds()
    line = {
        "id": record.id,
        "model": record.model,
        "outcome": outcome,
        "queue_ms": None if queued is None else round(1e3 * queued, 3),
        "ms": round(1e3 * (time.monotonic() - record.arrived), 3),
        "answers": [answer for _, answer in sorted(record.answers.items())],
        "groups": record.groups(),
    }
    if record.error is not None:
        line["error"] = record.error
    if record.span is not None:
        line["trace_id"] = f"{record.span.get_span_context().trace_id:032x}"
    return line
