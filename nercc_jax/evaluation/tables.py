"""Tables as text, in which results are printed."""

from collections.abc import Iterable, Sequence


def text_table(rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return rows as columns of text: the first `left` aligned left, the others right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        places = enumerate(zip(row, widths, strict=True))
        cells = (cell.ljust(w) if place < left else cell.rjust(w) for place, (cell, w) in places)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
