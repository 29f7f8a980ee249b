"""Sequential tests: of workers, and of a promise: at most this share of the answers is wrong.

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


def _best(ratios: list[float], share: float) -> np.ndarray:
    """Return the shares of wrong answers whose odds are multiples of those of a share."""
    odds = np.array(ratios) * share / (1 - share)
    return odds / (1 + odds)


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
        # For a smaller promise, each wrong answer would be a drift.
        self._share = share = min(max(promised, 1e-4), 1 - 1e-4)
        # The best bet where the true share is q: (q - m) / (m (1 - m)). The mean of several bets is
        # one, too: a single 2 would detect an error rate of 4 promises in twice the time.
        self._bets = (_best([1.5, 2.0, 4.0, 10.0], share) - share) / (share * (1 - share))
        self.clear()

    def clear(self) -> None:
        """Forget all answers."""
        self._sums = np.zeros(len(self._bets))
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


class WorkerMonitor:
    """Sequential tests of the workers of a pool: is one wrong more often than the others are?

    An answer is known to be wrong where two other workers agree on another one. So the comparison
    is made on the same query, and a change of the queries alone accuses nobody. What may still make
    right workers differ, such as a model that draws random numbers, does so at all of them: the
    share of wrong answers that a worker is allowed is that of the other workers in the same stretch
    of answers, and no less than a usual share.

    The statistic is that of `RiskMonitor`, with larger bets, because a few wrong answers have to
    do. A run of right answers is taken in one step, so that a server's answers cost it nothing.
    While a worker is wrong no more often than it is allowed, it is accused within its first n
    answers with a probability of at most `n * false_alarms`.

    Attributes:
        number: The answers of each worker since its test began.
        wrong: The wrong ones among them.

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
            num_workers: Workers.
            usual: The share of wrong answers that each worker is allowed, whatever the others do.
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
        # Right answers that are not in the sums yet, and the share that they were allowed.
        self._right, self._shares = [0] * num_workers, [usual] * num_workers
        # By worker, of this stretch and the one before: answers, and wrong ones.
        self._stretches = [[[0, 0] for _ in range(num_workers)] for _ in range(2)]
        self._totals = [[0, 0], [0, 0]]  # of all workers
        self._left = self._stretch

    def allowed(self, worker: int) -> float:
        """Return the share of wrong answers that a worker is allowed now."""
        found = self._usual
        for stretch, total in zip(self._stretches, self._totals, strict=True):
            number, wrong = total[0] - stretch[worker][0], total[1] - stretch[worker][1]
            found = max(found, wrong / max(number, 128))  # of fewer, no share is known
        return min(found, 0.5)

    def add(self, worker: int, *, right: int = 0, wrong: int = 0) -> bool:
        """Take answers of a worker, the right ones first; return whether to accuse it.

        Right ones alone accuse nobody.
        """
        share = self.allowed(worker)
        if share != self._shares[worker]:
            self._take_right(worker)
            self._shares[worker] = share
        self._right[worker] += right
        self.number[worker] += right + wrong
        self.wrong[worker] += wrong
        for each in (self._stretches[-1][worker], self._totals[-1]):
            each[0] += right + wrong
            each[1] += wrong
        self._left -= right + wrong
        if self._left <= 0:
            self._left = self._stretch
            self._stretches = [self._stretches[-1], [[0, 0] for _ in self.number]]
            self._totals = [self._totals[-1], [0, 0]]
        if not wrong:
            return False
        sums, best = self._take_right(worker), _best(self._ratios, share)
        for _ in range(wrong):
            sums = np.minimum((sums + 1) * best / share, 1e100)  # many would make it infinite
        self._sums[worker] = sums
        return bool(sums.mean() >= self._threshold)

    def _take_right(self, worker: int) -> np.ndarray:
        """Return a worker's sums after its right answers."""
        right, self._right[worker] = self._right[worker], 0
        if right:
            share = self._shares[worker]
            less = (1 - _best(self._ratios, share)) / (1 - share)
            power = less**right
            self._sums[worker] = self._sums[worker] * power + less * (1 - power) / (1 - less)
        return self._sums[worker]

    def restart(self, worker: int) -> None:
        """Begin a worker's test again, and forget its answers."""
        self._sums[worker] = self._right[worker] = 0
        self.number[worker] = self.wrong[worker] = 0
        for stretch, total in zip(self._stretches, self._totals, strict=True):
            for what, number in enumerate(stretch[worker]):
                total[what] -= number
            stretch[worker] = [0, 0]
