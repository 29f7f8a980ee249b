"""Count what accelerators would launch, without one, and time the same programs on a device.

With `--platform`, each of six programs is compiled for a description of a TPU v5e or an H100, and
not run. The command fails (1) where one does not compile, has float64 or a callback to the host,
lets the device round the factors of a product of the spline mathematics, or is over its budget,
which stands beside the program below. `.ci/compiled` installs the compilers, in the versions that
the budgets are for. `--quick` leaves out what compiles slowly.

On a GPU each instruction outside of a fusion is a kernel launch, and each turn of a loop launches
its body again. These, not bytes or operations, are what small programs take: 2.5 microseconds a
launch, and about 10 for a predicate that the host waits for. A sort, or a library's call, counts as
one and may launch several kernels. A TPU launches none.

Without `--platform`, the programs run on JAX's default device: medians and quartiles of compiled
calls, coded inference in turn with the bare model on as many images as there are coded ones.
`--update` adds to results/accelerator.json, by device, or to results/compiled-PLATFORM.json.

"""

import dataclasses
import fnmatch
import functools
import importlib.util
import itertools
import os
import re
import sys
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is imported
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.topologies import get_topology_desc
from measure import Contender, affordable, interleaved, warmed
from report import RESULTS, Report, environment

from nercc_jax import NeRCC, coded_inference, nested_objective
from nercc_jax.codes import AbstractCode, encode_groups
from nercc_models import repvgg_cifar, vit_small_cifar
from nercc_models.lenet5 import INPUT_SHAPE, LeNet5
from nercc_models.repvgg import CIFAR_SHAPE

_PLUGINS = {"tpu": "libtpu", "cuda": "jax_cuda12_plugin"}
_CODE, _LOST = (20, 8), 3  # (N, K), and stragglers of each set
_MODELS: Mapping[str, tuple[Callable[[], nnx.Module], tuple[int, ...]]] = {
    "LeNet5": (lambda: LeNet5(10, rngs=nnx.Rngs(0)), INPUT_SHAPE),
    "RepVGG, 32 x 32": (lambda: repvgg_cifar(deploy=True, rngs=nnx.Rngs(0)), CIFAR_SHAPE),
    "ViT, 32 x 32": (lambda: vit_small_cifar(rngs=nnx.Rngs(0)), CIFAR_SHAPE),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A function, its arguments, and its budget: launches on an H100 and two more counts.

    `open_loops` are loops whose turns depend on data: decoding has one, for broken answers.
    `rounded` are products whose factors a device may round: the model's own.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    launches: int = 0
    open_loops: int = 0
    rounded: int = 0


def programs() -> dict[str, Program]:
    """Return the six programs by name; codes and weights are arguments, as in the library."""
    code, large = (NeRCC(k, n) for n, k in (_CODE, (100, 20)))
    _, given, traced = inference("LeNet5", 1).values()
    objective = jax.grad(functools.partial(nested_objective, jnp.tanh), allow_int=True)
    sets = (normal(4, code.num_data, 10), masks(8, code))
    return {
        "encode (20, 8)": Program(encode_groups, (code, normal(1, 8, 3072)), 110),
        "try_decode (20, 8)": decoding(code, 110),
        "try_decode (100, 20)": decoding(large, 160),
        "LeNet5 (20, 8), mask known": given,
        "LeNet5 (20, 8), mask traced": traced,
        "nested_objective (20, 8), gradient": Program(objective, (code, *sets), 1000, 1),
    }


SLOW = "nested_objective (20, 8), gradient"  # minutes for a TPU


def decoding(code: AbstractCode, launches: int) -> Program:
    arguments = (code, normal(code.num_workers, 10), masks(1, code)[0])
    return Program(lambda code, y, mask: code.try_decode(y, mask), arguments, launches, 1)


def inference(name: str, groups: int) -> dict[str, Program]:
    """Return the bare model on N images a group, and coded inference by either mask."""
    make, shape = _MODELS[name]
    model: Any = make()
    model.eval()
    code = NeRCC(_CODE[1], _CODE[0])
    x, workers = normal(groups, code.num_data, *shape), normal(groups * code.num_workers, *shape)
    available = masks(groups, code)
    known = np.broadcast_to(np.asarray(available[0]), available.shape)

    def coded(model: Any, x: jax.Array, available: Any = known) -> Any:
        return coded_inference(model, code, grouped=True)(x, available)

    return {
        "bare, N": Program(lambda model, images: model(images), (model, workers)),
        "mask given": Program(coded, (model, x), 25, 1, rounded=5),
        "mask traced": Program(coded, (model, x, available), 130, 1, rounded=5),
    }


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def masks(sets: int, code: AbstractCode) -> jax.Array:
    ranks = np.random.default_rng(0).random((sets, code.num_workers)).argsort(1).argsort(1)
    return jnp.asarray(ranks >= _LOST)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts of a program, or of one of its computations.

    `launches` are those where data decide for the least: a loop of unknown length makes no turn, a
    conditional takes its cheapest branch. That is decoding when every answer is sound. `cycles` are
    XLA:TPU's own estimate. `loops` are those whose turns XLA knows.
    """

    launches: int = 0
    cycles: int = 0
    loops: int = 0
    open_loops: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Counts(*(a + b for a, b in zip(mine, theirs, strict=True)))


# What is bookkeeping. What ends here (`-done`) was counted where it starts.
_FREE = re.compile(
    r".*-done|add-dependency|after-all|async-update|bitcast|constant|domain|get-dimension-size"
    r"|get-tuple-element|opt-barrier|parameter|partition-id|replica-id|tuple"
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*\) -> .*)?\s*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][\w\-]*)\((.*)$")
_BRANCHES = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_HOST = re.compile(r" (infeed|outfeed)\(|is_host_transfer=true|custom_call_target=\"[^\"]*callback")
_PRODUCT = re.compile(r"stablehlo\.(dot|dot_general|convolution)\b")
_EXACT = re.compile(
    r"\[HIGHEST, HIGHEST\]|precision HIGHEST>, #stablehlo<precision HIGHEST"
    r"|-> tensor<(?:\d+x)*u?i\d+>"
)
Computations = Mapping[str, Sequence[tuple[str, str]]]  # opcode, and the rest of the line


def count(hlo: str) -> Counts:
    """Return the counts of an optimised program, `compiled.as_text()`."""
    computations: dict[str, list[tuple[str, str]]] = {}
    entry, inside = None, []
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            inside = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif one := _INSTRUCTION.match(line):
            inside.append((one[1], one[2]))
    if entry is None:
        raise ValueError("no ENTRY computation: this is no optimised HLO")
    return _cost(computations, entry)


def _cost(computations: Computations, name: str) -> Counts:
    """Return the counts of running the computation once."""
    total = Counts()
    for opcode, rest in computations[name]:
        cycles = int(found[1]) if (found := re.search(r'"estimated_cycles":"?(\d+)', rest)) else 0
        if _FREE.fullmatch(opcode):
            continue
        if opcode == "while":
            turn = _cost(computations, _called("body", rest) or "")
            if known := re.search(r'"known_trip_count":\{"n":"?(\d+)', rest):
                launches, cycles = int(known[1]) * turn.launches, int(known[1]) * turn.cycles
                total += Counts(launches, cycles, turn.loops + 1, turn.open_loops)
            else:  # its predicate is looked at once at least
                total += Counts(1, 0, turn.loops, turn.open_loops + 1)
        elif opcode == "conditional":
            listed = re.search(r"branch_computations=\{([^}]*)\}", rest)
            branches = re.findall(r"[\w.\-]+", listed[1]) if listed else _BRANCHES.findall(rest)
            each = [_cost(computations, branch) for branch in branches]
            least = min(each, key=lambda branch: branch.launches)
            loops = (sum(branch.loops for branch in each), sum(b.open_loops for b in each))
            total += Counts(1 + least.launches, cycles + least.cycles, *loops)
        elif opcode == "call" and (called := _called("to_apply", rest)):
            total += _cost(computations, called)
        else:
            total += Counts(1, cycles)
    return total


def _called(attribute: str, rest: str) -> str | None:
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", rest)
    return found[1] if found else None


def faults(counts: Counts, program: Program, platform: str, lowered: str, hlo: str) -> list[str]:
    """Return in words what is wrong with a program, as it was lowered and compiled."""
    # Without full precision a TPU takes bfloat16 factors, and a GPU may take TF32.
    products = [line for line in lowered.splitlines() if _PRODUCT.search(line)]
    rounded = sum(not _EXACT.search(line) for line in products)
    limits = {
        "loops": (counts.loops, 0),
        "loops that depend on data": (counts.open_loops, program.open_loops),
        "products below full precision": (rounded, program.rounded),
        "launches": (counts.launches, program.launches if platform == "cuda" else 10**9),
    }
    over = [f"{name} {n:,} > {limit:,}" for name, (n, limit) in limits.items() if n > limit]
    over += ["float64"] if re.search(r"[<x]f64>|\b(f64|c128)\[", lowered + hlo) else []
    return over + (["callbacks to the host"] if _HOST.search(hlo) else [])


def described_device(platform: str) -> Any:
    """Return a TPU v5e or an H100 that is not there, for which its compiler must be installed."""
    if importlib.util.find_spec(_PLUGINS[platform]) is None:
        sys.exit(f"{_PLUGINS[platform]} is missing: .ci/compiled {platform} installs it")
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-8")
    os.environ.update(TPU_WORKER_HOSTNAMES="localhost", CUDA_VISIBLE_DEVICES="")
    jax.config.update("jax_platforms", "cpu")
    if platform == "tpu":
        return get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    card = Path(__file__).with_name("h100_sxm.txtpb").read_text()
    return get_topology_desc(platform="cuda", target_config=card, topology="1x1x1").devices[0]


def compile_for(program: Program, device: Any = None) -> tuple[jax.stages.Lowered, Any, Any]:
    """Return the program lowered and compiled, and its arrays: for a described device, shapes."""
    arrays, static = eqx.partition(program.arguments, eqx.is_array)
    if device is not None:
        where = jax.sharding.SingleDeviceSharding(device)
        arrays = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), arrays
        )

    def run(arrays: Any) -> Any:
        return eqx.filter(program.function(*eqx.combine(arrays, static)), eqx.is_array)

    lowered = jax.jit(run).lower(arrays)
    return lowered, lowered.compile(), arrays


def count_all(chosen: Mapping[str, Program], platform: str, device: Any) -> dict[str, Any]:
    """Compile, count and show each program; what the compiler raises is a result, too."""
    results = {}
    for name, program in chosen.items():
        start = time.perf_counter()
        try:
            lowered, compiled, _ = compile_for(program, device)
        except Exception as error:  # of any kind: a trace, a lowering or the compiler may fail
            results[name] = {"faults": [" ".join(f"{type(error).__name__}: {error}".split())[:200]]}
        else:
            counts = count(hlo := compiled.as_text() or "")
            results[name] = dataclasses.asdict(counts) | {
                "temp_bytes": int(compiled.memory_analysis().temp_size_in_bytes),
                "faults": faults(counts, program, platform, lowered.as_text(), hlo),
            }
        print(f"{name:36} {time.perf_counter() - start:6.1f} s  {results[name]}", flush=True)
    return results


def time_all(cases: Mapping[str, tuple[str, int, Mapping[str, Program]]]) -> dict[str, Any]:
    """Time the parts of each case, a subject and its number of groups, on the default device."""
    results = {}
    for name, (subject, groups, parts) in cases.items():
        contenders = {}
        for part, program in parts.items():
            _, compiled, arrays = compile_for(program)
            arrays = jax.device_put(arrays)
            call = Contender(lambda c=compiled, a=arrays: jax.block_until_ready(c(a)))
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(call.call())):
                raise ValueError(f"{name}, {part}: a result is not finite")
            contenders[part] = call
        contenders = warmed(contenders)
        timings = interleaved(contenders, affordable(contenders, seconds=10.0, most=31))
        bare = {part: timing for part, timing in timings.items() if part.startswith("bare")}
        found = {
            part: {
                "median_s": timing.median,
                "quartiles_s": [timing.quantile(0.25), timing.quantile(0.75)],
                "by": {other: timing.ratio(each) for other, each in bare.items()},
            }
            for part, timing in timings.items()
        }
        results[name] = {"subject": subject, "groups": groups, "parts": found}
        shown = (f"{part} {1e3 * each['median_s']:.3g} ms" for part, each in found.items())
        print(f"{name}: {'; '.join(shown)}", flush=True)
    return results


def run(
    report: Report,
    platform: str | None = None,
    only: tuple[str, ...] = ("*",),
    update: bool = False,
    models: tuple[str, ...] = ("*",),
    groups: tuple[int, ...] = (1,),
) -> int:
    """Count or time the programs; return 1 where one is over its budget.

    Options:
        platform: "tpu" or "cuda": compile for it, run nothing.
        only: Patterns of programs, such as "try*".
        update: Write the results.
        models: Patterns of models that are timed (default: LeNet5).
        groups: Groups a call.
    """

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    device = described_device(platform) if platform else None  # before any array
    chosen = {
        name: program
        for name, program in programs().items()
        if matches(name, only) and not (report.quick and name == SLOW)
    }
    where = environment(*([_PLUGINS[platform]] if platform else []))
    report.path = (
        RESULTS / f"compiled-{platform}.json" if platform else RESULTS / "accelerator.json"
    )
    if device is None:
        alone = {name: each for name, each in chosen.items() if not name.startswith("LeNet5")}
        cases = {name: (name, 1, {"compiled": program}) for name, program in alone.items()}
        models = ("LeNet5",) if models == ("*",) else models
        timed = [name for name in _MODELS if matches(name, models)]
        for model, number in itertools.product(timed, groups):
            subject = f"{model} {_CODE}" + f" x {number} groups" * (number > 1)
            cases[f"inference: {subject}, float32"] = (subject, number, inference(model, number))
        results, kept = time_all(cases), report.read()["runs"]
        older = kept.get(where["device"], {"cases": {}})["cases"]
        here = {"environment": where, "cases": older | results}
        content = {"runs": kept | {where["device"]: here}}
    else:
        results = count_all(chosen, str(platform), device)
        content = {"environment": where, "programs": report.read()["programs"] | results}
    if update:
        report.write(content)
    failed = {name: words for name, found in results.items() if (words := found.get("faults"))}
    print("\n".join(f"{name}: {'; '.join(words)}" for name, words in failed.items()))
    return 1 if failed or not results else 0
