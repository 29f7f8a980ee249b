"""The Ray that a process is part of: by address, one that it finds, or its own; and its head."""

import concurrent.futures
import logging
import math
import os
import socket
import threading
import time
import urllib.parse
import warnings
from collections.abc import Mapping
from typing import Any

_LOG = logging.getLogger(__name__)


def ray_module() -> Any:
    """Return Ray; raise ImportError that says how to install it."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("RayPool needs Ray: pip install '.[ray]' in a clone") from error
    return ray


class HeadProbe:
    """A probe of a cluster's head at HOST:PORT, which its users have probed by `look`, often.

    Without an address, which may not be known, the head counts as there. Its users have a thread
    for it, since calls to Ray itself wait for a frozen head.

    Args:
        address: HOST:PORT.
        every: Seconds between two probes, at least, however often `look` is called.
        timeout: Seconds for the head to answer.
        misses: Probes without an answer, one after the other, that make an alarm.
    """

    def __init__(self, address: str, every: float = 0.5, timeout: float = 2.0, misses: int = 2):
        self.address = address
        host, _, port = address.rpartition(":")
        self._target = host.strip("[]"), int(port or 0)
        self._every, self._timeout, self._most = every, timeout, misses
        # Seconds without a head after which Ray ends this process.
        variable = "RAY_gcs_rpc_server_reconnect_timeout_s"
        self._limit = float(os.environ.get(variable) or 60.0)
        self._lock = threading.Lock()
        self._looked = -math.inf
        self._seen, self._misses, self._frozen = time.monotonic(), 0, False

    def look(self) -> float:
        """Probe the head, unless it was probed just now, and return when it is to be next."""
        with self._lock:
            if self.address and time.monotonic() - self._looked >= self._every:
                self._ask()
                self._looked = time.monotonic()
        return time.monotonic() + 1.0

    def _ask(self) -> None:
        self._frozen = False
        try:
            with socket.create_connection(self._target, self._timeout) as connection:
                # An accepted connection proves nothing: the kernel accepts it for a frozen process,
                # too. gRPC answers the preface of HTTP/2 (RFC 9113, 3.4) and an empty frame of
                # settings with its own at once.
                self._frozen = True
                settings = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
                connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
                connection.recv(1)  # an empty one is an answer, too: the peer has hung up
        except OSError:
            self._misses += 1
            if self._misses == self._most:
                _LOG.error("%s", self.alarm)
            return
        if self.gone:
            _LOG.warning("Ray's head answers again")
        self._seen, self._misses, self._frozen = time.monotonic(), 0, False

    @property
    def gone(self) -> bool:
        return self._misses >= self._most

    @property
    def ends_at(self) -> float:
        """The monotonic time at which Ray ends this process; infinite where the head answers.

        Infinite, too, where the head is frozen: its connections are open, and Ray does not notice.
        """
        return self._seen + self._limit if self.gone and not self._frozen else math.inf

    @property
    def alarm(self) -> str | None:
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


class Membership:
    """This process's connection to a Ray, for as long as a pool of the process uses it.

    With the last user, the connection that we made is closed, and a Ray that we started ends. A Ray
    that the process was connected to before stays.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._users = 0
        self._job: str | None = None  # of Ray, where it was us who connected
        self._environment: dict[str, Any] = {}
        self._probe: HeadProbe | None = None

    def enter(
        self,
        address: str | None,
        runtime_env: Mapping[str, Any] | None,
        elsewhere: Mapping[str, Any] | None = None,
    ) -> HeadProbe:
        """Connect this process, unless it is connected, as `join_ray`; `leave` must follow.

        Returns:
            The probe of the cluster's head, one for all users.
        """
        with self._lock:
            ray = ray_module()
            if not ray.is_initialized():
                own = dict(runtime_env or {})
                _connect(address, own, own if elsewhere is None else dict(elsewhere))
                self._users, self._job, self._environment = 0, _job(), own
            elif self._environment != (runtime_env or self._environment):
                raise ValueError(
                    "this process is connected to a Ray already, with another runtime environment: "
                    "give it to the first pool, or to `ray.init` where that connects"
                )
            head = _head(address)
            if self._probe is None or self._probe.address != head:
                self._probe = HeadProbe(head)
            self._users += 1
            return self._probe

    @property
    def lost(self) -> bool:
        return self._probe is not None and self._probe.gone

    def leave(self) -> None:
        """End one use; call it once for each `enter`."""
        with self._lock:
            self._users -= 1
            ray = ray_module()
            if self.lost:
                return  # Ray would wait for its head
            if self._users <= 0 and self._job is not None and ray.is_initialized():
                if self._job == _job():
                    ray.shutdown()
                self._job, self._environment = None, {}


MEMBERSHIP = Membership()


def _head(address: str | None) -> str:
    address = address or os.environ.get("RAY_ADDRESS") or ""
    if "://" in address:
        return urllib.parse.urlsplit(address).netloc
    try:
        return str(ray_module().get_runtime_context().gcs_address)
    except AttributeError:  # Ray's client, whose own connection must be enough
        return ""


def _job() -> str:
    return ray_module().get_runtime_context().get_job_id()


def join_ray(
    address: str | None,
    runtime_env: Mapping[str, Any] | None = None,
    elsewhere: Mapping[str, Any] | None = None,
) -> None:
    """Make this process part of a Ray until `leave_ray`, whatever pools come and go.

    A process that is connected already stays as it is.

    Args:
        address: As for `RayPool`.
        runtime_env: Ray's runtime environment.
        elsewhere: The runtime environment for a Ray that is joined, which may have other machines
            (default: `runtime_env`).

    Raises:
        ConnectionError: If no Ray is at the address, or it does not let us in.
        ValueError: If a runtime environment comes too late, or does not fit.
    """
    MEMBERSHIP.enter(address, runtime_env, elsewhere)


def leave_ray() -> None:
    """End what `join_ray` began."""
    MEMBERSHIP.leave()


def ray_is_lost() -> bool:
    """Return whether this process is part of a Ray whose head is gone: Ray will end it."""
    return MEMBERSHIP.lost


def _connect(address: str | None, runtime_env: dict[str, Any], elsewhere: dict[str, Any]) -> None:
    """Connect by address, by RAY_ADDRESS, to a Ray on this machine, or to a Ray of our own."""
    ray = ray_module()
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address in (None, "auto"):
        # The Ray that `ray start` made this machine a part of. One that another process started for
        # itself ends with that process, and does not count.
        from ray._private.utils import read_ray_address  # what `ray.init` looks at

        if (here := read_ray_address(None)) is not None:
            try:
                _reach(here)
            except ConnectionError:  # it ended without a word
                here = None
        if here is None and address == "auto":
            raise ConnectionError(
                "no Ray was started on this machine (`ray start`): give the address of its head"
            )
        address = here or "local"
    what = "started a Ray on this machine" if address == "local" else f"joined Ray at {address}"
    if address == "local":
        _start(runtime_env)
    else:
        _reach(address)
        _init(address, elsewhere)
    alive = [node for node in ray.nodes() if node["Alive"]]
    resources = ray.cluster_resources()
    total = f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
    _LOG.info("%s: %d %s, %s", what, len(alive), "node" if len(alive) == 1 else "nodes", total)


def _reach(address: str) -> None:
    """Raise ConnectionError if there is no listener; Ray would try for a minute."""
    parts = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
    port = parts.port or (10001 if parts.scheme == "ray" else 6379)
    try:
        socket.create_connection((parts.hostname or "", port), 5.0).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray at {address}: {error.strerror or error}. Does its head run (`ray start --head`"
            "), and may this machine reach it? ray://HOST:10001 is for clients outside of the "
            "cluster, HOST:6379 for its own machines"
        ) from error


def _init(address: str, runtime_env: dict[str, Any]) -> None:
    ray = ray_module()
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    # What Ray logs goes where this process's own log goes, in its format: a server's is JSON.
    log = logging.getLogger("ray")
    log.setLevel(logging.ERROR)
    log.propagate = True
    if "://" not in address:
        options["include_dashboard"] = False
    try:
        ray.init(address, runtime_env=runtime_env or None, **options)
    except ray.exceptions.AuthenticationError as error:
        raise ConnectionError(
            f"the Ray at {address} asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN "
            "(or RAY_AUTH_TOKEN_PATH) to that of its head (~/.ray/auth_token there)"
        ) from error


def _start(runtime_env: dict[str, Any]) -> None:
    """Start a Ray of our own.

    Linux kills Ray's processes when the thread that started them ends, and then Ray ends ours. So
    that is the main thread, or one that does nothing else for good: any thread may make a pool.
    """

    def start() -> None:
        with warnings.catch_warnings():
            # Of os.fork, which Ray follows by exec at once: no thread of JAX is missed.
            warnings.simplefilter("ignore", RuntimeWarning)
            # A busy machine's head may need longer than Ray waits for it (30 s for its port).
            for _ in range(2):
                try:
                    return _init("local", runtime_env)
                except Exception as error:
                    _LOG.warning("Ray did not start, and is started again: %s", last_line(error))
                    ray_module().shutdown()
            _init("local", runtime_env)

    if threading.current_thread() is threading.main_thread():
        start()
        return
    started: concurrent.futures.Future[None] = concurrent.futures.Future()

    def stay() -> None:
        try:
            start()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        threading.Event().wait()

    threading.Thread(target=stay, name="nercc-ray", daemon=True).start()
    started.result()


def last_line(error: BaseException | None) -> str:
    """Return an error's last line: Ray puts the reason at the end of a page."""
    return str(error).strip().splitlines()[-1]
