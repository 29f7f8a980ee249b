"""A sequential test of a promise: at most this share of the answers is wrong.

The test bets against the promise. If each answer is wrong with a probability of at most m, given
all that came before, then the product of `1 + bet * (wrong - m)` is a nonnegative supermartingale,
whatever the dependence between answers (Waudby-Smith and Ramdas 2024, "Estimating means of bounded
random variables by betting"; Howard et al. 2021, "Time-uniform, nonparametric, nonasymptotic
confidence sequences"). A drift may begin at any time, so the products from all starting times are
added up, the statistic of Shiryaev and Roberts: an e-detector (Shin, Ramdas and Rinaldo 2024,
"E-detectors: a nonparametric framework for sequential change detection"). It is valid at every
time, however often one looks.

This file needs NumPy only.
"""

from collections.abc import Iterable

import numpy as np

# Ratios of the odds of being wrong to those promised that the bets are best for: their mean is a
# bet, too. A single 2 would detect an error rate of 4 promises in twice the time.
_RATIOS = (1.5, 2.0, 4.0, 10.0)
_LEAST = 1e-4  # a smaller promise counts as this one: each wrong answer would be a drift


class RiskMonitor:
    """A sequential test of whether answers are wrong more often than promised.

    The false alarm rate is stated per answer: while the promise holds, the mean number of answers
    until an alarm is at least `1 / false_alarms`, and an alarm comes within the first n answers
    with a probability of at most `n * false_alarms`.

    Attributes:
        promised: The largest share of wrong answers.
        number: The number of answers since the last `clear`.
        wrong: The number of wrong ones among them.
        alarm: Whether the promise is broken.

    Example:
        >>> from nercc_jax.risk import RiskMonitor
        >>> monitor = RiskMonitor(0.1)
        >>> monitor.add(([0] * 9 + [1]) * 10)
        False
        >>> monitor.add([1] * 20)
        True
    """

    def __init__(self, promised: float, *, false_alarms: float = 2e-5):
        """Start without answers.

        Args:
            promised: The largest share of wrong answers.
            false_alarms: The rate of false alarms per answer.

        Raises:
            ValueError: A share is outside [0, 1], or the rate outside (0, 1).
        """
        if not 0 <= promised <= 1:
            raise ValueError(f"promised must be in [0, 1], not {promised}")
        if not 0 < false_alarms < 1:
            raise ValueError(f"false_alarms must be between 0 and 1, not {false_alarms}")
        self.promised, self._threshold = promised, 1 / false_alarms
        share = min(max(promised, _LEAST), 1 - _LEAST)
        odds = np.array(_RATIOS) * share / (1 - share)
        # The best bet where the true share is q: (q - m) / (m (1 - m)).
        self._share, q = share, odds / (1 + odds)
        self._bets = (q - share) / (share * (1 - share))
        self.clear()

    def clear(self) -> None:
        """Forget all answers."""
        self._sums = np.zeros(len(_RATIOS))
        self.number, self.wrong, self.alarm = 0, 0.0, False

    def add(self, losses: Iterable[float | int]) -> bool:
        """Take answers in order, by how wrong each was, from 0 to 1; return whether to alarm.

        After an alarm it stays on until `clear`.
        """
        for loss in losses:
            self.number, self.wrong = self.number + 1, self.wrong + float(loss)
            if not self.alarm:
                self._sums = (self._sums + 1) * (1 + self._bets * (float(loss) - self._share))
                self.alarm = bool(self._sums.mean() >= self._threshold)
        return self.alarm
