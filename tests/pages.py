"""What pages show: their blocks of code."""

import re


def blocks(text: str, language: str) -> list[str]:
    """Of a page or docstring, those marked so, by a regular expression, to the end of the line."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
