"""The accuracy that is asked of answers that are given out approximately."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float


@dataclasses.dataclass(frozen=True)
class AccuracyTarget:
    """A bound on what may be given out instead of the model's own answers.

    Without a tolerance and a disagreement, everything may.

    Attributes:
        tolerance: The largest error bar, in units of the outputs.
        max_disagreement: The largest share of the answers given out approximately whose label may
            differ from the model's own.
        coverage: The share of errors that error bars cover.
    """

    tolerance: float | None = None
    max_disagreement: float | None = None
    coverage: float = 0.9

    @property
    def promised(self) -> float:
        """The share of the answers given out that may have a wrong label or too short a bar."""
        outside = 0.0 if self.tolerance is None else 1 - self.coverage
        return min((self.max_disagreement or 0.0) + outside, 1.0)

    def missed(self, wrong: Any, excess: Any) -> Bool[np.ndarray, "*answers"]:
        """Return which answers miss the target, by their label or their error.

        Args:
            wrong: Whether the label is wrong.
            excess: The error over its bar (`error_ratios`).
        """
        failed = np.zeros(np.shape(wrong), bool)
        if self.max_disagreement is not None:
            failed |= wrong
        if self.tolerance is not None:
            failed |= np.asarray(excess) > 1
        return failed


def error_ratios(error: Any, bound: Any) -> Float[np.ndarray, "*answers"]:
    """Return errors over their bounds.

    Where there is no error that is 0, whatever the bound; where the bound is unknown, infinite.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(error > 0, error / bound, 0.0)
    return np.where(np.isnan(ratios), np.inf, ratios)
