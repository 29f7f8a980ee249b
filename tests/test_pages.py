"""Every Python block of README and of the documentation's pages runs as it stands, page by page.

Code cells are run where the site is built; the blocks of docs/extending.md, docs/cluster.md and
docs/deploy have tests of their own.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require
from pages import blocks, options_of

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"docs/cluster.md", "docs/deploy/README.md", "docs/extending.md"}
EXTRA = {
    "docs/devices.md": ("ray", "ray"),
    "docs/hedging.md": ("ray.serve", "ray-serve"),
    "docs/run.md": ("ray.data", "ray-data"),
    "docs/stiff.md": ("diffrax", "dev"),
    "docs/tuning.md": ("sklearn", "demo"),
}
NEEDS_SERVER = "import tritonclient"


def python_of(page: Path) -> str:
    """A page's blocks as one program; comments keep their places."""
    found = blocks(page.read_text(), "python")
    return "\n\n".join(block for block in found if NEEDS_SERVER not in block)


FOUND = {
    str(page.relative_to(ROOT)): page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
PAGES = {name: python_of(page) for name, page in FOUND.items()}
RUN = [name for name, code in PAGES.items() if code and name not in ELSEWHERE]


@pytest.mark.parametrize("page", RUN)
def test_the_blocks_run(page, tmp_path, request):
    """In a process and a folder of their own, as a reader would run them."""
    if page in EXTRA:
        require(*EXTRA[page])
    program = tmp_path / "page.py"
    program.write_text(PAGES[page])
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_COMPILATION_CACHE_DIR": str(request.config.cache.mkdir("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
    }
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    errors = re.findall(r"RMSE ([\d.e+-]+|nan|inf)", done.stdout)
    assert all(0 <= float(error) < 1.5 for error in errors), done.stdout


def test_there_are_pages_to_run():
    assert {"README.md", "docs/own-models.md", "docs/serve.md"} <= {*RUN}


def commands():
    """Ours in all pages' blocks, with the page."""
    for name, page in FOUND.items():
        for block in blocks(page.read_text(), r"bash[^\n]*"):
            for line in block.replace("\\\n", " ").splitlines():
                if found := re.match(r"(?:\S*/)?nercc (\w.*)", line):
                    yield name, found[1]


def test_commands_have_the_options_that_they_are_given():
    found = sorted(commands())
    assert {page for page, _ in found} >= {"docs/serve.md", "docs/quickstart.md", "docs/which.md"}
    for page, command in found:
        name, *words = shlex.split(command, comments=True)
        named = {word for word in words if word.startswith("--")}
        assert named <= options_of(name), (page, command)
