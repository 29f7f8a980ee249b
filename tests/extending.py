"""The code of docs/extending.md, from the page itself."""

import pathlib

from pages import blocks

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "extending.md"
BLOCKS = blocks(PAGE.read_text(), "python")
_names: dict = {}
exec(compile(BLOCKS[0], str(PAGE), "exec"), _names)
MovingAverages = _names["MovingAverages"]
