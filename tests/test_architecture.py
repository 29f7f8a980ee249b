"""The house, read from its sources: rooms, faces, and imports that run in one direction."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nercc_jax

# From the bottom up: a room imports from those before it only.
ROOMS = (
    "compilation",
    "arrays",
    "splines",
    "codes",
    "stragglers",
    "hedging",
    "inference",
    "evaluation",
    "tuning",
    "surrogates",
    "risk",
    "schemes",
    "planning",
    "pools",
    "rows",
    "serving",
    "testing",
    "cli",
)
HOUSE = Path(nercc_jax.__file__).parent
FILES = sorted(HOUSE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(HOUSE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


NAMES = {name_of(path) for path in FILES}


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module within the house, imported name) of every import in a file, late ones included."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(a.name.split(".")[0] == "nercc_jax" for a in node.names), path
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level == 0:
            assert (node.module or "").split(".")[0] != "nercc_jax", f"{path}: import relatively"
            continue
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if package else []
        module = ".".join([*above, *(node.module or "").split(".")]).strip(".")
        for alias in node.names:
            inner = f"{module}.{alias.name}".strip(".")
            yield (inner, "") if inner in NAMES else (module, alias.name)


def room_of(module: str) -> str:
    return module.partition(".")[0]


def test_the_rooms_are_those_of_the_plan():
    rooms = {path.name for path in HOUSE.iterdir() if path.is_dir() and path.name[0] != "_"}
    assert rooms == set(ROOMS)
    assert {path.name for path in HOUSE.glob("*.py")} == {"__init__.py", "__main__.py"}


IMPORTS = {name_of(path): list(imports(path)) for path in FILES}


def test_imports_run_in_one_direction_and_private_names_stay_in_their_rooms():
    for file, names in IMPORTS.items():
        here = room_of(file)
        for module, name in names:
            there = room_of(module)
            if here in ("", "__main__"):  # the first names that people need, from their rooms
                assert there in ROOMS
                assert "." not in module, f"{module}.{name}: from the room's face"
            elif there != here:
                assert there in ROOMS[: ROOMS.index(here)], f"{file} imports {module}"
                private = [part for part in (*module.split("."), name) if part.startswith("_")]
                assert not private, f"{file} imports {module}.{name}"


def test_no_two_files_import_each_other():
    """Nor do longer circles exist."""
    arrows = {file: {module for module, _ in names} for file, names in IMPORTS.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join([*path, module])}"
        if module not in done:
            for other in arrows[module] - {module}:
                visit(other, (*path, module))
            done.add(module)

    for module in arrows:
        visit(module, ())


def test_a_served_model_knows_no_protocol():
    """Whoever embeds one, or reads it, needs none."""
    arrows = {file: {module for module, _ in names} for file, names in IMPORTS.items()}
    needed, left = set(), {"serving._served_model"}
    while left:
        needed |= left
        left = set().union(*(arrows.get(module, set()) for module in left)) - needed
    assert "serving._batcher" in needed
    assert not needed & {"serving.protocol._messages"}
    assert not any(name.startswith("serving.transport") for name in needed)


@pytest.mark.parametrize(
    ("package", "below"),
    [
        ("core", {"_policy"}),
        ("adapt", {"core", "_policy"}),
        ("protocol", {"core", "_policy"}),
    ],
)
def test_packages_of_the_server_know_only_what_is_below_them(package, below):
    for path in (HOUSE / "serving" / package).glob("*.py"):
        parts = {module.split(".")[1] for module, _ in imports(path) if module[:8] == "serving."}
        assert parts <= below | {package}, path


def test_few_names_at_the_top():
    names = [name for _, name in IMPORTS[""] if name]
    assert 15 <= len(names) <= 26
    assert len(set(names)) == len(names)


def test_no_file_is_long():
    lines = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: number for name, number in lines.items() if number > 700}


# Where latencies are drawn or combined, and chances are bounded, outside the rooms for it.
LATENCIES = {
    "pools._faults": "injects delays into real workers; the scheduler runs the policy",
}
BOUNDS = {
    "planning._plan": "if none of n labels is wrong, at most -log(1 %) / n are",
}
OF_LATENCY = {"arrivals", "copies", "drawn", "latencies", "latency", "replay", "seconds"}
COMBINED = {"cumsum", "maximum", "minimum", "partition"}  # of arrays: how times make a time
OF_BINOMIAL = {"bdtr", "bdtri", "bdtrik", "betainc", "betaincinv", "binom", "binomtest", "btdtri"}


def named(node: ast.AST) -> set[str]:
    """Return the names and attributes below a node."""
    found = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    found |= {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
    return found | {each.name for each in ast.walk(node) if isinstance(each, ast.alias)}


def computes_latency(node: ast.AST) -> bool:
    """Return whether a law is drawn from, or latencies are combined by an array function."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    combined = node.func.attr in COMBINED and bool(OF_LATENCY & set().union(*map(named, node.args)))
    return node.func.attr == "sample" or combined


def bounds_chance(node: ast.AST) -> bool:
    """Return whether it is a binomial bound, a conformal quantile or a step of an e-detector."""
    match node:
        case ast.ImportFrom() | ast.Import():
            return bool(named(node) & OF_BINOMIAL)
        case ast.Attribute(attr=name):
            return name in OF_BINOMIAL
        # ceil((n + 1) * coverage), the place of a conformal quantile.
        case ast.Call(func=ast.Attribute(attr="ceil"), args=[ast.BinOp(left=ast.BinOp() as more)]):
            return isinstance(more.op, ast.Add) and ast.unparse(more.right) == "1"
        # -log(chance) / n, the bound where none was seen.
        case ast.BinOp(left=ast.UnaryOp(operand=ast.Call() as call), op=ast.Div()):
            return "log" in named(call.func)
        case ast.Assign(targets=[target], value=value):  # sums = (sums + 1) * ...
            return f"({ast.unparse(target)} + 1) * " in ast.unparse(value)
    return False


@pytest.mark.parametrize(
    ("computes", "rooms", "exceptions"),
    [
        (computes_latency, {"stragglers", "testing"}, LATENCIES),
        (bounds_chance, {"risk"}, BOUNDS),
    ],
)
def test_one_room_computes_it(computes, rooms, exceptions):
    """Others call the simulator, and the estimate of risk. An exception has a reason."""
    found = {
        name_of(path)
        for path in FILES
        if any(computes(node) for node in ast.walk(ast.parse(path.read_text())))
    }
    assert {room_of(name) for name in found} & rooms, "it sees what it looks for"
    assert {name for name in found if room_of(name) not in rooms} == set(exceptions)
