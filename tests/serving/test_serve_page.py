"""docs/serve.md: its model is served by its command, and its clients are answered."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require
from nercc_server import Server
from pages import blocks

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()


@pytest.mark.slow
def test_the_model_of_the_page_is_served_to_its_clients(tmp_path):
    require("tritonclient", "serve-test")
    python, bash = blocks(PAGE, "python"), blocks(PAGE, "bash")
    (shop,) = (block for block in python if block.startswith("# shop.py"))
    (client,) = (block for block in python if "tritonclient" in block)
    (curl,) = (block for block in bash if block.startswith("curl"))
    (serve,) = (line for block in bash for line in block.splitlines() if "shop:" in line)
    (tmp_path / "shop.py").write_text(shop)
    server = Server(tmp_path, *shlex.split(serve)[2:])
    try:
        printed = subprocess.run(
            ["bash", "-c", curl.replace("localhost:8000", f"127.0.0.1:{server.http_port}")],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert '"output"' in printed.stdout, printed
        printed = subprocess.run(
            [sys.executable, "-c", client.replace("localhost:8001", server.grpc)],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        labels, exact, doubts = printed.stdout.splitlines()
        assert len(labels.strip("[]").split()) == len(doubts.strip("[]").split()) == 4
        assert "True" in exact or "False" in exact
    finally:
        server.kill()
