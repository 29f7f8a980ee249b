"""Which Ray a process is part of: the one it is told, one that it finds, or one of its own."""

import concurrent.futures
import logging
import os
import socket
import threading
import urllib.parse
import warnings
from collections.abc import Mapping
from typing import Any

from ._ray_head import HeadProbe

_LOG = logging.getLogger(__name__)

# On a busy machine Ray's head may need longer than Ray waits for it (30 s for its port).
_STARTS = 3
_CONNECT = 5.0  # seconds for a head to take a connection


def ray_module() -> Any:
    """Ray. Raises: ImportError that says how to install it."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("RayPool needs Ray: pip install 'nercc-jax[ray]'") from error
    return ray


class Membership:
    """This process's part in a Ray, for as long as somebody in it uses that.

    What we connected to is left, and what we started ends, with the last who uses it; a Ray that
    the process was connected to before stays.
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
        """Connects this process, unless it is connected; `leave` has to follow.

        Returns what looks after the cluster's head, one for all.

        `elsewhere` is the runtime environment where a Ray is joined, which may have other machines;
        a Ray that is started here has `runtime_env`, and so has that, unless it is given.

        Raises: ConnectionError where no Ray is at the address, or does not let us in; ValueError
        where an address or a runtime environment comes too late, or does not fit.
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
        """Whether the cluster's head is gone."""
        return self._probe is not None and self._probe.gone

    def leave(self) -> None:
        """To be called once for each `enter`."""
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
    """Where the head listens for us, as HOST:PORT."""
    address = address or os.environ.get("RAY_ADDRESS") or ""
    if "://" in address:
        return urllib.parse.urlsplit(address).netloc
    try:
        return str(ray_module().get_runtime_context().gcs_address)
    except AttributeError:  # by Ray's client, whose own connection has to do
        return ""


def _job() -> str:
    """Which connection to Ray this is: each has a number of its own."""
    return ray_module().get_runtime_context().get_job_id()


def join_ray(
    address: str | None,
    runtime_env: Mapping[str, Any] | None = None,
    elsewhere: Mapping[str, Any] | None = None,
) -> None:
    """Makes this process part of a Ray until `leave_ray`, whatever pools come and go: see `enter`.

    One that is connected already stays as it is.
    """
    MEMBERSHIP.enter(address, runtime_env, elsewhere)


def leave_ray() -> None:
    """Ends what `join_ray` began."""
    MEMBERSHIP.leave()


def ray_is_lost() -> bool:
    """Whether this process is part of a Ray whose head is gone: Ray will end it."""
    return MEMBERSHIP.lost


def _connect(address: str | None, runtime_env: dict[str, Any], elsewhere: dict[str, Any]) -> None:
    """By address, by RAY_ADDRESS, to what was started on this machine, or to a Ray of our own."""
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address in (None, "auto"):
        here = _started_here()
        if here is None and address == "auto":
            raise ConnectionError(
                "no Ray was started on this machine (`ray start`): give the address of its head"
            )
        address = here or "local"
    if address == "local":
        _start(runtime_env)
        return _tell("started a Ray on this machine")
    _reach(address)
    _init(address, elsewhere)
    _tell(f"joined Ray at {address}")


def _started_here() -> str | None:
    """The address of the Ray that `ray start` made this machine a part of, if it is there.

    Not of those that other processes have for themselves, which end with them.
    """
    from ray._private.utils import read_ray_address  # what `ray.init` looks at

    address = read_ray_address(None)
    if address is None:
        return None
    try:
        _reach(address)
    except ConnectionError:  # it ended without a word
        return None
    return address


def _tell(what: str) -> None:
    ray = ray_module()
    alive = [node for node in ray.nodes() if node["Alive"]]
    resources = ray.cluster_resources()
    told = f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
    _LOG.info("%s: %d %s, %s", what, len(alive), "node" if len(alive) == 1 else "nodes", told)


def _reach(address: str) -> None:
    """Raises: ConnectionError where nobody listens there; Ray would try for a minute."""
    parts = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
    port = parts.port or (10001 if parts.scheme == "ray" else 6379)
    try:
        socket.create_connection((parts.hostname or "", port), _CONNECT).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray at {address}: {error.strerror or error}. Does its head run (`ray start --head`"
            "), and may this machine reach it? ray://HOST:10001 is for clients outside of the "
            "cluster, HOST:6379 for its own machines"
        ) from error


def _init(address: str, runtime_env: dict[str, Any]) -> None:
    ray = ray_module()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
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
    """Starts a Ray of our own.

    Linux kills Ray's processes when the thread ends that started them, and then Ray ends ours. So
    that is the main thread, or one that does nothing else for good: pools may be made by any.
    """

    def start() -> None:
        with warnings.catch_warnings():
            # Of os.fork, which Ray follows by exec at once: no thread of JAX is missed.
            warnings.simplefilter("ignore", RuntimeWarning)
            for _ in range(_STARTS - 1):
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
    """Ray puts the reason for which something did not start at the end of a page."""
    return str(error).strip().splitlines()[-1]
