"""Settings of paper.py and tuning.py: models at (N, K), numbers of stragglers, the grid."""

import dataclasses

import numpy as np

from nercc_jax import ExactStragglers

PACKAGES = ("jax", "jaxlib", "numpy", "equinox", "optax", "flax")

# Zero and twelve more for both lambdas, as one would search them without gradients.
GRID = np.concatenate([[0.0], np.logspace(-12, 0, 12)])

# NeRCC's scalar leaves.
NUMBERS = ("lambda_enc", "lambda_dec", "gap_exponent", "end_penalty")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model at (N, K)."""

    model: str
    num_workers: int
    num_data: int

    @property
    def name(self) -> str:
        """Return the setting as an option and a key."""
        return f"{self.model}:{self.num_workers}:{self.num_data}"

    @property
    def words(self) -> str:
        """Return the setting for a reader."""
        return f"{self.model} ({self.num_workers}, {self.num_data})"

    def laws(self, count: int) -> dict[str, ExactStragglers]:
        """Return `count` numbers of stragglers from 0 to N - K, evenly spread, by name."""
        spread = np.linspace(0, self.num_workers - self.num_data, count)
        return {str(s): ExactStragglers(s) for s in sorted({round(float(s)) for s in spread})}


PAPER = (
    Setting("lenet5-mnist", 100, 20),
    Setting("lenet5-mnist", 100, 60),
    Setting("repvgg-cifar10", 60, 20),
    Setting("repvgg-cifar10", 30, 20),
    Setting("vit-cifar10", 20, 8),
    Setting("vit-cifar10", 60, 20),
)

# Where ParM has k = 2, 3, 4.
PARM = tuple(Setting("lenet5-mnist", num_workers, 12) for num_workers in (18, 16, 15))
