"""What was known about items and users at a time: rates of past feedback, and numeric columns as buckets.

The time line is cut at boundaries (days, say). Everything about an exposure comes from before the last boundary at or
before it, so a training row never reads its own label, and all exposures of a user in one period are judged from one
state of knowledge.
"""

from collections.abc import Sequence

import numpy as np


def period_of(time: np.ndarray, boundaries: Sequence[float] | np.ndarray) -> np.ndarray:
    """
    Number of boundaries at or before each time: 0 before the first one, P from the last one on.

    Args:
        time (`np.ndarray` of any shape): Times.
        boundaries (`Sequence[float]`): P times in increasing order, in the unit of `time`.

    Returns:
        `np.ndarray` int64 of the shape of `time`.
    """
    return np.searchsorted(np.asarray(boundaries), time, side="right").astype(np.int64)


def past_rates(
    time: np.ndarray,
    index: np.ndarray,
    labels: np.ndarray,
    size: int,
    boundaries: Sequence[float],
    *,
    smoothing: float = 20.0,
) -> tuple[np.ndarray, np.ndarray]:
    """
    How often each item (user, author, tag, ...) got a feedback before every boundary.

    Args:
        time (`np.ndarray` of shape (M,)): Of past events, in any order. Give training events only: what they say is
            used for all later exposures.
        index (`np.ndarray` of shape (M,)): Which item each event belongs to, 0 to `size - 1`.
        labels (`np.ndarray` of shape (M,)): In [0, 1]; NaN is unknown and not counted.
        boundaries (`Sequence[float]`): P times in increasing order, in the unit of `time`.
        smoothing (`float`, defaults to 20): s, pseudo-events that have the overall mean.

    Returns:
        `rates` and `counts`, both `np.ndarray` of shape (P + 1, size), float32. Row p holds what is known from events
        before boundary p - 1, row 0 nothing at all. Rates are log-odds of (sum + s mean) / (count + s) minus those of
        the mean, so 0 is "as all others, or unknown"; counts are log(1 + count).

    Raises:
        ValueError: an index outside 0 to `size - 1`, or `smoothing` that is not above 0.
    """
    counted = PastRates(size, boundaries)
    counted.add(time, index, labels)
    return counted.rates(smoothing)


class PastRates:
    """
    [`past_rates`] of events that come in parts, in any order: only the counts of items by period are held.

    Args:
        size (`int`): How many items (users, authors, tags, ...) there are. Memory: 16 bytes * (P + 2) * `size`.
        boundaries (`Sequence[float]`): P times in increasing order, in the unit of the events' `time`.
    """

    def __init__(self, size: int, boundaries: Sequence[float] | np.ndarray):
        self.size, self.boundaries = size, np.asarray(boundaries)
        # an event of period q is known from period q + 1 on
        self._counts = np.zeros((len(self.boundaries) + 2, size), dtype=np.int64)
        self._sums = np.zeros((len(self.boundaries) + 2, size))

    def add(self, time: np.ndarray, index: np.ndarray, labels: np.ndarray) -> None:
        """
        Counts some more events.

        Args:
            time, index, labels (`np.ndarray` of shape (M,)): As [`past_rates`]'s.

        Raises:
            ValueError: An index outside 0 to `size - 1`.
        """
        index = np.asarray(index)
        if len(index) and not 0 <= index.min() <= index.max() < self.size:
            raise ValueError(
                f"index must lie in 0..{self.size - 1}, got {index.min()}..{index.max()}: leave unknown ones out."
            )
        known = ~np.isnan(labels)
        index, labels = index[known], np.asarray(labels, dtype=np.float64)[known]
        cells = (period_of(np.asarray(time)[known], self.boundaries) + 1) * self.size + index
        self._counts += np.bincount(cells, minlength=self._counts.size).reshape(self._counts.shape)
        self._sums += np.bincount(cells, labels, minlength=self._sums.size).reshape(self._sums.shape)

    def rates(self, smoothing: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
        """
        What [`past_rates`] returns, of all events so far.

        Args:
            smoothing (`float`, defaults to 20): As [`past_rates`]'s; not above 0: a ValueError.
        """
        if smoothing <= 0:
            raise ValueError(f"smoothing={smoothing}: above 0, or an item with one event has a rate of 0 or 1.")
        count, total = self._counts.cumsum(0)[:-1], self._sums.cumsum(0)[:-1]
        seen = count.sum(1, keepdims=True)
        # the mean itself is smoothed by one event of each kind: a period without positives has finite log-odds
        mean = (total.sum(1, keepdims=True) + 1) / (seen + 2)
        rate = (total + smoothing * mean) / (count + smoothing)
        rates = np.log(rate / (1 - rate)) - np.log(mean / (1 - mean))
        return rates.astype(np.float32), np.log1p(count).astype(np.float32)


def quantile_codes(values: np.ndarray, num_buckets: int) -> np.ndarray:
    """
    Numbers (lengths, sizes, dates) as categories of nearly equally many rows.

    Args:
        values (`np.ndarray` of shape (rows,)): NaN is unknown; infinite ones are in the first or the last bucket.

    Returns:
        `np.ndarray` of shape (rows,), int64: 1 to `num_buckets` in order of value, fewer where many values are equal;
        0 for NaN.
    """
    values = np.asarray(values, dtype=np.float64)
    finite = values[np.isfinite(values)]
    shares = np.arange(1, num_buckets) / num_buckets
    edges = np.unique(np.quantile(finite, shares)) if len(finite) else np.zeros(0)
    return np.where(~np.isnan(values), np.searchsorted(edges, values, side="right") + 1, 0)


def rate_numbers(
    key: str,
    targets: Sequence[str],
    time: np.ndarray,
    index: np.ndarray,
    labels: np.ndarray,
    group: np.ndarray,
    boundaries: Sequence[float],
) -> dict[str, np.ndarray]:
    """
    [`past_rates`] of every objective as the numbers of items or users, ready for [`RewardCollator`].

    Args:
        key, targets: Names: the numbers are `{key}_{target}` and `{key}_count`.
        time (`np.ndarray` of shape (M,)): Of every event, in the unit of `boundaries`, such as milliseconds.
        index (`np.ndarray` of shape (M,)): Item (or user) of every event.
        labels (`np.ndarray` of shape (M, X)): As [`event_labels`] makes them.
        group (`np.ndarray` of shape (N,)): What each item is counted as: itself, its author, its first tag, ... Whole
            numbers from 0 on.
        boundaries (`Sequence[float]`): P times in increasing order.

    Returns:
        `dict[str, np.ndarray]` of shape (P + 1, N), float32, of order 1: rates as [`past_rates`] makes them, counts
        log(1 + count) / 5.
    """
    numbers = {}
    for x, target in enumerate(targets):
        rates, counts = past_rates(time, group[index], labels[:, x], int(group.max()) + 1, boundaries)
        numbers[f"{key}_{target}"] = rates[:, group]
    return numbers | {f"{key}_count": counts[:, group] / 5}
