"""A cache of compiled programs on disk. Importing this does not import JAX."""

from ._cache import enable_compilation_cache

__all__ = ["enable_compilation_cache"]
