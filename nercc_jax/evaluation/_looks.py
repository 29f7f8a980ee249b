"""The colour and marker of each system, the same in every picture of this project."""

from typing import Any

# Okabe and Ito's colours, and of Tol's muted ones where those are spent: colour-blind readers tell
# apart what stands in one picture. What loses predictions is dashed.
_BLUE, _SKY, _PINK, _WINE, _PURPLE = "#0072b2", "#56b4e9", "#cc79a7", "#882255", "#aa4499"
_RED, _BROWN, _ORANGE, _OLIVE = "#d55e00", "#a05000", "#e69f00", "#999933"
_GREEN, _TEAL, _INDIGO = "#009e73", "#44aa99", "#332288"
_GREY, _LIGHT, _BLACK = "#555555", "#999999", "#000000"

# Of one batch: data points, coded ones, those that are lost, and what is decoded.
DATA, CODED, LOST, FOUND = _BLUE, _GREEN, _RED, _PINK


def _open(color: str, marker: str) -> dict[str, Any]:
    return {"color": color, "marker": marker, "markerfacecolor": "white"}


def _filled(color: str, marker: str) -> dict[str, Any]:
    return {"color": color, "marker": marker}


def _lossy(color: str, marker: str) -> dict[str, Any]:
    return {"color": color, "marker": marker, "linestyle": "--"}


_LOOKS = {
    # The method: untuned, as published, tuned; then what is added to it.
    "NeRCC": _filled(_BLUE, "o"),
    "coded": _filled(_BLUE, "o"),
    "NeRCC (8, 4)": _filled(_BLUE, "h"),
    "NeRCC published": _open(_SKY, "o"),
    "NeRCC, published": _open(_SKY, "o"),
    "published, ordered": _filled(_SKY, "o"),
    "tuned": _filled(_PINK, "D"),
    "NeRCC tuned": _filled(_PINK, "D"),
    "NeRCC tuned, lambdas only": _open(_PINK, "D"),
    "NeRCC learned": _filled(_WINE, "*"),
    "searched layout": _filled(_PURPLE, "D"),
    "scheme": _filled(_WINE, "*"),
    "scheme, uncertain again": _filled(_WINE, "X"),
    "known, else hedged": _filled(_WINE, "*"),
    "known, uncertain twice": _filled(_WINE, "X"),
    "picked, 1.1 calls": _open(_WINE, "*"),
    "picked, 1.35 calls": _open(_WINE, "X"),
    "NeRCC, reject": _filled(_TEAL, "v"),
    "NeRCC, reject, groups together": _filled(_GREEN, "^"),
    "NeRCC, smooth": _filled(_INDIGO, "p"),
    "repeated NeRCC, reject": _filled(_PURPLE, "D"),
    "chebyshev": _filled(_BLUE, "o"),
    "interleaved": _filled(_TEAL, "o"),
    "repeated": _filled(_PURPLE, "o"),
    # Other codes.
    "BACC": _filled(_RED, "s"),
    "BACC tuned": _open(_BROWN, "s"),
    "BACC learned": _filled(_RED, "d"),
    "BACC, median": _filled(_BROWN, "d"),
    "SBACC": _open(_ORANGE, "^"),
    "ApproxIFER": _filled(_ORANGE, "v"),
    "BSCC": _filled(_OLIVE, "h"),
    "BSCC tuned": _open(_OLIVE, "h"),
    "LCC": _filled(_GREEN, "^"),
    "ParM": _lossy(_BLACK, "P"),
    "ParM, k = 4": _lossy(_BLACK, "p"),
    # Copies, and copies on suspicion.
    "replication": _lossy(_GREY, "x"),
    "two copies": _lossy(_GREY, "x"),
    "replication, else surrogate": _lossy(_GREY, "+"),
    "copies, else the nearest": _lossy(_GREY, "x"),
    "copies, else a GP": _lossy(_GREY, "^"),
    "copies, else the cheap model": _lossy(_GREY, "+"),
    "hedg": _filled(_OLIVE, "^"),
    "hedged, p95": _filled(_OLIVE, "v"),
    "hedging, p95": _filled(_OLIVE, "v"),
    "hedged, 1.35 x median": _filled(_OLIVE, "s"),
    # What answers from past answers.
    "learner": _filled(_TEAL, "d"),
    "learner, no redundancy": _open(_TEAL, "d"),
    "surrogate alone": _open(_TEAL, "d"),
    # Nothing, or no code.
    "uncoded": _filled(_LIGHT, "."),
    "no copies": _filled(_LIGHT, "."),
    "equal resources": _filled(_LIGHT, "1"),
    "Ray Serve": _filled(_INDIGO, "h"),
}


def system_look(system: str) -> dict[str, Any]:
    """Return how a system is drawn: matplotlib's `color` and `marker`, and properties of its line.

    The longest known name that the system's name begins with decides: "ParM, k = 2" looks as "ParM"
    does. An unknown system is a black dot.
    """
    known = [name for name in _LOOKS if system.startswith(name)]
    return dict(_LOOKS[max(known, key=len)]) if known else _filled(_BLACK, ".")
