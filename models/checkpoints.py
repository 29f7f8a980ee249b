"""A training run's state on disk, by orbax."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Checkpoints:
    """The last two checkpoints of one run in one folder; without a folder it keeps nothing.

    `numbers` are the recipe's: a folder holds one recipe's run, and resuming another one from it
    raises `ValueError`. Without them any run is restored, to read it.
    """

    def __init__(self, folder: str | Path | None, numbers: dict[str, Any] | None = None):
        self._numbers = numbers
        self._manager: Any = None
        if folder is not None:
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(
                max_to_keep=2, create=True, enable_async_checkpointing=False
            )
            self._manager = ocp.CheckpointManager(Path(folder).resolve(), options=options)

    def save(self, step: int, state: Any, history: list[dict[str, Any]], seconds: float) -> None:
        """Keep `state`, any pytree of arrays, with what was logged so far."""
        if self._manager is None:
            return
        import orbax.checkpoint as ocp

        log = {"recipe": self._numbers, "history": history, "seconds": seconds}
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(_by_path(state)), log=ocp.args.JsonSave(log)
        )
        self._manager.save(step, args=arguments, force=True)

    def restore(self, state: Any) -> tuple[int, Any, list[dict[str, Any]], float]:
        """Return the latest (step, state, history, seconds of the unfinished epoch).

        `state` is both the structure to fill and the answer when there is no checkpoint.
        """
        if self._manager is None or self._manager.latest_step() is None:
            return 0, state, [], 0.0
        manager, latest = self._manager, self._manager.latest_step()
        import orbax.checkpoint as ocp

        log = self.log()
        changed = {
            name: (log["recipe"].get(name), value)
            for name, value in (self._numbers or {}).items()
            if log["recipe"].get(name) != value
        }
        if changed:
            raise ValueError(
                f"The checkpoints in {manager.directory} were made by a recipe with other "
                f"numbers (there, now): {changed}. Choose another checkpoint folder."
            )
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, _by_path(state))
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        arrays = manager.restore(latest, args=arguments).state
        # Orbax commits arrays to their device, and `jit` would compile anew for each mixture of
        # committed arrays and others.
        leaves = [jnp.asarray(np.asarray(arrays[name])) for name in _by_path(state)]
        state = jax.tree.unflatten(jax.tree.structure(state), leaves)
        return latest, state, list(log["history"]), log["seconds"]

    def log(self) -> dict[str, Any]:
        """Return the latest checkpoint's `recipe`, as numbers, and `history`; empty without one."""
        if self._manager is None or self._manager.latest_step() is None:
            return {}
        import orbax.checkpoint as ocp

        arguments = ocp.args.Composite(log=ocp.args.JsonRestore())
        return self._manager.restore(self._manager.latest_step(), args=arguments).log

    def close(self) -> None:
        """Wait for what is still being written."""
        if self._manager is not None:
            self._manager.close()


def _by_path(state: Any) -> dict[str, Any]:
    """Return a pytree as a flat table; lists and Flax states are stored alike."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path).replace("/", "|"): leaf for path, leaf in leaves}
