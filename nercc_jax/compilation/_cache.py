"""JAX's persistent compilation cache, with a folder and thresholds that suit this library."""

import hashlib
import os
import platform
import sys
from pathlib import Path


def enable_compilation_cache(folder: str | Path | None = None) -> Path:
    """Keep compiled programs on disk, so that later processes load them instead of compiling.

    It applies to this process and, through environment variables, to processes that are started
    from it later, such as Ray's workers. Where JAX has a folder already, from
    JAX_COMPILATION_CACHE_DIR or its configuration, and no other is given, nothing changes. The
    `nercc` command calls this, too.

    Whoever can write to the folder can run code in processes that read from it: do not share it
    with people whom you do not trust.

    Args:
        folder: Folder for the programs; it is created if necessary (default: JAX's own setting,
            else a folder for this kind of processor in `nercc_jax` in the user's cache folder,
            $XDG_CACHE_HOME or ~/.cache).

    Returns:
        The folder in use.

    Raises:
        OSError: If the folder cannot be created.

    ```python
    from nercc_jax.compilation import enable_compilation_cache

    enable_compilation_cache()  # before the first computation
    ```
    """
    if folder is None and (current := _current_folder()):
        return Path(current)
    chosen = _default_folder() if folder is None else Path(folder).absolute()
    chosen.mkdir(parents=True, exist_ok=True)
    settings = {
        "jax_compilation_cache_dir": str(chosen),
        # Programs that compile within a second as well: together they take most of the time.
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    os.environ.update({name.upper(): str(value) for name, value in settings.items()})
    if "jax" in sys.modules:  # which read the environment when it was imported
        import jax
        from jax.experimental.compilation_cache import compilation_cache

        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # which may have opened another folder
    return chosen


def _current_folder() -> str | None:
    """Return the folder that JAX is set to, or will be once it is imported."""
    if "jax" in sys.modules:
        import jax

        return jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    return os.environ.get("JAX_COMPILATION_CACHE_DIR")


def _default_folder() -> Path:
    # One for each kind of processor: home folders are shared, and programs are made for one kind.
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    processor = hashlib.sha256(_processor().encode()).hexdigest()[:8]
    return Path(base).absolute() / "nercc_jax" / f"programs-{processor}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("vendor_id", "model name", "flags", "Features", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(names)}))
