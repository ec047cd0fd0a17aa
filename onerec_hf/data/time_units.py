"""In which unit numbers count the time since 1970, as far as the numbers say it."""

import numpy as np

UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}  # of one second
NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
# September 2001 to November 2054 in seconds. Read in milliseconds this is January 1970, so no two units overlap
_FIRST, _END = 1e9, 2.6784e9


def time_unit(times: np.ndarray) -> str | None:
    """
    The unit in which all times are dates between 2001 and 2054.

    Args:
        times (`np.ndarray` of any shape): Times since 1970; NaN, infinite ones and those up to 0 do not count.

    Returns:
        `"s"`, `"ms"`, `"us"` or `"ns"`; None where there is no such unit, as of small numbers.
    """
    times = np.asarray(times, dtype=np.float64)
    known = times[np.isfinite(times) & (times > 0)]
    if len(known):
        for unit, size in UNITS.items():
            if _FIRST * size <= known.min() and known.max() < _END * size:
                return unit
    return None
