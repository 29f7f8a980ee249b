"""Tables of docs/serving.md: latencies, throughput, the server's own cost, error probabilities."""

from collections.abc import Iterator, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker

from .looks import system_look
from .results import WIDTH, load, strong

Row = Mapping[str, Any]
RESULTS, PRICE, OFFLINE = load("serving"), load("serving_price"), load("error_probability")
RATES = sorted({row["straggler_rate"] for row in RESULTS["rows"]})
CODED, COPIES = "coded (8, 4)", "replication (2, 1)"
_MODELS = {
    "lenet5-digits": "LeNet5, 32 x 32 x 1 to 10",
    "wide": "two layers, 64 to 1,000",
    "images": "patches, 224 x 224 x 3 to 1,000",
}


def systems(rate: float) -> dict[str, Row]:
    """Return what was measured at a rate of stragglers, by system."""
    return {row["system"]: row for row in RESULTS["rows"] if row["straggler_rate"] == rate}


def summary() -> str:
    """Return the sentences that a reader should take away."""
    none = systems(0.0)
    longer = (none[name]["p99_ms"] - none["uncoded"]["p99_ms"] for name in (CODED, COPIES))
    code, copies = (f"{each:.0f} ms" for each in longer)
    return (
        f"In the table 5 % of the calls are late by {1e3 * RESULTS['straggle_s']:g} ms. If none "
        f"is late, the code (8, 4) makes p99 {code} longer, and two copies {copies}."
    )


def setting() -> str:
    """Return the load, the workers, and how long a call takes."""
    return (
        f"{RESULTS['load']:g} queries a second, {RESULTS['workers']} workers, "
        f"{1e3 * RESULTS['service_s']:g} ms for each call and {1e3 * RESULTS['straggle_s']:g} ms "
        f"more for a straggling one; up to {RESULTS['batch']} queries in a call, and nothing waits "
        "for a batch to fill while a worker is free."
    )


def latencies(rate: float) -> Iterator[dict[str, str]]:
    """Yield latencies, labels and calls of each system."""
    for name, row in systems(rate).items():
        low, high = row["intervals_ms"]["p99"]
        calls = row["calls_per_query"]
        yield {
            "system": name,
            "queries": f"{row['queries']:,}",
            "p50, ms": f"{row['p50_ms']:.0f}",
            "p99, ms": f"{row['p99_ms']:.0f} [{low:.0f},\u00a0{high:.0f}]",
            "RelAcc": _share(row["rel_acc"]),
            "decoded": _share(row["approximate"]),
            "RelAcc of those": _share(row["rel_acc_of_approximate"]),
            "errors": str(sum(row["errors"].values())),
            "calls for each query": "" if calls is None else f"{calls:.2f}",
        }


def picture() -> Any:
    """Return p50 and p99 of each system, by the rate of stragglers."""
    names = list(systems(RATES[0]))
    figure, axes = plt.subplots(
        1, len(RATES), figsize=(WIDTH, 2.9), sharey=True, layout="constrained"
    )
    for axis, rate in zip(axes, RATES, strict=True):
        for height, name in enumerate(reversed(names)):
            row, colour = systems(rate)[name], system_look(name)["color"]
            for quantile, marker in (("p50", "|"), ("p99", "o")):
                axis.plot(row["intervals_ms"][quantile], [height, height], color=colour, lw=1.5)
                axis.plot(row[f"{quantile}_ms"], height, marker, color=colour, ms=6)
        axis.set(title=f"{100 * rate:g} % stragglers", xscale="log", xlabel="latency, ms")
        axis.set_xticks([50, 100, 200, 500])
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), list(reversed(names)))
    figure.suptitle("p50 (bar) and p99 (dot), with 95 % intervals", fontsize=9)
    return figure


def abouts() -> Iterator[dict[str, str]]:
    """Yield what each system is."""
    for name, about in RESULTS["systems"].items():
        yield {"system": name, "about": about["words"]}


def throughput() -> Iterator[dict[str, str]]:
    """Yield the throughput of a closed loop without stragglers."""
    found = {n: row["throughput"] for n, row in systems(0.0).items() if "throughput" in row}
    plain = np.median(found["uncoded"])
    for name, rates in found.items():
        yield {
            "system": name,
            "queries/s": f"{np.median(rates):.0f}",
            "range": f"{min(rates):.0f} to {max(rates):.0f}",
            "of the uncoded server's": _share(np.median(rates) / plain, 0),
            "redundancy leaves": _share(1 / RESULTS["systems"][name]["redundancy"], 0),
        }


def closed_loops() -> Iterator[dict[str, str]]:
    """Yield requests a second of each server, and their share of the bare handler's."""
    for row in PRICE["rows"]:
        if row["loop"] == "closed":
            bare = np.array(row["rates"]["bare"])
            entry = {"model": _MODELS[row["model"]], "clients": str(row["clients"])}
            entry["bare"] = f"{np.median(bare):,.0f}/s"
            for name in list(PRICE["systems"])[1:]:
                ratios = np.array(row["rates"][name]) / bare
                entry[name] = f"{np.median(row['rates'][name]):,.0f}/s: {_middle(ratios)}"
            yield entry


def paced_setting() -> str:
    """Return how often clients ask now and then."""
    paced = PRICE["paced"]
    return (
        f"p50 and p99 in ms of {paced['clients']} clients that ask every "
        f"{1e3 * paced['period_s']:.0f} ms each; in brackets p99 by round."
    )


def offline_setting() -> str:
    """Return what error probabilities were calibrated and judged on."""
    return (
        f"{OFFLINE['model']}, calibrated on {OFFLINE['calibration']:,} training images, then "
        f"{OFFLINE['test']:,} test images in {OFFLINE['sets']} straggler sets."
    )


def paced_clients() -> Iterator[dict[str, str]]:
    """Yield p50 and p99 of clients that ask now and then."""
    for row in PRICE["rows"]:
        if row["loop"] == "paced":
            entry = {"model": _MODELS[row["model"]]}
            for name in PRICE["systems"]:
                rounds = row["p99_ms_by_round"][name]
                entry[name] = (
                    f"{row['p50_ms'][name]:.1f}, {row['p99_ms'][name]:.1f} "
                    f"[{min(rounds):.1f},\u00a0{max(rounds):.1f}]"
                )
            both = row["p99_ms"]
            entry["coded / uncoded"] = strong(f"{both[CODED] / both['uncoded']:.2f}")
            yield entry


def requests() -> Iterator[dict[str, str]]:
    """Yield requests a second of batches, of gRPC and of bytes."""
    for cells in load("serving_requests")["tables"].values():
        first = np.array(cells[0]["rates"])
        for cell in cells:
            ratios = np.array(cell["rates"]) / first
            yield {
                "server": cell["server"],
                "by": cell["transport"],
                "clients": str(cell["clients"]),
                "queries a request": str(cell["rows"]),
                "requests": f"{np.median(first * ratios):,.0f}/s: {_middle(ratios)}",
                "CPU of server and clients": (
                    f"{np.median(cell['cpu_ms']):.2f} + {np.median(cell['client_cpu_ms']):.2f} ms"
                ),
            }


def _groups() -> dict[tuple[int, int], Row]:
    rows = OFFLINE["rows"]  # once, a server arranged queries, too
    return {(r["num_data"], r["queries"]): r for r in rows if not r.get("arranged")}


def full_groups() -> Iterator[dict[str, str]]:
    """Yield what of full groups was wrong and sent again, by what was asked for."""
    row = _groups()[4, 4]
    yield {"asked for": "all decoded", "wrong": _share(row["all_wrong"]), "sent again": ""}
    for each in row["limits"]:
        yield {
            "asked for": f"{100 * each['asked']:g} %",
            "wrong": _share(each["wrong"]),
            "sent again": _share(each["again"]),
        }


def other_groups() -> Iterator[dict[str, str]]:
    """Yield the same of groups that are not full, and of another size."""
    for (k, few), row in _groups().items():
        if (k, few) != (4, 4):
            limits = {
                f"{100 * each['asked']:g} %": (
                    f"{_share(each['wrong'])} ({_share(each['again'], 0)})"
                )
                for each in row["limits"]
            }
            yield {"K": str(k), "queries in a group": str(few), **limits,
                   "all decoded": _share(row["all_wrong"])}  # fmt: skip


def _share(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"


def _middle(ratios: np.ndarray) -> str:
    """Return the median in bold, with the range."""
    ends = f"[{ratios.min():.2f},\u00a0{ratios.max():.2f}]"
    return f"{strong(f'{np.median(ratios):.2f}')} {ends}"
