"""The house, read from its sources: rooms, faces, and imports that run in one direction."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nercc_jax

# From the bottom up: a room imports from those before it only.
ROOMS = (
    "compilation",
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
                assert not name.startswith("_"), f"{file} imports {module}.{name}"


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
