"""docs/cluster.md names what there is."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import require
from pages import blocks, options_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "cluster.md").read_text()


def commands():
    lines = "".join(blocks(PAGE, "bash")).splitlines()
    return [line.split("#")[0].strip() for line in lines if line]


@pytest.mark.parametrize("line", commands())
def test_commands_have_the_options_that_they_are_given(line):
    words = shlex.split(line)
    if words[0] == "ray":
        scripts = require("ray.scripts.scripts", "ray")
        known = scripts.cli.commands[words[1]]
        if words[1] == "start":
            known.make_context("start", words[2:])
            return
        assert words[1:3] == ["job", "submit"]
        words = words[words.index("--") + 1 :]
    assert words[0] == "nercc"
    named = {word for word in words[2:] if word.startswith("--")}
    assert named
    assert named <= options_of(words[1])


def test_the_page_names_options_files_and_tables_that_there_are():
    known = options_of("run") | options_of("serve")
    assert set(re.findall(r"`(--[\w-]+)", PAGE)) <= known | {"--hang-timeout-s"}
    for link in re.findall(r"\]\((?!http)([\w./-]+)(?:#[\w-]+)?\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
    codes = dict(re.findall(r"^\| (\d+) \| (.+?) \|$", PAGE, re.MULTILINE))
    assert codes.keys() == {"0", "1", "2", "3", "130"}


def test_the_tables_are_the_measured_ones():
    found = json.loads((ROOT / "bench" / "results" / "cluster.json").read_text())
    assert found
    for label, measured in found.items():
        for row in measured["rows"]:
            times = f"{row['p50_ms']:.0f} | {row['p99_ms']:.0f} | {row['max_ms']:.0f}"
            line = f"| {label} | {row['stretch']} | {times} | {100 * row['exact']:.1f} %"
            assert line in PAGE, line
