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
    if folder is None:
        current = os.environ.get("JAX_COMPILATION_CACHE_DIR")
        if "jax" in sys.modules:  # which read the environment when it was imported
            import jax

            current = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
        if current:
            return Path(current)
        # One for each kind of processor: home folders are shared, and programs are made for one.
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        except OSError:
            lines = [f"model name {platform.processor()}"]
        names = ("vendor_id", "model name", "flags", "Features", "CPU part")
        kept = sorted({line for line in lines if line.startswith(names)})
        kind = hashlib.sha256("".join(kept).encode()).hexdigest()[:8]
        folder = Path(base) / "nercc_jax" / f"programs-{kind}"
    chosen = Path(folder).absolute()
    chosen.mkdir(parents=True, exist_ok=True)
    settings = {
        "jax_compilation_cache_dir": str(chosen),
        # Programs that compile within a second as well: together they take most of the time.
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    os.environ.update({name.upper(): str(value) for name, value in settings.items()})
    if "jax" in sys.modules:
        import jax
        from jax.experimental.compilation_cache import compilation_cache

        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # which may have opened another folder
    return chosen
