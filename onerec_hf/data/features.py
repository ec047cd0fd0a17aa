"""Categorical features of events, items and users: what the papers' context tokens carry beside the semantic ID.

OneRec Technical Report, section 2.2.1 (play time, duration, label, author, tag, time); the bucket edges are not in the papers. 0
always stands for "unknown", in every feature.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np


class EventFeature(NamedTuple):
    """
    How one event column becomes a category.

    Args:
        kind: `"category"`: small whole numbers, value v becomes v + 1. `"log"`: non-negative amounts (ms, counts) in buckets that
            double. `"gap"`: the time since the user's previous event, as `"log"`; meant for `timestamp`. `"hour"`: hour of the day
            (UTC) of a time in ms.
        size: Number of values, 0 ("unknown") included; larger values share the last one.
    """

    kind: Literal["category", "log", "gap", "hour"]
    size: int

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Values of one user in time order, shape (T,) -> categories (T,), int64, 0 to `size - 1`; NaN and negatives give 0."""
        values = np.asarray(values, dtype=np.float64)
        if self.kind == "gap":
            values = np.concatenate([[np.nan], np.diff(values)])[: len(values)]
        known = ~np.isnan(values) & (values >= 0)
        values = np.where(known, values, 0)
        if self.kind == "category":
            codes = values.astype(np.int64) + 1
        elif self.kind == "hour":
            codes = (values // 3_600_000 % 24).astype(np.int64) + 1
        elif self.kind in ("log", "gap"):
            codes = np.log2(values + 1).astype(np.int64) + 1
        else:
            raise ValueError(
                f"kind={self.kind!r} of an event feature: allowed are 'category', 'log', 'gap' and 'hour'."
            )
        return np.where(known, codes.clip(max=self.size - 1), 0)


def category_codes(values: Sequence, max_size: int | None = None) -> np.ndarray:
    """
    Categories of arbitrary values (strings, ids; of a list per row the first entry counts): the most frequent value is 1.

    Args:
        values: One value, None or list per row.
        max_size: Number of categories, 0 included; rarer values share 0.

    Returns:
        `np.ndarray` of shape (rows,), int64; None, NaN and empty lists give 0.
    """
    flat = [value[0] if isinstance(value, (list, tuple, np.ndarray)) and len(value) else value for value in values]
    missing = [v is None or v != v or (isinstance(v, (list, np.ndarray)) and not len(v)) for v in flat]
    text = np.array(["" if gone else str(value) for value, gone in zip(flat, missing)])
    names, inverse, counts = np.unique(text, return_inverse=True, return_counts=True)
    counts = np.where(names == "", -1, counts)
    rank = np.empty(len(names), dtype=np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(1, len(names) + 1)
    rank[names == ""] = 0
    if max_size is not None:
        rank[rank >= max_size] = 0
    return rank[inverse]


def reaches(columns: Mapping[str, Sequence | np.ndarray], thresholds: Mapping[str, float]) -> np.ndarray:
    """
    Events at which at least one column reaches its threshold: `{"is_like": 1, "play_time_ms": 30_000}` is "liked, or played for
    30 s". NaN and -1 ("unknown") never do.

    Returns:
        `np.ndarray` of shape (events,), bool; all False without thresholds.

    Raises:
        ValueError: a column that is not there, or a threshold that is not positive.
    """
    if absent := [name for name in thresholds if name not in columns]:
        raise ValueError(f"no event column {absent} to compare with {dict(thresholds)}; there are {sorted(columns)}.")
    if low := [name for name, least in thresholds.items() if not least > 0]:
        raise ValueError(
            f"the thresholds of {low} must be above 0, where 'no' and 'unknown' lie; got {dict(thresholds)}."
        )
    masks = [np.asarray(columns[name], dtype=np.float64) >= least for name, least in thresholds.items()]
    length = len(next(iter(columns.values()), ()))
    return np.logical_or.reduce(masks) if masks else np.zeros(length, dtype=bool)
