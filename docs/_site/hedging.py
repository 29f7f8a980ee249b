"""The table of docs/hedging.md: hedged HTTP calls against none, a fixed limit, and two at once."""

from .results import load

RESULTS = load("hedging")
CASES = {
    "one": "one server, on 5 % of its calls",
    "both": "both, independently",
    "query": "both, on the same 5 % of the requests",
}
SYSTEMS = {
    "none": "no hedging",
    "at_once": "both at once for 6 %",
    "fixed": "a second call after the p95",
    "hedge": "`hedge(budget=1.06)`",
}


def rows() -> list[dict[str, str]]:
    """Return p99 and calls by system, for each case of what is slow."""
    found = []
    for system, name in SYSTEMS.items():
        row = {"": name}
        for case, slow in CASES.items():
            runs = [run[system] for run in RESULTS["cases"][case]]
            tails = sorted(run["p99_medians"] for run in runs)
            p99, calls = sum(tails) / len(runs), sum(run["calls"] for run in runs) / len(runs)
            row[f"slow: {slow}"] = f"{p99:.2f} ({tails[0]:.2f} to {tails[-1]:.2f}); {calls:.3f}"
        found.append(row)
    return found
