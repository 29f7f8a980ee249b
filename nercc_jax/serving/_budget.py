"""How much may be sent a second time."""


class Budget:
    """A share of the queries, earned as they come: so no stretch of them costs much more.

    What is not spent is kept, but no more than `_SAVED` queries earn. None: no bound.
    """

    _SAVED = 1000

    def __init__(self, share: float | None):
        self._share, self._left = share, 0.0

    def earn(self, queries: int) -> None:
        """So many queries came."""
        if self._share is not None:
            self._left = min(self._left + self._share * queries, max(self._share * self._SAVED, 1))

    def affords(self) -> bool:
        """Whether one more query may be sent again."""
        return self._share is None or self._left >= 1

    def spend(self) -> None:
        """One is sent again. What cannot be decoded is so in any case, and the budget owes it."""
        if self._share is not None:
            self._left -= 1
