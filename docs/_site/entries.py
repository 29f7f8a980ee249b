"""Blocks `entries` of a page: the API reference of public names, whatever they are.

    ```{entries} nercc_jax.codes
    NeRCC Berrut load_code
    ```

Docstrings are Markdown, and become reStructuredText for autodoc. Below each entry stands which
pages use the name in their examples.
"""

import importlib
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the tests read pages without Sphinx
    from sphinx.application import Sphinx


BLOCK = re.compile(r"^```\{entries\} (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ITEM = re.compile(r"(?:[-*]|\d+\.) ")  # of a list, at its left edge
MARKUP = re.compile(r"(\\|(?<!^)(?<!\n)\*|\||(?<=\w)_(?=\W|$))")
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
        pages = _pages_with(Path(app.srcdir), name.rpartition(".")[2])
        if pages:
            text += "\n\nExamples: " + ", ".join(f":doc:`/{page}`" for page in pages) + "\n"
    lines[:] = text.split("\n")


def _pages_with(folder: Path, name: str) -> list[str]:
    """The guide's pages that use this name in their Python."""
    word = re.compile(rf"\b{name}\b")
    if not _CODE:
        for page in sorted(folder.glob("*.md")):
            _CODE[page.stem] = "\n".join(PYTHON.findall(page.read_text()))
    return [page for page, code in _CODE.items() if word.search(code)]


_CODE: dict[str, str] = {}


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
    """What reStructuredText would take for markup and Markdown does not."""
    pieces = re.split(r"(`[^`]*`|\*\*[^*]+\*\*)", text)
    return "".join(
        piece if place % 2 else MARKUP.sub(r"\\\1", piece) for place, piece in enumerate(pieces)
    )
