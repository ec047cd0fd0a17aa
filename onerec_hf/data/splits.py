"""k-core filter and time-ordered splits: leave last out (S3-Rec protocol, arXiv:2008.07873) and global time.

A split has one row per user with flat lists, so that a collator slices and reshapes without nested Python objects.
"""

from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
from transformers.utils import logging

from .interactions import Interactions

logger = logging.get_logger(__name__)

SPLITS = ("train", "validation", "test")


def k_core(interactions: Interactions, k: int) -> Interactions:
    """Keeps users and items with at least `k` events each, repeated until nothing changes; indices are made anew.

    Item and user features follow their rows; items without events are dropped.

    Raises:
        ValueError: `k` below 1, or no event is left.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    user_index, item_index = interactions.user_index, interactions.item_index
    rows = np.arange(len(interactions))
    while True:
        users = np.bincount(user_index[rows], minlength=interactions.num_users)
        items = np.bincount(item_index[rows], minlength=interactions.num_items)
        kept = rows[(users[user_index[rows]] >= k) & (items[item_index[rows]] >= k)]
        if len(kept) == len(rows):
            break
        rows = kept
    if not len(rows):
        raise ValueError(f"the {k}-core of {interactions!r} is empty; lower k")
    keep_user, keep_item = users >= k, items >= k
    return Interactions(
        user_index=(np.cumsum(keep_user) - 1)[user_index[rows]],
        item_index=(np.cumsum(keep_item) - 1)[item_index[rows]],
        timestamp=interactions.timestamp[rows],
        user_ids=interactions.user_ids[keep_user],
        item_ids=interactions.item_ids[keep_item],
        feedback={name: values[rows] for name, values in interactions.feedback.items()},
        items=take_features(interactions.items, keep_item),
        users=take_features(interactions.users, keep_user),
    )


def take_features(features: dict[str, np.ndarray | list], keep: np.ndarray) -> dict[str, np.ndarray | list]:
    """The values of the items or users that a bool mask keeps."""
    return {
        name: values[keep] if isinstance(values, np.ndarray) else [v for v, kept in zip(values, keep) if kept]
        for name, values in features.items()
    }


def leave_last_out(interactions: Interactions) -> datasets.DatasetDict:
    """The last event of each user is the test target, the one before it the validation target, the rest is training.

    A user with two events has no validation row (the first event is training, the second the test target); a user
    with one event has a training row only; a user whose events [`Interactions.where`] all left out has no row. All are
    counted in a warning.

    Returns:
        `datasets.DatasetDict` with `train`, `validation`, `test`, one row per user, sorted by user:

        - `user` (int32): user index.
        - `history` (`List(int32)`): item indices in time order. Validation: what precedes the validation target;
          test: what precedes the test target, the validation target included.
        - `timestamp` and one column per `feedback`: parallel to `history`.
        - `targets` (`List(int32)`, validation and test only): the one target item.

    Raises:
        ValueError: no events.
    """
    _check_events(interactions)
    return split_whole(LeaveLastOut(), interactions)


def global_time_split(
    interactions: Interactions, validation_start: float, test_start: float | None, min_history: int = 0
) -> datasets.DatasetDict:
    """One boundary in time for all users, as in a deployed system.

    Training: events before `validation_start`. Validation: users with events in `[validation_start, test_start)`;
    these are the `targets`, what is before `validation_start` is the history. Test: users with events from
    `test_start` on, history before it (the validation period included).

    Args:
        validation_start, test_start: in the unit of `interactions.timestamp`.
        min_history: validation and test users with fewer events before the boundary are left out (counted in a
            warning). 0 keeps users with an empty history (cold users, also counted).

    Returns:
        `datasets.DatasetDict` with the columns of [`leave_last_out`]; `targets` holds every item of the period.

    Raises:
        ValueError: boundaries that are not in order, or a split without rows.
    """
    splitter = GlobalTimeSplit(validation_start, test_start, min_history)
    _check_events(interactions)
    return split_whole(splitter, interactions)


class Splitter:
    """
    How a log becomes splits, shard by shard: `rows` of every shard, then `finish` once.

    What is left out, or missing, is counted over all of them; `finish` warns of it, or raises.

    Attributes:
        counts: What was counted so far.
        times: The first and the last time of every shard, where `finish` says them.
    """

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.times: list[float] = []

    def rows(self, interactions: Interactions) -> datasets.DatasetDict:
        """
        The rows of the users of a shard.

        Args:
            interactions ([`Interactions`]): All events of these users; `user` in the rows is the number of the user
                here.

        Returns:
            `datasets.DatasetDict` with `train`, `validation` and `test`, each of which may be empty.
        """
        raise NotImplementedError

    def training_events(self, interactions: Interactions, splits: datasets.DatasetDict) -> datasets.Dataset:
        """What may be learned about items without seeing what is held out, from `rows`' splits of the same shard."""
        return splits["train"]

    def finish(self) -> None:
        """To be called once, after the last shard: warns of what was left out. It may raise a ValueError where a split
        has no row in any shard.
        """


def split_whole(splitter: Splitter, interactions: Interactions) -> datasets.DatasetDict:
    """The splits of a log in one piece."""
    splits = splitter.rows(interactions)
    splitter.finish()
    return splits


class LeaveLastOut(Splitter):
    """[`leave_last_out`] of a log in shards."""

    def rows(self, interactions: Interactions) -> datasets.DatasetDict:
        """The rows of the shard's users, with the columns of [`leave_last_out`]; a split may be empty."""
        first, end = interactions.user_offsets[:-1], interactions.user_offsets[1:]
        count = end - first
        one, two, three = count >= 1, count >= 2, count >= 3
        self.counts.update(
            users=len(count), few=int((~three).sum()), single=int((one & ~two).sum()), none=int((~one).sum())
        )
        users = np.arange(len(count))
        train_end = np.where(three, end - 2, np.maximum(end - 1, first + 1))
        return datasets.DatasetDict(
            train=user_rows(interactions, users[one], first[one], train_end[one]),
            validation=user_rows(interactions, users[three], first[three], end[three] - 2, end[three] - 1),
            test=user_rows(interactions, users[two], first[two], end[two] - 1, end[two]),
        )

    def finish(self) -> None:
        """Warns of users with fewer than 3 events in all shards; raises nothing, also where a split is empty."""
        if self.counts["few"]:
            logger.warning(
                f"{self.counts['few']} of {self.counts['users']} users have fewer than 3 events: they have no "
                f"validation row, the {self.counts['single']} with one event no test row, the {self.counts['none']} "
                "without events no row at all; k_core(interactions, 3) removes them"
            )


class GlobalTimeSplit(Splitter):
    """
    [`global_time_split`] of a log in shards.

    Args:
        validation_start, test_start, min_history: As [`global_time_split`]'s.

    Raises:
        ValueError: Boundaries that are not in order, or only one of them.
    """

    def __init__(self, validation_start: float, test_start: float | None, min_history: int = 0):
        super().__init__()
        if test_start is None or not validation_start < test_start:
            raise ValueError(
                f"validation_start ({validation_start}) must lie before test_start ({test_start}): give both."
            )
        self.boundaries, self.min_history = (validation_start, test_start), min_history

    def rows(self, interactions: Interactions) -> datasets.DatasetDict:
        """The rows of the shard's users, with the columns of [`global_time_split`]; a split may be empty."""
        first, end = interactions.user_offsets[:-1], interactions.user_offsets[1:]
        validation_first, test_first = (first + _count_before(interactions, time) for time in self.boundaries)
        users = np.flatnonzero(validation_first > first)
        splits = {"train": user_rows(interactions, users, first[users], validation_first[users])}
        for name, start, stop in (("validation", validation_first, test_first), ("test", test_first, end)):
            active = stop > start
            cold, short = active & (start == first), active & (start - first < self.min_history)
            found = {"active": active, "cold": cold, "short": short}
            self.counts.update({f"{name} {key}": int(mask.sum()) for key, mask in found.items()})
            users = np.flatnonzero(active & ~short)
            splits[name] = user_rows(interactions, users, first[users], start[users], stop[users])
        self.counts.update({f"{name} rows": len(split) for name, split in splits.items()})
        if len(interactions):
            self.times += [interactions.timestamp.min().item(), interactions.timestamp.max().item()]
        return datasets.DatasetDict(splits)

    def finish(self) -> None:
        """
        Warns of users without a history, and of those left out for `min_history`.

        Raises:
            ValueError: A split has no row in any shard.
        """
        for name in ("validation", "test"):
            active, cold, short = (self.counts[f"{name} {key}"] for key in ("active", "cold", "short"))
            if cold or short:
                logger.warning(
                    f"{name}: {cold} of {active} users have no event before the period; {short} are left out for "
                    f"fewer than {self.min_history} events before it (min_history)"
                )
        if empty := [name for name in SPLITS if not self.counts[f"{name} rows"]]:
            reach = f"reach from {min(self.times)} to {max(self.times)}" if self.times else "are none"
            raise ValueError(
                f"no rows in {empty}: the timestamps {reach}, the boundaries are {self.boundaries[0]} and "
                f"{self.boundaries[1]}"
            )


def target_rows(train: datasets.Dataset, max_history: int) -> datasets.Dataset:
    """
    One row per event that has events before it: what a model trains on whose encoder mixes the context (OneRec,
    OneRecV1).

    Args:
        train: The training split of [`leave_last_out`] or [`global_time_split`].
        max_history: Events of context at most; older ones are dropped.

    Returns:
        `datasets.Dataset` with `user`, `history` (1 to `max_history` items), the event columns parallel to it,
        `targets` (one item) with its own event columns as `target_<column>`, `session_start` (its time) and `length`
        (of the history).
    """
    table = train.with_format("arrow")[:]
    lists = [name for name, feature in train.features.items() if isinstance(feature, datasets.List)]
    offsets = table["history"].combine_chunks().offsets.to_numpy()
    count = np.diff(offsets)
    start = np.repeat(offsets[:-1], count)  # first event of each event's user
    event = np.arange(offsets[0], offsets[-1])
    target = event[event > start]
    first = np.maximum(start[event > start], target - max_history)
    rows, bounds = ranges(first, target)
    values = {name: table[name].combine_chunks().values for name in lists}
    columns = {"user": pa.array(np.repeat(table["user"].to_numpy(), count)[event > start], pa.int32())}
    columns |= {name: pa.ListArray.from_arrays(bounds, value.take(pa.array(rows))) for name, value in values.items()}
    one = pa.array(np.arange(len(target) + 1, dtype=np.int32))
    own = {name: value.take(pa.array(target)) for name, value in values.items()}
    columns["targets"] = pa.ListArray.from_arrays(one, own.pop("history"))
    columns |= {f"target_{name}": pa.ListArray.from_arrays(one, value) for name, value in own.items()}
    if "timestamp" in own:
        columns["session_start"] = own["timestamp"]
    columns["length"] = pa.array(target - first)
    return arrow_dataset(columns)


def _check_events(interactions: Interactions) -> None:
    if not len(interactions):
        raise ValueError(f"{interactions!r} has no events to split; if where() chose them, choose more")


def _count_before(interactions: Interactions, time: float) -> np.ndarray:
    before = interactions.user_index[interactions.timestamp < time]
    return np.bincount(before, minlength=interactions.num_users)


def user_rows(
    interactions: Interactions,
    users: np.ndarray,
    first: np.ndarray,
    stop: np.ndarray,
    target_stop: np.ndarray | None = None,
) -> datasets.Dataset:
    """One row per user: history = events first..stop-1 (row numbers), targets = events stop..target_stop-1."""
    history, offsets = ranges(first, stop)
    lists = {"history": interactions.item_index[history].astype(np.int32)}
    lists |= {"timestamp": interactions.timestamp[history]}
    lists |= {name: values[history] for name, values in interactions.feedback.items()}
    columns = {"user": pa.array(users, pa.int32())}
    columns |= {name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in lists.items()}
    if target_stop is not None:
        targets, target_offsets = ranges(stop, target_stop)
        items = pa.array(interactions.item_index[targets].astype(np.int32))
        columns["targets"] = pa.ListArray.from_arrays(target_offsets, items)
    return arrow_dataset(columns)


def arrow_dataset(columns: dict[str, pa.Array] | pa.Table) -> datasets.Dataset:
    """A `datasets.Dataset` of Arrow columns, without files: nothing is cached on disk."""
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    info = datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(table.schema))
    # the fingerprint is for caches; by default it is a hash of the whole table
    fingerprint = datasets.fingerprint.generate_random_fingerprint()
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=info, fingerprint=fingerprint)


def ranges(first: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, pa.Array]:
    """Row numbers of the ranges first..stop-1 one after another, and their offsets."""
    offsets = np.concatenate([[0], np.cumsum(stop - first)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(
            f"the lists of a split hold {offsets[-1]} events in all, more than 2^31 - 1: split the log by users"
        )
    rows = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], stop - first)
    return rows, pa.array(offsets, pa.int32())
