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

from .clock import Watcher

_LOG = logging.getLogger(__name__)


def ray_module() -> Any:
    """Return Ray; raise ImportError that says how to install it."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("RayPool needs Ray: pip install '.[ray]' in a clone") from error
    return ray


class Head:
    """A cluster's head, asked once a second: Ray says nothing of a head that is gone.

    Its other calls wait for the head, and after a minute Ray ends the process.

    Attributes:
        address: HOST:PORT; empty where it is not known, and the head counts as there.
        alarm: What is wrong, once two questions had no answer; None where the head answers.
        ends_at: The monotonic time at which Ray ends this process; infinite where the head answers,
            or is frozen: its connections are open, and Ray does not notice.
    """

    def __init__(self, address: str):
        self.address, self.alarm, self.ends_at = address, None, math.inf
        self._seen, self._misses, self._client = time.monotonic(), 0, None
        self._watcher = Watcher("nercc-head", self._look) if address else None

    def _look(self) -> float:
        frozen, before = False, self.alarm
        if not ray_module().is_initialized():  # it was left
            self.alarm, self.ends_at = None, math.inf
            return time.monotonic() + 1.0
        try:
            host, _, port = self.address.rpartition(":")
            # The kernel accepts a connection for a process that is stopped, too.
            socket.create_connection((host.strip("[]"), int(port)), 2.0).close()
            frozen = True
            if self._client is None:
                from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]

                self._client = GcsClient(address=self.address)
            self._client.internal_kv_exists(b"nercc", None, timeout=2.0)
        except (OSError, ray_module().exceptions.RayError):
            self._misses += 1
        else:
            self._seen, self._misses, self.alarm = time.monotonic(), 0, None
        # Seconds without a head after which Ray ends this process.
        variable = "RAY_gcs_rpc_server_reconnect_timeout_s"
        limit = float(os.environ.get(variable) or 60.0)
        self.ends_at = math.inf
        if self._misses >= 2 and frozen:
            self.alarm = (
                f"Ray's head at {self.address} takes connections and says nothing, as a process "
                "that is stopped: workers go on, and none is replaced until it goes on"
            )
        elif self._misses >= 2:
            self.ends_at = self._seen + limit
            self.alarm = (
                f"Ray's head at {self.address} does not answer: workers go on, none is replaced, "
                f"and unless it is back within {limit:g} s Ray ends this process"
            )
        if self.alarm is not None and before is None:
            _LOG.error("%s", self.alarm)
        elif self.alarm is None and before is not None:
            _LOG.warning("Ray's head answers again")
        return time.monotonic() + 1.0

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.close()


_LOCK = threading.Lock()
_heads: list[Head] = []  # of the Ray that this process is part of, if it is
_environments: list[dict[str, Any]] = []  # with which we have connected this process


def join_ray(address: str | None, runtime_env: Mapping[str, Any] | None = None) -> Head:
    """Make this process part of a Ray, to its end or to `ray.shutdown()`.

    A process that is connected already stays as it is.

    Args:
        address: As for `RayPool`.
        runtime_env: Ray's runtime environment.

    Returns:
        The head of that Ray.

    Raises:
        ConnectionError: If no Ray is at the address, or it does not let us in.
        ValueError: If a runtime environment comes too late, or does not fit.
    """
    with _LOCK:
        ray, own = ray_module(), dict(runtime_env or {})
        if not ray.is_initialized():
            _connect(address, own)
            _environments[:] = [own]
        elif own and own not in _environments:
            raise ValueError(
                "this process is connected to a Ray already, with another runtime environment: "
                "give it to the first pool, or to `ray.init` where that connects"
            )
        # Ray's client, for processes outside of the cluster, has no such address.
        found = str(getattr(ray.get_runtime_context(), "gcs_address", ""))
        if not _heads or _heads[0].address != found:
            for earlier in _heads:
                earlier.close()
            _heads[:] = [Head(found)]
        return _heads[0]


def ray_is_lost() -> bool:
    """Return whether this process is part of a Ray whose head is gone: Ray will end it.

    Example:
        >>> from nercc_jax.pools import ray_is_lost
        >>> ray_is_lost()
        False
    """
    return any(head.alarm is not None for head in _heads)


def _connect(address: str | None, runtime_env: dict[str, Any]) -> None:
    """Connect by address, by RAY_ADDRESS, to a Ray on this machine, or to a Ray of our own.

    Linux kills the processes of a Ray that we start when the thread that started them ends, and
    then Ray ends ours. So that is a thread that does nothing else for good: any thread may make a
    pool.

    Raises:
        ConnectionError: If there is no listener, for which Ray would try for a minute.
    """
    ray, started = ray_module(), concurrent.futures.Future[None]()
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address not in (None, "auto", "local"):
        parts = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
        port = parts.port or (10001 if parts.scheme == "ray" else 6379)
        try:
            socket.create_connection((parts.hostname or "", port), 5.0).close()
        except OSError as error:
            raise ConnectionError(
                f"no Ray at {address}: {error.strerror or error}. Does its head run (`ray start "
                "--head`), and may this machine reach it? ray://HOST:10001 is for clients outside "
                "of the cluster, HOST:6379 for its own machines"
            ) from error

    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    # What Ray logs goes where this process's own log goes, in its format: a server's is JSON.
    log = logging.getLogger("ray")
    log.setLevel(logging.ERROR)
    log.propagate = True
    if address is None or "://" not in address:
        options["include_dashboard"] = False

    def start() -> None:
        for again in (address in (None, "local"), False):
            try:
                ray.init(address, runtime_env=runtime_env or None, **options)
            except Exception as error:
                # What has started is left: its processes end with this thread, and Ray would end
                # this process a minute later.
                ray.shutdown()
                # Each process of a Ray of our own has 30 s to start: a busy machine may miss one.
                if again and not isinstance(error, ValueError):
                    _LOG.warning("Ray did not start, and is started again: %s", error)
                    continue
                return started.set_exception(error)
            started.set_result(None)
            threading.Event().wait()

    with warnings.catch_warnings():
        # Of os.fork, which Ray follows by exec at once: no thread of JAX is missed.
        warnings.simplefilter("ignore", RuntimeWarning)
        threading.Thread(target=start, name="nercc-ray", daemon=True).start()
        started.result()
    nodes = sum(node["Alive"] for node in ray.nodes())
    cpus, gpus = (ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU"))
    found = getattr(ray.get_runtime_context(), "gcs_address", "") or address
    each = "node" if nodes == 1 else "nodes"
    _LOG.info("joined Ray at %s: %d %s, %g CPUs, %g GPUs", found, nodes, each, cpus, gpus)
