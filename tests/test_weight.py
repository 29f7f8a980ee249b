"""How much a reader of the house must hold in the head: counts that may fall and must not grow.

Design, section 5, rules 1 to 4. A change that lowers a count lowers the figure in `MOST`, too. One
that needs more of something takes as much away elsewhere.
"""

import ast
import importlib

import pytest
from test_architecture import FILES, ROOMS, imports, name_of, room_of

# Rule 1 ends at 60 names past the faces; rule 2 at 1,200 functions of 21 lines, 10 a public name.
MOST = {
    "names imported past a room's face": 122,
    "functions": 1306,
    "functions in a thousand lines": 45.9,
    "functions and classes a public name": 12.3,
    "results: classes of predictions and what is known of them": 7,
    "numeric module constants": 120,
}
PREDICTIONS = {"answers", "decoded", "mean", "prediction", "predictions", "value", "values"}
KNOWN = {"available", "deviation", "disagreement", "error", "error_bound", "error_probability"}
KNOWN |= {"exact", "expected_disagreement", "expected_error", "recovered", "responded", "score"}
KNOWN |= {"source", "status", "suspected", "suspicious"}

TREES = {path: ast.parse(path.read_text()) for path in FILES}
NODES = [node for tree in TREES.values() for node in ast.walk(tree)]


def names_past_faces() -> set[tuple[str, str]]:
    """Names that rooms import from a file of another room, instead of from its `__init__`."""
    return {
        (module, name)
        for path in TREES
        for module, name in imports(path)
        if "." in module and room_of(module) != room_of(name_of(path))
    }


def is_number(value: ast.expr | None) -> bool:
    """Return whether it is a number, or a tuple or sum with a number in it; booleans are none."""
    if not isinstance(value, ast.Constant | ast.Tuple | ast.BinOp | ast.UnaryOp):
        return False
    parts = [node.value for node in ast.walk(value) if isinstance(node, ast.Constant)]
    return any(isinstance(part, int | float) and not isinstance(part, bool) for part in parts)


def constants(tree: ast.Module) -> int:
    """The names in capitals at a module's top that are given numbers."""
    found = 0
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and is_number(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name for each in targets for name in getattr(each, "elts", [each])]
            found += sum(isinstance(n, ast.Name) and n.id.strip("_").isupper() for n in names)
    return found


def is_result(node: ast.ClassDef) -> bool:
    """Return whether it has a field of predictions, and one of what is known of them."""
    annotated = [each.target for each in node.body if isinstance(each, ast.AnnAssign)]
    fields = {target.id for target in annotated if isinstance(target, ast.Name)}
    return bool(fields & PREDICTIONS) and bool(fields & KNOWN)


def weigh() -> dict[str, float]:
    lines = sum(len(path.read_text().splitlines()) for path in TREES)
    classes = [node for node in NODES if isinstance(node, ast.ClassDef)]
    functions = sum(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in NODES)
    rooms = [importlib.import_module(f"nercc_jax.{room}") for room in ROOMS if room != "cli"]
    public = sum(len(room.__all__) for room in rooms)
    figures = (
        len(names_past_faces()),
        functions,
        round(1000 * functions / lines, 1),
        round((functions + len(classes)) / public, 1),
        sum(map(is_result, classes)),
        sum(map(constants, TREES.values())),
    )
    return dict(zip(MOST, figures, strict=True))


@pytest.fixture(scope="module")
def weight() -> dict[str, float]:
    return weigh()


@pytest.mark.parametrize("count", MOST)
def test_the_house_grows_no_heavier(weight, count):
    more = round(weight[count] - MOST[count], 1)
    assert more <= 0, (
        f"{count}: {weight[count]}, which is {more} more than the {MOST[count]} allowed"
    )


if __name__ == "__main__":
    print(weigh())
