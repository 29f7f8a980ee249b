"""The models of a server: which there are, whether they answer, and how they start and end."""

import asyncio
import contextlib
import functools
import gc
import logging
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ...pools.garbage import collect_all
from .._policy import model_key, name_and_version
from .._served_model import ServedModel
from ..protocol._messages import InvalidInput, ModelNotFound, ServerNotReady, check_parameters
from ..settings import ServerSettings

_LOG = logging.getLogger(__name__)
# Seconds between looks at whether something happened.
TICK = 0.02


class Models:
    """The models of a server, by key (`Servable.key`), for the event loop's thread.

    Attributes:
        starts: by key, a function that starts the model, which may take minutes.
        started: those that answer.
        names: the keys of all that are started or will be.
        complete: whether the server's start is over.
        draining: whether the server accepts nothing new any more.
    """

    def __init__(self, settings: ServerSettings, starts: Mapping[str, Callable[[], ServedModel]]):
        self.starts, self.names = starts, [*starts]
        self.started: dict[str, ServedModel] = {}
        self.complete, self.draining = not starts, False
        self._settings = settings
        self._closing: dict[str, asyncio.Future[Any]] = {}
        self._turn = asyncio.Lock()  # one is loaded or unloaded at a time

    # Health.

    @property
    def phase(self) -> Literal["starting", "serving", "draining"]:
        if self.draining:
            return "draining"
        return "serving" if self.complete else "starting"

    def check_live(self) -> None:
        """Raise ServerNotReady where only a restart would help."""
        for key, model in list(self.started.items()):
            if not (health := model.health()).live:
                raise ServerNotReady(f"{key}: {health.trouble}")

    @property
    def ready(self) -> bool:
        healthy = (model.health().ready for model in list(self.started.values()))
        return self.phase == "serving" and all(healthy)

    def trouble(self, name: str, version: str = "") -> str | None:
        """Return why a model would not answer now; None if it would. Raises ModelNotFound."""
        key = self.key_of(name, version)
        if self.draining:
            return "It is draining."
        if key not in self.started:
            return "It is being started."
        health = self.started[key].health()
        return None if health.ready else health.trouble or "It is not ready."

    @property
    def ends_at(self) -> float:
        """The monotonic time at which something will end this process; infinite for nothing."""
        return min((model.ends_at for model in self.started.values()), default=math.inf)

    # Names and versions.

    @property
    def versions(self) -> dict[str, list[str]]:
        """The versions of each model that are started or will be, by name, the latest last."""
        found: dict[str, list[str]] = {}
        for name, version in map(name_and_version, self.names):
            found.setdefault(name, []).append(version)
        return {name: sorted(each, key=int) for name, each in found.items()}

    def key_of(self, name: str, version: str = "") -> str:
        """Return the key of a model's version, by default of the latest that is started.

        Raises ModelNotFound where there is no such model, nor will be.
        """
        key = model_key(name, version or "1")
        if key in self.names and (version or len(self.names) == 1):
            return key
        versions = self.versions.get(name)
        if versions is None or version:
            raise ModelNotFound(f"{name}, version {version}" if versions else name)
        keys = [model_key(name, each) for each in versions]
        return next((key for key in reversed(keys) if key in self.started), keys[-1])

    def find(self, name: str, version: str = "") -> ServedModel:
        """Return a model's version, by default the latest that is started.

        Raises ModelNotFound, and ServerNotReady while it is started.
        """
        key = self.key_of(name, version)
        if key not in self.started:
            raise ServerNotReady(f"{key} is being started: come again later.")
        return self.started[key]

    def index(self, ready: bool = False) -> list[dict[str, str]]:
        """Return all models with their states, by Triton's extension; or only those ready."""
        index = []
        for key in self.starts:
            (name, version), state, why = name_and_version(key), "READY", "unloaded"
            why = self.trouble(name, version) if key in self.names else why
            if why is not None:
                starting = key in self.names and key not in self.started and not self.draining
                state = "LOADING" if starting else "UNAVAILABLE"
            if state == "READY" or not ready:
                entry = {"name": name, "version": version, "state": state, "reason": why or ""}
                index.append(entry)
        return index

    # Starts and ends.

    def _start(self, key: str) -> None:
        self.started[key] = self.starts[key]()
        if self.draining:  # the others may have been closed by now
            self._close(key, self.started[key])

    def _close(self, key: str, model: ServedModel, drain: float = 0.0) -> None:
        model.close(drain)
        _LOG.info("model is closed", extra={"model": key})

    async def start_all(self, meanwhile: Callable[[], None]) -> None:
        """Start the models one by one, until they have started or the server drains.

        Raises as the start of a model does.
        """
        for key in self.starts:
            if self.draining:
                break
            start = in_background(functools.partial(self._start, key))
            while not start.done() and not self.draining:
                meanwhile()
                await asyncio.wait([start], timeout=TICK)
            if not start.done():
                break
            await start
        self.complete = len(self.started) == len(self.starts)

    def close_all(self) -> dict[str, asyncio.Future[Any]]:
        """Begin to close all models, and return when each is closed.

        A model that hangs may never be, so that nobody may have to wait for them.
        """
        for key, model in list(self.started.items()):
            if key not in self._closing:
                self._closing[key] = in_background(functools.partial(self._close, key, model))
        return dict(self._closing)

    async def control(self, name: str, parameters: Mapping[str, Any], *, load: bool) -> None:
        """Start all versions of a model; or answer what they accepted, and end them.

        That is done to its end, although the client may go away. The parameters are a client's.

        Raises:
            NotImplementedError: where clients may not do so.
            ModelNotFound: for a model that the server was not started with.
            ServerNotReady: where the server starts or drains.
            InvalidInput: where a model does not start.
        """
        verb = "load" if load else "unload"
        # Triton's clients always say whether to unload dependents, which there are none of.
        check_parameters(f"to {verb} a model", parameters, {"unload_dependents"})
        if self._settings.model_control != "explicit":
            raise NotImplementedError(
                f"clients may {verb} models only with --model-control explicit"
            )
        keys = [key for key in self.starts if name_and_version(key)[0] == name]
        if not keys:
            raise ModelNotFound(name)
        if self.draining or not self.complete:
            raise ServerNotReady(f"It is {self.phase}.")

        async def to_its_end() -> None:
            async with self._turn:
                for key in keys:
                    if load and key not in self.names:
                        await self._load(key)
                    elif not load and key in self.started:
                        self.names.remove(key)
                        drain = self._settings.drain_timeout_s
                        model = functools.partial(self._close, key, self.started.pop(key), drain)
                        self._closing[key] = in_background(model)
                        del model  # or it would hold what is to be freed
                        await self._closing[key]
                        del self._closing[key]
                if not load:
                    await in_background(collect_all)

        await asyncio.shield(asyncio.ensure_future(to_its_end()))

    async def _load(self, key: str) -> None:
        self.names.append(key)
        try:
            await in_background(functools.partial(self._start, key))
        except Exception as error:
            self.names.remove(key)
            _LOG.exception("not loaded", extra={"model": key})
            own = isinstance(error, ValueError)  # the server's own words
            why = error if own else "see the server's log"
            raise InvalidInput(f"{key} does not load: {why}") from error
        gc.freeze()  # as when the server starts


def in_background(work: Callable[[], Any]) -> asyncio.Future[Any]:
    """Begin work in a thread that a process does not wait for when it ends."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not ended.done():
            ended.set_result(result) if error is None else ended.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="nercc-background", daemon=True).start()
    return ended
