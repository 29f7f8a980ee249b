"""The connection of this process to a Ray cluster, and the supervision of the cluster's head."""

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
    """Return the module `ray`; raise an ImportError that says how to install it."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("RayPool needs Ray: pip install '.[ray]' in a clone") from error
    return ray


class Head:
    """A cluster's head, probed once a second, since Ray does not report a head that is gone.

    Without a head Ray's other calls block, and after a minute Ray ends the process.

    Attributes:
        address: HOST:PORT; if it is empty (unknown), the head is not probed.
        alarm: The fault, after two probes in a row failed; None while the head answers.
        ends_at: The monotonic time at which Ray ends this process; infinite while the head answers,
            or if it is frozen: then its connections stay open, and Ray does not notice.
    """

    def __init__(self, address: str):
        self.address, self.alarm, self.ends_at = address, None, math.inf
        self._seen, self._misses, self._client = time.monotonic(), 0, None
        self._watcher = Watcher("nercc-head", self._look) if address else None

    def _look(self) -> float:
        frozen, before = False, self.alarm
        if not ray_module().is_initialized():  # this process has disconnected
            self.alarm, self.ends_at = None, math.inf
            return time.monotonic() + 1.0
        try:
            host, _, port = self.address.rpartition(":")
            # The kernel accepts connections even for a stopped process.
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
        # The seconds without a head after which Ray ends this process.
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
_heads: list[Head] = []  # the head of the Ray that this process is connected to, if any
_environments: list[dict[str, Any]] = []  # the runtime environment of that connection


def join_ray(address: str | None, runtime_env: Mapping[str, Any] | None = None) -> Head:
    """Connect this process to a Ray, until it ends or until `ray.shutdown()`.

    A process that is already connected keeps its connection.

    Args:
        address: As for `RayPool`.
        runtime_env: Ray's runtime environment.

    Returns:
        The head of that Ray.

    Raises:
        ConnectionError: If there is no Ray at the address, or it refuses the connection.
        ValueError: If the process is already connected with another runtime environment, or the
            environment is invalid.
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
        # Ray's client, for processes outside of the cluster, does not know this address.
        found = str(getattr(ray.get_runtime_context(), "gcs_address", ""))
        if not _heads or _heads[0].address != found:
            for earlier in _heads:
                earlier.close()
            _heads[:] = [Head(found)]
        return _heads[0]


def ray_is_lost() -> bool:
    """Return whether the head of this process's Ray does not answer: Ray may end the process.

    Example:
        >>> from nercc_jax.pools import ray_is_lost
        >>> ray_is_lost()
        False
    """
    return any(head.alarm is not None for head in _heads)


def _connect(address: str | None, runtime_env: dict[str, Any]) -> None:
    """Connect to Ray at `address` or RAY_ADDRESS, else on this machine; start one if there is none.

    When a thread that started Ray's processes ends, Linux kills these, and then Ray ends this
    process. So a thread that never ends starts them, and any thread may create a pool.

    Raises:
        ConnectionError: If nothing listens at the address; Ray itself would try for a minute.
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
    # Ray's log messages go to this process's own log, in its format, such as a server's JSON.
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
                # Leave a half-started Ray: its processes end with this thread, and Ray would then
                # end this process a minute later.
                ray.shutdown()
                # Each process of a new Ray has 30 s to start, which a busy machine may exceed.
                if again and not isinstance(error, ValueError):
                    _LOG.warning("Ray did not start, and is started again: %s", error)
                    continue
                return started.set_exception(error)
            started.set_result(None)
            threading.Event().wait()

    with warnings.catch_warnings():
        # The warning about os.fork does not apply: Ray calls exec at once, without JAX's threads.
        warnings.simplefilter("ignore", RuntimeWarning)
        threading.Thread(target=start, name="nercc-ray", daemon=True).start()
        started.result()
    nodes = sum(node["Alive"] for node in ray.nodes())
    cpus, gpus = (ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU"))
    found = getattr(ray.get_runtime_context(), "gcs_address", "") or address
    each = "node" if nodes == 1 else "nodes"
    _LOG.info("joined Ray at %s: %d %s, %g CPUs, %g GPUs", found, nodes, each, cpus, gpus)
