"""How the pages draw the systems that they compare; each looks the same everywhere."""

from typing import Any

# Okabe and Ito's colours, and of Tol's muted ones where those are spent: colour-blind readers tell
# apart what stands in one picture. What loses predictions is dashed.
BLUE, SKY, PINK, WINE, PURPLE = "#0072b2", "#56b4e9", "#cc79a7", "#882255", "#aa4499"
RED, BROWN, ORANGE, OLIVE = "#d55e00", "#a05000", "#e69f00", "#999933"
GREEN, TEAL, INDIGO = "#009e73", "#44aa99", "#332288"
GREY, LIGHT, BLACK = "#555555", "#999999", "#000000"
OPEN, LOSSY = {"markerfacecolor": "white"}, {"linestyle": "--"}
DOTS, MIXED = {"linestyle": ":"}, {"linestyle": "-."}

# The look of each system: a colour, a marker, and further properties.
LOOKS: dict[str, tuple[Any, ...]] = {
    "NeRCC": (BLUE, "o"),
    "NeRCC published": (SKY, "o", OPEN | MIXED),
    "NeRCC tuned": (PINK, "D"),
    "tuned": (PINK, "D"),
    "NeRCC learned": (WINE, "*"),
    "learned": (WINE, "*"),
    "BACC": (RED, "s", DOTS),
    "BACC tuned": (BROWN, "s", OPEN | DOTS),
    "BACC learned": (RED, "d", DOTS),
    "SBACC": (ORANGE, "^", OPEN | MIXED),
    "ApproxIFER": (ORANGE, "v", MIXED),
    "BSCC": (OLIVE, "h", MIXED),
    "BSCC tuned": (OLIVE, "h", OPEN | MIXED),
    "LCC": (GREEN, "^", DOTS),
    "ParM": (BLACK, "P", LOSSY),
    "ParM, k = 4": (BLACK, "p", LOSSY),
    "replication": (GREY, "x", LOSSY),
    "uncoded": (LIGHT, ".", DOTS),
    # The method, and what is added to it.
    "scheme": (WINE, "*"),
    "scheme, uncertain again": (WINE, "X"),
    "known, else hedged": (WINE, "*", MIXED),
    "coded": (BLUE, "o"),
    "NeRCC (8, 4)": (BLUE, "h"),
    "NeRCC, published": (SKY, "o", OPEN),
    "published, ordered": (SKY, "o"),
    "searched layout": (PURPLE, "D"),
    "known, uncertain twice": (WINE, "X"),
    "picked, 1.1 calls": (WINE, "*", OPEN),
    "picked, 1.35 calls": (WINE, "X", OPEN),
    "NeRCC, reject": (TEAL, "v"),
    "NeRCC, reject, groups together": (GREEN, "^"),
    "NeRCC, smooth": (INDIGO, "p"),
    "repeated NeRCC, reject": (PURPLE, "D"),
    "chebyshev": (BLUE, "o"),
    "interleaved": (TEAL, "o"),
    "repeated": (PURPLE, "o"),
    "BACC, median": (BROWN, "d"),
    # Copies, and copies on suspicion.
    "replication, else surrogate": (GREY, "+", LOSSY),
    "copies by the student's doubt": (TEAL, "x", LOSSY),
    "copies of the uncertain": (TEAL, "x", LOSSY),
    "hedg": (OLIVE, "^", MIXED),
    "two copies": (GREY, "x", LOSSY),
    "copies, else the nearest": (GREY, "x", LOSSY),
    "copies, else a GP": (GREY, "^", LOSSY),
    "copies, else the cheap model": (GREY, "+", LOSSY),
    "hedged, p95": (OLIVE, "v"),
    "hedged, 1.35 x median": (OLIVE, "s"),
    # What answers from past answers.
    "learner": (TEAL, "d"),
    "learner, no redundancy": (TEAL, "d", OPEN),
    "surrogate alone": (TEAL, "d", OPEN),
    # Nothing.
    "as it comes": (LIGHT, "."),
    "Ray Serve": (INDIGO, "h"),
}


def system_look(system: str) -> dict[str, Any]:
    """Return how a system is drawn: matplotlib's `color` and `marker`, and properties of its line.

    The longest known name that the system's name begins with decides: "ParM, k = 2" looks as "ParM"
    does. An unknown system is a black dot.
    """
    known = [name for name in LOOKS if system.startswith(name)]
    color, marker, *further = LOOKS[max(known, key=len)] if known else (BLACK, ".")
    return {"color": color, "marker": marker} | dict(*further)
