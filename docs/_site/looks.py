"""How the pages draw the systems that they compare with codes."""

from nercc_jax.evaluation.pictures import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    INDIGO,
    LIGHT,
    LOOKS,
    LOSSY,
    MIXED,
    OLIVE,
    OPEN,
    PURPLE,
    SKY,
    TEAL,
    WINE,
    system_look,
)

LOOKS |= {
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

__all__ = ["system_look"]
