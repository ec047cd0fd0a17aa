"""Interaction logs as numpy arrays: the container, and loading with checked input.

Time order inside a user is the order of the timestamps; equal timestamps keep the row order of the source.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
from transformers.utils import logging

from .log_columns import LogColumns, check_feedback_names
from .tables import index_ids, numpy_values, read_table

logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class Interactions:
    """Events of U users on N items, sorted by user, then by time.

    An *item index* is a row 0..N-1 of everything that describes items: `item_ids`, the values of `items`, item
    embeddings (N, D), semantic IDs (N, L). Original ids occur in `item_ids` and `user_ids` only.

    Args:
        user_index (`np.ndarray` of shape (M,), int64): user of each event, 0..U-1, not decreasing.
        item_index (`np.ndarray` of shape (M,), int64): item of each event, 0..N-1.
        timestamp (`np.ndarray` of shape (M,), int64 or float64): time of each event in any unit, not decreasing
            inside a user; 0, 1, 2, ... inside each user where only the order is known.
        user_ids (`np.ndarray` of shape (U,)): original ids, integers or strings.
        item_ids (`np.ndarray` of shape (N,)): original ids, integers or strings.
        feedback (`dict[str, np.ndarray]`): one array of shape (M,) per event feature (`play_time_ms`, `is_like`, ...).
        items (`dict[str, np.ndarray | list]`): item features or text, N values each; integers with gaps are a list
            with None.
        users (`dict[str, np.ndarray | list]`): user features, U values each.

    Raises:
        ValueError: lengths that differ, an index out of range, or events that are not sorted.
    """

    user_index: np.ndarray
    item_index: np.ndarray
    timestamp: np.ndarray
    user_ids: np.ndarray
    item_ids: np.ndarray
    feedback: dict[str, np.ndarray] = field(default_factory=dict)
    items: dict[str, np.ndarray | list] = field(default_factory=dict)
    users: dict[str, np.ndarray | list] = field(default_factory=dict)

    def __post_init__(self):
        _check_lengths({"item_index": self.item_index, "timestamp": self.timestamp}, len(self), "event")
        _check_lengths(self.feedback, len(self), "event")
        _check_lengths(self.items, self.num_items, "item")
        _check_lengths(self.users, self.num_users, "user")
        check_feedback_names(self.feedback)
        for name, index, size in (
            ("user_index", self.user_index, self.num_users),
            ("item_index", self.item_index, self.num_items),
        ):
            if index.dtype != np.int64:
                raise ValueError(f"{name} must be int64, got {index.dtype}")
            if len(index) and (index.min() < 0 or index.max() >= size):
                raise ValueError(f"{name} must lie in 0..{size - 1}, got {index.min()}..{index.max()}")
        if self.timestamp.dtype not in (np.int64, np.float64):
            raise ValueError(f"timestamp must be int64 or float64, got {self.timestamp.dtype}")
        if not np.isfinite(self.timestamp).all():
            raise ValueError(f"timestamp holds {(~np.isfinite(self.timestamp)).sum()} NaN or infinite values")
        if not _is_sorted(self.user_index, self.timestamp):
            raise ValueError("events must be sorted by user, then by timestamp; load_interactions() sorts them")

    def __len__(self) -> int:
        return len(self.user_index)

    def __repr__(self) -> str:
        return (
            f"Interactions({len(self)} events, {self.num_users} users, {self.num_items} items, "
            f"feedback={list(self.feedback)}, items={list(self.items)}, users={list(self.users)})"
        )

    def where(self, rows: np.ndarray) -> "Interactions":
        """Some of the events, chosen by a bool mask of shape (M,), of the same users and items.

        Raises:
            ValueError: anything but such a mask, such as a column of 0 and 1, which numpy would read as row numbers.
        """
        rows = np.asarray(rows)
        if rows.dtype != bool or rows.shape != (len(self),):
            raise ValueError(
                f"where() takes a bool mask of shape ({len(self)},), got {rows.dtype} of shape {rows.shape}; compare "
                "the column, such as feedback['is_like'] == 1"
            )
        return replace(
            self,
            user_index=self.user_index[rows],
            item_index=self.item_index[rows],
            timestamp=self.timestamp[rows],
            feedback={name: values[rows] for name, values in self.feedback.items()},
        )

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def user_offsets(self) -> np.ndarray:
        """`np.ndarray` of shape (U + 1,): the events of user u are rows `user_offsets[u]:user_offsets[u + 1]`."""
        return np.concatenate([[0], np.cumsum(np.bincount(self.user_index, minlength=self.num_users))])


def _check_lengths(columns: Mapping[str, Any], expected: int, per: str) -> None:
    for name, values in columns.items():
        if len(values) != expected:
            raise ValueError(f"{name} has {len(values)} values, expected {expected}, one per {per}")


def _is_sorted(user_index: np.ndarray, timestamp: np.ndarray) -> bool:
    same_user = user_index[1:] == user_index[:-1]
    return bool(((user_index[1:] > user_index[:-1]) | (same_user & (timestamp[1:] >= timestamp[:-1]))).all())


def load_interactions(
    source: Any,
    *,
    columns: Mapping[str, str | None] | None = None,
    feedback: Sequence[str] = (),
    items: Any = None,
    items_columns: Mapping[str, str] | None = None,
    users: Any = None,
    users_columns: Mapping[str, str] | None = None,
    split: str = "train",
    drop_nulls: bool = False,
    drop_duplicates: bool = False,
    drop_unknown: bool = False,
) -> Interactions:
    """Reads an interaction log, one row per event, and joins item and user features by id.

    Args:
        source: a `.parquet`, `.csv`, `.tsv`, `.jsonl` or `.json` file (one object a line; text files also as `.gz`), a
            pattern of such files (`logs/*.parquet`), a folder of parquet files or of `datasets.save_to_disk`, a
            `datasets.Dataset` or `IterableDataset` (read to its end), a `DataFrame` of pandas or polars, a
            `pyarrow.Table`, `RecordBatchReader` or `Dataset`, a dict of arrays, a list of dicts, or the name of a data
            set on the Hub. Of a Hub data set and of a saved `DatasetDict`, `split` is read.
        columns: our name -> column of the source, for `user_id`, `item_id`, `timestamp` and the names in `feedback`;
            a name that is left out is itself the column. `{"timestamp": None}`: the rows are in time order, and the
            timestamps become 0, 1, 2, ... inside each user.
        feedback: event features to carry, by our name: numbers, booleans or strings, in the type of the source.
        items: table of item features (same kinds as `source`). Its rows, in their order, **become** the item
            indices, items without events included. Without it, the item indices are the ids of the log, sorted.
        items_columns: as `columns`, for `items`; columns that are not named keep their name, unless another one is
            mapped to it: then they are left out with a warning. Default: the `item_id` of `columns`.
        users, users_columns: the same for users. Users without events are left out: user indices are always the ids
            of the log, sorted.
        split: split of a Hub data set or of a saved `DatasetDict`.
        drop_nulls: drop events with null, NaN or infinite values (counted in a warning) in place of raising.
        drop_duplicates: drop the repeats of events that are equal in user, item, timestamp and all feedback. By
            default they are counted in a warning and kept.
        drop_unknown: drop events of items (users) that `items` (`users`) does not have, in place of raising.

    Ids are names: integers that fit 64 bits, or text, blank text being null. In a CSV file they are integers only if
    every one of the column is written as an integer is (`7`, not `007`); so is feedback named `..._id`, such as
    `request_id`. The same id may be an integer in one table and text in the other: 7 and '7' are equal, '007' is
    another id; the type is the log's, if the ids of the table can have it.

    Timestamps are integers, floats, dates, or ISO 8601 strings. Numbers keep their unit; dates and strings become
    milliseconds since 1970 UTC (no zone: UTC), after they have been sorted in their full precision. Unsorted logs are
    sorted; equal timestamps of a user keep their row order and are counted in a warning.

    Returns:
        [`Interactions`]

    Raises:
        ValueError: a missing column, no rows, nulls, infinite values, timestamps that are neither numbers nor ISO
            strings, ids that are not whole or do not fit 64 bits, ids that the joined table lacks or has twice, or
            feedback with a name that rows of splits need.
        TypeError: a source or a column of an unknown kind.
        FileNotFoundError: a path that does not exist.
    """
    log_columns = LogColumns(columns, feedback, split=split, drop_nulls=drop_nulls, drop_unknown=drop_unknown)
    table = read_table(source, split, ids=log_columns.ids, columns=log_columns.asked)
    log_columns.read_tables(items=(items, items_columns), users=(users, users_columns))
    log = log_columns.convert(table)
    log_columns.check()
    tables = log_columns.tables
    user_ids, user_index = index_ids(log["user_id"].combine_chunks())
    item_ids, item_index = index_ids(log["item_id"].combine_chunks())
    if items is not None:
        position = pc.index_in(item_ids, value_set=tables["items"]["item_id"]).to_numpy()
        item_ids, item_index = tables["items"]["item_id"], position[item_index].astype(np.int64)
    if users is not None:
        rows = pc.index_in(user_ids, value_set=tables["users"]["user_id"])
        tables["users"] = {name: column.take(rows) for name, column in tables["users"].items()}
    timestamp = numpy_values(log["timestamp"]) if log_columns.has_time else None
    values = {name: numpy_values(log[name]) for name in feedback}
    ties = Counter[str]()
    user_index, item_index, timestamp, values = sort_events(
        user_index, item_index, timestamp, values, drop_duplicates, ties
    )
    report_ties(ties, drop_duplicates)
    return Interactions(
        user_index=user_index,
        item_index=item_index,
        timestamp=timestamp // log_columns.units if log_columns.units > 1 else timestamp,
        user_ids=numpy_values(user_ids),
        item_ids=numpy_values(item_ids),
        feedback=values,
        items=log_columns.features("items"),
        users=log_columns.features("users"),
    )


def sort_events(
    user_index: np.ndarray,
    item_index: np.ndarray,
    timestamp: np.ndarray | None,
    feedback: dict[str, np.ndarray],
    drop_duplicates: bool,
    ties: Counter[str],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Stable sort by user and time; adds to `ties` how many timestamps are equal, and how many events."""
    order: slice | np.ndarray
    if timestamp is None:
        order = np.argsort(user_index, kind="stable")
        counts = np.bincount(user_index)
        timestamp_sorted = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    else:
        order = slice(None) if _is_sorted(user_index, timestamp) else np.lexsort((timestamp, user_index))
        timestamp_sorted = timestamp[order]
    user_index, item_index, timestamp = user_index[order], item_index[order], timestamp_sorted
    feedback = {name: values[order] for name, values in feedback.items()}
    tied = np.zeros(len(user_index) + 1, dtype=bool)  # event i has the user and time of event i - 1
    tied[1:-1] = (user_index[1:] == user_index[:-1]) & (timestamp[1:] == timestamp[:-1])
    ties.update(events=len(user_index), tied=int(tied.sum()))
    if not tied.any():
        return user_index, item_index, timestamp, feedback

    rows = np.flatnonzero(tied[:-1] | tied[1:])
    keys = [np.unique(values[rows], return_inverse=True)[1] for values in feedback.values()]
    keys += [item_index[rows], timestamp[rows], user_index[rows]]
    by_key = np.lexsort(keys)  # stable: of equal events the first comes first
    repeats = np.logical_and.reduce([key[by_key][1:] == key[by_key][:-1] for key in keys])
    duplicates = rows[by_key[1:][repeats]]
    ties.update(duplicates=len(duplicates))
    if not drop_duplicates:
        return user_index, item_index, timestamp, feedback
    keep = np.ones(len(user_index), dtype=bool)
    keep[duplicates] = False
    feedback = {name: values[keep] for name, values in feedback.items()}
    return user_index[keep], item_index[keep], timestamp[keep], feedback


def report_ties(ties: Counter[str], drop_duplicates: bool) -> None:
    """Warns of what [`sort_events`] counted."""
    if ties["tied"]:
        logger.warning(
            f"{ties['tied']} of {ties['events']} events have the user and time of the event before (row order "
            f"decides); {ties['duplicates']} of them repeat an event in user, item, timestamp and feedback and are "
            f"{'dropped' if drop_duplicates else 'kept (drop_duplicates=True drops them)'}"
        )
