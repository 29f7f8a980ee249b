"""Every Python block of README and of the documentation's pages runs as it stands, page by page.

Code cells are run where the site is built; the blocks of docs/cluster.md and docs/deploy have tests
of their own, and those of docs/extending.md are one program, of which other tests use the code.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import extending
import numpy as np
import pytest
from commands import invoke, options_of
from conftest import require
from pages import blocks

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"docs/cluster.md", "docs/deploy/README.md", "docs/extending.md"}
EXTRA = {
    "docs/devices.md": ("ray", "ray"),
    "docs/hedging.md": ("ray.serve", "serve-test"),
    "docs/run.md": ("ray.data", "ray-data"),
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
    if page.parent.name != "measured"  # the site's copies of bench/results
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


def test_the_blocks_of_extending_run_as_one(capsys):
    """Among them `check_code` of its own code."""
    names: dict = {}
    for block in extending.BLOCKS:
        exec(compile(block, "docs/extending.md", "exec"), names)
    assert any("\ncheck_code(MovingAverages(" in block for block in extending.BLOCKS)
    rmse, slope = capsys.readouterr().out.split("\n")[:2]
    assert np.isfinite(float(rmse.split()[1]))
    assert abs(float(slope.split()[1])) > 0
    law = names["EveryOther"]()
    draws = {
        tuple(np.asarray(law.available(key, 4)))
        for key in names["jax"].random.split(names["jax"].random.key(0), 20)
    }
    assert draws == {(True, False, True, False), (False, True, False, True)}


def commands():
    """Ours in all pages' blocks, with the page."""
    for name, page in FOUND.items():
        for block in blocks(page.read_text(), r"bash[^\n]*"):
            for line in block.replace("\\\n", " ").splitlines():
                if found := re.match(r"(?:\S*/)?nercc (\w.*)", line):
                    yield name, found[1]


def test_commands_have_the_options_that_they_are_given():
    require("starlette", "serve")
    found = sorted(commands())
    assert {page for page, _ in found} >= {"docs/serve.md", "docs/quickstart.md", "docs/which.md"}
    for page, command in found:
        name, *words = shlex.split(command, comments=True)
        named = {word for word in words if word.startswith("--")}
        assert named <= options_of(name), (page, command)


CLUSTER = FOUND["docs/cluster.md"].read_text()


def test_the_page_of_clusters_names_what_there_is():
    """Options of Ray's commands, and of ours that are submitted to it; files; measured tables."""
    require("starlette", "serve")
    lines = "".join(blocks(CLUSTER, "bash")).splitlines()
    known = require("ray.scripts.scripts", "ray").cli.commands
    for words in (shlex.split(line, comments=True) for line in lines):
        if words[:2] == ["ray", "start"]:
            known["start"].make_context("start", words[2:])
        elif words:
            if words[0] == "ray":
                assert words[:3] == ["ray", "job", "submit"]
                words = words[words.index("--") + 1 :]
            assert words[0] == "nercc"
            named = {word for word in words[2:] if word.startswith("--")}
            assert named
            assert named <= options_of(words[1])
    options = options_of("run") | options_of("serve") | {"--hang-timeout-s"}
    assert set(re.findall(r"`(--[\w-]+)", CLUSTER)) <= options
    for link in re.findall(r"\]\((?!http)([\w./-]+)(?:#[\w-]+)?\)", CLUSTER):
        assert (ROOT / "docs" / link).exists(), link
    codes = dict(re.findall(r"^\| (\d+) \| (.+?) \|$", CLUSTER, re.MULTILINE))
    assert codes.keys() == {"0", "1", "2", "3", "130"}


# Fewer data points and steps than a command on a page has; the last of two values counts.
CHEAP = {
    "demo": "--max-inputs 60 --sets 2 --max-stragglers 1",
    "distill": "--answers 200 --epochs 1 --share 0.3",
    "new-model": "",
    "plan": "--max-inputs 200",
    "run": "--max-inputs 60",
    "serve": "--check",
    "tune": "--steps 2 --max-inputs 60 --sets 2 --max-stragglers 1",
}
# What pages leave to the reader, by the name of a file.
GIVEN = """
import jax.numpy as jnp
import numpy as np

def simulate(x):
    return np.sin(3 * x)

def my_model(batch):
    return batch.reshape(len(batch), -1)[:, :10]

def prepare(images):
    return images[:, ::32, ::32].astype(jnp.float32) / 255

net = my_model

def heads(batch):
    return {"a": batch["image"].reshape(len(batch["image"]), -1)[:, :3], "b": batch["meta"]}
"""
# A Ray elsewhere, the hub, and words that stand for a command of the same page.
NOT_HERE = ("HEAD:6379", "hf:", "...")
SHOWN = {
    page: [command for name, command in commands() if name == page]
    for page in dict.fromkeys(name for name, _ in commands())
    if page not in ELSEWHERE - {"docs/cluster.md"}
}


@pytest.mark.slow
@pytest.mark.parametrize("page", SHOWN)
def test_commands_run_as_they_are_shown(page, tmp_path, monkeypatch):
    """One after the other, in a folder with the page's own files; `serve` ends once it could."""
    for extra, name in (("ray", "ray"), ("pydantic_settings", "serve"), ("matplotlib", "demo")):
        require(extra, name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("my_module", "shop"):
        (tmp_path / f"{name}.py").write_text(GIVEN)
    for block in blocks(FOUND[page].read_text(), "python"):
        if found := re.match(r"# (\w+)\.py\n", block):
            (tmp_path / f"{found[1]}.py").write_text(block)
    for file in ("my_module", "my_model", "pendulum", "shop", "simulation"):
        monkeypatch.delitem(sys.modules, file, raising=False)
    x = np.random.default_rng(0).uniform(0, 1, (400, 3))
    np.save("x.npy", x)
    for command in SHOWN[page]:
        name, *words = shlex.split(command, comments=True)
        if any(word.startswith(NOT_HERE) for word in words):
            continue
        cheap = [] if page == "docs/run.md" else CHEAP[name].split()
        result = invoke(name, *words, *cheap)
        assert result.exit_code == 0, (command, result.output, result.exception)
        if name == "new-model":
            subprocess.run([sys.executable, "my_model.py"], check=True)  # writes its weights
            import my_model  # pyright: ignore[reportMissingImports]

            np.save("points.npy", my_model.example_inputs())
        if name == "plan" and (text := blocks(FOUND[page].read_text(), "text")):
            choice = r"recommended: (\w+ \(\d+, \d+\))"
            assert re.search(choice, result.output)[1] == re.search(choice, text[0])[1]


def test_messages_that_troubleshooting_quotes_are_the_librarys():
    """Where a message has values, the page has dots."""
    found = []
    for path in (ROOT / "nercc_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        getattr(part, "value", "")
                        for part in node.values
                        if isinstance(part, ast.Constant)
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `(.+?)`(?: \(hint\))? \|", page, re.MULTILINE)
    assert len(messages) > 10
    for message in messages:
        parts = [part.strip() for part in message.split("...") if part.strip(" ,")]
        assert any(all(part in text for part in parts) for text in found), message
