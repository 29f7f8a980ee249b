"""Packages that the commands need beyond the core."""

_DEMO = ("matplotlib", "rich", "safetensors", "sklearn", "typer")


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install for a package that is missing; None where it is none of the extra's."""
    if error.name not in _DEMO:
        return None
    return f"nercc needs {error.name}, which is missing: pip install 'nercc-jax[demo]'"
