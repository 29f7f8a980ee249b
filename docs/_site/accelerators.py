"""Tables of docs/accelerators.md: programs compiled for devices, and programs that were timed."""

from collections.abc import Iterator, Mapping
from typing import Any

from .results import load, measured, table

_ROOMS = "codes inference splines"
_LAUNCH_S, _PREDICATE_S = 2.5e-6, 10e-6
_V5E_HZ = 197e12 / (4 * 128 * 128 * 2)  # 197 Tflop/s of four units of 128 x 128 multipliers


def compiled(platform: str) -> Iterator[dict[str, str]]:
    """Yield what was counted in each program compiled for a platform, "cuda" or "tpu"."""
    for name, found in load(f"compiled-{platform}")["programs"].items():
        loops = {"loops": f"{found['loops']} + {found['open_loops']}"}
        if platform == "tpu":
            ms = 1e3 * found["cycles"] / _V5E_HZ
            counts = {"cycles": f"{found['cycles']:,}", "at its clock, ms": f"{ms:.2f}"}
        else:
            ms = 1e3 * (_LAUNCH_S * found["launches"] + _PREDICATE_S * found["open_loops"])
            counts = {"launches": f"{found['launches']:,}", "launching, ms": f"{ms:.2f}"}
        yield {"program": name} | counts | loops


def where_compiled() -> Iterator[str]:
    """Yield when and with what the programs were compiled, by platform."""
    for platform in ("cuda", "tpu"):
        yield f"{platform}: {measured(load(f'compiled-{platform}')['environment'], _ROOMS)}"


def runs() -> Iterator[tuple[str, str]]:
    """Yield the table of each device on which programs ran, and where that was."""
    for run in load("accelerator")["runs"].values():
        yield table(map(_timed, run["cases"].values())), measured(run["environment"], _ROOMS)


def _timed(case: Mapping[str, Any]) -> dict[str, Any]:
    row = {"program": case["subject"], "groups": case["groups"]}
    for name, part in case["parts"].items():
        middle, low, high = (f"{1e3 * x:.3g}" for x in (part["median_s"], *part["quartiles_s"]))
        row[name] = f"{middle} ({low} to {high})"
        if name.startswith("mask"):
            row[f"{name}: by N"] = f"{part['by']['bare, N']:.2f}"
    return row
