"""Tail latency of a stream of queries before real workers: NeRCC beside what else one can do.

`python bench/latency.py` runs everything (about half an hour on two cores) and writes
results/latency.json, its picture and docs/latency.md; `--quick` runs a small version of it;
`--rules` measures the grid of decode and hedging rules that the systems' own come from;
`--only streams`, `codes` or `closed` runs one part, `--laws` some laws, and their results replace
those in the file; `--page` writes the page again. `--plan FILE` carries out a plan of `nercc plan`
on this process's devices, and adds what it promised and what was seen to
results/latency-plan.json. Needs MNIST and CIFAR-10 as
parquet files (`models/data.py` says where), and Ray.
"""

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Twenty processes would each compile the same small programs; set before JAX starts.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "/tmp/nercc_latency_cache")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

import _latency_page
import jax
import jax.numpy as jnp
import numpy as np
import psutil
from _latency_plan import run_plan
from _latency_stream import CodedStream, Outcomes, drain, poisson
from _latency_systems import (
    PARITIES,
    Law,
    Schedule,
    laws,
    rule_systems,
    systems,
    tuned_codes,
)
from _report import block_bootstrap, environment, write_json
from rich.console import Console

from nercc_jax import AbstractCode, DevicePool, NeRCC, Parity, RayPool, pool_inference
from nercc_jax.cli._workload import Answering, answering
from nercc_jax.inference import run_workers
from nercc_jax.pools import AbstractPool, Fault, Faults
from nercc_jax.stragglers import TraceLatency
from nercc_models import load_parity_model

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "latency.md"
PACKAGES = ("jax", "jaxlib", "numpy", "equinox", "flax", "ray")
MODEL = "lenet5-mnist"

_WARM_UP = 60  # queries of a block that are not counted
_BLOCK = 100  # queries that the bootstrap keeps together, about a second
_DRAIN = 1.0  # seconds between two blocks, for what is still at workers


@dataclasses.dataclass(frozen=True)
class Load:
    """How much of what is run: workers, queries a second, seconds."""

    workers: int = 28
    base: float = 0.05
    rate: float = 130.0
    block: float = 9.0
    rounds: int = 2
    deadline: float = 3.0
    start: float = 75.0  # within which the workers must be ready

    def turn(self, blocks: int) -> float:
        """Seconds of a law's turn: warming the pool's running quantiles up, then the blocks."""
        return self.lead + blocks * self.slot + 0.5

    @property
    def lead(self) -> float:
        """Seconds from a turn's start to its first block."""
        return 0.5 + self.block / 2

    @property
    def slot(self) -> float:
        """Seconds from one block to the next."""
        return self.block + _DRAIN


def main() -> None:
    options = _parse()
    console = Console(emoji=False)
    path = RESULTS / ("latency-quick.json" if options.quick else "latency.json")
    if options.plan:
        seen = run_plan(options.plan, options.data_dir, options.batches)
        console.print(seen)
        told = [str(seen["about"][name]) for name in ("model", "latency", "seed")]
        new = {", ".join(told): {"environment": environment(PACKAGES)} | seen}
        _merge(RESULTS / "latency-plan.json", new)
        return
    if options.breakdown:
        print(json.dumps(breakdown(options.data_dir, 30 if options.quick else 200)))
        return
    load = Load(workers=options.workers, base=options.base, rate=options.rate)
    if options.quick:
        load = dataclasses.replace(load, block=2.0, rounds=1)
    given = {name: getattr(options, name) for name in ("block", "rounds") if getattr(options, name)}
    load = dataclasses.replace(load, **given)
    if not options.page:
        if options.rules:
            _merge(path, {"rules": run_streams(load, True, options, console)})
        elif options.only in (None, "streams"):
            streams = run_streams(load, False, options, console)
            _merge(path, {"streams": _with_others(path, streams) if options.laws else streams})
        if not options.rules and options.only in (None, "codes"):
            _merge(path, {"codes": missing_queries(options.data_dir, console)})
        if not options.rules and options.only in (None, "closed"):
            _merge(path, {"closed": closed(options.data_dir, options.quick, console)})
    results = json.loads(path.read_text())
    if not options.quick:
        _latency_page.write(results, PAGE, RESULTS)
        console.print(f"page: {PAGE}")
    console.print(f"results: {path}")


# The stream.


def run_streams(
    load: Load, rules: bool, options: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """All systems under all laws, in turns, before one pool of Ray actors."""
    network, images, labels = _workload(options.data_dir)
    parities = [load_parity_model(MODEL, k, "logits") for k in PARITIES]
    all_laws = [law for law in laws(load.base, load.workers) if _wanted(law, rules, options)]
    training, _ = network.images("train", options.data_dir, 1000, 0)
    codes = tuned_codes(RESULTS / "codes", network, training)
    contenders = rule_systems(codes) if rules else systems(codes)
    turn = load.turn(len(contenders))
    schedule = Schedule(time.time() + load.start, turn, len(all_laws), load.lead, load.slot)
    begin = time.time()
    example = np.zeros((1, *images.shape[1:]), np.float32)
    with RayPool(
        [network, *parities],
        load.workers,
        example=example,
        faults=schedule.faults(load.base, all_laws),
        hang_timeout=600.0,  # a Pareto tail is no hang
    ) as pool:
        started = time.time() - begin
        console.log(f"{load.workers} workers started in {started:.0f} s")
        streams = {
            system.name: CodedStream(pool, system, images, int(labels.max()) + 1)
            for system in contenders
        }
        # JAX leaves 300,000 objects behind: looking through them all stops every thread for 0.2 to
        # 0.4 s now and then, which is longer than most of the stragglers.
        gc.collect()
        gc.freeze()
        cells = _take_turns(pool, streams, all_laws, schedule, load, console)
    return {
        "environment": environment(PACKAGES),
        "load": dataclasses.asdict(load),
        "start_seconds": round(started, 1),
        "niceness": os.nice(0),
        "laws": {law.name: law.words for law in all_laws},
        "cells": {
            law: {name: summary(parts, labels, load) for name, parts in by_system.items()}
            for law, by_system in cells.items()
        },
    }


def _wanted(law: Law, rules: bool, options: argparse.Namespace) -> bool:
    chosen = ["5 %"] if rules else options.laws
    return not chosen or law.name in chosen


def _take_turns(
    pool: AbstractPool,
    streams: Mapping[str, CodedStream],
    all_laws: Sequence[Law],
    schedule: Schedule,
    load: Load,
    console: Console,
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Each law's turns: all systems one after the other, in another order each round."""
    cells = {law.name: {name: [] for name in streams} for law in all_laws}
    first = max(0, int(np.ceil((time.time() - schedule.origin) / schedule.turn)))
    for count in range(first, first + load.rounds * len(all_laws)):
        law = all_laws[count % len(all_laws)]
        _sleep_until(schedule.start(count) + 0.5)
        warm_up = streams["equal resources"]
        warm_up.run(poisson(load.rate, load.block / 2 - 1, [count, 1]), 0, load.deadline)
        names = list(streams)
        rotation = (count - first) // len(all_laws) * len(names) // max(load.rounds, 1)
        for number, name in enumerate(names[rotation:] + names[:rotation]):
            _sleep_until(schedule.start(count) + load.lead + number * load.slot)
            # The same arrivals for all, with the same images.
            arrivals = poisson(load.rate, load.block, [count, 0])
            part = _block(pool, streams[name], arrivals, count * 10_000, load)
            cells[law.name][name].append(part)
            taken = part["outcomes"].latency[_WARM_UP:]
            console.log(
                f"{law.name}, {name}: p50 {1e3 * np.nanmedian(taken):.0f} ms, p99 "
                f"{1e3 * np.nanquantile(taken, 0.99):.0f}, most {1e3 * np.nanmax(taken):.0f}, "
                f"decoded {100 * part['outcomes'].decoded.mean():.1f} %, CPU "
                f"{100 * part['cpu']:.0f} % own {100 * part['cpu_all']:.0f} % all"
            )
    return cells


def _block(
    pool: AbstractPool, stream: CodedStream, arrivals: np.ndarray, first_image: int, load: Load
) -> dict[str, Any]:
    """One system under one law, once."""
    before, cpu = pool.report(), _cpu_seconds()
    psutil.cpu_percent()
    begin = time.monotonic()
    outcomes = stream.run(arrivals, first_image, load.deadline)
    drain(pool, _DRAIN)
    took = time.monotonic() - begin
    after = pool.report()
    return {
        "outcomes": outcomes,
        "first_image": first_image,
        "costs": dataclasses.asdict(stream.costs),
        "cpu": (_cpu_seconds() - cpu) / took / _cores(),
        "cpu_all": psutil.cpu_percent() / 100,
        "seconds": after.seconds - before.seconds,
        "wasted": after.wasted_seconds - before.wasted_seconds,
        "sent": after.sent - before.sent,
        "copies": after.copies - before.copies,
        "took": took,
    }


def summary(parts: Sequence[Mapping[str, Any]], labels: np.ndarray, load: Load) -> dict[str, Any]:
    """A cell's numbers; lost queries count as having taken the deadline, and as wrong."""
    latency, right, decoded, lateness = [], [], [], []
    lost = 0
    for part in parts:
        outcomes: Outcomes = part["outcomes"]
        number = len(outcomes.latency)
        own = labels[(part["first_image"] + np.arange(number)) % len(labels)]
        lost += int(np.isnan(outcomes.latency[_WARM_UP:]).sum())
        latency.append(np.nan_to_num(outcomes.latency, nan=load.deadline)[_WARM_UP:])
        right.append((outcomes.label == own)[_WARM_UP:])
        decoded.append(outcomes.decoded[_WARM_UP:])
        lateness.append(outcomes.lateness[_WARM_UP:])
    flat, is_right, is_decoded = map(np.concatenate, (latency, right, decoded))
    total = {name: sum(part[name] for part in parts) for name in ("seconds", "wasted", "sent")}
    queries = sum(len(part["outcomes"].latency) for part in parts)
    return {
        "queries": len(flat),
        **_with_intervals(latency),
        "quantiles_ms": [round(1e3 * float(np.quantile(flat, q)), 2) for q in QUANTILES],
        "rel_acc": float(is_right.mean()),
        "decoded": float(is_decoded.mean()),
        "rel_acc_decoded": float(is_right[is_decoded].mean()) if is_decoded.any() else None,
        "lost": lost,
        "wasted": total["wasted"] / total["seconds"],
        "sent_per_query": total["sent"] / queries,
        "copies_per_query": sum(part["copies"] for part in parts) / queries,
        "utilisation": total["seconds"] / load.workers / sum(part["took"] for part in parts),
        "cpu": float(np.mean([part["cpu"] for part in parts])),
        "cpu_all": float(np.mean([part["cpu_all"] for part in parts])),
        "late_sends_ms": {
            str(q): round(1e3 * float(np.nanquantile(np.concatenate(lateness), q)), 2)
            for q in (0.5, 0.99, 0.999)
        },
        **{
            f"{name}_us": _median_us([part["costs"][name] for part in parts])
            for name in ("encode", "dispatch", "decode")
        },
    }


QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)


def _with_intervals(latency: Sequence[np.ndarray]) -> dict[str, Any]:
    """p50, p99, p99.9 and the gap in ms, each with a 95 % interval by bootstrap over blocks."""

    def numbers(values: np.ndarray) -> np.ndarray:
        p50, p99, p999 = 1e3 * np.quantile(values, (0.5, 0.99, 0.999))
        return np.array([p50, p99, p999, p999 - p50])

    now, low, high = block_bootstrap(latency, numbers, block=_BLOCK)
    return {
        name: {"ms": round(now[i], 2), "low": round(low[i], 2), "high": round(high[i], 2)}
        for i, name in enumerate(("p50", "p99", "p99.9", "gap"))
    }


# What a decoded query is worth.


def missing_queries(data_dir: Path, console: Console) -> dict[str, Any]:
    """RelAcc of queries whose own workers are missing, by code and number of missing workers."""
    network, images, labels = _workload(data_dir)
    training, _ = network.images("train", data_dir, 1000, 0)
    codes = tuned_codes(RESULTS / "codes", network, training)
    parities = {k: load_parity_model(MODEL, k, "logits") for k in PARITIES}
    told: dict[str, Any] = {}
    for (n, k), code in codes.interleaved.items():
        untuned = NeRCC(k, n, points="interleaved")
        told[f"NeRCC ({n}, {k})"] = {
            "untuned": _worth(untuned, [network], images, labels),
            "tuned": _worth(code, [network], images, labels),
        }
    for k, parity in parities.items():
        told[f"ParM, k = {k}"] = {
            "trained": _worth(Parity(k, k + 1), [network, parity], images, labels)
        }
    console.log(told)
    return told


def _worth(
    code: AbstractCode, models: Sequence[Any], images: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """RelAcc of a missing query with 1, 2 and 3 workers missing, its own among them."""
    k, groups = code.num_data, min(250, len(images) // code.num_data)
    x = jnp.asarray(images[: groups * k]).reshape(groups, k, *images.shape[1:])
    y = run_workers(models, code, jax.vmap(code.encode)(x))
    own = labels[: groups * k].reshape(groups, k)
    decode = jax.jit(jax.vmap(code.try_decode))
    random = np.random.default_rng(0)
    worth = {}
    for number in range(1, min(3, code.num_workers - k) + 1):
        right = []
        for query in range(k):
            masks = np.ones((groups, code.num_workers), bool)
            others = [worker for worker in range(code.num_workers) if worker != query]
            for mask in masks:
                mask[[query, *random.choice(others, number - 1, replace=False)]] = False
            decoded = decode(y, masks)
            answers = np.argmax(np.asarray(decoded.predictions)[:, query], axis=-1)
            right.append((answers == own[:, query]) & np.asarray(decoded.recovered)[:, query])
        worth[str(number)] = float(np.mean(right))
    return worth


# The closed loop.


def closed(data_dir: Path, quick: bool, console: Console) -> dict[str, Any]:
    """Batch after batch: stragglers that are a hundred times slower, and where the time goes."""
    network, images, _ = _workload(data_dir)
    batches = 20 if quick else 100
    told: dict[str, Any] = {"environment": environment(PACKAGES), "stragglers": {}}
    for kind in (DevicePool, RayPool):
        told["stragglers"][kind.__name__] = _with_stragglers(kind, network, images, batches)
        console.log(f"{kind.__name__}: {told['stragglers'][kind.__name__]}")
    told["breakdown"] = {}
    for devices in (1, 20):
        told["breakdown"][str(devices)] = _breakdown_elsewhere(devices, data_dir, quick)
        console.log(f"{devices} devices: {told['breakdown'][str(devices)]}")
    return told


def _with_stragglers(
    kind: type[RayPool] | type[DevicePool], network: Answering, images: np.ndarray, batches: int
) -> dict[str, Any]:
    """20 workers at 20 ms a call; then three of them at 2 s a call. K = 8; 17 answers do."""
    warm_up, slow = 5, (0, 1, 2)
    faults = Faults(
        (
            Fault("delay", latency=TraceLatency(jnp.array([0.02]))),
            Fault(
                "delay",
                workers=slow,
                calls=range(warm_up + batches, sys.maxsize),
                latency=TraceLatency(jnp.array([1.98])),
            ),
        )
    )
    code = NeRCC(8, 20)
    with kind(network, 20, example=images[:1], faults=faults) as pool:
        infer = pool_inference(pool, code, with_status=True)

        def seconds(batch: int) -> float:
            x = images[8 * batch : 8 * batch + 8]
            return infer(x, enough=17).timing.total

        without = []
        for batch in range(warm_up + batches):
            without.append(seconds(batch))
            drain(pool, 5.0)  # so that each worker has one call a batch, and all begin alike
        slowed = [seconds(batch) for batch in range(batches)]
    base = float(np.median(without[warm_up:]))
    return {
        "batches": batches,
        "median_ms_without": 1e3 * base,
        "median_ms_with": 1e3 * float(np.median(slowed)),
        "ratio": float(np.median(slowed)) / base,
        "largest_ratio_without": float(np.max(without[warm_up:])) / base,
        "largest_ratio": float(np.max(slowed)) / base,
        "first_ratio": slowed[0] / base,
    }


def _breakdown_elsewhere(devices: int, data_dir: Path, quick: bool) -> dict[str, Any]:
    """`breakdown` in a process with so many CPU devices."""
    command = [sys.executable, __file__, "--breakdown", "--data-dir", str(data_dir)]
    command += ["--quick"] * quick
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the breakdown on {devices} devices failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def breakdown(data_dir: Path, batches: int) -> dict[str, Any]:
    """Where a batch's time goes: K = 8 queries, 20 workers that nothing slows down."""
    network, images, _ = _workload(data_dir)
    bare = jax.jit(lambda batch: network(batch))
    x = images[:20]
    with DevicePool(network, 20, example=images[:1]) as pool:
        infer = pool_inference(pool, NeRCC(8, 20), with_status=True)
        times: dict[str, list[float]] = {}

        def clock(name: str, call, *arguments) -> None:
            begin = time.perf_counter()
            call(*arguments)
            times.setdefault(name, []).append(time.perf_counter() - begin)

        def all_alone() -> None:
            for image in x:
                bare(image[None]).block_until_ready()

        for batch in range(batches + 10):
            some = images[8 * batch : 8 * batch + 8]
            timing = infer(some).timing
            for name, value in dataclasses.asdict(timing).items():
                times.setdefault(name, []).append(value)
            times.setdefault("overhead", []).append(timing.total - timing.wait)
            times.setdefault("total", []).append(timing.total)
            drain(pool, 1.0)
            clock("bare, 20 points", lambda: bare(x).block_until_ready())
            clock("bare, 20 calls", all_alone)
    return {
        "devices": len(jax.devices()),
        "batches": batches,
        "median_ms": {name: 1e3 * float(np.median(v[10:])) for name, v in times.items()},
    }


# Small things.


def _workload(data_dir: Path) -> tuple[Answering, np.ndarray, np.ndarray]:
    """The model, test images, and its own labels of them."""
    network = answering(MODEL, "logits")
    images, _ = network.images("test", data_dir, 5000, 0)
    outputs = jax.jit(lambda x: network(x))(images)
    return network, images, np.asarray(jnp.argmax(outputs, axis=1))


def _cpu_seconds() -> float:
    """What this process and all below it, Ray's workers among them, have used so far."""
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue  # it ended meanwhile
        total += times.user + times.system
    return total


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _median_us(parts: Sequence[Sequence[float]]) -> float | None:
    values = [value for part in parts for value in part]
    return round(1e6 * float(np.median(values)), 1) if values else None


def _sleep_until(moment: float) -> None:
    time.sleep(max(moment - time.time(), 0))


def _merge(path: Path, new: Mapping[str, Any]) -> None:
    old = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, old | dict(new))


def _with_others(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """Results of some laws, with those of the others that are in the file."""
    old = json.loads(path.read_text()).get("streams", {}) if path.exists() else {}
    return old | new | {part: old.get(part, {}) | new[part] for part in ("laws", "cells")}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small version of everything")
    parser.add_argument("--rules", action="store_true", help="the grid of rules, and nothing else")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--only", choices=("streams", "codes", "closed"))
    parser.add_argument(
        "--laws",
        nargs="*",
        default=None,
        help="by name; all unless given; their results replace those in the file",
    )
    parser.add_argument("--plan", type=Path, help="carry out this plan.json, and nothing else")
    parser.add_argument("--batches", type=int, default=500, help="of queries, with --plan")
    parser.add_argument("--workers", type=int, default=Load.workers)
    parser.add_argument("--base", type=float, default=Load.base, help="seconds a call takes")
    parser.add_argument("--rate", type=float, default=Load.rate, help="queries a second")
    parser.add_argument("--block", type=float, default=None, help="seconds of a block")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--data-dir", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--breakdown", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
