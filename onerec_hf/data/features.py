"""Categorical features of events, items and users: what the papers' context tokens carry beside the semantic ID.

OneRec Technical Report, section 2.2.1 (play time, duration, label, author, tag, time); the bucket edges are not in the
papers. 0 always stands for "unknown", in every feature.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from transformers.utils import logging

from .time_units import NAMES, time_unit

logger = logging.get_logger(__name__)


class EventFeature(NamedTuple):
    """
    How one event column becomes a category.

    Args:
        kind: `"category"`: small whole numbers, value v becomes v + 1. `"log"`: non-negative amounts (ms, counts) in
            buckets that double. `"gap"`: the time since the user's previous event, as `"log"`; meant for `timestamp`.
            `"hour"`: hour of the day (UTC) of a time in ms.
        size: Number of values, 0 ("unknown") included; larger values, infinity among them, share the last one.
    """

    kind: Literal["category", "log", "gap", "hour"]
    size: int

    def encode(self, values: np.ndarray, name: str = "") -> np.ndarray:
        """
        Values of one user in time order, shape (T,) -> categories (T,), int64, 0 to `size - 1`; NaN and negatives give
        0.

        Models of earlier versions may have been trained with numbers that [`check`] refuses: they are encoded, with a
        warning per name. Fractions of a category are rounded down, times of an hour are taken for milliseconds.

        Raises:
            ValueError: No numbers; an unknown `kind`.
        """
        values = self._numbers(values, name)
        if self._fault(values):
            wrong = "fractions, which are rounded down"
            if self.kind == "hour":
                wrong = "times that are no milliseconds since 1970, of which the hour is a wrong one"
            logger.warning_once(
                f"{self._what(name)} got {wrong}: right for a model that was trained with such values, and refused "
                "when a training starts."
            )
        if self.kind in ("gap", "hour"):  # an infinite time has no hour and no distance
            values = np.where(np.isfinite(values), values, np.nan)
        if self.kind == "gap":
            values = np.concatenate([[np.nan], np.diff(values)])[: len(values)]
        known = ~np.isnan(values) & (values >= 0)
        values = np.where(known, values, 0)
        if self.kind == "category":
            codes = values
        elif self.kind == "hour":
            codes = values // 3_600_000 % 24
        else:
            codes = np.log2(values + 1)
        # clipped before the cast: what does not fit 64 bits would become -2^63
        return np.where(known, codes.clip(max=self.size - 2).astype(np.int64) + 1, 0)

    def check(self, values: np.ndarray, name: str = "") -> np.ndarray:
        """
        The values as float64.

        Args:
            values (`np.ndarray` of any shape): Of one user or of many.
            name: Of their column, for messages.

        Raises:
            ValueError: No numbers; fractions where `kind` is `"category"`; times in another unit than milliseconds
                where it is `"hour"`; an unknown `kind`.
        """
        numbers = self._numbers(values, name)
        if fault := self._fault(numbers):
            raise ValueError(f"{self._what(name)} takes {fault}")
        return numbers

    def _what(self, name: str) -> str:
        return f"event feature {name!r} of kind {self.kind!r}" if name else f"an event feature of kind {self.kind!r}"

    def _numbers(self, values: np.ndarray, name: str) -> np.ndarray:
        if self.kind not in ("category", "log", "gap", "hour"):
            raise ValueError(
                f"kind={self.kind!r} of an event feature: allowed are 'category', 'log', 'gap' and 'hour'."
            )
        try:
            return np.asarray(values, dtype=np.float64)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{self._what(name)} takes numbers, got {np.asarray(values).dtype} ({error}): number the values, "
                "from 0 on."
            ) from error

    def _fault(self, numbers: np.ndarray) -> str | None:
        """What would become a wrong category in silence, if anything."""
        if self.kind == "category":
            whole = (numbers < 0) | (np.floor(numbers) == numbers) | np.isnan(numbers)
            if (parts := numbers[~whole]).size:
                return (
                    f"whole numbers, got {parts[0]}, which would be the category of {parts[0] // 1:g}: number the "
                    "values from 0 on (ratings of 0.5, 1, 1.5 as 1, 2, 3), or give an amount the kind 'log'."
                )
        if self.kind == "hour" and (unit := time_unit(numbers)) not in (None, "ms"):
            return (
                f"milliseconds since 1970, got {numbers[np.isfinite(numbers)].max():.0f}, which is a date of today in "
                f"{NAMES[unit]}: load the log with times in milliseconds, or with dates."
            )
        return None


def check_event_features(features: Mapping[str, EventFeature], rows: datasets.Dataset) -> None:
    """
    Refuses what would become a wrong category in silence, before a training starts.

    Args:
        features: By name of the column.
        rows: Of a split. List columns of the name, alone or after `target_` or `lifelong_`, are looked at; what is
            absent is not.

    Raises:
        ValueError: As [`EventFeature.check`], which names the column.
    """
    for name, feature in features.items():
        for column in (name, f"target_{name}", f"lifelong_{name}"):
            if column in rows.column_names:
                for batch in rows.select_columns([column]).with_format("arrow").iter(batch_size=10_000):
                    values = batch[column].combine_chunks()
                    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
                        values = values.flatten()
                    feature.check(values.to_numpy(zero_copy_only=False), column)


def category_map(values: Sequence, max_size: int | None = None) -> dict[str, int]:
    """
    Categories 1, 2, ... of arbitrary values (strings, ids; of a list per row the first entry counts), the most
    frequent one first.

    Args:
        values: One value, None or list per row; their text is what is told apart.
        max_size: Number of categories, 0 included; rarer values are left out.

    Returns:
        `dict`: text of the value -> category. None, NaN and empty lists have none.
    """
    counts = Counter(text for text in map(_text, values) if text is not None)
    names = sorted(counts, key=lambda name: (-counts[name], name))
    return {name: place for place, name in enumerate(names[: None if max_size is None else max_size - 1], start=1)}


def category_codes(values: Sequence, categories: Mapping[str, int]) -> np.ndarray:
    """
    Values as categories of a [`category_map`].

    Returns:
        `np.ndarray` of shape (rows,), int64; None, NaN, empty lists and values that the map does not have give 0.
    """
    texts = map(_text, values)
    return np.array([0 if text is None else categories.get(text, 0) for text in texts], dtype=np.int64)


def _text(value: Any) -> str | None:
    if isinstance(value, (list, tuple, np.ndarray)):
        value = value[0] if len(value) else None
    if value is None or value != value or value == "":
        return None
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        value = int(value)  # of a column of whole numbers with a gap: 3.0 is the 3 of another table
    return str(value)


def reaches(columns: Mapping[str, Sequence | np.ndarray], thresholds: Mapping[str, float]) -> np.ndarray:
    """
    Events at which at least one column reaches its threshold: `{"is_like": 1, "play_time_ms": 30_000}` is "liked, or
    played for 30 s". NaN and -1 ("unknown") never do.

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


def event_column(row: dict, name: str, parallel_to: str = "history") -> np.ndarray:
    """An event column of a row, checked: as many values as the list column `parallel_to`."""
    if name not in row:
        raise KeyError(
            f"the rows have no column {name!r} for the event feature of that name; they have {sorted(row)}."
        )
    if len(row[name]) != len(row[parallel_to]):
        raise ValueError(
            f"column {name!r} has {len(row[name])} values, the {parallel_to} {len(row[parallel_to])}: they run in "
            "parallel."
        )
    return np.asarray(row[name])
