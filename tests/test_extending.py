"""docs/extending.md: its blocks run as they stand, and its code keeps the contract of all codes."""

import pathlib

import extending
import numpy as np


def test_the_blocks_run(capsys):
    names: dict = {}
    for block in extending.BLOCKS:
        exec(compile(block, "docs/extending.md", "exec"), names)
    rmse, slope = capsys.readouterr().out.split("\n")[:2]
    assert np.isfinite(float(rmse.split()[1]))
    assert abs(float(slope.split()[1])) > 0
    law = names["EveryOther"]()
    draws = {
        tuple(np.asarray(law.available(key, 4)))
        for key in names["jax"].random.split(names["jax"].random.key(0), 20)
    }
    assert draws == {(True, False, True, False), (False, True, False, True)}


def test_the_table_of_codes_has_it():
    table = pathlib.Path(__file__).with_name("test_codes.py").read_text()
    assert "extending.MovingAverages(" in table
