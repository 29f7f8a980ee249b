"""The rooms of the house, for all tests that go through them."""

# From the bottom up: a room imports from those before it only.
ROOMS = (
    "compilation",
    "splines",
    "codes",
    "stragglers",
    "hedging",
    "inference",
    "evaluation",
    "tuning",
    "surrogates",
    "risk",
    "schemes",
    "planning",
    "pools",
    "rows",
    "serving",
    "testing",
    "cli",
)
