"""Stragglers' queries answered by a surrogate where it is sure enough, and the rest hedged."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..evaluation import Estimate
from ..evaluation._criteria import agree_on_labels
from ..risk import ErrorProbability
from ..risk._error_probability import fit_error_probability_of_predictions
from ..stragglers._waiting import Latencies, draw_hedged
from ._candidates import DRAWS, QUANTILES, Candidate, at_most, make_candidate, number_of_draws
from ._codes import Half

KNOWN = "known, else hedged"

_STREAM, _CHOSEN = 9, 10  # of draws: of latencies, and of data points
_COPIES = 3  # that a query whose answer is not known may have


def known_systems(
    latencies: Latencies, asked: Mapping[str, Any], halves: tuple[Half, Half]
) -> tuple[list[Candidate], dict[Candidate, ErrorProbability]]:
    """Evaluate the surrogate at each straggler threshold, on the half that set no limit.

    Its error probability is that of predictions without answers; it serves a scheme with `Uncoded`,
    too.
    """
    (cheap, answers, form), (held_out, theirs, _) = (half.outputs() for half in halves)
    no_answers = jnp.full(len(cheap), jnp.inf)
    error_probability = fit_error_probability_of_predictions(cheap, no_answers, answers, form)
    no_answers = jnp.full(len(held_out), jnp.inf)
    probabilities = np.asarray(error_probability(held_out, no_answers, held_out))
    wrong = np.asarray(~agree_on_labels(held_out, theirs, form))
    queries = asked["num_queries"]
    shape = (number_of_draws(DRAWS, _COPIES * queries), queries)
    own = latencies.draw(_STREAM, (_COPIES, *shape))[0]
    point = latencies.random(_CHOSEN).integers(0, len(probabilities), shape)
    found: dict[Candidate, ErrorProbability] = {}
    for share in QUANTILES:
        after = latencies.quantile(share)
        late = float(np.mean(own > after))
        if not late:
            continue
        there, sent = draw_hedged(latencies, _STREAM, shape, after, _COPIES)
        wanted = min(asked["max_disagreement"] / late, 1.0)
        # Half of what may be wrong leaves room for chance on the other half.
        for limit in sorted(
            {error_probability.limit(wanted), error_probability.limit(wanted / 2)} - {0.0}
        ):
            sure = probabilities <= limit
            known = (own > after) & sure[point]
            wrongly = Estimate.over((sure & wrong).astype(float).tolist())
            row = make_candidate(
                KNOWN,
                *(queries, queries, queries, 0.0),
                times=np.max(np.where(known, after, there), axis=1),
                copies=_COPIES,
                hedge_after=after,
                limit=limit,
                resent=float(np.mean(np.where(known, 1, sent))) - 1,
                disagreement=Estimate(late * wrongly.mean, late * wrongly.half_width),
                most_disagreement=late * at_most(wrongly, len(probabilities)),
                exact=False,
            )
            found[row] = error_probability
    return list(found), found
