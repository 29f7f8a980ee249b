"""Whether the head of a Ray cluster answers, and when its absence ends this process."""

import logging
import math
import os
import socket
import threading
import time

_LOG = logging.getLogger(__name__)

_EVERY = 0.5  # seconds between two looks at least, whoever asks for them
_PROBE = 2.0  # seconds for it to answer
_MISSES = 2  # looks without an answer, one after the other, that make an alarm
# What HTTP/2 begins with (RFC 9113, 3.4), and an empty frame of settings: gRPC answers with its own
# at once. That a connection is taken says nothing: a frozen process's kernel does that.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
# Seconds without a head after which Ray ends this process, unless this variable says otherwise.
_ENDS_AFTER, _VARIABLE = 60.0, "RAY_gcs_rpc_server_reconnect_timeout_s"


class HeadProbe:
    """Whether the head at HOST:PORT answers: who wants to know calls `look`, often.

    Without an address, which may not be known, it does.
    """

    def __init__(self, address: str):
        self.address = address
        host, _, port = address.rpartition(":")
        self._target = host.strip("[]"), int(port or 0)
        self._limit = float(os.environ.get(_VARIABLE) or _ENDS_AFTER)
        self._lock = threading.Lock()
        self._looked = -math.inf
        self._seen, self._misses, self._frozen = time.monotonic(), 0, False

    def look(self) -> None:
        """Asks it for a word, if nobody has just now."""
        with self._lock:
            if self.address and time.monotonic() - self._looked >= _EVERY:
                self._ask()
                self._looked = time.monotonic()

    def _ask(self) -> None:
        self._frozen = False
        try:
            with socket.create_connection(self._target, _PROBE) as connection:
                self._frozen = True
                connection.sendall(_GREETING)
                connection.recv(1)  # nothing is a word, too: somebody has hung up
        except OSError:
            self._misses += 1
            if self._misses == _MISSES:
                _LOG.error("%s", self.alarm)
            return
        if self._misses >= _MISSES:
            _LOG.warning("Ray's head answers again")
        self._seen, self._misses, self._frozen = time.monotonic(), 0, False

    @property
    def gone(self) -> bool:
        return self._misses >= _MISSES

    @property
    def ends_at(self) -> float:
        """The monotonic time at which Ray ends this process; infinite where the head answers.

        Nor does Ray where the head is frozen, whose connections are open.
        """
        return self._seen + self._limit if self.gone and not self._frozen else math.inf

    @property
    def alarm(self) -> str | None:
        """What is wrong, in words."""
        if not self.gone:
            return None
        if self._frozen:
            return (
                f"Ray's head at {self.address} takes connections and says nothing, as a process "
                "that is stopped: workers go on, and none is replaced until it goes on"
            )
        return (
            f"Ray's head at {self.address} does not answer: workers go on, none is replaced, and "
            f"unless it is back within {self._limit:g} s Ray ends this process"
        )
