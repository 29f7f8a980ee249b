"""The Ray that a command's workers run on, and what is sent to its nodes."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class RayJob:
    """Ray's head, and what goes to its nodes: folders, modules, or a whole runtime environment.

    Raises:
        ValueError: If a file or folder does not exist.
    """

    address: str | None = None
    working_dir: Path | None = None
    py_modules: Sequence[str | Path] = ()
    runtime_env: Path | None = None

    def __post_init__(self):
        for option, path in (
            ("--working-dir", self.working_dir),
            ("--runtime-env", self.runtime_env),
            *(("--py-modules", Path(each)) for each in self.py_modules),
        ):
            if path is not None and "://" not in str(path) and not path.exists():
                raise ValueError(f"{option} {path}: there is no such file or folder")

    def environment(self) -> dict[str, Any]:
        """Return Ray's runtime environment, as far as options set it."""
        found: Any = {}
        if (path := self.runtime_env) is not None:
            text = path.read_text()
            try:
                if path.suffix == ".toml":
                    found = tomllib.loads(text)
                elif path.suffix == ".json":
                    found = json.loads(text)
                else:
                    import yaml  # which Ray brings

                    found = yaml.safe_load(text)
            except ValueError as error:  # of TOML and JSON
                raise ValueError(f"--runtime-env {path}: {error}") from error
            if not isinstance(found, Mapping):
                raise ValueError(f"--runtime-env {path}: a table is needed, not {found!r}")
        found = dict(found)
        if self.working_dir is not None:
            found["working_dir"] = str(self.working_dir)
        if self.py_modules:
            found["py_modules"] = [str(each) for each in self.py_modules]
        return found

    def connect(self, models: Sequence[str]) -> None:
        """Make this process part of that Ray.

        Unless options say otherwise, the folders of models (`module:function`) that are not
        installed are sent along, if the Ray is joined; so they are not by `ray job submit`, which
        has sent a folder of its own.

        Raises:
            ConnectionError: If there is no Ray.
            ValueError: If it does not take such an environment.
        """
        from ..pools import join_ray
        from ._own_models import look_here

        look_here()
        asked, submitted = self.environment(), "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        sent = {"working_dir", "py_modules"} & asked.keys() or submitted
        join_ray(self.address, asked, asked if sent else own_folders(models) | asked)


def leave_accelerators() -> None:
    """Keep this process's own JAX on the CPU, unless JAX_PLATFORMS says otherwise.

    Workers are processes of their own, and this one would take most of an accelerator's memory.
    """
    import jax

    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")


def own_folders(models: Sequence[str]) -> dict[str, Any]:
    """Return the entries of a runtime environment for models that are not installed."""
    found: dict[Path, Path] = {}  # a module's file or folder by the folder that has it
    installed = importlib.metadata.packages_distributions()
    for each in models:
        name = each.partition(":")[0].partition(".")[0]
        spec = importlib.util.find_spec(name) if ":" in each and name not in installed else None
        if spec is not None and spec.origin is not None:
            path = Path(spec.origin).resolve()
            path = path.parent if spec.submodule_search_locations else path
            if not {"site-packages", "dist-packages"} & set(path.parts):
                found[path.parent] = path
    if not found:
        return {}
    first, *others = found
    excluded = [".git", ".venv", "venv", "__pycache__"]  # whatever .gitignore says
    sent: dict[str, Any] = {"working_dir": str(first), "excludes": excluded}
    if others:
        sent["py_modules"] = [str(found[each]) for each in others]
    return sent
