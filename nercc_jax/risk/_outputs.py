"""The question whether a model's outputs are scores, whose largest is a label, or values.

Scores of a classifier have one winner in each row: where one is high the others are low. So the
largest leads the second by more than it would if each output came from another row, which keeps
what every output is by itself and takes away only that one of them wins. Values know nothing of
that: independent outputs lead by as much either way (a probability of 0.5), outputs that go
together by less. Two Gaussian outputs with a constant sum reach 0.61, uniform ones 0.67; logits of
classifiers that are right in 72, 86 and 99 % of the cases 0.61, 0.66 and 0.78 (ten classes).
"""

import numpy as np
from jaxtyping import Float

from ..codes._trees import Form
from ._features import margin

ROWS = 256  # answers that the question needs
# The least probability that the lead is larger than among exchanged outputs, of two outputs, of up
# to five, and of more: the fewer, the more may values look like scores. Of two classes, half of
# each, it is 0.75 where all rows are clear.
_OF_TWO, _OF_FIVE, _OF_MORE = 0.7, 0.65, 0.58
# The least share of the largest output's lead, over the second, of its lead over the median: of
# a field of values, neighbours are nearly as large.
_LEAD = 0.3


def why_no_scores(answers: Float[np.ndarray, "rows m"], form: Form | None = None) -> str | None:
    """Return why a model's answers do not look like scores of labels; None if they do.

    Every part of the outputs (`form`) has to look like scores, along its last axis. The answers
    cannot show everything: shares of a whole that are values look like probabilities, and outputs
    of which exactly one is large look like scores, such as two that move between two levels in
    opposite directions. A classifier that is often unsure, or nearly always gives the same label,
    looks like values.

    Args:
        answers: The model's own answers, as vectors; a few hundred.
        form: The structure of the outputs, where they are not vectors.
    """
    shapes = [(answers.shape[1],)] if form is None else form.shapes
    if any(shape[-1:] in ((), (1,)) for shape in shapes):
        return "an output has one number a row"
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes])
    for part, shape in zip(np.split(answers, ends[:-1], axis=1), shapes, strict=True):
        y = part.reshape(-1, shape[-1])[:4096].astype(np.float64)
        outputs, largest, rounding = y.shape[1], y.max(axis=1), 1e-3
        with np.errstate(all="ignore"):
            total = largest + np.log(np.exp(y - largest[:, None]).sum(axis=1))
            sums = np.abs(y.sum(axis=1) - 1)
        if ((y >= 0).all() and (sums < rounding).all()) or (np.abs(total) < rounding).all():
            continue  # probabilities, or their logarithms
        random, lead = np.random.default_rng(0), margin(y)
        exchanged = [margin(random.permuted(y, axis=0)) for _ in range(4)]
        exchanged = np.sort(np.concatenate(exchanged))
        # Of equal leads each counts as larger in half of the cases.
        places = [np.searchsorted(exchanged, lead, side=side) for side in ("left", "right")]
        larger = float(np.mean(places)) / len(exchanged)
        wanted = _OF_TWO if outputs == 2 else _OF_FIVE if outputs <= 5 else _OF_MORE
        if larger < wanted:
            return (
                "the largest output leads the second hardly more than if each output came from "
                f"another row (with a probability of {larger:.2f}; scores do with {wanted} or more)"
            )
        over = largest - np.median(y, axis=1)
        share = float(np.median(lead[over > 0] / over[over > 0])) if (over > 0).any() else 0.0
        if outputs > 2 and share < _LEAD:
            return (
                f"the largest output leads the second by {100 * share:.0f} % of what it leads the "
                "median by, as in a field of values"
            )
    return None
