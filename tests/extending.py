"""The code of docs/extending.md, from the page itself."""

import pathlib
import re

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "extending.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
_names: dict = {}
exec(compile(BLOCKS[0], str(PAGE), "exec"), _names)
MovingAverages = _names["MovingAverages"]
