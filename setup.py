"""What the package says of itself that depends on where it is built; all else is in pyproject.toml.

The release's workflow says where the project lives (NERCC_HOME, and the release's NERCC_TAG): links
of README become absolute ones, as PyPI wants them, and the project's pages are named. Elsewhere
such links would lead nowhere once README has left its folder: their text stays, and pictures go.
"""

import os
import re
from pathlib import Path

from setuptools import setup

HOME = os.environ.get("NERCC_HOME")  # https://github.com/owner/name
_TAG = os.environ.get("NERCC_TAG", "main")


def readme() -> str:
    """Return README.md, with links that hold anywhere."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    text = re.sub(r"^```(\w+) \w+$", r"```\1", text, flags=re.MULTILINE)  # marks of our own
    if HOME is None:
        text = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", text)
        return re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", text)
    raw = f"{HOME}/raw/{_TAG}"
    text = re.sub(r"(!\[[^]]*\])\((?!https?:)([^)]*)\)", rf"\1({raw}/\2)", text)
    return re.sub(r"\]\((?!https?:)([^)]*)\)", rf"]({HOME}/blob/{_TAG}/\1)", text)


def urls() -> dict[str, str]:
    """Return the addresses of the project's pages, as far as they are known."""
    paper = {"Paper": "https://arxiv.org/abs/2402.04377"}
    if HOME is None:
        return paper
    owner, name = HOME.rstrip("/").split("/")[-2:]
    return {
        "Homepage": HOME,
        "Documentation": f"https://{owner.lower()}.github.io/{name}",
        "Changelog": f"{HOME}/blob/{_TAG}/docs/changelog.md",
        "Issues": f"{HOME}/issues",
        **paper,
    }


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    project_urls=urls(),
)
