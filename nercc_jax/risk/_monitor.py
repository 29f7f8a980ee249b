"""Sequential tests: whether a promised share of wrong answers holds, and which worker is wrong.

The test bets against the promise. If each answer is wrong with a probability of at most m, given
all that came before, then the product of `q / m` for each wrong answer and `(1 - q) / (1 - m)` for
each right one is a nonnegative supermartingale for every q > m, whatever the dependence between
answers (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting";
Howard et al. 2021, "Time-uniform, nonparametric, nonasymptotic confidence sequences"). A drift may
begin at any time, so the products from all starting times are added up, the statistic of Shiryaev
and Roberts: an e-detector (Shin, Ramdas and Rinaldo 2024, "E-detectors: a nonparametric framework
for sequential change detection"). It is valid at every time, however often one looks.

This file needs NumPy only.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float


def detect(
    sums: Float[np.ndarray, " bets"],
    share: float,
    ratios: Sequence[float],
    right: int,
    wrong: int,
) -> Float[np.ndarray, " bets"]:
    """Return the e-detector's sums of products after some answers, the right ones first.

    A run of right answers is processed in one step, so that a server hardly spends time on it.

    Args:
        sums: The sums before, zeros at first. Their mean is the statistic.
        share: The share m of wrong answers that is allowed.
        ratios: Each bet is on a share q whose odds are this multiple of m's.
        right: The number of right answers.
        wrong: The number of wrong ones.
    """
    odds = np.array(ratios) * share / (1 - share)
    best = odds / (1 + odds)
    if right:
        less = (1 - best) / (1 - share)
        power = less**right
        sums = sums * power + less * (1 - power) / (1 - less)
    for _ in range(wrong):
        sums = np.minimum((sums + 1) * best / share, 1e100)  # many would make it infinite
    return sums


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
        # The mean of several bets is a bet. The bet 2.0 alone would take twice as long to detect an
        # error rate of four times the promised one.
        self._ratios = [1.5, 2.0, 4.0, 10.0]
        self.clear()

    def clear(self) -> None:
        """Forget all answers."""
        self._sums = np.zeros(len(self._ratios))
        self.number, self.wrong, self.alarm = 0, 0, False

    def add(self, losses: Iterable[bool | int]) -> bool:
        """Add answers in order, as whether each was wrong; return whether there is an alarm.

        An alarm stays on until `clear`.
        """
        share = min(max(self.promised, 1e-4), 1 - 1e-4)  # below this, each wrong answer is a drift
        for loss in losses:
            wrong = int(loss)
            self.number, self.wrong = self.number + 1, self.wrong + wrong
            if not self.alarm:
                self._sums = detect(self._sums, share, self._ratios, 1 - wrong, wrong)
                self.alarm = bool(self._sums.mean() >= self._threshold)
        return self.alarm


class WorkerMonitor:
    """Sequential tests of a pool's workers: whether one is wrong more often than the others.

    An answer counts as wrong if two other workers agree on another answer. So answers to the same
    query are compared, and a change of the queries alone accuses no worker. Other reasons why right
    workers differ, such as a model that draws random numbers, affect all of them. So the allowed
    share of a worker's wrong answers is that of the other workers in the same stretch of answers,
    and at least a usual share.

    The statistic is that of `RiskMonitor`, with larger bets, because a few wrong answers must
    suffice. A worker that is wrong no more often than allowed is accused within its first n answers
    with a probability of at most `n * false_alarms`.

    Attributes:
        number: The number of answers of each worker since its test began.
        wrong: The number of wrong answers among them.

    Example:
        >>> from nercc_jax.risk._monitor import WorkerMonitor
        >>> monitor = WorkerMonitor(8)
        >>> monitor.add(3, right=1000)
        False
        >>> [monitor.add(3, wrong=1) for _ in range(3)]
        [False, False, True]
    """

    def __init__(self, num_workers: int, *, usual: float = 5e-4, false_alarms: float = 1e-6):
        """Start without answers.

        Args:
            num_workers: The number of workers.
            usual: The share of wrong answers that each worker is always allowed.
            false_alarms: The rate of false accusations per answer.

        Raises:
            ValueError: A share is outside (0, 1).
        """
        if not 0 < usual < 1 or not 0 < false_alarms < 1:
            raise ValueError(
                f"usual {usual} and false_alarms {false_alarms} must be between 0 and 1"
            )
        self._usual, self._threshold = usual, 1 / false_alarms
        self._ratios, self._stretch = [4.0, 16.0, 64.0, 256.0, 1024.0], 256
        self._sums = np.zeros((num_workers, len(self._ratios)))
        self.number, self.wrong = [0] * num_workers, [0] * num_workers
        # By worker, the answers and the wrong ones of this stretch and the one before.
        self._stretches = np.zeros((2, 2, num_workers), int)

    def allowed(self, worker: int) -> float:
        """Return the share of wrong answers that a worker is allowed now."""
        number, wrong = (self._stretches.sum(axis=2) - self._stretches[:, :, worker]).T
        shares = wrong / np.maximum(number, 128)  # fewer answers give no reliable share
        return float(np.clip(shares.max(), self._usual, 0.5))

    def add(self, worker: int, *, right: int = 0, wrong: int = 0) -> bool:
        """Add answers of a worker, the right ones first; return whether to accuse it.

        It is never accused without wrong ones.
        """
        sums = detect(self._sums[worker], self.allowed(worker), self._ratios, right, wrong)
        self._sums[worker] = sums
        self.number[worker] += right + wrong
        self.wrong[worker] += wrong
        self._stretches[-1, :, worker] += right + wrong, wrong
        if self._stretches[-1, 0].sum() >= self._stretch:
            self._stretches = np.stack([self._stretches[-1], np.zeros_like(self._stretches[-1])])
        return wrong > 0 and bool(sums.mean() >= self._threshold)

    def restart(self, worker: int) -> None:
        """Restart a worker's test, without its earlier answers."""
        self._sums[worker] = self._stretches[:, :, worker] = 0
        self.number[worker] = self.wrong[worker] = 0
