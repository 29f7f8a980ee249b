"""The cost of the server where nothing straggles and no worker sleeps.

Servers stand side by side, with workers that are threads of their processes, and are asked in turn:
so what else the machine does meets all of them alike, and a round's ratio is of neighbours in time.

`serving_price`, 15 minutes: the bare handler of `served.py`, uncoded and coded servers. Tails get
twice as many turns, twice as long: of few queries p99 is one stall, or none.

`serving_requests`, 4 minutes: what kind of request costs what: batches, gRPC, bytes instead of
floats.

`serving_checks`: a server without checks of answers, beside the same with checks, of a fast model,
LeNet5 on scikit-learn's digits, and RepVGG on CIFAR-10; they have learned before from as many of
these images as they keep. Beside requests a second and latencies stands the time of all CPU cores
that a server took for a request, which depends little on what else the machine does.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import served
from load import PERIOD
from measure import cpu_seconds, in_turn
from report import Report, environment, show
from servers import (
    HERE,
    PACKAGES,
    UNCODED,
    answered,
    load,
    nercc_serve,
    running,
    url_of,
    write_images,
    write_queries,
)

# By name: settings of `nercc serve`, None for the bare handler; and words.
SYSTEMS: dict[str, dict[str, Any] | None] = {
    "bare": None,
    "uncoded": UNCODED | {"workers": os.cpu_count()},
    "uncoded, 8 workers": UNCODED,
    "coded (8, 4)": {},
}
WORDS = {
    "bare": "what an engineer writes first: a FastAPI handler around the jitted model, no queue, "
    "no batches, no limits, no metrics (`bench/served.py`)",
    "uncoded": "`nercc serve --scheme uncoded --workers 2`, `copies = 1`: a worker a core",
    "uncoded, 8 workers": "the same with as many workers as the code's",
    "coded (8, 4)": "`nercc serve` with its defaults",
}
PACED = 8  # clients that ask at a pace


class Server(NamedTuple):
    """A server that runs: its addresses by transport, its process, and the queries for it."""

    urls: dict[str, str]
    pid: int
    queries: Path

    def asked(
        self, loop: str, clients: int, seconds: float, seed: int, rows: int = 1, by: str = "REST"
    ) -> dict[str, Any]:
        """Return what a load came to, with requests a second and CPU time a request."""
        before = cpu_seconds(self.pid)
        found = load(self.queries, self.urls[by], loop, clients, seconds, seed, rows)
        spent, latency = cpu_seconds(self.pid) - before, answered(found)
        return found | {
            "answered": latency,
            "failed": len(found["latency"]) - len(latency),
            "per_second": len(latency) / seconds,
            "cpu_ms": 1e3 * spent / max(len(latency), 1),
            "client_cpu_ms": 1e3 * found["cpu_s"] / max(len(latency), 1),
        }


@contextlib.contextmanager
def server_of(
    model: str, settings: Mapping[str, Any] | None, queries: Path, *more: str
) -> Iterator[Server]:
    """Run a server of a shipped model, or of one of `served`; without settings the bare one."""
    name = f"served:{model}" if model in served.SHAPES else model
    if settings is None:
        command, variables = [sys.executable, str(HERE / "served.py"), "bare", model, *more], {}
    else:
        shape = {}
        if model in served.SHAPES:
            shape = {"input_shape": ",".join(map(str, served.SHAPES[model]))}
        command, variables = nercc_serve(name, shape | dict(settings))
    with running(command, variables) as ports:
        urls = {}
        if "http_port" in ports:
            urls["REST"] = url_of(ports, name)
        if "grpc_port" in ports:
            urls["gRPC"] = f"grpc://127.0.0.1:{ports['grpc_port']}/{name.replace(':', '.')}"
        yield Server(urls, ports["pid"], queries)


def ms(latencies: Any, share: float) -> float:
    return 1e3 * float(np.quantile(latencies, share))


def in_rounds(
    servers: Mapping[str, Any], rounds: int, ask: Callable[[Any, int], dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Return what each server's loads came to: all are asked in turn, round by round."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    for turn in range(rounds):
        for name in in_turn(list(servers), turn):
            found[name].append(ask(servers[name], turn))
    return found


def figures(found: Mapping[str, Sequence[Mapping[str, Any]]], what: str) -> dict[str, list[float]]:
    """Return one figure of each server's rounds."""
    return {name: [each[what] for each in of] for name, of in found.items()}


def medians(values: Mapping[str, Sequence[float]], by: str, **about: Any) -> list[dict[str, Any]]:
    """Return a line for each server: the median, and its ratio to another's in each round."""
    lines = []
    for name, each in values.items():
        ratio = np.divide(each, values[by])
        ends = [ratio.min(), ratio.max()]
        line = {"server": name, "median": np.median(each), f"by {by}": np.median(ratio)}
        lines.append(about | line | {"least to most": ends})
    return lines


def price(report: Report, models: tuple[str, ...] = ("lenet5-digits", "wide", "images")) -> None:
    """Measure throughput and tails of each model's servers.

    Options:
        models: A shipped one, and two of users' sizes.
    """
    seconds, rounds, rows = 1.5, 3, []
    if report.quick:
        seconds, rounds, models = 0.5, 1, models[:1]
    for model in models:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            queries, servers = Path(folder) / "queries.npz", {}
            write_queries(queries, model)
            for name, settings in SYSTEMS.items():
                server = stack.enter_context(server_of(model, settings, queries))
                for loop, clients in (("closed", 1), ("closed", 8), ("paced", PACED)):
                    server.asked(loop, clients, seconds, 99)
                servers[name] = server
            for clients in (1, 8):
                found = in_rounds(
                    servers,
                    rounds,
                    lambda each, turn: each.asked("closed", clients, seconds, turn),  # noqa: B023
                )
                rates = figures(found, "per_second")
                errors = sum(map(sum, figures(found, "failed").values()))
                row = {"model": model, "loop": "closed", "clients": clients, "errors": errors}
                rows.append(row | {"rates": rates})
                show(medians(rates, "bare", model=model, clients=clients))
            rows.append(tails(model, servers, 2 * seconds, 2 * rounds))
    report.write(
        {
            "environment": environment(*PACKAGES),
            "systems": WORDS,
            "seconds": seconds,
            "rounds": rounds,
            "paced": {"clients": PACED, "period_s": PERIOD},
            "rows": rows,
        }
    )


def tails(model: str, servers: Mapping[str, Server], seconds: float, rounds: int) -> dict[str, Any]:
    """Return p50 and p99 of paced clients, over all rounds and in each."""
    found = in_rounds(servers, rounds, lambda each, turn: each.asked("paced", PACED, seconds, turn))
    rounds_of = figures(found, "answered")
    latencies = {name: np.concatenate(of) for name, of in rounds_of.items()}
    exact = {name: np.concatenate(of) for name, of in figures(found, "exact").items()}
    p99 = {name: [ms(each, 0.99) for each in of] for name, of in rounds_of.items()}
    show(medians(p99, "uncoded", model=model, clients=PACED))
    return {
        "model": model,
        "loop": "paced",
        "clients": PACED,
        "errors": sum(map(sum, figures(found, "failed").values())),
        "queries": {name: len(each) for name, each in latencies.items()},
        "approximate": {name: 1 - float(np.mean(each)) for name, each in exact.items()},
        "p50_ms": {name: ms(each, 0.5) for name, each in latencies.items()},
        "p99_ms": {name: ms(each, 0.99) for name, each in latencies.items()},
        "p99_ms_by_round": p99,
    }


# --- kinds of requests

MODEL, ROWS = "lenet5-digits", 16
CODED = ("uncoded", "coded (8, 4)")
LARGER = {f"{name}, calls of 32": dict(SYSTEMS[name] or {}, max_batch_size=32) for name in CODED}
BARE_GRPC = "bare gRPC"  # the bare handler, by `grpc.aio`


class Kind(NamedTuple):
    """One kind of request: of which server, by which transport, how many clients and rows."""

    server: str
    transport: str
    clients: int
    rows: int = 1


# By table: the kinds, the first of which the others are compared with.
TABLES = {
    "batches": [Kind(name, "REST", 8, ROWS) for name in ("bare", *CODED, *LARGER)],
    **{
        f"gRPC, {name}, {clients} clients": [
            *(Kind(name, by, clients) for by in ("REST", "gRPC")),
            Kind(BARE_GRPC, "gRPC", clients),
        ]
        for name in CODED
        for clients in (8, 64)
    },
    **{
        f"bytes, {by}": [Kind(name, by, 8) for name in ("floats", "bytes")]
        for by in ("REST", "gRPC")
    },
}


def requests(report: Report, only: tuple[str, ...] = (*TABLES,)) -> None:
    """Measure all tables: requests a second and both sides' CPU time a request, by round.

    Options:
        only: Tables.
    """
    seconds, rounds = 1.5, 7
    if report.quick:
        seconds, rounds, only = 0.5, 1, only[-1:]
    tables: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name in dict.fromkeys(kind.server for table in only for kind in TABLES[table]):
            queries = Path(folder) / f"{name}.npz"
            if name in ("floats", "bytes"):
                write_queries(queries, "images", name)
                more = {"input_datatype": "UINT8", "preprocess": "served:prepare"}
                server = server_of("images", more if name == "bytes" else {}, queries)
            else:
                write_queries(queries, MODEL)
                settings = (SYSTEMS | LARGER).get(name)
                server = server_of(
                    MODEL, settings, queries, *(["gRPC"] if name == BARE_GRPC else [])
                )
            servers[name] = stack.enter_context(server)
        for table in only:
            kinds = {f"{kind.server}, {kind.transport}": kind for kind in TABLES[table]}

            def ask(kind: Kind, turn: int) -> dict[str, Any]:
                server, by, clients, number = kind
                seed = max(turn - 1, 0)
                return servers[server].asked("closed", clients, seconds, seed, number, by)

            found = in_rounds(kinds, rounds + 1, ask)
            found = {name: of[1:] for name, of in found.items()}  # the first is to warm up
            rows = [
                kind._asdict()
                | {"rates": [each["per_second"] for each in found[name]]}
                | {key: [each[key] for each in found[name]] for key in ("cpu_ms", "client_cpu_ms")}
                | {"errors": sum(each["failed"] for each in found[name])}
                for name, kind in kinds.items()
            ]
            tables[table] = rows
            rates = figures(found, "per_second")
            show(medians(rates, next(iter(rates)), table=table))
    about = {"seconds": seconds, "rounds": rounds, "model": MODEL, "tables": tables}
    report.write({"environment": environment(*PACKAGES)} | about)


# --- checks of answers

_CHECKS = {"check_answers": 0.01}
CHECKED = {
    "uncoded": UNCODED,
    "learner": UNCODED | {"surrogate": "learn"},
    "learner, checks": UNCODED | {"surrogate": "learn"} | _CHECKS,
    "student": UNCODED | {"surrogate": "student"},
    "student, checks": UNCODED | {"surrogate": "student"} | _CHECKS,
}
# A learner of the pixels knows little about what RepVGG says.
CHECKED_MODELS = {
    "lenet5-digits": tuple(CHECKED),
    "repvgg-cifar10": ("uncoded", "student", "student, checks"),
}


def checks(report: Report, models: tuple[str, ...] = (*CHECKED_MODELS,)) -> None:
    """Measure closed loops and paced clients of each model's servers.

    Options:
        models: LeNet5 and RepVGG.
    """
    seconds, rounds, warm, limit, rows = 2.0, 7, 60.0, 2000, []
    if report.quick:
        seconds, rounds, warm, limit, models = 0.5, 1, 2.0, 200, models[:1]
    for model in models:
        names = CHECKED_MODELS[model]
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            queries, servers = Path(folder) / "queries.npz", {}
            splits = ("train", "test") if model == "lenet5-digits" else ("test",)
            write_images(queries, model, splits, limit=limit, data_dir=report.data_dir)
            for name in names:
                server = stack.enter_context(server_of(model, CHECKED[name], queries))
                server.asked("closed", 8, warm, 99)
                servers[name] = server
            for loop, clients in (("closed", 1), ("closed", 8), ("paced", PACED)):
                found = in_rounds(
                    servers,
                    rounds,
                    lambda each, turn: each.asked(loop, clients, seconds, turn),  # noqa: B023
                )
                about = {"model": model, "loop": loop, "clients": clients}
                each_round = {
                    name: [
                        {
                            "requests": len(each["answered"]),
                            "errors": each["failed"],
                            "per_second": each["per_second"],
                            "p50_ms": ms(each["answered"], 0.5),
                            "cpu_ms": each["cpu_ms"],
                        }
                        for each in of
                    ]
                    for name, of in found.items()
                }
                rows.append(about | {"servers": each_round})
                show(medians(figures(found, "cpu_ms"), "uncoded", **about, figure="CPU ms"))
    about = {"seconds": seconds, "rounds": rounds, "rows": rows}
    about |= {"paced": {"clients": PACED, "period_s": PERIOD}}
    report.write({"environment": environment(*PACKAGES)} | about)
