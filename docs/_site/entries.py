"""Blocks `entries` of a page: the API reference of public names, whatever they are.

    ```{entries} nercc_jax.codes
    NeRCC Berrut load_code
    ```

Docstrings are Markdown, and become reStructuredText for autodoc. Below each entry stands which
pages use the name in their examples; or else, where it has no example of its own either, which
names that have one work with it.
"""

import ast
import functools
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the tests read pages without Sphinx
    from sphinx.application import Sphinx


BLOCK = re.compile(r"^```\{entries\} (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ITEM = re.compile(r"(?:[-*]|\d+\.) ")  # of a list, at its left edge
MARKUP = re.compile(r"(\\|(?<!^)(?<!\n)\*|\||(?<=\w)_(?=\W|$))")
EXAMPLE = re.compile(
    r"^```python\n(.*?)^```$|^((?:(?:>>>|\.\.\.).*\n?)+)", re.MULTILINE | re.DOTALL
)
CALL = re.compile(r"`(?:\w+\.)*(\w+)\([^`]+\)[^`]*`")
PYTHON = re.compile(r"^```(?:python|\{code-cell\}[^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def setup(app: "Sphinx") -> dict[str, Any]:
    app.connect("source-read", _expand)
    app.connect("autodoc-process-docstring", _docstring)
    return {"parallel_read_safe": True}


def entries_of(page: str) -> dict[str, list[str]]:
    """Public names by their module, of all blocks of a page's text."""
    found: dict[str, list[str]] = {}
    for module, names in BLOCK.findall(page):
        found.setdefault(module, []).extend(names.split())
    return found


def kind_of(thing: Any) -> str:
    """Autodoc's word for it; what `jit` makes of a function is one."""
    if inspect.isclass(thing):
        return "exception" if issubclass(thing, BaseException) else "class"
    return "function" if hasattr(thing, "__wrapped__") or inspect.isroutine(thing) else "data"


def _expand(app: "Sphinx", docname: str, source: list[str]) -> None:
    """Blocks `entries` become autodoc's directives."""

    def directives(found: re.Match) -> str:
        module, names = found[1], found[2].split()
        things = ((name, getattr(importlib.import_module(module), name)) for name in names)
        lines = [f".. auto{kind_of(thing)}:: {module}.{name}" for name, thing in things]
        return "\n".join(["```{eval-rst}", *(f"{line}\n" for line in lines), "```"])

    source[0] = BLOCK.sub(directives, source[0])


def _docstring(
    app: "Sphinx", what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    text = to_rst("\n".join(lines))
    if what in ("class", "function", "exception", "data"):
        text += _where_shown(Path(app.srcdir), name)
    lines[:] = text.split("\n")


def _where_shown(folder: Path, name: str) -> str:
    short = name.rpartition(".")[2]
    if pages := _pages_with(folder, short):
        return "\n\nExamples: " + ", ".join(f":doc:`/{page}`" for page in pages) + "\n"
    if (users := users_of(folder).get(short)) is None:
        return ""
    return "\n\nIn use: " + ", ".join(f":py:obj:`~{user}`" for user in users) + "\n"


def _pages_with(folder: Path, name: str) -> list[str]:
    """The guide's pages that use this name in their Python."""
    return [page for page, names in _names_of_pages(folder).items() if name in names]


@functools.cache
def _names_of_pages(folder: Path) -> dict[str, Set[str]]:
    """Return the names that each page's blocks take from us, and the calls in its sentences."""
    pages = {page.stem: page.read_text() for page in sorted(folder.glob("*.md"))}
    return {
        page: {name for block in PYTHON.findall(text) for name in _imported(block)}
        | set(CALL.findall(text))
        for page, text in pages.items()
    }


def shown(folder: Path, name: str, thing: Any) -> bool:
    """Return whether it has an example, of its own or of the guide's."""
    return bool(_example_of(thing) or _pages_with(folder, name))


@functools.cache
def users_of(folder: Path) -> dict[str, list[str]]:
    """For each public name that no page's Python uses, and that has no example of its own: the full
    names of three, at most, that have one, or whose settings say so, and work with it.

    By their examples if these use it, or else by their sources, or those of their modules.
    """
    things = {
        name: (module, getattr(importlib.import_module(module), name))
        for page in sorted((folder / "api").glob("*.md"))
        for module, names in entries_of(page.read_text()).items()
        for name in names
    }
    known = {name for name, (_, thing) in things.items() if shown(folder, name, thing)}
    ways = (_example_of, _source_of, _module_of)
    uses = [{name: _names_in(way(thing)) for name, (_, thing) in things.items()} for way in ways]
    found: dict[str, list[str]] = {}
    while new := _users(things.keys() - known - found.keys(), sorted({*known, *found}), uses):
        found |= new
    return {name: [f"{things[user][0]}.{user}" for user in users] for name, users in found.items()}


def _users(
    names: set[str], known: Sequence[str], uses: Sequence[Mapping[str, Set[str]]]
) -> dict[str, list[str]]:
    found = {}
    for name in names:
        users = ([user for user in known if name in used[user]][:3] for used in uses)
        if first := next(filter(None, users), None):
            found[name] = first
    return found


@functools.cache
def _names_in(code: str) -> Set[str]:
    """Return the names in Python's text, its comments and docstrings left out."""
    try:
        tree = ast.parse(textwrap.dedent(re.sub(r"^(>>>|\.\.\.) ?", "", code, flags=re.MULTILINE)))
    except SyntaxError:  # what doctests print between
        return frozenset()
    return {
        name
        for node in ast.walk(tree)
        for name in (getattr(node, "id", None), getattr(node, "name", None))
        if isinstance(name, str)
    }


def _imported(code: str) -> Set[str]:
    return {
        alias.name
        for node in ast.walk(ast.parse(re.sub(r"\A(:.*\n)+", "", code)))  # a cell's tags
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nercc_")
        for alias in node.names
    }


def _example_of(thing: Any) -> str:
    documented = inspect.isclass(thing) or inspect.isroutine(thing) or hasattr(thing, "__wrapped__")
    text = (inspect.getdoc(thing) or "") if documented else ""
    text = re.sub(r"^[ \t]+(?=>>>|\.\.\.)", "", text, flags=re.MULTILINE)  # below "Example:"
    return "\n".join("".join(parts) for parts in EXAMPLE.findall(text))


def _source_of(thing: Any) -> str:
    return _or_nothing(inspect.getsource, inspect.unwrap(thing))


def _module_of(thing: Any) -> str:
    module = sys.modules.get(getattr(thing, "__module__", ""))
    return _or_nothing(inspect.getsource, module)


def _or_nothing(read: Callable[[Any], str], thing: Any) -> str:
    try:
        return read(thing)
    except (OSError, TypeError):
        return ""


def to_rst(markdown: str) -> str:
    """A docstring's Markdown (paragraphs, lists, code, bold) as reStructuredText."""
    parts = re.split(r"^([ \t]*)```\w*\n(.*?)^[ \t]*```$", markdown, flags=re.MULTILINE | re.DOTALL)
    written = []
    for prose, indent, code in zip(parts[::3], [*parts[1::3], ""], [*parts[2::3], ""], strict=True):
        written.append(_prose(prose))
        if code:
            inner = "".join(f"    {line}\n" for line in code.splitlines())
            written.append(f"{indent}.. code-block:: python\n\n{inner}\n")
    return "".join(written)


def _prose(text: str) -> str:
    """Paragraphs, lists, doctests and, indented by four, formulas."""
    blocks, in_list = [], False
    for block in re.split(r"\n[ \t]*\n", text):
        first = block.lstrip("\n")
        if first.startswith(">>>"):
            blocks.append(block)
        elif first.startswith("    ") and not in_list:
            blocks.append("::\n\n" + block)
        else:
            lines = _escape(block).split("\n")
            items = [place for place, line in enumerate(lines) if ITEM.match(line)]
            in_list = bool(items) or (in_list and first.startswith("  "))
            if items and items[0] > 0 and lines[items[0] - 1].strip():
                lines.insert(items[0], "")  # reStructuredText wants a list to stand apart
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _escape(text: str) -> str:
    """Escape what reStructuredText would take for markup and Markdown does not."""
    pieces = re.split(r"(`[^`]*`|\*\*(?:\\.|[^*\\])+\*\*)", text)
    return "".join(
        piece if place % 2 else MARKUP.sub(r"\\\1", piece) for place, piece in enumerate(pieces)
    )
