"""docs/extending.md: its blocks run as they stand, `check_code` of its own code among them."""

import extending
import numpy as np


def test_the_blocks_run(capsys):
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
