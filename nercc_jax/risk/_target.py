"""The accuracy that is asked of answers that are given out approximately."""

import dataclasses


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
