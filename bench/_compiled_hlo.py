"""Launches of an optimised XLA program, read off its text: kernels, loops, TPU cycles.

On a GPU each instruction outside of a fusion is a kernel launch, and each turn of a loop launches
its body again. These, not bytes or operations, are what small programs take: 2.5 microseconds a
launch, and about 10 for a predicate that the host must wait for. Counts are of instructions: a sort
of many numbers, or a library's call, is one here and may launch several kernels.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

# What is bookkeeping. What ends here (`-done`) was counted where it starts.
_FREE = {
    "add-dependency",
    "after-all",
    "async-update",
    "bitcast",
    "constant",
    "domain",
    "get-dimension-size",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_COLLECTIVES = {
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
}
_HOST = {"infeed", "outfeed"}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*\) -> .*)?\s*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"([a-z][\w\-]*)\(")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_PRODUCT = re.compile(r"stablehlo\.(dot|dot_general|convolution)\b")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `rest` is what follows its type, from the opcode on."""

    name: str
    type: str
    opcode: str
    rest: str

    def calls(self, attribute: str) -> str | None:
        """Return the computation that the attribute names (`body`, `to_apply`, ...)."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None

    @property
    def branches(self) -> list[str]:
        """Return a conditional's computations, however it names them."""
        found = _BRANCHES.search(self.rest)
        if found:
            return [name.strip().lstrip("%") for name in found.group(1).split(",")]
        both = self.calls("true_computation"), self.calls("false_computation")
        return [name for name in both if name is not None]

    @property
    def target(self) -> str:
        """Return the target of a custom call."""
        found = _TARGET.search(self.rest)
        return found.group(1) if found else ""

    @property
    def cycles(self) -> int:
        """Return XLA:TPU's own estimate; 0 for what has none, such as scalar work."""
        found = _CYCLES.search(self.rest)
        return int(found.group(1)) if found else 0

    @property
    def source(self) -> str:
        """Return the primitive that it comes from, and the last jitted function around that.

        A loop need not have been written as one: XLA makes one of a scatter, too.
        """
        found = _SOURCE.search(self.rest)
        if not found:
            return self.name
        around, _, primitive = found.group(1).rpartition("/")
        jitted = re.findall(r"jit\((\w+)\)", around)
        return f"{jitted[-1]}/{primitive}" if jitted else primitive

    @property
    def is_free(self) -> bool:
        return self.opcode in _FREE or self.opcode.endswith("-done")

    @property
    def is_collective(self) -> bool:
        return self.opcode.removesuffix("-start") in _COLLECTIVES

    @property
    def is_callback(self) -> bool:
        """Return whether the host must act for it."""
        transfer = self.opcode in ("send", "recv") and "is_host_transfer=true" in self.rest
        return self.opcode in _HOST or transfer or "callback" in self.target.lower()


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: computations by name, and which of them is run."""

    computations: Mapping[str, Sequence[Instruction]]
    entry: str

    @property
    def instructions(self) -> Iterator[Instruction]:
        """Return all instructions, within fusions and untaken branches, too."""
        return (one for computation in self.computations.values() for one in computation)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A `while`: its turns (None where data decide), the launches of one turn, and its source."""

    turns: int | None
    launches: int
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of running a computation.

    `launches` are those where data decide for the least: a loop of unknown length makes no turn, a
    conditional takes its cheapest branch. That is decoding when every answer is sound. `worst` are
    those of one turn and the dearest branch. `cycles` go with `launches`.
    """

    launches: int = 0
    worst: int = 0
    cycles: int = 0
    loops: tuple[Loop, ...] = ()

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.launches + other.launches,
            self.worst + other.worst,
            self.cycles + other.cycles,
            self.loops + other.loops,
        )


@dataclasses.dataclass(frozen=True)
class Summary:
    """The checked properties of an optimised program."""

    cost: Cost
    collectives: int
    float64: bool
    callbacks: tuple[str, ...]

    @property
    def counted_loops(self) -> tuple[Loop, ...]:
        """Return the loops whose turns the program fixes: over knots, mostly."""
        return tuple(loop for loop in self.cost.loops if loop.turns is not None)

    @property
    def open_loops(self) -> tuple[Loop, ...]:
        """Return the loops whose turns depend on data."""
        return tuple(loop for loop in self.cost.loops if loop.turns is None)


def summarise(text: str) -> Summary:
    """Return the summary of the optimised HLO `compiled.as_text()`."""
    module = parse(text)
    each = list(module.instructions)
    return Summary(
        cost=cost(module, module.entry),
        collectives=sum(one.is_collective for one in each),
        float64=any(re.search(r"\b(f64|c128)\[", one.type) for one in each),
        callbacks=tuple(sorted({one.target or one.opcode for one in each if one.is_callback})),
    )


def rounded_products(stablehlo: str) -> list[str]:
    """Return lines of `lowered.as_text()` with a product whose factors a device may round.

    Without full precision a TPU takes bfloat16 factors, and a GPU may take TF32.
    """
    lines = (line.strip() for line in stablehlo.splitlines() if _PRODUCT.search(line))
    return [line for line in lines if not is_full(line)]


def has_float64(stablehlo: str) -> bool:
    """Return whether `lowered.as_text()` has float64, which a TPU's compiler splits in two."""
    return re.search(r"[<x]f64>", stablehlo) is not None


def is_full(product: str) -> bool:
    """Return whether a product's line asks for full precision, or is of integers."""
    whole = re.search(r"-> tensor<(?:\d+x)*u?i\d+>", product)
    return whole is not None or bool(
        re.search(r"\[HIGHEST, HIGHEST\]|precision HIGHEST>, #stablehlo<precision HIGHEST", product)
    )


def parse(text: str) -> Module:
    """Parse a program's text; raise ValueError where it has no entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, inside = None, None
    for line in text.splitlines():
        if not line.startswith((" ", "\t")):
            found = None if line.startswith("HloModule") else _COMPUTATION.match(line)
            inside = None
            if found:
                inside = computations.setdefault(found.group(2), [])
                entry = found.group(2) if found.group(1) else entry
            continue
        found = _INSTRUCTION.match(line)
        if found and inside is not None:
            type_, rest = _type_and_rest(found.group(2))
            opcode = _OPCODE.match(rest)
            if opcode:
                inside.append(Instruction(found.group(1), type_, opcode.group(1), rest))
    if entry is None:
        raise ValueError("no ENTRY computation: this is no optimised HLO")
    return Module(computations, entry)


def cost(module: Module, computation: str) -> Cost:
    """Return the cost of running the computation once."""
    total = Cost()
    for one in module.computations[computation]:
        if not one.is_free:
            total += _cost_of(module, one)
    return total


def turns(module: Module, loop: Instruction) -> int | None:
    """Return how often a `while` turns: as XLA found, or by its condition; else None."""
    found = _TURNS.search(loop.rest)
    if found:
        return int(found.group(1))
    # A counter from 0 against one constant. Anything more (`and`, a flag) is for data to decide.
    each = list(_reached(module, loop.calls("condition")))
    opcodes = {one.opcode for one in each}
    bounds = [
        int(found.group(1))
        for one in each
        if one.type.startswith("s32[]") and (found := re.match(r"constant\((\d+)\)", one.rest))
    ]
    if len(bounds) == 1 and "compare" in opcodes and not opcodes & {"and", "or", "not", "reduce"}:
        return bounds[0]
    return None


def _cost_of(module: Module, one: Instruction) -> Cost:
    if one.opcode == "while":
        return _cost_of_loop(module, one)
    if one.opcode == "conditional":
        each = [cost(module, branch) for branch in one.branches]
        least = min(each, key=lambda branch: branch.launches)
        loops = tuple(loop for branch in each for loop in branch.loops)
        worst = max(branch.worst for branch in each)
        return Cost(1 + least.launches, 1 + worst, one.cycles + least.cycles, loops)
    called = one.calls("to_apply") if one.opcode == "call" else None
    if called is not None:
        return cost(module, called)
    return Cost(1, 1, one.cycles)


def _cost_of_loop(module: Module, loop: Instruction) -> Cost:
    body, count = loop.calls("body"), turns(module, loop)
    turn = Cost() if body is None else cost(module, body)
    loops = (Loop(count, turn.launches, loop.source), *turn.loops)
    if count is None:  # its predicate is looked at once at least, twice where it turns
        return Cost(1, 2 + turn.worst, 0, loops)
    return Cost(count * turn.launches, count * turn.worst, count * turn.cycles, loops)


def _reached(module: Module, computation: str | None) -> Iterator[Instruction]:
    """Return a computation's instructions, and those of its fusions."""
    for one in module.computations.get(computation or "", ()):
        yield one
        yield from _reached(module, one.calls("calls"))


def _type_and_rest(text: str) -> tuple[str, str]:
    """Split `(f32[2]{0}, s32[]) while(...)`: layouts have parentheses, too, and tuples spaces."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == " " and depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""
