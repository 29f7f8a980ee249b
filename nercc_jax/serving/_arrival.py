"""How long a request was under way before it came here, as a proxy before the server tells.

`X-Request-Start` is what Heroku's router, and nginx and Apache as they are usually configured for
monitoring, say it by: Unix time, with or without "t=" before it, in seconds with a fraction
(nginx's `$msec`), in milliseconds, or in microseconds (Apache's `%t`). Its size tells which.
"""

import re
from collections.abc import Iterable

from ._policy import MAX_DEADLINE_S

HEADER = b"x-request-start"

_TIME = re.compile(rb"(?:t=)?(\d{9,20}(?:\.\d{1,9})?)")
# From so many units on it is counted in such: as seconds that would be after the year 5000.
_UNITS = ((1e14, 1e-6), (1e11, 1e-3))


def under_way(headers: Iterable[tuple[bytes, bytes]], now: float) -> float:
    """Seconds from when a proxy took the request to `now`, both by the clocks on the wall.

    0 where no proxy says so, or what it says cannot be: it lies in the future, or an hour back,
    longer than any deadline. Clocks of machines differ by that, not requests.
    """
    for name, value in headers:
        if name == HEADER and (told := _TIME.fullmatch(value.strip())) is not None:
            start = float(told[1])
            start *= next((unit for least, unit in _UNITS if start >= least), 1.0)
            return now - start if 0 < now - start < MAX_DEADLINE_S else 0.0
    return 0.0
